"""Who plays which role, what is trained, and at which rate."""

import copy

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_rollout import config
from tiny_ppo import LORA, metrics, trainer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models.actor_critic import ValueHead
from rlhf.models.lora import save_adapter
from rlhf.ppo import roles
from rlhf.ppo.roles import build_roles, check_apart, critic_from, describe_roles, parameter_lines


def moved_adapter(seed=3, **options):
    """A policy that an SFT left with an adapter."""
    config = copy.deepcopy(LORA)
    for name, value in options.items():
        setattr(config, name, value)
    model = get_peft_model(tiny.llama(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("options", [{}, {"ref_adapter_name": "sft"}], ids=["copy", "named"])
def test_a_policy_with_an_adapter_is_its_own_reference(tmp_path, options):
    policy = moved_adapter()
    if options:
        policy.add_adapter("sft", copy.deepcopy(LORA))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if ".sft." in name:
                    parameter.copy_(policy.get_parameter(name.replace(".sft.", ".default.")))
    run = trainer(tmp_path, given={"model": policy}, max_steps=2, learning_rate=1e-2, **options)
    before = state(policy)
    run.train()
    rows = metrics(tmp_path)
    assert abs(rows[0]["objective/kl"]) < 1e-5
    assert rows[0]["objective/kl_exact_per_token"] < 1e-6
    assert rows[1]["objective/kl_exact_per_token"] > 1e-6
    assert changed(policy, before) == {n for n in before if ".default." in n}


@pytest.mark.parametrize("inside", [False, True], ids=["PeftModel", "layers"])
def test_an_adapter_that_has_changed_its_base_trains_on_that_base(tmp_path, inside):
    """PiSSA takes the first adapter's product from the base; one more adapter must not do so again."""
    policy, ids = moved_adapter(init_lora_weights="pissa"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = policy.eval()(ids).logits
    run = trainer(tmp_path, given={"model": policy.get_base_model() if inside else policy}, max_steps=1)
    with torch.no_grad(), run.roles.reference.active() as reference:
        assert_close(reference.eval()(ids).logits, expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        assert_close(run.roles.trained.policy.eval()(ids).logits, expected, atol=1e-6, rtol=0)
    assert run.roles.trained.policy.active_peft_config.init_lora_weights == "pissa"  # PEFT loads it by that


def test_an_adapter_that_trains_biases_is_not_its_own_reference(tmp_path):
    with pytest.raises(UserError, match=r"^model: expected an adapter with bias 'none', found 'lora_only'"):
        trainer(tmp_path, given={"model": moved_adapter(bias="lora_only")})
    trainer(tmp_path, given={"model": moved_adapter(bias="lora_only"), "ref_model": tiny.llama()}, max_steps=1).train()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_trained_tokens_of_a_head_that_is_tied_to_the_embeddings(tmp_path, critic):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, trainable_token_indices=[5], target_modules=["c_attn"])
    run = trainer(tmp_path, "gpt2", given={"peft_config": config}, max_steps=1, learning_rate=1e-2, critic=critic)
    run.train()
    run.save_model()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = run.roles.trained.policy.eval()(ids).logits
        for model in (
            AutoModelForCausalLM.from_pretrained(tmp_path),
            PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "adapter").eval(),
        ):
            assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["default", "reference"])
def test_a_policy_that_transformers_gave_an_adapter_trains_it_and_saves_what_it_trained(tmp_path, name):
    tiny.llama().save_pretrained(tmp_path / "base")
    save_adapter(moved_adapter(), tmp_path / "sft")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy.load_adapter(str(tmp_path / "sft"), name)
    run = trainer(tmp_path / "run", given={"model": policy}, max_steps=2, learning_rate=1e-2)
    before, ids = state(policy), torch.tensor([[5, 6, 7]])
    run.train()
    assert metrics(tmp_path / "run")[0]["objective/kl_exact_per_token"] < 1e-6
    assert changed(policy, before) == {n for n in before if "lora_" in n and f".{name}." in n}
    run.save_model()
    with torch.no_grad():
        expected = run.roles.trained.policy.eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run")(ids).logits
        adapted = PeftModel.from_pretrained(tiny.llama(), tmp_path / "run" / "adapter").eval()(ids).logits
    assert_close(merged, expected, atol=1e-5, rtol=0)
    assert_close(adapted, expected, atol=1e-5, rtol=0)


def test_ppo_goes_on_with_an_adapter_on_c_attn_and_a_head_of_its_own(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "lm_head"], fan_in_fan_out=True)
    policy = get_peft_model(tiny.gpt2(), config, adapter_name="sft")
    run = trainer(tmp_path, "gpt2", given={"model": policy}, max_steps=2, learning_rate=1e-2)
    run.train()
    assert metrics(tmp_path)[0]["objective/kl_exact_per_token"] < 1e-6
    run.save_model()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = run.roles.trained.policy.eval()(ids).logits
        assert (expected - tiny.gpt2()(ids).logits).abs().max() > 1e-2
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("given", ["peft_config", "model", "reward_model"])
def test_other_adapters_than_lora_are_refused(tmp_path, given):
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    config_of_head = copy.deepcopy(config)
    config_of_head.task_type = "SEQ_CLS"
    build = {"peft_config": lambda: config, "model": lambda: get_peft_model(tiny.llama(), config)}
    build["reward_model"] = lambda: get_peft_model(
        tiny.llama_reward(), IA3Config(**config.to_dict() | {"task_type": "SEQ_CLS"})
    )
    with pytest.raises(UserError, match=f"^{given}.*: expected a LoRA adapter, found IA3"):
        trainer(tmp_path, given={given: build[given]()})


