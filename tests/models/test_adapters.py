"""Models that come with adapters; a PEFT model made by hand is the judge."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from rlhf.errors import UserError
from rlhf.memory_estimate.account import read_config, reward_config
from rlhf.models import adapters
from rlhf.models.adapters import adapter_base, check_lora, with_adapters
from rlhf.models.load import load_causal_lm, load_reward_model, load_tokenizer, new_reward_model
from rlhf.models.lora import save_adapter
from rlhf.reward.tokenizers import saved_tokenizer

IDS = torch.arange(5, 29).reshape(2, 12)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def moved(model: Any, name: str = "default", **options: Any) -> PeftModel:
    given = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(model, LoraConfig(**given), adapter_name=name)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's folder with its tokenizer."""
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.chat_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(base: Path, kind: Any = AutoModelForCausalLM, name: str = "default", **options: Any) -> tuple[Path, Tensor]:
    """The folder of an adapter on the base, in the layout of the hub, and what it computes."""
    model = moved(kind.from_pretrained(base, num_labels=1), name, **options)
    folder = base.parent / name
    save_adapter(model, folder)
    return folder, logits(model)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["plain", "head"])
def test_adapters_without_a_peft_model_get_one(base: Path, options: dict[str, Any]) -> None:
    first, _ = saved(base, name="first")
    second, expected = saved(base, name="second", **options)
    model = AutoModelForCausalLM.from_pretrained(base)
    for folder in (first, second):
        model.load_adapter(str(folder), folder.name)
    model.set_adapter("second")
    found = with_adapters("model", model)
    assert isinstance(found, PeftModel)
    assert (found.active_adapter, set(found.peft_config)) == ("second", {"first", "second"})
    assert torch.equal(logits(found), expected)
    save_adapter(found, base.parent / "again")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), base.parent / "again")
    assert torch.equal(logits(again), expected)
    assert with_adapters("model", found) is found


def test_a_peft_models_inside_and_merged_weights_are_taken_apart() -> None:
    model = moved(tiny.llama(), "sft")
    expected = logits(model)
    model.merge_adapter()
    found = with_adapters("model", model.get_base_model())
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=0)
    with found.disable_adapter():
        torch.testing.assert_close(logits(found), logits(tiny.llama()), atol=1e-5, rtol=0)


def test_the_adapter_that_computes_is_the_active_one() -> None:
    model = moved(tiny.llama(), "one")
    model.add_adapter("two", model.peft_config["one"])
    model.base_model.set_adapter("two")  # below PEFT, which goes on to name the first one
    assert with_adapters("model", model).active_adapter == "two"
    assert all(p.requires_grad == (".two." in name) for name, p in model.named_parameters() if "lora_" in name)


def test_a_model_without_adapters_is_left_alone() -> None:
    for model in (tiny.llama(), moved(tiny.llama()).merge_and_unload()):
        assert with_adapters("model", model) is model


def off() -> nn.Module:
    model = moved(tiny.llama())
    model.base_model.disable_adapter_layers()
    return model


def two_active() -> nn.Module:
    model = moved(tiny.llama(), "one")
    model.add_adapter("two", model.peft_config["one"])
    model.base_model.set_adapter(["one", "two"])
    return model


def without_configs() -> nn.Module:
    model = moved(tiny.llama()).get_base_model()
    del model.peft_config
    return model


def none_active() -> nn.Module:
    model = moved(tiny.llama())
    model.base_model.set_adapter([])
    return model


def partly_off() -> nn.Module:
    model = moved(tiny.llama())
    model.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)
    return model


TASK = {"task_type": "CAUSAL_LM"}
REFUSED = {
    "none": (none_active, "expected one active adapter, found none; merge"),
    "partly off": (partly_off, "expected its adapters on, found them off"),
    "off": (off, "expected its adapters on, found them off"),
    "two": (two_active, "expected one active adapter, found one, two"),
    "no config": (without_configs, "found layers with adapters and no peft_config"),
    "ia3": (
        lambda: get_peft_model(tiny.llama(), IA3Config(target_modules=["v_proj"], feedforward_modules=[], **TASK)),
        "expected a LoRA adapter, found IA3",
    ),
    "loha": (lambda: get_peft_model(tiny.llama(), LoHaConfig(target_modules=["v_proj"], **TASK)), "found LOHA"),
    "prompt": (
        lambda: get_peft_model(tiny.llama(), PromptTuningConfig(num_virtual_tokens=4, **TASK)),
        "found PROMPT_TUNING",
    ),
    "prefix": (
        lambda: get_peft_model(tiny.llama(), PrefixTuningConfig(num_virtual_tokens=4, **TASK)),
        "found PREFIX_TUNING",
    ),
    "alora": (
        lambda: moved(tiny.llama(), alora_invocation_tokens=[7, 8]),
        "expected a plain LoRA adapter, found one with alora_invocation_tokens",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_in_the_layers_is_refused(kind: str) -> None:
    build, message = REFUSED[kind]
    with pytest.raises(UserError, match=f"^value_model: .*{message}"):
        with_adapters("value_model", build())


OUTSIDE = ["alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias"]
OUTSIDE += ["megatron_config", "monteclora_config", "use_bdlora", "velora_config"]


@pytest.mark.parametrize("option", OUTSIDE)
def test_an_option_that_acts_outside_of_the_layers_is_refused(option: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], use_rslora=True)
    check_lora("value_model", config)
    setattr(config, option, [7])
    with pytest.raises(UserError, match=f"^value_model: expected a plain LoRA adapter, found one with {option}$"):
        check_lora("value_model", config)


def test_an_adapters_folder_is_a_policy(base: Path) -> None:
    folder, expected = saved(base, use_dora=True)
    torch.testing.assert_close(logits(load_causal_lm(str(folder))), expected, atol=1e-5, rtol=0)
    kept = load_causal_lm(str(folder), keep_adapter=True)
    assert isinstance(kept, PeftModel)
    assert torch.equal(logits(kept), expected)
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(base)).get_vocab()
    assert read_config(str(folder)).name_or_path == str(base)
    reward = new_reward_model(str(folder), tiny.chat_tokenizer())  # a reward model from an SFT adapter
    hidden = load_causal_lm(str(folder)).model(IDS).last_hidden_state
    torch.testing.assert_close(reward.eval().model(IDS).last_hidden_state, hidden, atol=1e-5, rtol=0)


