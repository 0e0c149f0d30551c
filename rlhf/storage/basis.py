"""What a stage's results rest on: settings, data files, earlier stages. Whether they hold for what is asked for now.

Like `stages` it imports nothing heavy.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from rlhf.data.sources import DATA_SUFFIXES, DEMO, local_path
from rlhf.errors import UserError
from rlhf.file_types import Basis, RunFile, Settings
from rlhf.storage.stages import ANSWERED, REPORT, STAGES, basis, changed_stages, read_run, says_done

# Fields that change no result, by what they are for.
HARMLESS = {
    "place": "run runs_dir verbose output_dir redo dry_run config",
    "logs": "logging_strategy logging_first_step log_level log_level_replica log_on_each_node disable_tqdm report_to "
    "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id num_sample_generations title author",
    "hub": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "checkpoints": "save_strategy save_steps save_minutes save_total_limit save_on_each_node save_only_model "
    "enable_jit_checkpoint resume_from_checkpoint restore_callback_states_from_checkpoint max_skipped_updates",
    "processes": "use_cpu local_rank ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_find_unused_parameters "
    "ddp_broadcast_buffers ddp_static_graph dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_multiprocessing_context dataset_num_proc",
    "memory and speed": "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
    "activation_checkpointing_kwargs activation_offloading torch_empty_cache_steps cuda_graphs micro_batch_tokens "
    "local_rollout_forward_batch_size per_device_eval_batch_size eval_batch_size eval_accumulation_steps "
    "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
    "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size",
    "none": "trust_remote_code debug skip_memory_metrics do_train do_eval do_predict",
}
_HARMLESS = {name for names in HARMLESS.values() for name in names.split()}

_PRECISION = ("bf16", "fp16")

# These make the global batch, or only say how it is split.
_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")

_MODELS = ("model_name_or_path", "base_model", "reward_model_path")

_SOURCES = ("dataset_name", "prompt_dataset", *_MODELS)  # what is read, by name: its content counts

# Of a model's folder: what its weights and its tokenizer are read from.
_MODEL_FILES = ("*.safetensors", "*config.json", "*token*", "vocab*", "merges.txt", "*.jinja")

_BLOCKS, _BLOCK = 64, 1 << 14  # of a file of weights, evenly spread: other weights differ in some

_REPORTING = Path(__file__).resolve().parents[1] / "reporting"

_SHOWN = 4  # differences in one line


@dataclass(frozen=True)
class Asked:
    """What a stage is asked for now."""

    given: Settings  # the fields that the recipe and flags set
    defaults: Settings = field(default_factory=dict)  # of all fields
    flags: Settings = field(default_factory=dict)  # those of `given` that are not the recipe's
    recipe: str | None = None  # digest of the recipe's file
    redo: bool = False  # start over where settings differ
    processes: int | None = None  # that run the stage; None if nobody knows yet

    def get(self, name: str) -> Any:
        """The value of a field."""
        return self.given.get(name, self.defaults.get(name))


def basis_of(asked: Asked, read: Mapping[str, str]) -> Basis:
    """What run.json says of a stage that starts. read: earlier stage -> its id."""
    return {
        "given": counted(asked.given),
        "flags": counted(asked.flags),
        "recipe": asked.recipe,
        "data": {name: found for one in _SOURCES for name in _listed(asked.get(one)) if (found := _digest(one, name))},
        "stages": dict(read),
    }


def counted(given: Settings) -> Settings:
    """The fields that may change a result, as JSON has them."""
    found = {name: value for name, value in given.items() if name not in _HARMLESS and value is not None}
    plain: Settings = json.loads(json.dumps(found, default=lambda x: x.value if isinstance(x, Enum) else str(x)))
    return plain


def _digest(source: str, name: str) -> str | None:
    return model_digest(name) if source in _MODELS else data_digest(name)


def _listed(value: Any) -> list[str]:
    return [] if value is None else list(map(str, value)) if isinstance(value, list) else [str(value)]


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_digest(source: str) -> str | None:
    """Of the content of a local data file or folder; None for a data set on the hub, or if there is no such file."""
    path = DEMO / source.removeprefix("demo:") if source.startswith("demo:") else local_path(source)
    try:
        if path.is_file():
            return digest_of(path)
        files = sorted(one for one in path.rglob("*") if one.name.endswith(DATA_SUFFIXES) and one.is_file())
        parts = [f"{one.relative_to(path).as_posix()} {digest_of(one)}" for one in files]
    except (OSError, ValueError):
        return None
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest() if parts else None


def model_digest(name: str) -> str | None:
    """Of a local model, cheaply: of large files the size and a part. None for one that is not local."""
    path = local_path(name)
    try:
        files = [path] if path.is_file() else sorted({one for end in _MODEL_FILES for one in path.glob(end)})
        parts = [f"{one.name} {one.stat().st_size} {_part_digest(one)}" for one in files if one.is_file()]
    except (OSError, ValueError):
        return None
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest() if parts else None


def _part_digest(path: Path) -> str:
    found, last = hashlib.sha256(), max(path.stat().st_size - _BLOCK, 0)
    with path.open("rb") as file:
        for i in range(_BLOCKS):
            file.seek(last * i // (_BLOCKS - 1))
            found.update(file.read(_BLOCK))
    return found.hexdigest()


def differences(facts: RunFile, asked: Asked) -> list[str]:
    """How what is asked for differs from what the stage was started with: "learning_rate 3e-05 → 9e-05".

    facts: its run.json.
    """
    rest, config = basis(facts), facts.get("config", {})
    given, defaults = counted(asked.given), counted(asked.defaults)
    if rest:
        then = {name: rest["given"].get(name, defaults.get(name)) for name in rest["given"].keys() | given.keys()}
    else:  # of an earlier version, which kept settings as they were after checks: only what is given now can differ
        then = {name: config[name] for name in given.keys() & config.keys()}
    now = {name: given.get(name, defaults.get(name)) for name in then}
    changed = [name for name in sorted(then) if then[name] != now[name] and _counts(name, facts, asked)]
    found = [f"{name} {_short(then[name])} → {_short(now[name])}" for name in changed]
    return found + _precision(facts, asked) + _read(rest["data"] if rest else {}, then, asked)


def _counts(name: str, facts: RunFile, asked: Asked) -> bool:
    """Whether a result may depend on this difference."""
    if name in _PRECISION or name in _SOURCES:  # looked at apart
        return False
    if name in _SPLIT:
        return not _same_batch(facts, asked)
    if name == "logging_steps":  # how often is also how often an evaluation chooses among checkpoints
        return asked.get("eval_strategy") == "steps" and asked.get("eval_steps") is None
    return name in asked.given or not asked.defaults or name in asked.defaults  # else this version has no such field


def _same_batch(facts: RunFile, asked: Asked) -> bool:
    """Whether a step has as many rows as it had, however they are split."""
    before, found = facts.get("batch", {}).get("global_batch_size"), asked.get("global_batch_size")
    if found is None:
        rows, parts = (asked.get(name) or 1 for name in _SPLIT)
        if asked.processes is None and not says_done(facts):  # one that resumes looks for itself
            return True
        found = rows * parts * (asked.processes or facts.get("world_size") or 1)
    return bool(before == found)


def _precision(facts: RunFile, asked: Asked) -> list[str]:
    """A stage keeps its precision, so only one that is set can differ."""
    given = {name: asked.given[name] for name in _PRECISION if asked.given.get(name) is not None}
    if not given:
        return []
    now = "bf16" if given.get("bf16") else "fp16" if given.get("fp16") else "fp32"
    config = facts.get("config", {})
    kept = "bf16" if config.get("bf16") else "fp16" if config.get("fp16") else "fp32"
    then = facts["precision"]["taken"] if "precision" in facts else kept
    return [] if now == then or not config else [f"precision {then} → {now}"]


def _read(known: Mapping[str, str], then: Settings, asked: Asked) -> list[str]:
    """Other data files or models, or the same ones with other content. known: their digests."""
    found = []
    for name in _SOURCES:
        before, now = _listed(then.get(name, asked.get(name))), _listed(asked.get(name))
        contents = [known.get(one) for one in before], [_digest(name, one) for one in now]
        if before == now:
            pairs = zip(now, *contents, strict=True)
            found += [f"{one}: other content" for one, old, new in pairs if old and new and old != new]
        elif None in contents[0] or contents[0] != contents[1]:  # a file that was only moved is the same
            found.append(f"{name} {_short(', '.join(before) or None)} → {_short(', '.join(now) or None)}")
    return found


def _short(value: Any) -> str:
    text = "yes" if value is True else "no" if value is False else "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refusal(names: list[str], found: list[str]) -> str:
    """The line for stages whose settings differ."""
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    return f"{', '.join(names)}: settings differ ({shown}): --redo, or another --run"


def report_files(*runs: Path) -> dict[str, str]:
    """What a report on these runs is made of, its own code included -> SHA-256."""
    folders = [run / name for run in runs for name in STAGES]
    inputs = [path for folder in folders for end in ("json", "jsonl") for path in folder.glob(f"*.{end}")]
    inputs += [path for run in runs if (path := run / "ratings" / "ratings.json").is_file()]
    found = {"/".join(path.parts[-3:]): digest_of(path) for path in sorted(inputs)}
    code = [digest_of(path) for path in sorted(_REPORTING.rglob("*")) if path.suffix in (".py", ".j2", ".css", ".js")]
    return found | {"rlhf": hashlib.sha256("".join(code).encode()).hexdigest()}


def report_page(run: Path) -> Path:
    """The page of a run's report, which author and title may have named; where it will be, if there is none yet."""
    return run / REPORT.name / Path(read_run(run / REPORT.name).get("page") or "report.html").name


