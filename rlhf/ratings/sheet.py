"""The rating sheet: an offline page that does not show which model wrote what, and its key, a separate file."""

import base64
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf.errors import UserError
from rlhf.file_types import RatingItem, RatingKey, ResponseRow
from rlhf.ratings.scale import CRITERIA, STEPS

_HERE = Path(__file__).parent


def read_responses(path: Path) -> list[ResponseRow]:
    """Rows of a .jsonl file with prompt_id, model, prompt and response as texts; a UserError names file and row."""
    if not path.is_file():
        raise UserError(f"{path}: expected the responses to the rating prompts, found none; run the evaluation again")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # RecursionError: a million brackets
            raise UserError(f"{path}:{number}: expected JSON, found: {error}") from None
        for name in ("prompt_id", "model", "prompt", "response"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise UserError(f"{path}:{number}: expected {name} as a text, found {str(row)[:60]}")
        rows.append(row)
    return rows


def make_key(rows: Sequence[ResponseRow], repeats: int, rng: random.Random | None = None) -> RatingKey:
    """Put the responses into a random order under random ids: {"sheet_id", "items": [...]} in the sheet's order.

    rows: one for each (prompt_id, model), with prompt and response; every prompt has the same models. The first
    `repeats` prompts of the sheet appear again at its end, in a new order and under new ids. An item: item_id, group
    (its screen), repeat (bool), prompt_id, model, prompt, response. Order and ids come from the system's random source
    unless `rng` is given, so that no seed in a recipe reveals them. Raises UserError.
    """
    rng = rng or random.SystemRandom()
    prompts: dict[str, dict[str, ResponseRow]] = {}
    for row in rows:
        answers = prompts.setdefault(row["prompt_id"], {})
        if row["model"] in answers:
            raise UserError(f"rating responses: expected one by {row['model']} to {row['prompt_id']}, found two")
        answers[row["model"]] = row
    models = {model for answers in prompts.values() for model in answers}
    for prompt_id, answers in prompts.items():
        if set(answers) != models:
            raise UserError(f"rating responses: expected {sorted(models)} for {prompt_id}, found {sorted(answers)}")
    if len(models) < 2:
        raise UserError(f"rating responses: expected at least two models to compare, found {sorted(models)}")
    if not 0 <= repeats <= len(prompts):
        raise UserError(f"rating_repeats: expected 0 to {len(prompts)}, the number of prompts, found {repeats}")
    order = rng.sample(sorted(prompts), len(prompts))
    items: list[RatingItem] = []
    for group, prompt_id in enumerate(order + order[:repeats]):
        for row in rng.sample([prompts[prompt_id][m] for m in sorted(models)], len(models)):
            items.append(
                {
                    "item_id": f"{rng.getrandbits(64):016x}",
                    "group": group,
                    "repeat": group >= len(order),
                    "prompt_id": prompt_id,
                    "model": row["model"],
                    "prompt": _as_shown(row["prompt"]),
                    "response": _as_shown(row["response"]),
                }
            )
    return {"sheet_id": f"{rng.getrandbits(64):016x}", "items": items}


def render_sheet(key: RatingKey) -> str:
    """The page for a key: texts, ids and order of its items; no models, no prompt ids."""
    groups: dict[int, dict[str, Any]] = {}
    for item in key["items"]:
        group = groups.setdefault(item["group"], {"prompt": item["prompt"], "items": []})
        group["items"].append({"id": item["item_id"], "response": item["response"]})
    script = (_HERE / "sheet.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(_HERE),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sheet.html.j2").render(
        sheet_id=key["sheet_id"],
        groups=list(groups.values()),
        criteria=CRITERIA,
        steps=STEPS,
        script=Markup(script),
        script_digest=digest,  # the only script that the page allows
    )


def _as_shown(text: str) -> str:
    """The text as a browser returns it: LF line ends, no NUL, no half surrogate pairs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-8", "replace").decode("utf-8")
