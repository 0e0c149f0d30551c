"""The reward model's training: the loss is the one asked for, and the best checkpoint is the one that stays."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification
from trl import RewardTrainer

from rlhf.config import RewardStageConfig
from rlhf.data.chat import prepare_tokenizer
from rlhf.data.hh_rlhf import Pair, load_pairs
from rlhf.errors import UserError
from rlhf.models.load import load_reward_model, new_reward_model
from rlhf.reward.metrics import pair_metrics
from rlhf.reward.nonfinite import Losses
from rlhf.reward.scoring import score_rows
from rlhf.reward.trainer import (
    MetricsFile,
    PreferenceTrainer,
    best_step,
    check_positions,
    encode_pair,
    encode_pairs,
    evaluate_pairs,
    train_reward_model,
)


@pytest.fixture
def setup(tmp_path):
    base = tmp_path / "base"
    tiny.llama().save_pretrained(base)
    tokenizer = prepare_tokenizer(tiny.chat_tokenizer())
    pairs, _ = load_pairs("demo:preferences.jsonl")
    _, rows = encode_pairs(tokenizer, pairs, 200)
    torch.manual_seed(0)
    return new_reward_model(str(base), tokenizer), tokenizer, rows


def config(folder, **options):
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return RewardStageConfig(**settings | options)


def scores_of(model, rows):
    return [score_rows(model, [row[side] for row in rows], 3) for side in ("chosen_ids", "rejected_ids")]


@pytest.mark.parametrize(("loss_type", "centre"), [("margin", 0.2), ("bradley_terry", None), ("bradley_terry", 0.3)])
def test_the_loss_is_the_one_asked_for(setup, tmp_path, loss_type, centre):
    model, tokenizer, rows = setup
    args = config(tmp_path, loss_type=loss_type, margin=0.7, learning_rate=0.0, center_rewards_coefficient=centre)
    before = scores_of(model.eval(), rows[8:16])
    train_reward_model(model, tokenizer, rows[:8], rows[8:16], args)
    chosen = score_rows(model.eval(), [row["chosen_ids"] for row in rows[:8]], 3)
    rejected = score_rows(model, [row["rejected_ids"] for row in rows[:8]], 3)
    by_hand = {
        "margin": sum(max(0.0, 0.7 - (c - r)) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)) / 8,
        "bradley_terry": (1 + (rejected - chosen).exp()).log().mean().item(),
    }
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    start, first = (next(row for row in logged if name in row) for name in ("eval_loss", "loss"))
    loss, tokens = first["loss"], sum(len(side) for row in rows[:8] for side in row.values())
    # TRL's: of both sides' scores, of the pairs, and of all tokens so far.
    for row, prefix, (good, bad), seen in (first, "", (chosen, rejected), tokens), (start, "eval_", before, 0):
        both = torch.cat([good, bad])
        by_name = {"min_reward": both.min(), "mean_reward": both.mean(), "max_reward": both.max()}
        by_name |= {"accuracy": (good > bad).float().mean(), "margin": (good - bad).mean()}
        for name, value in by_name.items():
            assert row[prefix + name] == pytest.approx(value.item(), abs=1e-5), name
        assert row[f"{prefix}num_tokens"] == seen
    pull = (centre or 0.0) * ((chosen + rejected) ** 2).mean().item()  # towards a mean of 0
    assert loss == pytest.approx(by_hand[loss_type] + pull, abs=1e-4)
    assert evaluate_pairs(model, rows[:8], args)["loss"] == pytest.approx(by_hand[loss_type] + pull, abs=1e-5)


def test_a_side_may_have_as_many_tokens_as_the_limit():
    tokenizer, pairs = prepare_tokenizer(tiny.chat_tokenizer()), load_pairs("demo:preferences.jsonl")[0][:1]
    longest = max(map(len, encode_pairs(tokenizer, pairs, None)[1][0].values()))
    for limit, kept in ((longest, 1), (longest - 1, 0)):
        counts = {"too_long": 0, "identical_tokens": 0}
        assert len(encode_pairs(tokenizer, pairs, limit, counts=counts)[1]) == kept
        assert counts == {"too_long": 1 - kept, "identical_tokens": 0}


def test_equal_sides_are_left_out_and_counted():
    tokenizer = prepare_tokenizer(tiny.chat_tokenizer())
    ask = [{"role": "user", "content": "a"}]
    pairs = [Pair(ask, "yes", "yes", "x:1"), Pair(ask, "yes", "no", "x:2")]
    counts = {"too_long": 3, "identical_tokens": 4}
    kept, rows = encode_pairs(tokenizer, pairs, None, counts=counts)
    assert (kept, len(rows), counts) == (pairs[1:], 1, {"too_long": 3, "identical_tokens": 5})


def test_options_of_a_pair_come_before_those_of_all():
    tokenizer = prepare_tokenizer(tiny.chat_tokenizer())
    tokenizer.chat_template = "{{ a }}{{ b }}{% for m in messages %}{{ m.content }}{% endfor %}"
    pair = Pair([{"role": "user", "content": "-"}], "x", "y", "x:1", options={"b": "3"})
    row = encode_pair(tokenizer, pair, {"a": "1", "b": "2"})
    assert [tokenizer.decode(row[side]) for side in ("chosen_ids", "rejected_ids")] == [
        f"13-{text}<|im_end|>" for text in "xy"
    ]


@pytest.mark.parametrize("side", ["chosen_ids", "rejected_ids"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_pair_of_any_split_needs_positions_for_each_side(split, side):
    short = {"chosen_ids": [5] * 3, "rejected_ids": [5] * 2}
    splits = {"train": [short, short], "test": [short, short]}
    settings = tiny.llama_reward().config
    settings.max_position_embeddings = 4
    splits[split] = [short, short | {side: [5] * 4}]
    check_positions(settings, splits)
    splits[split] = [short, short | {side: [5] * 5}]
    with pytest.raises(UserError, match=r"^max_length: set it to 4 or less, .* the longest pair has 5 tokens$"):
        check_positions(settings, splits)


@pytest.mark.parametrize(
    ("processes", "last", "remainder", "counted"),
    [
        (2, True, 5, [4, 1]),
        (2, True, 8, [4, 4]),
        (2, True, 3, [3, 1]),  # a mean needs one
        (2, True, 0, [4, 4]),
        (2, True, -1, [4, 4]),
        (2, False, 3, [4, 4]),
        (1, True, 3, [4]),
    ],
)
def test_pairs_that_fill_up_an_evaluation_batch_do_not_count(processes, last, remainder, counted):
    state = SimpleNamespace(end_of_dataloader=last, remainder=remainder)
    ranks = [SimpleNamespace(num_processes=processes, process_index=i, gradient_state=state) for i in range(processes)]
    assert [PreferenceTrainer._n_valid(SimpleNamespace(accelerator=rank), 4) for rank in ranks] == counted


@pytest.mark.parametrize(("data_seed", "seed"), [(None, 3), (0, 0), (7, 7)])
def test_the_order_of_pairs_is_by_the_longer_side_and_by_the_datas_seed(tmp_path, data_seed, seed):
    args = config(tmp_path, seed=3, data_seed=data_seed, global_batch_size=2, train_sampling_strategy="group_by_length")
    rows = {"chosen_ids": [[5], [5] * 4, [5]], "rejected_ids": [[5] * 2, [5], [5]]}
    order = PreferenceTrainer._get_train_sampler(SimpleNamespace(args=args, train_dataset=rows))
    assert (order.lengths, order.batch, order.seed, order.strategy) == ([2, 4, 1], 2, seed, "group_by_length")


def test_the_best_checkpoint_is_what_stays(setup, tmp_path):
    model, tokenizer, rows = setup
    # Validation pairs the wrong way round: what is learned makes them worse, so the last step is not the best one.
    swapped = [row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows[24:48]]
    args = config(tmp_path, learning_rate=0.3, max_grad_norm=0.0, optim="sgd", per_device_train_batch_size=4)
    trainer, _ = train_reward_model(model, tokenizer, rows[:12], swapped, args)
    trainer.save_model(str(tmp_path))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in logged if "eval_loss" in row and row["step"] > 0]
    assert min(losses) < losses[-1] - 1e-3
    saved = load_reward_model(str(tmp_path))
    assert evaluate_pairs(saved, swapped, args)["loss"] == pytest.approx(min(losses), abs=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_an_evaluation_leaves_the_model_in_its_mode(setup, tmp_path, training):
    model, _, rows = setup
    seen = []
    model.score.register_forward_hook(lambda head, *_: seen.append(head.training))
    evaluate_pairs(model.train(training), rows[:2], config(tmp_path))
    assert set(seen) == {False}
    assert {module.training for module in model.modules()} == {training}


def test_stock_transformers_gives_the_same_score(setup, tmp_path):
    model, tokenizer, rows = setup
    model.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    row = rows[0]["chosen_ids"]
    ours = score_rows(model.eval(), [row, rows[1]["chosen_ids"]], 2)[0]
    pads = torch.tensor([row + [tokenizer.pad_token_id] * 5 if tokenizer.pad_token_id != row[-1] else row])
    give_distinct = pads.clone()
    give_distinct[0, len(row) :] = model.config.pad_token_id
    with torch.no_grad():
        assert_close(stock(give_distinct, attention_mask=(torch.arange(pads.shape[1]) < len(row)).long()[None])
                     .logits[0, 0], ours, atol=1e-5, rtol=1e-5)  # fmt: skip


def test_a_row_has_means_over_the_updates_taken(monkeypatch):
    said = []
    monkeypatch.setattr(RewardTrainer, "log", lambda self, logs, start_time=None: said.append(logs))
    run = object.__new__(PreferenceTrainer)
    run.guard = SimpleNamespace(losses=Losses(run=6.0, run_updates=3, recent=3.0, recent_updates=2, recent_skipped=1))
    run.model, run.state = SimpleNamespace(training=True), SimpleNamespace(global_step=4)
    run.train_metrics, run.eval_metrics = {"margin": [1.0, 2.0]}, {"margin": [5.0]}
    run.log({"loss": 99.0, "grad_norm": float("inf")})
    run.log({"loss": 99.0, "grad_norm": 2.0})
    run.log({"train_loss": 99.0})
    run.model.training = False
    run.log({})
    assert said == [
        {"loss": 1.5, "skipped_updates": 1, "margin": 1.5},
        {"skipped_updates": 0, "grad_norm": 2.0},
        {"train_loss": 2.0},
        {"eval_margin": 5.0},
    ]


def test_a_run_that_was_stopped_has_no_summary_row(tmp_path):
    path, state = tmp_path / "metrics.jsonl", SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=4)
    write = MetricsFile(path).on_log
    write(None, state, None, logs={"loss": 0.5, "note": "x", "epoch": 1})
    write(None, state, None, logs={"train_runtime": 1.0})
    write(None, state, None, logs={})
    state.global_step = 4
    write(None, state, None, logs={"train_runtime": 1.0})
    state.is_world_process_zero = False
    write(None, state, None, logs={"loss": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 3, "loss": 0.5, "epoch": 1},
        {"step": 4, "train_runtime": 1.0},
    ]


@pytest.mark.parametrize(
    ("losses", "best"), [([0.5, 0.25, 0.75], (2, 0.25)), ([0.25, 0.25], (1, 0.25)), ([], (None, None))]
)
def test_the_best_step_of_a_run_without_checkpoints_is_that_of_the_lowest_loss(losses, best):
    history = [{"step": i, "eval_loss": loss} for i, loss in enumerate(losses, 1)] + [{"step": 9, "loss": 0.0}]
    state = SimpleNamespace(log_history=history, best_model_checkpoint=None)
    assert tuple(best_step(SimpleNamespace(state=state)).values()) == best


def test_the_best_step_is_that_of_the_best_checkpoint(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    history = [{"step": step, "eval_loss": step / 10} for step in (2, 3)]
    state = SimpleNamespace(log_history=history, best_model_checkpoint=str(tmp_path), best_metric=0.3, global_step=4)
    assert best_step(SimpleNamespace(state=state)) == {"step": 3, "eval_loss": 0.3}


def test_sides_are_shown_in_the_order_of_the_runs_seed(tmp_path, monkeypatch):
    sides = torch.arange(24.0).view(2, 12)
    monkeypatch.setattr("rlhf.reward.trainer.score_pairs", lambda *_, **__: sides)
    found = evaluate_pairs(tiny.llama_reward(), [], config(tmp_path, seed=3))
    expected = pair_metrics(sides[0].numpy(), sides[1].numpy(), seed=3)
    assert found["confusion_matrix"] == expected["confusion_matrix"]
    assert found["confusion_matrix"] != pair_metrics(sides[0].numpy(), sides[1].numpy(), seed=0)["confusion_matrix"]
