"""From what a user passes to `PPOTrainer` to the four roles."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.models.actor_critic import ActorCritic, FrozenRoles, disable_dropout, frozen_copy
from rlhf.models.lora import add_lora, trainable_share


def build_roles(
    args: PPOConfig,
    model: PreTrainedModel,
    ref_model: PreTrainedModel | None,
    reward_model: PreTrainedModel,
    value_model: PreTrainedModel | None,
    peft_config: LoraConfig | None,
) -> tuple[ActorCritic, FrozenRoles]:
    """Full fine-tuning: four models. With a peft_config: two backbones, on each an adapter that can be off.

    The policy given is trained in place; the reward model is never changed (the critic is a copy of it, or an
    adapter on it). Dropout of the base models is off; that of the adapters stays as configured.
    """
    for part in (model, ref_model, reward_model, value_model):
        if part is not None:
            disable_dropout(part)
    reference: Any = ref_model
    reward: Any = None
    policy: Any
    critic: Any
    if peft_config is None:
        policy, critic = model.requires_grad_(True), value_model or frozen_copy(reward_model)
        reference, reward = ref_model or frozen_copy(model), reward_model
        critic.requires_grad_(True)
    else:
        policy = add_lora(model, peft_config)
        critic_config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=peft_config.r,
            lora_alpha=peft_config.lora_alpha,
            lora_dropout=peft_config.lora_dropout,
            target_modules=peft_config.target_modules,
        )
        if value_model is not None:
            reward = reward_model
        critic = add_lora(value_model or reward_model, critic_config)
    trained = ActorCritic(policy, critic, args.temperature)
    if args.gradient_checkpointing:
        for part in (policy, critic):
            part.enable_input_require_grads()
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained, FrozenRoles(policy, critic, reference, reward)


def describe_roles(trained: ActorCritic, frozen: FrozenRoles, peft: bool) -> list[dict[str, Any]]:
    """Role, parameters and how many of them are trained, for print-out and run.json."""
    rows = []
    for role, model in (("policy", trained.policy), ("critic", trained.critic)):
        trainable, total = trainable_share(model)
        rows.append({"role": role, "name": _name(model), "parameters": total, "trainable": trainable})
    for role, own, shared in (
        ("reference", frozen.reference, trained.policy),
        ("reward", frozen.reward, trained.critic),
    ):
        if own is None:
            rows.append({"role": role, "name": f"{_name(shared)}, adapter off", "parameters": 0, "trainable": 0})
        else:
            rows.append({"role": role, "name": _name(own), "parameters": trainable_share(own)[1], "trainable": 0})
    return rows


def check_vocabularies(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> None:
    """The reward model reads the policy's token ids, so every token of the policy must mean the same to it."""
    known = reward.get_vocab()
    other = next((t for t, i in policy.get_vocab().items() if known.get(t) != i), None)
    if other is not None:
        raise UserError(
            f"reward model: expected the policy's vocabulary, found token {other!r} with id "
            f"{policy.get_vocab()[other]} in the policy and {known.get(other)} in the reward model"
        )


def _name(model: PreTrainedModel | PeftModel) -> str:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.config.name_or_path or type(inner).__name__


def optimizer_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained, in two groups: matrices with weight decay, biases and norms without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
