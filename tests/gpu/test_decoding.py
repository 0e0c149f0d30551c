"""Compiled decoding draws the tokens that eager decoding does."""

import dataclasses
import json

import pytest
from tiny_ppo import metrics, timeless, trainer

from rlhf.config import PPOConfig

OPTION = "compile_decoding"  # of PPOConfig: a decode step by torch.compile and CUDA graphs


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_and_eager_decoding_are_one(tmp_path, place, only_on_a_gpu, family, kind):
    if OPTION not in {field.name for field in dataclasses.fields(PPOConfig)}:
        pytest.skip(f"this version decodes eagerly: PPOConfig has no {OPTION}")
    rows = [{"prompt": "good morning to you all"[: 3 * i + 1]} for i in range(8)]
    found = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        # At rate 0 a last bit of one step cannot decide the next one's tokens.
        options = place | {"max_steps": 2, "response_length": 40, "learning_rate": 0.0, OPTION: compiled}
        trainer(folder, family, lora=kind == "lora", rows=rows, num_sample_generations=2, **options).train()
        samples = [json.loads(line)["response"] for line in (folder / "samples.jsonl").read_text().splitlines()]
        found[compiled] = (samples, [timeless(row)["objective/response_length"] for row in metrics(folder)])
    assert found[True] == found[False]
    assert found[True][0]
