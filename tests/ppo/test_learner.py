"""An update is the same however its rows are split: over micro-batches, accumulation or ranks."""

import contextlib
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import obvious
import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from test_rollout import rollout
from torch.testing import assert_close

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import Shard
from rlhf.models.actor_critic import ActorCritic
from rlhf.ppo import learner as module
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.learner import DeepSpeedBackend, Learner, Minibatch, Pass, PlainBackend, update_rows
from rlhf.ppo.prompts import Prompt
from rlhf.ppo.rollout import Rollout, pad_batch

LENGTHS = [6, 1, 3, 5, 2, 6, 4, 1]  # response tokens of each row


class Rank:
    """What a Learner asks of an Accelerator, as one rank of a world; its gradients stay unaveraged."""

    def __init__(self, index: int = 0, world: int = 1) -> None:
        self.process_index, self.num_processes = index, world
        self.step, self.gradient_accumulation_steps = 0, 1
        self.distributed_type = DistributedType.NO
        self.device = torch.device("cpu")

    def accumulate(self, model):
        return contextlib.nullcontext()

    def autocast(self):
        return contextlib.nullcontext()

    def unwrap_model(self, model):
        return model

    def backward(self, loss):
        (loss / self.gradient_accumulation_steps).backward()

    def unscale_gradients(self):
        pass

    def reduce(self, values, reduction):
        assert reduction == "sum"
        return values


def select(record, index):
    """The fields of a record, with some of its rows."""
    found = {f.name: getattr(record, f.name) for f in fields(record)}
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            found[name] = value[index]
        elif name in ("prompts", "responses") and value:
            found[name] = [value[i] for i in index.tolist()]
    return found


def experience(count=8):
    """Ragged rows; the token before the response is 100 + the row's number."""
    prompts = [[*range(5, 5 + (3 * i) % 7), 100 + i] for i in range(count)]
    responses = [list(range(200 + 7 * i, 200 + 7 * i + LENGTHS[i])) for i in range(count)]
    ids, attention, mask = pad_batch(prompts, responses, 2)
    noise = torch.randn(5, count, mask.shape[1], generator=torch.Generator().manual_seed(1))
    logp = noise[0] * 0.3 - math.log(400)  # near what a tiny model says, so that some ratios are clipped
    everyone = torch.ones(count, dtype=torch.bool)
    score = noise[3, :, 0]
    rows = Rollout(
        ids,
        attention,
        mask,
        ended=everyone,
        is_valid=everyone,
        logp=logp,
        ref_logp=logp,
        entropy=noise[1],
        exact_kl=noise[1],
        values=noise[2],
        last_value=score,
        scores=score.unsqueeze(1),
        raw_score=score,
        prompts=[Prompt(str(i), row, "", {}, str(i)) for i, row in enumerate(prompts)],
        responses=responses,
        shard=Shard(count, 0, 1),
        reward_names=["judge"],
    )
    return rows, Advantages(noise[3] * mask, noise[4] * mask, noise[0] * mask, noise[1] * mask, score)


def numbers_of(texts):
    """Each row's number: the token before its response is 100 + that."""
    return [token - 100 for token in texts.ids.flatten().tolist() if 100 <= token < 110]


def update(rows=None, targets=None, places=None, n_global=None, rank=None, learning_rate=0.0, **options):
    """One learn(); returns the roles, their gradients at each optimizer step, the rows of each pass, the sums."""
    if rows is None:
        rows, targets = experience()
    settings = {"num_ppo_epochs": 1, "max_grad_norm": 0.0, "temperature": 1.0, "seed": 3}
    args = PPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **settings | options)
    roles = ActorCritic(tiny.llama(), tiny.llama_reward(), args.temperature)
    optimizer = torch.optim.SGD(roles.parameters(), lr=learning_rate)
    steps, passes = [], []
    optimizer.register_step_pre_hook(
        lambda *_: steps.append({n: p.grad.clone() for n, p in roles.named_parameters() if p.grad is not None})
    )
    roles.register_forward_pre_hook(lambda _, inputs: passes.append(numbers_of(inputs[0])))
    if places is not None:
        rows = replace(rows, shard=SimpleNamespace(rows=list(places), n_items=n_global or len(places)))
    done = Learner(roles, optimizer, rank or Rank(), args).learn(rows, targets, 1)
    assert sum(map(len, done.passes)) <= sum(map(len, passes))  # a pass of no row takes one
    return roles, steps, passes, numbers_by_name(done)


