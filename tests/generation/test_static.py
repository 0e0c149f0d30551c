"""Decoding with fixed shapes says what decoding with growing ones says, run as it is, replayed or compiled."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig
from replay import capture
from torch.testing import assert_close

from rlhf.errors import UserError
from rlhf.generation import static
from rlhf.generation.decode import generate, inverse_cdf, uniforms
from rlhf.generation.static import StaticDecoder, cache_size
from rlhf.models.lora import add_lora
from rlhf.models.sampling_copy import SamplingCopy, can_copy, copied_bytes
from rlhf.ppo.rollout import use_cuda_graphs

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [3, 4, 5, 6]]
EOS = list(range(0, 400, 40))  # so many that rows end at different times
LORA = LoraConfig(
    task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False
)
MAKE = {"gpt2": tiny.gpt2, "llama": tiny.llama}


def decode(decoder, model, prompts=PROMPTS, steps=40, step=1, seen=None):
    u = uniforms(0, step, [str(i) for i in range(len(prompts))], steps)
    with torch.no_grad():
        rows, calls = decoder.decode(model, prompts, u, EOS, 0.9, inverse_cdf)
    if seen is not None:
        seen += calls
    return [row[: next((i for i, token in enumerate(row) if token in EOS), len(row) - 1) + 1] for row in rows]


def growing(model, prompts=PROMPTS, steps=40, step=1):
    return generate(model, prompts, uniforms(0, step, [str(i) for i in range(len(prompts))], steps), EOS, 0.9)


def adapted(make):
    torch.manual_seed(0)
    return add_lora(make(), LORA).eval()


@pytest.mark.parametrize("family", MAKE)
def test_tokens_are_those_of_a_cache_that_grows(family):
    model, seen = MAKE[family]().eval(), []
    expected = growing(model)
    assert decode(StaticDecoder(), model, seen=seen) == expected
    assert len({len(row) for row in expected}) > 2
    assert seen[0] == (5, 7)  # the prompts
    assert {rows for rows, _ in seen[1:]} <= {8, 4, 2, 1}  # then powers of two, which fall as rows end
    assert len({rows for rows, _ in seen[1:]}) > 1


@pytest.mark.parametrize("family", MAKE)
def test_a_replayed_step_says_the_same_in_every_batch(family):
    model, decoder = MAKE[family]().eval(), StaticDecoder(capture)
    for step, prompts in enumerate((PROMPTS, PROMPTS[::-1], PROMPTS[:3] + PROMPTS[:2])):
        assert decode(decoder, model, prompts, step=step) == growing(model, prompts, step=step)
    captured = len(decoder._steps)
    assert captured <= 4  # of 8, 4, 2 and 1 rows: captured once, replayed in all batches
    with torch.no_grad():
        for parameter in model.parameters():  # as an optimizer does
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert decode(decoder, model, step=7) == growing(model, step=7)
    assert len(decoder._steps) >= captured


def test_a_step_is_captured_for_each_temperature():
    model, decoder, u = tiny.llama().eval(), StaticDecoder(capture), uniforms(0, 1, list("abcde"), 24)
    with torch.no_grad():
        for temperature in (1.5, 0.01, 1.5):
            rows, _ = decoder.decode(model, PROMPTS, u, [399], temperature, inverse_cdf)
            found = generate(model, PROMPTS, u, [399], temperature)
            assert [row[: len(own)] for row, own in zip(rows, found, strict=True)] == found


@torch.no_grad()
@pytest.mark.parametrize("family", MAKE)
def test_a_copy_has_each_matrixs_own_bias(family):
    model = adapted(MAKE[family])
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    twin, ids = SamplingCopy(model, None), torch.arange(3, 23).reshape(2, 10)
    twin.refresh()
    assert_close(twin.model(ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_memory_of_one_precision_is_not_that_of_another():
    model, decoder = tiny.llama().eval(), StaticDecoder(capture)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert decode(decoder, model, steps=20) == decode(StaticDecoder(capture), model, steps=20)
        kept = decoder._state[1]
        assert {kept.mask.dtype, *(layer.keys.dtype for layer in kept.layers)} == {dtype}


def test_where_a_step_cannot_be_captured_it_is_launched(caplog):
    tries = []

    def broken(step):
        tries.append(1)
        step()  # as a first call that sets things up
        raise RuntimeError("CUDA error: operation not\npermitted when stream is capturing")

    model, decoder = tiny.gpt2().eval(), StaticDecoder(broken)
    for step in (1, 2):
        assert decode(decoder, model, step=step) == growing(model, step=step)
    assert len(tries) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "cuda_graphs: a decoding step could not be captured, so each is launched: "
        "CUDA error: operation not permitted when stream is capturing"
    ]


def test_other_shapes_are_captured_anew_and_memory_of_one_shape_is_kept(monkeypatch):
    model, decoder = tiny.gpt2().eval(), StaticDecoder(capture)
    for prompts, steps in ((PROMPTS, 20), (PROMPTS[:2], 20), (PROMPTS, 70)):
        assert decode(decoder, model, prompts, steps) == growing(model, prompts, steps)
    monkeypatch.setattr(static, "_GRAPHS", 1)
    assert decode(decoder, model) == growing(model)
    assert len(decoder._steps) == 1


@pytest.mark.parametrize("family", MAKE)
def test_a_step_can_be_compiled_whole(family):
    """No shape depends on data, and no line of Python on a tensor: the compiler takes the step as one graph."""

    def compiled(step):
        return torch.compile(step, backend="aot_eager", fullgraph=True)

    model = MAKE[family]().eval()
    assert decode(StaticDecoder(compiled), model, steps=20) == growing(model, steps=20)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", MAKE)
def test_a_copy_follows_the_policy(family, lora):
    model = adapted(MAKE[family]) if lora else MAKE[family]().eval()
    assert can_copy(model)
    twin = SamplingCopy(model, None)
    ids = torch.tensor([PROMPTS[2]])
    for seed in (1, 2):
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
            twin.refresh()
            assert_close(twin.model(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert decode(StaticDecoder(capture), twin.model) == growing(model)
    types = {type(module).__name__ for module in twin.model.modules()}
    assert not types & {"SplitProjection", "LoraLinear", "Linear4bit"}
    # With all weights trained and in one precision, the copy holds none of its own.
    assert {p.data_ptr() for p in twin.model.parameters()} == {p.data_ptr() for p in model.parameters()} or lora


@torch.no_grad()
def test_a_copy_computes_without_dropout_with_the_active_adapter_in_the_precision_asked_for():
    model = adapted(tiny.gpt2).train()
    model.add_adapter("other", LORA)
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    twin, ids = SamplingCopy(model, None), torch.tensor([PROMPTS[2]])
    twin.refresh()
    assert not any(module.training for module in twin.model.modules())
    assert_close(twin.model(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=0)
    half = SamplingCopy(tiny.gpt2(), torch.bfloat16)
    layers = [module for module in half.model.modules() if type(module).__name__ == "Conv1D"]
    assert {x.dtype for layer in layers for x in (layer.weight, layer.bias)} == {torch.bfloat16}
    assert half.model.transformer.wte.weight.dtype == torch.float32


@pytest.mark.parametrize("lora", [False, True])
def test_a_copy_in_bf16_is_as_near_to_float32_as_autocast(lora):
    """Adapters are added in before the one rounding that autocast makes, too."""
    model = adapted(tiny.llama) if lora else tiny.llama().eval()
    ids = torch.randint(3, 200, (16, 30), generator=torch.Generator().manual_seed(0))
    exact = model(ids).logits.log_softmax(-1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        twin = SamplingCopy(model, torch.bfloat16)
        twin.refresh()
        plain, copied = (one(ids).logits.float().log_softmax(-1) for one in (model, twin.model))
    assert (copied - exact).abs().mean() < 1.1 * (plain - exact).abs().mean()
    if not lora:
        assert torch.equal(copied, plain)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", MAKE)
def test_what_a_copy_takes_is_known_beforehand(family, lora, dtype):
    model = adapted(MAKE[family]) if lora else MAKE[family]().eval()
    own = SamplingCopy(model, dtype)._own
    assert copied_bytes(model, dtype) == sum(p.numel() * p.element_size() for p, _ in own if p.ndim > 1)


@pytest.mark.parametrize(
    ("asked", "device", "gathers", "expected"),
    [
        (None, "cuda", False, True),
        (None, "cuda", True, False),
        (None, "cpu", False, False),
        (False, "cuda", False, False),
        (True, "cuda", False, True),
        (True, "cuda", True, "the engine gathers weights"),
        (True, "cpu", False, "the device is not CUDA"),
    ],
)
def test_when_decoding_is_captured(asked, device, gathers, expected):
    args = SimpleNamespace(cuda_graphs=asked)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"cuda_graphs: .*{expected}"):
            use_cuda_graphs(args, torch.device(device), gathers)
    else:
        assert use_cuda_graphs(args, torch.device(device), gathers) == expected


def test_cache_sizes_by_hand():
    assert cache_size(64, 384) == (64, 384)
    assert cache_size(5, 65) == (8, 128)
    assert cache_size(1, 64) == (1, 64)


def test_a_window_has_to_hold_the_whole_text():
    model = tiny.llama()
    assert static.is_static(model, 99)
    model.config.sliding_window = 9
    assert [static.is_static(model, longest) for longest in (9, 10)] == [True, False]
    assert not static.is_static(tiny.mamba(), 9)


def test_what_cannot_be_copied_is_sampled_as_it_is():
    assert not can_copy(add_lora(tiny.llama(), LoraConfig(target_modules=["q_proj"], use_dora=True)))
    two = adapted(tiny.llama)
    two.add_adapter("other", LORA)
    two.base_model.set_adapter(["default", "other"])
    assert not can_copy(two)
    quantised = tiny.llama()
    quantised.is_quantized = True
    assert not can_copy(quantised)
    assert not can_copy(add_lora(tiny.llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])))
    merged = adapted(tiny.llama)
    merged.merge_adapter()  # adding it to the weights once more would count it twice
    assert not can_copy(merged)


def test_memory_of_other_ends_is_not_used_again():
    """Rows leave where they end: with the ends of the batch before, they would leave too early."""
    model, decoder = tiny.llama().eval(), StaticDecoder(capture)
    u = uniforms(0, 1, [str(i) for i in range(5)], 40)
    for ends in (EOS, [399]):
        with torch.no_grad():
            rows, _ = decoder.decode(model, PROMPTS, u, ends, 0.9, inverse_cdf)
        expected = generate(model, PROMPTS, u, ends, 0.9)
        assert [row[: len(other)] for row, other in zip(rows, expected, strict=True)] == expected


def test_rows_that_make_up_the_number_stay_within_the_models_positions():
    """Three of eight rows are nobody's, and count on for 31 steps in each batch."""
    model, decoder = tiny.gpt2().eval(), StaticDecoder(capture)
    model.transformer.wpe = torch.nn.Embedding(64, 32)
    u = uniforms(0, 1, [str(i) for i in range(5)], 40)
    for _ in range(3):
        with torch.no_grad():
            rows, _ = decoder.decode(model, PROMPTS, u, [399], 0.9, inverse_cdf)
        expected = generate(model, PROMPTS, u, [399], 0.9)
        assert [row[: len(other)] for row, other in zip(rows, expected, strict=True)] == expected
