"""The split of GPT-2's c_attn, what is trained, and what is saved; stock transformers and PEFT are the judges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError
from rlhf.models.lora import (
    add_lora,
    critic_lora,
    fuse_attention,
    merged_model,
    save_adapter,
    split_attention,
    trainable_share,
)

N = 32  # hidden size of the tiny models
IDS = torch.arange(5, 29).reshape(2, 12)
POLICIES = [tiny.gpt2, tiny.llama]
REWARDS = [tiny.gpt2_reward, tiny.llama_reward]
KINDS = [{}, {"use_rslora": True}, {"target_modules": ["v_proj"]}, {"target_modules": ["q_proj", "k_proj", "v_proj"]}]


def lora_config(**options: Any) -> LoraConfig:
    given = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(**given)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def randomise(model: nn.Module) -> None:
    """Adapter weights as after long training; a fresh B is zero and would hide every mistake."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def train(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS).logits.float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.gpt2_reward])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_keeps_the_outputs_and_fuse_undoes_it(build: Callable[[], PreTrainedModel], dtype: torch.dtype) -> None:
    model = build().to(dtype)
    with torch.no_grad():  # a new model's biases are zero, and would be right in any order
        for block in model.transformer.h:
            block.attn.c_attn.bias.copy_(torch.linspace(-1, 1, 3 * N))
    kept, before = copy_of(model), logits(model)
    split_attention(model)
    layers = [module for name, module in model.named_modules() if name.endswith("_proj") and "attn.c_attn." in name]
    assert [type(layer) for layer in layers] == [nn.Linear] * 6  # q, k, v in two blocks
    for weight in (layer.weight for layer in layers):
        assert (weight.shape, weight.dtype, weight.is_contiguous()) == ((N, N), dtype, True)
    torch.testing.assert_close(logits(model), before, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)

    fuse_attention(model)
    fused = model.state_dict()
    assert list(fused) == list(kept)
    assert all(torch.equal(fused[name], kept[name]) and fused[name].dtype == dtype for name in kept)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D


@pytest.mark.parametrize("frozen", [False, True])
def test_split_and_fuse_keep_what_is_trained_and_the_mode(frozen: bool) -> None:
    model = tiny.gpt2().train(not frozen).requires_grad_(not frozen)
    for change in (split_attention, fuse_attention):
        change(model)
        assert {p.requires_grad for p in model.parameters()} == {not frozen}
        assert {module.training for module in model.modules()} == {not frozen}


