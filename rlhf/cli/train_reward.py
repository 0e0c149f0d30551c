"""Train a reward model: rlhf reward --config RECIPE/reward.yaml --run NAME."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig
from trl.models import unwrap_model_for_generation

from rlhf.cli.parsing import parse, read_asked, required
from rlhf.cli.script import run_script
from rlhf.cli.stage_head import show_stage
from rlhf.config import PreferenceConfig, RewardStageConfig, StageRunConfig
from rlhf.config.batch import batch_facts, batch_line
from rlhf.config.fields import changed_settings
from rlhf.config.model import check_reward_model_config
from rlhf.config.precision import precision, precision_line
from rlhf.console import quiet, screen
from rlhf.console.steps import ROWS
from rlhf.console.words import percent
from rlhf.data.chat import prompt_text
from rlhf.data.hh_rlhf import DROPS, Pair, fetch_pairs, load_pairs, openings, split_pairs
from rlhf.data.layouts import parse_columns
from rlhf.distributed.collectives import from_main, main_process_first, on_all
from rlhf.distributed.launch import engine_name, is_fsdp
from rlhf.distributed.preemption import StopRequest
from rlhf.distributed.sharding import gathered
from rlhf.errors import UserError
from rlhf.file_types import BestStep, PairFigures, RewardEvaluation, ScoredPairs, Settings
from rlhf.memory_estimate.account import read_config
from rlhf.memory_estimate.reward import dry_run
from rlhf.model_card.card import write_card
from rlhf.models.kernels.attention import use_cpu_attention
from rlhf.models.load import (
    base_options,
    check_attention,
    fetch_model,
    load_tokenizer,
    model_options,
    new_reward_model,
)
from rlhf.models.lora import trainable_share
from rlhf.models.older_readers import write_older_names
from rlhf.models.unwrap import unwrap_peft
from rlhf.reward.adapters import check_adapter_engine, lora_config, save_reward_model, with_adapter
from rlhf.reward.audit import audit
from rlhf.reward.trainer import best_step, check_positions, encode_pairs, evaluate_pairs, train_reward_model
from rlhf.storage.basis import verdict
from rlhf.storage.disk import store_once, written_aside
from rlhf.storage.run_folder import Stage, write_json
from rlhf.storage.stages import TITLES
from rlhf.tracking.progress import RewardRows
from rlhf.tracking.recorder import write_summary

TOKEN_DROPS = ("too_long", "identical_tokens")  # what drops pairs once they are tokens
CHUNK = 500  # pairs tokenised per update of the progress bar


def show_outcome(folder: Path, report: RewardEvaluation, pairs: list[Pair], config: Settings) -> None:
    """Send the test figures and four pairs to the trackers; show the accuracy."""
    numbers = {
        f"test/{when}/{name}": value
        for when, figures in (("before", report["before"]), ("after", report["after"]))
        for name, value in figures.items()
        if isinstance(value, float)
    }
    samples = {
        f"pair/{i}": f"{prompt_text(pair.prompt)}\n\nchosen: {pair.chosen}\n\nrejected: {pair.rejected}"
        for i, pair in enumerate(pairs[:4])
    }
    write_summary(folder, numbers, samples, config)
    low, high = report["after"]["accuracy_interval"]
    shorter = report["audit"]["baselines"]["shorter response"]["accuracy"]
    screen.ended(
        f"test, {report['n']} pairs: {percent(report['before']['accuracy'])} → {percent(report['after']['accuracy'])} "
        f"[{100 * low:.0f}, {100 * high:.0f}]   always-shorter: {percent(shorter)}"
    )


def outcome(
    args: RewardStageConfig, before: ScoredPairs, after: ScoredPairs, best: BestStep, splits: dict[str, list[Pair]]
) -> RewardEvaluation:
    """What evaluation.json says; before and after: of the test split, as `evaluate_pairs` has them."""
    scores = after["scores"]
    return {
        "split": "test",
        "loss_type": args.loss_type,
        "before": _figures(before),
        "after": {**_figures(after), "accuracy_interval": after["accuracy_interval"]},
        "best": best,
        "n": after["n"],
        "labels": after["labels"],
        "confusion_matrix": after["confusion_matrix"],
        "classification_report": after["classification_report"],
        "calibration": after["calibration"],
        "audit": audit(splits["train"], splits["test"], scores["chosen"], scores["rejected"]),
    }


def _figures(pairs: ScoredPairs) -> PairFigures:
    return {"loss": pairs["loss"], "accuracy": pairs["accuracy"], "mean_margin": pairs["mean_margin"]}


def split_fitting(
    pairs: list[Pair],
    counts: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    data: PreferenceConfig,
    args: RewardStageConfig,
) -> dict[str, list[Pair]]:
    """Split the pairs that fit into max_length; adds the numbers of other pairs and the splits' sizes to counts."""
    # Tokenise all pairs, even for small splits: which pairs fit decides which split each one gets into.
    show = PartialState().is_main_process and not args.disable_tqdm
    fitting: list[Pair] = []
    counts |= dict.fromkeys(TOKEN_DROPS, 0)
    with tqdm(total=len(pairs), desc="tokenise pairs", unit="pair", disable=not show) as bar:
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            fitting += encode_pairs(tokenizer, part, args.max_length, args.chat_template_kwargs, counts)[0]
            bar.update(len(part))
    sizes = data.max_examples, data.validation_examples, data.test_examples
    splits = split_pairs(fitting, data.split_seed, *sizes, gold=data.gold)
    counts |= {f"split_{name}": len(part) for name, part in splits.items()}
    return splits


