"""What each side is given and what is read off its run, with trainers and models that only note what they are asked."""

import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from rlhf.benchmark import clock as clocks
from rlhf.benchmark import counts, others, ppo, probe, work, worker
from rlhf.benchmark.clock import Clock
from rlhf.perf.work import Work

TINY = work.SHAPES["tiny"]


@pytest.fixture
def time(monkeypatch):
    """A clock that is set by hand."""
    now = SimpleNamespace(at=100.0)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now.at)
    return now


def test_a_clock_adds_up_each_phase_of_each_step(time):
    clock = Clock("learn")
    time.at = 200.0
    clock.on_train_begin()  # what came before is no part of it
    for phase, seconds in (("rest", 1), ("generate", 2), ("rest", 4)):
        time.at += seconds
        clock.mark(phase)
    time.at += 8
    clock.on_step_end()
    time.at += 16
    clock.on_step_end()
    assert clock.steps == [{"rest": 5.0, "generate": 2.0, "learn": 8.0}, {"learn": 16.0}, {}]


class Trainer:
    """Takes steps of 10 and 20 seconds, and keeps what it was given."""

    optimizer = SimpleNamespace(optimizer=SimpleNamespace(step=lambda: "stepped"))
    given: dict

    def __init__(self, **given):
        type(self).given = given
        phase = {"time/generate": 1.0, "time/score": 2.0, "time/learn": 4.0}
        rows = [
            phase | {"objective/response_length": 5.0, "val/updates": 3, "perf/learn/limit": 0.1},
            phase | {"objective/response_length": 7.125, "val/updates": 2, "perf/learn/limit": 0.2},
        ]
        self.state, self.meter = SimpleNamespace(log_history=rows), SimpleNamespace(peak=1000.0)
        self.work = [{name: Work(1, 2, 30 * n, 0.5 * n, 9) for name in ("generate", "score", "learn")} for n in (1, 2)]

    def train(self):
        self.given["callbacks"][0].steps[:] = [{"rest": 10.0}, {"rest": 20.0}, {}]
        assert self.optimizer.optimizer.step() == "stepped"


@pytest.mark.parametrize("kind", ["ppo_full", "ppo_lora"])
def test_our_result_by_hand(tmp_path, kind):
    run = work.Run(TINY, work=kind, steps=2, seed=3, rank=5)
    found = ppo.rlhf(run, str(tmp_path), Trainer, ["another"])
    prompts = work.prompts_of(TINY, None, 3)
    assert found.pop("memory_before") <= found.pop("memory_peak")
    assert found == {
        "steps": [{"rest": 13.0, "generate": 1.0, "score": 2.0, "learn": 4.0}],  # the first one warms up
        "prompt_tokens": sum(map(len, prompts)),
        "longest_prompt": max(map(len, prompts)),
        "response_tokens": [40, 57],  # of 8 responses
        "updates": 5,
        "flops": {"score": 1000.0, "learn": 1000.0},
        "floors": {"generate": 1.0, "score": 1.0, "learn": 1.0},
        "computed": {"generate": 60, "score": 60, "learn": 60},
        "perf": {"perf/learn/limit": 0.2},
    }
    given, lora = Trainer.given, kind == "ppo_lora"
    assert [row["input_ids"] for row in given["train_dataset"]] == prompts
    assert given["callbacks"][1:] == ["another"]
    assert (given["peft_config"] is not None) == lora
    assert not lora or (given["peft_config"].r, given["peft_config"].target_modules) == (5, {"q_proj", "v_proj"})


@pytest.mark.parametrize("kind", ["ppo_full", "ppo_lora"])
def test_the_other_sides_result_by_hand(tmp_path, monkeypatch, kind):
    functions = SimpleNamespace(batch_generation=None, masked_whiten=None)
    theirs = SimpleNamespace(PPOConfig=dict, PPOTrainer=Trainer, ppo_trainer=functions)
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", theirs)
    monkeypatch.setattr(Trainer, "optimizer", SimpleNamespace(optimizer=SimpleNamespace(step=lambda: "stepped")))
    run = work.Run(TINY, work=kind, steps=2, rank=5)
    found = ppo.trl(run, str(tmp_path))
    assert (found["steps"], found["updates"], found["response_tokens"]) == ([{"rest": 20.0}], 1, [])
    given, lora = Trainer.given, kind == "ppo_lora"
    assert given["args"] == work.settings(run, str(tmp_path))
    assert len(given["train_dataset"]) == 8 * 3  # one batch that is never reached
    assert (given["ref_model"] is None) == lora  # with adapters it is the model without them
    assert given["value_model"] is not given["reward_model"]
    assert not lora or (given["peft_config"].r, given["peft_config"].target_modules) == (5, {"c_attn"})


