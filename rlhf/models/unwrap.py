"""What is inside a PEFT model, and what kind of model it is."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

Model = PreTrainedModel | PeftModel


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PEFT one; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_quantised(model: Any) -> bool:
    """Whether the model's weights are bitsandbytes' 4 or 8 bits."""
    return bool(getattr(unwrap_peft(model), "is_quantized", False))


def max_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has positions for; None if it has no limit of its own.

    Beyond longrope's original positions one long text would change the log-probs of all texts in its pass.
    """
    text = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(text, "max_position_embeddings", None) or 0
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in ropes.values() if "rope_type" not in ropes else [ropes]:  # some kinds have one a type of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limit = min(limit, rope["original_max_position_embeddings"])
    # DeBERTa's positions may be relative only.
    return limit if limit > 0 and getattr(config, "position_biased_input", True) else None
