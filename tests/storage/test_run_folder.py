"""run.json tells the truth about a stage, and files are complete or absent."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import PartialState

from rlhf.cli.script import run_script
from rlhf.errors import UserError
from rlhf.storage import run_folder
from rlhf.storage.run_folder import Stage, anywhere, append_row, command_line, git_commit, write_json, write_rows
from rlhf.storage.stages import is_done, read_run, require_stage
from rlhf.tracking.recorder import keep_rows


def test_a_stage_is_running_then_done(tmp_path):
    folder = tmp_path / "reward"
    assert not is_done(folder)
    with Stage(folder, "reward", {"learning_rate": 1e-5}, seed=3) as stage:
        assert read_run(folder)["status"] == "running"
        stage.record(data={"rows": 7})
        with pytest.raises(UserError, match="expected a stage that is done, found: running"):
            require_stage(folder)
    facts = read_run(folder)
    assert (facts["status"], facts["seed"], facts["data"]) == ("done", 3, {"rows": 7})
    assert facts["versions"].keys() >= {"torch", "transformers", "trl", "peft", "accelerate"}
    assert 0 <= facts["seconds"] < 600
    assert facts["started"] <= facts["ended"]
    assert facts["started"][19:] == facts["ended"][19:] == "+00:00"  # whole seconds of a time that all clocks have
    assert facts["peak_memory"]
    assert require_stage(folder) == folder


@pytest.mark.parametrize(
    ("module", "first", "typed"),
    [
        ("rlhf.cli.train_ppo", "/any/rlhf/cli/train_ppo.py", "python -m rlhf.cli.train_ppo"),
        ("rlhf.cli.__main__", "rlhf ppo", "rlhf ppo"),
        (None, "scripts/train_ppo.py", "scripts/train_ppo.py"),
        ("pytest.__main__", "/any/pytest/__main__.py", "/any/pytest/__main__.py"),
    ],
)
def test_the_command_is_as_one_would_type_it(monkeypatch, module, first, typed):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None if module is None else SimpleNamespace(name=module))
    monkeypatch.setattr("sys.argv", [first, "--run", "a", "--title", "two words; $HOME"])
    assert command_line() == f"{typed} --run a --title 'two words; $HOME'"


def test_a_token_on_the_command_line_is_not_kept(tmp_path, monkeypatch):
    token = "hf_" + "x" * 34
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", token, f"--hub-token={token}", token, "--run", "hf_a"])
    with Stage(tmp_path, "reward", {}, seed=0):
        pass
    assert read_run(tmp_path)["command"] == "train.py --hub_token ... --hub-token=... hf_... --run hf_a"


@pytest.mark.parametrize("what", ["a folder", "brackets", "a list", "cut"])
def test_a_run_json_that_is_none_is_named(tmp_path, what):
    path = tmp_path / "run.json"
    if what == "a folder":
        path.mkdir()
    else:
        path.write_text({"brackets": "[" * 100_000, "a list": "[1]", "cut": '{"a": '}[what])
    with pytest.raises(UserError, match=f"{path}: expected "):
        read_run(tmp_path)


def test_a_stage_that_breaks_says_so(tmp_path):
    with pytest.raises(ZeroDivisionError), Stage(tmp_path, "reward", {}, seed=0):
        _ = 1 / 0
    assert read_run(tmp_path)["status"] == "failed"
    assert read_run(tmp_path)["error"] == "ZeroDivisionError: division by zero"
    with pytest.raises(ValueError, match="two"), Stage(tmp_path, "reward", {}, seed=0):
        raise ValueError("one\ntwo")
    assert read_run(tmp_path)["error"] == "ValueError: one"
    with pytest.raises(KeyboardInterrupt), Stage(tmp_path, "reward", {}, seed=0):
        raise KeyboardInterrupt
    assert read_run(tmp_path)["status"] == "stopped"
    assert "error" not in read_run(tmp_path)


def test_paths_in_the_run_are_relative_to_it_since_it_may_be_moved(tmp_path):
    run = tmp_path / "run"
    paths = {"output_dir": f"{run}/reward", "models": [f"{run}/a", "/b", 3], "beside": f"{run}2/x"}
    with Stage(run / "reward", "reward", {**paths, "deep": paths}, seed=0) as stage:
        stage.record(data=paths)
    found = {"output_dir": "reward", "models": ["a", "/b", 3], "beside": f"{run}2/x"}
    facts = read_run(run / "reward")
    assert (facts["config"], facts["data"]) == ({**found, "deep": found}, found)


def test_a_model_is_named_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.gguf").write_text("")
    found = [anywhere(name) for name in ("folder", "a.gguf", "someone/model")]
    assert found == [str(tmp_path / "folder"), str(tmp_path / "a.gguf"), "someone/model"]


def test_writing_leaves_nothing_beside_the_file(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"text": "ü"})
    assert (tmp_path / "a" / "x.json").read_text(encoding="utf-8") == '{\n  "text": "ü"\n}\n'
    append_row(tmp_path / "more.jsonl", {"text": "ü"})
    assert (tmp_path / "more.jsonl").read_text(encoding="utf-8") == '{"text": "ü"}\n'
    write_rows(tmp_path / "rows.jsonl", [{"text": "ü"}, {"text": "b"}])
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == '{"text": "ü"}\n{"text": "b"}\n'
    write_json(tmp_path / "path.json", {"path": tmp_path})
    assert json.loads((tmp_path / "path.json").read_text()) == {"path": str(tmp_path)}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.json"]
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        write_json(tmp_path / "a" / "x.json", loop)
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"text": "ü"}


def test_a_broken_run_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: expected JSON"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json: expected a JSON object, found list"):
        read_run(tmp_path)


def test_rows_of_later_steps_and_a_cut_line_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_row(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 2, "obj')
    keep_rows(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_is_one_line_with_the_files_name(capsys):
    full = Path("/dev/full")
    with pytest.raises(UserError, match=r"^/dev/full: cannot write: No space left on device$"):
        append_row(full, {"step": 1})

    def main():
        with full.open("w") as file:
            file.write("x")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: disk: cannot write: No space left on device\n"


def test_an_end_that_cannot_be_written_hides_no_error(tmp_path):
    stage = Stage(tmp_path, "reward", {}, seed=0).__enter__()
    stage.folder = Path("/dev/full")  # no folder: run.json cannot be written any more
    error = ZeroDivisionError("division by zero")
    assert stage.__exit__(type(error), error, None) is None
    assert read_run(tmp_path)["status"] == "running"
    assert not (tmp_path / ".lock").exists()


def test_an_end_that_cannot_be_written_is_an_error_of_its_own(tmp_path):
    stage = Stage(tmp_path, "reward", {}, seed=0).__enter__()
    stage.folder = Path("/dev/full")
    with pytest.raises(UserError, match="cannot write"):
        stage.__exit__(None, None, None)
    assert not (tmp_path / ".lock").exists()


def test_other_processes_than_the_job_has_asked_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"RLHF_WORLD_SIZE"):
        Stage(tmp_path, "reward", {}, seed=0)
    monkeypatch.setenv("RLHF_WORLD_SIZE", "1")
    assert Stage(tmp_path, "reward", {}, seed=0).facts["world_size"] == 1
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 3)
    monkeypatch.setenv("RLHF_WORLD_SIZE", "3")
    assert Stage(tmp_path, "reward", {}, seed=0).facts["world_size"] == 3


def test_other_ranks_write_nothing_and_leave_the_lock(tmp_path):
    stage = Stage(tmp_path, "reward", {}, seed=0)
    stage.is_main = False
    with stage:
        stage.record(data={"rows": 7})
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_commit_of_a_repository(tmp_path, monkeypatch):
    said = iter(["abc\n", "\n"])
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "rlhf" / "storage" / "run_folder.py"))
    monkeypatch.setattr(run_folder.subprocess, "run", lambda *given, **options: SimpleNamespace(stdout=next(said)))
    assert git_commit() is None
    (tmp_path / ".git").mkdir()
    assert (git_commit(), git_commit()) == ("abc", None)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    stage = Stage(tmp_path / "runs" / "reward", "reward", {}, seed=0)
    words = f"^run folder {tmp_path / 'runs' / 'reward'}: cannot write: Not a directory$"
    with pytest.raises(UserError, match=words), stage:
        pass


def test_a_device_that_nobody_uses_is_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rlhf.storage.run_folder.unused_devices", lambda device: "3 devices are unused")
    with Stage(tmp_path, "reward", {}, seed=0):
        pass
    assert "! 3 devices are unused\n" in capsys.readouterr().out