def report_holds(run: Path, of: Sequence[Path] = ()) -> bool:
    """Whether the report's page is of the files that its runs have now; `of` this run, if no others are given."""
    facts = read_run(run / REPORT.name)
    return report_page(run).is_file() and says_done(facts) and facts.get("files") == report_files(*(of or [run]))


def verdict(folder: Path, asked: Asked) -> Literal["done", "resume", "again"]:
    """Whether the stage's results hold, whether it starts or resumes, or whether it starts over.

    A UserError if its settings differ from those it was started with, unless it may start over.
    """
    facts = read_run(folder)
    if not facts:
        return "resume"
    if has_nothing(folder):
        return "again"
    if found := differences(facts, asked):
        if not asked.redo:
            raise UserError(refusal([folder.name], found))
        return "again"
    if changed_stages(folder):
        return "again"
    return "done" if says_done(facts) else "resume"


def has_nothing(folder: Path) -> bool:
    """Whether the stage has begun, but nothing of it is kept: it failed before its first checkpoint or response."""
    state = read_run(folder).get("status")
    kept = any(folder.glob("checkpoint*")) or (folder / ANSWERED).exists()
    return state == "clearing" or (state == "failed" and not kept)


def clear(folder: Path) -> None:
    """Remove what the stage has written; its lock stays. run.json, which goes last, says so until then."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".lock") or path.name == "run.json":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
