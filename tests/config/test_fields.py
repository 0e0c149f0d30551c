"""Settings that differ from their defaults."""

from dataclasses import dataclass, field
from typing import Any

from rlhf.config import PPOConfig
from rlhf.config.fields import changed_settings


def test_changed_settings_are_those_that_differ_from_their_defaults():
    @dataclass
    class Some:
        steps: int = 3
        names: list[str] = field(default_factory=list)
        path: str | None = None
        nested: Any = None

    @dataclass
    class Nested:
        size: int = 1

    assert changed_settings(Some(), Some(steps=4), Some(names=["a"], path="b")) == ["steps", "names", "path"]
    assert changed_settings(Some(steps=0), Some(nested=Nested(2))) == ["steps", "nested"]
    # What a class makes of a field that nobody set: an empty text or list for None, and nested settings.
    assert changed_settings(Some(path="", nested=Nested()), Some(nested=[])) == []


def test_settings_of_transformers_as_a_script_has_them(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), learning_rate=1e-4, report_to="none")
    changed = changed_settings(args)
    assert {"output_dir", "learning_rate"} <= set(changed)
    assert not {"accelerator_config", "debug", "hub_token", "adam_beta1", "kl_coef"} & set(changed)
