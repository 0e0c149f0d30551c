"""LoRA on the query and value projections (Hu et al. 2021, arXiv:2106.09685), GPT-2 included.

GPT-2 computes query, key and value by one matrix, `c_attn`; adapting that would adapt the keys too. So it is
split into q_proj, k_proj and v_proj for training, and fused again in what is saved.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError

PARTS = ("q_proj", "k_proj", "v_proj")


class SplitProjection(nn.Module):
    """Three linear layers in the place of GPT-2's fused `c_attn`; output [..., 3n] as before."""

    def __init__(self, fused: Conv1D) -> None:
        super().__init__()
        weights, biases = fused.weight.data.t().chunk(3), fused.bias.data.chunk(3)
        for name, weight, bias in zip(PARTS, weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
            linear.weight.data.copy_(weight)
            linear.bias.data.copy_(bias)
            setattr(self, name, linear)

    def forward(self, hidden: Tensor) -> Tensor:
        """float [..., n] -> float [..., 3n]: query, key, value."""
        return torch.cat([getattr(self, name)(hidden) for name in PARTS], dim=-1)


def split_attention(model: nn.Module) -> None:
    """Split every fused query-key-value matrix of a GPT-2, in place; other models are left as they are."""
    for module in list(model.modules()):
        fused = getattr(module, "c_attn", None)
        # Cross-attention fuses key and value only: its c_attn is two wide.
        if isinstance(fused, Conv1D) and fused.weight.shape[1] == 3 * fused.weight.shape[0]:
            module.c_attn = SplitProjection(fused)


def fuse_attention(model: nn.Module) -> None:
    """Undo `split_attention`, in place."""
    for module in list(model.modules()):
        split = getattr(module, "c_attn", None)
        if isinstance(split, SplitProjection):
            parts = [getattr(split, name) for name in PARTS]
            fused = Conv1D(3 * parts[0].out_features, parts[0].in_features)
            fused.weight = nn.Parameter(torch.cat([part.weight.data for part in parts]).t().contiguous())
            fused.bias = nn.Parameter(torch.cat([part.bias.data for part in parts]))
            module.c_attn = fused


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model, frozen, under a fresh adapter; a target that it does not have is a UserError."""
    split_attention(model)
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    targets = (
        [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    )
    missing = sorted(target for target in targets if target not in names and target != "all-linear")
    if missing:
        raise UserError(
            f"lora_target_modules: expected some of {', '.join(sorted(names))}, found {', '.join(missing)}"
        )
    return get_peft_model(model, config)


def merged_model(peft_model: PeftModel) -> PreTrainedModel:
    """A stock model with the adapter's weights added in; the trained model stays as it is."""
    merged: Any = copy.deepcopy(peft_model).merge_and_unload()
    fuse_attention(merged)
    merged.tie_weights()
    return merged.requires_grad_(True)


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Save the adapter as safetensors, so that PEFT loads it onto the stock model.

    On a split GPT-2, q_proj and v_proj of rank r become one equivalent adapter of rank 2r on `c_attn`.
    """
    if not any(isinstance(module, SplitProjection) for module in peft_model.modules()):
        peft_model.save_pretrained(folder)
        return
    config = copy.deepcopy(peft_model.peft_config["default"])
    if config.use_rslora or config.use_dora or set(config.target_modules) - set(PARTS):
        raise UserError("lora: expected plain LoRA on q_proj, k_proj, v_proj of a GPT-2, found another kind")
    tensors: dict[str, Tensor] = {}
    used = [name for name in PARTS if name in config.target_modules]
    for name, module in peft_model.named_modules():
        if isinstance(module, SplitProjection):
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = _fused_factors(module, used)
    # Scaling is alpha / r: both grow by the number of parts, so it stays.
    config.r *= len(used)
    config.lora_alpha *= len(used)
    config.target_modules = {"c_attn"}
    config.fan_in_fan_out = True
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _fused_factors(module: SplitProjection, used: list[str]) -> tuple[Tensor, Tensor]:
    """The parts' A stacked, [k*r, n], and their B as blocks of [3n, k*r], zero where a part has no adapter."""
    adapters = {name: getattr(module, name) for name in used}
    a = [layer.lora_A["default"].weight.data for layer in adapters.values()]
    b = [layer.lora_B["default"].weight.data for layer in adapters.values()]
    rank, width = a[0].shape[0], b[0].shape[0]
    whole = b[0].new_zeros(len(PARTS) * width, len(used) * rank)
    for i, name in enumerate(used):
        row = PARTS.index(name) * width
        whole[row : row + width, i * rank : (i + 1) * rank] = b[i]
    return torch.cat(a).contiguous(), whole


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(parameters that are trained, all parameters)."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
