"""Rows of a prompt data set as token ids, and the order in which PPO sees them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import encode_prompt, prompt_text
from rlhf.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """One prompt: its id seeds its sampling stream."""

    prompt_id: str
    input_ids: list[int]
    text: str


def read_prompts(
    rows: Dataset | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> list[Prompt]:
    """Rows with `prompt` (text or messages) or `input_ids`; an optional `prompt_id` names the row.

    A row with neither, without tokens, or longer than max_tokens is a UserError that names it.
    """
    prompts = []
    for i, row in enumerate(rows):
        if "prompt" in row:
            ids, text = encode_prompt(tokenizer, row["prompt"]), prompt_text(row["prompt"])
        elif "input_ids" in row:
            ids = list(row["input_ids"])
            text = str(tokenizer.decode(ids))
        else:
            raise UserError(f"train_dataset row {i}: expected column 'prompt' or 'input_ids', found {sorted(row)}")
        if not ids or (max_tokens is not None and len(ids) > max_tokens):
            limit = "1 or more" if max_tokens is None else f"1 to {max_tokens}"
            raise UserError(f"train_dataset row {i}: expected {limit} tokens, found {len(ids)}")
        prompts.append(Prompt(str(row.get("prompt_id", i)), ids, text))
    if not prompts:
        raise UserError("train_dataset: expected at least 1 prompt, found none")
    return prompts


def batches(prompts: list[Prompt], size: int, seed: int, steps: int) -> Iterator[list[Prompt]]:
    """`steps` global batches: every prompt once an epoch, reshuffled by (seed, epoch), a last partial one too."""
    epoch = 0
    while True:
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        for start in range(0, len(order), size):
            if steps == 0:
                return
            steps -= 1
            yield [prompts[i] for i in order[start : start + size]]
        epoch += 1