def estimate(args: RewardStageConfig, model_args: ModelConfig, base: str, rows: dict[str, list[Any]]) -> None:
    """Print what training would take. rows: token rows of the pairs, by split."""
    for name, found, expected in (
        ("dtype", model_args.dtype or "float32", "float32"),
        ("load_in_4bit", model_args.load_in_4bit, False),
        ("load_in_8bit", model_args.load_in_8bit, False),
        ("trust_remote_code", args.trust_remote_code, False),
    ):
        if found != expected:  # memory is counted on a model that is built from its config
            raise UserError(f"--dry_run does not support {name} {found}: it counts memory for {expected}")
    attention = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    with main_process_first():
        config = read_config(base, num_labels=1, **base_options(base, model_args), **attention)
    check_attention(base, config)
    check_positions(config, rows)
    dry_run(args, config, rows["train"], lora_config(model_args))


KINDS = [StageRunConfig, PreferenceConfig, ModelConfig, RewardStageConfig]


def stage_name(given: Any) -> str:
    """The stage that these settings train."""
    return "reward_gold" if given.gold else "reward"


def kept_line(counts: dict[str, int]) -> str:
    """How many pairs are used, and why others are not; also their layouts, if there are others than HH-RLHF's."""
    reasons = [f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n and name in (*DROPS, *TOKEN_DROPS)]
    dropped = f" ({', '.join(reasons)})" if reasons else ""
    layouts = {name.removeprefix("layout_"): n for name, n in counts.items() if name.startswith("layout_")}
    named = ", ".join(f"{n:,} {name}" for name, n in layouts.items()) if layouts.keys() - {"hh_text"} else ""
    n_kept = counts["kept"] - sum(counts.get(name, 0) for name in TOKEN_DROPS)
    kept = f"{n_kept:,} pairs kept of {counts['rows']:,}{dropped}"
    return f"{kept}; layouts: {named}" if named else kept


