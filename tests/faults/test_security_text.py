"""What is printed does not steer a terminal, what is written gives nothing away, and no code of ours is a way in."""

import ast
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import rating_sheets
import yaml
from limits import HANG

from rlhf.cli.compare import side_by_side
from rlhf.cli.parsing import read_recipe
from rlhf.config import ReportConfig, RewardStageConfig, RunConfig
from rlhf.data.hh_rlhf import load_pairs
from rlhf.data.oasst import load_prompts
from rlhf.errors import UserError, printable
from rlhf.ratings.sheet import read_responses
from rlhf.storage.disk import read_json
from rlhf.storage.stages import require_stage

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
ESCAPE = "\x1b]8;;http://evil.example\x07text\x1b]8;;\x07\x1b[2J\x9b31m\x90q\x08\x7f\u202e\u2066\u2028end"


def harmless(text):
    return all(c.isprintable() for c in text)


def test_printable_by_hand():
    assert printable("a\x1b[31mb\nc\td\u2028e\x85f\xa0g") == r"a\x1b[31mb c d e f g"
    assert printable("\x9b\u202e\ud800\0\x7f") == r"\x9b\u202e\ud800\x00\x7f"
    assert printable("one\ntwo\r", keep="\n") == "one\ntwo "
    kept = "Ä Ω 漢字 नमस्ते 👩\u200d💻 می\u200cخواهم \\x1b ’"
    assert printable(kept) == kept


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("bad.jsonl", "{" + ESCAPE, load_pairs),
        ("bad.jsonl", json.dumps({ESCAPE: 1, "role": 2}), lambda path: load_prompts([path])),
        ("bad.jsonl", json.dumps({"role": ESCAPE, "message_tree_id": "t"}), lambda path: load_prompts([path])),
        (f"{ESCAPE}.jsonl", "{", load_pairs),
        (f"{ESCAPE}.xyz", "{", load_pairs),
        ("bad.json", "{" + ESCAPE, lambda path: read_json(Path(path))),
        ("bad.jsonl", json.dumps({"prompt_id": ESCAPE}), lambda path: read_responses(Path(path))),
        ("bad.yaml", f"a: b: {ESCAPE}", lambda path: read_recipe(Path(path))),
    ],
)
def test_data_in_an_error_line_is_printable(tmp_path, name, text, read):
    path = tmp_path / name.replace("/", "")
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read(str(path))
    assert harmless(str(error.value))
    assert "expected" in str(error.value) or "not valid YAML: " in str(error.value)


def test_a_status_out_of_a_file_is_printable(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": ESCAPE}))
    with pytest.raises(UserError) as error:
        require_stage(tmp_path)
    assert harmless(str(error.value))


def test_columns_of_responses_are_printable():
    rows = [
        {"model": f"base{ESCAPE}", "response": f"a\n{ESCAPE}\r\nb", "score": 1.0, "response_length": 3, "eos": True},
        {"model": "full", "response": "one\ntwo", "score": 1.0, "response_length": 3, "eos": True},
    ]
    assert harmless(side_by_side(rows, 80).replace("\n", ""))


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/a", "../a", "a/..", "a\nb", "a\x1b[2J", "-x", "--help", "a\0"]
)
def test_a_run_is_one_folder(name):
    for make in (lambda: RunConfig(run=name), lambda: ReportConfig(runs=["a", name])):
        with pytest.raises(UserError, match=r"expected (a plain folder name|plain folder names)") as error:
            make()
        assert harmless(str(error.value))
    assert RunConfig(run="läuf 1.b").folder() == Path("runs") / "läuf 1.b"


def test_the_key_is_for_its_owner_alone(tmp_path):
    evaluation = tmp_path / "r" / "evaluation"
    evaluation.mkdir(parents=True)
    (evaluation / "run.json").write_text('{"status": "done"}')
    rows = "".join(json.dumps(row) + "\n" for row in rating_sheets.responses())
    (evaluation / "rating_responses.jsonl").write_text(rows)
    command = [sys.executable, str(ROOT / "scripts/rate.py"), "sheet", "--runs_dir", str(tmp_path), "--run", "r"]
    before = os.umask(0o022)
    try:
        subprocess.run(command, check=True, timeout=HANG, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "r" / "ratings").iterdir()}
    assert modes == {"key.json": 0o600, "sheet.html": 0o644}


