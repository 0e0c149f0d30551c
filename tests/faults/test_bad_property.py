"""Whatever a data file holds, the loaders return rows that keep their promise or raise a UserError."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.data.hh_rlhf import load_pairs
from rlhf.data.oasst import load_prompts
from rlhf.errors import UserError

H, A = "\n\nHuman:", "\n\nAssistant:"
BOUNDED = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes its file anew
)
TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(["", "en", "prompter", "assistant", "\ud800", "\0"])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
# Pieces that make a dialogue in any order, so that each rule of the format is met and broken.
DIALOGUE = st.lists(st.sampled_from([H, A, " a", " b", "\n\n", "", "Human:"]) | TEXT, max_size=6).map("".join)
PROMPT = st.sampled_from([f"{H} q", f"{H} q{A} r{H} s", f"{H} q{H} s", f"{H} q{A} r", H, "q"])
END = st.sampled_from([f"{A} a", f"{A} b", f"{A} a\n\nb", f"{A} c", A, f"{A} a{H}"])
NEARLY = st.builds(lambda prompt, *ends: {"chosen": prompt + ends[0], "rejected": prompt + ends[1]}, PROMPT, END, END)
PAIR = NEARLY | st.fixed_dictionaries({}, optional={"chosen": DIALOGUE | JSON, "rejected": DIALOGUE | JSON, "x": JSON})
FIELDS = {"message_id": TEXT, "message_tree_id": TEXT, "role": TEXT, "text": TEXT, "lang": TEXT, "deleted": JSON}
WHOLE = st.fixed_dictionaries(
    {"message_id": TEXT, "message_tree_id": TEXT, "role": st.just("prompter"), "text": TEXT},
    optional={"deleted": st.booleans(), "replies": st.lists(JSON, max_size=1)},
)
MESSAGE = WHOLE | st.fixed_dictionaries({}, optional={**FIELDS, "replies": JSON, "prompt": WHOLE | JSON})
TREE = st.fixed_dictionaries({"message_tree_id": TEXT, "prompt": WHOLE})
NAMES = ["p.jsonl", "p.json", "p.txt", "p.jsonl.gz", "p.json.gz", "p.txt.gz", "p.parquet"]


def lines(rows) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def check_pairs(path) -> bool:
    """Whether there were pairs; each is whole."""
    try:
        pairs, counts = load_pairs(str(path))
    except UserError:  # which is of one line: its own tests
        return False
    assert counts["kept"] == len(pairs) > 0
    layouts = sum(n for name, n in counts.items() if name.startswith("layout_"))
    assert counts["rows"] == layouts == sum(counts.values()) - counts["rows"] - counts["merged_turns"] - layouts
    for pair in pairs:
        roles = [turn["role"] for turn in pair.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        texts = [*(turn["content"] for turn in pair.prompt), pair.chosen, pair.rejected]
        assert all(text and text == text.strip() and text.encode() for text in texts)
        assert pair.chosen != pair.rejected
    return True


def check_prompts(path) -> bool:
    """Whether there were prompts; each is whole, and none comes twice."""
    try:
        prompts, counts = load_prompts([str(path)])
    except UserError:  # which is of one line: its own tests
        return False
    assert counts["kept"] == len(prompts) > 0
    layouts = sum(n for name, n in counts.items() if name.startswith("layout_"))
    assert counts["messages"] == layouts == sum(counts.values()) - counts["messages"] - layouts
    assert all(p.text and p.text == p.text.strip() and p.text.encode() for p in prompts)
    assert all(isinstance(p.prompt_id, str) and isinstance(p.tree_id, str) for p in prompts)
    assert len({p.prompt_id for p in prompts}) == len({" ".join(p.text.split()).casefold() for p in prompts})
    return True


@pytest.fixture
def outcomes():
    """What became of the examples: a property that only ever sees one side says little."""
    found: list[bool] = []
    yield found
    assert {True, False} <= set(found)


@BOUNDED
@given(rows=st.lists(PAIR | JSON, max_size=3) | st.lists(NEARLY, min_size=1, max_size=5))
def pairs_of_rows(folder, found, rows):
    (folder / "p.jsonl").write_bytes(lines(rows))
    found.append(check_pairs(folder / "p.jsonl"))


def test_rows_as_pairs(tmp_path, outcomes):
    pairs_of_rows(tmp_path, outcomes)


@BOUNDED
@given(rows=st.lists(MESSAGE | TREE | JSON, max_size=3), array=st.booleans())
def prompts_of_rows(folder, found, rows, array):
    (folder / "p.json").write_bytes(json.dumps(rows, indent=1).encode() if array else lines(rows))
    found.append(check_prompts(folder / "p.json"))


def test_rows_as_prompts(tmp_path, outcomes):
    prompts_of_rows(tmp_path, outcomes)


@BOUNDED
@given(
    name=st.sampled_from(NAMES),
    content=st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    mistaken=st.booleans(),
    cut=st.sampled_from([0, 0, 1, 9]),
)
def any_bytes(folder, found, name, content, mistaken, cut):
    content = gzip.compress(content, mtime=0) if name.endswith(".gz") != mistaken else content
    (folder / name).write_bytes(content[: len(content) - cut])
    found.append(check_prompts(folder / name))
    check_pairs(folder / name)


def test_bytes(tmp_path, outcomes):
    any_bytes(tmp_path, outcomes)
