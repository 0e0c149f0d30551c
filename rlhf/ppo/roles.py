"""From the models that a user passes to `PPOTrainer` to the four roles."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf.config import PPOConfig
from rlhf.distributed.launch import (
    is_fsdp,
)
from rlhf.distributed.sharding import is_sharded
from rlhf.errors import UserError
from rlhf.file_types import ModelSize
from rlhf.models.actor_critic import (
    ActorCritic,
    FrozenRole,
    ValueHead,
    frozen_copy,
    keep_adapter,
    trunk_of,
    widen_heads,
)
from rlhf.models.adapters import with_adapters
from rlhf.models.kernels.attention import use_cpu_attention
from rlhf.models.kernels.dropout_gelu import fuse_dropout, fuse_gelu
from rlhf.models.kernels.recompute import recompute_activations
from rlhf.models.lora import add_lora, critic_lora, merged_model, trainable_share
from rlhf.models.master_weights import keep_masters
from rlhf.models.quantised import prepare_4bit
from rlhf.models.unwrap import Model, is_quantised, unwrap_peft
from rlhf.reward.scoring import has_token_head


@dataclass(frozen=True)
class Roles:
    """What is trained, and what it is measured by."""

    trained: ActorCritic
    reference: FrozenRole
    reward: FrozenRole | None  # the reward model that the critic starts from, if there is one
    merged_first: bool = False  # the policy's base is no model on a disk: one with an adapter merged in


def build_roles(
    args: PPOConfig,
    model: Model,
    ref_model: Model | None,
    reward_model: Model | None,
    value_model: Model | None,
    peft_config: LoraConfig | None,
) -> Roles:
    """Full fine-tuning: up to four models. With adapters: two backbones, and an adapter that can be off on each.

    The policy is trained in place. The reward model's weights never change: the critic is a copy of it, or an adapter
    on it; its activation, attention and dropout modules are replaced by faster ones. reward_model: one that reads the
    policy's tokens, or None; then the critic starts from value_model, or as the policy under a new head. A policy that
    already has an adapter trains it further and is its own reference; with a peft_config, that adapter is merged first
    and a new one is trained. Weights that ZeRO-3 has sharded cannot be copied: full fine-tuning then takes all four
    models as arguments. `ActorCritic.train` turns on the dropout of adapters alone.
    """
    model = with_adapters("model", model)
    ref_model = ref_model and with_adapters("ref_model", ref_model)
    reward_model = reward_model and with_adapters("reward_model", reward_model)
    value_model = value_model and with_adapters("value_model", value_model)
    for name, part in (
        ("model", model),
        ("ref_model", ref_model),
        ("reward_model", reward_model),
        ("value_model", value_model),
    ):
        if part is not None:
            _check_device(name, part)
            prepare_4bit(name, part)
            fuse_gelu(part)
            widen_heads(part)
            use_cpu_attention(unwrap_peft(part))
    merged_first = peft_config is not None and isinstance(model, PeftModel)
    if merged_first:
        if is_quantised(model):  # a saved adapter would lack the one merged here
            raise UserError(
                "peft_config: leave it out: the adapter of a quantised policy cannot be merged; it is trained further"
            )
        model = merged_model(_copyable("peft_config", model))
    policy, reference = _policy_and_reference(args, model, ref_model, peft_config)
    critic, reward = _critic_and_reward(args, policy, reward_model, value_model, peft_config)
    keep_masters(args, policy, critic)
    trained = ActorCritic(policy, critic, args.temperature)
    fuse_dropout(trained)
    if args.gradient_checkpointing:
        for trunk in (policy, critic):
            if not isinstance(trunk, ValueHead):
                recompute_activations(trunk, args.gradient_checkpointing_kwargs)
    return Roles(trained, reference, reward, merged_first)


def check_apart(trained: Mapping[str, Model | None], frozen: Sequence[tuple[str, Model | None]]) -> None:
    """A UserError where two roles of which one is trained have a weight in common: training it would change the other.

    trained, frozen: the models by the argument's name; None for no model.
    """
    owners: dict[int, str] = {}
    for name, model in [*trained.items(), *frozen]:
        storages = set() if model is None else {_storage(weight) for weight in model.parameters()}
        other = next((owners[storage] for storage in storages if storage in owners), None)
        if other is not None:
            raise UserError(
                f"{name}: it shares weights with {other}, and training would change both; pass a copy "
                f"(copy.deepcopy){_LEFT_OUT.get((name, other), '')}"
            )
        if name in trained:
            owners |= dict.fromkeys(storages, name)


# (role, the one that it shares weights with) -> what one may have meant.
_LEFT_OUT = {
    ("ref_model", "model"): ", or leave it out: the reference then is the policy as it is now",
    ("reward_model", "value_model"): ", or leave value_model out: the critic then starts as a copy of the reward model",
}


def _storage(tensor: torch.Tensor) -> int:
    """What two tensors have in common if one is a view of the other; of a sharded one only it itself."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def check_language_model(name: str, model: Model) -> None:
    """A UserError for a model that gives no logits of next tokens, or that needs an encoder's text beside its own."""
    inner = unwrap_peft(model)
    if inner.config.is_encoder_decoder or inner.get_output_embeddings() is None or not inner.can_generate():
        raise UserError(f"{name}: expected a causal language model, found a {type(inner).__name__}")