def test_settings_are_pickled_and_shown_without_the_token(tmp_path):
    args = RewardStageConfig(output_dir=str(tmp_path), hub_token="hf_secret", use_cpu=True, bf16=False)
    assert args.hub_token == "hf_secret"
    assert args.__getstate__()["hub_token"] is None
    assert args.__getstate__()["margin"] == args.margin
    assert "hf_secret" not in json.dumps(args.to_dict(), default=str) + args.to_json_string()


FORBIDDEN = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "os.execvp",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "dill.load", "joblib.load"),
    *("tempfile.mktemp", "shutil.unpack_archive", "numpy.load", "np.load", "pd.read_pickle", "torch.hub.load"),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_of_ours_is_a_way_in(path):
    tree = ast.parse(path.read_text())
    safe = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, n.bases)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        where = f"{path}:{node.lineno}: {name}"
        assert name not in FORBIDDEN, where
        assert not name.endswith(".extractall"), where
        assert keywords.get("shell", "False") == "False", where
        assert keywords.get("trust_remote_code") != "True", where
        assert name != "yaml.load" or ast.unparse(node.args[1]) in safe, where
        assert name != "torch.load" or keywords.get("weights_only") == "True", where
        if name in ("subprocess.run", "subprocess.Popen", "subprocess.check_output"):
            assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr), where
        if name == "Environment":
            assert keywords.get("autoescape") == "True", where
        if name == "Markup":
            assert (path.name, ast.unparse(node.args[0])) == ("sheet.py", "script"), where


def test_a_recipe_makes_no_objects(tmp_path):
    (tmp_path / "r.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path}/marker']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_recipe(tmp_path / "r.yaml")
    assert not (tmp_path / "marker").exists()
    yaml.unsafe_load((tmp_path / "r.yaml").read_text())  # and it would have
    assert (tmp_path / "marker").exists()


def shell(script, tmp_path, **environment):
    """One of Slurm's files with an sbatch of our own, which writes down what it was called with."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "sbatch").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> "$CALLS"\necho 7\n')
    (tools / "sbatch").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    settings = {
        "PATH": path,
        "CALLS": str(tmp_path / "calls"),
        "RUNS_DIR": str(tmp_path / "runs"),
        "HOME": str(tmp_path),
    }
    return subprocess.run(
        ["bash", *script], env=settings | environment, cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )


PIPELINE = ["slurm/pipeline.sh", "--recipe", "demo"]
SHELL = [
    "a;touch marker",
    "$(touch marker)",
    "`touch marker`",
    "a b",
    "../a",
    "..",
    "-x",
    "a\ntouch marker",
    "a%j",
    "/a",
]


@pytest.mark.parametrize("run", SHELL)
def test_slurm_gets_no_run_name_with_anything_in_it(tmp_path, run):
    done = shell([*PIPELINE, "--run", run], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: run: expected letters, digits")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]
    stage = shell(["-c", "source slurm/stage.sh"], tmp_path, RECIPE="demo", RUN=run)
    assert stage.returncode == 2
    assert "error: RUN: expected letters, digits" in stage.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


@pytest.mark.parametrize("seeds", ["1;touch marker", "$(touch marker)", "1 --wrap=id", "a[$(id)]", "x"])
def test_slurm_gets_no_seeds_with_anything_in_them(tmp_path, seeds):
    done = shell([*PIPELINE, "--run", "r", "--seeds", seeds], tmp_path)
    assert (done.returncode, "error: seeds: expected numbers" in done.stderr) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_options_of_sbatch_stay_words(tmp_path):
    """Each arrives as it was given: nothing is split, expanded or run once more."""
    odd = "--comment=$(touch marker); `touch marker` * 'x"
    done = shell([*PIPELINE, "--run", "r", "--seeds", "1,2-3%2", odd], tmp_path)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls.count(odd) == calls.count("--array=1,2-3%2") == 6
    assert not (ROOT / "marker").exists()


def test_a_number_of_processes_is_a_number(tmp_path):
    """Bash's arithmetic runs commands that stand in a value."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("")
    settings = {"RECIPE": "demo", "RUN": "r", "RLHF_VENV": str(tmp_path / "venv"), "SLURM_JOB_NUM_NODES": "1"}
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "source slurm/stage.sh; run_stage reward scripts/train_reward.py"
    done = shell(["-c", script], tmp_path, RLHF_PROCESSES=f"a[$(touch {tmp_path}/marker)]", **settings)
    assert (done.returncode, "error: RLHF_PROCESSES: expected a number" in done.stderr) == (2, True)
    assert not (tmp_path / "marker").exists()
