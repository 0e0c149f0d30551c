"""Every path of the project on the pretend CUDA device: to its end, without a fault, and really on the device."""

import pytest

LORA, FP32, FP16 = {"lora": True}, {"bf16": False}, {"bf16": False, "fp16": True}
SCALED = {"score_norm_samples": 4, "use_score_scaling": True, "use_score_norm": True, "score_clip": 1.0}
CONTROLLED = {
    "target_kl": 0.1,
    "kl_target": 0.05,
    "kl_horizon": 1000,
    "bootstrap_truncated": True,
    "missing_eos_penalty": 1.0,
    "whiten_rewards": True,
    "critic_warmup_steps": 1,
    "num_mini_batches": 2,
}
# name -> scenario, options. Those that learn by PPO.
SHORT = {
    "full": ("ppo", {}),
    "LoRA, Llama": ("ppo", LORA | {"family": "llama"}),
    "fp16": ("ppo", FP16),
    "LoRA with a ref_model": ("own_reference", LORA),
    "reward model of another family": ("other_family", {}),
    "evaluation during training": ("evaluating", {}),
}
LONG = {
    "LoRA": ("ppo", LORA),
    "critic shared": ("ppo", {"critic": "shared"}),
    "Llama": ("ppo", {"family": "llama"}),
    "fp32": ("ppo", FP32),
    "LoRA, fp32": ("ppo", LORA | FP32),
    "LoRA, critic shared": ("ppo", LORA | {"critic": "shared"}),
    "gradient checkpointing": ("ppo", {"gradient_checkpointing": True}),
    "LoRA, gradient checkpointing": ("ppo", LORA | {"gradient_checkpointing": True, "family": "llama"}),
    "token budget": ("ppo", {"micro_batch_tokens": 64}),
    "KL control": ("ppo", CONTROLLED),
    "score scaling": ("ppo", SCALED),
    "determinism": ("ppo", {"full_determinism": True}),
    "8-bit optimizer": ("ppo", {"optim": "adamw_8bit"}),
    "SGD": ("ppo", {"optim": "sgd"}),
    "own ref_model": ("own_reference", {}),
    "own value_model": ("own_value_model", {}),
    "LoRA with a value_model": ("own_value_model", LORA),
    "reward function": ("function", {}),
    "LoRA, reward function": ("function", LORA),
    "rewards weighted": ("two_rewards", {}),
    "LoRA, rewards weighted": ("two_rewards", LORA),
    "dropout, an adapter merged first": ("adapters", {}),
    "an adapter that came along": ("going_on_with_an_adapter", {}),
    "4 bits": ("quantised", {"bits": 4}),
    "8 bits": ("quantised", {"bits": 8}),
    "save and resume": ("resuming", {}),
    "LoRA, save and resume": ("resuming", LORA),
    "fp16, save and resume": ("resuming", FP16),
    "a loop of one's own": ("own_loop", {}),
    "update that is not finite": ("not_finite_loss", {}),
    "update that is not finite, fp16": ("not_finite_loss", FP16),
    "callbacks": ("callbacks", {}),
    "saving and pushing LoRA": ("pushing", {}),
}
# Those that do not: what they are to have done on the device.
OTHERS = {
    "rollout that is not finite": ("not_finite_score", {}, "sample"),
    "reward": ("reward", {}, "train"),
    "reward, fp16": ("reward", FP16, "train"),
    "reward, fp32": ("reward", FP32, "train"),
    "reward, save and resume": ("reward", {"resume": True, "save_strategy": "steps", "save_steps": 1}, "train"),
    "evaluate.py's scoring": ("evaluation", {}, "evaluate"),
    "evaluate.py's scoring, another family": ("evaluation", {"family": "llama"}, "evaluate"),
    "compare.py": ("comparison", {}, "compare"),
}
OTHERS_SHORT = ("reward", "evaluate.py's scoring, another family")


def marked(rows, slow):
    return [pytest.param(*row, id=name, marks=[pytest.mark.slow] if slow(name) else []) for name, row in rows.items()]


def ran(report):
    assert report.end == "ok", report.said
    assert not report.faults
    return report


@pytest.mark.parametrize(("scenario", "options"), marked(SHORT | LONG, LONG.__contains__))
def test_ppo(cuda, scenario, options):
    report = ran(cuda.run(scenario, **options))
    for phase in ("sample", "rollout", "advantages", "learn, rest", "micro-batch", "record"):
        assert report.n_kernels(phase) > 0, phase
    assert report.n_calls("decoded token") > 0
    assert report.facts["metrics"]["val/updates"] > 0


@pytest.mark.parametrize(("scenario", "options", "phase"), marked(OTHERS, lambda name: name not in OTHERS_SHORT))
def test_other_paths(cuda, scenario, options, phase):
    assert ran(cuda.run(scenario, **options)).n_kernels(phase) > 0


@pytest.mark.slow
def test_the_scripts_of_a_run(cuda):
    report = ran(cuda.run("stages", limit=300))
    assert {"evaluation", "ppo_full", "ppo_lora", "reward"} <= set(report.facts["stages"])
    for phase in ("reward", "ppo_full", "ppo_lora", "evaluation", "sample", "micro-batch"):
        assert report.n_kernels(phase) > 0, phase


@pytest.mark.parametrize(
    "lora", [pytest.param(False, id="full"), pytest.param(True, id="LoRA", marks=pytest.mark.slow)]
)
def test_the_numbers_are_those_of_a_cpu(cuda, lora):
    """What the device does otherwise (no packing, fewer looks at who has ended) changes nothing."""
    options = {"family": "llama", "lora": lora, "bf16": False, "save": False, "max_steps": 2}
    device = ran(cuda.run("ppo", **options)).facts["metrics"]
    cpu = ran(cuda.run("ppo", cpu=True, **options, use_cpu=True)).facts["metrics"]
    assert device.keys() == cpu.keys()
    assert device == pytest.approx(cpu, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_going_on_ends_where_an_unbroken_run_does(cuda):
    through = ran(cuda.run("ppo", bf16=False, max_steps=3)).facts["metrics"]
    resumed = ran(cuda.run("resuming", bf16=False)).facts["metrics"]
    assert resumed == pytest.approx(through, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        pytest.param("reference", "aten.embedding", id="the reference left on the CPU"),
        pytest.param("mask", "aten.where", id="a CPU mask in a CUDA operation"),
    ],
)
def test_a_fault_is_found(cuda, fault, where):
    report = cuda.run("injected", fault=fault, of="ppo")
    assert report.end.startswith(f"RuntimeError: pretend CUDA device: {where}")
    [[_, what, line, _]] = report.faults
    assert "expected all tensors on one device" in what
    assert line.startswith("rlhf/")


def test_kernels_and_calls_grow_with_the_model(cuda):
    """Counts for so many layers are a + b x layers: what a decoded token costs can be read from two runs."""
    options = {"rows": [{"prompt": "hello"}] * 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    options |= {"response_length": 4, "stop_token_id": 399, "save": False, "num_ppo_epochs": 1}
    found = [cuda.run("ppo", layers=layers, **options) for layers in (1, 2, 3)]
    for report in found:
        assert ran(report).n_calls("decoded token") == 4
        assert report.n_calls("micro-batch") == 1
    for phase in ("sample", "micro-batch"):
        one, two, three = (report.n_kernels(phase) for report in found)
        assert two > one
        assert three - two == two - one
