"""The trainer as a whole: what must hold at learning rate 0, what may change, what must not."""

import dataclasses
import hashlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny_ppo import FAMILIES, metrics, timeless, trainer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DataCollatorWithPadding

from rlhf.distributed.collectives import Shard
from rlhf.errors import UserError
from rlhf.ppo import trainer as module
from rlhf.ppo.trainer import PPOTrainer
from rlhf.storage.checkpoint import checkpoints


def digest(tensors):
    return {name: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for name, t in tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_leaves_reference_and_reward_alone(tmp_path, family):
    run = trainer(tmp_path, family)
    frozen = [run.roles.reference.model, run.roles.reward.model]
    before = [digest(model.state_dict().items()) for model in frozen]
    trained = digest(run.roles.trained.named_parameters())
    run.train()
    assert [digest(model.state_dict().items()) for model in frozen] == before
    after = digest(run.roles.trained.named_parameters())
    assert sum(after[name] != trained[name] for name in after) > 0.9 * len(after)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_adapters_and_the_critics_head_only(tmp_path, family):
    run = trainer(tmp_path, family, lora=True)
    before = digest(run.roles.trained.named_parameters())
    run.train()
    changed = {name for name, value in digest(run.roles.trained.named_parameters()).items() if value != before[name]}
    assert {name for name in changed if name.startswith("policy")} == {
        name for name in before if name.startswith("policy") and "lora_" in name
    }
    for name in changed - {name for name in changed if name.startswith("policy")}:
        assert "lora_" in name or "modules_to_save" in name
    assert all("q_proj" in name or "v_proj" in name for name in changed if "lora_" in name)


def test_every_prompt_once_an_epoch_and_one_row_a_step(tmp_path):
    run = trainer(tmp_path)
    seen = []
    collect = run.collect
    run.collect = lambda step, batch: (seen.append([p.prompt_id for p in batch]), collect(step, batch))[1]
    run.train()
    assert [len(batch) for batch in seen] == [4, 3, 4, 3]  # 7 prompts, batch 4, 2 epochs
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == [str(i) for i in range(7)]
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["episode"] == 14
    assert {"objective/kl", "objective/scores", "objective/rlhf_reward", "policy/approxkl_avg", "eps"} <= rows[0].keys()
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)


