"""Under each engine, two processes skip a reward update together, and continue as if it had not happened."""

import json

import pytest
import tiny
from safetensors.torch import load_file
from torch.testing import assert_close
from workers import launch, rows

# hits: "rank:call" of the loss in training -> what happens there.
WORKER = """
import math, os, signal
import tiny
from transformers import TrainerCallback
from rlhf.config import RewardStageConfig
from rlhf.data.chat import prepare_tokenizer
from rlhf.data.hh_rlhf import load_pairs
from rlhf.errors import UserError
from rlhf.models.load import new_reward_model
from rlhf.reward import trainer as preference, trainer as module
from rlhf.distributed.sharding import gathered

hits, calls, moved, runs, seen = options.pop("hits", {}), [], [], [], {}
true_loss = preference.pairwise_margin_ranking_loss

def loss(chosen, rejected, margin):
    found = true_loss(chosen, rejected, margin)
    calls.append(torch.is_grad_enabled())
    hit = hits.get(f"{runs[0].accelerator.process_index}:{sum(calls)}") if calls[-1] else None
    if hit == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    return {"nan": found * math.nan, "gradient": found + (found * 0).sqrt()}.get(hit, found)

def weights(model):
    with gathered([model]):
        return torch.cat([p.detach().flatten().float().clone() for p in model.parameters()])

class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **_):
        now = weights(model)
        moved.append(not torch.equal(seen.get("last", now), now) if "last" in seen else True)
        seen["last"] = now

class Trainer(module.PreferenceTrainer):
    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.add_callback(Watch)
        runs.append(self)

preference.pairwise_margin_ranking_loss, module.PreferenceTrainer = loss, Trainer
tokenizer = prepare_tokenizer(tiny.chat_tokenizer())
pairs, tokens = module.encode_pairs(tokenizer, load_pairs("demo:preferences.jsonl")[0], 200)
settings = {"report_to": "none", "bf16": False, "disable_tqdm": True, "logging_steps": 1, "eval_strategy": "steps"}
settings |= {"use_cpu": True, "lr_scheduler_type": "linear", "learning_rate": 1e-2, "per_device_train_batch_size": 2}
args = RewardStageConfig(output_dir=options.pop("folder"), **settings | options)
torch.manual_seed(0)
model = new_reward_model(str(folder.parent / "base"), tokenizer)
try:
    names = [pair.source for pair in pairs[:16]]
    module.train_reward_model(model, tokenizer, tokens[:16], tokens[16:24], args, names)
    end = "end"
except UserError as error:
    end = str(error)
run = runs[0]
said = {"moved": moved, "end": end, "finite": bool(weights(run.model).isfinite().all())}
(folder / f"said-{run.accelerator.process_index}.json").write_text(json.dumps(said))
if end == "end":
    run.save_model(str(folder / "model"))
"""
OPTIONS = {"num_train_epochs": 2, "eval_steps": 2, "per_device_eval_batch_size": 4, "save_total_limit": 9}


@pytest.fixture
def base(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path


def timeless(folder):
    found = rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.endswith(("runtime", "per_second"))} for row in found]


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero2", "zero3", "fsdp2"))]
)
def test_ranks_leave_a_reward_update_out_together(base, engine):
    """Step 2: a loss on rank 1. Step 3: a gradient on rank 0, whose loss is finite. From step 5 on a loss on rank 0."""
    folder = base / engine
    hits = {"1:2": "nan", "0:3": "gradient"} | {f"0:{call}": "nan" for call in (5, 6, 7)}
    launch(folder, WORKER, OPTIONS | {"hits": hits, "max_skipped_updates": 3}, processes=2, engine=engine)
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0]["moved"] == [True, False, False, True, False, False]
    assert said[0]["finite"]
    assert "loss and gradient not finite 3 times in a row, last in step 7 with pairs " in said[0]["end"]
    lines = rows(folder / "skipped.jsonl")
    assert [(line["step"], len(line["not_finite"])) for line in lines] == [(2, 2), (3, 1), (5, 2), (6, 2), (7, 2)]
    assert [sum(row["loss"] == "nan" for row in line["rows"]) for line in lines] == [2, 0, 2, 2, 2]
    assert all(len({row["pair_id"] for row in line["rows"]}) == 4 for line in lines)  # of both ranks
    assert [row["skipped_updates"] for row in rows(folder / "metrics.jsonl") if "grad_norm" in row or ("loss" not in row
            and "skipped_updates" in row)] == [0, 1, 1, 0, 1, 1]  # fmt: skip
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_a_reward_run_that_was_cut_ends_as_one_that_was_not(base, engine):
    whole, cut = base / "whole", base / "cut"
    launch(whole, WORKER, OPTIONS, processes=2, engine=engine)
    launch(cut, WORKER, OPTIONS | {"hits": {"1:3": "stop"}}, processes=2, engine=engine)
    assert sorted(path.name for path in cut.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    launch(cut, WORKER, OPTIONS, processes=2, engine=engine)
    assert timeless(cut) == timeless(whole)
    assert [row["step"] for row in timeless(cut) if "loss" in row] == list(range(1, 9))
    for part in ("model/model.safetensors", "checkpoint-8/model.safetensors"):
        assert (cut / part).read_bytes() == (whole / part).read_bytes()


@pytest.mark.slow
def test_a_reward_run_goes_on_with_another_number_of_processes(base):
    """The same pairs per step: the same run up to floating point. Two processes start, one resumes, two finish."""
    alone = OPTIONS | {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}
    whole, cut = base / "whole", base / "cut"
    launch(whole, WORKER, OPTIONS, processes=2)
    launch(cut, WORKER, OPTIONS | {"hits": {"0:2": "stop"}}, processes=2)
    launch(cut, WORKER, alone | {"hits": {"0:3": "stop"}})
    assert sorted(path.name for path in cut.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 5)]
    launch(cut, WORKER, OPTIONS, processes=2)
    found, expected = timeless(cut), timeless(whole)
    assert len(found) == len(expected) == 8 + 5 + 1
    assert found[-1].pop("total_flos") > expected[-1].pop("total_flos")  # a larger batch has more padding
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, abs=1e-4, rel=1e-4)
    model = load_file(cut / "model" / "model.safetensors")
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        assert_close(model[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
