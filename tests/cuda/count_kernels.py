"""Count kernels and waits of a PPO step on the pretend CUDA device, and write rlhf/benchmark/kernels.json.

    python tests/cuda/count_kernels.py --write     # counts all and writes the file
    python tests/cuda/count_kernels.py --check     # counts one step of other sizes; exit code 1 where the file differs

A phase of a step costs the same each time its unit is done (a decoded token, a scoring pass, a micro-batch, an
optimizer step) and the same for each layer, whatever the widths. So a few tiny steps that differ in these numbers
give all coefficients, and a step of other sizes shows whether they hold.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import shim  # noqa: E402

shim.load()  # before torch is imported

import json  # noqa: E402
import tempfile  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import counts  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from pretend import pretend  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import rlhf.models.actor_critic  # noqa: E402
import rlhf.perf.work  # noqa: E402
from rlhf.benchmark import work  # noqa: E402
from rlhf.benchmark.predict import KERNELS, UNITS, Sizes, counted  # noqa: E402
from rlhf.config import PPOConfig  # noqa: E402
from rlhf.ppo.trainer import PhaseTimer, PPOTrainer  # noqa: E402

_VOCABULARY = 64
_CHUNKS = 2  # in which gpt2-medium computes a pass's logits: 16 x 128 tokens x 50,257
# Each unit's number changes by itself, or beside one that another phase counts.
_STEPS = (
    {"tokens": 16, "passes": 2, "micro_batches": 2, "optimizer_steps": 1},
    {"tokens": 32, "passes": 4, "micro_batches": 4, "optimizer_steps": 1},
    {"tokens": 16, "passes": 2, "micro_batches": 2, "optimizer_steps": 2},
)
_LAYERS = (1, 2)
_OTHER = {"tokens": 48, "passes": 3, "micro_batches": 3, "optimizer_steps": 2, "layers": 3}


@dataclass(frozen=True)
class Count:
    """Of one phase of one step. Copies from pageable memory count as waits."""

    kernels: int
    waits: int


def _so_far() -> dict[str, tuple[int, int]]:
    """Kernels and waits of each phase."""
    now = counts.now()
    tables = (now.kernels, now.syncs)
    return {
        name: tuple(sum(n for (phase, *_), n in table.items() if phase == name) for table in tables) for name in UNITS
    }


class _Second(TrainerCallback):
    """Notes what the second step took; the first one does some things once."""

    def __init__(self) -> None:
        self.seen = []

    def on_step_end(self, *_, **__):
        self.seen.append(_so_far())

    @property
    def counts(self) -> dict[str, Count]:
        first, second = self.seen
        return {phase: Count(*(b - a for a, b in zip(first[phase], second[phase], strict=True))) for phase in UNITS}


@contextmanager
def _phases():
    """Kernels go to the phase that the trainer times just now, or to `rest`."""
    timed = PhaseTimer.__call__

    @contextmanager
    def with_phase(self, name):
        with timed(self, name), counts.phase(name):
            yield

    PhaseTimer.__call__ = with_phase
    try:
        with counts.phase("rest"):
            yield
    finally:
        PhaseTimer.__call__ = timed


def count(kind: str, sizes: Sizes) -> dict[str, Count]:
    """By phase, of the second step of a tiny GPT-2 in bf16. kind: full or lora."""
    micro = 2
    batch = micro * sizes.micro_batches
    size = {"width": 32, "layers": sizes.layers, "heads": 2, "vocabulary": _VOCABULARY, "positions": 128}
    shape = work.Shape("count", batch, micro, sizes.tokens, sizes.optimizer_steps, **size, mean_response=work.ENDLESS)
    run = work.Run(shape, f"ppo_{kind}", steps=2, precision="bf16")
    tokenizer = work.tokenizer_of(shape)
    policy, reward = work.models_of(shape, tokenizer, 0)
    # Each pass has prompts of several lengths, as those of real ones.
    rows = [{"input_ids": [1 + j % 50 for j in range(8 + i)]} for i in range(batch)]
    second = _Second()
    # Kernel by kernel, as a graph replays them.
    options = {"local_rollout_forward_batch_size": batch // sizes.passes, "cuda_graphs": False}
    rlhf.models.actor_critic._MOST_LOGITS = _VOCABULARY * -(-micro * sizes.tokens // _CHUNKS)
    with tempfile.TemporaryDirectory() as folder, _phases():
        trainer = PPOTrainer(
            args=PPOConfig(**work.settings(run, folder) | options),
            processing_class=tokenizer,
            model=policy,
            reward_model=reward,
            train_dataset=rows,
            peft_config=work.lora_of(("q_proj", "v_proj"), run.rank) if kind == "lora" else None,
            callbacks=[second],
        )
        trainer.train()
    return second.counts


def coefficients(kind: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """What predict.py reads: phase -> unit -> kernels, waits -> fixed, layer."""
    sizes = [Sizes(**step, layers=layers) for layers in _LAYERS for step in _STEPS]
    counts = [count(kind, one) for one in sizes]
    found = {}
    for phase, units in UNITS.items():
        terms = [[x for unit in units for x in (one.times(unit), one.times(unit) * one.layers)] for one in sizes]
        found[phase] = {unit: {} for unit in units}
        for what in ("kernels", "waits"):
            seen = [getattr(one[phase], what) for one in counts]
            solved, *_ = np.linalg.lstsq(np.array(terms, float), np.array(seen, float), rcond=None)
            off = np.abs(np.array(terms) @ solved - seen).max()
            if off > 1e-6:
                raise SystemExit(f"{kind}, {phase}: {what} {seen} are no sum over {units} and layers; off by {off:.2f}")
            for i, unit in enumerate(units):
                fixed, layer = (round(float(x), 6) + 0.0 for x in solved[2 * i : 2 * i + 2])
                found[phase][unit][what] = {"fixed": fixed, "layer": layer}
    return found


def differences(kind: str, stored: dict) -> list[str]:
    """One line for each count of a step of other sizes that is not what the stored coefficients say."""
    sizes, lines = Sizes(**_OTHER), []
    said = counted(stored["works"][kind], sizes)
    for phase, one in count(kind, sizes).items():
        for what in ("kernels", "waits"):
            expected, found = said[phase][what], getattr(one, what)
            if abs(expected - found) > 0.01:
                lines.append(f"{kind}, {phase}: {KERNELS.name} says {expected:g} {what}, counted {found}")
    return lines


def main() -> None:
    # Measuring the machine is no part of a step.
    rlhf.perf.work.matmul_peak = rlhf.perf.work.memory_bandwidth = lambda *_: 1e12
    kinds = sys.argv[2:] or ["full", "lora"]
    with pretend():
        if sys.argv[1:2] == ["--write"]:
            found = {
                "made by": "python tests/cuda/count_kernels.py --write",
                "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
                "decoding is captured": True,
                "works": {kind: coefficients(kind) for kind in kinds},
            }
            KERNELS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        elif sys.argv[1:2] == ["--check"]:
            stored = json.loads(KERNELS.read_text(encoding="utf-8"))
            lines = [line for kind in kinds for line in differences(kind, stored)]
            print("\n".join(lines) or "as stored")
            sys.exit(bool(lines))
        else:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
