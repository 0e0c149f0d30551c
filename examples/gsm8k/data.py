"""Write gsm8k.jsonl, the prompts of this recipe, from the hub's data set."""

from datasets import load_dataset

ASK = " Think step by step, and give the final answer after ####."

if __name__ == "__main__":
    rows = load_dataset("openai/gsm8k", "main", split="train")
    rows.map(lambda row: {"prompt": row["question"] + ASK}, remove_columns="question").to_json("gsm8k.jsonl")
