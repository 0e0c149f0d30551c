"""Under every engine the ranks leave an update out together, and stop together."""

import json

import pytest
from workers import launch, rows

# Step 2: a score is NaN on rank 1. Step 3: a return whose square is infinite on rank 0.
# Step 4: a finite loss on rank 1 with a gradient that is not. From step 6 on a log-prob on rank 0.
WORKER = """
import math
from rlhf.errors import UserError
from rlhf.ppo import learner
from rlhf.ppo import rollout as rollouts
from rlhf.distributed.sharding import gathered

run = trainer(**options)
rank, at, moved = run.accelerator.process_index, {"step": 0}, []
score, policy_loss = run.collector.score, learner.policy_loss
finish_step, compute = run._finish_step, run.compute_advantages

def collect(number, batch, collect=run.collect):
    at["step"] = number
    return collect(number, batch)

def bad_score(*given):
    found = score(*given)
    if at["step"] == 2 and rank == 1:
        found.scores[0, 0] = math.nan
    return found

def bad_logp(*given, look=rollouts.compute_logprobs_and_values):
    seen, passes = look(*given)
    if at["step"] >= 6 and rank == 0:
        seen["logp"][0, 0] = math.nan
    return seen, passes

def bad_return(*given):
    targets = compute(*given)
    if at["step"] == 3 and rank == 0:
        targets.returns[0, 0] = 2e19
    return targets

def bad_gradient(*given):
    loss = policy_loss(*given)
    return loss + (loss * 0).sqrt() if at["step"] == 4 and rank == 1 else loss

def weights():
    with gathered([run.roles.trained]):
        return torch.cat([p.detach().flatten().clone() for p in run.roles.trained.parameters()])

def watched(number, rollout):
    before = weights()
    row = finish_step(number, rollout)
    moved.append(not torch.equal(before, weights()))
    return row

run.collect, run.collector.score, run.compute_advantages, run._finish_step = collect, bad_score, bad_return, watched
rollouts.compute_logprobs_and_values = bad_logp
learner.policy_loss = bad_gradient
try:
    run.train()
    end = "no end"
except UserError as error:
    end = str(error)
whole = bool(weights().isfinite().all())
(folder / f"said-{rank}.json").write_text(json.dumps({"moved": moved, "end": end, "finite": whole}))
"""
OPTIONS = {
    "max_steps": 12,
    "num_ppo_epochs": 1,
    "per_device_train_batch_size": 1,
    "max_skipped_updates": 4,
    "max_grad_norm": 1.0,
    "save_strategy": "steps",
    "save_steps": 5,
}


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero2", "zero3", "fsdp2"))]
)
def test_ranks_leave_an_update_out_together(tmp_path, engine):
    launch(tmp_path, WORKER, OPTIONS, processes=2, engine=engine)
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0]["moved"] == [True, False, False, False, True, False, False, False]
    assert said[0]["finite"]
    assert "log-prob not finite 4 times in a row, last in step 9" in said[0]["end"]
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [row["val/skipped_updates"] for row in metrics] == [0, 1, 1, 1, 0, 1, 1, 1]
    assert [row["val/updates"] for row in metrics] == [1, 0, 0, 0, 1, 0, 0, 0]
    lines = rows(tmp_path / "skipped.jsonl")
    assert [(line["step"], *line["not_finite"]) for line in lines] == [
        (2, "score"),
        (3, "loss", "gradient"),
        (4, "gradient"),
        *[(step, "log-prob") for step in (6, 7, 8, 9)],
    ]
    assert [row["score"] for row in lines[0]["rows"]] == ["nan"]
    assert [row["value_loss"] for row in lines[1]["rows"]].count("inf") == 1
    assert len({row["prompt_id"] for row in lines[1]["rows"]}) == len(lines[1]["rows"]) == 4  # of both ranks
    assert all(isinstance(row["policy_loss"], float) for row in lines[2]["rows"])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-5"]
