"""Save a PPO checkpoint as a model: rlhf export --run NAME --stage ppo_full --checkpoint step-20 --output DIR."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from trl import ModelConfig, get_peft_config

from rlhf.cli.parsing import parse, required
from rlhf.cli.script import run_script
from rlhf.config import ExportConfig, PPOConfig, RunConfig
from rlhf.console import quiet, screen
from rlhf.console.words import path_to
from rlhf.distributed.collectives import join_processes
from rlhf.distributed.saved_weights import load_part, saved_weights
from rlhf.errors import UserError, did_you_mean
from rlhf.file_types import RunFile
from rlhf.models.load import base_options, load_causal_lm, load_tokenizer, model_options
from rlhf.ppo.export import save_policy
from rlhf.ppo.roles import Roles, build_roles
from rlhf.storage.basis import model_digest
from rlhf.storage.checkpoint import checkpoints, problem_of
from rlhf.storage.safe_load import check_pickles
from rlhf.storage.stages import basis, meant_run, read_run, status


def chosen(run: Path, wanted: ExportConfig) -> Path:
    """The checkpoint that is meant: by name, by path, or the newest. A UserError if it is not there or broken."""
    folder, name = run / wanted.stage, wanted.checkpoint
    if name is not None and Path(name).name != name:
        path = Path(name).absolute()
        folder, name = path.parents[1], path.name
    found = {path.name: path for path in checkpoints(folder)}
    if not found or (name is not None and name not in found):
        meant = did_you_mean(name, found) if name else ""
        raise UserError(
            f"checkpoint: expected one of those in {folder}, {', '.join(found) or 'none'}, found {name or 'none'}"
            f"{meant or meant_run(folder.parent)}"
        )
    checkpoint = found[name] if name else [*found.values()][-1]
    if problem := problem_of(checkpoint):
        raise UserError(f"{checkpoint}: broken checkpoint, found {problem}")
    check_pickles(checkpoint)
    return checkpoint


def stage_facts(folder: Path) -> RunFile:
    """The stage's run.json. A UserError without one, or if the model that it started from has changed."""
    facts = read_run(folder)
    base = facts.get("config", {}).get("model_name_or_path")
    if not base:
        raise UserError(f"{folder}: expected a PPO stage that has begun, found: {status(facts)}")
    rest, now = basis(facts), model_digest(base)
    if rest and now != rest["data"].get(base):
        found = "other content" if now else "none"
        raise UserError(f"{base}: expected the model that {folder.name} was trained from, found {found}")
    return facts


def untrained(model_args: ModelConfig, trust_remote_code: bool) -> Roles:
    """The policy as it was before the first step, under its adapter if it has one."""
    args = PPOConfig(critic="shared", use_cpu=True, bf16=False, report_to="none")
    base, peft_config = str(model_args.model_name_or_path), cast(Any, get_peft_config(model_args))
    options = model_options(model_args, trust_remote_code) | base_options(base, model_args, trust_remote_code)
    model = load_causal_lm(base, keep_adapter=peft_config is not None, **options)
    return build_roles(args, model, None, None, None, peft_config)


def settings(config: Mapping[str, Any]) -> ModelConfig:
    """Those of a stage's run.json that say what the policy is made of."""
    names = [field.name for field in fields(ModelConfig) if field.init]
    return ModelConfig(**{name: config[name] for name in names if name in config})


def check_output(output: Path, stage: Path) -> None:
    """A UserError unless the folder is new or empty, and none that --redo would clear or a push would upload."""
    if stage.resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(f"output: expected a folder outside of the stage's, {stage}, found {output}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output: expected a new or an empty folder, found {output} with content")


def main() -> None:
    run, wanted = parse([RunConfig, ExportConfig])
    output = Path(required("output", wanted.output))
    checkpoint = chosen(run.folder(), wanted)
    stage = checkpoint.parents[1]
    check_output(output, stage)
    facts = stage_facts(stage)
    state = join_processes(use_cpu=True)
    with quiet.logged(stage.parent / "logs", "export"), screen.busy(f"loading {checkpoint.name}"):
        model_args = settings(facts["config"])
        roles = untrained(model_args, wanted.trust_remote_code)
        base = str(model_args.model_name_or_path)
        tokenizer = load_tokenizer(base, **base_options(base, model_args, wanted.trust_remote_code))
        try:
            load_part(roles.trained.policy, saved_weights(checkpoint), "policy.")
        except (RuntimeError, KeyError, ValueError, SafetensorError) as error:  # what torch and safetensors say
            found = " ".join(str(error).split())[:300]
            raise UserError(
                f"{checkpoint}: expected weights of {base} as {stage.name} trains it, found: {found}"
            ) from error
        save_policy(roles.trained.policy, tokenizer, output, state, facts, with_adapter=not roles.merged_first)
    screen.to_copy(f"Model of {checkpoint.name}  {path_to(output)}")


if __name__ == "__main__":
    run_script(main)
