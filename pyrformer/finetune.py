"""Training part of a model: frozen parameters, and changes of low rank beside frozen linear layers (LoRA).

Source of LoRA: Hu et al. 2021; options under the names of Hugging Face's PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from pyrformer.errors import InputError
from pyrformer.nn import Conv1D, Linear, Lora

if TYPE_CHECKING:
    from pyrformer.compile import Array
    from pyrformer.model import Model

#: Parameters of heads: they stay trainable beside LoRA, for a fresh head must be learned.
HEADS = ("classifier.", "pre_classifier.", "score.")
#: Output layers: "all-linear" leaves them out, as PEFT does.
OUTPUTS = ("lm_head", "decoder")
ALL_LINEAR = "all-linear"
#: The greatest rank.
MOST_RANK = 1 << 16


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank changes.

    Attributes:
        r: their rank.
        lora_alpha: the change is scaled by lora_alpha / r.
        lora_dropout: dropout on what they read.
        target_modules: last parts of the names of the linear layers that are changed, or ``["all-linear"]``.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: Sequence[str] = (ALL_LINEAR,)

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or not 0 < self.r <= MOST_RANK:
            raise InputError(f"[lora] r must be a whole number from 1 to {MOST_RANK}, got {self.r!r}")
        if not (isinstance(self.lora_alpha, (int, float)) and 0 < self.lora_alpha < math.inf):
            raise InputError(f"[lora] lora_alpha must be a positive number, got {self.lora_alpha!r}")
        if not (isinstance(self.lora_dropout, (int, float)) and 0 <= self.lora_dropout < 1):
            raise InputError(f"[lora] lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise InputError("[lora] target_modules must be a list of names of linear layers")


def freeze(model: Model, patterns: Sequence[str]) -> None:
    """Makes training leave alone the parameters whose names match one of the patterns (``*``, ``?``, ``[…]``).

    Raises:
        InputError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(model.family.named_parameters())
    for pattern in patterns:
        found = [p for name, p in parameters.items() if fnmatchcase(name, pattern)]
        if not found:
            raise InputError(
                f"[freeze] no parameter matches {pattern!r}; the first is {next(iter(parameters))!r}"
            )
        for parameter in found:
            parameter.trainable = False
    if not any(p.trainable for p in parameters.values()):
        raise InputError("[freeze] nothing is left to train")
    model.family_changed()


def add_lora(model: Model, config: LoraConfig, seed: int = 0) -> None:
    """Freezes all parameters but those of fresh heads, and puts low-rank changes beside linear layers.

    Raises:
        InputError: a target matches no linear layer, or the model has changes already.
    """
    layers = {n: m for n, m in model.family.named_modules() if isinstance(m, (Linear, Conv1D))}
    if any(m.lora is not None for m in layers.values()):
        raise InputError("[lora] the model has low-rank changes already; save it to merge them")
    heads = [n for n in layers if n.rsplit(".", 1)[-1] in OUTPUTS or f"{n}.".startswith(HEADS)]
    chosen: dict[str, Linear | Conv1D] = {}
    for target in config.target_modules:
        every = target == ALL_LINEAR
        found = {
            n: m for n, m in layers.items() if (every and n not in heads) or f".{n}".endswith(f".{target}")
        }
        if not found:
            known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in layers}))
            raise InputError(f"[lora] no linear layer is called {target!r}; there are {known}")
        chosen |= found
    for name, parameter in model.family.named_parameters():
        parameter.trainable = parameter.trainable and name.startswith(HEADS)
    for layer in chosen.values():
        rows, columns = layer.weight.shape
        inputs, outputs = (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
        layer.lora = Lora(inputs, outputs, config.r, config.lora_alpha, config.lora_dropout)
    model.family.name_parameters()
    for index, (name, parameter) in enumerate(model.family.named_parameters()):
        if ".lora.lora_" in name:
            values = parameter.init.values(parameter.shape, seed, index)
            model.store.set(name, np.ascontiguousarray(values, dtype=model.dtype))
    model.family_changed()


def merged(model: Model, state: dict[str, Array] | None = None) -> dict[str, Array]:
    """All parameters with low-rank changes added to the weights that they stand beside.

    Args:
        state: the parameters; default: the model's own.
    """
    state = model.state_dict() if state is None else state
    tensors = {n: t for n, t in state.items() if ".lora.lora_" not in n}
    for name, layer in model.family.named_modules():
        if isinstance(layer, (Linear, Conv1D)) and layer.lora is not None:
            a, b = (state[f"{name}.lora.lora_{x}.weight"] for x in "AB")
            change = layer.lora.scale * (b @ a)
            weight = layer.weight.name
            tensors[weight] = tensors[weight] + (change.T if isinstance(layer, Conv1D) else change)
    return tensors