def test_a_fresh_adapter_on_a_policy_with_one_starts_from_it(tmp_path):
    policy = moved_adapter()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = policy.eval()(ids).logits
    run = trainer(tmp_path, lora=True, given={"model": policy}, max_steps=1)
    with torch.no_grad(), run.roles.reference.active() as reference:
        assert_close(reference.eval()(ids).logits, expected, atol=1e-5, rtol=0)
    run.train()
    assert abs(metrics(tmp_path)[0]["objective/kl"]) < 1e-5
    run.save_model()
    with torch.no_grad():
        trained = run.roles.trained.policy.eval()(ids).logits
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, trained, atol=1e-5, rtol=0)
    assert not (tmp_path / "adapter").exists()  # it belongs on a base that is on no disk


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_shared_critic_is_a_head_on_the_policy(tmp_path, family, lora):
    run = trainer(tmp_path, family, lora, critic="shared", max_steps=2)
    head = run.roles.trained.critic
    assert isinstance(head, ValueHead)
    before = state(run.roles.trained)
    run.train()
    moved = changed(run.roles.trained, before)
    assert {"critic.score.weight", "critic.score.bias"} <= moved
    if lora:
        assert all("lora_" in name for name in moved if name.startswith("policy"))
    assert [row["role"] for row in run.models] == ["policy", "critic", "reference", "reward"]


def test_a_value_model_of_ones_own(tmp_path):
    values = tiny.llama_reward(seed=9)
    run = trainer(tmp_path, given={"value_model": values}, max_steps=1)
    assert run.roles.trained.critic is values
    with pytest.raises(UserError, match="value_model: leave it out: critic: shared"):
        trainer(tmp_path, given={"value_model": values}, critic="shared")


def test_a_reference_of_ones_own(tmp_path):
    run = trainer(tmp_path, given={"ref_model": tiny.llama(seed=4)}, max_steps=1)
    run.train()
    assert metrics(tmp_path)[0]["objective/kl_exact_per_token"] > 1e-3


def on_the_trunk_of(other, seed=9):
    model = tiny.llama_reward(seed)
    model.model = other.model
    return model


def on_the_numbers_of(other):
    """Weights of its own, of which one is a view of the other model's."""
    model = tiny.llama(4)
    model.lm_head.weight.data = other.lm_head.weight.data[:]
    return model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("names", "make"),
    [
        ("ref_model model", lambda: dict.fromkeys(("model", "ref_model"), tiny.llama())),
        ("ref_model model", lambda: (lambda m: {"model": m, "ref_model": m.get_base_model()})(moved_adapter())),
        ("reward_model value_model", lambda: dict.fromkeys(("value_model", "reward_model"), tiny.llama_reward())),
        (
            "reward_model value_model",
            lambda: (lambda m: {"value_model": m, "reward_model": [tiny.llama_reward(8), on_the_trunk_of(m)]})(
                tiny.llama_reward()
            ),
        ),
        ("reward_model model", lambda: (lambda m: {"model": m, "reward_model": on_the_trunk_of(m)})(tiny.llama())),
        ("ref_model model", lambda: (lambda m: {"model": m, "ref_model": on_the_numbers_of(m)})(tiny.llama())),
        ("value_model model", lambda: (lambda m: {"model": m, "value_model": on_the_trunk_of(m)})(tiny.llama())),
    ],
)
def test_what_is_trained_shares_no_weight_with_another_role(tmp_path, names, make, lora):
    one, other = names.split()
    with pytest.raises(
        UserError, match=f"^{one}: it shares weights with {other}, and training would change both; pass"
    ):
        trainer(tmp_path, lora=lora, given=make())