def _check_device(name: str, model: Model) -> None:
    devices = sorted({str(device) for device in (getattr(unwrap_peft(model), "hf_device_map", None) or {}).values()})
    if len(devices) > 1:  # from device_map="auto"
        raise UserError(f"{name}: expected a model on one device, found it on {', '.join(devices)}")


def _policy_and_reference(
    args: PPOConfig, model: Model, ref_model: Model | None, peft_config: LoraConfig | None
) -> tuple[Model, FrozenRole]:
    if peft_config is not None:
        policy = add_lora(_prepared(model), peft_config)
        return policy, FrozenRole(ref_model) if ref_model is not None else FrozenRole(policy, shared=True)
    if not isinstance(model, PeftModel):
        if is_quantised(model):
            raise UserError("model: pass a peft_config: quantised weights cannot be trained")
        loaded = model.requires_grad_(True).dtype
        keep_masters(args, model)
        if ref_model is not None and ref_model.dtype == loaded != model.dtype and not is_quantised(ref_model):
            ref_model.float()  # computes as the policy does: otherwise KL would be more than 0 from the start
        return model, FrozenRole(ref_model if ref_model is not None else frozen_copy(_copyable("ref_model", model)))
    _prepared(model)
    for name in (args.model_adapter_name, args.ref_adapter_name):
        if name is not None and name not in model.peft_config:
            raise UserError(f"model: expected an adapter {name!r}, found {', '.join(model.peft_config)}")
    trained = args.model_adapter_name or model.active_adapter
    if args.ref_adapter_name == trained and ref_model is None:
        raise UserError(
            f"ref_adapter_name: expected another adapter than the one that is trained, found {trained!r}; leave it "
            "out: the reference then is that adapter as it is now"
        )
    model.set_adapter(trained)
    if ref_model is not None:
        return model, FrozenRole(ref_model)
    return model, FrozenRole(model, shared=True, adapter=args.ref_adapter_name or keep_adapter(model))


def _critic_and_reward(
    args: PPOConfig,
    policy: Model,
    reward_model: Model | None,
    value_model: Model | None,
    peft_config: LoraConfig | None,
) -> tuple[Model | ValueHead, FrozenRole | None]:
    """What the critic starts from: value_model, else reward_model if it has a head for tokens, else the policy."""
    reward = None if reward_model is None else FrozenRole(reward_model)
    if args.critic == "shared":
        if value_model is not None:
            raise UserError("value_model: leave it out: critic: shared uses the policy")
        head = policy.get_output_embeddings()
        return ValueHead(getattr(head, "original_module", head).in_features).to(policy.device), reward
    if value_model is not None and not has_token_head(value_model):
        kind = type(unwrap_peft(value_model)).__name__
        raise UserError(f"value_model: expected a model with a head 'score', found {kind}")
    from_reward = value_model is None and reward_model is not None and has_token_head(reward_model)
    start = reward_model if from_reward else value_model
    lora = peft_config or (policy.active_peft_config if isinstance(policy, PeftModel) else None)
    if lora is None:
        return _full_critic(policy, start, is_own=start is value_model), reward
    critic = _lora_critic(policy, start, lora)
    # The reward model's backbone serves both roles, unless the critic's is merged from a quantised one: rounded again,
    # it scores differently.
    if from_reward and not (is_quantised(reward_model) and isinstance(reward_model, PeftModel)):
        reward = FrozenRole(critic, shared=True)
    return critic, reward


