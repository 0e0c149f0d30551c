"""QLoRA: a policy in 4 bits, of which only adapters are trained.

python examples/qlora.py --model your/policy --reward_model your/reward-model
"""

import argparse

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from rlhf import PPOConfig, PPOTrainer

PROMPTS = ["Why is the sky blue?", "What is a comet?", "How do bees fly?", "Who was Ada Lovelace?"]


def main(argv=None):
    """Train on the prompts above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: hub id or folder")
    parser.add_argument("--reward_model", required=True, help="a sequence classifier with one label: hub id or folder")
    parser.add_argument("--output_dir", default="out/qlora")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    in_4bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=options.output_dir,
            max_steps=options.steps,
            global_batch_size=4,
            per_device_train_batch_size=4,
            response_length=32,
            learning_rate=1e-4,
            optim="adamw_torch",  # on a GPU, adamw_bnb_8bit needs a quarter of the memory
        ),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        model=AutoModelForCausalLM.from_pretrained(options.model, quantization_config=in_4bit),
        reward_model=AutoModelForSequenceClassification.from_pretrained(
            options.reward_model, num_labels=1, quantization_config=in_4bit
        ),
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
        ),
    )
    trainer.train()
    trainer.save_model()  # the adapter, with the name of its base: weights in 4 bits are not merged


if __name__ == "__main__":
    main()
