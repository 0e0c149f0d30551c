"""A reward that anyone can check: was the instruction obeyed?"""

import re

END = re.compile(r"[.!?](?=\s|$)")


def obeys(completions, word, **_):
    """1 for one whole sentence that has the word, 0 for anything else."""
    return [
        float(_is_one_sentence(said[0]["content"]) and _has(said[0]["content"], want))
        for said, want in zip(completions, word, strict=True)
    ]


def _is_one_sentence(text):
    text = text.strip()
    return len(END.findall(text)) == 1 and text[-1] in ".!?"


def _has(text, word):
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None
