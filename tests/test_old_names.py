"""Old names of arguments are answered by the new ones; sizes that TRL takes are taken."""

import inspect

import pytest
import tiny
from tiny_ppo import trainer
from transformers import TrainerCallback

from rlhf import PPOTrainer
from rlhf.config import PPOConfig, RewardStageConfig
from rlhf.config.trl_names import RENAMED_ARGUMENTS
from rlhf.errors import UserError

CASES = [(method, name, new) for method, names in RENAMED_ARGUMENTS.items() for name, new in names.items()]


@pytest.mark.parametrize(("method", "name", "new"), CASES, ids=[f"{m} {n}" for m, n, _ in CASES])
def test_an_argument_of_an_older_trl_is_answered_by_the_new_one(method, name, new):
    call = getattr(PPOTrainer, method)
    with pytest.raises(UserError, match=rf"PPOTrainer.*: expected an argument of TRL 1\.12, found '{name}': use "):
        call(None, **{name: 1})
    assert name not in inspect.signature(call).parameters
    first = new.split(",")[0].split(" ")[0].rstrip(":")
    arguments = {*inspect.signature(call).parameters, *inspect.signature(PPOTrainer).parameters}
    assert first in arguments | {"nothing"} or new.endswith("of PPOConfig")


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (PPOConfig, "init_kl_coef", r"of TRL 1\.12, found 'init_kl_coef': use kl_coef$"),
        (PPOConfig, "evaluation_strategy", "of transformers 5, found 'evaluation_strategy': use eval_strategy$"),
        (RewardStageConfig, "torch_dtype", "of transformers 5, found 'torch_dtype': use dtype$"),
    ],
)
def test_an_old_name_of_a_setting_is_answered_by_whose_it_was(kind, name, words):
    with pytest.raises(UserError, match=rf"^{kind.__name__}: expected a field {words}"):
        kind(**{name: 1})


def test_the_signature_stays():
    assert list(inspect.signature(PPOTrainer).parameters)[:3] == ["args", "processing_class", "model"]


def test_a_model_in_the_tokenizers_place_is_named():
    with pytest.raises(UserError, match="found a model as second argument, as in an older TRL"):
        PPOTrainer(None, tiny.llama(), None, tiny.chat_tokenizer())


def test_four_mini_batches_of_one_micro_batch_are_four_optimizer_steps(tmp_path):
    steps = []

    class Count(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            steps.append(1)

    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_mini_batches": 4}
    rows = [{"prompt": f"say {i}"} for i in range(8)]
    trainer(tmp_path, rows=rows, max_steps=1, num_ppo_epochs=2, given={"callbacks": [Count]}, **sizes).train()
    assert len(steps) == 8
