"""Before the first step: models say the same of a text while sampling, in a batch, while learning, and alone.

Tried on a few tokens, so that a kind of model that the code was not made for is refused, and not trained wrongly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.generation.decode import decode
from rlhf.generation.static import LOOK_EVERY
from rlhf.models.actor_critic import (
    ActorCritic,
    FrozenRole,
    Texts,
    ValueHead,
    check_head,
    head_logits,
    texts_of,
    trunk_states,
)
from rlhf.models.unwrap import unwrap_peft

_STOP = 3  # the token that ends a response; the others come after it
_PROMPTS = (2, 5, 1)  # tokens
_RESPONSES = (2, 3, 4)  # tokens; one row ends after the other, and leaves while others go on
# What rounding may change in the mean, nats, or as a share of states: in float32 on a CPU, on a GPU, and in 16 bits.
_CPU, _GPU, _HALF = 1e-3, 2e-2, 0.25

Same = Callable[[str, Tensor, Tensor], None]


def check_models(trained: ActorCritic, reference: FrozenRole) -> None:
    """A UserError for a model that one way of computing gives other numbers than another, or that cannot compute them.

    Weights must be whole (`RolloutCollector.gathered_params`): then all ranks do the same, without collectives.
    """
    _check_policy("model", trained)
    if not reference.shared:
        _check_reader("ref_model", reference.model)
    if not isinstance(trained.critic, ValueHead):
        _check_critic(trained)


def _check_policy(name: str, trained: ActorCritic) -> None:
    with _uncalled(trained.policy) as silent:
        alone = _check_reader(name, trained.policy)
    with _tried(name, trained.policy) as same:
        for layer in silent:
            _check_silent(trained, layer)
        with _learning(trained):
            same("log-probs change in training mode", alone, _read(trained.policy_base))
        decoded = _decoded(trained.policy_base, *_texts(trained.policy_base))
        same("a token has another log-prob while sampling than in the whole text", alone, decoded)


@contextmanager
def _uncalled(policy: Any) -> Iterator[list[str]]:
    """Yields the names of adapted linear layers that nothing has called inside, once it is over."""
    adapted: dict[Any, str] = {part: name for name, part in policy.named_modules() if isinstance(part, BaseTunerLayer)}
    left = {part: name for part, name in adapted.items() if isinstance(part.get_base_layer(), nn.Linear)}
    hooks = [part.register_forward_hook(lambda part, *_: left.pop(part, None) and None) for part in left]
    silent: list[str] = []
    try:
        yield silent
    finally:
        for hook in hooks:
            hook.remove()
        silent += left.values()


def _check_silent(trained: ActorCritic, layer: str) -> None:
    """A UserError if the weight of a layer that is not called is read: its adapter would count only once it is merged.

    Experts that no token went to are not read.
    """
    adapted: Any = trained.policy.get_submodule(layer)
    weight = adapted.get_base_layer().weight
    if not weight.is_floating_point():
        return
    before = _read(trained.policy_base)
    weight.neg_()
    after = _read(trained.policy_base)
    weight.neg_()
    if (after - before).abs().mean().item() > _CPU:
        kind = type(trained.policy_base).__name__
        raise UserError(
            f"lora_target_modules: leave {layer.rpartition('.')[2]} out: a {kind} reads its weight without calling it"
        )


def _check_reader(name: str, model: Any) -> Tensor:
    """Of a model that reads finished texts. Returns the log-probs of the texts, each alone: [N]."""
    base = unwrap_peft(model)
    with _tried(name, model) as same:
        check_head(name, model)
        rows = [(row, base(input_ids=row.ids, use_cache=False).logits) for row in _rows(base)]
        alone = torch.cat([_log_probs(row.at_tokens(logits), row.tokens) for row, logits in rows])
        same("a text in a batch has other log-probs than alone", alone, _read(base))
    return alone


def _check_critic(trained: ActorCritic) -> None:
    base = trained.critic_base
    with _tried("value_model", trained.critic) as same:
        alone = torch.cat([row.at_tokens(trunk_states(base, row.ids)) for row in _rows(base)]).float()
        alone, size = alone / alone.abs().mean(), alone.abs().mean()
        same("a text in a batch has other states than alone", alone, _states(base).float() / size)
        with _learning(trained):
            same("states change in training mode", alone, _states(base).float() / size)


@contextmanager
def _tried(name: str, model: Any) -> Iterator[Same]:
    """In eval mode, without gradients, and in float32 where all weights are. What fails inside is a UserError.

    Yields what compares two tensors: where the first is not finite, training says what is wrong.
    """
    base, kind = unwrap_peft(model), unwrap_peft(model).device.type
    whole = {p.dtype for p in model.parameters()} == {torch.float32}
    limit = _HALF if not whole else _CPU if kind == "cpu" else _GPU

    def same(what: str, want: Tensor, found: Tensor) -> None:
        off = torch.where(want.isfinite(), (found - want).abs().nan_to_num(torch.inf), 0.0).mean().item()
        if off > limit:
            raise UserError(f"{name}: use a model of another kind: of a {type(base).__name__} {what}, by {off:.2g}")

    model.eval()
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=False) if whole else nullcontext():
            yield same
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's own code raises
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{name}: use a model of another kind: a {type(base).__name__} fails in a try: {why}"
        ) from error


@contextmanager
def _learning(trained: ActorCritic) -> Iterator[None]:
    """Training mode, but for the dropout of adapters, which is asked for."""
    trained.train()
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        trained.eval()


def _texts(base: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses as token ids."""
    others = base.config.get_text_config(decoder=True).vocab_size - _STOP - 1
    # On a GPU rows leave at every so many tokens.
    lengths = [n + LOOK_EVERY * (n > 2 and base.device.type != "cpu") for n in _RESPONSES]
    numbers = iter(range(1000))
    prompts, responses = (
        [[_STOP + 1 + next(numbers) % others for _ in range(n)] for n in part] for part in (_PROMPTS, lengths)
    )
    return prompts, [[*row[:-1], _STOP] for row in responses]


def _rows(base: Any) -> list[Texts]:
    """Each text alone."""
    return texts_of(*_texts(base), [[i] for i in range(len(_PROMPTS))], 1, base.device)


def _batch(base: Any) -> Texts:
    return texts_of(*_texts(base), [range(len(_PROMPTS))], 1, base.device)[0]


def _states(base: Any) -> Tensor:
    """Of all texts together, as in rollouts and learning: [N, d]."""
    texts = _batch(base)
    return texts.at_tokens(trunk_states(base, texts.ids, texts.lengths))


def _read(base: Any) -> Tensor:
    return _log_probs(head_logits(base, _states(base)), _batch(base).tokens)


def _decoded(model: Any, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """Log-probs of given responses as the decoder has them: [N]. Its quantiles are numbers of tokens here."""
    width = max(map(len, responses))
    grid = [row[t] if t < len(row) else _STOP for row in responses for t in range(width)]
    tokens = torch.tensor([_STOP, *grid], device=model.device)
    found = torch.zeros(len(tokens), device=model.device)

    def sampler(logits: Tensor, numbers: Tensor, _: float) -> Tensor:
        at = numbers.long()  # 0 in rows that make up a batch
        found.index_copy_(0, at, _log_probs(logits, tokens[at]))
        return tokens[at]

    decode(model, prompts, torch.arange(1.0, len(tokens)).view(-1, width), [_STOP], 1.0, sampler=sampler)
    parts = found[1:].view(-1, width)
    return torch.cat([part[: len(row)] for part, row in zip(parts, responses, strict=True)])


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
