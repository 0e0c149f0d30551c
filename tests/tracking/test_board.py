"""What TensorBoard's own reader finds: one run per stage, what matters first, samples before settings."""

from types import SimpleNamespace

import pytest
import tiny
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tiny_ppo import PROMPTS, trainer

from rlhf.config import RewardStageConfig
from rlhf.data.hh_rlhf import load_pairs
from rlhf.reward.trainer import encode_pairs, train_reward_model
from rlhf.tracking.board import BoardCallback, board_tag, verbatim
from rlhf.tracking.recorder import write_summary


def shown(folder):
    """Run -> (tags of scalars, tags of texts), each in the order in which TensorBoard lists them."""
    seen = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    scalars, texts = (seen.PluginRunToTagToContent(plugin) for plugin in ("scalars", "text"))
    return {run: (sorted(scalars.get(run, [])), sorted(texts.get(run, []))) for run in seen.Runs()}


def test_a_ppo_stage_is_one_run_that_opens_on_the_objective_and_on_samples(tmp_path):
    trainer(tmp_path / "ppo_full", rows=PROMPTS[:4], report_to="tensorboard", max_steps=2).train()
    ((run, (scalars, texts)),) = shown(tmp_path).items()
    assert run == "ppo_full/tensorboard"
    assert list((tmp_path / "ppo_full" / "tensorboard").iterdir()) == [
        *(tmp_path / "ppo_full" / "tensorboard").glob("events.*")
    ]
    groups = list(dict.fromkeys(tag.partition("/")[0] for tag in scalars))
    assert groups == ["objective", "perf", "policy", "progress", "rewards", "time", "val", "value"]
    assert [tag for tag in scalars if tag.startswith("progress/")] == [
        "progress/episode",
        "progress/epoch",
        "progress/eps",
        "progress/lr",
    ]
    assert texts[0].startswith("samples/0")
    assert texts[-1].startswith("settings/all")


def test_a_reward_stage_is_one_run_that_opens_on_pairs(tmp_path):
    tokenizer = tiny.chat_tokenizer()
    pairs = load_pairs("demo:preferences.jsonl", None, None)[0][:6]
    rows = encode_pairs(tokenizer, pairs, 256)[1]
    folder = tmp_path / "reward"
    args = RewardStageConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        disable_tqdm=True,
    )
    train_reward_model(tiny.llama_reward(), tokenizer, rows[:4], rows[4:], args)
    write_summary(folder, {"test/after/accuracy": 0.75}, {"pair/0": "a pair"}, {"seed": 1})
    ((run, (scalars, texts)),) = shown(tmp_path).items()
    assert run == "reward/tensorboard"
    assert list(dict.fromkeys(tag.partition("/")[0] for tag in scalars)) == [
        "eval",
        "perf",
        "progress",
        "test",
        "train",
    ]
    assert {"eval/loss", "eval/accuracy", "train/loss", "train/accuracy", "progress/epoch"} <= set(scalars)
    assert not any("train_runtime" in tag or "flos" in tag for tag in scalars)
    assert texts[0].startswith("pair/0")
    assert texts[-1].startswith("settings/all")


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("objective/scores", "objective/scores"),
        ("episode", "progress/episode"),
        ("lr", "progress/lr"),
        ("train/epoch", "progress/epoch"),
        ("eval/samples_per_second", "perf/eval_samples_per_second"),
        ("perf/runtime", "perf/runtime"),
        ("loss/value_avg", "value/loss_avg"),
        ("loss/policy_avg", "policy/loss_avg"),
        ("eval/runtime", "perf/eval_runtime"),
        ("perf/learn/tokens_per_second", "perf/learn/tokens_per_second"),
        ("mine/of/a/subclass", "mine/of/a/subclass"),
    ],
)
def test_tags(name, tag):
    assert board_tag(name) == tag


def test_text_is_shown_as_it_is_whatever_ends_its_lines():
    assert verbatim("# a\r\nb\rc\nd") == "    # a\n    b\n    c\n    d"


def test_a_board_is_rank_0s_and_has_no_row_that_sums_up(tmp_path, monkeypatch):
    args = SimpleNamespace(to_dict=dict)
    board = BoardCallback(tmp_path / "other")
    board.on_train_begin(args, SimpleNamespace(is_world_process_zero=False), None)
    board.on_log(args, SimpleNamespace(global_step=1), None, {"loss": 1.0})
    board.on_train_end(args, None, None)
    assert not (tmp_path / "other").exists()
    board = BoardCallback(tmp_path / "first")
    board.on_train_begin(args, SimpleNamespace(is_world_process_zero=True), None)
    seen = []
    monkeypatch.setattr(board.writer, "add_scalar", lambda *given: seen.append(given))
    for logs in ({"eval_loss": 1.0}, {"train_runtime": 2.0, "train_loss": 3.0}, {}, None):
        board.on_log(args, SimpleNamespace(global_step=5), None, logs)
    board.on_train_end(args, None, None)
    assert seen == [("eval/loss", 1.0, 5)]
    assert board.writer is None