def test_the_other_sides_phases_and_tokens_are_read_between_its_functions(time):
    module = SimpleNamespace(batch_generation=lambda model, queries: (model, "logits"), masked_whiten=lambda x: x + 1)
    watched = ppo._Watched(module, eos=9)
    queries = torch.tensor([[1, 9], [1, 2]])
    time.at += 1
    # Of the first response 2 tokens, of the second all 3.
    answered = torch.tensor([[1, 9, 5, 9, 9], [1, 2, 5, 6, 7]])
    assert module.batch_generation(answered, queries)[1] == "logits"
    time.at += 2
    assert module.masked_whiten(1) == 2
    time.at += 4
    watched.clock.on_step_end()
    assert watched.tokens == [5]
    assert watched.clock.steps[0] == {"rest": 1.0, "generate": 0.0, "score": 2.0, "learn": 4.0}


def test_reward_training_is_the_same_work_on_both_sides(tmp_path):
    run = work.Run(TINY, work="reward", steps=3, precision="fp32", on_cpu=True)
    pairs = work.pairs_of(TINY, work.tokenizer_of(TINY), 0, 3 * 8)
    tokens = sum(len(side) for row in pairs for side in row.values())
    for ours in (True, False):
        found = others.reward(run, str(tmp_path), ours)
        assert (found["updates"], len(found["steps"]), found["response_tokens"]) == (3, 2, [])
        assert found["prompt_tokens"] == tokens / 3  # of a step


def test_plain_generation_counts_a_response_up_to_its_end(monkeypatch):
    asked, read = [], []
    tokenizer = work.tokenizer_of(TINY)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def generate(input_ids, **options):
        asked.append((torch.initial_seed(), options))
        answers = torch.tensor([[5, eos, pad], [6, 7, 8], [eos, pad, pad], [5, 5, eos]])
        return torch.cat([input_ids, answers[: len(input_ids)]], 1)

    policy = SimpleNamespace(generate=generate, device="cpu")
    model = lambda **given: read.append(given["attention_mask"].sum().item())  # noqa: E731
    model.config = SimpleNamespace()
    run = work.Run(TINY, seed=2)
    found = others._plain(run, tokenizer, policy, model, [[1, 2], [3], [4], [4, 4], [4]], 7)
    assert found == [[5, eos], [6, 7, 8], [eos], [5, 5, eos], [5, eos]]
    # Prompts of 6 tokens and 9 of their responses; then the last one by itself. Only pads are no text.
    assert (read, model.config.pad_token_id) == ([6 + 9, 1 + 2], pad)
    for seed, options in asked:
        assert (seed, options["max_new_tokens"], options["top_k"], options["do_sample"]) == (2007, 16, 0, True)
    assert options["attention_mask"].tolist() == [[1]]


def test_evaluation_by_either_side_leaves_the_first_step_out(monkeypatch):
    asked = []

    def answers(side):
        def of(run, tokenizer, policy, reward_model, prompts, step):
            asked.append((side, step))
            return [[1]] * (step + 1)

        return of

    monkeypatch.setattr(others, "_ours", answers("ours"))
    monkeypatch.setattr(others, "_plain", answers("plain"))
    for ours in (True, False):
        found = others.evaluation(work.Run(TINY, work="evaluation", steps=3), "", ours)
        assert [list(step) for step in found["steps"]] == [["evaluation"]] * 2
        assert found["response_tokens"] == [1, 2, 3]
    assert asked == [("ours", 0), ("ours", 1), ("ours", 2), ("plain", 0), ("plain", 1), ("plain", 2)]


def test_our_evaluation_draws_anew_at_each_step():
    tokenizer = work.tokenizer_of(TINY)
    models = [model.eval() for model in work.models_of(TINY, tokenizer, 0)]
    one, again, other = (
        others._ours(work.Run(TINY, seed=seed), tokenizer, *models, [[1, 2], [3]], step)
        for seed, step in ((0, 0), (0, 0), (0, 1))
    )
    assert one == again != other