def test_an_adapter_with_more_tokens_than_its_base(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(404)
    model = moved(model, modules_to_save=["embed_tokens", "lm_head"])
    save_adapter(model, base.parent / "more")
    torch.testing.assert_close(logits(load_causal_lm(str(base.parent / "more"))), logits(model), atol=1e-5, rtol=0)


def test_an_adapter_with_fewer_tokens_than_its_base(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(390)
    model = moved(model, modules_to_save=["embed_tokens", "lm_head"])
    save_adapter(model, base.parent / "fewer")
    torch.testing.assert_close(logits(load_causal_lm(str(base.parent / "fewer"))), logits(model), atol=1e-5, rtol=0)


def test_an_adapter_is_loaded_in_its_own_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])

    def ask(result: Any) -> Any:
        return lambda *_, revision=None, **__: asked.append(revision) or result

    monkeypatch.setattr(adapters.PeftConfig, "from_pretrained", ask(config))
    monkeypatch.setattr(adapters, "load_peft_weights", ask({}))
    monkeypatch.setattr(adapters.PeftModel, "from_pretrained", ask("loaded"))
    assert adapters.load_adapter(tiny.llama(), "our/adapter", "v2") == "loaded"
    assert asked == ["v2"] * 3


def test_an_adapter_that_lacks_weights_says_which(base: Path) -> None:
    folder, _ = saved(base)
    weights = load_file(folder / "adapter_model.safetensors")
    gone = next(name for name in weights if "layers.1" in name)
    del weights[gone]
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"expected all weights of the adapter, found: .*layers\.1\.self_attn"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize(
    ("task", "causal", "reward"), [("CAUSAL_LM", "CAUSAL_LM", None), ("SEQ_CLS", "SEQ_CLS", "SEQ_CLS")]
)
def test_an_adapters_task_stays_where_the_model_has_the_head_for_it(
    monkeypatch: pytest.MonkeyPatch, task: str, causal: str, reward: str | None
) -> None:
    monkeypatch.setattr(adapters, "load_peft_weights", lambda *_, **__: {})
    monkeypatch.setattr(adapters.PeftModel, "from_pretrained", lambda *_, config, **__: config.task_type)
    for model, expected in ((tiny.llama(), causal), (tiny.llama_reward(), reward)):
        config = LoraConfig(task_type=task, target_modules=["q_proj"])
        monkeypatch.setattr(adapters.PeftConfig, "from_pretrained", lambda *_, config=config, **__: config)
        assert adapters.load_adapter(model, "our/adapter") == expected


def test_an_adapters_folder_is_a_reward_model(base: Path) -> None:
    folder, expected = saved(base, AutoModelForSequenceClassification, task_type="SEQ_CLS")
    found = load_reward_model(str(folder))
    assert type(found) is LlamaForSequenceClassification
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=0)
    injected = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert torch.equal(logits(with_adapters("reward_model", injected)), expected)
    assert saved_tokenizer(str(folder)).get_vocab() == tiny.chat_tokenizer().get_vocab()
    assert reward_config(str(folder)).num_labels == 1


def test_an_adapter_without_its_head_or_its_weights_is_refused(base: Path) -> None:
    headless, _ = saved(base, AutoModelForSequenceClassification, task_type="FEATURE_EXTRACTION")
    with pytest.raises(UserError, match=r"expected a trained head with 1 label, found .*score\.weight"):
        load_reward_model(str(headless))
    (headless / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights in adapter_model\.safetensors, found none"):
        load_causal_lm(str(headless))
    for text, found in (("{}", "None"), ('{"base_model_name_or_path": ""}', "''")):
        (headless / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=f"expected the base model in base_model_name_or_path, found {found}"):
            load_causal_lm(str(headless))
    for text in ("[]", "not JSON"):
        (headless / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=r"adapter_config\.json: expected the config of an adapter, found "):
            load_causal_lm(str(headless))


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_gets_a_peft_model_keeps_its_mode_and_its_settings(base: Path, training: bool) -> None:
    folder, _ = saved(base, name="first")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(folder), "first")
    model.generation_config.eos_token_id = [2, 30]
    found = with_adapters("model", model.train(training))
    assert found.get_base_model().generation_config.eos_token_id == [2, 30]
    assert {module.training for module in found.modules()} == {training}


def test_a_hub_id_is_asked_for_an_adapter_and_no_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find(path: str, revision: str | None) -> str:
        asked.append((path, revision))
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "our/base"}')
        return str(tmp_path / "adapter_config.json")

    monkeypatch.setattr("rlhf.models.adapters.find_adapter_config_file", find)
    assert adapter_base("our/adapter", "v2") == adapter_base(str(tmp_path)) == "our/base"
    assert adapter_base("gpt2") is adapter_base("not/a/folder") is None
    assert asked == [("our/adapter", "v2"), (str(tmp_path), None)]
