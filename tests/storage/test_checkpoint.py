"""Broken checkpoints are skipped, needed ones are never deleted, and a run with other settings is refused."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from tiny_ppo import PROMPTS, metrics, trainer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rlhf.errors import UserError
from rlhf.ppo.checkpointing import digest
from rlhf.storage import disk
from rlhf.storage.checkpoint import PPO, REWARD, checkpoints, newest_whole, not_written, problem_of, read_step, rotate
from rlhf.storage.disk import MANIFEST, fault, write_manifest, written_aside

FACTS = {"batch_size": 4, "engine": "NO", "processes": 1}


def checkpoint(folder, name, step=None, manifest=True):
    made = folder / name
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "weights").write_bytes(b"\x00" * 100)
    facts = {"step": int(name.split("-")[-1]) if step is None else step} | FACTS
    (made / "step.json").write_text(json.dumps(facts))
    if manifest:
        write_manifest(made)
    return made


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_manifest_has_size_and_digest_of_every_file(tmp_path):
    made = checkpoint(tmp_path, "step-1")
    files = json.loads((made / MANIFEST).read_text())["files"]
    assert files.keys() == {"deep/weights", "step.json"}
    # printf '%.0s\0' {1..100} | sha256sum
    digest = "cd00e292c5970d3c5e2f0ffa5171e555bc46bfc4faddfb4a418b6840b86e79a3"
    assert files["deep/weights"] == {"size": 100, "sha256": digest}
    assert fault(made) is None
    assert names(made) == ["deep", MANIFEST, "step.json"]


def test_numbers_decide_not_names_or_clocks(tmp_path):
    for name in ("step-10", "step-9", "step-x", ".step-11", "left-step-12", "checkpoint-13"):
        checkpoint(tmp_path, name, step=None if name[-1] != "x" else 0) if name != "step-x" else (
            tmp_path / name
        ).mkdir()
    (tmp_path / "step-99").write_text("no folder")
    assert newest_whole(tmp_path, PPO) == tmp_path / "step-10"
    assert newest_whole(tmp_path / "none", PPO) is None


def test_what_a_stage_needs_of_a_checkpoint_must_be_there(tmp_path):
    made = checkpoint(tmp_path / "checkpoints", "step-1")
    checkpoint(tmp_path / "checkpoints", "step-2", manifest=False)
    assert checkpoints(tmp_path) == [made]
    assert problem_of(made, lambda facts: facts["batch_size"]) is None
    assert problem_of(made, lambda facts: facts["episode"]) == "a step.json that cannot be read"


def test_several_broken_ones_are_passed_over_one_line_each(tmp_path, capsys):
    for step in (1, 2, 3):
        checkpoint(tmp_path, f"step-{step}")
    (tmp_path / "step-3" / "deep" / "weights").unlink()
    (tmp_path / "step-2" / MANIFEST).write_text("{")
    assert newest_whole(tmp_path, PPO) == tmp_path / "step-1"
    assert capsys.readouterr().out.splitlines() == [
        f"! skipped {tmp_path / 'step-3'}: broken checkpoint, found no deep/weights; resuming from step-1",
        f"! skipped {tmp_path / 'step-2'}: broken checkpoint, found a manifest.json that cannot be read; "
        "resuming from step-1",
    ]


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "[]", '{"step": 1}', '{"step": 1, "batch_size": 4, "engine": "NO"}', "[" * 100_000),
        '{"step": 1, "batch_size": 4, "processes": 1}',
    ],
)
def test_a_sealed_checkpoint_that_says_no_step_is_broken(tmp_path, content):
    """A manifest shows that files are unchanged, not that rlhf wrote them."""
    made = checkpoint(tmp_path, "step-1")
    (made / "step.json").unlink() if content is None else (made / "step.json").write_text(content)
    write_manifest(made)
    with pytest.raises(UserError, match=r"step-1: broken checkpoint, found a step\.json that cannot be read"):
        newest_whole(tmp_path, PPO)
    with pytest.raises(UserError, match=r"step\.json: not of a checkpoint that rlhf has written"):
        read_step(made, {"step": 1} | FACTS)


@pytest.mark.parametrize("name", ["../else", "deep/../../else", "/etc/hostname"])
def test_a_manifest_that_leads_out_is_not_followed(tmp_path, name):
    made = checkpoint(tmp_path, "step-1")
    (tmp_path / "else").write_text("x")
    (made / MANIFEST).write_text(json.dumps({"files": {name: {"size": 1, "sha256": "0"}}}))
    assert fault(made) == "a manifest.json that names files elsewhere"


def test_without_a_whole_one_the_newest_is_named_and_the_others_are_counted(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, f"step-{step}", manifest=False)
        words = {1: "last", 2: "last; 1 older checkpoints are", 3: "last; 2 older checkpoints are"}[step]
        with pytest.raises(UserError, match=rf"step-{step}: broken checkpoint, found no manifest.json, .* {words}"):
            newest_whole(tmp_path, PPO)


def test_a_file_that_grew_is_told_by_its_size(tmp_path):
    made = checkpoint(tmp_path, "step-1", manifest=False)
    (made / "deep" / MANIFEST).write_text("{}")  # only the one on top is none of the files
    write_manifest(made)
    (made / "deep" / MANIFEST).write_text("{ }")
    assert fault(made) == "deep/manifest.json of 3 bytes where 2 were written"


def test_the_line_on_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_540_000))
    end = "(1.5 MB are free); free some space; its files were removed, earlier checkpoints are kept:"
    target = checkpoint(tmp_path, "step-3")
    full = OSError(28, "No space left on device")
    assert str(not_written(target, full)) == (
        f"{target}: cannot write the checkpoint: No space left on device {end} there are none"
    )
    checkpoint(tmp_path, "step-1")
    checkpoint(tmp_path, "checkpoint-2")
    torn = RuntimeError("inline_container.cc:\n  file write failed")
    assert str(not_written(target, torn)) == (
        f"{target}: cannot write the checkpoint: inline_container.cc: file write failed {end} step-1"
    )
    assert f": {'x' * 200} (1.5 MB" in str(not_written(target, RuntimeError("x" * 201)))


def test_what_an_interrupted_delete_left_is_no_obstacle(tmp_path):
    checkpoint(tmp_path, "checkpoint-1")
    checkpoint(tmp_path, ".checkpoint-1.gone", step=1)
    rotate(checkpoint(tmp_path, "checkpoint-2"), REWARD, 1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_what_a_manifest_names_is_printed_as_text(tmp_path, capsys):
    checkpoint(tmp_path, "step-1")
    made = checkpoint(tmp_path, "step-2")
    (made / MANIFEST).write_text(json.dumps({"files": {"\x1b[2Ja\nb": {"size": 1, "sha256": "0"}}}))
    assert newest_whole(tmp_path, PPO) == tmp_path / "step-1"
    said = f"! skipped {made}: broken checkpoint, found no \\x1b[2Ja b; resuming from step-1\n"
    assert capsys.readouterr().out == said


def test_a_reward_checkpoint_that_was_never_finished_is_no_reason_to_stop(tmp_path, capsys):
    checkpoint(tmp_path, "checkpoint-2", manifest=False)
    assert newest_whole(tmp_path, REWARD) is None
    assert capsys.readouterr().out.endswith(
        "found no manifest.json, which is written last; starting from the beginning\n"
    )
    checkpoint(tmp_path, "checkpoint-1")
    assert newest_whole(tmp_path, REWARD) == tmp_path / "checkpoint-1"
    assert capsys.readouterr().out == (
        f"! skipped {tmp_path / 'checkpoint-2'}: broken checkpoint, found no manifest.json, which is written last; "
        "resuming from checkpoint-1\n"
    )
    rotate(checkpoint(tmp_path, "checkpoint-3", step=7), REWARD, 1)
    (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match="checkpoint-1: broken checkpoint, found step 7 in it; move them away"):
        newest_whole(tmp_path, REWARD)
    checkpoint(tmp_path, "checkpoint-9", step=8)
    with pytest.raises(UserError, match="checkpoint-9: broken checkpoint, found step 8 in it; 1 older"):
        newest_whole(tmp_path, REWARD)


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4]),
        (1, None, [4]),
        (2, None, [3, 4]),
        (1, "checkpoint-2", [2, 4]),  # as transformers counts: the best stays beside the newest
        (2, "checkpoint-2", [2, 4]),
        (3, "checkpoint-1", [1, 3, 4]),
        (1, "checkpoint-4", [4]),
        (9, "checkpoint-1", [1, 2, 3, 4]),
    ],
)
def test_the_limit_spares_the_newest_and_the_best(tmp_path, limit, best, kept):
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, f"checkpoint-{step}")
    rotate(tmp_path / "checkpoint-4", REWARD, limit, best)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


@pytest.mark.parametrize(
    ("written", "found", "said"),
    [
        ({"batch_size": 8}, {"batch_size": 4}, "written with batch_size 8, but this run has 4; see gradient_acc"),
        ({"engine": "DEEPSPEED ZeRO-2"}, {}, "written with engine DEEPSPEED ZeRO-2, but this run has NO"),
        ({}, {"engine": "DEEPSPEED ZeRO-2"}, "written with engine NO, but this run has DEEPSPEED ZeRO-2"),
        (
            {"engine": "DEEPSPEED ZeRO-2", "processes": 4},
            {"engine": "DEEPSPEED ZeRO-2"},
            "written with processes 4, but this run has 1",
        ),
        ({"engine": "FSDP", "processes": 4}, {"engine": "FSDP"}, "written with processes 4, but this run has 1"),
        *(
            ({name: 1}, {name: 2}, f"written with {name} 1, but this run has 2; use the same to resume$")
            for name in ("train_dataset", "seed", "data_seed", "optim", "score_norm_samples")
        ),
        ({"seed": 1}, {}, "written with seed 1, but this run has None; use the same to resume$"),
    ],
)
def test_what_a_checkpoint_cannot_go_on_with_is_named(tmp_path, written, found, said):
    usual = {"step": 3, "batch_size": 8, "engine": "NO", "processes": 1}
    (tmp_path / "step.json").write_text(json.dumps(usual | written))
    with pytest.raises(UserError, match=said):
        read_step(tmp_path, usual | found)


def test_data_parallel_goes_on_with_another_number_of_processes(tmp_path):
    usual = {"step": 3, "batch_size": 8, "engine": "MULTI_CPU", "processes": 4}
    (tmp_path / "step.json").write_text(json.dumps(usual))
    assert read_step(tmp_path, usual | {"engine": "NO", "processes": 1, "seed": 3}) == usual


def test_a_model_stands_whole_or_not_at_all(tmp_path):
    for name in ("config.json", "model.safetensors", "run.json"):
        (tmp_path / name).write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path, True) as aside:
        _ = (aside / "config.json").write_text("new") / 0
    assert names(tmp_path) == ["config.json", "model.safetensors", "run.json"]
    assert (tmp_path / "config.json").read_text() == "old"
    with written_aside(tmp_path, True) as aside:
        for name in ("config.json", "model.safetensors"):
            (aside / name).write_text("new")
        (aside / "adapter").mkdir()
    assert names(tmp_path) == ["adapter", "config.json", "model.safetensors", "run.json"]
    assert [(tmp_path / n).read_text() for n in ("config.json", "model.safetensors", "run.json")] == [
        "new",
        "new",
        "old",
    ]


def test_while_files_move_there_is_no_model(tmp_path, monkeypatch):
    heads = ("adapter_config.json", "config.json")
    for name in (*heads, "adapter/old", ".aside/of_a_run_that_was_killed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")

    def write(aside):
        for name in (*heads, "adapter/new", "model.safetensors"):
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text("new")

    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    with written_aside(tmp_path, True) as aside:
        write(aside)
    assert (set(moved[:2]), set(moved[2:])) == ({"adapter", "model.safetensors"}, set(heads))
    assert names(tmp_path) == ["adapter", *heads, "model.safetensors"]
    assert names(tmp_path / "adapter") == ["new"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with (
        pytest.raises(UserError, match=f"^{tmp_path}: cannot write: No space left"),
        written_aside(tmp_path, True) as a,
    ):
        write(a)
    assert names(tmp_path) == ["adapter", "model.safetensors"]


def test_on_other_ranks_the_first_ones_files_are_left_alone(tmp_path):
    (tmp_path / ".aside").mkdir()
    (tmp_path / ".aside" / "config.json").write_text("new")
    with written_aside(tmp_path, False) as aside:
        (aside / "shard").write_text("new")
    assert names(tmp_path) == [".aside"]
    assert names(tmp_path / ".aside") == ["config.json", "shard"]


def test_all_is_on_the_disk_before_a_manifest_or_a_model_says_so(tmp_path, monkeypatch):
    done, flush, replace = [], disk.flush, os.replace
    monkeypatch.setattr(disk, "flush", lambda path: (done.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"to {b.name}"), replace(a, b)))
    checkpoint(tmp_path, "step-1")
    files = ["deep", "weights", "step.json", "step-1"]
    assert done == [*files, f".{MANIFEST}", f"to {MANIFEST}", "step-1"]
    done.clear()
    with written_aside(tmp_path / "model", True) as aside:
        for name in ("config.json", "weights"):
            (aside / name).write_text("new")
    assert done == ["config.json", "weights", ".aside", "model", "to weights", "to config.json", "model"]


def test_a_broken_checkpoint_that_was_asked_for_is_refused(tmp_path):
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    path = tmp_path / "checkpoints" / "step-1"
    (path / "optimizer.bin").write_bytes(b"x" * (path / "optimizer.bin").stat().st_size)
    with pytest.raises(UserError, match=r"expected a folder like checkpoints/step-N, found optimizer.bin with other"):
        trainer(tmp_path).train(resume_from_checkpoint=path)


class Counting(TrainerCallback, ExportableState):
    """Records the steps; at each one it pretends that updates were skipped, and requests a stop."""

    def __init__(self):
        self.seen, self.learner = 0, None

    def state(self):
        return {"args": {}, "attributes": {"seen": self.seen}}

    def on_step_end(self, *_, **__):
        self.seen += 1
        self.learner.skips.in_a_row = 5
        os.kill(os.getpid(), signal.SIGTERM)


def test_logs_callbacks_and_skipped_updates_go_on(tmp_path):
    runs = [trainer(tmp_path, given={"callbacks": [Counting]}, max_steps=2) for _ in range(2)]
    first, again = runs
    first.callbacks.callbacks[-1].learner = first.learner
    first.train()
    assert (again.learner.skips.in_a_row, again.callbacks.callbacks[-1].seen) == (0, 0)
    assert again.checkpoints.load(True) == (1, 2 * 2)
    assert (again.learner.skips.in_a_row, again.callbacks.callbacks[-1].seen) == (5, 1)
    assert again.state.log_history == first.state.log_history
    assert [row["step"] for row in again.state.log_history] == [1]


def test_rows_come_from_the_checkpoint_where_the_files_are_lost(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **options).train()
    before = [row["objective/kl"] for row in metrics(tmp_path)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "obj')
    trainer(tmp_path, **options).train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-2")
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    assert [row["objective/kl"] for row in metrics(tmp_path)] == before


def test_what_is_evaluated_before_the_first_step_comes_once(tmp_path):
    """Also if a first run was interrupted before its first checkpoint; the caller's own evaluations stay."""
    held_out = {"eval_dataset": PROMPTS[:2]}
    for _ in range(2):
        run = trainer(tmp_path, given=held_out, max_steps=1, eval_on_start=True)
        run.train()
    rows = [json.loads(line) for line in (tmp_path / "eval_metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0]
    run = trainer(tmp_path / "own", given=held_out, max_steps=1)
    run.evaluate()
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "own" / "eval_metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0]


def test_facts_of_this_machine_are_in_a_checkpoint(tmp_path):
    run = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    facts = json.loads((tmp_path / "checkpoints" / "step-1" / "step.json").read_text())
    assert facts == {
        "step": 1,
        "batch_size": 4,
        "train_dataset": digest(run.prompts),
        "seed": 5,
        "data_seed": 5,
        "episode": 4,
        "skipped_in_a_row": 0,
        "warnings": run.health.state(),
        "processes": Accelerator().num_processes,
        "engine": "NO",
        "frozen": {},  # all is trained
        "kl_coef": 0.05,
        "optim": "AdamW",
        "score_norm_samples": 0,
        "metric_for_best_model": None,
    }
