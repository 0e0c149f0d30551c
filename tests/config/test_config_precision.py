"""The precision of a run: measured on a CPU, asked of a GPU, the user's word before both."""

import itertools
import json
import os

import pytest
import torch
import workers
from transformers import TrainingArguments
from trl import ModelConfig

from rlhf.cli.parsing import parse
from rlhf.cli.train_ppo import stage_name
from rlhf.config import PPOConfig, PPOStageConfig, PromptConfig, RewardStageConfig, RunConfig
from rlhf.config import precision as module
from rlhf.config.precision import (
    bf16_is_fast,
    bf16_speed,
    choose_hardware,
    evaluation_precision,
    precision,
    precision_line,
)
from rlhf.errors import UserError


@pytest.fixture
def measured(monkeypatch):
    """Pretend a CPU whose bf16 is so many times as fast as its fp32; returns the list of measurements made."""

    def at(speed):
        asked = []
        monkeypatch.setattr(module, "bf16_speed", lambda: asked.append(speed) or speed)
        return asked

    return at


def config(kind, **options):
    return kind(output_dir="unused", use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize("kind", [PPOConfig, PPOStageConfig, RewardStageConfig])
@pytest.mark.parametrize(
    ("speed", "taken", "words"),
    [
        (0.6, "fp32", "fp32 (bf16 measured: 0.6 times as fast)"),
        (1.19, "fp32", "fp32 (bf16 measured: 1.19 times as fast)"),
        (1.2, "bf16", "bf16 (bf16 measured: 1.2 times as fast)"),
        (3.14, "bf16", "bf16 (bf16 measured: 3.14 times as fast)"),
    ],
)
def test_a_cpu_takes_bf16_where_it_wins_by_a_fifth(measured, kind, speed, taken, words):
    asked = measured(speed)
    args = config(kind)
    assert asked == [speed]
    assert (args.bf16, args.fp16, args.mixed_precision) == (taken == "bf16", False, {"fp32": "no"}.get(taken, taken))
    assert precision(args)["taken"] == taken
    assert precision_line(args) == words


@pytest.mark.parametrize("kind", [PPOConfig, RewardStageConfig])
@pytest.mark.parametrize(
    ("given", "taken"), [({"bf16": True}, "bf16"), ({"bf16": False}, "fp32"), ({"fp16": True}, "fp16")]
)
def test_what_the_user_sets_is_taken_without_measuring(measured, kind, given, taken):
    asked = measured(0.1 if taken == "bf16" else 9.0)
    args = config(kind, **given)
    assert (precision(args), precision_line(args), asked) == ({"taken": taken, "why": None}, None, [])


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Pretend `accelerate launch` with this mixed_precision, and with a DeepSpeed config file of this content."""

    def by(word, content=None):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", word)
        if content is not None:
            (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | content))
            monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))

    return by


ON, OFF, AUTO = {"enabled": True}, {"enabled": False}, {"enabled": "auto"}


@pytest.mark.parametrize(
    ("word", "content", "given", "taken", "words"),
    [
        ("no", None, {}, "fp32", "fp32 (accelerate launch: no)"),
        ("bf16", None, {}, "bf16", "bf16 (accelerate launch: bf16)"),
        ("fp16", None, {}, "fp16", "fp16 (accelerate launch: fp16)"),
        ("no", None, {"bf16": True}, "bf16", None),  # it says no where nothing is set
        ("bf16", None, {"bf16": True}, "bf16", None),
        ("bf16", None, {"bf16": False}, "fp32", "fp32 (as set; accelerate launch asks for bf16)"),
        ("bf16", None, {"fp16": True}, "fp16", "fp16 (as set; accelerate launch asks for bf16)"),
        ("fp16", None, {"bf16": True}, "bf16", "bf16 (as set; accelerate launch asks for fp16)"),
        ("no", {"bf16": ON}, {}, "bf16", "bf16 (DeepSpeed's config file: bf16)"),
        ("no", {"fp16": ON, "bf16": OFF}, {}, "fp16", "fp16 (DeepSpeed's config file: fp16)"),
        ("no", {"bf16": OFF}, {}, "fp32", "fp32 (DeepSpeed's config file: no)"),
        ("no", {"bf16": AUTO, "fp16": AUTO}, {"bf16": True}, "bf16", None),
        ("no", {"bf16": AUTO, "fp16": AUTO}, {}, "bf16", "bf16 (bf16 measured: 9 times as fast)"),
        ("no", {}, {}, "bf16", "bf16 (bf16 measured: 9 times as fast)"),
    ],
)
@pytest.mark.parametrize("kind", [PPOConfig, RewardStageConfig])
def test_the_launcher_is_asked_before_the_hardware(measured, launched, kind, word, content, given, taken, words):
    asked = measured(9.0)
    launched(word, content)
    args = config(kind, **given)
    assert (precision(args)["taken"], precision_line(args)) == (taken, words)
    assert args.mixed_precision == {"fp32": "no"}.get(taken, taken) == os.environ["ACCELERATE_MIXED_PRECISION"]
    assert bool(asked) == ("measured" in (words or ""))


@pytest.mark.parametrize(
    ("word", "content", "given", "words"),
    [
        ("fp8", None, {}, "^mixed_precision: expected no, bf16 or fp16 of accelerate launch, found fp8"),
        (
            "no",
            {"bf16": ON},
            {"bf16": False},
            "^DeepSpeed's config file: its precision is bf16, but .* settings is no",
        ),
        ("no", {"bf16": OFF}, {"bf16": True}, "^DeepSpeed's config file: its precision is no, but .* settings is bf16"),
        ("no", {"fp16": "auto"}, {}, r"^deepspeed_config_file .*ds.json: expected settings .* in fp16, found 'auto'"),
        (
            "no",
            {"optimizer": {"params": "auto"}},
            {},
            r"expected settings with values in optimizer.params, found 'auto'",
        ),
        (
            "no",
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            {},
            r"in zero_optimization.offload_optimizer, found",
        ),
    ],
)
def test_what_the_launcher_cannot_mean_is_one_line(launched, word, content, given, words):
    launched(word, content)
    with pytest.raises(UserError, match=words):
        config(PPOConfig, **given)


def test_the_projects_own_launchers_leave_the_choice(measured, launched, monkeypatch):
    measured(9.0)
    launched("no")
    monkeypatch.setenv("RLHF_LAUNCHER", "pipeline")
    assert config(PPOConfig).bf16 is True
    launched("fp16")
    assert config(PPOConfig).fp16 is True


def test_the_best_call_of_each_counts_and_they_take_turns():
    """Seconds by hand: fp32 0.04 at best, bf16 0.02; another program slows two calls of each."""
    seconds = {"fp32": itertools.cycle([0.09, 0.04, 0.05]), "bf16": itertools.cycle([0.02, 0.03, 0.08])}
    now, made = [0.0], []

    def work(name):
        made.append(name)
        now[0] += next(seconds[name])

    found = module._speed(lambda: work("fp32"), lambda: work("bf16"), lambda: now[0])
    assert found == 2.0
    assert made[1:] == ["fp32", "bf16"] * (len(made[1:]) // 2)
    assert len(made) > 2 * module._TRIES


def test_bf16_without_hardware_is_called_once():
    now, made = [0.0], []

    def work(name, seconds):
        made.append(name)
        now[0] += seconds

    found = module._speed(lambda: work("fp32", 0.01), lambda: work("bf16", 3.0), lambda: now[0])
    assert (found, made) == (0.0, ["fp32", "fp32", "bf16"])


def test_a_real_measurement_is_made_once_and_leaves_nothing_behind(monkeypatch):
    """What a CPU can do differs; that both precisions were timed, and that the answer is the faster one's, does not."""
    calls, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(module, "linear", lambda x, w: calls.append(x.dtype) or linear(x, w))
    state = torch.get_rng_state()
    bf16_speed.cache_clear()
    try:
        speed = bf16_speed()
        assert 0 <= speed < float("inf")
        assert bf16_speed() == speed
        assert bf16_is_fast(use_cpu=True) == (speed >= 1.2)
    finally:
        bf16_speed.cache_clear()
    assert calls.count(torch.float32) - 1 == calls.count(torch.bfloat16) >= 1  # one warms up
    assert torch.equal(torch.get_rng_state(), state)


AGREE = """
import json, os, sys
from rlhf.config import precision as module
from rlhf.config import PPOConfig, RewardStageConfig
rank, out = int(os.environ["RANK"]), sys.argv[1]
os.environ["RLHF_LAUNCHER"] = "pipeline"
module.bf16_speed = lambda: [0.6, 9.0][rank]
kind = {"ppo": PPOConfig, "reward": RewardStageConfig}[sys.argv[2]]
args = kind(output_dir="unused", report_to="none", use_cpu=True)
found = [args.bf16, args.mixed_precision, module.precision_line(args), args.world_size]
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(found, file)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(("kind", "engine"), [("ppo", "ddp"), ("reward", "ddp"), ("ppo", "zero2")])
def test_all_ranks_take_what_the_first_has_measured(tmp_path, kind, engine):
    """The second rank's own CPU would say bf16."""
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    workers.run(script, [str(tmp_path), kind], processes=2, engine=engine)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[False, "no", "fp32 (bf16 measured: 0.6 times as fast)", 2]] * 2


