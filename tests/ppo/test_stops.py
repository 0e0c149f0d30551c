"""Where a response ends, and what follows from it."""

import pytest
import tiny
from tiny_ppo import metrics, trainer
from transformers import AutoModelForCausalLM

ROWS = [{"prompt": f"say {i}"} for i in range(32)]
OPTIONS = {"per_device_train_batch_size": 16, "response_length": 20, "temperature": 3.0, "max_steps": 1}


def constant(completion_ids, **_):
    return [1.0] * len(completion_ids)


def test_the_default_stops_at_every_eos_of_model_and_tokenizer(tmp_path):
    policy = tiny.llama()
    policy.generation_config.eos_token_id = [7, 9]
    run = trainer(tmp_path, given={"model": policy})
    assert run.collector.eos_ids == [run.processing_class.eos_token_id, 7, 9]
    run.save_model()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize("stop", [0, 7])
def test_the_penalty_follows_the_stop_token(tmp_path, stop):
    """Neither id is the tokenizer's EOS, 2; 0 is a falsy one."""
    options = OPTIONS | {"stop_token_id": stop, "missing_eos_penalty": 3.0, "max_steps": -1, "num_train_epochs": 8}
    run = trainer(tmp_path, rows=ROWS, reward=constant, learning_rate=0.0, num_ppo_epochs=1, **options)
    ended = []
    sample = run.collector.sample

    def keep(*args):
        found = sample(*args)
        responses = found.responses
        ended.append([response[-1] == stop for response in responses])
        assert all(stop not in response[:-1] for response in responses)
        assert all(len(response) == 20 for response, e in zip(responses, ended[-1], strict=True) if not e)
        return found

    run.collector.sample = keep
    run.train()
    assert 0 < sum(map(sum, ended)) < 256
    for row, flags in zip(metrics(tmp_path), ended, strict=True):
        assert row["val/num_eos_tokens"] == sum(flags)
        assert row["objective/eos_rate"] == sum(flags) / 32
        assert row["objective/penalised_scores"] == pytest.approx(1.0 - 3.0 * (1 - sum(flags) / 32))
        assert isinstance(row["eps"], float)
