"""The same seed gives the same run, bit for bit, in processes that know nothing of one another."""

import pytest
from tiny_ppo import timeless
from workers import launch, rows

WORKER = """
run = trainer(**options)
run.train()
run.save_model()
"""


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_fresh_processes_end_with_the_same_bits(tmp_path, lora):
    found = []
    for name in ("one", "two"):
        launch(tmp_path / name, WORKER, {"lora": lora, "max_steps": 3, "num_mini_batches": 2}, fresh=True)
        said = list(map(timeless, rows(tmp_path / name / "metrics.jsonl")))
        found.append(((tmp_path / name / "model.safetensors").read_bytes(), said))
    assert len(found[0][1]) == 3
    assert found[0] == found[1]