def numbers_by_name(done):
    """All numbers of an Update."""
    norms = dict(zip(("grad_norm", "grad_norm_critic"), done.norms, strict=True))
    plain = {name: getattr(done, name) for name in ("tokens", "ratio_max", "minibatches", "updates", "skipped")}
    return {**done.statistics._asdict(), **norms, **plain}


def assert_same(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_close(other[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("size", "minibatches"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_micro_batches_do_not_change_the_update(size, minibatches):
    options = {"num_mini_batches": minibatches, "num_ppo_epochs": 2, "learning_rate": 0.1}
    largest = 8 // minibatches
    whole = update(per_device_train_batch_size=largest, gradient_accumulation_steps=minibatches, **options)
    split = update(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **options)
    assert {len(rows) for rows in whole[2]} == {largest}
    assert {len(rows) for rows in split[2]} == {size}
    assert len(whole[1]) == len(split[1]) == 2 * minibatches
    for one, other in zip(whole[1], split[1], strict=True):
        assert_same(one, other)
    assert_same(whole[0].state_dict(), split[0].state_dict())
    assert_same(whole[3], split[3])
    assert 0 < whole[3]["clipfrac"] < whole[3]["tokens"]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (2, 4)])
@pytest.mark.parametrize("minibatches", [1, 2, 4])
@pytest.mark.parametrize("count", [8, 7, 5])
def test_steps_are_counted_and_every_row_is_used_once_an_epoch(epochs, size, accumulation, minibatches, count):
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    rows, targets = experience(count)
    _, steps, passes, sums = update(rows, targets, num_mini_batches=minibatches, num_ppo_epochs=epochs, **options)
    assert len(steps) == epochs * minibatches
    assert max(map(len, passes)) <= size
    used = [row for rows in passes for row in rows]
    for epoch in range(epochs):
        assert sorted(used[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert sums["tokens"] == epochs * sum(LENGTHS[:count])


def test_each_pass_has_its_own_order():
    _, _, passes, _ = update(
        num_ppo_epochs=3, per_device_train_batch_size=1, gradient_accumulation_steps=8, num_mini_batches=8
    )
    used = [row for rows in passes for row in rows]
    epochs = [used[i : i + 8] for i in (0, 8, 16)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_each_step_and_seed_has_its_own_order():
    def order(seed, step):
        dealt = Learner._deal(SimpleNamespace(args=PPOConfig(output_dir="x", seed=seed, num_ppo_epochs=1)), 12, step)
        return tuple(tuple(members) for members in dealt)

    assert len({order(seed, step) for seed in (1, 2) for step in (1, 2, 3)}) == 6


def test_fewer_rows_than_minibatches_make_no_empty_step():
    rows, targets = experience(3)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_mini_batches": 4}
    _, steps, passes, _ = update(rows, targets, **options)
    assert len(steps) == len(passes) == 3


@pytest.mark.parametrize("count", [8, 7])
@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_two_ranks_gradients_are_those_of_one(monkeypatch, count, minibatches):
    options = {"num_mini_batches": minibatches, "per_device_train_batch_size": 1}
    rows, targets = experience(count)
    alone = update(rows, targets, gradient_accumulation_steps=8, **options)

    def rank_of(index):
        """Every other row; the rank that has one less is filled up with a row that does not count."""
        mine = list(range(count))[index::2]
        fill = -(-count // 2) - len(mine)
        part = select(rows, torch.tensor(mine + [0] * fill))
        places = mine + [-1] * fill
        part["is_valid"] = torch.tensor(places) >= 0
        part["mask"] = part["mask"] & part["is_valid"].unsqueeze(1)
        aims = Advantages(**select(targets, torch.tensor(mine + [0] * fill)))
        where = {"places": places, "n_global": count, "rank": Rank(index, 2)}
        return update(Rollout(**part), aims, **where, gradient_accumulation_steps=4, **options)

    # The weights stay as they are, so that the ranks can run one after the other: first for what each would send,
    # then with what comes of it.
    sent = []
    for _ in range(2):
        monkeypatch.setattr(module, "sum_and_max", lambda _, *plan: (sent.append(plan), plan)[1])
        rank_of(len(sent))
    counts = [a + b for a, b in zip(sent[0][0], sent[1][0], strict=True)]
    rounds = [max(pair) for pair in zip(sent[0][1], sent[1][1], strict=True)]
    monkeypatch.setattr(module, "sum_and_max", lambda _, *plan: (counts, rounds))
    ranks = [rank_of(index) for index in range(2)]
    assert len(ranks[0][2]) == len(ranks[1][2])  # lock-step: as many forward passes on both
    assert ranks[0][3]["tokens"] + ranks[1][3]["tokens"] == sum(LENGTHS[:count])
    for one, first, second in zip(alone[1], ranks[0][1], ranks[1][1], strict=True):
        assert_same(one, {name: (first[name] + second[name]) / 2 for name in first})


def test_gradients_are_clipped_policy_and_critic_apart():
    free, clipped = update(), update(max_grad_norm=1e-3)

    def norm(gradients, part):
        return math.sqrt(sum(g.double().pow(2).sum() for n, g in gradients.items() if n.startswith(part)))

    for part, name in (("policy", "grad_norm"), ("critic", "grad_norm_critic")):
        before = norm(free[1][0], part)
        assert before > 1e-2
        assert norm(clipped[1][0], part) == pytest.approx(1e-3, rel=1e-3)
        assert clipped[3][name].item() == pytest.approx(before, rel=1e-4)  # what is reported is unclipped


def test_an_update_says_and_learns_what_an_independent_formula_gives():
    """With settings that are no two alike, so that none stands in for another."""
    rows, aims = experience()
    settings = {"cliprange": 0.1, "cliprange_value": 0.7, "vf_coef": 0.3, "temperature": 0.8}
    _, (gradients,), _, found = update(rows, aims, **settings)
    policy, critic = tiny.llama(), tiny.llama_reward()
    logps, entropies, values = [], [], []
    for prompt, response in zip(rows.prompts, rows.responses, strict=True):
        ids, start = torch.tensor([prompt.input_ids + response]), len(prompt.input_ids) - 1
        said = torch.distributions.Categorical(logits=policy(ids).logits[0, start:-1] / 0.8)
        logps.append(said.log_prob(torch.tensor(response)))
        entropies.append(said.entropy())
        values.append(obvious.token_values(critic, ids, torch.ones_like(ids, dtype=torch.bool))[0, start:-1])
    logp, entropy, value = map(torch.cat, (logps, entropies, values))
    old_logp, old_value = rows.logp[rows.mask], rows.values[rows.mask]
    gain, target = aims.advantages[rows.mask], aims.returns[rows.mask]
    ratio, n = (logp - old_logp).exp(), len(logp)
    policy_loss = -torch.minimum(ratio * gain, ratio.clamp(0.9, 1.1) * gain).sum() / n
    near = old_value + (value - old_value).clamp(-0.7, 0.7)
    value_loss = torch.maximum((value - target) ** 2, (near - target) ** 2).sum() / 2 / n
    (policy_loss + 0.3 * value_loss).backward()
    for name, part in (("policy", policy), ("critic", critic)):
        for key, parameter in part.named_parameters():
            if parameter.grad is not None:
                assert_close(gradients[f"{name}.{key}"], parameter.grad, atol=1e-5, rtol=1e-4, msg=key)
    expected = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "approxkl": ((logp - old_logp) ** 2).sum() / 2,
        "clipfrac": ((ratio - 1).abs() > 0.1).sum(),
        "value_clipfrac": ((value - old_value).abs() > 0.7).sum(),
        "entropy": entropy.sum(),
        "ratio": ratio.sum(),
        "ratio_squared": (ratio**2).sum(),
        "ratio_max": ratio.max(),
        "tokens": n,
        "minibatches": 1,
        "updates": 1,
        "skipped": 0,
    }
    for name, number in expected.items():
        assert float(found[name]) == pytest.approx(float(torch.as_tensor(number).detach()), rel=1e-4, abs=1e-5), name


def test_what_is_said_of_tokens_is_that_of_all_minibatches():
    """At learning rate 0 it does not matter in how many of them, and in how many passes, the rows come."""
    names = ("approxkl", "clipfrac", "value_clipfrac", "entropy", "ratio", "ratio_squared")
    rows, aims = experience(4)
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    one, many = (update(rows, aims, num_mini_batches=n, num_ppo_epochs=2, **sizes)[3] for n in (1, 4))
    for name in (*names, "tokens", "ratio_max"):
        assert float(many[name]) == pytest.approx(float(one[name]), rel=1e-5), name


@pytest.mark.parametrize(("target_kl", "minibatches"), [(0.5, 2), (0.35, 1)])
def test_whether_an_update_stops_depends_on_the_tokens_of_all_ranks(monkeypatch, target_kl, minibatches):
    """Of two ranks with as many tokens: 1.2 over this rank's is 0.6 over both; the limit is 1.5 times target_kl."""
    rows, aims = experience(4)
    monkeypatch.setattr(module, "sum_and_max", lambda _, c, rounds: ([c[i - i % 2] for i in range(8)], rounds))
    monkeypatch.setattr(module, "all_sum", lambda _, kl: torch.full_like(kl, 1.2 * sum(LENGTHS[:4])))
    where = {"places": range(0, 8, 2), "n_global": 8, "rank": Rank(0, 2)}
    sizes = {"per_device_train_batch_size": 4, "num_ppo_epochs": 2}
    assert update(rows, aims, target_kl=target_kl, **where, **sizes)[3]["minibatches"] == minibatches


@pytest.mark.parametrize("learns", [False, True])
def test_under_deepspeed_the_policys_rates_alone_are_0_while_the_critic_warms_up(learns):
    groups = [{"role": "policy", "lr": 1.0}, {"role": "critic", "lr": 2.0}, {"role": "policy", "lr": 3.0}, {"lr": 4.0}]
    backend = DeepSpeedBackend(None, SimpleNamespace(param_groups=groups), Rank(), None, None)
    with backend.policy_rate(learns):
        assert [group["lr"] for group in groups] == ([1.0, 2.0, 3.0, 4.0] if learns else [0.0, 2.0, 0.0, 4.0])
    assert [group["lr"] for group in groups] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_is_shown_to_the_scaler_of_fp16_alone(role, fp16):
    model = SimpleNamespace(policy=torch.nn.Linear(1, 1), critic=torch.nn.Linear(1, 1))
    for name, part in vars(model).items():
        for parameter in part.parameters():
            parameter.grad = torch.full_like(parameter, math.inf if name == role else 1.0)
    done = []
    optimizer = SimpleNamespace(step=lambda: done.append("step"), zero_grad=lambda: done.append("zero"))
    args = SimpleNamespace(max_grad_norm=0.0, fp16=fp16)
    norms, taken = PlainBackend(model, optimizer, Rank(), args, done.append).step(True, 1)
    assert not taken
    assert norms.isfinite().tolist() == [role == "critic", role == "policy"]
    assert done == (["on_pre_optimizer_step", "step", "on_optimizer_step"] if fp16 else []) + ["zero"]


def test_rows_of_a_skipped_step_have_their_largest_numbers_and_the_losses_of_their_pass():
    advantages = SimpleNamespace(
        advantages=torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.0, 0.0], [-0.25, -0.5, 0.0]]),
        returns=torch.tensor([[1.5, 0.5, -1.0], [-2.0, 0.0, 0.0], [0.75, math.inf, 0.0]]),
    )
    batch = Minibatch([Pass([2], None, None), Pass([], None, None), Pass([0, 1], None, None)], 6, 6)
    losses = torch.tensor([[0.5, 0.25], [9.0, 9.0], [math.nan, 4.0]], dtype=torch.float64)
    names = ("prompt_id", "advantage", "return", "policy_loss", "value_loss")
    assert [[row[name] for name in names] for row in update_rows(rollout(), advantages, batch, losses)] == [
        ["2", 0.5, "inf", 0.5, 0.25],
        ["0", 3.0, 1.5, "nan", 4.0],
        ["1", 0.5, 2.0, "nan", 4.0],
    ]


def test_a_kl_of_just_the_limit_does_not_stop_an_update():
    learner = SimpleNamespace(accelerator=Rank(), args=SimpleNamespace(target_kl=0.5))
    stops = [Learner._exceeds_target_kl(learner, torch.tensor(kl), 2) for kl in (1.5, 1.75)]
    assert stops == [False, True]  # 0.75 and 0.875 a token; the limit is 1.5 times 0.5
    learner.args.target_kl = None
    assert not Learner._exceeds_target_kl(learner, torch.tensor(9.0), 1)
