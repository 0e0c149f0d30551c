"""The trained policy as files, and on the hub."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCardData
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rlhf.config import PPOConfig
from rlhf.models.actor_critic import Model, is_quantised
from rlhf.models.lora import merged_model, save_adapter


def save_policy(policy: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, accelerator: Accelerator) -> None:
    """Policy and tokenizer as safetensors, written by rank 0.

    LoRA: the merged stock model, and the adapter in adapter/. On a quantised base, which a merge would round
    once more, the adapter alone.
    """
    if accelerator.is_main_process:
        if isinstance(policy, PeftModel) and is_quantised(policy):
            save_adapter(policy, folder)
        elif isinstance(policy, PeftModel):
            save_adapter(policy, folder / "adapter")
            merged_model(policy).save_pretrained(folder)
        else:
            policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


def push_policy(
    folder: Path,
    args: PPOConfig,
    accelerator: Accelerator,
    message: str,
    dataset_name: str | None,
    tags: Sequence[str],
) -> str | None:
    """Upload a saved policy to hub_model_id (its folder's name if not set); returns the commit's address, on rank 0."""
    if not accelerator.is_main_process:
        return None
    folder = folder.resolve()  # "." has no name
    data = ModelCardData(library_name="transformers", tags=["ppo", "rlhf", *tags], datasets=dataset_name)
    text = f"---\n{data.to_yaml()}\n---\n\n# {folder.name}\n\nFine-tuned by proximal policy optimisation with rlhf.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    api = HfApi(token=args.hub_token)
    url = api.create_repo(args.hub_model_id or folder.name, private=args.hub_private_repo, exist_ok=True)
    commit = api.upload_folder(
        repo_id=url.repo_id,
        folder_path=folder,
        commit_message=message,
        revision=args.hub_revision,
        ignore_patterns=["checkpoints/*", "tensorboard/*", "run.json"],
    )
    return str(commit)
