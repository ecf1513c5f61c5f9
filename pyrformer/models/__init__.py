"""The families, one file each, and the table that finds them by Hugging Face's ``model_type``."""

from __future__ import annotations

from typing import Any

from pyrformer.errors import ConfigError
from pyrformer.models.base import Family, ModelConfig
from pyrformer.models.bert import Bert, BertConfig
from pyrformer.models.distilbert import DistilBert, DistilBertConfig
from pyrformer.models.falcon import Falcon, FalconConfig
from pyrformer.models.gpt2 import GPT2, GPT2Config
from pyrformer.models.gpt_neox import GPTNeoX, GPTNeoXConfig
from pyrformer.models.llama import Llama, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from pyrformer.models.modernbert import ModernBert, ModernBertConfig
from pyrformer.models.opt import OPT, OPTConfig
from pyrformer.models.roberta import Roberta, RobertaConfig
from pyrformer.models.xlnet import XLNet, XLNetConfig

_ALL: list[tuple[type[ModelConfig], type[Family]]] = [
    (BertConfig, Bert),
    (DistilBertConfig, DistilBert),
    (FalconConfig, Falcon),
    (GPT2Config, GPT2),
    (GPTNeoXConfig, GPTNeoX),
    (LlamaConfig, Llama),
    (MistralConfig, Llama),
    (ModernBertConfig, ModernBert),
    (OPTConfig, OPT),
    (Qwen2Config, Llama),
    (Qwen3Config, Llama),
    (RobertaConfig, Roberta),
    (XLNetConfig, XLNet),
]
#: ``model_type`` → (configuration, family).
FAMILIES = {config.model_type: (config, family) for config, family in _ALL}


def find(model_type: Any, where: str = "config") -> tuple[type[ModelConfig], type[Family]]:
    """The configuration and the family of a ``model_type``; ``where`` stands in front of the message.

    Raises:
        ConfigError: it is unknown.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"[{where}] unknown model_type {model_type!r}; known families: {known}")
    return FAMILIES[model_type]


def build(config: dict[str, Any]) -> Family:
    """The family of a ``config.json``, without weights.

    Raises:
        ConfigError: the family is unknown, or the configuration contradictory.
    """
    config_class, family = find(config.get("model_type"))
    return family(config_class.from_dict(config))  # type: ignore[call-arg]


__all__ = ["FAMILIES", "Family", "ModelConfig", "build", "find"]