def test_split_and_fuse_leave_the_random_stream_alone() -> None:
    model = tiny.gpt2()
    state = torch.get_rng_state()
    split_attention(model)
    fuse_attention(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_split_leaves_llama_and_cross_attention_alone() -> None:
    llama = tiny.llama()
    names = [name for name, _ in llama.named_modules()]
    split_attention(llama)
    assert [name for name, _ in llama.named_modules()] == names

    holder = nn.ModuleDict({"c_attn": Conv1D(2 * N, N)})
    split_attention(holder)
    assert type(holder.c_attn) is Conv1D


def test_number_of_trained_parameters() -> None:
    gpt2 = tiny.gpt2()
    total = gpt2.num_parameters()
    # 2 layers x (q, v) x (A [4, 32] + B [32, 4])
    expected = 2 * 2 * (4 * N + N * 4)
    assert trainable_share(gpt2) == (total, total)
    assert trainable_share(add_lora(gpt2, lora_config())) == (expected, total + expected)

    llama = tiny.llama()
    total = llama.num_parameters()
    # 2 key-value heads of 8: v_proj is [16, 32]
    expected = 2 * ((4 * N + N * 4) + (4 * N + 16 * 4))
    assert trainable_share(add_lora(llama, lora_config())) == (expected, total + expected)


@pytest.mark.parametrize("build", POLICIES)
def test_only_the_adapter_is_trained(build: Callable[[], PreTrainedModel]) -> None:
    before = logits(build())
    policy = add_lora(build(), lora_config())
    assert logits(policy).sub(before).abs().max() < 1e-6  # B starts at zero
    train(policy)
    assert {"lora_" in name for name, p in policy.named_parameters() if p.grad is not None} == {True}
    assert logits(policy).sub(before).abs().max() > 1e-3
    with policy.disable_adapter():
        torch.testing.assert_close(logits(policy), before, atol=1e-6, rtol=0)
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


def test_merged_gpt2_differs_in_query_and_value_only() -> None:
    base, policy = copy_of(tiny.gpt2()), add_lora(tiny.gpt2(), lora_config())
    train(policy)
    merged = merged_model(policy)
    tensors = merged.state_dict()
    assert type(merged) is type(tiny.gpt2())
    assert list(tensors) == list(base)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    for name, tensor in tensors.items():
        if not name.endswith("attn.c_attn.weight"):
            assert torch.equal(tensor, base[name]), name
            continue
        assert torch.equal(tensor[:, N : 2 * N], base[name][:, N : 2 * N])
        for columns in (slice(0, N), slice(2 * N, 3 * N)):
            assert (tensor[:, columns] != base[name][:, columns]).any(dim=0).all()


@pytest.mark.parametrize("build", POLICIES)
def test_merged_folder_is_a_stock_model(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    policy = add_lora(build(), lora_config())
    randomise(policy)
    kept, expected = copy_of(policy), logits(policy)
    merged = merged_model(policy)
    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(build())
    assert not any(info.values())  # no missing, unexpected or mismatched key
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    # The trained model can go on.
    assert all(torch.equal(tensor, kept[name]) for name, tensor in policy.state_dict().items())
    assert torch.equal(logits(policy), expected)
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("build", POLICIES)
def test_merged_model_keeps_bfloat16(build: Callable[[], PreTrainedModel]) -> None:
    policy = add_lora(build().to(torch.bfloat16), lora_config())
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    randomise(policy)
    merged = merged_model(policy)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    expected = logits(policy).float()
    assert (logits(merged).float() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("build", POLICIES)
@pytest.mark.parametrize("options", KINDS)
def test_adapter_on_the_stock_model(
    build: Callable[[], PreTrainedModel], options: dict[str, Any], tmp_path: Path
) -> None:
    policy = add_lora(build(), lora_config(**options))
    randomise(policy)
    save_adapter(policy, tmp_path)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path))
    assert logits(policy).sub(logits(build())).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), logits(policy), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["c_proj", "lm_head"]},
        {"target_modules": ["q_proj", "v_proj", "c_proj", "lm_head"], "use_rslora": True},
    ],
    ids=["c_attn", "all-linear", "no attention", "parts and others"],
)
def test_other_layers_of_a_gpt2(options: dict[str, Any], tmp_path: Path) -> None:
    """As PEFT adapts them; the head is tied to the embeddings, which stay as they are."""
    policy = add_lora(tiny.gpt2(), lora_config(**options))
    randomise(policy)
    expected = logits(policy)
    save_adapter(policy, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.gpt2(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    merged_model(policy).save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert torch.equal(merged.transformer.wte.weight, tiny.gpt2().transformer.wte.weight)


def test_a_critic_gets_the_targets_that_it_has() -> None:
    found = [
        critic_lora(lora_config(target_modules=targets), tiny.gpt2_reward()).target_modules
        for targets in (["q_proj", "lm_head"], ["lm_head"], "all-linear", r".*\.c_fc", r".*head")
    ]
    assert found == [{"q_proj"}, None, "all-linear", r".*\.c_fc", None]


def test_of_a_policys_adapter_a_critic_gets_rank_and_scale_and_its_own_head() -> None:
    policy = lora_config(modules_to_save=["wte"], bias="all")
    found = critic_lora(policy, tiny.gpt2_reward())
    assert (found.r, found.lora_alpha, found.task_type, found.bias) == (4, 16, "SEQ_CLS", "none")
    assert found.modules_to_save is None
    assert (policy.modules_to_save, policy.bias, policy.task_type) == (["wte"], "all", "CAUSAL_LM")


def test_adapter_config_of_a_gpt2(tmp_path: Path) -> None:
    policy = add_lora(tiny.gpt2(), lora_config())
    save_adapter(policy, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["target_modules"]) == (8, 32, ["c_attn"])
    assert saved["fan_in_fan_out"] is saved["inference_mode"] is True
    assert policy.peft_config["default"].r == 4  # that of the trained model stays


@pytest.mark.parametrize("build", REWARDS)
def test_critic_trains_its_own_head_and_leaves_the_reward_alone(
    build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    reward = build()
    split_attention(reward)  # so that "unchanged" can mean bit by bit
    before = logits(reward)
    train(critic := add_lora(reward, lora_config(task_type="SEQ_CLS")))
    after = logits(critic)
    assert after.sub(before).abs().max() > 1e-3
    with critic.disable_adapter():
        assert torch.equal(logits(critic), before)
    trained = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert [name for name in trained if "lora_" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]

    save_adapter(critic, tmp_path)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), after, atol=1e-5, rtol=0)
    merged = merged_model(critic)
    assert list(merged.state_dict()) == list(build().state_dict())
    torch.testing.assert_close(logits(merged), after, atol=1e-5, rtol=0)


def test_target_by_default_and_by_one_name() -> None:
    for targets, per_layer in ((None, 2), ("q_proj", 1)):
        config = lora_config(target_modules=targets)
        policy = add_lora(tiny.gpt2(), config)
        assert trainable_share(policy)[0] == 2 * per_layer * 2 * 4 * N
        assert config.target_modules == targets  # the caller's config stays


def one_layer_twice() -> PreTrainedModel:
    model = tiny.llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj = first.q_proj
    return model


def one_weight_twice() -> PreTrainedModel:
    model = tiny.llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    return model


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (one_layer_twice, {}, "leave q_proj out: several layers share it"),
        (one_weight_twice, {"target_modules": "all-linear"}, "leave q_proj out: several layers share it"),
        (tiny.gpt2, {"target_modules": ["q_proj", "query"]}, "c_fc, c_proj, k_proj, lm_head, q_proj.*found query$"),
        (tiny.llama, {"target_modules": ["c_attn"]}, "down_proj, gate_proj, k_proj.*found c_attn$"),
        (tiny.llama, {"target_modules": "q_prj"}, "found q_prj$"),
        (tiny.gpt2, {"target_modules": r".*\.q_proj"}, r"some of q_proj, k_proj, v_proj on a GPT-2, found \.\*"),
        (tiny.gpt2, {"target_modules": ["c_attn", "q_proj"]}, "c_attn, c_fc, c_proj, lm_head, found q_proj$"),
        (tiny.gpt2, {"target_modules": ["c_attn.q_proj", "c_fc"]}, "on a GPT-2, found c_attn.q_proj, c_fc$"),
        (tiny.gpt2, {"use_dora": True}, "GPT-2 takes plain LoRA only; target c_attn, or remove use_dora"),
        (tiny.gpt2, {"rank_pattern": {"q_proj": 8}}, "or remove rank_pattern$"),
        (tiny.gpt2, {"alpha_pattern": {"q_proj": 8}}, "or remove alpha_pattern$"),
        (tiny.gpt2, {"exclude_modules": ["h.0.attn.c_attn.q_proj"]}, "or remove exclude_modules$"),
        (tiny.gpt2, {"layers_to_transform": [0]}, "or remove layers_to_transform$"),
        (tiny.llama, {"layer_replication": [(0, 2), (0, 2)]}, "a plain LoRA adapter, found one with layer_repl"),
        (tiny.llama, {"lora_bias": True}, "a plain LoRA adapter, found one with lora_bias"),
        (tiny.llama, {"bias": "lora_only"}, "set bias to 'none'.*found 'lora_only'"),
        (tiny.llama, {"init_lora_weights": "pissa"}, "found 'none' and 'pissa'"),
    ],
)
def test_a_wrong_target_or_option_is_answered(
    build: Callable[[], PreTrainedModel], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(build(), lora_config(**options))


def test_a_model_with_neither_kind_of_attention() -> None:
    sizes = {"vocab_size": 50, "hidden_size": N, "num_attention_heads": 2, "intermediate_size": 64}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=1, **sizes))
    with pytest.raises(UserError, match=r"query_key_value, found q_proj, v_proj$"):
        add_lora(model, lora_config())


