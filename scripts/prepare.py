"""Fetch all that a recipe needs, on a machine with network: python scripts/prepare.py --recipe NAME.

Afterwards the stages run with HF_HUB_OFFLINE=1 on machines that share the cache (HF_HOME, RLHF_CACHE).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from rlhf.config import PreferenceConfig, PromptConfig
from rlhf.data.hh_rlhf import load_pairs
from rlhf.data.oasst import load_prompts
from rlhf.errors import UserError
from rlhf.models.load import resolve_model
from rlhf.parsing import parse, read_recipe, recipe_folder, run_script

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


@dataclass
class PrepareConfig:
    """What to fetch."""

    recipe: str = "demo"  # a name in rlhf/recipes, or a folder


def main() -> None:
    (config,) = parse([PrepareConfig])
    stages = [read_recipe(path) for path in sorted(recipe_folder(config.recipe).glob("*.yaml"))]
    for name in sorted(_values(stages, "model_name_or_path", "base_model")):
        print(f"model {name}: {_fetch_model(name)}")
    for stage in stages:
        if "dataset_name" in stage:
            data = PreferenceConfig(**_fields(stage, PreferenceConfig))
            print("preferences:", load_pairs(data.dataset_name, data.dataset_dir, data.dataset_revision)[1])
    prompts = [PromptConfig(**_fields(stage, PromptConfig)) for stage in stages if "prompt_dataset" in stage]
    for sources in {(tuple(p.prompt_dataset), p.language, p.prompt_revision) for p in prompts}:
        print("prompts:", load_prompts(*sources)[1])


def _fetch_model(name: str) -> str:
    resolved = resolve_model(name)
    if resolved != name or "/" not in name or name.startswith((".", "/")):
        return resolved
    try:
        return snapshot_download(name, allow_patterns=list(MODEL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: expected to fetch it from the hub, found: {reason}") from error


def _values(stages: list[dict[str, Any]], *names: str) -> set[str]:
    return {stage[name] for stage in stages for name in names if name in stage}


def _fields(stage: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in stage.items() if name in names}


if __name__ == "__main__":
    run_script(main)
