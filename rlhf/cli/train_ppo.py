"""Train a policy with PPO: rlhf ppo --config RECIPE/ppo_full.yaml --run NAME."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config

from rlhf.cli.parsing import parse, read_asked, required
from rlhf.cli.script import run_script
from rlhf.cli.stage_head import show_stage
from rlhf.config import PPOStageConfig, PromptConfig, StageRunConfig
from rlhf.config.batch import batch_facts, batch_line
from rlhf.config.fields import changed_settings
from rlhf.config.model import check_ppo_model_config
from rlhf.config.precision import precision, precision_line
from rlhf.console import quiet, screen
from rlhf.console.words import count, gigabytes, percent
from rlhf.data.oasst import TextPrompt, fetch_prompts
from rlhf.data.prompts import dataset_row, prompt_sets
from rlhf.data.splits import require_sizes, split_by_group
from rlhf.distributed.collectives import from_main, main_process_first, on_all
from rlhf.distributed.launch import engine_name
from rlhf.distributed.preemption import StopRequest
from rlhf.errors import UserError
from rlhf.file_types import Settings
from rlhf.memory_estimate.account import read_config, reward_config
from rlhf.memory_estimate.ppo import dry_run
from rlhf.model_card.card import write_card
from rlhf.models.load import (
    base_options,
    check_attention,
    fetch_model,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    model_options,
)
from rlhf.perf.hardware import peak_memory
from rlhf.perf.work import total
from rlhf.ppo.prompts import read_prompts
from rlhf.ppo.roles import parameter_lines
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward.named import named_rewards
from rlhf.reward.tokenizers import saved_tokenizer
from rlhf.storage.basis import verdict
from rlhf.storage.checkpoint import PPO, numbered
from rlhf.storage.run_folder import Stage
from rlhf.storage.stages import TITLES, is_done, require_stage, stage_ids
from rlhf.tracking.progress import PPORows


def hold_out(prompts: list[TextPrompt], args: PPOStageConfig, seed: int) -> tuple[list[TextPrompt], list[TextPrompt]]:
    """Split prompts into (training, evaluation), with no conversation tree in both. Without evaluation: all, none.

    The recipe's evaluation prompts stay unseen: they measure what was chosen with the help of these.
    """
    if args.eval_strategy == "no" and not args.eval_on_start:
        return prompts, []
    sizes = {"eval_prompts": args.eval_prompts, "train": len(prompts)}
    parts = split_by_group(prompts, lambda prompt: prompt.tree_id, seed, sizes)
    require_sizes(parts, sizes, "training prompts")
    return parts["train"], parts["eval_prompts"]


def estimate(args: PPOStageConfig, model_args: ModelConfig, names: tuple[str, str | None], lengths: list[int]) -> None:
    """Print what training would take.

    names: policy and reward model, if there is one; lengths: tokens of each training prompt.
    """
    for name, found in (
        ("load_in_4bit", model_args.load_in_4bit),
        ("load_in_8bit", model_args.load_in_8bit),
        ("trust_remote_code", args.trust_remote_code),
    ):
        if found:  # memory is counted on models that are built from their configs, without a weight to quantise
            raise UserError(f"--dry_run does not support {name}: it counts memory for plain transformers models")
    attention = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    with main_process_first():
        policy = read_config(names[0], **base_options(names[0], model_args), **attention)
        reward = None
        if names[0] == names[1]:  # assumed
            reward = read_config(names[1], num_labels=1, **base_options(names[1], model_args), **attention)
        elif names[1]:
            reward = reward_config(names[1], **attention)
    check_attention(names[0], policy)
    if names[1] and reward:
        check_attention(names[1], reward)
    dtype = policy.dtype or "float32" if model_args.dtype == "auto" else model_args.dtype or "float32"
    dry_run(args, policy, reward, lengths, dtype, cast(LoraConfig | None, get_peft_config(model_args)))


def build(
    args: PPOStageConfig,
    model_args: ModelConfig,
    names: tuple[str, str | None],
    functions: Sequence[Callable[..., Any]],
    tokenizer: PreTrainedTokenizerBase,
    train: list[TextPrompt],
    unseen: list[TextPrompt],
) -> PPOTrainer:
    """The trainer, with its models loaded. names: policy and reward model, if there is one."""
    peft_config = cast(LoraConfig | None, get_peft_config(model_args))
    where = base_options(names[0], model_args, args.trust_remote_code)
    # Reward model and critic come from another place than the policy, but load with the same dtype and device options.
    options = model_options(model_args, args.trust_remote_code)
    # ZeRO-3 shards weights as they load, and sharded weights cannot be copied: load each role by itself.
    own = is_deepspeed_zero3_enabled() and peft_config is None
    own_critic = own and args.critic == "separate"
    judges_tokenizer = saved_tokenizer(names[1], trust_remote_code=args.trust_remote_code) if names[1] else None
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=load_causal_lm(names[0], keep_adapter=peft_config is not None, **options | where),
        ref_model=load_causal_lm(names[0], **options | where) if own else None,
        reward_model=[*([load_reward_model(names[1], **options)] if names[1] else []), *functions],
        train_dataset=[dataset_row(prompt) for prompt in train],
        eval_dataset=[dataset_row(prompt) for prompt in unseen] or None,
        reward_processing_classes=judges_tokenizer,
        value_model=load_reward_model(names[1], **options) if own_critic and names[1] else None,
        peft_config=peft_config,
    )


KINDS = [StageRunConfig, PromptConfig, ModelConfig, PPOStageConfig]


def stage_name(given: Any) -> str:
    """The stage that these settings train."""
    return "ppo_lora" if given.use_peft else "ppo_full"


def cost(trainer: PPOTrainer) -> str:
    """Peak memory, and where the time went."""
    work = total(trainer.work)
    whole = max(sum(one.seconds for one in work.values()), 1e-9)
    names = {"generate": "sample"}
    shares = [
        f"{names.get(name, name)} {percent(one.seconds / whole)}"
        for name, one in sorted(work.items(), key=lambda item: -item[1].seconds)
    ]
    return f"peak {gigabytes(peak_memory(trainer.accelerator.device))} · {', '.join(shares)}"


def reward_model(run: Path, path: str | None, rewards: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The path of the reward model, and the run's stages that are read for it. None if rewards are functions alone."""
    return (path, {}) if path or rewards else (str(require_stage(run / "reward")), stage_ids(run, "reward"))


