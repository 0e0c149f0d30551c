"""The same seed gives the same run, bit for bit, in processes that know nothing of one another."""

import pytest
from tiny_ppo import timeless
from workers import launch, rows

WORKER = """
del options["folder"]
for kind in ("full", "lora"):
    run = trainer(folder / kind, lora=kind == "lora", **options)
    run.train()
    run.save_model()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of two processes, each of which trains both kinds: starting one takes longer."""
    made = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for folder in made:
        launch(folder, WORKER, {"max_steps": 3, "num_mini_batches": 2}, fresh=True)
    return made


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_fresh_processes_end_with_the_same_bits(folders, kind):
    one, two = (list(map(timeless, rows(folder / kind / "metrics.jsonl"))) for folder in folders)
    assert len(one) == 3
    assert one == two
    first, second = ((folder / kind / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
