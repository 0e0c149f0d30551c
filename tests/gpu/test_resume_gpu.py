"""A run that was cut and resumed ends as one that was not."""

import pytest
from tiny_ppo import metrics, timeless, trainer


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_ends_as_one_that_was_not_cut(tmp_path, place, kind):
    rows = {}
    for name, steps, resume in (("whole", 4, None), ("cut", 2, None), ("cut", 4, True)):
        options = place | {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        run = trainer(tmp_path / name, lora=kind == "lora", **options)
        run.train(resume_from_checkpoint=resume)
        rows[name] = [timeless(row) for row in metrics(tmp_path / name)]
    assert [row["step"] for row in rows["cut"]] == [1, 2, 3, 4]
    # A GPU adds up some gradients in another order each time.
    for whole, cut in zip(rows["whole"], rows["cut"], strict=True):
        assert cut == pytest.approx(whole, rel=1e-3, abs=1e-4, nan_ok=True)
