"""Pairs whose loss or gradient is not finite change nothing: the step is skipped, and after too many the run ends."""

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_trainer import config

from rlhf.data.chat import prepare_tokenizer
from rlhf.data.hh_rlhf import load_pairs
from rlhf.errors import UserError
from rlhf.models.load import new_reward_model
from rlhf.reward import nonfinite
from rlhf.reward import trainer as preference
from rlhf.reward.nonfinite import MicroBatch, UpdateGuard
from rlhf.reward.trainer import encode_pairs, train_reward_model
from rlhf.tracking.skipped_updates import Skips


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train on 16 pairs from the same weights, 4 pairs a step; hooks: calls of the loss in training -> what they do."""
    tokenizer = prepare_tokenizer(tiny.chat_tokenizer())
    pairs, rows = encode_pairs(tokenizer, load_pairs("demo:preferences.jsonl")[0], 200)
    tiny.llama().save_pretrained(tmp_path / "base")
    true_loss = preference.pairwise_margin_ranking_loss

    def run(name, hooks=None, **options):
        torch.manual_seed(0)
        model, calls = new_reward_model(str(tmp_path / "base"), tokenizer), []

        def loss(chosen, rejected, margin):
            found = true_loss(chosen, rejected, margin)
            calls.append(torch.is_grad_enabled())
            return (hooks or {}).get(sum(calls), lambda x: x)(found) if calls[-1] else found

        monkeypatch.setattr(preference, "pairwise_margin_ranking_loss", loss)
        settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_steps": 8, "weight_decay": 0.1}
        args = config(tmp_path / name, **settings | options)
        sources = [pair.source for pair in pairs[:16]]
        trainer, _ = train_reward_model(model, tokenizer, rows[:16], rows[16:24], args, sources)
        return trainer, model

    run.folder, run.pairs = tmp_path, pairs
    return run


def strict(path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def no_gradient(loss):
    return loss + (loss * 0).sqrt()  # whose slope at 0 is infinite, and 0 times it no number


POISONS = {
    "nan": lambda loss: loss * math.nan,
    "inf": lambda loss: loss + math.inf,
    "gradient": no_gradient,
    # Each gradient is finite, their norm is not; clipping would make zeros of them, which AdamW steps on.
    "norm": lambda loss: loss * 1e30,
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_poisoned_batch_takes_no_step_and_is_written(train, monkeypatch, capsys, poison, parts):
    """The run ends as one in which the optimizer's second step is omitted: weights, moments and schedule."""
    options = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 4 // parts, "eval_strategy": "no"}
    options |= {"lr_scheduler_type": "linear", "load_best_model_at_end": False}
    hit, _ = train("hit", {2 * parts: POISONS[poison]}, **options)
    true_step, calls = torch.optim.AdamW.step, []

    def all_but_the_second(self, closure=None):
        calls.append(1)
        return None if len(calls) == 2 else true_step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", all_but_the_second)
    omitted, _ = train("omitted", **options)
    assert len(calls) == 4
    expected = weights(omitted.model)
    for name, tensor in weights(hit.model).items():
        assert torch.equal(tensor, expected[name]), name
    rows, others = [strict(train.folder / name / "metrics.jsonl") for name in ("hit", "omitted")]
    assert [row["skipped_updates"] for row in rows if "skipped_updates" in row] == [0, 1, 0, 0]
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 4]
    same = {row["step"]: row["loss"] for row in others if "loss" in row}
    assert all(row["loss"] == same[row["step"]] for row in rows if "loss" in row)
    assert rows[-1]["train_loss"] == sum(same[step] for step in (1, 3, 4)) / 3
    assert ["accuracy" in row for row in rows if "skipped_updates" in row] == [True, False, True, True]
    (line,) = strict(train.folder / "hit" / "skipped.jsonl")
    what = ["loss", "gradient"] if poison in ("nan", "inf") else ["gradient"]
    norm = "inf" if poison == "norm" else "nan"
    assert (line["step"], line["not_finite"], line["in_a_row"], line["grad_norm"]) == (2, what, 1, norm)
    assert len({row["pair_id"] for row in line["rows"]} & {pair.source for pair in train.pairs[:16]}) == 4
    losses = [row["loss"] for row in line["rows"]]
    assert losses.count(poison) == (4 // parts if "loss" in what else 0)
    assert sum(isinstance(loss, float) for loss in losses) == 4 - losses.count(poison)
    assert all(math.isfinite(row["scores"]["chosen"]) and row["chosen_tokens"] > 1 for row in line["rows"])
    said = f"step 2: update skipped: {' and '.join(what)} not finite, pairs {line['rows'][0]['pair_id']}"
    assert said in capsys.readouterr().out
    assert not (train.folder / "omitted" / "skipped.jsonl").exists()


def test_too_many_in_a_row_end_the_run_and_the_checkpoint_before_stays(train):
    hooks = dict.fromkeys(range(4, 20), POISONS["nan"])
    options = {"num_train_epochs": 4, "eval_steps": 1, "max_skipped_updates": 3, "save_total_limit": 1}
    expected = r"^update: loss and gradient not finite 3 times in a row, last in step 6 "
    with pytest.raises(UserError, match=expected + r"with pairs .*; look at these pairs; .*; earlier checkpoints are"):
        train("hit", hooks, **options)
    folder = train.folder / "hit"
    assert [line["in_a_row"] for line in strict(folder / "skipped.jsonl")] == [1, 2, 3]
    # The limit is the best and the newest: none of those after step 3, when nothing was learnt, came in.
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert "checkpoint-3" in kept
    assert not [name for name in kept if name > "checkpoint-3"]
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "checkpoint-3" / "model.safetensors").values())
    # Once fixed, the same call resumes from there and logs nothing twice.
    trainer, _ = train("hit", **options)
    assert trainer.state.global_step == 16
    assert not (folder / "skipped.jsonl").exists()
    steps = [row["step"] for row in strict(folder / "metrics.jsonl") if "skipped_updates" in row]
    assert steps == list(range(1, 17))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_checkpoint_waits_for_the_next_step_that_is_taken(train, strategy):
    """An epoch has 4 steps; steps 4 and 5 are skipped."""
    options = {"num_train_epochs": 2, "eval_strategy": strategy, "eval_steps": 4, "save_total_limit": 9}
    train("hit", {4: POISONS["nan"], 5: POISONS["nan"]}, **options)
    folder = train.folder / "hit"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert [row["step"] for row in strict(folder / "metrics.jsonl") if "eval_loss" in row] == [0, 6, 8]
    assert len(strict(folder / "checkpoint-6" / "skipped.jsonl")) == 2


