"""The dry run's estimates against values by hand."""

import copy

import pytest
import tiny
import torch
from tiny_ppo import LORA

from rlhf import PPOConfig
from rlhf.errors import UserError
from rlhf.memory_estimate import ppo
from rlhf.memory_estimate.account import Part, Sharding
from rlhf.memory_estimate.ppo import _cast, _keys_and_values, _to_sample_on_a_gpu
from rlhf.models.kernels import onednn_linear
from rlhf.ppo.roles import build_roles

MATRICES = 2 * (32 * 32 * 4 + 32 * 128 * 2) + 32 * 400  # of tiny.gpt2: two blocks and the head


def config(**options):
    return PPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **options)


def parts_of(lora, half=False, bf16=False, fp16=False):
    args = config()
    args.bf16, args.fp16 = bf16, fp16  # a GPU has them, whatever this CPU has
    roles = build_roles(args, tiny.gpt2(), None, tiny.gpt2_reward(), None, copy.deepcopy(LORA) if lora else None)
    sharding = Sharding(2 if half else 0, 1, half=half)
    return {part.name: part for part in _to_sample_on_a_gpu(args, roles, 7.0, sharding) + _cast(args, roles, sharding)}


def test_the_shape_of_the_model_is_as_assumed():
    model = tiny.gpt2()
    block = model.transformer.h[0]
    layers = [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
    assert len(model.transformer.h) * sum(x.weight.numel() for x in layers) + model.lm_head.weight.numel() == MATRICES


@pytest.mark.parametrize("lora", [False, True])
def test_the_copy_holds_all_matrices_in_half_the_bytes(lora):
    parts = parts_of(lora, bf16=True)
    assert parts["copy to sample from"].weights == 2 * MATRICES
    assert parts["keys and values"].weights == 7.0


def test_in_float32_it_holds_what_is_adapted_and_nothing_is_cast():
    assert parts_of(False)["copy to sample from"].weights == 0
    found = parts_of(True)
    assert found["copy to sample from"].weights == 4 * 2 * 3 * 32 * 32  # query, key and value, fused again
    assert "weights, cast" not in found


def test_deepspeeds_weights_are_in_that_precision_already():
    found = parts_of(False, half=True, bf16=True)
    assert found["copy to sample from"].weights == 0
    assert "weights, cast" not in found


def test_weights_that_are_cast_by_hand(monkeypatch):
    monkeypatch.setattr(onednn_linear, "_FEWEST", 0)
    blocks = MATRICES - 32 * 400  # of the reward model; a head of one number is computed in float32
    full, lora = parts_of(False, bf16=True)["weights, cast"], parts_of(True, bf16=True)["weights, cast"]
    # Without adapters policy, critic, a reference of its own and the reward model, while they score.
    assert (full.rollout, full.learning) == (2 * 2 * (MATRICES + blocks), 0)
    # With adapters the bases of policy and critic, which are the reference and the reward model, too. Adapters, of rank
    # 2 on two layers of each block of both, are trained.
    adapters = 2 * 2 * 2 * 2 * (32 + 32)
    assert (lora.rollout, lora.learning) == (2 * (MATRICES + blocks + adapters), 2 * (MATRICES + blocks))


def test_the_cache_by_hand():
    args = config(per_device_train_batch_size=3, gradient_accumulation_steps=1, response_length=20)
    # 4 rows of 64 columns; 2 layers, keys and values of 32 numbers, 4 bytes.
    assert _keys_and_values(args, tiny.gpt2().config, 30) == 4 * 64 * 2 * 2 * 32 * 4


@pytest.fixture
def learning(tmp_path, monkeypatch):
    """Bytes that learning holds, of 20 response tokens to a prompt of 60 each."""
    seen = {}
    monkeypatch.setattr(ppo, "verdict", lambda parts, *_: seen.update({part.name: part for part in parts}))

    def measure(rows=1, layers=2, recompute=False):
        args = config(
            per_device_train_batch_size=rows, response_length=20, max_steps=1, gradient_checkpointing=recompute
        )
        args.output_dir = str(tmp_path)
        shapes = [model().config for model in (tiny.llama, tiny.llama_reward)]
        for shape in shapes:
            shape.num_hidden_layers = layers
        ppo.dry_run(args, *shapes, [60], "float32", None)
        return seen["activations, logits"].learning

    return measure


def test_what_learning_holds_grows_with_the_rows_of_a_pass(learning):
    """Each row has the probabilities of 20 tokens, the gradients of twice 21 logits, over a vocabulary of 400, and what
    two models keep of its 80 tokens: nothing is shared by texts that begin alike."""
    shape = tiny.llama().config
    logits = 400 * (20 + 2 * 21)
    # What each linear layer reads, and the gate and what it is multiplied with: of each token in each layer.
    read = 3 * shape.hidden_size + 3 * shape.intermediate_size
    layers = 2 * shape.num_hidden_layers * 80
    assert 4 * (logits + layers * read) < (learning(rows=3) - learning()) / 2 < 4 * (logits + 3 * layers * read)


def test_recomputed_layers_keep_what_they_begin_with(learning):
    """Each layer more keeps the states of two models alone: float32 [tokens, d]."""
    states = 2 * 80 * tiny.llama().config.hidden_size * 4
    assert learning(layers=9, recompute=True) - learning(layers=8, recompute=True) == states
    one_layer = learning(layers=9) - learning(layers=8)
    assert one_layer > 3 * states
    assert learning(layers=8, recompute=True) < learning(layers=8) - 5 * one_layer
    assert learning(layers=1, recompute=True) >= learning(layers=1)  # the layer that is being recomputed


def test_on_a_cpu_prompts_are_as_long_as_they_are(monkeypatch):
    """The largest pass has the longest prompts; padding makes all of them as long as the longest."""
    args = config(per_device_train_batch_size=3, response_length=20)
    trained = build_roles(args, tiny.gpt2(), None, tiny.gpt2_reward(), None, None).trained
    lengths = [9, 4, 1, 8, 1]
    assert ppo._learned_width(args, trained, lengths) == 7
    assert ppo._learned_width(args, trained, [9, 4]) == 7  # 6.5
    asked = []
    monkeypatch.setattr(type(trained), "packs", lambda self, longest: asked.append(longest))
    assert ppo._learned_width(args, trained, lengths) == 9
    assert asked == [29]
    monkeypatch.undo()
    args.use_cpu = False
    assert ppo._learned_width(args, trained, lengths) == 9  # a GPU pads, whatever the dry run itself computes on


def test_states_and_their_copy_are_of_what_is_trained():
    """100 frozen and 10 trained parameters of 4 bytes on 4 processes under ZeRO-1."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 1, bias=False))
    model[0].requires_grad_(False)
    # Two states and a copy of 4 bytes each, a quarter of them here.
    assert Sharding(1, 4).trained("policy", model, "adamw_torch") == Part("policy", 440, 30, 40)
    assert Sharding(0, 1).trained("policy", model, "sgd") == Part("policy", 440, 0, 40)
    assert Sharding(0, 2).trained("policy", model, "lion_32bit") == Part("policy", 440, 40, 80)


def test_a_rollout_holds_the_larger_of_sampling_and_scoring():
    """Two layers of 32 numbers, 128 within, a vocabulary of 400; prompts of 30 tokens and responses of 20."""
    shape = tiny.gpt2().config
    rows, tokens = 6, 30 + 20
    states = (3 * 128 + 4 * 32) * 4
    logits = 4 * 21 * 400
    few, many = (
        config(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            response_length=20,
            local_rollout_forward_batch_size=n,
        )
        for n in (1, 64)
    )
    scored = 5 * logits + tokens * states
    sampled = 30 * states + tokens * 2 * 2 * 32 * 4
    assert ppo._logits(few, shape) == logits
    assert ppo._rollout(many, shape, 30, kept=False) == rows * scored  # no more rows than there are
    assert ppo._rollout(few, shape, 30, kept=False) == max(rows * sampled, scored) == rows * sampled
    assert ppo._rollout(few, shape, 30, kept=True) == max(rows * 30 * states, scored)


@pytest.mark.parametrize(("bf16", "fp16", "size"), [(False, False, 4), (True, False, 2), (False, True, 2)])
def test_keys_and_values_are_as_wide_as_they_are_computed(bf16, fp16, size):
    args = config(per_device_train_batch_size=3, gradient_accumulation_steps=1, response_length=20)
    args.bf16, args.fp16 = bf16, fp16  # of a GPU
    assert _keys_and_values(args, tiny.gpt2().config, 30) == 4 * 64 * 2 * 2 * 32 * size


def test_what_is_shared_is_counted_once():
    """With adapters the reference is the policy without them, and the reward model the critic's base."""
    names = []
    for lora in (None, copy.deepcopy(LORA)):
        roles = build_roles(config(), tiny.gpt2(), None, tiny.gpt2_reward(), None, lora)
        names.append([part.name for part in ppo._models(config(), roles, Sharding(0, 1))])
    assert names == [["policy", "critic", "reference", "reward"], ["policy", "critic"]]


@pytest.mark.parametrize(("processes", "steps"), [(1, 5), (3, 2)])
def test_a_step_takes_prompts_on_every_process(tmp_path, monkeypatch, processes, steps):
    """10 prompts, two on each process."""
    said = []
    monkeypatch.setattr(ppo, "verdict", lambda *_: None)
    monkeypatch.setattr(ppo.screen, "say", said.append)
    monkeypatch.setattr(ppo.Sharding, "of", lambda args: Sharding(0, processes))
    args = config(per_device_train_batch_size=2, gradient_accumulation_steps=1, response_length=4, num_train_epochs=1)
    args.output_dir = str(tmp_path)
    ppo.dry_run(args, tiny.llama().config, tiny.llama_reward().config, [5] * 10, "float32", None)
    assert any(f"{processes} processes, {steps} PPO steps" in line for line in said), said


def test_fp16_takes_what_bf16_takes(monkeypatch):
    monkeypatch.setattr(onednn_linear, "_FEWEST", 0)
    for lora in (False, True):
        assert parts_of(lora, fp16=True) == parts_of(lora, bf16=True) != parts_of(lora)
    args = config(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        response_length=4,
        local_rollout_forward_batch_size=1,
    )
    trained = build_roles(args, tiny.gpt2(), None, tiny.gpt2_reward(), None, None).trained
    found = {}
    for half in ("bf16", "fp16", ""):
        args.bf16, args.fp16 = half == "bf16", half == "fp16"
        shape = tiny.gpt2().config
        found[half] = ppo._rollout(args, shape, 90, kept=False), ppo._activations(args, trained, 1, 90)
    assert found["fp16"] == found["bf16"]
    assert found["fp16"][0] == found[""][0] / 2  # sampling, which holds no logits
    assert found["fp16"][1] != found[""][1]


@pytest.mark.parametrize(
    ("use_cpu", "stage", "lora", "more"),
    [
        (True, 0, False, ["layouts of weights"]),
        (True, 3, False, []),
        (True, 0, True, ["layouts of weights", "merged copy"]),
        (False, 0, True, ["copy to sample from", "keys and values", "weights, cast"]),
        (False, 3, False, []),
    ],
)
def test_what_there_is_beside_the_models(tmp_path, monkeypatch, use_cpu, stage, lora, more):
    seen = {}
    monkeypatch.setattr(ppo, "verdict", lambda parts, *_: seen.update({part.name: part for part in parts}))
    monkeypatch.setattr(ppo, "make_accelerator", lambda args: None)
    monkeypatch.setattr(ppo, "engine_name", lambda accelerator: "NO")
    monkeypatch.setattr(ppo, "available", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(ppo.Sharding, "of", lambda args: Sharding(stage, 1))
    monkeypatch.setattr(onednn_linear, "_FEWEST", 0)
    args = config(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        response_length=20,
        local_rollout_forward_batch_size=1,
        max_steps=1,
    )
    args.output_dir, args.use_cpu, args.bf16 = str(tmp_path), use_cpu, not use_cpu
    policy = tiny.llama()
    adapter = copy.deepcopy(LORA) if lora else None
    ppo.dry_run(args, policy.config, tiny.llama_reward().config, [60, 5], "float32", adapter)
    models = ["policy", "critic"] if lora else ["policy", "critic", "reference", "reward"]
    assert list(seen) == [*models, "activations, logits", *more]
    # On a GPU keys and values are counted by themselves, where they stay.
    kept = "keys and values" in more
    assert seen["activations, logits"].rollout == ppo._rollout(args, policy.config, 60, kept=kept)
    assert ppo._rollout(args, policy.config, 60, kept=True) < ppo._rollout(args, policy.config, 60, kept=False)
    if "merged copy" in more:  # of the policy, which has the adapters beside it
        assert seen["merged copy"] == Part("merged copy", saving=seen["policy"].weights)
    if "layouts of weights" in more:
        weights = sum(x.weight.numel() for x in policy.modules() if isinstance(x, torch.nn.Linear))
        adapters = seen["policy"].gradients if lora else 0
        assert seen["layouts of weights"].rollout == 4 * weights + adapters
    if kept:  # rows of a whole rollout, 6, in a cache of 8 times 128
        assert seen["keys and values"].weights == 8 * 128 * 2 * 2 * 16 * 2


def test_layouts_are_in_the_precision_of_the_run(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(ppo, "verdict", lambda parts, *_: seen.update({part.name: part.rollout for part in parts}))
    monkeypatch.setattr(ppo, "make_accelerator", lambda args: None)
    monkeypatch.setattr(ppo, "engine_name", lambda accelerator: "NO")
    monkeypatch.setattr(onednn_linear, "_FEWEST", 0)
    found = {}
    for bf16, there in ((False, torch.float32), (True, torch.bfloat16), (True, torch.float32)):
        monkeypatch.setattr(ppo, "available", lambda dtype, there=there: dtype == there)
        seen.clear()
        args = config(per_device_train_batch_size=1, response_length=4, max_steps=1)
        args.output_dir, args.bf16 = str(tmp_path), bf16
        ppo.dry_run(args, tiny.llama().config, tiny.llama_reward().config, [5], "float32", None)
        found[bf16, there] = seen.get("layouts of weights")
    assert found[True, torch.bfloat16] == found[False, torch.float32] / 2 > 0
    assert found[True, torch.float32] is None


def test_each_model_has_to_have_the_positions(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(ppo, "verdict", lambda *_: None)
    monkeypatch.setattr(ppo.screen, "say", said.append)
    args = config(per_device_train_batch_size=1, response_length=20, max_steps=1)
    args.output_dir = str(tmp_path)
    policy, reward = tiny.llama().config, tiny.llama_reward().config
    policy.name_or_path, reward.name_or_path = "one/policy", "one/reward"
    ppo.dry_run(args, policy, reward, [30], "float32", None)
    assert all(any(name in line for line in said) for name in ("one/policy", "one/reward"))
    reward.max_position_embeddings = 40
    with pytest.raises(UserError, match="reward model"):
        ppo.dry_run(args, policy, reward, [30], "float32", None)
    policy.max_position_embeddings = 40
    with pytest.raises(UserError) as error:
        ppo.dry_run(args, policy, reward, [30], "float32", None)
    assert "reward model" not in str(error.value)
