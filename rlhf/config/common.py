"""Checks of what all training settings share."""

from transformers import TrainingArguments

from rlhf.config.fields import at_least, check, check_seeds


def check_training(args: TrainingArguments) -> None:
    """A UserError for values of transformers' settings with which training would fail or do nothing."""
    at_least(args, 1, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    at_least(args, 1, "save_total_limit", "torch_empty_cache_steps")
    at_least(args, 0, "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "eval_delay")
    check(args, lambda x: x > 0, "a positive number", "num_train_epochs", "eval_steps", "save_steps", "logging_steps")
    check(args, lambda x: 0 <= x < 1, "a number from 0 to below 1", "adam_beta1", "adam_beta2")
    check(args, lambda x: x == -1 or x >= 1, "at least 1, or -1 for none", "max_steps")
    check_seeds(args, "seed", "data_seed")