def assumed_reward(run: Path, args: PPOStageConfig, base: str) -> str | None:
    """For a dry run before the reward model is trained: the base model, from which recipes train it."""
    if not args.dry_run or args.reward_model_path or args.rewards or is_done(run / "reward"):
        return None
    screen.say(f"reward model: not trained yet; assumed to be as large as {base}")
    return base


def main() -> None:
    run, data, model_args, args = parse(KINDS, stage=stage_name)
    check_ppo_model_config(model_args)
    name = stage_name(model_args)
    folder, asked = run.folder() / name, read_asked(KINDS)
    if not args.dry_run and from_main(lambda: verdict(folder, asked) == "done"):
        screen.say(f"{name}: already done in {folder}")
        return
    base = required("model_name_or_path", model_args.model_name_or_path)
    functions = on_all(lambda: named_rewards(args.rewards))
    assumed = from_main(lambda: assumed_reward(run.folder(), args, base))
    given = args.reward_model_path, args.rewards
    reward_path, read = (assumed, {}) if assumed else from_main(lambda: reward_model(run.folder(), *given))
    args.output_dir = str(folder)
    if args.dry_run:
        quiet.drop()
    else:
        quiet.log_to(run.folder() / "logs", name)
    with main_process_first():
        tokenizer = load_tokenizer(base, **base_options(base, model_args, args.trust_remote_code))
        fetch_prompts(data.prompt_dataset, data.prompt_revision, data.prompt_dir)
        if not args.dry_run:
            fetch_model(base, model_args.model_revision)
            if reward_path:
                fetch_model(reward_path)
                saved_tokenizer(reward_path, trust_remote_code=args.trust_remote_code)
    split, counts = on_all(lambda: prompt_sets(data, tokenizer, args.chat_template_kwargs))
    train, unseen = hold_out(split.train, args, data.prompt_seed)
    if unseen:
        counts |= {"split_train": len(train), "split_train_held_out": len(unseen)}
    print("prompts:", ", ".join(f"{key} {n}" for key, n in counts.items()))
    if args.dry_run:
        limits = args.max_prompt_tokens, args.long_prompts
        rows = [dataset_row(p) for p in train]
        prompts = read_prompts(rows, tokenizer, *limits, options=args.chat_template_kwargs)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        estimate(args, model_args, (base, reward_path), lengths)
        return
    args.disable_tqdm = True  # the console has a bar of its own
    with screen.busy(f"{TITLES[name]}: loading models"):
        trainer = build(args, model_args, (base, reward_path), functions, tokenizer, train, unseen)
    trainer.add_callback(PPORows())
    config: Settings = run.place() | asdict(data) | asdict(model_args) | args.to_dict()
    config["reward_model_path"] = reward_path
    # A signal while models load ends the run at once; a later one stops it after a step, with a checkpoint.
    with StopRequest(), Stage(folder, name, config, args.seed, asked, read) as stage:
        stage.record(
            changed=changed_settings(run, data, model_args, args),
            data={"prompts": counts},
            batch=batch_facts(args),
            engine=engine_name(trainer.accelerator),
            precision=precision(args),
            models=trainer.models,
            train_tree_ids=sorted({p.tree_id for p in split.train}),
        )
        show_stage(
            f"PPO, {'LoRA' if model_args.use_peft else 'all'} {count(trainer.models[0]['trainable'])} weights",
            f"{trainer.num_total_batches} steps × {trainer.batch_size} prompts of {len(train):,}",
            args.device,
            precision_line(args) or precision(args)["taken"],
            run.folder(),
        )
        if stage.is_main:
            print("precision:", precision_line(args) or precision(args)["taken"])
            print("\n".join([batch_line(args, "prompts"), *parameter_lines(trainer.models)]))
        trainer.train(resume_from_checkpoint=from_main(lambda: bool(numbered(folder / "checkpoints", PPO))))
        if trainer.stopped:
            stage.stopped = True
            screen.warn(f"{name}: stopped at step {trainer.state.global_step}; run the same command again to resume")
            return
        trainer.save_model(folder)
    if stage.is_main:
        write_card(folder)  # again: now the stage has ended
        print("\n".join(trainer.throughput()))
        screen.ended(cost(trainer))


if __name__ == "__main__":
    run_script(main)