@pytest.mark.parametrize("build", POLICIES)
def test_a_merge_for_saving_copies_nothing_where_the_model_is(
    build: Callable[[], PreTrainedModel], monkeypatch
) -> None:
    """On a GPU there may be no room for a second model as a run ends."""
    policy = add_lora(build(), lora_config())
    train(policy)
    expected = merged_model(policy).state_dict()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    copied: list[Any] = []
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self))
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", lambda self, memo: copied.append(self))
    merged = merged_model(policy, on_cpu=True)
    assert copied == []
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].device.type == "cpu"
    for name, tensor in policy.state_dict().items():  # on CPUs the copy is one, too
        assert torch.equal(tensor, before[name]), name
    embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    tied = policy.get_input_embeddings().weight is policy.get_output_embeddings().weight
    assert (embeddings.weight is head.weight) == tied


def test_a_copy_in_main_memory_has_buffers_of_its_own() -> None:
    policy = add_lora(tiny.llama(), lora_config())
    merged = merged_model(policy, on_cpu=True)
    own = {buffer.data_ptr() for buffer in policy.buffers()}
    assert own
    assert not own & {buffer.data_ptr() for buffer in merged.buffers()}


def test_the_settings_of_a_loaded_adapter_make_one_that_is_trained() -> None:
    config = lora_config(inference_mode=True)
    trained = [name for name, p in add_lora(tiny.llama(), config).named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # A and B of two projections in two layers
    assert config.inference_mode  # it is the caller's
