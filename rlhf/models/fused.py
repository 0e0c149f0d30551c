"""The same functions by faster means."""

from torch import nn
from transformers.activations import ACT2FN

_SLOW = type(ACT2FN["gelu_new"])


def fuse_gelu(model: nn.Module) -> None:
    """GPT-2's activation, eight tensor operations in Python, as PyTorch's one: the same formula, in place.

    It keeps one tensor for the backward pass where the other keeps six.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _SLOW):
                setattr(module, name, nn.GELU(approximate="tanh"))
