"""Master weights: what is trained is kept in float32, since 16 bits round most steps of a small learning rate away."""

import torch
from torch import nn
from transformers import TrainingArguments

from rlhf.distributed.launch import wants_deepspeed
from rlhf.models.actor_critic import ScalarHead

_SHORT = (torch.bfloat16, torch.float16)


def keep_masters(args: TrainingArguments, *models: nn.Module) -> None:
    """Turn trained weights of 16 bits into float32, in place; see `fp32_master_weights`.

    Without autocast a layer cannot read states of another precision: a model of which a part is trained, other than
    adapters and scalar heads, then is float32 as a whole. DeepSpeed keeps masters of its own in mixed precision.
    """
    autocast = args.bf16 or args.fp16
    if not getattr(args, "fp32_master_weights", True) or (autocast and wants_deepspeed()):
        return
    for model in models:
        heads = {id(p) for m in model.modules() if isinstance(m, ScalarHead) for p in m.parameters()}
        short = [p for p in model.parameters() if p.dtype in _SHORT and not hasattr(p, "ds_id")]
        trained = [p for p in short if p.requires_grad]
        whole = not autocast and any(id(p) not in heads for p in trained)
        for parameter in short if whole else trained:
            parameter.data = parameter.data.float()
