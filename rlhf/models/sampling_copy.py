"""A copy of the policy for sampling: adapters merged in, matrices in the precision of the computation.

Sampling reads every matrix once per token. Autocast would cast each one first, and adapters would double the number of
kernels. So the matrices are copied once and refreshed before each rollout; they keep their addresses, as a captured
CUDA graph needs. Everything else is shared with the policy.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf.models.kernels.dropout_gelu import fuse_gelu
from rlhf.models.kernels.unmasked import is_plain
from rlhf.models.lora import PARTS, SplitProjection
from rlhf.models.unwrap import is_quantised, unwrap_peft

_Source = Callable[[], Tensor]


def can_copy(policy: Any) -> bool:
    """Whether a policy is a plain transformers model, as it is or with one plain LoRA adapter per layer."""
    if not is_plain(policy) or is_quantised(policy):
        return False
    if not isinstance(policy, PeftModel):
        return True
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    return all(_is_plain_lora(layer) for layer in layers) and not any(
        getattr(config, "modules_to_save", None) for config in policy.peft_config.values()
    )


def _is_plain_lora(layer: Any) -> bool:
    if type(layer) is not LoraLinear or len(layer.active_adapters) != 1 or layer.merged:
        return False
    return layer.active_adapters[0] not in layer.lora_variant and type(layer.get_base_layer()) in (nn.Linear, Conv1D)


class SamplingCopy:
    """A model of the policy's architecture; `refresh` updates its matrices."""

    def __init__(self, policy: Any, dtype: torch.dtype | None) -> None:
        """dtype: of the matrices, None to keep theirs. One of that dtype without an adapter is shared, not copied."""
        base = unwrap_peft(policy)
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(base.config), attn_implementation="sdpa")
        fuse_gelu(self.model)
        self.model.eval()
        self._own: list[tuple[nn.Parameter, _Source]] = []
        modules = dict(base.named_modules())
        for name, module in self.model.named_modules():
            source: Any = modules[name]
            if type(module) in (nn.Linear, Conv1D):
                self._take_matrix(module, source, dtype)
            else:
                for key, tensor in [*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)]:
                    setattr(module, key, tensor)

    def _take_matrix(self, module: Any, source: Any, dtype: torch.dtype | None) -> None:
        parts = [getattr(source, part) for part in PARTS] if isinstance(source, SplitProjection) else [source]
        adapted = any(isinstance(part, LoraLinear) for part in parts)
        first: Any = parts[0].get_base_layer() if isinstance(parts[0], LoraLinear) else parts[0]
        if len(parts) == 1 and not adapted and dtype in (None, first.weight.dtype):
            module.weight, module.bias = first.weight, first.bias
            return
        turned = isinstance(module, Conv1D) and not isinstance(first, Conv1D)

        def weight() -> Tensor:
            whole = torch.cat([_weight(part) for part in parts]) if len(parts) > 1 else _weight(parts[0])
            return whole.t() if turned else whole

        module.weight = self._kept(module.weight, weight, dtype or first.weight.dtype, first.weight.device)
        if first.bias is not None:
            module.bias = self._kept(
                module.bias,
                lambda: torch.cat([part.bias for part in parts]),
                dtype or first.bias.dtype,
                first.bias.device,
            )

    def _kept(self, like: Tensor, source: _Source, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(like.shape, dtype=dtype, device=device), requires_grad=False)
        self._own.append((parameter, source))
        return parameter

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the copied matrices from the policy, without waiting for the device."""
        for parameter, source in self._own:
            parameter.copy_(source())


def _weight(layer: Any) -> Tensor:
    if not isinstance(layer, LoraLinear):
        found: Tensor = layer.weight
        return found
    own: Any = layer
    base: Tensor = own.get_base_layer().weight
    name = own.active_adapters[0]
    # In the base's precision, so that it is rounded once, to the copy's.
    return base + own.get_delta_weight(name).to(base.dtype) if name in own.lora_A else base


def copied_bytes(policy: Any, dtype: torch.dtype | None) -> int:
    """Bytes of the matrices that a SamplingCopy of the policy would copy; works for a policy on meta, too."""
    base = unwrap_peft(policy)
    total, inside = 0, set[int]()
    for module in base.modules():  # parents before their children
        if id(module) in inside or not isinstance(module, SplitProjection | LoraLinear | nn.Linear | Conv1D):
            continue
        inside |= {id(part) for part in module.modules()}
        parts = [getattr(module, part) for part in PARTS] if isinstance(module, SplitProjection) else [module]
        adapted = any(isinstance(part, LoraLinear) for part in parts)
        plain: Any = [part.get_base_layer() if isinstance(part, LoraLinear) else part for part in parts]
        if adapted or dtype not in (None, plain[0].weight.dtype):
            total += sum(layer.weight.numel() for layer in plain) * (dtype or plain[0].weight.dtype).itemsize
    return total
