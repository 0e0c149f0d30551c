"""TRL's model settings reach the models, or are refused: no field of ModelConfig is taken and ignored."""

import json
from dataclasses import fields

import bitsandbytes as bnb
import pytest
import tiny
import torch
import yaml
from tiny_recipe import PROMPTS
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import ModelConfig

from rlhf.cli import train_ppo, train_reward
from rlhf.cli.script import run_script
from rlhf.data.chat import prepare_tokenizer
from rlhf.errors import UserError

# What a field is set to: by its name where its type does not say it.
VALUES = {
    "model_name_or_path": "hub/other",
    "dtype": "bfloat16",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_quant_storage": "bfloat16",
    "lora_task_type": "SEQ_CLS",
}
BY_TYPE = {bool: "true", int: "7", float: "0.25"}
PPO = ["--reward_model_path", "hub/reward", "--prompt_dataset", "demo:messages.jsonl", "--bf16", "false"]
PPO += [word for name in ("train_prompts", "evaluation_prompts") for word in (f"--{name}", str(PROMPTS[name]))]
REWARD = ["--dataset_name", "demo:preferences.jsonl", "--bf16", "false"]
REWARD += ["--max_examples", "8", "--validation_examples", "4", "--test_examples", "4"]


class StartError(Exception):
    """Raised where training would start."""


@pytest.fixture
def started_with(monkeypatch, tmp_path):
    """Run a script up to its trainer, without loading anything; returns what loaders and trainer were given."""
    monkeypatch.setattr("rlhf.ppo.trainer.make_accelerator", None)  # no run starts by mistake

    def run(module, *argv):
        seen = []

        def note(name, result=None):
            return lambda *args, **options: (seen.append((name, args, options)), result)[1]

        def stop(*args, **options):
            seen.append(("trainer", options.get("peft_config")))
            raise StartError

        monkeypatch.setattr(module, "load_tokenizer", note("tokenizer", prepare_tokenizer(tiny.gpt2_tokenizer())))
        monkeypatch.setattr(module, "fetch_model", note("files"))
        if module is train_ppo:
            for name in ("load_causal_lm", "load_reward_model"):
                monkeypatch.setattr(module, name, note(name))
            monkeypatch.setattr(module, "saved_tokenizer", note("reward tokenizer"))
            monkeypatch.setattr(module, "PPOTrainer", stop)
        else:
            monkeypatch.setattr(module, "new_reward_model", note("new_reward_model"))
            monkeypatch.setattr(module, "with_adapter", lambda _, config: stop(peft_config=config))
        where = ["--model_name_or_path", "hub/base", "--runs_dir", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["script", *where, *argv])
        with pytest.raises(StartError):
            module.main()
        return repr(seen)

    return run


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        (train_ppo, PPO),
        (train_ppo, [*PPO, "--use_peft", "true"]),
        (train_ppo, [*PPO, "--use_peft", "true", "--load_in_4bit", "true"]),
        (train_reward, REWARD),
        (train_reward, [*REWARD, "--use_peft", "true", "--load_in_4bit", "true"]),
    ],
    ids=["ppo", "ppo lora", "ppo qlora", "reward", "reward qlora"],
)
@pytest.mark.parametrize("name", [field.name for field in fields(ModelConfig)])
def test_every_field_of_model_config_has_an_effect_or_is_refused(started_with, module, argv, name):
    if f"--{name}" in argv or (module is train_reward and name == "lora_task_type"):
        pytest.skip("set already, or always SEQ_CLS, which TRL's users give")
    default = next(field.default for field in fields(ModelConfig) if field.name == name)
    value = VALUES.get(name) or BY_TYPE.get(type(default), "x")
    assert str(default) != value
    plain = started_with(module, *argv)
    assert plain == started_with(module, *argv)
    try:
        assert started_with(module, *argv, f"--{name}", value) != plain
    except UserError as error:
        refused = str(error)
        assert refused.startswith((f"{name}: expected ", "command line: "))  # TRL's own checks are the latter
        assert "\n" not in refused


