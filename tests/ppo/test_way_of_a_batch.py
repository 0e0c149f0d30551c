"""How many files a reader opens to follow one batch from prompts to optimizer step. It was 32 once."""

import sys
from itertools import groupby
from pathlib import Path

import pytest
from tiny_ppo import trainer
from transformers import TrainerCallback

import rlhf

ROOT = str(Path(rlhf.__file__).parent)


class Way(TrainerCallback):
    """The files of the second step's calls, in their order."""

    def __init__(self):
        self.files = []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            sys.setprofile(self.see)

    def on_step_end(self, args, state, control, **_):
        sys.setprofile(None)

    def see(self, frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ROOT):
            self.files.append(name.removeprefix(ROOT))


@pytest.mark.parametrize("lora", [False, True])
def test_a_batch_passes_through_few_files(tmp_path, lora):
    way, before = Way(), sys.getprofile()
    run = trainer(
        tmp_path, lora=lora, given={"callbacks": [way]}, max_steps=2, num_ppo_epochs=1, gradient_checkpointing=True
    )
    try:
        run.train()
    finally:
        sys.setprofile(before)
    outside = [name for name, _ in groupby(name for name in way.files if "/kernels/" not in name)]
    assert {"/ppo/rollout.py", "/ppo/learner.py", "/generation/decode.py", "/reward/scoring.py"} <= set(way.files)
    assert len(set(way.files)) <= 18, "\n".join(sorted(set(way.files)))
    assert len(outside) <= 123
