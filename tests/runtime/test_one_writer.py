"""Who takes the lock: a stage."""

import pytest
from test_lock import NAME

from rlhf.errors import UserError
from rlhf.runtime.run_folder import Stage, read_run
from rlhf.runtime.script import run_script


def test_a_stage_that_another_run_ended_meanwhile_is_not_begun_again(tmp_path, capsys):
    late = Stage(tmp_path, "reward", {"a": 2}, seed=0)
    with Stage(tmp_path, "reward", {"a": 1}, seed=0):
        pass
    before = (tmp_path / "run.json").read_text()

    def main():
        with late:
            raise AssertionError("begun")

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 0
    assert capsys.readouterr().out == f"reward: done already in {tmp_path}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == before


def test_a_stage_is_locked_while_it_runs_and_after_no_end(tmp_path):
    with Stage(tmp_path, "reward", {"a": 1}, seed=0):
        with pytest.raises(UserError, match="expected no other run"), Stage(tmp_path, "reward", {"a": 2}, seed=0):
            pass
        assert read_run(tmp_path)["config"] == {"a": 1}
        assert read_run(tmp_path)["status"] == "running"
    assert not (tmp_path / NAME).exists()
    with pytest.raises(ZeroDivisionError), Stage(tmp_path / "other", "reward", {}, seed=0):
        _ = 1 / 0
    assert not (tmp_path / "other" / NAME).exists()
