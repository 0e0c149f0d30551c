"""Responses of one model to the held-out prompts, and their scores; each process does its share."""

from collections.abc import Sequence

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import EvaluationConfig
from rlhf.data.chat import decode_response, encode_prompt
from rlhf.data.oasst import TextPrompt
from rlhf.data.prompts import as_messages
from rlhf.distributed.collectives import Shard
from rlhf.errors import UserError
from rlhf.evaluation.kl import response_kl
from rlhf.file_types import ResponseRow
from rlhf.generation.decode import generate
from rlhf.generation.sampling import uniforms
from rlhf.models.actor_critic import FrozenRole
from rlhf.reward.reward_functions import Completions, RewardFunction, model_reward
from rlhf.reward.tokenizers import tokenizer_to_read

# Of the sampling streams' (seed, step, prompt): PPO's steps count from 1, so evaluation has streams of its own.
_STEP = 0


def respond(
    name: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: PreTrainedModel,
    prompts: Sequence[TextPrompt],
    config: EvaluationConfig,
    eos_ids: Sequence[int],
    base: PreTrainedModel | None = None,
    gold: PreTrainedModel | None = None,
) -> list[ResponseRow]:
    """Rows (prompt_id, model, prompt, response, score, lengths in tokens, eos) in the order of `prompts`.

    The prompts are spread over the processes and every process gets all rows back. Models that are asked the
    same prompts get the same random numbers, so that their difference is not one of luck. With `base`, rows have
    the KL to it too (nats a response), with `gold` a second reward model's score of the same responses. A reward
    model of another tokenizer family reads the text, by the tokenizer saved beside it.
    """
    judge = _judge("reward model", reward_model, policy, tokenizer, config)
    second = None if gold is None else _judge("second reward model", gold, policy, tokenizer, config)
    state, stop = PartialState(), set(eos_ids)
    shard = Shard.of_rank(len(prompts), state)
    mine = shard.of(prompts)[: shard.n_valid]
    rows: list[ResponseRow] = []
    starts = range(0, len(mine), config.eval_batch_size)
    for start in tqdm(
        starts, desc=f"evaluate {name}", unit="batch", disable=not state.is_main_process or len(starts) < 2
    ):
        batch = mine[start : start + config.eval_batch_size]
        inputs = [encode_prompt(tokenizer, as_messages(prompt.text)) for prompt in batch]
        u = uniforms(config.eval_seed, _STEP, [p.prompt_id for p in batch], config.eval_response_length)
        responses = generate(policy, inputs, u, eos_ids, config.eval_temperature)
        finished = _finished(batch, inputs, responses, stop)
        scores = _scores(judge, finished, batch)
        new: list[ResponseRow] = [
            {
                "prompt_id": prompt.prompt_id,
                "model": name,
                "prompt": prompt.text,
                "response": decode_response(tokenizer, response),
                "score": score,
                "prompt_length": len(ids),
                "response_length": len(response),
                "eos": response[-1] in stop,
            }
            for prompt, ids, response, score in zip(batch, inputs, responses, scores, strict=True)
        ]
        if base is not None:
            kl = response_kl(policy, base, inputs, responses, config.eval_temperature)
            for row, value in zip(new, kl, strict=True):
                row["kl"] = value
        if second is not None:
            again = _scores(second, finished, batch)
            for row, value in zip(new, again, strict=True):
                row["gold_score"] = value
        rows += new
    return shard.gather(rows)


def _judge(
    role: str,
    model: PreTrainedModel,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
) -> RewardFunction:
    name = f"{role} {model.config.name_or_path}".rstrip()
    own = tokenizer_to_read(name, model, None, tokenizer, policy)
    return model_reward(name, FrozenRole(model), own, tokenizer, config.eval_batch_size, config.eval_close_truncated)


def _scores(judge: RewardFunction, finished: Completions, batch: Sequence[TextPrompt]) -> list[float]:
    scores = judge(finished).cpu()
    if not scores.isfinite().all():
        i = int((~scores.isfinite()).nonzero()[0])
        raise UserError(f"{judge.name}: expected finite scores, found {scores[i]:g} for prompt {batch[i].prompt_id}")
    found: list[float] = scores.tolist()
    return found


def _finished(
    prompts: Sequence[TextPrompt], inputs: list[list[int]], responses: list[list[int]], stop: set[int]
) -> Completions:
    return Completions(
        prompts=[as_messages(prompt.text) for prompt in prompts],
        prompt_ids=inputs,
        response_ids=responses,
        ended=[response[-1] in stop for response in responses],
        columns=[{} for _ in prompts],
    )
