"""What a PPO run would do and how much memory it needs, without loading weights: `train_ppo.py --dry_run true`."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf.config import PPOConfig
from rlhf.config.batch import batch_line
from rlhf.config.precision import precision_line
from rlhf.console import screen
from rlhf.distributed.accelerator import make_accelerator
from rlhf.distributed.launch import engine_name
from rlhf.distributed.sharding import numel
from rlhf.generation.static import cache_size
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
from rlhf.models.actor_critic import ActorCritic, texts_of
from rlhf.models.kernels.onednn_linear import available, layout_bytes
from rlhf.models.sampling_copy import can_copy, copied_bytes
from rlhf.models.unwrap import max_positions
from rlhf.perf.work import key_values
from rlhf.ppo.optim import count_steps
from rlhf.ppo.prompts import check_positions
from rlhf.ppo.roles import Roles, build_roles, describe_roles, parameter_lines


def dry_run(
    args: PPOConfig,
    policy: PretrainedConfig,
    reward: PretrainedConfig | None,
    lengths: Sequence[int],
    dtype: Any,
    peft_config: LoraConfig | None,
) -> None:
    """Print roles, steps and memory per device; a UserError if the run would fail.

    lengths: tokens of each training prompt. reward: configuration with one label; None if rewards are functions.
    """
    accelerator = make_accelerator(args)  # makes the same checks as the start of training
    unset_hf_deepspeed_config()  # do not shard models here: `Sharding` accounts for ZeRO-3
    check_writable(Path(args.output_dir or "."))
    for role, config in (("model", policy), ("reward model", reward)):
        if config is not None:
            check_positions(args, max_positions(config), max(lengths), "train_dataset", role)
    base = base_bytes(args.use_cpu)  # before anything is built here

    def roles(layers: int | None, args: PPOConfig = args) -> Roles:
        def build(kind: Any, config: PretrainedConfig) -> Any:
            model = kind.from_config(config if layers is None else shallow(config, layers), dtype=dtype)
            model.name_or_path = config.name_or_path
            return model

        with torch.device("meta" if layers is None else "cpu"):
            model = build(AutoModelForCausalLM, policy)
            reward_model = None if reward is None else build(AutoModelForSequenceClassification, reward)
        return build_roles(args, model, None, reward_model, None, peft_config)

    full = roles(None)
    sharding = Sharding.of(args)
    screen.say("\n".join(parameter_lines(describe_roles(full))))
    steps = count_steps(args, len(lengths), args.local_batch_size * sharding.processes)
    screen.say(f"engine {engine_name(accelerator)}, {sharding.processes} processes, {steps} PPO steps")
    screen.say(batch_line(args, "prompts"))
    if line := precision_line(args):
        screen.say(f"precision: {line}")
    parts = _models(args, full, sharding)
    width, rows = max(lengths), args.per_device_train_batch_size

    def activations(layers: int, args: PPOConfig = args) -> int:
        trained = roles(layers, args).trained
        return by_rows(lambda n: _activations(args, trained, n, _learned_width(args, trained, lengths)), rows)

    learning = by_depth(activations, policy.num_hidden_layers)
    if args.gradient_checkpointing:  # beside what layers begin with, one layer's own
        whole = copy.copy(args)
        whole.gradient_checkpointing = False
        learning += activations(2, whole) - activations(1, whole)
    learning += 2 * rows * _logits(args, policy)  # their gradients
    kept = 0.0 if args.use_cpu or sharding.stage == 3 else _keys_and_values(args, policy, width)
    rollout = _rollout(args, policy, width, kept=bool(kept))
    parts.append(Part("activations, logits", learning=learning, rollout=rollout))
    if kept:
        parts += _to_sample_on_a_gpu(args, full, kept, sharding)
    if sharding.stage < 3:
        parts += _cast(args, full, sharding)
    if args.use_cpu and available(torch.bfloat16 if args.bf16 else torch.float32) and sharding.stage < 3:
        parts.append(Part("layouts of weights", rollout=layout_bytes(full.trained.policy, 2 if args.bf16 else 4)))
    if peft_config is not None and args.use_cpu:  # on a GPU the merge happens in main memory
        merged = sum(numel(p) * p.element_size() for p in full.trained.policy.parameters())
        parts.append(Part("merged copy", saving=merged))
    verdict(parts, base, args.use_cpu, screen.say)


def _models(args: PPOConfig, roles: Roles, sharding: Sharding) -> list[Part]:
    """Policy and critic, and the frozen models."""
    parts = [
        sharding.trained("policy", roles.trained.policy, args.optim),
        sharding.trained("critic", roles.trained.critic, args.optim),
    ]
    for name, frozen in (("reference", roles.reference), ("reward", roles.reward)):
        if frozen is not None and not frozen.shared:
            parts.append(sharding.frozen(name, frozen.model))
    return parts


def _learned_width(args: PPOConfig, trained: ActorCritic, lengths: Sequence[int]) -> int:
    """The prompt tokens of a row in the largest pass of learning: padded to the longest, or the mean of the longest."""
    longest = sorted(lengths)[-args.per_device_train_batch_size :]
    if not (args.use_cpu and trained.packs(longest[-1] + args.response_length)):
        return longest[-1]
    return math.ceil(sum(longest) / len(longest))


def _activations(args: PPOConfig, trained: ActorCritic, rows: int, width: int) -> int:
    """Bytes that autograd saves for these texts, of which each begins with a token of its own: nothing is shared."""
    prompts = [[row] * width for row in range(rows)]
    responses = [[row] * args.response_length for row in range(rows)]
    (texts,) = texts_of(prompts, responses, [list(range(rows))], args.response_length, "cpu")
    # fp16 takes as many bytes, and not every operator has it on a CPU.
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16 or args.fp16)):
        return kept_bytes(lambda: trained.train()(texts), trained)


def _half(args: PPOConfig, sharding: Sharding) -> torch.dtype | None:
    """What autocast computes in; none where DeepSpeed's weights already have it."""
    return None if sharding.half else torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _to_sample_on_a_gpu(args: PPOConfig, roles: Roles, keys_and_values: float, sharding: Sharding) -> list[Part]:
    """What decoding keeps between rollouts for its CUDA graphs."""
    policy = roles.trained.policy
    copied = copied_bytes(policy, _half(args, sharding)) if can_copy(policy) else 0
    return [Part("copy to sample from", weights=copied), Part("keys and values", weights=keys_and_values)]


