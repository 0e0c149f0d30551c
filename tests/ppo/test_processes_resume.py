"""Several processes beside the plain run: going on from a checkpoint, evaluating, a loop of one's own."""

import json

import pytest
import tiny
from safetensors.torch import load_file
from tiny_ppo import timeless
from torch.testing import assert_close
from workers import launch, rows

from rlhf.distributed.saved_weights import load_part, saved_weights

# Whatever the next step depends on has a state: AdamW, the schedule, the KL coefficient, the scores' moments.
RESUMABLE = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 1,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "kl_target": 0.05,
    "use_score_scaling": True,
}
RESUMING = """
checkpoint = options.pop("checkpoint", None)
run = trainer(**options)
run.train(resume_from_checkpoint=checkpoint)
run.save_model()
"""


@pytest.mark.parametrize(
    "engine",
    ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)],
)
def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path, engine):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch(whole, RESUMING, RESUMABLE, processes=2, engine=engine)
    checkpoint = str(whole / "checkpoints" / "step-2")
    launch(cut, RESUMING, RESUMABLE | {"checkpoint": checkpoint}, processes=2, engine=engine)
    expected, found = rows(whole / "metrics.jsonl"), rows(cut / "metrics.jsonl")
    assert [row["step"] for row in expected] == [row["step"] for row in found] == [1, 2, 3, 4]
    # ZeRO-3 gathers its parts in another order each time.
    tolerance = 1e-6 if engine == "zero3" else 0
    for one, other in zip(expected, found, strict=True):
        assert timeless(other) == pytest.approx(timeless(one), abs=tolerance, rel=0), one["step"]
    policy, exported = load_file(cut / "model.safetensors"), tiny.llama()
    load_part(
        exported, saved_weights(whole / "checkpoints" / "step-4"), "policy."
    )  # by one process, without the engine
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert_close(policy[name], tensor, atol=tolerance, rtol=0, msg=name)
        assert_close(exported.state_dict()[name], tensor, atol=0, rtol=0, msg=name)


DROPOUT = """
from tiny_ppo import LORA
LORA.lora_dropout = 0.3
checkpoint = options.pop("checkpoint", None)
run = trainer(**options)
run.train(resume_from_checkpoint=checkpoint)
run.save_model()
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_adapters_with_dropout_go_on_to_the_bit(tmp_path, engine):
    """Dropout draws from each rank's stream, so that these must be in the checkpoint, as is every other state."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = RESUMABLE | {"lora": True, "per_device_train_batch_size": 1}
    launch(whole, DROPOUT, options, processes=2, engine=engine)
    checkpoint = str(whole / "checkpoints" / "step-2")
    launch(cut, DROPOUT, options | {"checkpoint": checkpoint}, processes=2, engine=engine)
    found, expected = [[timeless(row) for row in rows(folder / "metrics.jsonl")] for folder in (cut, whole)]
    assert found == expected
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


BESIDE = """
held_out = options.pop("held_out")
run = trainer(**options, given={"eval_dataset": held_out})
rank, world = run.accelerator.process_index, run.accelerator.num_processes
run.train()
scaler = run.scaler
said = {"scores of the reference": [scaler.mean, scaler.std]}
said["evaluate"] = run.evaluate()
said["completions"] = run.generate_completions()
said["one batch"] = run.generate_completions(sampling=True)
prompts = ["a", "b c d e", "f", "g h " * 20]
responses = [[5 + i] * (1 + 2 * i) for i in range(4)]
mine = slice(rank, None, world)
assert all(1 <= len(ids) <= 6 for ids in run.generate(prompts[mine]))
said["step"] = timeless(run.step(prompts[mine], responses[mine], [0.5, -1.0, 2.0, 1.0][mine]))
if run.accelerator.is_main_process:
    (folder / "said.json").write_text(json.dumps(said))
"""


def beside(folder, processes, engine="ddp"):
    """One step, and everything that is not a step of train, with 5 rows for 2 ranks; returns what came out."""
    talks = [[{"role": "user", "content": "good day " * (i + 1)}] for i in range(5)]
    options = {
        "max_steps": 1,
        "score_norm_samples": 5,
        "held_out": [{"prompt": talk, "prompt_id": f"e{i}"} for i, talk in enumerate(talks)],
        "per_device_eval_batch_size": 2 // processes,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 // processes,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
    }
    launch(folder, BESIDE, options, processes, engine)
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process says."""
    return beside(tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero3", "fsdp2"))])
def test_evaluation_and_a_loop_of_ones_own_are_those_of_one_process(tmp_path, alone, engine):
    two = beside(tmp_path, 2, engine)
    assert two["scores of the reference"] == pytest.approx(alone["scores of the reference"], abs=1e-5)
    assert two["evaluate"] == pytest.approx(alone["evaluate"], abs=1e-4)
    for name, size in (("completions", 5), ("one batch", 2)):
        assert [row["prompt_id"] for row in two[name]] == [f"e{i}" for i in range(size)]
        for one, other in zip(alone[name], two[name], strict=True):
            assert (other["prompt"], other["response"]) == (one["prompt"], one["response"])
            assert other["score"] == pytest.approx(one["score"], abs=1e-4)
    assert two["step"].keys() == alone["step"].keys()
    for name, value in alone["step"].items():
        if engine != "zero3" or "grad_norm" not in name:  # DeepSpeed has one norm for both roles
            assert two["step"][name] == pytest.approx(value, rel=1e-5, abs=1e-4), name
