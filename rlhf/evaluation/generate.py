"""Responses of one model to the held-out prompts, and their scores; each process answers its share of the prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import EvaluationConfig
from rlhf.data.chat import Options, decode_response, encode_prompt
from rlhf.data.oasst import TextPrompt
from rlhf.distributed.collectives import Shard
from rlhf.errors import UserError
from rlhf.evaluation.kl import response_kl
from rlhf.file_types import ResponseRow
from rlhf.generation.decode import generate, uniforms
from rlhf.models.actor_critic import FrozenRole, ids_without_token
from rlhf.models.unwrap import max_positions
from rlhf.reward.named import WeightedRewards
from rlhf.reward.reward_functions import Completions, FunctionReward, ModelReward, Reward, model_reward, resolve_rewards
from rlhf.reward.tokenizers import tokenizer_to_read

# The step of the sampling streams (seed, step, prompt). PPO counts from 1, so evaluation shares no stream with it.
_STEP = 0


def respond(
    name: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: PreTrainedModel | Reward | WeightedRewards,
    prompts: Sequence[TextPrompt],
    config: EvaluationConfig,
    eos_ids: Sequence[int],
    base: PreTrainedModel | None = None,
    gold: PreTrainedModel | Reward | None = None,
    answered: Callable[[int], None] = lambda n: None,
    done: Mapping[str, ResponseRow] | None = None,
    keep: Callable[[list[ResponseRow]], None] = lambda rows: None,
) -> list[ResponseRow]:
    """Rows (prompt_id, model, prompt, response, score, lengths in tokens, eos) in the order of `prompts`.

    The prompts are spread over the processes, and every process returns all rows. Every model gets the same random
    numbers for a prompt, so that sampling noise does not make the difference between two models. With `base`, rows
    also have `kl`, the KL to it (nats per response); with `gold`, `gold_score`, a second reward model's score of the
    same responses. A reward model of another tokenizer family reads the text with the tokenizer saved beside it; one
    that `as_reward` made knows that already.
    answered: called after each batch with the number of its prompts, over all processes. done: rows that are there
    already, by prompt id; their prompts are not answered again. keep: called with this process's new rows of each
    batch, as often on every process.
    """
    done = done or {}
    if done:
        answered(len(done))
    left = [prompt for prompt in prompts if prompt.prompt_id not in done]
    proxy_reward = (
        reward_model
        if isinstance(reward_model, WeightedRewards)
        else as_reward("reward model", reward_model, policy, tokenizer, config)
    )
    gold_reward = None if gold is None else as_reward("second reward model", gold, policy, tokenizer, config)
    judges = proxy_reward.rewards if isinstance(proxy_reward, WeightedRewards) else [proxy_reward]
    _check_positions(policy, [*judges, *([gold_reward] if gold_reward else [])], tokenizer, prompts, config)
    state, stop = PartialState(), set(eos_ids)
    shard = Shard.of_rank(len(left), state)
    mine = shard.of(left)[: shard.n_valid]
    suppressed = ids_without_token(policy, tokenizer, eos_ids, policy.device)
    rows: list[ResponseRow] = []
    for start in range(0, len(shard.rows), config.eval_batch_size):
        batch = mine[start : start + config.eval_batch_size]
        if not batch:  # other processes have one more
            keep([])
            continue
        options = [_options(prompt, config) for prompt in batch]
        inputs = [encode_prompt(tokenizer, prompt.messages, own) for prompt, own in zip(batch, options, strict=True)]
        u = uniforms(config.eval_seed, _STEP, [p.prompt_id for p in batch], config.eval_response_length)
        responses = generate(policy, inputs, u, eos_ids, config.eval_temperature, suppress_tokens=suppressed)
        completions = _completions(batch, inputs, responses, stop, options)
        scores = _scores(proxy_reward, completions, batch)
        new: list[ResponseRow] = [
            {
                "prompt_id": prompt.prompt_id,
                "model": name,
                "prompt": prompt.text,
                "response": decode_response(tokenizer, said),
                "score": score,
                "prompt_length": len(ids),
                "response_length": len(response),
                "eos": response[-1] in stop,
            }
            for prompt, ids, response, said, score in zip(
                batch, inputs, responses, completions.said, scores, strict=True
            )
        ]
        if base is not None:
            kl = response_kl(policy, base, inputs, responses, config.eval_temperature, suppressed)
            for row, value in zip(new, kl, strict=True):
                row["kl"] = value
        if gold_reward is not None:
            again = _scores(gold_reward, completions, batch)
            for row, value in zip(new, again, strict=True):
                row["gold_score"] = value
        rows += new
        keep(new)
        answered(len(batch) * state.num_processes)
    found = dict(done) | {row["prompt_id"]: row for row in shard.gather(rows)}
    return [found[prompt.prompt_id] for prompt in prompts]


def as_reward(
    role: str,
    model: PreTrainedModel | Reward,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
) -> Reward:
    """A model that scores responses of policies with this tokenizer, and with the rows of `policy`.

    role: names it in errors. What is a reward already comes back as it is.
    """
    if isinstance(model, ModelReward | FunctionReward):
        return model
    name = f"{role} {model.config.name_or_path}".rstrip()
    own = tokenizer_to_read(name, model, None, tokenizer, policy)
    return model_reward(name, FrozenRole(model), own, tokenizer, config.eval_batch_size, config.eval_close_truncated)


def _check_positions(
    policy: PreTrainedModel,
    rewards: Sequence[Reward | WeightedRewards],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TextPrompt],
    config: EvaluationConfig,
) -> None:
    """A UserError if the longest prompt and its response have more tokens than a model has positions."""
    texts, options = [prompt.messages for prompt in prompts], [_options(prompt, config) for prompt in prompts]
    ids = [encode_prompt(tokenizer, text, own) for text, own in zip(texts, options, strict=True)]
    longest = {"model": (max_positions(policy.config), max(map(len, ids), default=0))} | {
        reward.name: (reward.positions, reward.longest(texts, ids, options))
        for reward in rewards
        if isinstance(reward, ModelReward) and texts
    }
    for name, (positions, found) in longest.items():
        if positions is not None and found + config.eval_response_length > positions:
            raise UserError(
                f"eval_response_length: expected at most {positions - found}, so that the longest prompt, of {found} "
                f"tokens, and its response fit the {positions} positions of the {name}, found "
                f"{config.eval_response_length}"
            )


def weighted_rewards(
    model: PreTrainedModel | None,
    functions: Sequence[Callable[..., Any]],
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
) -> WeightedRewards:
    """A reward model, if there is one, and functions, weighed as the settings say."""
    given: list[Any] = [*([] if model is None else [model]), *functions]
    specs = resolve_rewards(given, None, config.reward_weights, tokenizer, policy)
    rewards = [
        as_reward("reward model", spec.reward, policy, tokenizer, config)
        if spec.is_model
        else FunctionReward(spec.name, spec.reward, tokenizer)
        for spec in specs
    ]
    return WeightedRewards(cast(list[Reward], rewards), config.reward_weights)


def _options(prompt: TextPrompt, config: EvaluationConfig) -> Options:
    return {**(config.chat_template_kwargs or {}), **prompt.options}


def _scores(reward: Reward | WeightedRewards, completions: Completions, batch: Sequence[TextPrompt]) -> list[float]:
    scores = reward(completions).cpu()
    if not scores.isfinite().all():
        i = int((~scores.isfinite()).nonzero()[0])
        raise UserError(f"{reward.name}: expected finite scores, found {scores[i]:g} for prompt {batch[i].prompt_id}")
    found: list[float] = scores.tolist()
    return found


def _completions(
    prompts: Sequence[TextPrompt],
    inputs: list[list[int]],
    responses: list[list[int]],
    stop: set[int],
    options: list[Options],
) -> Completions:
    return Completions(
        prompts=[prompt.messages for prompt in prompts],
        prompt_ids=inputs,
        response_ids=responses,
        ended=[response[-1] in stop for response in responses],
        columns=[prompt.columns for prompt in prompts],
        options=options,
    )
