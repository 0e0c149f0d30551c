"""Argument names of older TRLs' `PPOTrainer`: using one is a UserError that gives the new name."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from torch.nn import Module

from rlhf.config.old_names import refuse_renamed
from rlhf.errors import UserError

_WHOLE = "nothing: samples come from the policy's full distribution, at PPOConfig's temperature"

_LENGTH = "response_length of PPOConfig"

_ADAPTERS = "peft_config: with adapters the reference shares the policy's layers"

# Method -> old argument -> what to use now.
RENAMED_ARGUMENTS: dict[str, dict[str, str]] = {
    "__init__": {
        "config": "args",
        "tokenizer": "processing_class",
        "dataset": "train_dataset",
        "policy": "model",
        "ref_policy": "ref_model",
        "optimizer": "optimizers, a pair of optimizer and schedule",
        "lr_scheduler": "optimizers, a pair of optimizer and schedule",
        "num_shared_layers": _ADAPTERS,
        "training_data_collator": "nothing: batches are built here",
        "reward_funcs": "reward_model, which takes functions, too",
        "reward_fn": "reward_model, which takes functions, too",
        "judge": "reward_model",
        "critic": "value_model",
        "critic_model": "value_model",
        "compute_metrics": "callbacks, which see each row of metrics",
        "max_length": _LENGTH,
        "max_prompt_length": "max_prompt_tokens of PPOConfig",
        "model_init_kwargs": "model, loaded with these arguments",
        "ref_model_init_kwargs": "ref_model, loaded with these arguments",
    },
    "step": {
        "queries": "prompts",
        "response_masks": "nothing: every response token is trained on",
    },
    "generate": {
        "query_tensor": "prompts, a list",
        "queries": "prompts",
        "length_sampler": _LENGTH,
        "max_new_tokens": _LENGTH,
        "max_length": _LENGTH,
        "temperature": "temperature of PPOConfig",
        "eos_token_id": "stop_token_id of PPOConfig",
        "pad_token_id": "nothing: responses come without padding",
        "batch_size": "nothing: one call samples all its prompts together",
        "return_prompt": "nothing: responses come without their prompts",
        "generate_ref_response": "nothing: only the policy is sampled",
        "do_sample": _WHOLE,
        "min_length": _WHOLE,
        "top_k": _WHOLE,
        "top_p": _WHOLE,
    },
}

Class = TypeVar("Class", bound=type)


def answers_old_names(cls: Class) -> Class:
    """Class decorator: an old argument of a method becomes a UserError with its new name. Keeps signatures."""
    for method, names in RENAMED_ARGUMENTS.items():
        where = cls.__name__ if method == "__init__" else f"{cls.__name__}.{method}"
        setattr(cls, method, _answering(getattr(cls, method), names, where))
    return cls


def _answering(method: Callable[..., Any], names: Mapping[str, str], where: str) -> Callable[..., Any]:
    @wraps(method)
    def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_renamed(kwargs, names, where, "an argument")
        if method.__name__ == "__init__" and len(args) > 1 and isinstance(args[1], Module):
            raise UserError(
                f"{where}: expected (args, processing_class, model, ref_model, reward_model, ...), "
                f"found a model as second argument, as in an older TRL"
            )
        return method(self, *args, **kwargs)

    return answer
