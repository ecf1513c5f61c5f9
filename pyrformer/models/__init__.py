"""The families, one file each, and the table that finds them by Hugging Face's ``model_type``."""

from __future__ import annotations

from typing import Any

from pyrformer.errors import ConfigError
from pyrformer.models.base import Family, ModelConfig
from pyrformer.models.bert import Bert, BertConfig
from pyrformer.models.gpt2 import GPT2, GPT2Config

#: ``model_type`` → (configuration, family).
FAMILIES: dict[str, tuple[type[ModelConfig], type[Family]]] = {
    "gpt2": (GPT2Config, GPT2),
    "bert": (BertConfig, Bert),
}


def build(config: dict[str, Any]) -> Family:
    """The family of a ``config.json``, without weights.

    Raises:
        ConfigError: the family is unknown, or the configuration contradictory.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"[config] unknown model_type {kind!r}; known families: {known}")
    config_class, family = FAMILIES[kind]
    return family(config_class.from_dict(config))  # type: ignore[call-arg]


__all__ = ["FAMILIES", "GPT2", "Bert", "BertConfig", "Family", "GPT2Config", "ModelConfig", "build"]
