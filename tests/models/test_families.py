"""Of kinds of model that others train wrongly: each part is right, or refused before the first step."""

import pytest
from families import MARK, PAGE, PARTS, table, tried

RIGHT = [
    "opt",
    "gpt_bigcode",
    "starcoder2",
    "phimoe",
    "mamba",
    "mamba2",
    "lfm2",
    "falcon_h1",
    "qwen3_next",
    "jetmoe",
    "whisper",
    "ctrl",
]
REFUSED = ["bart", "openai-gpt", "recurrent_gemma", "bert"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIGHT)
def test_a_kind_is_trained_right(kind):
    found = tried(kind)
    for part in PARTS:
        assert found[part] == "right" or (part in ("critic", "LoRA") and found[part].startswith("refused: ")), found


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_is_refused_before_the_first_step(kind):
    assert all(what.startswith("refused: ") for what in tried(kind).values())


def test_a_row_of_the_table_says_why():
    found = dict.fromkeys(PARTS, "right") | {"critic": "refused: value_model: pass one"}
    assert table({"llama": found})[-1] == "| llama | right | right | refused | right | right | value_model: pass one |"


def test_nothing_in_the_table_is_wrong():
    rows = PAGE.read_text(encoding="utf-8").partition(MARK)[2].splitlines()[6:]
    assert len(rows) > 20
    for row in rows:
        assert {cell.strip() for cell in row.split("|")[2:7]} <= {"right", "refused", "not tried"}, row
