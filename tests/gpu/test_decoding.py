"""Decoding by captured CUDA graphs draws the tokens that decoding kernel by kernel does."""

import json

import pytest
from tiny_ppo import metrics, timeless, trainer


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_captured_and_eager_decoding_are_one(tmp_path, place, only_on_a_gpu, family, kind):
    rows = [{"prompt": "good morning to you all"[: 3 * i + 1]} for i in range(8)]
    found = {}
    for captured in (False, True):
        folder = tmp_path / str(captured)
        # At rate 0 a last bit of one step cannot decide the next one's tokens.
        options = place | {"max_steps": 2, "response_length": 40, "learning_rate": 0.0, "cuda_graphs": captured}
        trainer(folder, family, lora=kind == "lora", rows=rows, num_sample_generations=2, **options).train()
        samples = [json.loads(line)["response"] for line in (folder / "samples.jsonl").read_text().splitlines()]
        found[captured] = (samples, [timeless(row)["objective/response_length"] for row in metrics(folder)])
    assert found[True] == found[False]
    assert found[True][0]
