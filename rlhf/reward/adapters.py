"""Reward models with adapters: the head is trained beside them, and what is saved is whole."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config

from rlhf.distributed.launch import wants_fsdp
from rlhf.errors import UserError
from rlhf.models.lora import add_lora, merged_model, save_adapter
from rlhf.models.quantised import prepare_4bit
from rlhf.models.unwrap import Model, is_quantised
from rlhf.reward.trainer import PreferenceTrainer


def check_adapter_engine(config: ModelConfig) -> None:
    """A UserError for adapters on an engine that shards weights: they could not be merged when saved."""
    if config.use_peft and (is_deepspeed_zero3_enabled() or wants_fsdp()):
        raise UserError(
            "use_peft: reward models with adapters need whole weights: use an engine without ZeRO-3 or FSDP"
        )


def lora_config(config: ModelConfig) -> LoraConfig | None:
    """The adapter's settings; None without use_peft. PEFT trains and saves the head of this task type, too."""
    return cast(LoraConfig | None, get_peft_config(replace(config, lora_task_type="SEQ_CLS")))


def with_adapter(model: PreTrainedModel, config: LoraConfig | None) -> Model:
    """The model, frozen but for a fresh adapter and its head; without a config the model itself."""
    if config is None:
        return model
    prepare_4bit("model_name_or_path", model)
    base = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) if is_quantised(model) else model
    return add_lora(base, config)


def save_reward_model(trainer: PreferenceTrainer, folder: Path, load: Callable[[], PreTrainedModel]) -> None:
    """Model and tokenizer. With an adapter: the merged model, as if the whole had been trained, and adapter/.

    load: the base model anew. A quantised one is merged in the precision in which its layers compute.
    """
    model: Any = trainer.model
    if not isinstance(model, PeftModel):
        trainer.save_model(str(folder))
    elif trainer.is_world_process_zero():
        save_adapter(model, folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's, with blanks to fill in
        if is_quantised(model):
            base: Any = load()
            model = PeftModel.from_pretrained(base.dequantize(), str(folder / "adapter"))
        merged_model(model, on_cpu=True).save_pretrained(folder)
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(folder)
