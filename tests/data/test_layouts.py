"""One question and its two answers, written in each layout of the field, are the same pair and the same prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from rlhf.data.hh_rlhf import load_pairs
from rlhf.data.layouts import parse_columns
from rlhf.data.oasst import load_prompts
from rlhf.data.prompts import dataset_row
from rlhf.errors import UserError

Q, GOOD, BAD = "Why does ice float?", "It is less dense.", "No."
EARLIER = ("Hi.", "Hello!")


def m(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def g(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


def hh(*turns: str, end: str = "\n\n") -> str:
    return "".join(f"{end}{turn}" for turn in turns)


U, A, B, S = m("user", Q), m("assistant", GOOD), m("assistant", BAD), m("system", "Be brief.")
LONG = [m("user", EARLIER[0]), m("assistant", EARLIER[1]), U]  # a conversation of several turns


def sides(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {**more, "chosen": chosen, "rejected": rejected}


def texts(*before: str, end: str = "\n\n") -> dict[str, Any]:
    return sides(*(hh(*before, f"Human: {Q}", f"Assistant: {said}", end=end) for said in (GOOD, BAD)))


# Row, its layout, the prompt's turns.
PAIRS: dict[str, tuple[dict[str, Any], str, list[dict[str, str]]]] = {
    "hh": (texts(), "hh_text", [U]),
    "hh with CRLF": (texts(end="\r\n\r\n"), "hh_text", [U]),
    "hh with a system turn": (texts("System: Be brief."), "hh_text", [S, U]),
    "hh of several turns": (texts("Human: Hi.", "Assistant: Hello!"), "hh_text", LONG),
    "hh, a prompt that waits": (
        sides(f" {GOOD}", f" {BAD}", prompt=hh(f"Human: {Q}", "Assistant:")),
        "prompt_text",
        [U],
    ),
    "hh beside its prompt": ({**texts(), "prompt": hh(f"Human: {Q}", "Assistant:")}, "hh_text", [U]),
    "implicit": (sides([U, A], [U, B]), "implicit_prompt_messages", [U]),
    "implicit, system": (sides([S, U, A], [S, U, B]), "implicit_prompt_messages", [S, U]),
    "implicit, several turns": (sides([*LONG, A], [*LONG, B]), "implicit_prompt_messages", LONG),
    "implicit, its question beside (ultrafeedback_binarized)": (
        sides([U, A], [U, B], prompt=Q, messages=[U, A]),
        "prompt_text",
        [U],
    ),
    "implicit, its last question beside": (sides([*LONG, A], [*LONG, B], prompt=Q), "prompt_text", LONG),
    "implicit, system beside": (sides([U, A], [U, B], system="Be brief."), "implicit_prompt_messages", [S, U]),
    "explicit messages": (sides([A], [B], prompt=[U]), "prompt_messages", [U]),
    "explicit, single messages": (sides(A, B, prompt=LONG), "prompt_messages", LONG),
    "explicit, texts beside messages": (sides(GOOD, BAD, prompt=[S, U]), "prompt_messages", [S, U]),
    "explicit, the user's turn in the completion": (sides([U, A], [U, B], prompt=[S]), "prompt_messages", [S, U]),
    "explicit and repeated": (sides([U, A], [U, B], prompt=[S, U]), "prompt_messages", [S, U]),
    "explicit text": (sides(GOOD, BAD, prompt=Q), "prompt_text", [U]),
    "text that begins with a name": (sides(GOOD, BAD, prompt=f"Human: {Q}"), "prompt_text", [m("user", f"Human: {Q}")]),
    "Argilla": (sides(GOOD, BAD, system="", question=Q), "prompt_text", [U]),
    "Argilla, system": (sides(GOOD, BAD, system="Be brief.", input=Q), "prompt_text", [S, U]),
    "columns that are empty": (sides(GOOD, BAD, prompt=None, messages=None, query=Q), "prompt_text", [U]),
    "Alpaca": (
        sides(GOOD, BAD, instruction="Why does", input="ice float?", history=[EARLIER]),
        "instruction",
        [*LONG[:2], m("user", "Why does\nice float?")],
    ),
    "ShareGPT": (sides(g("gpt", GOOD), g("gpt", BAD), conversations=[g("human", Q)]), "sharegpt", [U]),
    "ShareGPT, system": (
        sides(g("gpt", GOOD), g("gpt", BAD), conversations=[g("system", "Be brief."), g("human", Q)]),
        "sharegpt",
        [S, U],
    ),
    "ShareGPT, an empty system turn": (
        sides(g("gpt", GOOD), g("gpt", BAD), conversations=[g("system", " "), g("human", Q)]),
        "sharegpt",
        [U],
    ),
    "texts beside a conversation": (sides(GOOD, BAD, messages=[S, U]), "prompt_messages", [S, U]),
    "whole sides, and one of them again": (sides([U, A], [U, B], messages=[U, A]), "implicit_prompt_messages", [U]),
    "ShareGPT, whole sides": (sides([g("human", Q), g("gpt", GOOD)], [g("human", Q), g("gpt", BAD)]), "sharegpt", [U]),
    "PKU-SafeRLHF": (
        {"prompt": Q, "response_0": BAD, "response_1": GOOD, "safer_response_id": 0, "better_response_id": 1},
        "two_responses",
        [U],
    ),
    "arena": ({"conversation_a": [*LONG, A], "conversation_b": [*LONG, B], "winner": "model_a"}, "two_responses", LONG),
    "two responses of a table": (
        {"instruction": Q, "system": "Be brief.", "Response_1": BAD, "Response_2": GOOD, "preference": "2.0"},
        "two_responses",
        [S, U],
    ),
    "two responses and the place of the better one": (
        {"question": Q, "completions": [GOOD, BAD], "chosen": 0},
        "two_responses",
        [U],
    ),
    "several responses and two places": (
        {"prompt": [U], "responses": ["So.", BAD, GOOD], "chosen": 2, "rejected": 1},
        "two_responses",
        [U],
    ),
    "other roles": (
        sides([m("Human", Q), m("Assistant", GOOD)], [m("Human", Q), m("Assistant", BAD)]),
        "implicit_prompt_messages",
        [U],
    ),
    "parts": (
        sides([m("user", [{"type": "text", "text": Q}]), A], [m("user", [{"type": "text", "text": Q}]), B]),
        "implicit_prompt_messages",
        [U],
    ),
}


def written(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def layouts(counts: dict[str, int]) -> dict[str, int]:
    return {name: n for name, n in counts.items() if name.startswith("layout_")}


@pytest.mark.parametrize(("row", "layout", "turns"), PAIRS.values(), ids=PAIRS)
def test_a_pair_in_each_layout(tmp_path: Path, row: dict[str, Any], layout: str, turns: list[dict[str, str]]) -> None:
    [pair], counts = load_pairs(written(tmp_path, row))
    assert (pair.prompt, pair.chosen, pair.rejected) == (turns, GOOD, BAD)
    assert pair.opening == next(turn["content"] for turn in turns if turn["role"] == "user")
    assert (counts["kept"], layouts(counts)) == (1, {f"layout_{layout}": 1})
    # A prompt data set takes the pair's prompt.
    [prompt], _ = load_prompts([written(tmp_path, row)])
    assert prompt.messages == turns
    if layout == "two_responses":  # without a preference it is no pair
        which = next(name for name in ("better_response_id", "winner", "preference", "chosen") if name in row)
        for tie in (None, "", "tie (bothbad)", "Tie"):
            counts = load_pairs(written(tmp_path, row, row | {which: tie}))[1]
            assert (counts["rows"], counts["kept"], counts["no_preference"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("row", "layout", "turns"),
    [
        (Q, "text", [U]),
        ({"prompt": Q}, "prompt_text", [U]),
        ({"prompt": hh("Human: Hi.", "Assistant: Hello!", f"Human: {Q}", "Assistant:")}, "prompt_text", LONG),
        ({"prompt": Q, "system": "Be brief."}, "prompt_text", [S, U]),
        ({"prompt": [S, U]}, "prompt_messages", [S, U]),
        ({"prompt": [U, m("assistant", "It")]}, "prompt_messages", [U, m("assistant", "It")]),  # to be continued
        ({"messages": [U]}, "messages", [U]),
        ({"messages": [*LONG, A]}, "messages", LONG),
        ({"conversations": [g("human", Q), g("gpt", GOOD)], "system": "Be brief."}, "sharegpt", [S, U]),
        ({"instruction": Q, "input": "", "output": GOOD}, "instruction", [U]),
        ({"instruction": "Why", "context": "ice.", "response": GOOD}, "instruction", [{**U, "content": "Why\nice."}]),
        (
            {"instruction": Q, "input": "", "context": "Page 3.", "response": GOOD},
            "instruction",
            [U],
        ),  # only one of them
        ({"question": Q, "answer": GOOD}, "prompt_text", [U]),
        ({"query": Q}, "prompt_text", [U]),
    ],
)
def test_a_prompt_in_each_layout(tmp_path: Path, row: Any, layout: str, turns: list[dict[str, str]]) -> None:
    [prompt], counts = load_prompts([written(tmp_path, row)])
    assert prompt.messages == turns
    assert layouts(counts) == {f"layout_{layout}": 1}
    assert prompt.text == (
        turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{t['role']}: {t['content']}" for t in turns)
    )


def test_layouts_mix_and_conversations_with_one_opening_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": LONG}, {"prompt": [S, LONG[0]]}, "Hi.", {"prompt": " hi. "}, {"messages": [A]}, {"prompt": [S]}]
    prompts, counts = load_prompts([written(tmp_path, *rows)])
    assert len({prompt.tree_id for prompt in prompts}) == 1
    assert (counts["kept"], counts["duplicate"], counts["empty"]) == (3, 1, 2)
    assert layouts(counts) == {
        "layout_prompt_messages": 3,
        "layout_text": 1,
        "layout_prompt_text": 1,
        "layout_messages": 1,
    }


def test_other_columns_go_to_reward_functions(tmp_path: Path) -> None:
    [prompt], _ = load_prompts([written(tmp_path, {"question": Q, "answer": "42", "prompt_id": "x", "lang": "en"})])
    row = dataset_row(prompt)
    assert (row["prompt"], row["answer"], row["prompt_id"]) == ([U], "42", prompt.prompt_id)
    assert load_prompts([written(tmp_path, {"prompt": "Was?", "lang": "de"}, Q)])[1]["other_language"] == 1


def test_tables_folders_of_datasets_and_renamed_columns(tmp_path: Path) -> None:
    rows = [sides(*row, problem=q) for q, *row in (("1?", "a", "b"), ("2?", "c", "d"))]
    renamed = [{"problem": r["problem"], "better": r["chosen"], "worse": r["rejected"]} for r in rows]
    columns = parse_columns("dataset_columns", ["prompt=problem", "chosen=better", "rejected=worse"])
    table = Dataset.from_list(renamed)
    table.to_parquet(tmp_path / "one.parquet")
    (tmp_path / "array.json").write_text(json.dumps(renamed))
    DatasetDict({"test": table.select([1]), "train": table.select([0])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/train/cache-1.arrow").write_bytes(b"of a map")
    for source in ("one.parquet", "array.json", "saved"):
        pairs, counts = load_pairs(str(tmp_path / source), columns=columns)
        assert sorted((p.opening, p.chosen, p.rejected) for p in pairs) == [("1?", "a", "b"), ("2?", "c", "d")], source
        assert layouts(counts) == {"layout_prompt_text": 2}
        prompts, _ = load_prompts([str(tmp_path / source)], columns={"prompt": "problem"})
        assert sorted(prompt.text for prompt in prompts) == ["1?", "2?"]
    for folder in ("train", "tr*/*.arrow"):
        assert [p.opening for p in load_pairs(str(tmp_path / "saved"), folder, columns=columns)[0]] == ["1?"]
        found = load_prompts([str(tmp_path / "saved")], data_dir=folder, columns={"prompt": "problem"})[0]
        assert [prompt.text for prompt in found] == ["1?"]
    with pytest.raises(UserError, match=r"one\.parquet:1: expected a column 'q', found 'problem', 'better', 'worse'$"):
        load_pairs(str(tmp_path / "one.parquet"), columns={"prompt": "q"})
    saved = next((tmp_path / "saved/train").glob("data*.arrow"))
    saved.write_bytes(saved.read_bytes()[:300])
    with pytest.raises(UserError, match=r"\.arrow:1: expected arrow, found: "):
        load_pairs(str(saved))


@pytest.mark.parametrize("given", ["prompt", "prompt=", "promt=x", "=x"])
def test_columns_that_are_no_fields(given: str) -> None:
    with pytest.raises(
        UserError, match=r"^dataset_columns: expected FIELD=COLUMN with a field of prompt, chosen, .* found"
    ):
        parse_columns("dataset_columns", [given])


PAIR_LINE = (
    "expected an object with fields 'chosen' and 'rejected', found an object with fields 'a': {\"a\": 1}; each is"
)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"a": 1}, PAIR_LINE),
        (
            sides([m("tool", "x")], [B]),
            "field 'chosen': turn 1: field 'role': expected system, user or assistant, found",
        ),
        (
            sides([A], [{"role": "assistant"}]),
            "field 'rejected': turn 1: field 'content': expected text, found nothing",
        ),
        (sides([m("user", [{"type": "image"}])], [B]), "turn 1: field 'content': expected parts of type text, found"),
        (sides([U, A], [U, B], prompt="Other?"), "field 'chosen': expected a response to field 'prompt', or a conv"),
        (sides(GOOD, BAD, instruction=Q, history=["x"]), "field 'history': expected a list of [question, answer]"),
        (sides(GOOD, BAD, prompt=7), "field 'prompt': expected text or messages, found int"),
        (
            {"prompt": Q, "response_1": GOOD, "response_2": BAD, "chosen": 0},
            "field 'chosen': expected which response it is, 1, 2, found '0'",
        ),
        (
            {"prompt": Q, "responses": [GOOD, BAD, "x"], "chosen": -1},
            "field 'chosen': expected which response it is, 0, 1, 2, found '-1'",
        ),
        (
            {"prompt": Q, "responses": [GOOD, BAD, "x"], "chosen": 1},
            "field 'rejected': expected which response it is, 0, 1, 2, found 'None'",
        ),
    ],
)
def test_what_is_in_no_layout_is_shown(tmp_path: Path, row: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_pairs(written(tmp_path, texts(), row))
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_of_which_none_is_in_a_layout_are_shown_by_the_first(tmp_path: Path) -> None:
    alone = written(tmp_path, {"context": Q, **sides(GOOD, BAD)}, {"context": Q, **sides(BAD, GOOD)})
    with pytest.raises(UserError, match=r"rows.jsonl:1: expected an object .* \{\"context\": .*: dataset_columns$"):
        load_pairs(alone)
    pairs, counts = load_pairs(alone, columns={"prompt": "context"})
    assert (len(pairs), counts["layout_prompt_text"]) == (2, 2)


def test_a_prompt_in_no_layout_is_shown_with_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_prompts([written(tmp_path, Q, {"text": "x"})])
    for words in (
        "rows.jsonl:2: ",
        "'conversations'",
        'found an object with fields \'text\': {"text": "x"}',
        "prompt_columns",
    ):
        assert words in str(caught.value)
