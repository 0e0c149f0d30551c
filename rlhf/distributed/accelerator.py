"""Accelerate, set up from the training arguments."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from transformers import TrainingArguments, enable_full_determinism
from transformers.utils import logging

from rlhf.distributed.deepspeed_config import configure_deepspeed
from rlhf.distributed.launch import (
    check_engine,
    configure_fsdp,
    is_deepspeed,
    wants_deepspeed,
    wants_fsdp,
)
from rlhf.distributed.offload import prepare_offload


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """The Accelerator that the arguments describe. Also seeds every random stream."""
    given = {
        "find_unused_parameters": args.ddp_find_unused_parameters,
        "bucket_cap_mb": args.ddp_bucket_cap_mb,
        "broadcast_buffers": args.ddp_broadcast_buffers,
        "static_graph": args.ddp_static_graph,
    }
    options = {name: value for name, value in given.items() if value is not None}
    # Under FSDP2, shard gradients after each micro-batch: kept until the last one, every rank would hold all of them.
    # The learner counts the steps itself: the launcher's number of them, which may be auto, is not read.
    accumulation = GradientAccumulationPlugin(num_steps=1, sync_each_batch=wants_fsdp())
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        # On CPUs the training arguments have already set up the processes; cpu=True would turn DeepSpeed off.
        cpu=args.use_cpu and not wants_deepspeed(),
        gradient_accumulation_plugin=accumulation,
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(**options)] if options else None,
    )
    check_engine(accelerator)
    configure_fsdp(accelerator)
    if is_deepspeed(accelerator):
        configure_deepspeed(accelerator.state.deepspeed_plugin, args, counted=1)
        prepare_offload(accelerator.state.deepspeed_plugin, args.optim)
    logging.set_verbosity(args.get_process_log_level())
    if args.full_determinism:
        enable_full_determinism(args.seed)
    else:
        set_seed(args.seed)
    return accelerator


def clear_cache(device: torch.device) -> None:
    """Release cached accelerator memory (torch_empty_cache_steps)."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
