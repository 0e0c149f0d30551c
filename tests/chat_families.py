"""Chat templates as families of models write them, on a tiny tokenizer."""

import tiny

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


def family(template, *special):
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = tiny._byte_level(["<pad>", "<s>", "</s>", "<turn>", "<end>", *special], **names)
    tokenizer.chat_template = template
    return prepare_tokenizer(tokenizer)


def user(text):
    return [{"role": "user", "content": text}]
