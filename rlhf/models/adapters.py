"""Models that come with adapters, in whichever way: each becomes a PEFT model with one active LoRA adapter."""

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from transformers.utils import find_adapter_config_file

from rlhf.distributed.sharding import is_sharded
from rlhf.errors import UserError
from rlhf.models.unwrap import Model, is_quantised

BASE_UNCHANGED = (True, False, "gaussian")  # values of init_lora_weights
# LoRA options that act outside of the layers (on the tokens, on which layers there are), in training only, or on a bias
# that layers may not have, so that they cannot be merged.
_NOT_IN_LAYERS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "velora_config",
)


def check_lora(name: str, config: PeftConfig) -> None:
    """A UserError unless this is LoRA: what PPO reads of a model has to be in its layers. name: what an error names."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" or not isinstance(config, LoraConfig):
        raise UserError(f"{name}: expected a LoRA adapter, found {kind}: only LoRA is supported")
    odd = [option for option in _NOT_IN_LAYERS if getattr(config, option, None)]
    if odd:
        raise UserError(f"{name}: expected a plain LoRA adapter, found one with {', '.join(odd)}")


def with_adapters(name: str, model: Any) -> Model:
    """The model; one whose adapters were put into its layers without a PeftModel, as transformers does, gets one.

    A UserError unless all adapters are LoRA's, on, and exactly one is active. Merged ones are taken out of the weights
    again. name: the argument that an error names.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if not configs and not adapted:
        return model
    for config in configs.values():
        check_lora(name, config)
    if not configs:
        raise UserError(f"{name}: expected a PeftModel, found layers with adapters and no peft_config")
    status = get_model_status(model)
    active = status.active_adapters
    if status.enabled is not True:
        raise UserError(f"{name}: expected its adapters on, found them off; enable them, or unload() them")
    if isinstance(active, str) or len(active) != 1:
        found = active if isinstance(active, str) else ", ".join(active) or "none"
        raise UserError(f"{name}: expected one active adapter, found {found}; merge the others first")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            module.unmerge()
    wrapped = model if isinstance(model, PeftModel) else _around(model, configs)
    wrapped.set_adapter(active[0])  # also where the layers were switched below the PeftModel
    return wrapped


def _around(model: Any, configs: dict[str, Any]) -> PeftModel:
    """A PeftModel around a model that has adapters in its layers; they keep their names and numbers."""
    # PEFT would begin with the adapters' first numbers.
    kept = {
        name: {
            f"base_model.model.{key}": tensor.detach().clone()
            for key, tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()
        }
        for name in configs
    }
    first, *others = configs
    training = model.training
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        wrapped = get_peft_model(_never_loaded(model), copy_of_config(configs[first]), adapter_name=first)
    for name in others:
        wrapped.add_adapter(name, copy_of_config(configs[name]))
    for name, state in kept.items():
        set_peft_model_state_dict(wrapped, state, adapter_name=name)
        wrapped.peft_config[name].init_lora_weights = configs[name].init_lora_weights
    wrapped.train(training)
    return wrapped


def copy_of_config(config: PeftConfig) -> Any:
    """The settings of an adapter for one more on the same layers, whose base must not change again, as by PiSSA's."""
    again: Any = copy.deepcopy(config)
    if again.init_lora_weights not in BASE_UNCHANGED:
        again.init_lora_weights = True
    return again


def _never_loaded(model: Any) -> Any:
    """A model of the same layers without transformers' notes on the adapters that it has loaded.

    By these it saves a merged copy under other names than the weights have. A quantised model is never saved merged.
    """
    if is_quantised(model):
        return model
    with torch.device("meta"):
        again = type(model)(model.config)
    for parts in (model.named_children(), model.named_parameters(recurse=False), model.named_buffers(recurse=False)):
        for name, part in parts:
            setattr(again, name, part)
    if model.can_generate():
        again.generation_config = model.generation_config
    return again


def adapter_base(path: str, revision: str | None = None) -> str | None:
    """The base model of an adapter's folder or hub id; None where there is no adapter."""
    found = find_adapter_config_file(path, revision=revision) if os.path.isdir(path) or path.count("/") == 1 else None
    if found is None:
        return None
    try:
        base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{found}: expected the config of an adapter, found {type(error).__name__}") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{found}: expected the base model in base_model_name_or_path, found {base!r}")
    return base


def load_adapter(model: Any, path: str, revision: str | None = None) -> PeftModel:
    """The adapter of a folder or hub id on its base model; a UserError if it is no LoRA or lacks weights."""
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "adapter_model.safetensors")):
        raise UserError(f"{path}: expected the adapter's weights in adapter_model.safetensors, found none")
    config = PeftConfig.from_pretrained(path, revision=revision)
    check_lora(path, config)
    if is_sharded(model):
        raise UserError(f"{path}: an adapter cannot be loaded onto weights that ZeRO-3 has sharded; merge it first")
    if model.get_output_embeddings() is None and config.task_type == TaskType.CAUSAL_LM:
        config.task_type = None  # on a model with another head, for a reward model
    _resize_embeddings(model, load_peft_weights(path, device="cpu", revision=revision))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, path, config=config, revision=revision)
        except UserWarning as missing:
            raise UserError(f"{path}: expected all weights of the adapter, found: {str(missing)[:200]}") from missing


def saved_whole(model: PeftModel) -> set[str]:
    """The base's weights that come with the adapter (modules_to_save), by their names in the base."""
    wrapped = [(name, m) for name, m in model.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return {f"{name}.{key}" for name, module in wrapped for key, _ in module.original_module.named_parameters()}


def _resize_embeddings(model: Any, weights: dict[str, Any]) -> None:
    """As many embeddings as the adapter was trained with, where it has them: its tokenizer may have more tokens."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    saved = weights.get(f"base_model.model.{name}.weight")
    if saved is not None and len(saved) != embeddings.num_embeddings:
        model.resize_token_embeddings(len(saved), mean_resizing=False)
