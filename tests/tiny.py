"""Tiny models and tokenizers, built from nothing, that behave like the real ones."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "rlhf" / "data" / "demo"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; no chat template, no pad token, EOS = BOS = UNK, as GPT-2's."""
    return _byte_level(
        ["<|endoftext|>"], eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template and pad = EOS, as SmolLM2's."""
    tokenizer = _byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _byte_level(special: list[str], **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained(tuple(special))), **names)


@cache
def _trained(special: tuple[str, ...]) -> str:
    """Once a process; as text, so that what is done to one tokenizer is not done to the next."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([(DEMO / "preferences.jsonl").read_text(encoding="utf-8")], trainer)
    return core.to_str()


def gpt2(seed: int = 0, vocab: int = 400) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(_gpt2_config(vocab)).eval()


def gpt2_reward(seed: int = 1, vocab: int = 401, pad: int = 400) -> GPT2ForSequenceClassification:
    torch.manual_seed(seed)
    config = _gpt2_config(vocab)
    config.num_labels, config.pad_token_id = 1, pad
    return GPT2ForSequenceClassification(config).eval()


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(_llama_config()).eval()


def llama_reward(seed: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = _llama_config()
    config.num_labels, config.pad_token_id = 1, 0
    return LlamaForSequenceClassification(config).eval()


def opt() -> OPTForCausalLM:
    """A policy whose dropout is a number in its layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 256}
    tokens = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return OPTForCausalLM(
        OPTConfig(dropout=0.1, attention_dropout=0.1, init_std=0.1, **sizes, **heads, **tokens)
    ).eval()


def mamba() -> MambaForCausalLM:
    """A policy that keeps a state in place of keys and values."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=32, state_size=8, num_hidden_layers=2))
    torch.nn.init.normal_(model.backbone.embeddings.weight, std=0.1)
    return model.eval()


def mixtral() -> MixtralForCausalLM:
    """A mixture of experts with the settings of its training: noise on its router, and the loss that balances it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    router = {"num_local_experts": 4, "router_jitter_noise": 0.5, "output_router_logits": True}
    return MixtralForCausalLM(
        MixtralConfig(num_hidden_layers=2, initializer_range=0.2, **sizes, **router, **tokens)
    ).eval()


def lfm2() -> Lfm2ForCausalLM:
    """A policy with convolutions in some layers, and keys and values in others."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    tokens = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Lfm2ForCausalLM(Lfm2Config(initializer_range=0.2, **sizes, **layers, **tokens)).eval()


def _gpt2_config(vocab: int) -> GPT2Config:
    return GPT2Config(vocab_size=vocab, n_positions=256, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def _llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.1,  # at 0.02 every tiny model says nearly the same
    )