def main() -> None:
    run, data, model_args, args = parse(KINDS, stage=stage_name)
    check_reward_model_config(model_args)
    check_adapter_engine(model_args)
    name = stage_name(data)
    folder, asked = run.folder() / name, read_asked(KINDS)
    if not args.dry_run and from_main(lambda: verdict(folder, asked) == "done"):
        screen.say(f"{name}: already done in {folder}")
        return
    args.output_dir = str(folder)
    if args.dry_run:
        quiet.drop()
    else:
        quiet.log_to(run.folder() / "logs", name)
    set_seed(args.seed)
    base = required("model_name_or_path", model_args.model_name_or_path)
    source = data.dataset_name, data.dataset_dir, data.dataset_revision
    where = base_options(base, model_args, args.trust_remote_code)
    with main_process_first():
        fetch_pairs(*source)
    columns = parse_columns("dataset_columns", data.dataset_columns)
    pairs, counts = on_all(lambda: load_pairs(*source, columns))
    with main_process_first():
        tokenizer = load_tokenizer(base, **where)
        if not args.dry_run:
            fetch_model(base, model_args.model_revision)
    splits = split_fitting(pairs, counts, tokenizer, data, args)
    print("preference pairs:", ", ".join(f"{name} {n}" for name, n in counts.items()))
    train, validation, test = (f"{counts[f'split_{part}']:,}" for part in ("train", "validation", "test"))
    show_stage(
        TITLES[name],
        f"{train} pairs, {validation} to validate, {test} to test",
        args.device,
        precision_line(args) or precision(args)["taken"],
        run.folder(),
    )
    if not data.gold:
        screen.note(kept_line(counts))

    limits = args.max_length, args.chat_template_kwargs
    rows = {name: encode_pairs(tokenizer, part, *limits)[1] for name, part in splits.items()}
    if args.dry_run:
        estimate(args, model_args, base, rows)
        return
    options = model_options(model_args, args.trust_remote_code) | where
    with screen.busy("loading the model"):
        model = with_adapter(new_reward_model(base, tokenizer, **options), lora_config(model_args))
        use_cpu_attention(unwrap_peft(model))
    check_positions(model.config, rows)
    config: Settings = run.place() | asdict(data) | asdict(model_args) | args.to_dict()
    with (
        StopRequest(),
        Stage(folder, name, config, args.seed, asked) as stage,
    ):  # a signal after training changes nothing
        trainable, total = trainable_share(model)
        stage.record(
            changed=changed_settings(run, data, model_args, args),
            data={"preferences": counts},
            batch=batch_facts(args),
            precision=precision(args),
            models=[{"role": "reward", "name": base, "parameters": total, "trainable": trainable}],
            train_openings=openings([*splits["train"], *splits["validation"]]),
        )
        if stage.is_main:
            print("precision:", precision_line(args) or precision(args)["taken"])
            print(batch_line(args, "pairs"))
        with gathered([model]):
            before = evaluate_pairs(model.to(PartialState().device), rows["test"], args)
        pair_ids = [pair.source for pair in splits["train"]]
        args.disable_tqdm = True  # the console has a bar of its own
        show = [RewardRows(rows=0 if data.gold else ROWS)]
        trainer, ended = train_reward_model(model, tokenizer, rows["train"], rows["validation"], args, pair_ids, show)
        stage.record(engine=engine_name(trainer.accelerator))
        if not ended:
            stage.stopped = True
            screen.warn(f"{name}: stopped at step {trainer.state.global_step}; run the same command again to resume")
            return
        engine = trainer.accelerator
        with gathered([model]) if is_fsdp(engine) else unwrap_model_for_generation(trainer.model_wrapped, engine):
            after = evaluate_pairs(model, rows["test"], args)
        with written_aside(folder, stage.is_main) as aside:
            save_reward_model(trainer, aside, lambda: new_reward_model(base, tokenizer, **options))
            if stage.is_main:
                write_older_names(aside)
        report = outcome(args, before, after, best_step(trainer), splits)
        if stage.is_main:
            for path in folder.glob("*.safetensors"):  # the best checkpoint has the same weights
                store_once(path, folder.glob(f"checkpoint-*/{path.name}"))
            write_json(folder / "evaluation.json", report)
            show_outcome(folder, report, splits["test"], config)
    if stage.is_main:
        write_card(folder)


if __name__ == "__main__":
    run_script(main)
