"""The run's three prompt sets, made from a recipe's settings; every stage calls `prompt_sets`."""

from transformers import PreTrainedTokenizerBase

from rlhf.config import PromptConfig
from rlhf.data.chat import Options, encode_prompt
from rlhf.data.layouts import parse_columns
from rlhf.data.oasst import PromptSplit, TextPrompt, drop_long, load_prompts, split_prompts
from rlhf.errors import UserError


def prompt_sets(
    config: PromptConfig, tokenizer: PreTrainedTokenizerBase, options: Options | None
) -> tuple[PromptSplit, dict[str, int]]:
    """Load, filter and split: (train, evaluation, rating), disjoint by conversation tree, and all counts.

    options: of the chat template, for all prompts.
    """
    columns = parse_columns("prompt_columns", config.prompt_columns)
    prompts, counts = load_prompts(
        config.prompt_dataset, config.language, config.prompt_revision, config.prompt_dir, columns
    )

    def length(prompt: TextPrompt) -> int:
        return len(encode_prompt(tokenizer, prompt.messages, {**(options or {}), **prompt.options}))

    fitting, too_long = drop_long(prompts, length, config.max_prompt_length)
    if not fitting:
        raise UserError(
            f"max_prompt_length: all {too_long} prompts have more than {config.max_prompt_length} tokens; raise it"
        )
    split = split_prompts(
        fitting, config.prompt_seed, config.train_prompts, config.evaluation_prompts, config.rating_prompts
    )
    counts |= {
        "too_long": too_long,
        "split_train": len(split.train),
        "split_evaluation": len(split.evaluation),
        "split_rating": len(split.rating),
    }
    return split, counts


def dataset_row(prompt: TextPrompt) -> dict[str, object]:
    """A row of the data set that `PPOTrainer` takes."""
    own = {"prompt": prompt.messages, "prompt_id": prompt.prompt_id, "chat_template_kwargs": prompt.options}
    return {**prompt.columns, **own}