def _cast(args: PPOConfig, roles: Roles, sharding: Sharding) -> list[Part]:
    """Weights as autocast reads them: all in scoring, in learning those that autograd does not save itself."""
    if _half(args, sharding) is None:
        return []
    frozen = [role.model for role in (roles.reference, roles.reward) if role is not None and not role.shared]
    scoring = sum(2 * layout_bytes(model, 1) for model in (roles.trained, *frozen))
    return [Part("weights, cast", rollout=scoring, learning=2 * layout_bytes(roles.trained, 1, frozen=True))]


def _size(args: PPOConfig) -> int:
    """Bytes of a number as it is computed in."""
    return 2 if args.bf16 or args.fp16 else 4


def _keys_and_values(args: PPOConfig, config: PretrainedConfig, width: int) -> float:
    """Bytes of a batch's static KV cache, whose sizes are rounded up."""
    size = _size(args)
    rows, columns = cache_size(args.local_batch_size, width + args.response_length)
    return float(rows * columns * key_values(config.get_text_config(decoder=True)) * size)


def _logits(args: PPOConfig, config: PretrainedConfig) -> float:
    """Bytes of one response's logits in float32."""
    return 4.0 * (args.response_length + 1) * config.get_text_config(decoder=True).vocab_size


def _rollout(args: PPOConfig, config: PretrainedConfig, width: int, kept: bool) -> float:
    """Bytes of generation or of scoring, whichever is larger. Scoring holds logits.

    kept: keys and values stay between rollouts and are counted elsewhere.
    """
    size = _size(args)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = key_values(config.get_text_config(decoder=True)) * size
    rows, tokens = args.local_batch_size, width + args.response_length
    states = (3 * inner + 4 * config.hidden_size) * size  # of one token in one layer
    generation = rows * (0 if kept else tokens * per_token) + rows * width * states
    # Logits of two models, and three temporaries: scaled logits, probabilities, their product.
    scoring = min(rows, args.local_rollout_forward_batch_size) * (5 * _logits(args, config) + tokens * states)
    return max(generation, scoring)
