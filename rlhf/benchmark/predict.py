"""Predicted time of a PPO step on a GPU, from counted kernels, bytes and FLOPs, and the ideal time."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlhf.benchmark.work import MAX_PROMPT, Run, Shape, lora_of, models_of, tokenizer_of
from rlhf.config import PPOConfig
from rlhf.errors import UserError, did_you_mean
from rlhf.perf.work import Flops
from rlhf.ppo.roles import build_roles

KERNELS = Path(__file__).with_name("kernels.json")
# The units of work of each phase; `step` occurs once.
UNITS = {
    "generate": ("tokens", "step"),
    "score": ("passes", "step"),
    "learn": ("micro_batches", "optimizer_steps", "step"),
    "rest": ("tokens", "step"),
}


@dataclass(frozen=True)
class Sizes:
    """How often a step does each unit of work."""

    layers: int
    tokens: int  # per response; as many calls of the policy, including the one on the prompts
    passes: int  # over complete texts; each through all roles
    micro_batches: int  # per optimizer step
    optimizer_steps: int

    def times(self, unit: str) -> int:
        """How often a step does `unit`, a unit in UNITS."""
        if unit == "micro_batches":
            return self.micro_batches * self.optimizer_steps
        return 1 if unit == "step" else int(getattr(self, unit))


def stored_kernels() -> dict[str, Any]:
    """The content of kernels.json, written by tests/cuda/count_kernels.py.

    works -> full or lora -> phase -> unit -> kernels or waits: a unit takes fixed + layer x layers of them.
    """
    found: dict[str, Any] = json.loads(KERNELS.read_text(encoding="utf-8"))
    return found


def counted(work: dict[str, Any], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Kernels and waits by phase. work: the coefficients of full or lora."""
    return {
        phase: {
            what: sum(
                sizes.times(unit) * (one[what]["fixed"] + one[what]["layer"] * sizes.layers)
                for unit, one in units.items()
            )
            for what in ("kernels", "waits")
        }
        for phase, units in work.items()
    }


@dataclass(frozen=True)
class GPU:
    """Assumptions about a GPU: the first two from its data sheet, the others estimated."""

    peak_tflops: float  # of dense bf16 matrix products
    bandwidth_gbs: float  # of its memory
    share: float = 0.45  # of the peak that passes reach, including element-wise kernels
    launch_us: float = 16.0  # host time per kernel: Python, PyTorch's dispatch, the launch itself
    captured_us: float = 2.0  # per kernel replayed from a CUDA graph
    wait_us: float = 20.0  # per wait of the host for the GPU, while its queue empties and fills again


GPUS = {"h100": GPU(989, 3350), "h200": GPU(989, 4800), "a100": GPU(312, 2039)}


def gpu_of(name: str, **changes: float | None) -> GPU:
    """One of GPUS, or a JSON file with the fields of a GPU. changes: fields to replace; None keeps one."""
    fields: Any = asdict(GPUS[name]) if name in GPUS else _read(name)
    try:
        gpu = GPU(**fields | {field: value for field, value in changes.items() if value is not None})
    except TypeError as error:
        raise UserError(f"predict: expected peak_tflops, bandwidth_gbs, ... in {name}, found: {error}") from None
    for field, value in asdict(gpu).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{field}: expected a positive number, found {value!r}")
    if gpu.share > 1:
        raise UserError(f"share: expected at most 1, found {gpu.share}")
    return gpu


