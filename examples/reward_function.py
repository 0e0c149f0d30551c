"""PPO against two reward functions instead of a reward model.

python examples/reward_function.py --model your/policy
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf import PPOConfig, PPOTrainer

QUESTIONS = [("Why is the sky blue?", "light"), ("What is a comet?", "ice"), ("How do bees fly?", "wings")]


def mentions(completions, keyword, **columns):
    """1 where the response has the keyword of its row: a column of the data reaches the function by its name."""
    return [float(word in text) for text, word in zip(completions, keyword, strict=True)]


def brevity(completion_ids, **columns):
    """A little less for each token."""
    return [-0.01 * len(ids) for ids in completion_ids]


def main(argv=None):
    """Train on the questions above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: hub id or folder")
    parser.add_argument("--output_dir", default="out/reward_function")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=options.output_dir,
            max_steps=options.steps,
            global_batch_size=4,
            per_device_train_batch_size=4,
            response_length=32,
            reward_weights=[1.0, 0.5],
        ),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        model=AutoModelForCausalLM.from_pretrained(options.model),
        reward_model=[mentions, brevity],
        train_dataset=[{"prompt": question, "keyword": keyword} for question, keyword in QUESTIONS],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