def _full_critic(policy: Model, start: Model | None, is_own: bool) -> Model:
    """All weights are trained: of the model itself if it is the critic's own, otherwise of a copy."""
    if start is None:
        return critic_from(policy)
    if is_quantised(start):
        name = "value_model" if is_own else "reward_model"
        raise UserError(f"{name}: pass a peft_config: the quantised weights of the critic cannot be trained")
    if isinstance(start, PeftModel):
        merged = merged_model(_copyable("value_model", start))
        return merged.requires_grad_(True)
    critic = start if is_own else copy.deepcopy(_copyable("value_model", start))
    return critic.requires_grad_(True)


def _lora_critic(policy: Model, start: Model | None, lora: Any) -> Model:
    """An adapter is trained, and the head."""
    if start is None:
        start = critic_from(policy)
    elif isinstance(start, PeftModel):
        start = merged_model(_copyable("value_model", start))
    return add_lora(_prepared(start), critic_lora(lora, start))


def critic_from(policy: Model) -> PreTrainedModel:
    """The policy's trunk, copied, under a scalar head of zeros (value estimates start at 0)."""
    _copyable("value_model", policy)
    inner = merged_model(policy) if isinstance(policy, PeftModel) else policy
    if is_quantised(inner):
        raise UserError("value_model: pass one or set critic: shared: a quantised policy cannot be copied")
    config = copy.deepcopy(inner.config)
    config.num_labels = 1
    try:
        with torch.device("meta") if inner.device.type == "meta" else nullcontext():  # a dry run has no weights
            critic = AutoModelForSequenceClassification.from_config(config, dtype=inner.dtype)
        trunk_of(critic).load_state_dict(trunk_of(inner).state_dict())
    except (ValueError, RuntimeError):  # there is no such class, or it has other weights
        critic = None
    if critic is None or not has_token_head(critic):
        kind = type(inner).__name__
        raise UserError(f"value_model: pass one or set critic: shared: transformers has no critic for a {kind}")
    torch.nn.init.zeros_(critic.score.weight)
    widen_heads(critic)
    return critic.to(inner.device).eval()


def _copyable(role: str, model: Any) -> Any:
    if is_sharded(model):
        raise UserError(f"pass {role} explicitly: ZeRO-3 weights cannot be copied")
    return model


def _prepared(model: Any) -> Any:
    # Checkpointing is turned on later, for all roles alike.
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) if is_quantised(model) else model


def describe_roles(roles: Roles) -> list[ModelSize]:
    """Role, parameters and how many of them are trained, for print-out and run.json."""
    rows: list[ModelSize] = []
    for role, model in (("policy", roles.trained.policy), ("critic", roles.trained.critic)):
        trainable, total = trainable_share(model)
        rows.append({"role": role, "name": _name(model), "parameters": total, "trainable": trainable})
    for role, frozen in (("reference", roles.reference), ("reward", roles.reward)):
        if frozen is None:
            continue
        name, total = _name(frozen.model), trainable_share(frozen.model)[1]
        if frozen.shared:
            name, total = f"{name}, adapter {frozen.adapter or 'off'}", 0
        rows.append({"role": role, "name": name, "parameters": total, "trainable": 0})
    return rows


def parameter_lines(models: list[ModelSize]) -> list[str]:
    """One line per role: parameters, trainable parameters and their share."""
    return [
        f"{row['role']:>9}: {row['name']}, {row['parameters']:,} parameters, {row['trainable']:,} trained"
        + (f" ({row['trainable'] / row['parameters']:.2%})" if row["parameters"] else "")
        for row in models
    ]


def _name(model: Any) -> str:
    if isinstance(model, ValueHead):
        return "head on the policy's trunk"
    inner = unwrap_peft(model)
    return inner.config.name_or_path or type(inner).__name__


def check_shardable(accelerator: Accelerator, trained: ActorCritic) -> None:
    """A UserError if FSDP2 cannot shard the trained model: quantised weights, or several precisions in one block."""
    if not is_fsdp(accelerator):
        return
    if is_quantised(trained.policy) or is_quantised(trained.critic):
        raise UserError("engine: FSDP2 cannot shard quantised weights; use multi_gpu")
    if accelerator.mixed_precision != "no":  # then Accelerate trains in float32
        return
    blocks = [module for module in trained.modules() if type(module).__name__ in trained._no_split_modules]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in trained.parameters() if id(parameter) not in inside]
    for part in [rest, *(list(block.parameters()) for block in blocks)]:
        found = sorted({str(p.dtype).removeprefix("torch.") for p in part if p.requires_grad})
        if len(found) > 1:
            raise UserError(f"dtype: expected one for policy and critic under FSDP2, found {' and '.join(found)}")
