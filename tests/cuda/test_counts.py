"""What the host waits for, and what it launches: exact counts, the same on any machine."""

import functools
import math

import pytest

from rlhf.generation.static import LOOK_EVERY

TOKENS, STEPS, MICRO_BATCHES, EPOCHS = 40, 2, 4, 2
# The shape of the reference recipe in small: several passes to score, several micro-batches, several epochs.
RECIPE = {
    "rows": [{"prompt": "hello there " * (1 + i % 3)} for i in range(8)],
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "num_ppo_epochs": EPOCHS,
    "local_rollout_forward_batch_size": 4,
    "response_length": TOKENS,
    "stop_token_id": 399,
    "max_steps": STEPS,
    "num_sample_generations": 0,
    "save": False,
}
KINDS = {"full": {}, "LoRA": {"lora": True}, "Llama": {"family": "llama"}, "fp16": {"bf16": False, "fp16": True}}
SLOW = ("Llama", "fp16")


def kinds():
    return [
        pytest.param(options, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, options in KINDS.items()
    ]


@pytest.fixture(scope="module")
def recipe(cuda):
    """A run of the recipe with options of its own, made once."""
    return functools.cache(lambda **options: cuda.run("ppo", **RECIPE | options))


@pytest.mark.parametrize("options", kinds())
def test_what_a_step_waits_for(recipe, options):
    report = recipe(**options)
    assert report.end == "ok", report.said
    # Inside a pass, forward and backward, nothing is waited for, and nothing crosses to the host or back.
    assert report.n_calls("micro-batch") == STEPS * EPOCHS * MICRO_BATCHES
    for phase in ("micro-batch", "rollout", "score", "advantages"):
        assert report.n_syncs(phase) == 0, report.lines("syncs")
    assert report.n_copies("micro-batch") == 0
    # A decoded token waits for nothing: one look at who has ended every so many, and one copy of the responses.
    looks = (TOKENS - 1) // LOOK_EVERY
    assert report.n_syncs("sample") <= STEPS * (looks + 1)
    # The rest of a step, the looks and the copies of finished responses apart.
    phases = ("learn, rest", "record", "train")
    assert sum(map(report.n_syncs, phases)) <= 10 * STEPS, report.lines("syncs")


@pytest.mark.parametrize("options", [{}, {"lora": True}], ids=["full", "LoRA"])
def test_a_decoded_token_is_one_launch(recipe, options):
    """By a captured graph, and the responses are those of steps that are launched kernel by kernel."""
    graphs, plain = recipe(**options), recipe(**options, cuda_graphs=False)
    for report in (graphs, plain):
        assert report.end == "ok", report.said
    assert graphs.facts["metrics"] == plain.facts["metrics"]
    assert plain.n_calls("kernel in a graph") == 0
    in_graphs = graphs.n_calls("kernel in a graph") / (STEPS * (TOKENS - 1))
    launched = (plain.n_kernels("sample") - graphs.n_kernels("sample")) / (STEPS * (TOKENS - 1))
    assert in_graphs > 40
    assert launched == pytest.approx(in_graphs, rel=0.2)  # what they saved, but for the one step that was captured


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoding_step_is_the_model_and_little_more(cuda, family):
    found = {lora: cuda.run("decoding", family=family, lora=lora) for lora in (False, True)}
    for report in found.values():
        assert report.end == "ok", report.said
        steps = report.facts["steps"]
        assert report.n_kernels("step") <= 20 * steps, report.lines("kernels")
        assert report.n_syncs("step") == report.n_syncs("model") == 0
    full, lora = (found[key].n_kernels("model") for key in (False, True))
    assert lora == full  # adapters are added in


def test_looks_are_as_far_apart_as_documented():
    assert LOOK_EVERY == 16
    assert math.ceil(128 / LOOK_EVERY) <= 8
