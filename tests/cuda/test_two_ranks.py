"""Two ranks, each on a pretend CUDA device of its own, under NCCL's rules: no collective on a CPU tensor."""

import pytest

LORA = {"lora": True}
SHORT = {"LoRA": ("ppo", LORA)}
LONG = {
    "full": ("ppo", {}),
    "full, fp16": ("ppo", {"bf16": False, "fp16": True}),
    "LoRA, Llama": ("ppo", LORA | {"family": "llama"}),
    "LoRA with a ref_model": ("own_reference", LORA),
    "LoRA, critic shared": ("ppo", LORA | {"critic": "shared"}),
    "token budget": ("ppo", {"micro_batch_tokens": 64}),
    "KL control": ("ppo", {"target_kl": 0.1, "kl_target": 0.05, "kl_horizon": 1000, "whiten_rewards": True}),
    "score scaling": ("ppo", {"score_norm_samples": 4, "use_score_scaling": True, "score_clip": 1.0}),
    "reward function": ("function", {}),
    "reward model of another family": ("other_family", {}),
    "evaluation during training": ("evaluating", {}),
    "save and resume": ("resuming", {}),
    "a loop of one's own": ("own_loop", {}),
    "rollout that is not finite": ("not_finite_score", {}),
    "update that is not finite": ("not_finite_loss", {}),
    "reward": ("reward", {}),
    "reward, fp16": ("reward", {"bf16": False, "fp16": True}),
    "reward, save and resume": ("reward", {"resume": True, "save_strategy": "steps", "save_steps": 1}),
    "evaluate.py's scoring": ("evaluation", {}),
}
LIMIT = 240  # seconds: both ranks share what one has in the other tests


def on_two(cuda, scenario, **options):
    reports = cuda.run_ranks(scenario, 2, limit=LIMIT, **options)
    for report in reports:
        assert report.end == "ok", report.said
        assert not report.faults
        assert sum(report.n_kernels(phase) for phase in ("sample", "train", "evaluate")) > 0
    return reports


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        pytest.param(*row, id=name, marks=[] if name in SHORT else [pytest.mark.slow])
        for name, row in (SHORT | LONG).items()
    ],
)
def test_two_ranks(cuda, scenario, options):
    one, two = on_two(cuda, scenario, **options)
    for name in ("metrics", "rows", "loss"):  # what every rank knows
        assert one.facts.get(name) == two.facts.get(name)


@pytest.mark.slow
def test_two_ranks_are_one(cuda):
    """The same global batch on one rank and on two."""
    options = {"family": "llama", "bf16": False, "save": False, "max_steps": 2}
    alone = cuda.run("ppo", **options, per_device_train_batch_size=2)
    assert alone.end == "ok", alone.said
    one, _ = on_two(cuda, "ppo", **options, per_device_train_batch_size=1)
    assert one.facts["metrics"] == pytest.approx(alone.facts["metrics"], rel=1e-3, abs=1e-5)


def test_a_cpu_tensor_in_a_collective_is_found(cuda):
    """Gloo, which carries it here, takes it."""
    for report in cuda.run_ranks("injected", 2, limit=LIMIT, fault="all_reduce", of="ppo"):
        assert report.end.startswith("RuntimeError: pretend CUDA device: c10d.allreduce_")
        assert "NCCL takes no CPU tensor" in report.end
        assert [row[2].split(":")[0] for row in report.faults] == ["rlhf/distributed/collectives.py"]