def _read(name: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        known = f"expected one of {', '.join(GPUS)}, or a JSON file of its figures"
        raise UserError(f"predict: {known}, found {name!r}{did_you_mean(name, GPUS)}")
    return found


# Bytes read and written in bf16 autocast from float32 weights.
_CAST = 6  # per weight and pass: read in float32, written in bf16
_USED = 2  # per weight and product: read in bf16
_GRADIENT = 20  # per trained weight and micro-batch: written in bf16, cast to float32, added to the sum
_OPTIMIZER = 40  # per trained weight and optimizer step: norm and clipping 12, Adam 28
_STATE = 70  # per number of a token's state and layer: what a GPT-2 block writes and reads between its products
_STATE_TRAINED = 210  # the same with its backward pass
_LOGIT = 32  # per logit: softmax, entropy, KL in float32
_LOGIT_TRAINED = 70  # the same with the gradient


@dataclass(frozen=True)
class Phase:
    """The work of one phase of a step."""

    name: str
    kernels: float
    waits: float
    flops: float = 0
    bytes: float = 0  # by the present code
    least_bytes: float = 0  # needed by any code, if memory is the limit
    captured: bool = False  # its kernels are replayed from a CUDA graph

    def seconds(self, gpu: GPU) -> dict[str, float]:
        """launch, compute, memory, waiting, predicted and floor.

        The first three overlap, so the longest one counts; waits are added.
        """
        found = {
            "launch": self.kernels * (gpu.captured_us if self.captured else gpu.launch_us) / 1e6,
            "compute": self.flops / (gpu.share * gpu.peak_tflops * 1e12),
            "memory": self.bytes / (gpu.bandwidth_gbs * 1e9),
        }
        waiting = self.waits * gpu.wait_us / 1e6
        floor = max(self.flops / (gpu.peak_tflops * 1e12), self.least_bytes / (gpu.bandwidth_gbs * 1e9))
        return found | {"waiting": waiting, "predicted": max(found.values()) + waiting, "floor": floor}


def phases(shape: Shape, kind: str, captured: bool | None = None) -> list[Phase]:
    """The phases of one step at full lengths: prompts of MAX_PROMPT tokens, responses of maximum length.

    kind: full or lora. captured: whether decoding is replayed from a CUDA graph; None: as stored.
    """
    if shape.path:
        raise UserError(f"shape: expected a GPT-2, whose kernels are counted, found {shape.name!r}")
    stored = stored_kernels()
    captured = bool(stored["decoding is captured"]) if captured is None else captured
    models = _roles(shape, kind)
    policy, critic = models[:2]
    n, prompt, answer, epochs = shape.batch, MAX_PROMPT, shape.response, shape.n_ppo_epochs
    prompts, answers, texts = [prompt] * n, [answer] * n, [prompt + answer] * n
    passes = -(-n // shape.micro)
    numbers = shape.width * shape.layers  # of a token's states
    logits = n * answer * shape.vocabulary

    found = counted(stored["works"][kind], Sizes(shape.layers, answer, passes, passes, epochs))
    first = counted(stored["works"][kind], Sizes(shape.layers, 1, passes, passes, epochs))["generate"]
    later = {what: found["generate"][what] - first[what] for what in first}

    read = (policy.matrices + policy.head) * _USED + sum(prompts) * (policy.key_values * 2 + numbers * _STATE)
    decoded = policy.decoded_bytes(prompts, answers, 2)
    scored = sum(map(_weights, models)) * passes * (_CAST + _USED) + 2 * logits * _LOGIT
    scored += len(models) * sum(texts) * numbers * _STATE
    learned = float(epochs * logits * _LOGIT_TRAINED)
    for model in (policy, critic):
        trained = model.trained + (model.head if model.head_trained else 0)
        a_micro_batch = _weights(model) * (_CAST + 2 * _USED) + trained * _GRADIENT
        learned += epochs * (passes * a_micro_batch + trained * _OPTIMIZER + sum(texts) * numbers * _STATE_TRAINED)

    looked = sum(model.forward(texts, n * answer) for model in models)  # a model without a head has no logits
    trained_on = epochs * (policy.training(texts, n * answer) + critic.training(texts))
    return [
        Phase("generate, prompts", **first, flops=policy.forward(prompts, n), bytes=read),
        Phase("generate, tokens", **later, flops=policy.decoding(prompts, answers), bytes=decoded, least_bytes=decoded,
              captured=captured),
        Phase("score", **found["score"], flops=looked, bytes=scored),
        Phase("learn", **found["learn"], flops=trained_on, bytes=learned),
        Phase("rest", **found["rest"]),
    ]  # fmt: skip


def _weights(model: Flops) -> int:
    return model.matrices + model.head


@cache
def _roles(shape: Shape, kind: str) -> tuple[Flops, ...]:
    """Policy, critic, reference and reward model, built without weights."""
    with torch.device("meta"):
        policy, reward = models_of(shape, tokenizer_of(shape), 0)
        lora = lora_of(("q_proj", "v_proj"), Run(shape).rank) if kind == "lora" else None
        args = PPOConfig(output_dir="none", use_cpu=True, bf16=False, report_to="none")
        roles = build_roles(args, policy, None, reward, None, lora)
    found = [Flops.of(roles.trained.policy), Flops.of(roles.trained.critic)]
    for frozen in (roles.reference, roles.reward):
        assert frozen is not None
        with frozen.active() as model:
            found.append(Flops.of(model))
    return tuple(found)


def predict(shape: Shape, gpu: GPU, captured: bool | None = None) -> dict[str, Any]:
    """For full and lora: the work of each phase, and its seconds."""
    works = {kind: phases(shape, kind, captured) for kind in ("full", "lora")}
    return {
        "gpu": asdict(gpu),
        "versions": stored_kernels()["versions"],
        "works": {kind: [asdict(one) | one.seconds(gpu) for one in found] for kind, found in works.items()},
    }


_COLUMNS = ("launch", "compute", "memory", "waiting", "predicted", "floor")


def prediction_table(found: dict[str, Any], shape: Shape, name: str) -> str:
    """The result of `predict` as text, with the assumptions."""
    gpu = GPU(**found["gpu"])
    lines = [
        f"Predicted, not measured: one PPO step of {shape.name} on one {name}. Batch {shape.batch}, micro-batch "
        f"{shape.micro}, {MAX_PROMPT} prompt + {shape.response} response tokens, {shape.n_ppo_epochs} PPO epochs, bf16."
    ]
    for kind, rows in found["works"].items():
        lines += ["", f"PPO {kind:14}{'kernels':>9}{'waits':>7}" + "".join(f"{c:>11}" for c in _COLUMNS) + "  bound by"]
        for row in rows:
            times = {column: row[column] for column in ("launch", "compute", "memory")}
            lines.append(_line(row["name"], row, max(times, key=lambda column: times[column])))
        whole = {column: sum(row[column] for row in rows) for column in ("kernels", "waits", "predicted", "floor")}
        lines.append(_line("a step", whole, f"{whole['predicted'] / whole['floor']:.1f} x the floor"))
        answers = shape.response - 1
        kernels, waits = (rows[1][what] / answers for what in ("kernels", "waits"))
        lines.append(f"  {kernels:.0f} kernels and {waits:.2f} waits per token; {_others(rows, gpu)}")
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    lines += [
        "",
        "Seconds. predicted = the longest of launch, compute, memory, + waiting. Assumed:",
        f"  launch: {gpu.launch_us:g} us of host time per kernel, {gpu.captured_us:g} us if a CUDA graph replays it; "
        f"kernels as counted on the pretend CUDA device ({versions})",
        f"  compute: {gpu.share:.0%} of {gpu.peak_tflops:g} TFLOP/s; FLOPs of rlhf/perf/work.py, causal attention, "
        "logits of response tokens only",
        f"  memory: {gpu.bandwidth_gbs:g} GB/s; decoding: weights and keys and values in bf16; learning: weights cast "
        "from float32 per micro-batch, gradients summed in float32, Adam, states between products",
        f"  waiting: {gpu.wait_us:g} us each time that the host waits for the GPU",
        "  floor: all FLOPs at the peak, decoding at the bandwidth; no launches, no optimizer, products only",
    ]
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any], end: str) -> str:
    times = "".join(f"{row[column]:11.3f}" if column in row else " " * 11 for column in _COLUMNS)
    return f"  {name:18}{row['kernels']:7,.0f}{row['waits']:7,.0f}{times}  {end}"


def _others(rows: list[dict[str, Any]], gpu: GPU) -> str:
    """The step with a faster and a slower host: launch time is the least certain assumption."""
    parts = []
    for factor in (0.5, 1.5):
        hosts = [row["launch"] * (1 if row["captured"] else factor) for row in rows]
        longest = (max(host, row["compute"], row["memory"]) for host, row in zip(hosts, rows, strict=True))
        step = sum(longest) + sum(row["waiting"] for row in rows)
        parts.append(f"{step:.2f} s at {factor * gpu.launch_us:g} us")
    return "a step " + ", ".join(parts) + " per launch"
