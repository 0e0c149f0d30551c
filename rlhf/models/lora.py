"""LoRA (Hu et al. 2021, arXiv:2106.09685), by default on the query and value projections, those of GPT-2 included.

GPT-2 computes query, key and value with one matrix, `c_attn`; an adapter on it adapts the keys too. Where q_proj,
k_proj or v_proj are targets, it is split into these for training, and fused again when saved.
"""

import copy
import math
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, TypeGuard

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.distributed.sharding import gathered, numel
from rlhf.errors import UserError
from rlhf.models.adapters import BASE_UNCHANGED, check_lora, copy_of_config

PARTS = ("q_proj", "k_proj", "v_proj")
DEFAULT_TARGETS = ["q_proj", "v_proj"]
# A fused adapter on GPT-2's c_attn cannot express these options, so save_adapter could not write them.
_NOT_FUSIBLE = ("use_dora", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform")


class SplitProjection(nn.Module):
    """Three linear layers in place of GPT-2's fused `c_attn`; the output [..., 3n] is the same."""

    def __init__(self, fused: Conv1D) -> None:
        super().__init__()
        weights, biases = fused.weight.detach().t().chunk(3), fused.bias.detach().chunk(3)
        for name, weight, bias in zip(PARTS, weights, biases, strict=True):
            # Built on "meta": no random initialisation, so the global random stream does not move.
            linear = nn.Linear(fused.nx, fused.nf // 3, device="meta")
            linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
            linear.bias = nn.Parameter(bias.clone())
            setattr(self, name, linear)
        self.requires_grad_(fused.weight.requires_grad).train(fused.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """float [..., n] -> float [..., 3n]: query, key, value."""
        return torch.cat([getattr(self, name)(hidden) for name in PARTS], dim=-1)


def split_attention(model: nn.Module) -> None:
    """Split every fused query-key-value matrix of a GPT-2, in place; other models do not change."""
    for module in list(model.modules()):
        fused = getattr(module, "c_attn", None)
        if _is_fused(fused):
            with gathered([fused]):
                module.c_attn = SplitProjection(fused)


def _is_fused(module: Any) -> TypeGuard[Conv1D]:
    """Whether this is a fused query-key-value matrix. Cross-attention fuses key and value only: it is two wide."""
    return isinstance(module, Conv1D) and module.nf == 3 * module.nx


def fuse_attention(model: nn.Module) -> None:
    """Undo `split_attention`, in place: plain Conv1D matrices with the same weights."""
    for module in list(model.modules()):
        split = getattr(module, "c_attn", None)
        if isinstance(split, SplitProjection):
            parts = [getattr(split, name) for name in PARTS]
            with torch.device("meta"):
                fused = Conv1D(3 * parts[0].out_features, parts[0].in_features)
            fused.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]).t().contiguous())
            fused.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
            module.c_attn = fused.requires_grad_(parts[0].weight.requires_grad).train(split.training)


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model, frozen, under a fresh adapter on config.target_modules (None: q_proj and v_proj).

    Changes the model in place, but not the config. A UserError for a target that the model does not have, listing its
    layers, for options that would change the base model, and for other adapters than LoRA's.
    """
    check_lora("peft_config", config)
    config = copy.deepcopy(config)
    config.inference_mode = False  # a loaded adapter's config has True, and nothing would be trained
    if config.bias != "none" or config.init_lora_weights not in BASE_UNCHANGED:
        # With the adapter disabled, the model must be the original: it is the reference and the reward model.
        raise UserError(
            "lora: set bias to 'none' and init_lora_weights to true, false or 'gaussian', which keep the base model "
            f"unchanged; found {config.bias!r} and {config.init_lora_weights!r}"
        )
    if _wants_parts(config.target_modules, model):
        split_attention(model)
    config.target_modules = _checked_targets(config.target_modules, _linear_layers(model))
    _check_apart(model, config)
    if _is_split(model):
        _check_fusible(config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT sets it as each layer needs it
            return get_peft_model(model, config)
    except ValueError as error:  # a layer that it has no adapter for
        raise UserError(f"lora_target_modules: {' '.join(str(error).split())}") from error


def _check_apart(model: PreTrainedModel, config: LoraConfig) -> None:
    """A UserError for adapters on what a model uses in several places: merged or measured, they would count twice.

    A layer that is there twice, or two layers of one weight, as Zamba's.
    """
    named = model.named_modules(remove_duplicate=False)
    places = [(id(part.weight), name) for name, part in named if isinstance(part, nn.Linear)]
    used = Counter(weight for weight, _ in places)
    targets = config.target_modules
    for weight, name in places:
        if used[weight] > 1 and (isinstance(targets, str) or any(_ends_with(name, x) for x in targets or ())):
            raise UserError(f"lora_target_modules: leave {name.rpartition('.')[2]} out: several layers share it")


def critic_lora(policy: Any, critic: nn.Module) -> LoraConfig:
    """The policy's LoRA settings for a critic, whose head is trained, too.

    Targets that the critic lacks, such as the policy's head, are left out; without any other it gets the default ones.
    """
    config = copy_of_config(policy)
    config.task_type = TaskType.SEQ_CLS
    config.modules_to_save = None
    config.bias = "none"
    targets, layers = config.target_modules, _linear_layers(critic) + _part_names(critic)
    if targets is None or isinstance(targets, str):
        known = targets in (None, "all-linear") or any(_is_target(targets, layer) for layer in layers)
        config.target_modules = targets if known else None
    else:
        config.target_modules = {t for t in targets if any(_ends_with(layer, t) for layer in layers)} or None
    return config


def merge(peft_model: PeftModel) -> PreTrainedModel:
    """A plain transformers model with the active adapter merged in; takes the PEFT model apart."""
    base: Any = peft_model.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if isinstance(head, BaseTunerLayer) and head.weight is embeddings.weight:  # only one of the two is adapted
        head.get_base_layer().weight = nn.Parameter(head.weight.detach().clone())
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    merged: Any = peft_model.merge_and_unload()
    fuse_attention(merged)
    merged.tie_weights()
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # not the integers of a quantised base
    return merged


def merged_model(peft_model: PeftModel, on_cpu: bool = False) -> PreTrainedModel:
    """A copy of the model with its active adapter merged in; the trained model does not change.

    on_cpu: copy and merge in main memory, tensor by tensor, without extra memory on the device. Not for a quantised
    model, whose weights stay on their device.
    """
    places = _on_cpu(peft_model) if on_cpu else {}
    return merge(copy.deepcopy(peft_model, places))


def _on_cpu(model: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy: id of each parameter and buffer -> its copy in main memory."""
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", copy=True), parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return copies


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Save the active adapter, whatever its name, as safetensors, so that PEFT loads it onto the original model.

    On a split GPT-2 the adapters of rank r on k projections become one equivalent adapter of rank k * r on
    `c_attn`. Fully trained heads (modules_to_save) are saved with it; the base's embeddings never are.
    """
    active: str = peft_model.active_adapter
    if not _is_split(peft_model):
        # "auto", the default, asks the hub for the base model's config.
        peft_model.save_pretrained(str(folder), selected_adapters=[active], save_embedding_layers=False)
        if active != "default":  # PEFT puts it into a folder of its name, where loading the folder does not find it
            for path in (folder / active).iterdir():
                path.replace(folder / path.name)
            (folder / active).rmdir()
        return
    config: Any = copy.deepcopy(peft_model.peft_config[active])
    _check_fusible(config)
    state = get_peft_model_state_dict(peft_model, adapter_name=active, save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if ".c_attn." not in name}
    used = [name for name in PARTS if name in config.target_modules]
    for name, module in peft_model.named_modules():
        if isinstance(module, SplitProjection):
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = _fused_factors(module, used, active)
    # Keep the scaling alpha / r: multiply both by the number of parts; write the rank-stabilised alpha / sqrt(r) as a
    # plain one. Other layers keep their rank.
    alpha, others = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1), _others(config)
    config.rank_pattern, config.alpha_pattern = dict.fromkeys(others, config.r), dict.fromkeys(others, alpha)
    config.lora_alpha = alpha * len(used)
    config.r *= len(used)
    config.use_rslora = False
    config.target_modules = {"c_attn"} | others
    config.fan_in_fan_out = True
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _is_split(model: nn.Module) -> bool:
    return any(isinstance(module, SplitProjection) for module in model.modules())


def _checked_targets(targets: Any, layers: list[str]) -> Any:
    """Targets for PEFT: layer names or suffixes of names, one pattern, or "all-linear"."""
    if targets is None:
        targets = DEFAULT_TARGETS
    # TRL passes a list of one name as a string, which PEFT would read as a pattern for the whole path.
    if isinstance(targets, str) and any(_ends_with(layer, targets) for layer in layers):
        targets = [targets]
    if isinstance(targets, str):
        known = targets == "all-linear" or any(re.fullmatch(targets, layer) for layer in layers)
        missing = [] if known else [targets]
    else:
        missing = sorted(t for t in targets if not any(_ends_with(layer, t) for layer in layers))
    if missing:
        names = sorted({layer.rpartition(".")[2] for layer in layers})
        raise UserError(
            f"lora_target_modules: expected some of the model's linear layers, {', '.join(names)}, "
            f"found {', '.join(missing)}"
        )
    return targets


def _ends_with(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _part_names(model: nn.Module) -> list[str]:
    """The names that q, k and v get where a fused matrix is split."""
    return [f"{name}.{part}" for name, module in model.named_modules() if _is_fused(module) for part in PARTS]


def _wants_parts(targets: Any, model: nn.Module) -> bool:
    """Whether the targets name parts of fused matrices, and not these as a whole."""
    if targets is None:
        return True
    fused = {name.rpartition(".")[0] for name in _part_names(model)}
    named = [targets] if isinstance(targets, str) else list(targets)
    return any(_is_target(target, part) for target in named for part in _part_names(model)) and not any(
        _is_target(target, name) for target in named for name in fused
    )


def _is_target(target: str, layer: str) -> bool:
    return _ends_with(layer, target) or (target != "all-linear" and re.fullmatch(target, layer) is not None)


def _others(config: LoraConfig) -> set[str]:
    return set(config.target_modules or ()) - set(PARTS)


def _check_fusible(config: LoraConfig) -> None:
    targets = config.target_modules
    if isinstance(targets, str) or any(_ends_with(target, part) for target in _others(config) for part in PARTS):
        found = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
        raise UserError(f"lora_target_modules: expected some of {', '.join(PARTS)} on a GPT-2, found {found}")
    odd = [option for option in _NOT_FUSIBLE if getattr(config, option, None)]
    if odd:
        raise UserError(f"lora: GPT-2 takes plain LoRA only; target c_attn, or remove {', '.join(odd)}")


def _fused_factors(module: SplitProjection, used: list[str], adapter: str) -> tuple[Tensor, Tensor]:
    """The parts' A stacked, [k*r, n], and their B as blocks of [3n, k*r], zero for parts without an adapter."""
    adapters = {name: getattr(module, name) for name in used}
    a = [layer.lora_A[adapter].weight.detach() for layer in adapters.values()]
    b = [layer.lora_B[adapter].weight.detach() for layer in adapters.values()]
    rank, width = a[0].shape[0], b[0].shape[0]
    whole = b[0].new_zeros(len(PARTS) * width, len(used) * rank)
    for i, name in enumerate(used):
        row = PARTS.index(name) * width
        whole[row : row + width, i * rank : (i + 1) * rank] = b[i]
    return torch.cat(a).contiguous(), whole


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(parameters that are trained, all parameters)."""
    parameters = list(model.parameters())
    return sum(numel(p) for p in parameters if p.requires_grad), sum(numel(p) for p in parameters)