@pytest.mark.parametrize(
    ("side", "kind", "expected"),
    [
        ("counts", "reward", "counts.counted"),
        ("rlhf", "ppo_lora", "ppo.rlhf"),
        ("trl", "ppo_full", "ppo.trl"),
        ("rlhf", "reward", "others.reward True"),
        ("trl", "reward", "others.reward False"),
        ("rlhf", "evaluation", "others.evaluation True"),
        ("trl", "evaluation", "others.evaluation False"),
    ],
)
def test_a_worker_does_the_work_it_is_asked_for(monkeypatch, capsys, side, kind, expected):
    for module, names in ((counts, ["counted"]), (ppo, ["rlhf", "trl"]), (others, ["reward", "evaluation"])):
        for name in names:
            said = f"{module.__name__.rpartition('.')[2]}.{name}"
            monkeypatch.setattr(module, name, lambda run, folder, *ours, said=said: " ".join([said, *map(str, ours)]))
    monkeypatch.setattr(sys, "argv", ["worker", side, f'{{"shape": "tiny", "work": "{kind}"}}'])
    worker.main()
    assert capsys.readouterr().out == f'{work.RESULT}"{expected}"\n'


def test_seconds_of_a_call_with_and_without_waiting_for_it(time, monkeypatch):
    waits, calls = [], []
    monkeypatch.setattr(probe.torch, "zeros", lambda n, device: "x")
    monkeypatch.setattr(probe.torch.cuda, "synchronize", lambda: waits.append(time.at))

    def call(x):
        calls.append(x)
        time.at += 3.0

    for wait, expected in ((False, 2), (True, 2 + 5)):
        waits.clear()
        calls.clear()
        assert probe._a_call(call, SimpleNamespace(type="cuda"), wait, n=5) == 3.0
        assert (len(waits), len(calls)) == (expected, 1 + 5)
    waits.clear()
    probe._a_call(call, SimpleNamespace(type="cpu"), True, n=5)
    assert waits == []


def test_a_report_of_a_device_is_in_the_units_it_names(monkeypatch):
    monkeypatch.setattr(probe, "matmul_peak", lambda device, dtype: {torch.float32: 1e12, torch.bfloat16: 2e12}[dtype])
    monkeypatch.setattr(probe, "memory_bandwidth", lambda device: 3e9)
    monkeypatch.setattr(probe, "_a_call", lambda call, device, wait: 5e-6 if wait else 4e-6)
    monkeypatch.setattr(probe.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probe, "_PACKAGES", ("torch", "no-such-package"))
    found = probe.device_report()
    assert found["device"] == f"cpu, {torch.get_num_threads()} threads"
    assert found["packages"] == {"torch": torch.__version__, "no-such-package": "not installed"}
    speeds = {name: value for name, value in found.items() if "(" in name}
    assert speeds == pytest.approx(
        {"fp32 (TFLOP/s)": 1, "bf16 (TFLOP/s)": 2, "memory (GB/s)": 3, "launch (us)": 4, "launch and wait (us)": 5}
    )


def test_a_profile_is_of_the_second_step(monkeypatch):
    entered = []
    event = SimpleNamespace(name="aten::mm", time_range=SimpleNamespace(start=1, end=2))

    class Profiler:
        def __init__(self, activities):
            assert len(activities) == 1  # without a GPU

        def __enter__(self):
            entered.append("begun")

        def __exit__(self, *_):
            entered.append("ended")

        def events(self):
            return [event]

        def key_averages(self):
            return SimpleNamespace(table=lambda sort_by, **_: sort_by)

    def rlhf(run, folder, kind, callbacks):
        assert (run.shape, kind) == (TINY, probe.MarkedTrainer)
        for expected in ([], ["begun", "ended"], ["begun", "ended"]):
            callbacks[0].on_step_begin()
            callbacks[0].on_step_end()
            assert entered == expected
        return {"response_tokens": [11, 22, 33]}

    monkeypatch.setattr(probe, "profile", Profiler)
    monkeypatch.setattr(probe.ppo, "rlhf", rlhf)
    monkeypatch.setattr(probe.torch.cuda, "is_available", lambda: False)
    found = probe.profiled({"shape": "tiny"})
    assert found == {"calls": {"rest": {"operations": 1}}, "tokens": 22, "table": "self_cpu_time_total"}


def test_an_event_is_in_the_phase_that_it_begins_in_ends_included():
    events = [("phase: score", 2, 4), ("phase: learn", 6, 8)] + [("aten::mm", at, at + 1) for at in (1, 2, 4, 5, 6)]
    assert probe.phases(events)[2:] == ["rest", "score", "score", "rest", "learn"]


def test_adapters_are_those_of_the_run():
    found = work.lora_of(("c_attn",), 3)
    assert isinstance(found, LoraConfig)
    assert (found.r, found.lora_alpha, found.lora_dropout, found.target_modules) == (3, 32, 0.1, {"c_attn"})
