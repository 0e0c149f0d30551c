"""What `PPOTrainer` builds from its arguments: accelerator, optimizer and schedule, number of steps."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from transformers import PretrainedConfig, PreTrainedTokenizerBase, Trainer, enable_full_determinism
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from rlhf.config import PPOConfig
from rlhf.config.schedule import check_given_schedule, make_schedule
from rlhf.errors import UserError
from rlhf.models.actor_critic import ActorCritic, base_of, is_quantised
from rlhf.models.load import stop_ids
from rlhf.ppo.prompts import Prompt, read_prompts
from rlhf.ppo.roles import optimizer_groups
from rlhf.runtime.engine import (
    check_engine,
    configure_deepspeed,
    configure_fsdp,
    is_deepspeed,
    is_fsdp,
    wants_deepspeed,
    wants_fsdp,
)
from rlhf.runtime.offload import prepare_offload


def make_accelerator(args: PPOConfig) -> Accelerator:
    """Accelerate, as the arguments say; seeds every random stream, too."""
    given = {
        "find_unused_parameters": args.ddp_find_unused_parameters,
        "bucket_cap_mb": args.ddp_bucket_cap_mb,
        "broadcast_buffers": args.ddp_broadcast_buffers,
        "static_graph": args.ddp_static_graph,
    }
    options = {name: value for name, value in given.items() if value is not None}
    # Under FSDP2 gradients are sharded after each micro-batch: kept until the last, they would be whole on each rank.
    accumulation = GradientAccumulationPlugin(num_steps=1, sync_each_batch=True) if wants_fsdp() else None
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        # On CPUs the training arguments have set the processes up already; cpu=True would turn DeepSpeed off.
        cpu=args.use_cpu and not wants_deepspeed(),
        gradient_accumulation_plugin=accumulation,
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(**options)] if options else None,
    )
    check_engine(accelerator)
    configure_fsdp(accelerator)
    if is_deepspeed(accelerator):
        configure_deepspeed(accelerator, args.per_device_train_batch_size, args.max_grad_norm)
        prepare_offload(accelerator.state.deepspeed_plugin, args.optim)
    logging.set_verbosity(args.get_process_log_level())
    if args.full_determinism:
        enable_full_determinism(args.seed)
    else:
        set_seed(args.seed)
    return accelerator


def check_shardable(accelerator: Accelerator, trained: ActorCritic) -> None:
    """A UserError where FSDP2 cannot shard what is trained: quantised weights, or a block's in several precisions."""
    if not is_fsdp(accelerator):
        return
    if is_quantised(trained.policy) or is_quantised(trained.critic):
        raise UserError("engine: expected no quantised weights under FSDP2, found them; use multi_gpu")
    if accelerator.mixed_precision != "no":  # Accelerate makes float32 of what is trained then
        return
    blocks = [module for module in trained.modules() if type(module).__name__ in trained._no_split_modules]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in trained.parameters() if id(parameter) not in inside]
    for part in [rest, *(list(block.parameters()) for block in blocks)]:
        found = sorted({str(p.dtype).removeprefix("torch.") for p in part if p.requires_grad})
        if len(found) > 1:
            raise UserError(f"dtype: expected one for policy and critic under FSDP2, found {' and '.join(found)}")


def make_optimizer(args: PPOConfig, trained: ActorCritic, given: tuple[Any, Any], steps: int) -> tuple[Any, Any]:
    """Optimizer and schedule over `steps` PPO steps; those that the user gave, where they did."""
    optimizer, scheduler = given
    if optimizer is None:
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        except (ValueError, ImportError) as error:  # unknown, not installed, or one that wants the model itself
            raise UserError(f"optim: expected an optimizer that can be had, found {args.optim}: {error}") from error
        optimizer = kind(optimizer_groups(trained, args), **options)
    if scheduler is None:
        scheduler = make_schedule(args, optimizer, steps)
    else:
        check_given_schedule(scheduler)
    return optimizer, scheduler


def check_evaluation(args: PPOConfig, eval_dataset: Any) -> None:
    """A UserError where the arguments ask for evaluations and there is nothing to evaluate on."""
    asked = {"eval_strategy": args.eval_strategy != IntervalStrategy.NO, "eval_on_start": args.eval_on_start}
    for name, wanted in asked.items():
        if wanted and not eval_dataset:
            raise UserError(f"eval_dataset: expected one for {name}, found none")


def count_steps(args: PPOConfig, n_prompts: int, batch_size: int) -> int:
    """PPO steps: max_steps, else total_episodes, else num_train_epochs over the prompts."""
    if args.max_steps > 0:
        return args.max_steps
    if args.total_episodes is not None:
        return max(1, math.ceil(args.total_episodes / batch_size))
    # Epoch by epoch: each ends with its own partial batch.
    if n_prompts == 0:
        raise UserError(
            "max_steps: expected max_steps or total_episodes where there is no train_dataset, found neither"
        )
    whole, rest = divmod(args.num_train_epochs, 1)
    per_epoch = math.ceil(n_prompts / batch_size)
    return max(1, int(whole) * per_epoch + math.ceil(rest * n_prompts / batch_size))


def eos_ids(args: PPOConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where responses end: at stop_token_id, or at every EOS of model and tokenizer."""
    return stop_ids(base_of(model), tokenizer) if args.stop_token_id is None else [args.stop_token_id]


def prompts_that_fit(
    args: PPOConfig, rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase, model: Any, name: str
) -> list[Prompt]:
    """Rows as prompts, none of which overruns the model's positions with its response."""
    prompts = read_prompts(rows, tokenizer, args.max_prompt_tokens, args.long_prompts, name)
    check_positions(args, base_of(model).config, max(len(prompt.input_ids) for prompt in prompts), name)
    return prompts


def check_positions(args: PPOConfig, config: PretrainedConfig, longest: int, name: str) -> None:
    """A UserError where the longest of the prompts, with its response, has more tokens than the model has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest + args.response_length > positions:
        raise UserError(
            f"{name}: expected prompts of at most {positions - args.response_length} tokens, so that "
            f"response_length={args.response_length} more fit the model's {positions} positions, found one of "
            f"{longest}; see max_prompt_tokens and long_prompts"
        )


def clear_cache(device: torch.device) -> None:
    """Give cached accelerator memory back (torch_empty_cache_steps)."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
