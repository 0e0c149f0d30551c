"""Heads of one number compute in float32, whatever the precision of the trunk below them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rlhf.models.unwrap import Model, unwrap_peft


class ScalarHead(nn.Linear):
    """A linear layer that computes in float32: bfloat16 would round a score of 10 to steps of 0.06."""

    def forward(self, input: Tensor) -> Tensor:
        """float [..., d] -> float32 [..., 1]."""
        with torch.autocast(input.device.type, enabled=False):
            return linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def widen_heads(model: Model) -> None:
    """Make the linear layers of one output above the model's trunk `ScalarHead`s with the same parameters, in place."""
    trunk = set(unwrap_peft(model).base_model.modules())  # it may have gates of one output
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.out_features == 1 and module not in trunk:
            head = ScalarHead(module.in_features, 1, module.bias is not None, device="meta").train(module.training)
            head.weight, head.bias = module.weight, module.bias
            model.set_submodule(name, head)
