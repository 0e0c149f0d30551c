"""Saved models for programs on transformers 4: vLLM, llama.cpp's converter and others read its names of fields."""

import json
from pathlib import Path
from typing import Any


def write_older_names(folder: Path) -> None:
    """Give a folder that transformers 5 has written the fields of transformers 4 as well; both read it alike."""
    for name, add in (("config.json", _older_config), ("tokenizer_config.json", _older_tokenizer)):
        path = folder / name
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            add(content)
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _older_config(config: dict[str, Any]) -> None:
    """rope_theta and rope_scaling: without them transformers 4 takes 10,000 and none, and says nothing.

    n_ctx: llama.cpp's converter needs it of a GPT-2.
    """
    if config.get("model_type") == "gpt2":
        config.setdefault("n_ctx", config["n_positions"])
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        rope = part.get("rope_parameters")
        if not isinstance(rope, dict):
            continue
        local = rope.get("sliding_attention")  # a model with one set for each type of layer
        if isinstance(local, dict) and "rope_theta" in local:
            part["rope_local_base_freq"] = local["rope_theta"]
        rope = rope.get("full_attention", rope)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                part[name] = rope[name]
        if rope.get("rope_type", "default") != "default":
            part["rope_scaling"] = rope
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]


def _older_tokenizer(config: dict[str, Any]) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a dictionary there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
