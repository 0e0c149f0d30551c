"""Which tokenizer a reward or value model reads with: the policy's, or one of another family."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.chat import prepare_tokenizer
from rlhf.errors import UserError
from rlhf.models.load import is_empty, resolve_model, tokenizer_place
from rlhf.models.unwrap import Model, unwrap_peft
from rlhf.reward.scoring import has_token_head

_REMEDY = "; save its tokenizer in its folder, or pass it in reward_processing_classes"


def tokenizer_to_read(
    name: str,
    model: Model,
    given: PreTrainedTokenizerBase | None,
    policy: PreTrainedTokenizerBase,
    policy_model: Model,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a reward model needs for the text; None if it reads the policy's token ids.

    It needs its own for another vocabulary, and for another chat template: it reads what it was trained on.

    given: the one that the user passed; if None, the one saved beside the model. Without either, a model whose ids
    cannot be the policy's is a UserError that starts with `name`.
    """
    tokenizer = own_tokenizer(model) if given is None else _checked_tokenizer(name, given)
    if not has_token_head(model):  # an encoder needs its own special tokens, whatever the vocabulary
        if tokenizer is None:
            kind = type(unwrap_peft(model)).__name__
            raise UserError(f"{name}: a {kind} needs its own tokenizer{_REMEDY}")
        _check_range(name, model, tokenizer)
        return tokenizer
    if tokenizer is not None and not (same_vocabulary(policy, tokenizer) and _same_template(policy, tokenizer)):
        _check_range(name, model, tokenizer)
        return prepare_tokenizer(tokenizer)
    if given is None and tokenizer is None:
        _check_eos(name, model, policy, _REMEDY)
    _check_range(name, model, policy, policy_model)
    return None


def check_value_model(model: Model | None, policy: PreTrainedTokenizerBase, policy_model: Model) -> None:
    """A UserError for a value model of another tokenizer family: it must read the policy's token ids.

    Tokens that only the policy has are allowed: a critic learns them.
    """
    if model is None:
        return
    own = own_tokenizer(model)
    if own is None:
        _check_eos("value_model", model, policy, "")
    else:
        known, ids = own.get_vocab(), policy.get_vocab()
        shared = sum(known.get(token) == number for token, number in ids.items())
        if shared < 0.9 * len(ids):
            raise UserError(
                f"value_model: expected a model that reads the policy's tokens, found {own.name_or_path} "
                f"with {shared} of {len(ids)} tokens in common"
            )
    _check_range("value_model", model, policy, policy_model)


def saved_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The unchanged tokenizer of a reward model, by the name of the model; a UserError if there is none.

    options: of `from_pretrained`.
    """
    options.setdefault("trust_remote_code", False)  # if not set, transformers asks on the terminal
    try:
        place, options = tokenizer_place(name, options)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(place), **options)
    except UserError:
        raise
    except Exception as error:  # of many kinds, if files are missing or broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"reward model {name!r}: expected tokenizer files beside it, found: {reason}") from error
    if is_empty(tokenizer):
        raise UserError(f"reward model {name!r}: expected tokenizer files beside it, found none")
    return tokenizer


def own_tokenizer(model: Model) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the model, in its folder or the hub's cache, not from the network; None without one."""
    name = unwrap_peft(model).config.name_or_path
    if not name:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # of many kinds, if the tokenizer is missing or broken
        return None
    return None if is_empty(tokenizer) else tokenizer


def same_vocabulary(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the policy has the same id in the reward model's tokenizer."""
    known = reward.get_vocab()
    return all(known.get(token) == number for token, number in _vocabulary(policy).items())


def _same_template(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether a reward model was trained on conversations as the policy's template writes them, as far as it says."""
    return not reward.chat_template or str(reward.chat_template).strip() == str(policy.chat_template).strip()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The vocabulary without a separate pad token, which masks hide from every model."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if tokenizer.pad_token not in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token):
        vocabulary = {token: number for token, number in vocabulary.items() if token != tokenizer.pad_token}
    return vocabulary


def _checked_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if is_empty(tokenizer):
        raise UserError(
            f"{name}: its tokenizer has no vocabulary; "
            f"put the tokenizer files into {tokenizer.name_or_path or 'its folder'}"
        )
    return tokenizer


def _check_eos(name: str, model: Model, policy: PreTrainedTokenizerBase, remedy: str) -> None:
    config = unwrap_peft(model).config.get_text_config()
    found = getattr(config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if ids and policy.eos_token_id not in ids:
        raise UserError(
            f"{name}: expected a model that reads the policy's tokens, with EOS id {policy.eos_token_id}, "
            f"found {found} in its config{remedy}, or set that id if it reads them"
        )


def _check_range(name: str, model: Model, tokenizer: PreTrainedTokenizerBase, policy: Model | None = None) -> None:
    """policy: the model that samples these tokens; it never samples one beyond its own embeddings."""
    rows, needed = _rows(model), max(_vocabulary(tokenizer).values()) + 1
    # Some tokenizers know a few tokens, such as an image's, that their own text models have no row for.
    if needed > 1.01 * rows or (policy is not None and min(needed, _rows(policy)) > rows):
        raise UserError(
            f"{name}: expected embeddings for the {needed} tokens of {tokenizer.name_or_path or 'its tokenizer'}, "
            f"found {rows}: is it of another tokenizer family?{_REMEDY}"
        )


def _rows(model: Model) -> int:
    inner = unwrap_peft(model)
    # Not the weight's shape, which is empty on a rank under ZeRO-3.
    return getattr(inner.get_input_embeddings(), "num_embeddings", None) or inner.config.get_text_config().vocab_size
