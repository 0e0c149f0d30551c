"""Evaluate base and trained policies on unseen prompts: rlhf evaluate --config RECIPE/evaluation.yaml --run NAME."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import enable_tf32, is_torch_tf32_available

from rlhf.cli.parsing import parse, read_asked
from rlhf.cli.script import run_script
from rlhf.cli.stage_head import show_stage
from rlhf.config import EvaluationConfig, PromptConfig, StageRunConfig
from rlhf.config.fields import changed_settings
from rlhf.config.precision import evaluation_precision, in_words
from rlhf.console import quiet, screen
from rlhf.console.steps import Steps
from rlhf.console.words import gigabytes, interval, one_line, percent, plain, signed
from rlhf.data.oasst import TextPrompt, fetch_prompts
from rlhf.data.prompts import prompt_sets
from rlhf.distributed.collectives import from_main, join_processes, main_process_first, on_all
from rlhf.distributed.launch import check_fsdp
from rlhf.distributed.preemption import StopAtOnce
from rlhf.errors import UserError
from rlhf.evaluation.answered import Answered
from rlhf.evaluation.generate import as_reward, respond, weighted_rewards
from rlhf.evaluation.summary import summarise
from rlhf.file_types import Evaluation, Precision, ResponseRow, RunFile
from rlhf.model_card.card import write_card
from rlhf.models.kernels.attention import use_cpu_attention
from rlhf.models.load import fetch_model, load_causal_lm, load_reward_model, load_tokenizer, stop_ids
from rlhf.models.unwrap import unwrap_peft
from rlhf.perf.hardware import peak_memory
from rlhf.reporting.values import NAMES
from rlhf.reward.named import WeightedRewards, named_rewards
from rlhf.reward.reward_functions import Reward
from rlhf.reward.tokenizers import saved_tokenizer
from rlhf.storage.basis import verdict
from rlhf.storage.run_folder import Stage, anywhere, in_run, write_json, write_rows
from rlhf.storage.stages import ANSWERED, POLICIES, TITLES, read_run, require_stage, stage_ids
from rlhf.tracking.recorder import write_summary

KINDS = [StageRunConfig, PromptConfig, EvaluationConfig]


def main() -> None:
    run, data, config = parse(KINDS)
    folder, asked = run.folder() / "evaluation", read_asked(KINDS)
    join_processes(config.ddp_timeout)
    if from_main(lambda: verdict(folder, asked) == "done"):
        screen.say(f"evaluation: already done in {folder}")
        return
    check_fsdp("FSDP_CPU_RAM_EFFICIENT_LOADING")  # it would load weights in one process only
    functions = on_all(lambda: named_rewards(config.rewards))
    reward_path, gold_path = from_main(lambda: reward_models(run.folder(), config.reward_model_path, config.rewards))
    tuned, runs = from_main(lambda: tuned_models(run.folder()))
    given = bool(config.reward_model_path or config.rewards)
    read = from_main(lambda: stage_ids(run.folder(), *stages_read(run.folder(), given)))
    paths = {"base": config.base_model} | {name: str(path) for name, path in tuned.items()}
    quiet.log_to(run.folder() / "logs", "evaluation")
    with main_process_first():
        tokenizer = load_tokenizer(config.base_model)
        fetch_prompts(data.prompt_dataset, data.prompt_revision, data.prompt_dir)
        for path in filter(None, (reward_path, gold_path)):
            saved_tokenizer(path)  # fetched from the hub if it is there
            fetch_model(path)
        for path in paths.values():
            fetch_model(path)
    split, counts = on_all(lambda: prompt_sets(data, tokenizer, config.chat_template_kwargs))
    check_unseen(split.evaluation, runs)
    device = PartialState().device
    if config.eval_tf32 and device.type == "cuda" and is_torch_tf32_available():
        enable_tf32(True)
    facts = f"{len(split.evaluation):,} unseen prompts, {len(paths)} models"
    precision = from_main(lambda: begun_precision(folder, config)) or evaluation_precision(config.eval_precision)
    show_stage(TITLES["evaluation"], facts, device, in_words(precision), run.folder())
    rows: list[ResponseRow] = []
    rating: list[ResponseRow] = []
    judge = anywhere(config.reward_model_path) if config.reward_model_path else reward_path
    settings = run.place() | asdict(data) | asdict(config)
    with StopAtOnce(), Stage(folder, "evaluation", settings, config.eval_seed, asked, read) as stage:
        stage.record(
            changed=changed_settings(run, data, config),
            precision=precision,
            data={"prompts": counts},
            model_paths=paths | {"base": anywhere(config.base_model)},
            model_ids={name: runs[name].get("id") for name in tuned},
            judge_paths={"reward": judge, "gold": gold_path},
        )
        kept = Answered(folder)
        base = ready(load_causal_lm(paths["base"]), device)
        scored_by, second = judges(reward_path, gold_path, functions, base, tokenizer, config)
        sets = {"evaluation": split.evaluation, "rating": split.rating}
        bar = Steps(("prompts",), sum(map(len, sets.values())) * len(paths), rows=0)
        bar.start()
        for name, path in paths.items():
            policy = base if name == "base" else ready(load_causal_lm(path), device)
            roles, eos_ids = (policy, tokenizer, scored_by), stop_ids(policy, tokenizer)
            other, answered = None if policy is base else base, partial(bar.advance, now=name)
            for part, found, more in (("evaluation", rows, (other, second)), ("rating", rating, (None, None))):
                done, keep = kept.of(part, name, sets[part]), partial(kept.add, part)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision["taken"] == "bf16"):
                    found += respond(name, *roles, sets[part], config, eos_ids, *more, answered, done, keep)
            del roles
            del policy
            gc.collect()  # one tuned policy in memory at a time
        bar.close()
        if stage.is_main:
            write_rows(folder / "responses.jsonl", rows)
            write_rows(folder / "rating_responses.jsonl", rating)
        summary = summarise(rows, list(paths), config.confidence, config.eval_seed)
        for name, path in paths.items():
            summary["models"][name]["path"] = in_run(run.folder(), path)
        if stage.is_main:
            write_json(folder / "evaluation.json", summary)
            numbers = {f"reward/{name}": model["mean_reward"] for name, model in summary["models"].items()}
            numbers |= {f"gain/{name}": gain["gain"] for name, gain in summary["gains"].items()}
            texts = {f"{row['model']}/{i}": f"{row['prompt']}\n\n{row['response']}" for i, row in _first(rows, 4)}
            write_summary(folder, numbers, texts, asdict(data) | asdict(config))
            kept.remove()
            screen.note("\n".join([gains_table(summary), *sample(rows)]))
            screen.ended(f"peak {gigabytes(peak_memory(device))}")
    if stage.is_main:
        for stage_folder in tuned.values():
            write_card(stage_folder)  # again: now it has figures


def ready(model: Any, device: torch.device) -> Any:
    """The model on the device; on a CPU it attends as in PPO."""
    use_cpu_attention(unwrap_peft(model))
    return model.to(device)


def judges(
    reward_path: str | None,
    gold_path: str | None,
    functions: Sequence[Callable[..., Any]],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
) -> tuple[Reward | WeightedRewards, Reward | None]:
    """What scores the responses, and the second reward model if there is one."""
    read_by = base, tokenizer, config
    models = [ready(load_reward_model(path), base.device) for path in (reward_path, gold_path) if path is not None]
    second = None if gold_path is None else as_reward("second reward model", models[-1], *read_by)
    model = None if reward_path is None else models[0]
    if functions or model is None:
        return weighted_rewards(model, functions, *read_by), second
    return as_reward("reward model", model, *read_by), second


def tuned_models(folder: Path) -> tuple[dict[str, Path], dict[str, RunFile]]:
    """Folder and run.json of each PPO stage that the run has, by the model's name.

    A UserError if one is not done, or if there is none.
    """
    runs = {name: found for name, stage in POLICIES.items() if (found := read_run(folder / stage))}
    if not runs:
        raise UserError(f"{folder}: no PPO stage is done; run ppo_full or ppo_lora first")
    return {name: require_stage(folder / POLICIES[name]) for name in runs}, runs


def check_unseen(prompts: Sequence[TextPrompt], runs: dict[str, RunFile]) -> None:
    """A UserError if a model was trained on some of the prompts. runs: run.json by model."""
    for name, facts in runs.items():
        seen = set(facts.get("train_tree_ids", [])) & {p.tree_id for p in prompts}
        if seen:
            raise UserError(
                f"evaluation prompts: {name} was trained on {len(seen)} of them; "
                "give all stages the same prompt settings"
            )


def begun_precision(folder: Path, config: EvaluationConfig) -> Precision | None:
    """An evaluation that goes on keeps the precision that it has begun with: another machine would choose another."""
    goes_on = config.eval_precision == "auto" and (folder / ANSWERED).exists()
    return read_run(folder).get("precision") if goes_on else None


def stages_read(folder: Path, given: bool) -> list[str]:
    """The stages whose results the evaluation of this run rests on. given: it scores by other rewards than its own."""
    own = [] if given else ["reward"]
    return [*own, *(name for name in ("reward_gold", *POLICIES.values()) if read_run(folder / name))]


def reward_models(
    folder: Path, reward_path: str | None, functions: Sequence[str] = ()
) -> tuple[str | None, str | None]:
    """The paths of the reward model that scores (None if functions alone do), and of the run's second one, if any.

    A UserError if the second one was trained on pairs that the first was trained on.
    """
    first, second = folder / "reward", folder / "reward_gold"
    reward = reward_path if reward_path or functions else str(require_stage(first))
    if not read_run(second):
        return reward, None
    require_stage(second)
    if reward_path is None and not functions:
        seen = set(read_run(first).get("train_openings", [])) & set(read_run(second).get("train_openings", []))
        if seen:
            raise UserError(
                f"{second}: {len(seen)} openings of its training pairs are also in {first}'s; "
                "give both stages the same data settings"
            )
    return reward, str(second)


def gains_table(summary: Evaluation) -> str:
    """Every model's mean reward, and the gains over the base model by both reward models."""
    level = percent(summary["confidence"])
    rows = [["", "reward", "gain", f"[{level}]", "second model", f"[{level}]", "wins", "ended"]]
    for name, model in summary["models"].items():
        cells = ["", "", "", "", ""]
        if gain := summary["gains"].get(name):
            gold = summary["validity"][name].get("gold")
            second = [signed(gold["gain"]), interval(*gold["interval"])] if gold else ["", ""]
            cells = [signed(gain["gain"]), interval(*gain["interval"]), *second, percent(gain["win_rate"])]
        rows.append([NAMES.get(name, name), plain(model["mean_reward"]), *cells, percent(model["eos_rate"])])
    return screen.table(rows, "<>>>>>>>", 2)


def sample(rows: Sequence[ResponseRow]) -> list[str]:
    """One prompt with every model's response: the one whose gain over the base model is the median."""
    by_prompt: dict[str, dict[str, ResponseRow]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], {})[row["model"]] = row
    whole = [found for found in by_prompt.values() if "base" in found and len(found) > 1]
    if not whole:
        return []
    whole.sort(key=lambda found: max(row["score"] for row in found.values()) - found["base"]["score"])
    chosen = whole[len(whole) // 2]
    lines = [f'"{one_line(chosen["base"]["prompt"], 70)}"']
    for name, row in chosen.items():
        lines.append(f"  {NAMES.get(name, name):<5}{row['score']:+5.1f}  {one_line(row['response'], 60)}")
    return lines


def _first(rows: list[ResponseRow], count: int) -> list[tuple[int, ResponseRow]]:
    """The first rows of each model, numbered."""
    models = dict.fromkeys(row["model"] for row in rows)
    return [(i, row) for m in models for i, row in enumerate([r for r in rows if r["model"] == m][:count])]


if __name__ == "__main__":
    run_script(main)
