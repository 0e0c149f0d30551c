"""What reward training would do and need, without loading weights: `train_reward.py --dry_run true`."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PretrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf.config import RewardStageConfig
from rlhf.config.batch import batch_facts, batch_line
from rlhf.config.precision import precision_line
from rlhf.console import screen
from rlhf.distributed.launch import check_engine, engine_name
from rlhf.distributed.offload import prepare_offload
from rlhf.functional.batching import right_pad
from rlhf.memory_estimate.account import (
    Part,
    Sharding,
    base_bytes,
    by_depth,
    by_rows,
    check_writable,
    kept_bytes,
    shallow,
    verdict,
)
from rlhf.models.actor_critic import column_values
from rlhf.models.kernels.attention import packs, use_cpu_attention
from rlhf.models.kernels.dropout_gelu import fuse_gelu
from rlhf.models.lora import trainable_share
from rlhf.models.unwrap import unwrap_peft
from rlhf.reward.adapters import with_adapter
from rlhf.reward.order import GlobalOrder
from rlhf.reward.trainer import TokenPair


def dry_run(
    args: RewardStageConfig,
    config: PretrainedConfig,
    rows: list[TokenPair],
    peft_config: LoraConfig | None = None,
) -> None:
    """Print the model, steps and memory per device; a UserError if the run would fail.

    rows: token rows of the training pairs. config: with one label. peft_config: of an adapter, if there is one.
    """
    accelerator = Accelerator(deepspeed_plugin=args.deepspeed_plugin)  # as transformers' Trainer does
    check_engine(accelerator)
    prepare_offload(args.deepspeed_plugin, args.optim)
    unset_hf_deepspeed_config()  # do not shard models here: `Sharding` accounts for ZeRO-3
    check_writable(Path(args.output_dir or "."))
    base = base_bytes(args.use_cpu)

    def build(layers: int | None) -> Any:
        with torch.device("meta" if layers is None else "cpu"):
            own = config if layers is None else shallow(config, layers)
            model = AutoModelForSequenceClassification.from_config(own, dtype=torch.float32)
            fuse_gelu(model)  # as the loader does
            return with_adapter(model, peft_config)

    sharding = Sharding.of(args)
    full = build(None)
    trainable, total = trainable_share(full)
    screen.say(f"reward: {config.name_or_path}, {total:,} parameters, {trainable:,} trained ({trainable / total:.2%})")
    batch = batch_facts(args)["global_batch_size"]
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(len(rows) / batch))
    screen.say(f"engine {engine_name(accelerator)}, {sharding.processes} processes")
    screen.say(f"{len(rows)} pairs, {steps} steps of {batch}")
    screen.say(batch_line(args, "pairs"))
    if line := precision_line(args):
        screen.say(f"precision: {line}")

    def activations(layers: int, recompute: bool = False) -> int:
        model = build(layers).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules() if args.disable_dropout else ():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # as TRL does: with dropout, attention keeps its probabilities
        if args.use_cpu:
            use_cpu_attention(unwrap_peft(model))

        def kept(pairs: list[TokenPair]) -> int:
            ids, mask = right_pad([side for row in pairs for side in row.values()], 0)
            # fp16 takes as many bytes, and not every operator has it on a CPU.
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16 or args.fp16)):
                return kept_bytes(lambda: column_values(unwrap_peft(model), ids, mask.sum(1)), model)

        size, longest = min(args.per_device_train_batch_size, len(rows)), sorted(rows, key=_longer)
        if packs(unwrap_peft(model), _longer(longest[-1])):  # without padding, the texts themselves decide
            return kept(_largest_pass(args, rows, size))
        return by_rows(lambda n: kept(longest[-n:]), size)

    if args.gradient_checkpointing:  # what layers begin with, and one layer's own
        learning = by_depth(partial(activations, recompute=True), config.num_hidden_layers)
        learning += activations(2) - activations(1)
    else:
        learning = by_depth(activations, config.num_hidden_layers)
    parts = [sharding.trained("reward", full, args.optim), Part("activations", learning=learning)]
    verdict(parts, base, args.use_cpu, screen.say)


def _longer(row: TokenPair) -> int:
    return max(map(len, row.values()))


def _largest_pass(args: RewardStageConfig, rows: list[TokenPair], size: int) -> list[TokenPair]:
    """The pairs of the pass with most tokens; the longest may all meet where transformers orders the batches."""
    tokens = [sum(map(len, row.values())) for row in rows]
    order = GlobalOrder.of(args, [list(row.values()) for row in rows])
    if order is None:
        return sorted(rows, key=_longer)[-size:]
    steps_per_epoch = len(order) / order.batch
    passes: list[list[int]] = []
    for epoch in range(math.ceil(args.max_steps / steps_per_epoch if args.max_steps > 0 else args.num_train_epochs)):
        order.set_epoch(epoch)
        numbers = list(order)
        passes += [numbers[at : at + size] for at in range(0, len(numbers), size)]
    return [rows[i] for i in max(passes, key=lambda numbers: sum(tokens[i] for i in numbers))]
