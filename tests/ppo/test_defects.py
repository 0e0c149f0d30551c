"""Rows of docs/trl-defects.md that no other file holds."""

import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from test_rollout import config, rollout
from tiny_ppo import metrics, timeless, trainer
from torch import tensor
from transformers import Trainer

from rlhf.distributed import accelerator as setup
from rlhf.errors import UserError
from rlhf.memory_estimate.account import kept_bytes
from rlhf.models.load import load_reward_model
from rlhf.ppo.advantages import compute_advantages
from rlhf.ppo.trainer import PPOTrainer

RAGGED = [{"prompt": "a b c d e f g h"[: 2 * i + 1]} for i in range(6)]


def said(folder):
    return list(map(timeless, metrics(folder)))


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_a13_a_single_token_is_whitened_to_a_number(whiten_rewards):
    mask = tensor([[True, False, False], [False] * 3, [False] * 3])
    one = rollout(mask=mask, is_valid=tensor([True, False, False]))
    targets = compute_advantages(one, 0.1, config(whiten_rewards=whiten_rewards), lambda sums: sums)
    assert targets.advantages.isfinite().all()
    assert targets.returns.isfinite().all()
    assert (targets.advantages[~mask] == 0).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a5_checkpointing_keeps_less_of_policy_and_critic(tmp_path, family):
    ids = torch.full((4, 64), 7)
    kept = {}
    for on in (False, True):
        trained = trainer(tmp_path / str(on), family, gradient_checkpointing=on).roles.trained.train()
        for name, model in (("policy", trained.policy), ("critic", trained.critic)):
            kept[name, on] = kept_bytes(lambda model=model: model(ids).logits, model)
    for name in ("policy", "critic"):
        assert kept[name, True] < 0.5 * kept[name, False], kept


def test_a21_a_pad_token_beyond_the_vocabulary_reaches_no_model(tmp_path):
    tokenizer, policy = tiny.chat_tokenizer(), tiny.llama()
    policy.resize_token_embeddings(len(tokenizer))
    reward = tiny.llama_reward()
    reward.resize_token_embeddings(len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == policy.get_input_embeddings().num_embeddings
    given = {"processing_class": tokenizer, "model": policy}
    run = trainer(tmp_path, rows=RAGGED, reward=reward, given=given, local_rollout_forward_batch_size=1, max_steps=2)
    run.train()
    assert len(metrics(tmp_path)) == 2


def test_a22_a_tokenizer_that_pads_at_the_right_changes_nothing(tmp_path):
    for side in ("left", "right"):
        tokenizer = tiny.chat_tokenizer()
        tokenizer.padding_side = side
        trainer(tmp_path / side, rows=RAGGED, given={"processing_class": tokenizer}, max_steps=2).train()
    assert said(tmp_path / "left") == said(tmp_path / "right")


def test_a40_keys_that_a_reward_model_has_no_place_for_are_named(tmp_path):
    tiny.llama_reward().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"score.bias": torch.ones(1)}, file, metadata={"format": "pt"})
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        load_reward_model(str(tmp_path))
    finally:
        logger.removeHandler(handler)
    assert any("score.bias" in line and "UNEXPECTED" in line for line in said), said


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_c8_an_error_while_generating_leaves_no_trace(tmp_path, lora):
    options = {"rows": RAGGED, "lora": lora, "gradient_checkpointing": True, "max_steps": 2}
    whole, broken = (trainer(tmp_path / name, **options) for name in ("whole", "broken"))
    whole.train()

    def fail(*_):
        raise ZeroDivisionError

    handle = broken.roles.trained.policy_base.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        broken.generate(["a"])
    handle.remove()
    broken.train()
    assert said(tmp_path / "broken") == said(tmp_path / "whole")


def test_c10_the_first_fsdp_is_refused(monkeypatch):
    """Accelerate makes no FSDP on CPUs: a stand-in says that it has."""
    stand_in = SimpleNamespace(num_processes=1, distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(setup, "Accelerator", lambda **_: stand_in)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fsdp_version: expected 2, found 1"):
        setup.make_accelerator(config())


def test_c12_the_trainer_is_no_trainer_of_transformers():
    assert not issubclass(PPOTrainer, Trainer)
