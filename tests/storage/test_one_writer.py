"""Who takes the lock: a stage, or a trainer outside a stage."""

from contextlib import nullcontext

import pytest
from test_lock import NAME, _self, _start, other, owned, owner  # noqa: F401
from tiny_ppo import trainer

from rlhf.cli.script import run_script
from rlhf.errors import UserError
from rlhf.storage.run_folder import Stage
from rlhf.storage.stages import read_run


def test_a_trainer_is_the_one_writer_of_its_folder(tmp_path, other):  # noqa: F811
    run = trainer(tmp_path, max_steps=1)
    owned(tmp_path, pid=other.pid, start=_start(other.pid))
    before = (tmp_path / NAME).read_text()
    with pytest.raises(UserError, match=f"in use by process {other.pid}"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_text() == before


@pytest.mark.parametrize("breaks", [False, True])
def test_a_trainer_holds_the_lock_while_it_trains(tmp_path, breaks):
    run, seen = trainer(tmp_path / "new", max_steps=1), []
    collect = run.collect

    def noted(*args):
        seen.append(owner(tmp_path / "new"))
        return 1 / 0 if breaks else collect(*args)

    run.collect = noted
    with pytest.raises(ZeroDivisionError) if breaks else nullcontext():
        run.train()
    assert seen == [_self()]
    assert not (tmp_path / "new" / NAME).exists()


def test_in_a_stage_the_lock_stays_the_stages(tmp_path):
    with Stage(tmp_path, "ppo_full", {}, seed=0):
        trainer(tmp_path, max_steps=1).train()
        assert owner(tmp_path) == _self()
    assert not (tmp_path / NAME).exists()


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
    assert capsys.readouterr().out == f"reward: already done in {tmp_path}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == before


def test_a_stage_is_locked_while_it_runs_and_after_no_end(tmp_path):
    with Stage(tmp_path, "reward", {"a": 1}, seed=0):
        with pytest.raises(UserError, match="in use by"), Stage(tmp_path, "reward", {"a": 2}, seed=0):
            pass
        assert read_run(tmp_path)["config"] == {"a": 1}
        assert read_run(tmp_path)["status"] == "running"
    assert not (tmp_path / NAME).exists()
    with pytest.raises(ZeroDivisionError), Stage(tmp_path / "other", "reward", {}, seed=0):
        _ = 1 / 0
    assert not (tmp_path / "other" / NAME).exists()
