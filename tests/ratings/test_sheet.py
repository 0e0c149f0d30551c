"""The sheet: nothing in it tells which model wrote what, and no text of it becomes markup."""

import json
import random
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import rating_sheets

from rlhf.errors import UserError
from rlhf.ratings.sheet import make_key, read_responses, render_sheet


class Page(HTMLParser):
    """Element names, and the text of each response in the page's order."""

    def __init__(self, html):
        super().__init__()
        self.names, self.texts, self.open = Counter(), [], False
        self.feed(html)

    def handle_starttag(self, name, attributes):
        self.names[name] += 1
        self.open = "response" in (dict(attributes).get("class") or "").split()
        if self.open:
            self.texts.append("")

    def handle_data(self, data):
        if self.open:
            self.texts[-1] += data

    def handle_endtag(self, name):
        self.open = False


def test_a_hundred_thousand_brackets_are_no_response(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(rating_sheets.responses()[0]) + "\n" + "[" * 100_000)
    with pytest.raises(UserError, match=r"r\.jsonl:2: expected JSON, found: maximum recursion depth exceeded"):
        read_responses(tmp_path / "r.jsonl")


def test_every_response_comes_once_and_repeats_come_again_at_the_end():
    key = rating_sheets.key(prompts=4, repeats=2)
    first = [(i["prompt_id"], i["model"]) for i in key["items"] if not i["repeat"]]
    again = [(i["prompt_id"], i["model"]) for i in key["items"] if i["repeat"]]
    assert sorted(first) == sorted((r["prompt_id"], r["model"]) for r in rating_sheets.responses())
    assert {p for p, _ in again} == {p for p, _ in first[:6]}  # the earliest prompts: the longest time between
    assert len(again) == len(set(again)) == 6
    assert [i["repeat"] for i in key["items"]] == sorted(i["repeat"] for i in key["items"])
    assert len({i["item_id"] for i in key["items"]}) == 18


def test_the_page_shows_the_texts_of_the_key_in_its_order():
    key = rating_sheets.key()
    page = Page(render_sheet(key))
    assert page.texts == [item["response"] for item in key["items"]]
    assert page.names["script"] == 1  # ours, and not the response's
    assert page.names["b"] == 0
    assert page.names["fieldset"] == len(key["items"]) * 5


def test_no_word_of_the_page_names_a_model_or_a_prompt_id():
    key = rating_sheets.key()
    rows = [row | {"model": f"secret-{row['model']}"} for row in rating_sheets.responses()]
    html = render_sheet(make_key(rows, 1, random.Random(3)))
    assert not re.search(r"secret|ppo|lora|\bp[0-3]\b", html, re.IGNORECASE)
    assert re.search(r"item_id|key\.json", html) is None
    # The same texts under swapped model names give the same page: it cannot depend on them.
    swapped = [item | {"model": item["model"][::-1]} for item in key["items"]]
    assert render_sheet(key | {"items": swapped}) == render_sheet(key)


def test_a_guesser_who_knows_the_page_alone_is_right_by_chance():
    """The best rule on position, on the order of ids, or on an id's last digits, learned on half the sheets."""
    sheets = [make_key(rating_sheets.responses(), 0)["items"] for _ in range(400)]
    for feature in (
        lambda items, i: i % 3,
        lambda items, i: sorted(x["item_id"] for x in items[i // 3 * 3 : i // 3 * 3 + 3]).index(items[i]["item_id"]),
        lambda items, i: int(items[i]["item_id"], 16) % 8,
        lambda items, i: i // 3,
    ):
        seen = [(feature(items, i), items[i]["model"]) for items in sheets for i in range(len(items))]
        half = len(seen) // 2
        table = Counter(seen[:half])
        guess = {f: max(rating_sheets.MODELS, key=lambda m: table[f, m]) for f, _ in table}
        right = sum(guess[f] == model for f, model in seen[half:]) / half
        # 2,400 guesses at 1/3: a standard deviation of 0.0096; five of them
        assert abs(right - 1 / 3) < 0.05


def test_order_and_ids_differ_from_sheet_to_sheet():
    one, two = (make_key(rating_sheets.responses(), 0) for _ in range(2))
    assert not {i["item_id"] for i in one["items"]} & {i["item_id"] for i in two["items"]}
    assert one["sheet_id"] != two["sheet_id"]


def test_only_our_script_may_run_and_nothing_is_loaded():
    html = render_sheet(rating_sheets.key())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert not re.search(r"(src|href)\s*=\s*[\"']", html)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows + rows[:1], "expected one by base to p0, found two"),
        (lambda rows: rows[1:], "expected .* for p0, found"),
        (lambda rows: [r for r in rows if r["model"] == "base"], "at least two models"),
        (lambda rows: [], "at least two models"),
    ],
)
def test_rows_that_make_no_sheet(change, message):
    with pytest.raises(UserError, match=message):
        make_key(change(rating_sheets.responses()), 0)


def test_more_repeats_than_prompts():
    for repeats in (5, -1):
        with pytest.raises(UserError, match=f"rating_repeats: expected 0 to 4, the number of prompts, found {repeats}"):
            make_key(rating_sheets.responses(), repeats)
    assert sum(item["repeat"] for item in make_key(rating_sheets.responses(), 4)["items"]) == 4 * 3


def test_responses_are_read_or_refused_by_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rating_sheets.responses()))
    assert read_responses(path) == rating_sheets.responses()
    for name in ("prompt_id", "model", "prompt", "response"):
        row = rating_sheets.responses()[0]
        path.write_text(" \n" + json.dumps(row) + "\n" + json.dumps(row | {name: 5}))
        with pytest.raises(UserError, match=rf"rows.jsonl:3: expected {name} as a text"):
            read_responses(path)
    with pytest.raises(UserError, match="expected the responses to the rating prompts, found none"):
        read_responses(tmp_path / "none.jsonl")


def test_texts_are_kept_as_a_browser_returns_them():
    odd, shown = "a\r\nb\rc\0d \ud800", "a\nb\ncd ?"
    rows = [{"prompt_id": "p", "model": model, "prompt": odd, "response": odd + model} for model in ("x", "y")]
    items = make_key(rows, 1)["items"]
    assert {item["prompt"] for item in items} == {shown}
    assert {(item["model"], item["response"]) for item in items} == {("x", f"{shown}x"), ("y", f"{shown}y")}
    assert [item["group"] for item in items] == [0, 0, 1, 1]
    assert [item["repeat"] for item in items] == [False, False, True, True]