@pytest.mark.parametrize(
    ("family", "lora"),
    [("llama", False), ("llama", True), ("gpt2", False)],
    ids=["full", "lora", "tied embeddings"],  # gpt2's input and output embeddings are one tensor
)
def test_same_seed_same_run_and_resume_is_exact(tmp_path, family, lora):
    whole = trainer(tmp_path / "whole", family, lora=lora)
    whole.train()
    cut = trainer(tmp_path / "cut", family, lora=lora, save_strategy="steps", save_steps=2)
    record = cut.record

    def killed(step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return record(step, *rest)

    cut.record = killed
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer(tmp_path / "cut", family, lora=lora, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=checkpoints(tmp_path / "cut")[-1])
    for (name, a), (_, b) in zip(
        whole.roles.trained.named_parameters(), again.roles.trained.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    one, other = ([timeless(row) for row in metrics(tmp_path / run)] for run in ("whole", "cut"))
    assert one == other


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_saved_model_is_stock_and_says_the_same(tmp_path, lora):
    run = trainer(tmp_path, "gpt2", lora=lora, max_steps=2)
    run.train()
    run.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert_close(loaded(ids).logits, run.roles.trained.policy.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert loaded.generation_config.eos_token_id == tiny.gpt2().generation_config.eos_token_id


@pytest.mark.parametrize("seed", [0, 1])
def test_it_learns_what_the_reward_likes(tmp_path, seed):
    # A reward model that reads the last token only: its score is the token's embedding on one axis.
    reward = tiny.llama_reward()
    with torch.no_grad():
        for name, parameter in reward.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        reward.score.weight.zero_()
        reward.score.weight[0, 0] = 1.0
    rows = [{"prompt": f"{i}"} for i in range(64)]
    options = {"per_device_train_batch_size": 32, "num_ppo_epochs": 4, "response_length": 3, "max_steps": 15}
    options |= {"learning_rate": 1e-2, "kl_coef": 0.0, "vf_coef": 0.5, "cliprange_value": 10.0, "temperature": 1.0}
    run = trainer(tmp_path, reward=reward, rows=rows, seed=seed, **options)
    run.train()
    scores = [row["objective/scores"] for row in metrics(tmp_path)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5, scores


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "at least 1 prompt"),
        ([{"prompt": "a"}, {"text": "b"}], "row 1: expected column 'prompt'"),
        ([{"prompt": "a " * 50}], "row 0: expected 1 to 20 tokens"),
    ],
)
def test_wrong_rows_are_named(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, rows=rows, max_prompt_tokens=20)


def test_a_step_of_two_ranks_counts_the_responses_of_both(tmp_path):
    run = trainer(tmp_path, num_ppo_epochs=1, max_steps=2, kl_target=0.05)
    rollout = dataclasses.replace(run.collect(1, run.prompts[:4]), shard=Shard(8, 0, 2))
    counted = []
    run.kl_control.update = lambda kl, n: counted.append(n)
    run.health.check = lambda step, row, n: counted.append(n)
    row = run._finish_step(1, rollout)
    assert counted == [8, 8]
    assert (row["episode"], row["epoch"]) == (8, 8 / 7)
    assert row["eps"] * sum(value for name, value in row.items() if name.startswith("time/")) == pytest.approx(8)


def test_a_collator_that_would_not_be_used_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^data_collator: leave it out: function is not used, batches are built here$"):
        trainer(tmp_path, given={"data_collator": lambda rows: rows})
    trainer(tmp_path, given={"data_collator": DataCollatorWithPadding(tiny.chat_tokenizer())})


def test_the_bar_says_score_and_kl_per_token_and_goes_on_where_a_run_was(tmp_path):
    said = []

    class Bar(nullcontext):
        def set_postfix_str(self, text):
            said.append(text)

        def update(self):
            said.append("one more")

    run = trainer(tmp_path, given={"ref_model": tiny.llama(4)}, max_steps=3)
    assert (run._bar(2).n, run._bar(2).total) == (2, 3)
    run._bar = lambda first: Bar(Bar())
    run.train()
    rows = metrics(tmp_path)
    words = [f"reward {row['objective/scores']:.3f} kl {row['objective/kl_per_token']:.4f}" for row in rows]
    assert said == [text for one in words for text in (one, "one more")]


def test_checkpoints_of_a_run_before_are_set_aside_up_to_the_limit(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "set_later_aside", lambda *given: calls.append(given))
    run = trainer(tmp_path, max_steps=3, save_total_limit=2)
    run._begin(1)
    assert calls == [(tmp_path / "checkpoints", "step-", 1, 2)]


def test_a_run_without_prompts_has_none_to_scale_scores_by_and_none_on_its_card(tmp_path):
    given = {"train_dataset": None, "value_model": tiny.llama_reward()}
    run = trainer(tmp_path, given=given, max_steps=1, score_norm_samples=4)
    with pytest.raises(UserError, match=r"^score_norm_samples: pass a train_dataset to sample from$"):
        run._begin(0)
    assert run._card_facts()["data"] == {"prompts": {}}


@pytest.mark.parametrize(("mode", "longest"), [("colocate", 40), ("server", 256)])
def test_vllm_beside_the_trainer_has_positions_of_its_own(tmp_path, mode, longest):
    run = trainer(tmp_path)
    run.args.use_vllm, run.args.vllm_mode, run.args.vllm_max_model_length = True, mode, 40
    assert min(run._positions().values()) == longest


def test_the_first_step_is_left_out_of_the_throughput_if_there_are_others(monkeypatch):
    monkeypatch.setattr(module, "report", lambda work, _: [work])
    monkeypatch.setattr(module, "conditions", lambda *_: None)
    monkeypatch.setattr(module, "total", list)
    for work, counted in (([1, 2, 3], [[2, 3]]), ([1], [[1]]), ([], [])):
        assert PPOTrainer.throughput(SimpleNamespace(work=work, args=None, meter=None)) == counted
