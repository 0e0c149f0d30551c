"""Which tokens a reward or value model reads: the policy's, told apart from those of another family."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.chat import prepare_tokenizer
from rlhf.errors import UserError
from rlhf.models.load import is_empty, resolve_model
from rlhf.models.unwrap import Model, has_token_head, unwrap_peft

_REMEDY = "; save its tokenizer in its folder, or give it in reward_processing_classes"


def tokenizer_to_read(
    name: str,
    model: Model,
    given: PreTrainedTokenizerBase | None,
    policy: PreTrainedTokenizerBase,
    policy_model: Model,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer by which a reward model gets the text; None where it reads the policy's own token ids.

    given: the user's word on it; without one, the tokenizer saved beside the model is asked. Where there is none,
    a model whose ids cannot be the policy's is a UserError that begins with `name`.
    """
    tokenizer = own_tokenizer(model) if given is None else _filled(name, given)
    if not has_token_head(model):  # an encoder wants its own marks around the texts, whatever the vocabulary
        if tokenizer is None:
            kind = type(unwrap_peft(model)).__name__
            raise UserError(f"{name}: expected the tokenizer of a {kind}, found none{_REMEDY}")
        _check_range(name, model, tokenizer)
        return tokenizer
    if tokenizer is not None and not same_vocabulary(policy, tokenizer):
        _check_range(name, model, tokenizer)
        return prepare_tokenizer(tokenizer)
    if given is None and tokenizer is None:
        _check_eos(name, model, policy, _REMEDY)
    _check_range(name, model, policy, policy_model)
    return None


def check_value_model(model: Model | None, policy: PreTrainedTokenizerBase, policy_model: Model) -> None:
    """A UserError for a value model of another tokenizer family: it has to read the policy's token ids.

    Tokens that only the policy has are fine: a critic learns them.
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
                f"with {shared} of {len(ids)} in common"
            )
    _check_range("value_model", model, policy, policy_model)


def saved_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model by the name that the model is loaded by, as it is; a UserError if there is none.

    options: of `from_pretrained`.
    """
    options.setdefault("trust_remote_code", False)  # not told, transformers asks on the terminal
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), **options)
    except UserError:
        raise
    except Exception as error:  # of many kinds, where files are missing or broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"reward model {name!r}: expected tokenizer files beside it, found: {reason}") from error
    if is_empty(tokenizer):
        raise UserError(f"reward model {name!r}: expected tokenizer files beside it, found none")
    return tokenizer


def own_tokenizer(model: Model) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved where the model came from: its folder, or the hub's cache. Never from the network."""
    name = unwrap_peft(model).config.name_or_path
    if not name:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # whatever a folder without a tokenizer, or with a broken one, makes its library raise
        return None
    return None if is_empty(tokenizer) else tokenizer


def same_vocabulary(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether every token that the policy can say means the same to the reward model."""
    known = reward.get_vocab()
    return all(known.get(token) == number for token, number in _spoken(policy).items())


def _spoken(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The vocabulary without a pad token of its own, as scripts add it: masks hide it from every model."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if tokenizer.pad_token not in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token):
        vocabulary = {token: number for token, number in vocabulary.items() if token != tokenizer.pad_token}
    return vocabulary


def _filled(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if is_empty(tokenizer):
        raise UserError(
            f"{name}: expected its tokenizer, found one without a vocabulary: "
            f"are there tokenizer files in {tokenizer.name_or_path or 'its folder'}?"
        )
    return tokenizer


def _check_eos(name: str, model: Model, policy: PreTrainedTokenizerBase, remedy: str) -> None:
    config = unwrap_peft(model).config.get_text_config()
    found = getattr(config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if ids and policy.eos_token_id not in ids:
        raise UserError(
            f"{name}: expected a model that reads the policy's tokens, with EOS id {policy.eos_token_id}, "
            f"found {found} in its config{remedy}, or set that id if it does read them"
        )


def _check_range(name: str, model: Model, tokenizer: PreTrainedTokenizerBase, policy: Model | None = None) -> None:
    """policy: the model that samples these tokens, and none beyond its own rows."""
    rows, needed = _rows(model), max(_spoken(tokenizer).values()) + 1
    # Some tokenizers know a few tokens, such as an image's, that their own text models have no row for.
    if needed > 1.01 * rows or (policy is not None and min(needed, _rows(policy)) > rows):
        raise UserError(
            f"{name}: expected embeddings for the {needed} tokens of {tokenizer.name_or_path or 'its tokenizer'}, "
            f"found {rows}: is it of another tokenizer family?{_REMEDY}"
        )


def _rows(model: Model) -> int:
    inner = unwrap_peft(model)
    # Not the weight's shape, which is empty where ZeRO-3 has spread it.
    return getattr(inner.get_input_embeddings(), "num_embeddings", None) or inner.config.get_text_config().vocab_size
