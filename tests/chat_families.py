"""Chat templates as families of models write them, on a tiny tokenizer."""

import tiny
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from rlhf.data.chat import prepare_tokenizer

# How families end a turn: what the template writes, the special tokens, and what ends a finished response.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FAMILIES = {
    "gemma": (GEMMA, "<s><turn>user\n{}<end>\n<turn>model\n", "{}<end>"),
    "phi": (PHI, "<turn>user\n{}<end>\n<turn>assistant\n", "{}<end>"),
    "llama 2": (LLAMA_2, "<s>[INST] {} [/INST]", " {} </s>"),
    "no end written": (BARE, "user: {}\nassistant: ", "{}</s>"),
    "ours": (None, "\n\nHuman: {}\n\nAssistant:", " {}</s>"),
}


def family(template, *special, blank_first=False):
    """blank_first: a tokenizer of single characters that begins every text with a blank, as Llama 2's."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    known = ["<pad>", "<s>", "</s>", "<turn>", "<end>", *special]
    if blank_first:
        letters = ["<unk>", "\u2581", *map(chr, range(33, 127)), "\n"]
        core = Tokenizer(models.BPE({token: i for i, token in enumerate([*known, *letters])}, [], unk_token="<unk>"))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        parts = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(parts)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)
        tokenizer.add_special_tokens({"additional_special_tokens": known[3:]})
    else:
        tokenizer = tiny._byte_level(known, **names)
    tokenizer.chat_template = template
    return prepare_tokenizer(tokenizer)


def user(text):
    return [{"role": "user", "content": text}]
