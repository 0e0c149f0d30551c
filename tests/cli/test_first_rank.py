"""All ranks learn from rank 0 which stages are done: their own file systems may lag behind."""

import pytest

from rlhf.cli import evaluate, train_ppo, train_reward
from rlhf.errors import UserError
from rlhf.storage import stages

# Script -> flags, by which it ends where it would fetch something; and what rank 0 says before.
SCRIPTS = {
    train_reward: (["--model_name_or_path", "./none", "--dataset_name", "./none"], [False]),
    train_ppo: (["--model_name_or_path", "./none"], [False, ("reward", {})]),
    evaluate: (["--base_model", "./none"], [False, ("reward", None), ({}, {}), {}]),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("done", [True, False])
def test_a_rank_looks_at_no_stage_itself(script, done, tmp_path, monkeypatch, capsys):
    """On other ranks from_main returns rank 0's answer and does not call its argument."""
    argv, said = SCRIPTS[script]
    answers = iter([True] if done else said)
    monkeypatch.setattr(stages, "read_json", None)
    monkeypatch.setattr(script, "from_main", lambda ask: next(answers))
    monkeypatch.setattr("rlhf.cli.kept_precision.from_main", lambda ask: {"config": {"bf16": False, "fp16": False}})
    monkeypatch.setattr("sys.argv", ["script", "--run", "none", "--runs_dir", str(tmp_path), *argv])
    if done:
        script.main()
        assert ": already done in " in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=r"\./none"):
            script.main()
    assert list(answers) == []
