"""Rating responses, keys and filled sheets for the tests of ratings."""

import random
import threading
from contextlib import contextmanager
from typing import Any

from rlhf.ratings.scale import CRITERIA
from rlhf.ratings.serve import SheetServer
from rlhf.ratings.sheet import make_key, render_sheet

MODELS = ("base", "full", "lora")
ODD = "<script>document.title='owned'</script> **bold** & \"quoted\"\r\nnext line"


def responses(prompts: int = 4) -> list[dict[str, Any]]:
    """Rows of the rating prompts; the first prompt's response of `full` is markup, that of `lora` is empty."""
    texts = {("p0", "full"): ODD, ("p0", "lora"): ""}
    return [
        {
            "prompt_id": f"p{i}",
            "model": model,
            "prompt": f"Question <b>{i}</b>?",
            "response": texts.get((f"p{i}", model), f"answer {i * 7 % 5} {sum(map(ord, model)) * (i + 3) % 11}"),
        }
        for i in range(prompts)
        for model in MODELS
    ]


def key(prompts: int = 4, repeats: int = 1, seed: int = 0) -> dict[str, Any]:
    """A key whose order is fixed by a seed."""
    return make_key(responses(prompts), repeats, random.Random(seed))


def filled(key: dict[str, Any], rater: str, value: Any = 3, number: int = 1) -> dict[str, Any]:
    """A complete sheet; value: a rating, or a function of (item, criterion) to one."""
    give = value if callable(value) else lambda item, criterion: value
    return {
        "sheet_id": key["sheet_id"],
        "rater_id": f"{number:032x}",
        "rater": rater,
        "complete": True,
        "items": {
            item["item_id"]: {
                "prompt": item["prompt"],
                "response": item["response"],
                "ratings": {name: give(item, name) for name in CRITERIA},
                "note": "",
            }
            for item in key["items"]
        },
    }


@contextmanager
def serving(folder, **limits):
    """A rating server of key() in a thread; limits: attributes of SheetServer that are to be others."""
    kind = type("Limited", (SheetServer,), limits)
    server = kind(render_sheet(key()), key(), folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
