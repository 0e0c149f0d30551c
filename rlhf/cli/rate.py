"""Blind human rating of a run's responses: rlhf rate sheet|serve|import --run NAME [--field value …].

sheet    write ratings/sheet.html, the page for raters, and ratings/key.json, which they must not see
serve    offer the page on loopback (reach it from elsewhere by `ssh -L PORT:127.0.0.1:PORT HOST`), store what comes in
import   check raters' files, join them with those stored, write ratings/ratings.json
"""

import os
import sys
from pathlib import Path
from typing import cast

from rlhf.cli.parsing import parse
from rlhf.cli.script import run_script
from rlhf.config import RatingConfig, RunConfig
from rlhf.console import screen
from rlhf.console.words import path_to
from rlhf.errors import UserError, did_you_mean
from rlhf.file_types import RatingKey
from rlhf.ratings.analyse import analyse
from rlhf.ratings.collect import import_sheets, read_object
from rlhf.ratings.serve import SheetServer
from rlhf.ratings.sheet import make_key, read_responses, render_sheet
from rlhf.storage.run_folder import write_json, write_text
from rlhf.storage.stages import meant_run, require_stage

ACTIONS = ("sheet", "serve", "import")


def write_sheet(run: RunConfig, config: RatingConfig) -> None:
    folder = run.folder() / "ratings"
    if (folder / "key.json").exists():
        raise UserError(
            f"{folder / 'key.json'}: there is a sheet already, and ratings belong to its key; "
            "move the folder away to make another sheet"
        )
    rows = read_responses(require_stage(run.folder() / "evaluation") / "rating_responses.jsonl")
    key = make_key(rows, config.rating_repeats)
    write_text(folder / "sheet.html", render_sheet(key))
    before = os.umask(0o077)  # only the owner may read the key, from the start
    try:
        write_json(folder / "key.json", key)
    finally:
        os.umask(before)
    screen.to_copy(f"Sheet  {path_to(folder / 'sheet.html')}, for raters")
    screen.to_copy(f"Key    {path_to(folder / 'key.json')}, not for raters")


def _read_key(folder: Path) -> RatingKey:
    if meant := meant_run(folder.parent):
        raise UserError(f"{folder.parent}: expected a run folder, found none{meant}")
    return cast(RatingKey, read_object(folder / "key.json"))


def serve(run: RunConfig, config: RatingConfig) -> None:
    folder = run.folder() / "ratings"
    key = _read_key(folder)
    with SheetServer(render_sheet(key), key, folder / "ratings", config.port) as server:
        screen.to_copy(f"Sheet  {server.url}   (Ctrl+C ends)")
        server.serve_forever()


def import_ratings(run: RunConfig, config: RatingConfig) -> None:
    folder = run.folder() / "ratings"
    key = _read_key(folder)
    sheets = import_sheets(key, [Path(name) for name in config.files], folder / "ratings")
    models = sorted({item["model"] for item in key["items"]})
    result = analyse(key, sheets, models, config.rating_confidence, config.rating_seed)
    write_json(folder / "ratings.json", result)
    screen.say(f"complete sheets: {len(result['raters'])}, incomplete: {', '.join(result['incomplete']) or 'none'}")
    for line in result["words"]:
        screen.say(line)


def main() -> None:
    action = sys.argv[1] if len(sys.argv) > 1 else ""
    if action not in ACTIONS:
        meant = did_you_mean(action, ACTIONS)
        raise UserError(f"rate: give one of {', '.join(ACTIONS)} first, not {action!r}{meant}")
    run, config = parse([RunConfig, RatingConfig], sys.argv[2:])
    {"sheet": write_sheet, "serve": serve, "import": import_ratings}[action](run, config)


if __name__ == "__main__":
    run_script(main)
