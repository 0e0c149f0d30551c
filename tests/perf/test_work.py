"""Tokens, padding and share of the limit: as the models themselves saw it, and by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig
from test_metrics_row import ARGS, Rank, learned, targets
from test_rollout import rollout
from tiny_ppo import metrics, trainer

from rlhf.models.actor_critic import FrozenRole, ValueHead
from rlhf.models.kernels.attention import use_cpu_attention
from rlhf.models.lora import add_lora
from rlhf.perf import work as module
from rlhf.perf.work import Flops, Meter, StepPasses, TextPasses, Work, rates, total
from rlhf.ppo import metrics as rows
from rlhf.ppo.trainer import PhaseTimer

RAGGED = [{"prompt": "a b c d e f g h i j k l m n o p"[: 1 + 5 * i]} for i in range(6)]
PHASES = ("generate", "score", "learn")


def watched(run):
    """The trainer, and columns times rows that each model saw in each phase of each step."""
    now, seen = [], []
    collect = run.collect

    class Phases(PhaseTimer):
        def __call__(self, phase):
            now.append(phase)
            return super().__call__(phase)

    def step(*args):
        seen.append(dict.fromkeys(PHASES, 0))
        return collect(*args)

    run.timer, run.collect = Phases(run.accelerator.device), step
    models = [run.roles.trained.policy, run.roles.trained.critic, run.roles.reference.model, run.roles.reward.model]
    inner = {id(m): m for m in (getattr(m, "get_base_model", lambda m=m: m)() for m in models if hasattr(m, "config"))}

    def saw(_, args, given):
        ids = args[0] if args else given["input_ids"]
        seen[-1][now[-1]] += ids.numel()

    for model in inner.values():
        model.base_model.register_forward_pre_hook(saw, with_kwargs=True)
    return run, seen


@pytest.mark.parametrize(
    "options",
    [
        {"lora": False},
        {"lora": True},
        {"lora": False, "critic": "shared", "micro_batch_tokens": 30},
        {"lora": False, "target_kl": 1e-6, "num_mini_batches": 2},  # updates end early
        {"lora": True, "family": "gpt2", "eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["full", "lora", "shared", "target_kl", "evaluated"],
)
def test_what_is_counted_is_what_the_models_saw(tmp_path, options):
    given = {"eval_dataset": RAGGED} if "eval_strategy" in options else {}
    options = {
        "rows": RAGGED,
        "response_length": 12,
        "temperature": 3.0,
        "local_rollout_forward_batch_size": 2,
    } | options
    run, seen = watched(trainer(tmp_path, given=given, **options))
    evaluate = run.evaluate

    def unseen(*args):
        before = [dict(step) for step in seen]
        found = evaluate(*args)
        seen[:] = before  # an evaluation is no part of a step
        return found

    run.evaluate = unseen
    run.train()
    assert run.roles.trained.packs(20)
    assert {one.padding for step in run.work for name, one in step.items() if name != "generate"} == {0}
    assert len(run.work) == len(seen) == 4
    for counted, computed in zip(run.work, seen, strict=True):
        assert {name: one.computed for name, one in counted.items()} == computed
        assert all(0 < one.real <= one.computed for one in counted.values())
        assert all(one.ideal_seconds > 0 for one in counted.values())
    for row, counted in zip(metrics(tmp_path), run.work, strict=True):
        for name, one in counted.items():
            assert row[f"perf/{name}/tokens_per_second"] == pytest.approx(one.tokens / row[f"time/{name}"])
            assert row[f"perf/{name}/padding"] == pytest.approx(100 - 100 * one.real / one.computed)
            assert row[f"perf/{name}/limit"] == pytest.approx(one.ideal_seconds / row[f"time/{name}"])


def test_a_policy_counts_with_its_adapters_whatever_comes_first(tmp_path):
    run = trainer(tmp_path, max_steps=1, lora=True)
    run.step(["a b", "c d e"], [[5, 6, 7], [8]], [1.0, 2.0])  # nothing is generated
    run.recorder.end()
    assert run.meter.policy == Flops.of(run.roles.trained.policy)
    assert run.meter.policy.trained > 0


def test_responses_from_outside_are_not_generated_and_no_reward_is_asked(tmp_path):
    run, seen = watched(trainer(tmp_path, max_steps=1))
    seen.append(dict.fromkeys(PHASES, 0))
    row = run.step(["a b", "c d e"], [[5, 6, 7], [8]], [1.0, 2.0])
    run.recorder.end()
    [counted] = run.work
    assert {name: one.computed for name, one in counted.items()} == {name: seen[0][name] for name in counted}
    assert {name for name in row if name.startswith("perf/")} == {
        f"perf/{phase}/{what}" for phase in ("score", "learn") for what in ("tokens_per_second", "padding", "limit")
    }


def constructed(monkeypatch, rank=0, packed=False):
    """A meter of a machine with 1000 FLOP/s and 100 bytes a second, after a step of three rows, for tiny.llama."""
    monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: 1000.0)
    monkeypatch.setattr(module, "memory_bandwidth", lambda device: 100.0)
    policy, critic, reference = tiny.llama(), tiny.llama_reward(), tiny.llama()
    for model in (policy, critic, reference) if packed else ():
        use_cpu_attention(model)
    trained = SimpleNamespace(policy=policy, critic=critic, policy_base=policy, critic_base=critic)
    meter = Meter(trained, FrozenRole(reference), {}, torch.device("cpu"), torch.float32)
    # Prompts of 4, 2 and 3 tokens, responses of 3, 1 and 2. The last row of rank 1 is padding.
    planned = StepPasses(
        prompts=[[7] * n for n in (4, 2, 3)],
        responses=[[7] * n for n in (3, 1, 2)],
        n_valid=3 if rank == 0 else 2,
        calls=[(3, 4), (3, 1), (2, 1)],
        scored=[[1, 0], [2]],
    )
    return meter, planned, Flops.of(policy), Flops.of(critic)


def test_a_packed_step_by_hand(monkeypatch):
    meter, planned, policy, critic = constructed(monkeypatch, packed=True)
    passes = [[0, 2], [1], []]
    planned = replace(planned, learned=passes, calls=[(1, 4), (3, 1), (2, 1)])
    work = meter.step(planned, {"generate": 1.0, "score": 2.0, "learn": 4.0})
    # All texts are of one token: of 7 and 3 the second is the beginning of the first, of 7 and 5 likewise.
    generate, score, learn = (work[name] for name in PHASES)
    assert (generate.real, generate.computed) == (4 + 3, 4 + 5)  # the longest prompt is all of them
    moved = policy.decoded_bytes([4, 2, 3], [3, 1, 2], 4)
    assert generate.ideal_seconds == pytest.approx(policy.forward([4], 3) / 1000 + moved / 100)
    assert (score.tokens, score.real, score.computed) == (15, 3 * (7 + 5), 3 * (7 + 5))
    needed = 2 * policy.forward([7, 3, 5], 6, [3]) + critic.forward([7, 3, 5], 0, [3])
    assert score.ideal_seconds == pytest.approx(needed / 1000)
    # The first one once more for nothing, by a rank without rows.
    assert (learn.tokens, learn.real, learn.computed) == (15, 2 * (7 + 3), 2 * (7 + 3 + 7))
    needed = policy.training([7, 3, 5], 6, [5]) + critic.training([7, 3, 5], 0, [5])
    assert learn.ideal_seconds == pytest.approx(needed / 1000)


def test_what_a_window_cuts_goes_through_with_padding(monkeypatch):
    meter, planned, _, _ = constructed(monkeypatch, packed=True)
    meter.trained.policy.config.sliding_window = 5
    meter.trained.critic = meter.trained.critic_base = meter.trained.policy
    passes = [[0], [1, 2]]
    learn = meter.step(replace(planned, learned=passes), {"learn": 4.0})["learn"]
    # 7 by itself; of 3 and 5 the first is the beginning of the second.
    assert (learn.real, learn.computed) == (2 * (7 + 5), 2 * (7 + 5))
    passes = [[0, 1], [2]]
    learn = meter.step(replace(planned, learned=passes), {"learn": 4.0})["learn"]
    assert (learn.real, learn.computed) == (2 * (7 + 3 + 5), 2 * (14 + 5))


def test_a_step_by_hand(monkeypatch):
    meter, planned, policy, critic = constructed(monkeypatch)
    passes = [[0, 2], [1], []]
    work = meter.step(replace(planned, learned=passes), {"generate": 1.0, "score": 2.0, "learn": 4.0})
    generate, score, learn = (work[name] for name in PHASES)

    # 9 tokens of prompts in 12 places; then 2 + 0 + 1 that had to be fed, of 5.
    assert (generate.tokens, generate.real, generate.computed, generate.seconds) == (6, 9 + 3, 12 + 5, 1.0)
    fed = 2 * (policy.matrices + policy.head) * 3 + 2 * policy.attention * (5 + 6 + 4)
    moved = 2 * 4 * (policy.matrices + policy.head) + (5 + 6 + 4) * 64 * 4
    assert moved / 100 > fed / 1000  # memory is what holds it up
    assert generate.ideal_seconds == pytest.approx(policy.forward([4, 2, 3], 3) / 1000 + moved / 100)

    # Texts of 7, 3 and 5 tokens, through three models; 7 and 3 together.
    assert (score.tokens, score.real, score.computed) == (15, 45, 3 * (14 + 5))
    needed = 2 * policy.forward([7, 3, 5], 6) + critic.forward([7, 3, 5])
    assert score.ideal_seconds == pytest.approx(needed / 1000)

    # 7 and 5 together, 3 alone, and the first once more for nothing, through two models.
    assert (learn.tokens, learn.real, learn.computed) == (15, 30, 2 * (14 + 3 + 7))
    needed = policy.training([7, 3, 5], 6) + critic.training([7, 3, 5])
    assert learn.ideal_seconds == pytest.approx(needed / 1000)


def test_decoding_that_computes_longer_than_it_reads_is_held_to_that(monkeypatch):
    meter, planned, policy, _ = constructed(monkeypatch)
    monkeypatch.setattr(module, "memory_bandwidth", lambda device: 1e9)
    [generate] = meter.step(planned, {"generate": 1.0}).values()
    fed = 2 * (policy.matrices + policy.head) * 3 + 2 * policy.attention * (5 + 6 + 4)
    assert generate.ideal_seconds == pytest.approx((policy.forward([4, 2, 3], 3) + fed) / 1000)


def test_filler_rows_are_padding(monkeypatch):
    meter, planned, _, _ = constructed(monkeypatch, rank=1)
    work = meter.step(replace(planned, learned=[[0, 1]]), dict.fromkeys(PHASES, 1.0))
    assert (work["generate"].tokens, work["generate"].real, work["generate"].computed) == (4, 6 + 2, 12 + 5)
    assert (work["score"].tokens, work["score"].real, work["score"].computed) == (10, 30, 3 * (14 + 5))
    assert work["learn"].tokens == 10


def test_rates_by_hand():
    two_ranks = Work(tokens=600, real=900, computed=1000, ideal_seconds=1.0, seconds=4.0)
    assert rates({"learn": two_ranks}, 2) == {
        "perf/learn/tokens_per_second": 300.0,  # 600 in 2 seconds
        "perf/learn/padding": pytest.approx(10.0),
        "perf/learn/limit": 0.25,
    }


def test_a_row_has_the_sums_of_all_ranks(monkeypatch):
    mine, others = Work(10, 8, 10, 0.5, 1.0), Work(20, 12, 30, 0.25, 1.0)
    sent = {}

    def row(work, all_sum):
        monkeypatch.setattr(rows, "all_sum", all_sum)
        return rows.metrics_row(rollout(), targets(), learned(), 0.1, ARGS, Rank(0, 2), {"score": work})

    row(others, lambda _, values: sent.setdefault("others", values))
    found = row(mine, lambda _, values: values + sent["others"])
    assert found["perf/score/tokens_per_second"] == 30.0  # in the second that both took
    assert found["perf/score/padding"] == 50.0
    assert found["perf/score/limit"] == 0.375


def test_steps_add_up_by_phase():
    one, other = Work(1, 2, 3, 4, 5), Work(10, 20, 30, 40, 50)
    assert total([{"score": one, "learn": one}, {"score": other}]) == {"score": Work(11, 22, 33, 44, 55), "learn": one}


def test_what_is_learned_twice_needs_its_logits_twice(monkeypatch):
    meter, planned, policy, critic = constructed(monkeypatch)
    learn = meter.step(replace(planned, learned=[[0, 1], [2], [2, 0], [1]]), {"learn": 4.0})["learn"]
    assert (learn.tokens, learn.real, learn.computed) == (30, 2 * 30, 2 * (14 + 5 + 14 + 3))
    needed = policy.training([7, 3, 5, 5, 7, 3], 12) + critic.training([7, 3, 5, 5, 7, 3])
    assert learn.ideal_seconds == pytest.approx(needed / 1000)


def test_a_reward_model_reads_its_own_texts_in_its_own_passes(monkeypatch):
    meter, planned, policy, critic = constructed(monkeypatch, rank=1)
    reward = tiny.gpt2_reward()
    meter.reward_roles = {"other": FrozenRole(reward)}
    read = TextPasses([[7] * n for n in (9, 1, 2)], [[2], [0, 1]])
    score = meter.step(replace(planned, rewards={"other": read}), {"score": 2.0})["score"]
    # The last row is padding, there too: 7 and 3 tokens in 14 and 5 places, 9 and 1 in 2 and 18.
    assert (score.tokens, score.real, score.computed) == (10, 3 * 10 + 10, 3 * (14 + 5) + 2 + 18)
    needed = 2 * policy.forward([7, 3], 4) + critic.forward([7, 3]) + Flops.of(reward).forward([9, 1])
    assert Flops.of(reward).matrices != policy.matrices
    assert score.ideal_seconds == pytest.approx(needed / 1000)


def test_weights_are_moved_in_the_precision_of_the_run(monkeypatch):
    meter, planned, policy, _ = constructed(monkeypatch)
    meter.dtype = torch.bfloat16
    [generate] = meter.step(planned, {"generate": 1.0}).values()
    moved = policy.decoded_bytes([4, 2, 3], [3, 1, 2], 2)
    assert generate.ideal_seconds == pytest.approx(policy.forward([4, 2, 3], 3) / 1000 + moved / 100)
    [nothing] = meter.step(replace(planned, n_valid=0), {"generate": 1.0}).values()
    assert (nothing.tokens, nothing.real, nothing.computed, nothing.ideal_seconds) == (0, 0, 12 + 5, 0)


def test_a_head_on_the_policys_trunk_needs_nothing_of_its_own(monkeypatch):
    meter, planned, policy, _ = constructed(monkeypatch)
    meter.trained.critic = ValueHead(32)
    work = meter.step(replace(planned, learned=[[0, 1, 2]]), dict.fromkeys(PHASES, 1.0))
    score, learn = work["score"], work["learn"]
    assert score.real == 2 * 15
    assert (learn.real, learn.computed) == (15, 3 * 7)
    assert learn.ideal_seconds == pytest.approx(policy.training([7, 3, 5], 6) / 1000)


def test_roles_of_one_model_count_with_the_adapter_that_each_has_on(monkeypatch):
    meter, _, policy, _ = constructed(monkeypatch)
    model = add_lora(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    meter.reference_role = FrozenRole(model, shared=True)
    meter.reward_roles = {"own": FrozenRole(model, shared=True), "whole": FrozenRole(tiny.llama())}
    assert Flops.of(model).matrices > policy.matrices
    found = [meter.reference, *meter.rewards.values()]
    assert [one.matrices for one in found] == [policy.matrices] * 3
