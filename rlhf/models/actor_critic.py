"""The four roles of PPO: policy and critic in one trained module, reference and reward frozen beside it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.distributed.sharding import is_sharded
from rlhf.errors import UserError
from rlhf.models.kernels.attention import packs
from rlhf.models.token_logprobs import Texts, head_logits, in_chunks, logp_of, texts_of, token_rows, trunk_states
from rlhf.models.unwrap import Model, is_quantised, unwrap_peft

_REFERENCE = "reference"  # the adapter that keeps a policy's first adapter as it was


class ValueHead(nn.Module):
    """A scalar head on the policy's trunk, zero at first: float [..., d] -> float32 [...]. (`critic: shared`)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """float [..., d] -> float32 [...], reward units."""
        return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()


class ActorCritic(nn.Module):
    """What PPO trains. Its forward pass returns per-token numbers, so that no logits leave an engine."""

    is_gradient_checkpointing = False  # of the module as a whole; TRL asks when it gathers weights

    def __init__(self, policy: Model, critic: Model | ValueHead, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature
        # What FSDP2 shards one by one, by the name of its class, as in transformers' models.
        names = {
            name for part in (policy, critic) for name in getattr(unwrap_peft(part), "_no_split_modules", None) or ()
        }
        self._no_split_modules = sorted(names & {type(module).__name__ for module in self.modules()})

    def forward(
        self, texts: Texts | Tensor, mask: Tensor | None = None, n_response: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the response tokens log-probs, entropies (nats) and values of the states before them: float32 [N] each.

        As rectangles, for which a GPU has to wait: ids int [B, P+T] of prompts padded on the left and responses on
        the right, mask bool [B, P+T], n_response T -> float32 [B, T] twice, zero off the response, and values
        [B, T+1], of which the last one in use is that of the state after the last token.
        """
        if isinstance(texts, Tensor):
            assert mask is not None
            return self._rectangles(texts, mask, n_response)
        states, values = self.states_and_values(texts)
        base = unwrap_peft(self.policy)

        def logp(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            return logp_of(head_logits(base, states), tokens, self.temperature)

        inputs = texts.at_tokens(states), texts.tokens
        # Under ZeRO-3 the head is gathered by all ranks together, as often on each: once.
        flat = logp(*inputs) if is_sharded(base) else in_chunks(logp, base.config.vocab_size, *inputs)
        return flat[0], flat[1], texts.at_tokens(values)

    def _rectangles(self, ids: Tensor, mask: Tensor, n_response: int) -> tuple[Tensor, Tensor, Tensor]:
        prompts, responses = token_rows(ids, mask, n_response)
        (texts,) = texts_of(prompts, responses, [range(len(ids))], n_response, ids.device)
        logp, entropy, _ = self(texts)
        values = self.states_and_values(texts)[1]
        first = texts.lengths - mask[:, -n_response:].sum(1) - 1
        columns = first.unsqueeze(1) + torch.arange(n_response + 1, device=ids.device)
        grid = torch.zeros(len(ids) * n_response, device=ids.device)
        logp, entropy = (grid.index_copy(0, texts.places, x).view(-1, n_response) for x in (logp, entropy))
        return logp, entropy, values.gather(1, columns.clamp(max=values.shape[1] - 1))

    def packs(self, longest: int) -> bool:
        """Whether texts of at most so many tokens go through both trunks without padding."""
        trunks = [self.policy] if isinstance(self.critic, ValueHead) else [self.policy, self.critic]
        return all(packs(trunk, longest) for trunk in trunks)

    def states_and_values(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """The policy's last states float [B, L, d], and the critic's values float32 [B, L], reward units."""
        states = trunk_states(unwrap_peft(self.policy), texts.ids, texts.lengths)
        critic = self.critic
        if isinstance(critic, ValueHead):
            return states, critic(states)
        return states, column_values(critic, texts.ids, texts.lengths)


class FrozenRole:
    """A role that is never trained: a model of its own, or a trained one with another adapter, or none, on."""

    def __init__(self, model: Model, shared: bool = False, adapter: str | None = None) -> None:
        self.model, self.shared, self.adapter = model, shared, adapter
        if not shared:
            model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move a model of its own; a trained one is Accelerate's to move.

        A quantised one stays where it was loaded: a UserError where that is another kind of device.
        """
        if self.shared:
            return
        if not is_quantised(self.model):
            nn.Module.to(self.model, device)
        elif self.model.device.type != device.type:
            name = unwrap_peft(self.model).config.name_or_path or type(unwrap_peft(self.model)).__name__
            raise UserError(
                f"{name}: expected a quantised model on {device.type}, where PPO runs, found it on "
                f"{self.model.device.type}; load it with device_map={{'': {(device.index or 0)!r}}}"
            )

    @contextmanager
    def active(self) -> Iterator[Model]:
        """The model as the role has it, inside the block; outside it, whatever happens, as it was."""
        if not self.shared:
            yield self.model
            return
        assert isinstance(self.model, PeftModel)
        if self.adapter is None:
            with self.model.disable_adapter():
                yield self.model
            return
        trained = self.model.active_adapter
        self.model.set_adapter(self.adapter)
        try:
            yield self.model
        finally:
            self.model.set_adapter(trained)


def keep_adapter(policy: PeftModel) -> str:
    """Copy the policy's active adapter into a frozen one of the same numbers, and return its name."""
    trained = policy.active_adapter
    config = copy.deepcopy(policy.peft_config[trained])
    policy.add_adapter(_REFERENCE, config)
    # Embeddings are never adapted here; "auto" would ask the hub whether they were.
    state = get_peft_model_state_dict(policy, adapter_name=trained, save_embedding_layers=False)
    set_peft_model_state_dict(policy, state, adapter_name=_REFERENCE)
    policy.set_adapter(trained)
    return _REFERENCE


def frozen_copy(model: Model) -> Model:
    """An independent copy that is never trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Dropout off for good, also in train mode: a probability ratio compares two passes over the same tokens.

    That of adapters stays: it is part of how they were asked for.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # a number, of Llama's kin
            module.attention_dropout = 0.0


def column_values(model: PreTrainedModel | PeftModel, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The scalar head at every position: ids int [B, L], right-padded -> float32 [B, L], reward units.

    No mask: real tokens see those before them only. lengths: as in `trunk_states`.
    """
    inner = unwrap_peft(model)
    return inner.score(trunk_states(inner, ids, lengths)).squeeze(-1).float()