KINDS = [RunConfig, PromptConfig, ModelConfig, PPOStageConfig]


def read(tmp_path, *flags):
    argv = ["--run", "r", "--runs_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none", *flags]
    return parse(KINDS, argv, stage=stage_name)[-1]


def begun(tmp_path, stage, **settings):
    folder = tmp_path / "r" / stage
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stage": stage, "status": "stopped", "config": settings}))


@pytest.mark.parametrize("began", [True, False])
def test_a_stage_that_resumes_on_another_machine_keeps_its_precision(tmp_path, measured, began):
    asked = measured(0.1 if began else 9.0)  # this machine would choose otherwise
    begun(tmp_path, "ppo_full", bf16=began, fp16=False)
    args = read(tmp_path)
    assert (args.bf16, asked) == (began, [])
    assert precision_line(args) == ("bf16" if began else "fp32") + " (as this run began)"
    assert read(tmp_path, "--use_peft", "true").bf16 is not began  # another stage, which has not begun
    assert asked


def test_a_stage_that_began_in_fp16_stays_there(tmp_path, measured):
    asked = measured(9.0)
    begun(tmp_path, "ppo_full", bf16=False, fp16=True)
    args = read(tmp_path)
    assert (precision(args)["taken"], asked) == ("fp16", [])


@pytest.mark.parametrize("flags", [("--bf16", "false"), ("--bf16=false",), ("--fp16", "true")])
def test_a_flag_comes_before_what_the_run_began_with(tmp_path, measured, flags):
    asked = measured(9.0)
    begun(tmp_path, "ppo_full", bf16=True, fp16=False)
    args = read(tmp_path, *flags)
    assert (args.bf16, asked, precision_line(args)) == (False, [], None)


