"""Your own loop: you decide on the prompts and the scores of each step, the trainer learns.

python examples/own_loop.py --model your/policy
"""

import argparse
import random

from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf import PPOConfig, PPOTrainer


def main(argv=None):
    """Reward sums that are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: hub id or folder")
    parser.add_argument("--output_dir", default="out/own_loop")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint in output_dir")
    parser.add_argument("--batch", type=int, default=8, help="prompts per step")
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=options.output_dir,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            response_length=8,
            save_steps=5,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(options.model),
    )
    first = trainer.resume() if options.resume else 0  # the step of the newest checkpoint
    for step in range(first + 1, options.steps + 1):
        draw = random.Random(step)
        sums = [(draw.randrange(10), draw.randrange(10)) for _ in range(options.batch)]
        prompts = [f"{a} + {b} =" for a, b in sums]
        responses = trainer.generate(prompts)  # token ids
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = [float(str(a + b) in text) for (a, b), text in zip(sums, texts, strict=True)]
        row = trainer.step(prompts, responses, scores)
        print(f"step {step}: right {row['objective/scores']:.0%}, KL per token {row['objective/kl_per_token']:.4f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