def test_the_last_step_left_out_still_has_its_checkpoint(train):
    trainer, _ = train("hit", {4: POISONS["nan"]}, eval_strategy="epoch")
    assert [path.name for path in (train.folder / "hit").glob("checkpoint-*")] == ["checkpoint-4"]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


def test_told_to_stop_while_steps_are_left_out_it_keeps_the_checkpoint_before(train, capsys):
    def bad(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss * math.nan

    train("cut", {3: bad}, eval_steps=2)
    folder = train.folder / "cut"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert "step 3: updates are being skipped; the checkpoint before them stays the newest" in capsys.readouterr().out


@pytest.mark.parametrize(("lost", "taken"), [(0.0, True), (1.0, False)])
def test_the_loss_of_an_update_is_the_mean_of_all_ranks(monkeypatch, lost, taken):
    """0.2 and 0.4 in two micro-batches here, 0.9 on the other rank, of which a gradient may not be finite."""
    ids, mask = torch.tensor([[5], [6]]), torch.ones(2, 1, dtype=torch.long)
    guard = UpdateGuard(Skips(3, of="pair"), [{"chosen_ids": [5], "rejected_ids": [6]}], ["a"])
    guard.micro_batches = [MicroBatch(ids, mask, torch.zeros(2), torch.tensor(x), {}) for x in (0.2, 0.4)]
    model = torch.nn.Linear(1, 1)
    model(torch.ones(1)).backward()
    monkeypatch.setattr(nonfinite, "all_sum", lambda _, x: x + torch.tensor([0.9, lost], dtype=x.dtype))
    ranks = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    assert guard.should_step(ranks, model, 1) == taken
    assert guard.losses.run == pytest.approx(0.6 if taken else 0.0)
    assert guard.losses.row() == ({"loss": pytest.approx(0.6)} if taken else {}) | {"skipped_updates": int(not taken)}
    assert guard.losses.row() == {"skipped_updates": 0}
    assert guard.skips.in_a_row == int(not taken)


@pytest.mark.parametrize("ids", [None, ["a", "b", "c"]])
def test_pairs_of_a_skipped_step_are_described_one_by_one(ids):
    """The first two rows are equal; the pads are on the right, and count for nothing."""
    rows = [{"chosen_ids": [5, 6], "rejected_ids": [7]}] * 2 + [{"chosen_ids": [8], "rejected_ids": [9, 5, 6]}]
    guard = UpdateGuard(Skips(3, of="pair"), rows, ids)
    batch = torch.tensor([[5, 6, 0], [8, 0, 0], [7, 0, 0], [9, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]])
    scores = torch.tensor([1.0, 2.0, -1.0, math.inf])
    guard.micro_batches = [MicroBatch(batch[[0, 2]], mask[[0, 2]], scores[[0, 2]], torch.tensor(0.5), {})]
    guard.micro_batches += [MicroBatch(batch[[1, 3]], mask[[1, 3]], scores[[1, 3]], torch.tensor(math.nan), {})]
    names = ids or ["0", "1", "2"]
    assert list(guard._facts()) == [
        {
            "pair_id": names[1],
            "chosen_tokens": 2,
            "rejected_tokens": 1,
            "scores": {"chosen": 1.0, "rejected": -1.0},
            "loss": 0.5,
        },
        {
            "pair_id": names[2],
            "chosen_tokens": 1,
            "rejected_tokens": 3,
            "scores": {"chosen": 2.0, "rejected": "inf"},
            "loss": "nan",
        },
    ]
    guard.on_step_begin(None, None, None)
    assert list(guard._facts()) == []
