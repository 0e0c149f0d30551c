"""bitsandbytes on the CPU: adapters on a 4-bit base, and AdamW with an 8-bit state."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from tiny_ppo import LORA, PROMPTS, metrics, timeless, trainer
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from rlhf.errors import UserError
from rlhf.models.quantised import prepare_4bit
from rlhf.reward.scoring import score_tokens

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def config(**options):
    """Wide enough for whole blocks of 64 weights, which share a scale."""
    return LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.1,
        **options,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config(num_labels=1)).save_pretrained(folder / "reward")
    return folder


def load_policy(folders):
    return AutoModelForCausalLM.from_pretrained(folders / "policy", quantization_config=NF4)


def load_reward(folders):
    return AutoModelForSequenceClassification.from_pretrained(folders / "reward", quantization_config=NF4)


def layers(model):
    found = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(found) == 14
    return found


def base_weights(model):
    """Every number a 4-bit layer is decoded from: the codes, and the scale of each block."""
    return {
        name: (layer.weight.detach().clone(), layer.weight.quant_state.absmax.clone())
        for name, layer in layers(model).items()
    }


class Gradients(TrainerCallback):
    """The gradients that each optimizer step is taken with."""

    def __init__(self):
        self.steps, self.parts = [], {}

    def on_pre_optimizer_step(self, args, state, control, **shown):
        self.steps.append(
            {
                (role, name): None if parameter.grad is None else parameter.grad.clone()
                for role, part in self.parts.items()
                for name, parameter in part.named_parameters()
                if parameter.requires_grad
            }
        )


def qlora(folder, folders, repacks=False, **options):
    """repacks: as on a CPU with avx512_bf16, where layers go over to another layout at a pass without gradient."""
    policy, reward = load_policy(folders), load_reward(folders)
    if repacks:
        for layer in [*layers(policy).values(), *layers(reward).values()]:
            assert "support_avx512bf16_for_cpu" in vars(layer)  # still bitsandbytes' name for it
            layer.support_avx512bf16_for_cpu = True
    gradients = Gradients()
    given = {"model": policy, "reward_model": reward, "peft_config": LORA, "callbacks": [gradients]}
    given["eval_dataset"] = PROMPTS[:2]
    run = trainer(folder, given=given, gradient_checkpointing=True, max_steps=2, learning_rate=1e-2, **options)
    gradients.parts = {"policy": run.roles.trained.policy, "critic": run.roles.trained.critic}
    return run, gradients


@pytest.mark.parametrize("repacks", [False, True], ids=["plain", "avx512_bf16"])
def test_qlora_trains_every_adapter_and_leaves_the_base(tmp_path, folders, repacks):
    run, gradients = qlora(tmp_path, folders, repacks, eval_on_start=True)
    policy, critic = run.roles.trained.policy, run.roles.trained.critic
    before = {role: base_weights(part) for role, part in gradients.parts.items()}
    run.train()

    assert len(gradients.steps) == 4  # 2 PPO steps of 2 passes
    # B starts at 0, so A has a gradient from the second optimizer step on; the third follows another generation.
    for step in gradients.steps[1:]:
        adapters = {key: gradient for key, gradient in step.items() if "lora_" in key[1]}
        assert len(adapters) == 2 * 2 * 2 * 2  # policy and critic, layers, projections, A and B
        assert [key for key, gradient in step.items() if gradient is None] == []
        assert [key for key, gradient in adapters.items() if not gradient.any()] == []
    for role, part in gradients.parts.items():
        after = base_weights(part)
        for name, numbers in before[role].items():
            for old, new in zip(numbers, after[name], strict=True):
                assert old.dtype == new.dtype
                assert torch.equal(old, new), f"{role} {name}"
    rows = metrics(tmp_path)
    # The reference is the policy with its adapter off.
    assert abs(rows[0]["objective/kl"]) < 1e-5
    assert rows[0]["objective/kl_exact_per_token"] < 1e-6
    assert rows[1]["objective/kl_exact_per_token"] > 1e-6
    assert run.roles.reference.model is policy
    assert run.roles.reward.model is critic


def test_a_saved_adapter_loads_onto_the_4_bit_base(tmp_path, folders):
    run, _ = qlora(tmp_path, folders)
    run.train()
    run.save_model(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("model*.safetensors"))  # a merge would round once more
    policy = run.roles.trained.policy.eval()
    base = load_policy(folders)
    prepare_4bit("base", base)  # the same layout, so the same kernels: on avx512_bf16 the other one rounds to bfloat16
    again = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert_close(again(ids).logits, policy(ids).logits, rtol=0, atol=0)
        with policy.disable_adapter():
            assert (policy(ids).logits - again(ids).logits).abs().max() > 1e-3  # the adapter says something


def test_layers_repacked_before_training_are_refused(tmp_path, folders):
    """bitsandbytes cannot bring them back without loss, so that this takes another load."""
    policy = load_policy(folders)
    for layer in layers(policy).values():
        layer.weight.quant_state.packing_format_for_cpu = True
    given = {"model": policy, "reward_model": load_reward(folders), "peft_config": LORA}
    with pytest.raises(UserError, match="load the 4-bit model again"):
        trainer(tmp_path, given=given)


@pytest.mark.parametrize("double", [False, True])
def test_a_resumed_run_goes_on_as_if_never_cut(tmp_path, folders, double):
    """The 4-bit layers load what they save; double: their scales are quantised, too."""
    quantization = copy.deepcopy(NF4)
    quantization.bnb_4bit_use_double_quant = double
    rows = {}
    for name, steps, resume in (("whole", 3, None), ("cut", 2, None), ("cut", 3, True)):
        policy = AutoModelForCausalLM.from_pretrained(folders / "policy", quantization_config=quantization)
        given = {"model": policy, "reward_model": load_reward(folders)}
        run = trainer(tmp_path / name, lora=True, given=given, max_steps=steps, save_strategy="steps", save_steps=2)
        run.train(resume_from_checkpoint=resume)
        rows[name] = metrics(tmp_path / name)
    assert len(rows["whole"]) == len(rows["cut"]) == 3
    assert timeless(rows["cut"][2]) == timeless(rows["whole"][2])


def adapted(load, folders, folder, task):
    """A 4-bit model with an adapter that says something, loaded as PEFT loads one: for inference."""
    options = copy.deepcopy(LORA)
    options.task_type, options.init_lora_weights = task, False
    torch.manual_seed(2)
    get_peft_model(load(folders), options).save_pretrained(folder, save_embedding_layers=False)
    return PeftModel.from_pretrained(load(folders), folder)


def test_a_quantised_policy_with_an_adapter_goes_on_training_it(tmp_path, folders):
    policy = adapted(load_policy, folders, tmp_path / "adapter", TaskType.CAUSAL_LM)
    given = {"model": policy, "reward_model": load_reward(folders)}
    run = trainer(tmp_path / "run", given=given, max_steps=2, learning_rate=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in run.roles.trained.named_parameters()}
    run.train()
    rows = metrics(tmp_path / "run")
    assert rows[0]["objective/kl_exact_per_token"] < 1e-6 < rows[1]["objective/kl_exact_per_token"]
    changed = {n for n, parameter in run.roles.trained.named_parameters() if not torch.equal(parameter, before[n])}
    assert changed == {n for n in before if ".default" in n}  # the policy's adapter, the critic's, and its head


def test_a_quantised_reward_model_with_an_adapter_scores_as_given(tmp_path, folders):
    """Merged into 4 bits, as the critic starts, it would be rounded once more and say something else."""
    reward = adapted(load_reward, folders, tmp_path / "adapter", TaskType.SEQ_CLS)
    prepare_4bit("reward", reward)  # it is run here before the trainer sees it
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = score_tokens(reward.eval().get_base_model(), ids, mask)
    given = {"model": load_policy(folders), "reward_model": reward}
    run = trainer(tmp_path / "run", lora=True, given=given, max_steps=1)
    run.train()
    with torch.no_grad(), run.roles.reward.active():
        assert_close(score_tokens(run.roles.reward.base, ids, mask), expected, rtol=0, atol=0)


def test_what_cannot_be_trained_or_saved_is_refused(tmp_path, folders):
    with pytest.raises(UserError, match="model: pass a peft_config: quantised weights") as error:
        trainer(tmp_path, given={"model": load_policy(folders)})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="reward_model: pass a peft_config"):
        trainer(tmp_path, given={"reward_model": load_reward(folders)})
    policy = adapted(load_policy, folders, tmp_path / "adapter", TaskType.CAUSAL_LM)
    with pytest.raises(UserError, match="peft_config: leave it out"):
        trainer(tmp_path, lora=True, given={"model": policy})


def test_adamw_in_8_bits_trains_the_whole_model(tmp_path):
    run = trainer(tmp_path, optim="adamw_bnb_8bit", max_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in run.roles.trained.named_parameters()}
    run.train()
    assert isinstance(run.optimizer.optimizer, bnb.optim.AdamW)
    embedding = run.roles.trained.policy.get_input_embeddings().weight
    norm = run.roles.trained.policy.model.norm.weight
    state = run.optimizer.optimizer.state
    # Tensors of fewer than 4096 numbers keep a 32-bit state.
    assert embedding.numel() >= 4096 > norm.numel()
    assert {state[embedding][name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert state[norm]["state1"].dtype == torch.float32
    same = [name for name, parameter in run.roles.trained.named_parameters() if torch.equal(parameter, before[name])]
    assert same == []
    assert all(parameter.isfinite().all() for parameter in run.roles.trained.parameters())
