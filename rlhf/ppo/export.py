"""The trained policy as files, and on the hub."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from huggingface_hub import HfApi
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import PPOConfig
from rlhf.file_types import RunFile
from rlhf.model_card.card import write_card
from rlhf.models.lora import merged_model, save_adapter
from rlhf.models.older_readers import write_older_names
from rlhf.models.unwrap import Model, is_quantised, unwrap_peft
from rlhf.storage.disk import written_aside


def without_weights(model: Model) -> Model:
    """A copy of a model that takes no memory: its weights are on the device "meta"."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def with_weights(empty: Model, weights: Mapping[str, Tensor]) -> Model:
    """A copy of what `without_weights` made, with the weights of a state_dict."""
    model = copy.deepcopy(empty)
    model.load_state_dict(weights, assign=True)
    unwrap_peft(model).tie_weights()
    return model


def save_policy(
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    accelerator: Accelerator | PartialState,
    facts: RunFile,
    with_adapter: bool = True,
) -> None:
    """Policy and tokenizer as safetensors, and a model card; written by rank 0.

    LoRA: the merged stock model, and the adapter in adapter/. On a quantised base, which a merge would round
    once more, the adapter alone. facts: for the card, where no stage of a run has left a run.json. with_adapter: False
    where no one else has the base that the adapter belongs on.
    """
    main = accelerator.is_main_process
    with written_aside(folder, main) as aside:
        if main and isinstance(policy, PeftModel) and is_quantised(policy):
            save_adapter(policy, aside)
        elif main and isinstance(policy, PeftModel):
            if with_adapter:
                save_adapter(policy, aside / "adapter")
            merged_model(policy, on_cpu=True).save_pretrained(aside)
        elif main:
            policy.save_pretrained(str(aside))
        if main:
            tokenizer.save_pretrained(aside)
            write_older_names(aside)
    if main:
        write_card(folder, facts)  # replaces the card that PEFT writes with an adapter
    accelerator.wait_for_everyone()


def push_policy(
    folder: Path,
    args: PPOConfig,
    accelerator: Accelerator,
    message: str,
    facts: RunFile,
    dataset_name: str | None,
    tags: Sequence[str],
) -> str | None:
    """Upload a saved policy to hub_model_id (its folder's name if not set); returns the commit's address, on rank 0."""
    if not accelerator.is_main_process:
        return None
    folder = folder.resolve()  # "." has no name
    api = HfApi(token=args.hub_token)
    url = api.create_repo(args.hub_model_id or folder.name, private=args.hub_private_repo, exist_ok=True)
    write_card(folder, facts, url.repo_id, [dataset_name] if dataset_name else [], tags)
    commit = api.upload_folder(
        repo_id=url.repo_id,
        folder_path=folder,
        commit_message=message,
        revision=args.hub_revision,
        ignore_patterns=["checkpoints/*", "tensorboard/*", "run.json", ".lock"],
    )
    return str(commit)