def test_fp16_that_is_switched_off_is_not_taken_up_again(tmp_path, measured):
    asked = measured(9.0)
    begun(tmp_path, "ppo_full", bf16=False, fp16=True)
    args = read(tmp_path, "--fp16", "false")
    assert (precision(args)["taken"], asked) == ("fp32", [])


def test_a_broken_run_file_is_one_line(tmp_path, measured):
    measured(1.0)
    begun(tmp_path, "ppo_full")
    (tmp_path / "r" / "ppo_full" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: expected JSON"):
        read(tmp_path)


KEPT = """
import json, os, sys
from rlhf.cli import parsing
from rlhf.cli.train_ppo import stage_name
from rlhf.config import PPOStageConfig, PromptConfig, RunConfig
from trl import ModelConfig
rank, out = int(os.environ["RANK"]), sys.argv[1]
if rank:
    parsing.read_run = None  # this rank's file system lags behind
argv = ["--run", "r", "--runs_dir", out, "--use_cpu", "true", "--report_to", "none"]
args = parsing.parse([RunConfig, PromptConfig, ModelConfig, PPOStageConfig], argv, stage=stage_name)[-1]
with open(f"{out}/{rank}.json", "w") as file:
    json.dump([args.bf16, args.mixed_precision, args.world_size], file)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_all_ranks_keep_what_the_first_finds_in_the_run(tmp_path, engine):
    begun(tmp_path, "ppo_full", bf16=True, fp16=False)
    script = tmp_path / "kept.py"
    script.write_text(KEPT)
    workers.run(script, [str(tmp_path)], processes=2, engine=engine)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[True, "bf16", 2]] * 2


class Gpu:
    """torch.cuda as on a V100."""

    @staticmethod
    def is_bf16_supported(including_emulation=True):
        return including_emulation


@pytest.fixture
def gpu(monkeypatch):
    def there(module=Gpu):
        device = torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)
        monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)

    return there


def test_bf16_that_is_emulated_is_not_fast(gpu):
    gpu()
    assert bf16_is_fast() is False


def test_bf16_is_asked_of_the_device_that_is_used(gpu, monkeypatch, measured):
    class Newer(Gpu):
        @staticmethod
        def is_bf16_supported(including_emulation=True):
            return True

    gpu(Newer)
    asked = measured(0.5)
    assert bf16_is_fast() is True
    assert asked == []
    assert bf16_is_fast(use_cpu=True) is False
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    for where in ("argument", "launcher"):
        args.use_cpu, args.bf16 = where == "argument", None
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(where == "launcher"))
        choose_hardware(args)
        assert (args.use_cpu, args.bf16) == (True, False)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("asked", "speed", "found"),
    [
        ("fp32", 9.0, {"taken": "fp32", "why": None}),
        ("bf16", 0.1, {"taken": "bf16", "why": None}),
        ("auto", 1.19, {"taken": "fp32", "why": "bf16 measured: 1.19 times as fast"}),
        ("auto", 1.2, {"taken": "bf16", "why": "bf16 measured: 1.2 times as fast"}),
    ],
)
def test_an_evaluation_measures_only_where_it_may_choose(measured, monkeypatch, asked, speed, found):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    measurements = measured(speed)
    assert evaluation_precision(asked) == found
    assert measurements == ([speed] if asked == "auto" else [])


@pytest.mark.parametrize(("word", "taken"), [("bf16", "bf16"), ("no", "fp32"), ("fp16", "fp32")])
def test_an_evaluation_that_may_choose_asks_the_launcher_first(measured, launched, word, taken):
    asked = measured(9.0)
    launched(word)
    assert evaluation_precision("auto") == {"taken": taken, "why": f"accelerate launch: {word}"}
    assert evaluation_precision("fp32") == {"taken": "fp32", "why": None}
    assert asked == []


def test_a_launcher_that_asks_for_what_the_device_lacks_is_one_line(gpu, launched):
    gpu()
    launched("bf16")
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    args.use_cpu, args.bf16 = False, None
    words = "^mixed_precision: accelerate launch asks for bf16, and this device has no bf16; use fp16 or no$"
    with pytest.raises(UserError, match=words):
        choose_hardware(args)
    launched("fp16")
    choose_hardware(args)
    assert (args.bf16, args.fp16) == (False, True)
    launched("bf16")
    args.use_cpu, args.bf16, args.fp16 = True, None, False  # the CPU can do it, however slowly
    choose_hardware(args)
    assert args.bf16 is True


@pytest.mark.parametrize(
    ("there", "line"), [(False, "fp32 (this device has no bf16)"), (True, "bf16 (this device has bf16)")]
)
def test_of_a_device_its_hardware_is_the_reason(gpu, there, line):
    gpu(type("Device", (), {"is_bf16_supported": staticmethod(lambda including_emulation: there)}))
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    args.use_cpu, args.bf16 = False, None
    choose_hardware(args)
    assert precision_line(args) == line


@pytest.mark.parametrize("kind", [PPOConfig, RewardStageConfig])
def test_recomputation_is_asked_for_by_either_name(kind):
    assert config(kind, bf16=False, gradient_checkpointing=True).activation_checkpointing is True
    assert config(kind, bf16=False, gradient_checkpointing=False).activation_checkpointing is False
    both = config(kind, bf16=False, gradient_checkpointing=True, activation_checkpointing=False)
    assert both.activation_checkpointing is False


def test_one_slow_call_after_the_first_does_not_end_the_measurement():
    now, made = [0.0], []
    seconds = {"fp32": itertools.repeat(0.01), "bf16": iter([0.02, 1.0, *[0.005] * 9])}

    def work(name):
        made.append(name)
        now[0] += next(seconds[name])

    assert module._speed(lambda: work("fp32"), lambda: work("bf16"), lambda: now[0]) == 2.0
    assert made.count("bf16") == module._TRIES + 1


def test_an_evaluation_on_the_cpu_of_a_machine_with_a_gpu_measures_the_cpu(gpu, monkeypatch, measured):
    gpu(type("Device", (), {"is_bf16_supported": staticmethod(lambda including_emulation: True)}))
    measured(0.5)
    assert evaluation_precision("auto") == {"taken": "bf16", "why": "this device has bf16"}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert evaluation_precision("auto") == {"taken": "fp32", "why": "bf16 measured: 0.5 times as fast"}