def answer(main, monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", ["script", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    said = capsys.readouterr()
    return stop.value.code, said.out, [line for line in said.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def run_folder(tmp_path):
    """A base model, and the reward stage of a run as if trained; wide enough for whole blocks of 64 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 400, "max_position_embeddings": 256, "eos_token_id": 2, "pad_token_id": 2}
    base, reward = tmp_path / "base", tmp_path / "runs" / "tiny" / "reward"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(base)
    LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1)).save_pretrained(reward)
    for folder in (base, reward):
        tiny.chat_tokenizer().save_pretrained(folder)
    (reward / "run.json").write_text(json.dumps({"stage": "reward", "status": "done"}))
    settings = PROMPTS | {"model_name_or_path": str(base), "run": "tiny", "runs_dir": str(tmp_path / "runs")}
    settings |= {"per_device_train_batch_size": 2, "max_steps": 2, "num_ppo_epochs": 1, "response_length": 6}
    settings |= {"save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--attn_implementation", "nonsense"], 'found: Specified `attn_implementation="nonsense"` is not supported'),
        (["--attn_implementation", "flash_attention_2"], "FlashAttention2"),
        (["--model_revision", "nope"], "model_revision: leave it at main for a local model, found 'nope'"),
        (
            ["--load_in_4bit", "true"],
            "load_in_4bit: expected False, found True: train_ppo.py uses it only with",
        ),
        (["--lora_r", "4"], "lora_r: expected 16, found 4: train_ppo.py uses it only with use_peft true"),
        (["--use_peft", "true", "--load_in_4bit", "true", "--dtype", "auto"], "dtype: expected float32, bfloat16 or"),
        (
            ["--use_peft", "true", "--load_in_4bit", "true", "--bnb_4bit_quant_storage", "x"],
            "bnb_4bit_quant_storage: expected one of",
        ),
        (["--sft_model_path", "x"], "sft_model_path: use model_name_or_path instead; found 'x'"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_be_had_is_one_line(run_folder, monkeypatch, capsys, argv, words, dry):
    dry_run = ["--dry_run", "true"] if dry else []
    code, _, errors = answer(train_ppo.main, monkeypatch, capsys, "--config", run_folder / "ppo.yaml", *argv, *dry_run)
    assert code == 2
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.parametrize(
    ("argv", "layer"),
    [
        (["--load_in_4bit", "true", "--use_bnb_nested_quant", "true"], bnb.nn.Linear4bit),
        (["--load_in_8bit", "true"], bnb.nn.Linear8bitLt),
    ],
    ids=["4bit", "8bit"],
)
def test_train_ppo_trains_adapters_on_a_quantised_base(run_folder, monkeypatch, capsys, argv, layer):
    kept = {}
    build = train_ppo.PPOTrainer

    def keep(**options):
        kept["trainer"] = build(**options)
        return kept["trainer"]

    monkeypatch.setattr(train_ppo, "PPOTrainer", keep)
    argv = ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj", "--attn_implementation", "eager", *argv]
    code, said, errors = answer(train_ppo.main, monkeypatch, capsys, "--config", run_folder / "ppo.yaml", *argv)
    assert (code, errors) == (0, []), said
    trained = kept["trainer"].roles.trained
    for model in (trained.policy, trained.critic):
        assert sum(isinstance(module, layer) for module in model.modules()) == 14
        assert model.config._attn_implementation == "eager"
    folder = run_folder / "runs" / "tiny" / "ppo_lora"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert list(folder.rglob("adapter_model.safetensors"))
    assert json.loads((folder / "run.json").read_text())["config"]["load_in_4bit"] == ("--load_in_4bit" in argv)


def test_memory_of_a_quantised_base_is_not_estimated(run_folder, monkeypatch, capsys):
    argv = ["--use_peft", "true", "--load_in_4bit", "true", "--dry_run", "true"]
    code, _, errors = answer(train_ppo.main, monkeypatch, capsys, "--config", run_folder / "ppo.yaml", *argv)
    assert code == 2
    assert errors[0].startswith("error: --dry_run does not support load_in_4bit")


def test_the_dry_run_takes_the_dtype_that_the_weights_have(run_folder, monkeypatch, capsys):
    argv = ["--config", run_folder / "ppo.yaml", "--dry_run", "true", "--dtype"]
    said = [answer(train_ppo.main, monkeypatch, capsys, *argv, dtype) for dtype in ("auto", "float32", "bfloat16")]
    tables = [[line for line in out.splitlines() if line.startswith(("policy", "critic"))] for _, out, _ in said]
    assert [code for code, _, _ in said] == [0, 0, 0]
    assert tables[0] == tables[1]