def test_two_frozen_roles_may_share_weights(tmp_path):
    judge = tiny.llama_reward()
    trainer(tmp_path, given={"reward_model": [judge, judge]})


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_critic_warm_up_leaves_the_policy_as_it_is(tmp_path, lora):
    run = trainer(tmp_path, lora=lora, critic_warmup_steps=2, max_steps=3, weight_decay=0.1)
    before, seen = state(run.roles.trained), []
    record = run.record

    def look(step, *rest):
        seen.append({name.split(".")[0] for name in changed(run.roles.trained, before)})
        return record(step, *rest)

    run.record = look
    run.train()
    assert seen == [{"critic"}, {"critic"}, {"critic", "policy"}]


def test_the_critic_has_its_own_learning_rate(tmp_path):
    run = trainer(tmp_path, critic_learning_rate=0.5, max_steps=1)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in run.roles.trained.policy.parameters()} == {1e-3}
    assert {rates[id(p)] for p in run.roles.trained.critic.parameters()} == {0.5}


def test_what_is_trained_is_printed(tmp_path, capsys):
    run = trainer(tmp_path, lora=True, max_steps=1, disable_tqdm=False)
    run.train()
    printed = capsys.readouterr().out
    # Rank 2 on q (32x32) and v (32x16), 2 layers: 2*(64+64) + 2*(64+32) = 448; the head of 32 on the critic's.
    assert "policy: LlamaForCausalLM" in printed
    assert "448 trained" in printed
    assert "480 trained" in printed
    assert parameter_lines(run.models)[2] == "reference: LlamaForCausalLM, adapter off, 0 parameters, 0 trained"


