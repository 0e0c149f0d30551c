"""A script for TRL 1.12's PPOTrainer; only the import of PPOConfig and PPOTrainer has changed.

python examples/trl_script_migrated.py --model_name_or_path your/policy --reward_model_path your/reward-model
"""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, get_peft_config

from rlhf import PPOConfig, PPOTrainer  # was: from trl.experimental.ppo import PPOConfig, PPOTrainer

PROMPTS = ["Why is the sky blue?", "What is a comet?", "How do bees fly?", "Who was Ada Lovelace?"]


def main(argv=None):
    """Train on the prompts above, tokenised as a script for TRL does it."""
    parser = HfArgumentParser((PPOConfig, ModelConfig))
    training_args, model_args = parser.parse_args_into_dataclasses(argv)
    name = model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    reward_path = training_args.reward_model_path
    value_model = AutoModelForSequenceClassification.from_pretrained(reward_path, num_labels=1)
    reward_model = AutoModelForSequenceClassification.from_pretrained(reward_path, num_labels=1)
    peft_config = get_peft_config(model_args)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    rows = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"])
    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(name),
        ref_model=None if peft_config else AutoModelForCausalLM.from_pretrained(name),
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    trainer.generate_completions()


if __name__ == "__main__":
    main()
