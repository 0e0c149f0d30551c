"""A script written for TRL 1.12's PPOTrainer runs once its import line is changed."""

import json
import os
from pathlib import Path

import pytest
import tiny
import workers
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
# The steps of TRL 1.12's example for PPO, as a user's own script: argument parser, a pad token added without
# resizing, rows tokenised by the script itself, a reference of its own unless LoRA is asked for.
SCRIPT = """
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, ScriptArguments, get_peft_config
from rlhf import PPOConfig, PPOTrainer  # was: from trl.experimental.ppo import PPOConfig, PPOTrainer

if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    script, training, model = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    def scorer():
        return AutoModelForSequenceClassification.from_pretrained(training.reward_model_path, num_labels=1)

    value, reward = scorer(), scorer()
    policy = AutoModelForCausalLM.from_pretrained(training.sft_model_path)
    peft_config = get_peft_config(model)
    reference = None if peft_config else AutoModelForCausalLM.from_pretrained(training.sft_model_path)
    rows = load_dataset(script.dataset_name, split=script.dataset_train_split)

    def prepare(part):
        return part.map(
            lambda batch: {"input_ids": tokenizer(batch["prompt"], padding=False)["input_ids"]},
            batched=True,
            remove_columns=part.column_names,
            num_proc=training.dataset_num_proc,
        )

    with PartialState().local_main_process_first():
        train, held_out = (prepare(rows.select(part)) for part in (range(8), range(8, 12)))
    trainer = PPOTrainer(
        args=training,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(training.output_dir)
    trainer.generate_completions()
"""


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_script_for_trl_runs_with_its_import_changed(tmp_path, lora):
    tiny.llama().save_pretrained(tmp_path / "sft")
    tiny.chat_tokenizer().save_pretrained(tmp_path / "sft")
    tiny.llama_reward().save_pretrained(tmp_path / "reward")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"prompt": f"tell me of {i}", "topic": "x"}) for i in range(12)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "ppo.py").write_text(SCRIPT)
    flags = {
        "dataset_name": tmp_path / "data",
        "dataset_train_split": "train",
        "output_dir": tmp_path / "out",
        "model_name_or_path": tmp_path / "sft",
        "sft_model_path": tmp_path / "sft",
        "reward_model_path": tmp_path / "reward",
        "learning_rate": 3e-4,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "total_episodes": 8,
        "response_length": 5,
        "missing_eos_penalty": 1.0,
        "stop_token": "eos",
        "use_cpu": True,
    }
    command = ["ppo.py", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    command += ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"] if lora else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    result = workers.python(command, environment, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    out = tmp_path / "out"
    assert [json.loads(line)["episode"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [4, 8]
    assert len((out / "completions.jsonl").read_text().splitlines()) == 4
    AutoModelForCausalLM.from_pretrained(out)