def test_dropout_is_off_in_train_mode_but_that_of_adapters(tmp_path):
    def on(trained):
        return {m.p for m in trained.train().modules() if isinstance(m, torch.nn.Dropout) and m.training}

    assert on(trainer(tmp_path, "gpt2").roles.trained) == set()
    config = LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"])
    assert on(trainer(tmp_path, "gpt2", given={"peft_config": config}).roles.trained) == {0.25}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_learning_computes_as_sampling_whatever_a_config_calls_its_dropout(tmp_path, lora, checkpointing):
    options = {"learning_rate": 0.0, "max_steps": 1, "critic": "shared", "response_length": 12}
    run = trainer(tmp_path, lora=lora, given={"model": tiny.opt()}, gradient_checkpointing=checkpointing, **options)
    run.train()
    (row,) = metrics(tmp_path)
    assert row["val/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert row["policy/clipfrac_avg"] == 0


def test_gradient_checkpointing_reaches_policy_and_critic_and_changes_nothing(tmp_path):
    results, calls = [], {}
    for on in (False, True):
        run = trainer(tmp_path / str(on), gradient_checkpointing=on, max_steps=2)
        for name in ("policy", "critic"):
            layer = getattr(run.roles.trained, name).base_model.layers[1].mlp
            seen = calls[name, on] = []
            layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        run.train()
        results.append(state(run.roles.trained))
    for name in ("policy", "critic"):
        assert calls[name, True].count(True) == 2 * calls[name, False].count(True)
        assert calls[name, True].count(False) == calls[name, False].count(False)
    for name, value in results[0].items():
        assert_close(results[1][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["model_adapter_name", "ref_adapter_name"])
def test_an_adapter_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(UserError, match="expected an adapter 'missing', found default"):
        trainer(tmp_path, given={"model": moved_adapter()}, **{name: "missing"})


def test_the_adapter_that_is_trained_is_no_reference(tmp_path):
    with pytest.raises(UserError, match=r"^ref_adapter_name: expected another adapter than the one that is trained"):
        trainer(tmp_path, given={"model": moved_adapter()}, ref_adapter_name="default")


def test_a_value_model_of_ones_own_leaves_the_rewards_to_the_reward_model(tmp_path):
    reward, value = tiny.llama_reward(seed=1), tiny.llama_reward(seed=2)
    ids, attention = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        expected = reward.eval()(ids, attention_mask=attention).logits
    run = trainer(tmp_path, lora=True, reward=reward, given={"value_model": value})
    assert not run.roles.reward.shared
    with torch.no_grad(), run.roles.reward.active() as model:
        assert_close(model.eval()(ids, attention_mask=attention).logits, expected)


def test_dropout_of_adapters_is_on_while_learning_and_nowhere_else(tmp_path):
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    options = {"learning_rate": 0.0, "num_ppo_epochs": 1, "max_steps": 2, "critic": "shared"}
    run = trainer(tmp_path, given={"peft_config": config}, **options)
    layer = next(m for m in run.roles.trained.modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.5)
    on = []
    layer.register_forward_pre_hook(lambda *_: on.append((layer.training, torch.is_grad_enabled())))
    run.train()
    assert {training for training, learns in on if learns} == {True}
    assert {training for training, learns in on if not learns} == {False}
    assert metrics(tmp_path)[1]["val/ratio_var"] > 0


@pytest.mark.parametrize(
    ("policy", "reference", "computes"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),  # as the policy's masters
        (torch.bfloat16, torch.float16, torch.float16),  # as the user loaded it
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_reference_loaded_as_the_policy_computes_as_the_policy(policy, reference, computes):
    roles = build_roles(config(), tiny.llama().to(policy), tiny.llama().to(reference), tiny.llama_reward(), None, None)
    assert roles.trained.policy.dtype == torch.float32
    assert roles.reference.model.dtype == computes


def test_the_adapter_that_is_the_reference_is_named():
    roles = build_roles(config(), moved_adapter(), None, None, None, None)
    lines = parameter_lines(describe_roles(roles))
    assert lines[2] == "reference: LlamaForCausalLM, adapter reference, 0 parameters, 0 trained"


def test_weights_in_common_say_what_one_may_have_meant():
    model, judge = tiny.llama(), tiny.llama_reward()
    for trained, frozen, words in (
        ({"model": model}, {"ref_model": model}, ", or leave it out: the reference then is the policy as it is now"),
        (
            {"value_model": judge},
            {"reward_model": judge},
            ", or leave value_model out: the critic then starts as a copy of the reward model",
        ),
        ({"model": model, "value_model": model}, {}, ""),
    ):
        with pytest.raises(UserError) as refused:
            check_apart(trained, list(frozen.items()))
        assert str(refused.value).endswith("training would change both; pass a copy (copy.deepcopy)" + words)


def test_what_no_critic_can_be_made_of_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"^value_model: expected a model with a head 'score', found LlamaForCausalLM$"):
        build_roles(config(), tiny.llama(), None, None, tiny.llama(4), None)
    with pytest.raises(UserError, match=r"^value_model: .* transformers has no critic for a MambaForCausalLM$"):
        critic_from(tiny.mamba())
    monkeypatch.setattr(roles, "is_quantised", lambda _: True)
    with pytest.raises(UserError, match=r"^value_model: .*: a quantised policy cannot be copied$"):
        critic_from(tiny.llama())
    for is_own, name in ((True, "value_model"), (False, "reward_model")):
        with pytest.raises(UserError, match=rf"^{name}: pass a peft_config: the quantised weights of the critic"):
            roles._full_critic(tiny.llama(), tiny.llama_reward(), is_own)


def test_sharded_weights_are_asked_for(monkeypatch):
    monkeypatch.setattr(roles, "is_sharded", lambda _: True)
    reward, other = tiny.llama_reward(), tiny.llama(4)
    for given, name in (((None, reward, None), "ref_model"), ((other, reward, None), "value_model")):
        with pytest.raises(UserError, match=f"^pass {name} explicitly: ZeRO-3 weights cannot be copied$"):
            build_roles(config(), tiny.llama(), *given, None)
    build_roles(config(), tiny.llama(), other, reward, tiny.llama_reward(5), None)


def test_a_reference_of_ones_own_needs_no_adapter():
    other = tiny.llama(4)
    found = build_roles(config(ref_adapter_name="default"), moved_adapter(), other, tiny.llama_reward(), None, None)
    assert found.reference.model is other
