"""What every family shares: its configuration's manners, its symbolic inputs, and the interface that programs trace.

Letters: B batch, T tokens, S cache slots, R cache rows, C width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyrformer.errors import ConfigError
from pyrformer.fields import check_types
from pyrformer.nn import Module, Tensor
from pyrformer.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The part of ``config.json`` that a family reads, under Hugging Face's names. What it does not know is kept and
    written back."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    vocab_size: int
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Reads a ``config.json``.

        Raises:
            ConfigError: a field is missing or contradicts another.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        given = {k: v for k, v in raw.items() if k in known}
        rest = {k: v for k, v in raw.items() if k not in known and k not in ("model_type", "architectures")}
        required = [
            f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in given]
        if missing:
            raise ConfigError(f"[config] {cls.model_type}: {missing[0]} is missing")
        return cls(**given, extra=rest)

    def __post_init__(self) -> None:
        check_types(self, f"config {self.model_type}")

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        return {**head, **self.extra, **own}

    def require(self, ok: bool, message: str) -> None:
        """Raises ConfigError with ``message`` unless ``ok``."""
        if not ok:
            raise ConfigError(f"[config] {self.model_type}: {message}")

    def check_sizes(self, **sizes: int) -> None:
        """Raises ConfigError unless all sizes are positive whole numbers."""
        for name, value in sizes.items():
            self.require(
                isinstance(value, int) and value > 0, f"{name} must be a positive whole number, got {value!r}"
            )

    def check_probabilities(self, **values: float) -> None:
        """Raises ConfigError unless all values are in [0, 1)."""
        for name, value in values.items():
            ok = isinstance(value, (int, float)) and 0 <= value < 1
            self.require(ok, f"{name} must be a number in [0, 1), got {value!r}")

    def check_heads(self, width_name: str, width: int, heads_name: str, heads: int) -> None:
        """Raises ConfigError unless the width divides into heads."""
        self.check_sizes(**{width_name: width, heads_name: heads})
        self.require(width % heads == 0, f"{width_name} ({width}) is not divisible by {heads_name} ({heads})")


@dataclass(frozen=True)
class Cache:
    """Where decoding keeps keys and values: layer i's are the states ``{prefix}.{i}.key`` and ``.value`` ``[R, S, C]``.

    ``rows int32[B, S]``: the cache row that holds each position of each sequence; ``row``, ``start``, ``count
    int32[B]``: where this call's tokens are written and how many count.
    """

    prefix: str
    shape: tuple[int, int]
    rows: Tensor
    row: Tensor
    start: Tensor
    count: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: dict[str, object]) -> Tensor:
        """Writes k and v, then attends over all that the sequences hold."""
        kept = []
        for name, new in (("key", k), ("value", v)):
            state = q.trace.state(f"{self.prefix}.{layer}.{name}", (*self.shape, new.shape[-1]))
            full = F.cache_write(state, new, self.row, self.start, self.count)
            q.trace.update(state, full)
            kept.append(full)
        return F.cached_attention(q, kept[0], kept[1], self.rows, self.start, self.count, spec)


@dataclass(frozen=True)
class Inputs:
    """Symbolic inputs of a model.

    ``input_ids``, ``position_ids`` and, where used, ``token_type_ids`` and ``segments`` are int32[B, T].
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None = None
    segments: Tensor | None = None
    cache: Cache | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: dict[str, object], dropout_p: float = 0.0
    ) -> Tensor:
        """Self-attention: over the cache while decoding, over the batch itself otherwise."""
        if self.cache is not None:
            return self.cache.attend(layer, q, k, v, spec)
        return F.attention(q, k, v, spec, segments=self.segments, dropout_p=dropout_p)


class Family(Module):
    """A model as its paper has it: from ids to hidden states, from hidden states to logits or loss."""

    config: ModelConfig
    #: "ar": the label of a position is the next token; "mlm": the token that was masked there.
    objective: ClassVar[str]
    #: Whether ``token_type_ids`` are read.
    uses_token_types: ClassVar[bool] = False
    #: The longest input in tokens.
    max_positions: int

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        """Embeddings, then the result of each layer, each ``[B, T, C]``; the last one is what the head reads."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [.., C]`` → ``[.., V]``."""
        raise NotImplementedError

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The summed cross-entropy of ``hidden [.., C]`` against ``labels int32[..]``; negative labels are ignored."""
        raise NotImplementedError

    def absent_tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Tensors that Hugging Face's layout has and this configuration leaves out; files hold zeros for them."""
        return []

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Today's name of a tensor in a file; None for one that is no parameter."""
        return name
