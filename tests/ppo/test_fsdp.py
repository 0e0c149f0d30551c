"""FSDP2 on two processes gives what one process gives, whatever the roles and the settings are."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_ppo import timeless
from torch import nn
from workers import launch, rows

from rlhf.distributed.collectives import full_state_dict, is_fsdp_module, unsharded

# One worker trains them all: starting one costs more than training such models.
CASES = {
    "gpt2": {"family": "gpt2", "gradient_checkpointing": True},
    "gpt2 lora": {"family": "gpt2", "lora": True, "eval_strategy": "steps", "eval_steps": 1, "given": ["eval_dataset"]},
    "own models": {"given": ["ref_model", "value_model"]},
    "own reference beside an adapter": {"lora": True, "gradient_checkpointing": True, "given": ["ref_model"]},
    "a function, and one trunk": {"critic": "shared", "target_kl": 1e-4, "given": ["function"]},
    "a function, and a new critic": {"micro_batch_tokens": 60, "given": ["function"]},
    "scores scaled by the reference": {"lora": True, "score_norm_samples": 5},
}
WORKER = """
import tiny
from rlhf.models.kernels import onednn_linear

onednn_linear._FEWEST = 0  # layouts of weights as small as these, too

def short(prompts, completions, **columns):
    return [-float(len(str(answer))) for answer in completions]

MADE = {
    "ref_model": lambda: {"ref_model": tiny.llama(seed=3)},
    "value_model": lambda: {"value_model": tiny.llama_reward(seed=4)},
    "function": lambda: {"reward_model": short},
    "eval_dataset": lambda: {"eval_dataset": [{"prompt": "good day " * (i + 1)} for i in range(3)]},
}
world = int(os.environ.get("WORLD_SIZE", 1))
for name, case in options["cases"].items():
    given = {}
    for part in case.pop("given", ()):
        given |= MADE[part]()
    case = {"gradient_accumulation_steps": 4 // world, "per_device_train_batch_size": 1} | options["all"] | case
    run = trainer(folder / name, given=given, **case)
    run.train()
    run.save_model()
"""
# Steps of SGD can be held against another engine's. 5 prompts, 4 a step: in the second step a rank has no row.
ALL = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.5, "num_mini_batches": 2, "max_steps": 2}
ALL["rows"] = [{"prompt": "hello there " * (i + 1)} for i in range(5)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of one process, and of two under FSDP2."""
    top = tmp_path_factory.mktemp("fsdp")
    for name, processes, engine in (("one", 1, "ddp"), ("two", 2, "fsdp2")):
        launch(top / name, WORKER, {"cases": CASES, "all": ALL}, processes, engine)
    return top / "one", top / "two"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_is_that_of_one_process(folders, case):
    one, two = (folder / case for folder in folders)
    for name in ("metrics.jsonl", *(["eval_metrics.jsonl"] if "eval_steps" in CASES[case] else [])):
        assert len(rows(one / name)) == 2
        for first, second in zip(rows(one / name), rows(two / name), strict=True):
            assert timeless(second) == pytest.approx(timeless(first), abs=1e-4, rel=1e-4)
    files = ["model.safetensors", *(["adapter/adapter_model.safetensors"] if "lora" in CASES[case] else [])]
    for file in files:
        found, expected = load_file(two / file), load_file(one / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)


# A model whose parts are called different numbers of times on each rank, before its root ever was.
GATHERED = """
from tiny_ppo import trainer
from transformers import TrainerCallback
from rlhf.distributed.collectives import is_fsdp_module, full_state_dict
from rlhf.distributed.sharding import gathered
from torch.distributed.tensor import DTensor

class Sharded(TrainerCallback):  # gradients after each micro-batch: kept until the last, they would be whole
    def on_substep_end(self, *given, **more):
        assert all(isinstance(p.grad, DTensor) for p in model.parameters() if p.requires_grad)

run = trainer(**options, given={"callbacks": [Sharded]})
rank, model = run.accelerator.process_index, run.roles.trained
assert sum(map(is_fsdp_module, model.modules())) == 1 + 2 * 2  # the whole, and each block of policy and critic

def kinds():
    return {isinstance(p, DTensor) for p in model.parameters()}

assert kinds() == {True}
hooks = [list(part._forward_pre_hooks) for part in model.modules() if is_fsdp_module(part)]
ids = torch.ones(1, 3, dtype=torch.long)
with torch.no_grad(), gathered([model]):
    assert kinds() == {False}
    with gathered([model]):
        pass
    assert kinds() == {False}
    for _ in range(1 + 2 * rank):
        logits = model.policy(input_ids=ids[:, : 2 + rank]).logits
try:
    with gathered([model]):
        raise RuntimeError
except RuntimeError:
    pass
assert kinds() == {True}
assert hooks == [list(part._forward_pre_hooks) for part in model.modules() if is_fsdp_module(part)]
run.train()
weights = full_state_dict(model, keep=rank == 1)
assert bool(weights) == (rank == 1)
"""


def test_gathered_weights_are_plain_and_need_no_other_rank(tmp_path):
    launch(tmp_path, GATHERED, {"max_steps": 1, "per_device_train_batch_size": 1}, processes=2, engine="fsdp2")


def test_what_is_not_sharded_stays_as_it_is():
    model = nn.Linear(2, 3)
    assert not is_fsdp_module(model)
    hook = model.register_forward_hook(lambda *_: None)
    with unsharded([model]):
        assert list(model._forward_hooks) == [hook.id]
    weights = full_state_dict(model, keep=True)
    assert {name: tensor.shape for name, tensor in weights.items()} == {"weight": (3, 2), "bias": (3,)}
    assert full_state_dict(model, keep=False) == {}


@pytest.mark.slow
def test_a_checkpoint_of_other_processes_or_weights_is_refused(tmp_path):
    worker = """
from rlhf.errors import UserError
checkpoint = options.pop("checkpoint", None)
run = trainer(**options)
try:
    run.train(resume_from_checkpoint=checkpoint)
except (UserError, SystemExit) as error:  # one rank says why
    (folder / f"said-{run.accelerator.process_index}").write_text(str(error))
"""
    first = tmp_path / "first"
    saved = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    launch(first, worker, saved, processes=2, engine="fsdp2")
    given = saved | {"checkpoint": str(first / "checkpoints" / "step-1")}
    assert {path.name for path in (first / "checkpoints" / "step-1").glob("*.pt")} == {"shard-0.pt", "shard-1.pt"}
    launch(tmp_path / "ddp", worker, given, processes=2)
    assert "written with engine FSDP2, but this run has" in (tmp_path / "ddp" / "said-0").read_text()
    launch(tmp_path / "one", worker, given | {"gradient_accumulation_steps": 4}, processes=1, engine="fsdp2")
    assert "written with processes 2, but this run has 1" in (tmp_path / "one" / "said-0").read_text()
    launch(tmp_path / "other", worker, given | {"critic": "shared"}, processes=2, engine="fsdp2")
    said = [(tmp_path / "other" / f"said-{rank}") for rank in (0, 1)]
    assert "expected the models and the optimizer that it was written with" in said[0].read_text()
    assert "weights with other names or shapes: critic." in said[0].read_text()
