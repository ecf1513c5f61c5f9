"""What every family shares: its configuration's manners, its symbolic inputs, and the interface that programs trace.

Letters: B batch, T tokens, S cache slots, R cache rows, C width.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from pyrformer.errors import ConfigError
from pyrformer.fields import check_types
from pyrformer.models.positions import Rope, alibi_slopes, rope, rope_parameters, sinusoids
from pyrformer.nn import Embedding, Init, Linear, Module, Parameter, Table, Tensor, Trace
from pyrformer.nn import functional as F

Ints = npt.NDArray[np.int32]


class Attended(NamedTuple):
    """What a layer's attention was given: operands by their names in ``nn.functional``, those that there are, and
    the operation's attributes."""

    operands: dict[str, Tensor]
    spec: dict[str, Any]


#: The greatest size of any axis; a damaged number would take all memory.
MOST_SIZE = 1 << 24
#: Kinds of classification of whole texts, the one that can be learnt last.
PROBLEMS = ("regression", "multi_label_classification", "single_label_classification")
#: Layers that a model may have; a damaged number would keep a machine busy with building them.
MOST_LAYERS = 4096


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The part of ``config.json`` that a family reads, under Hugging Face's names. What it does not know is kept and
    written back."""

    model_type: ClassVar[str]
    #: The names of ``config.json``'s ``architectures`` that the family builds, the usual one first.
    ARCHITECTURES: ClassVar[tuple[str, ...]]

    #: What the family calls the sizes that all have.
    SIZES: ClassVar[dict[str, str]] = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "positions": "max_position_embeddings",
    }
    #: Sizes of a model that a laptop trains, for what a new run does not say.
    SMALL: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    }

    #: Keys of ``config.json`` that would change the mathematics, and the values with which they do not; others are
    #: refused.
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    #: The kinds of ``position_embedding_type`` that the family's reference implementation has.
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ()
    #: The key that names the activation.
    ACTIVATION: ClassVar[str] = "hidden_act"

    vocab_size: int
    architecture: str = ""
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
        raw = cls.modernise(raw)
        named = raw.get("architectures") or [cls.ARCHITECTURES[0]]
        if not isinstance(named, list) or named[0] not in cls.ARCHITECTURES:
            raise ConfigError(
                f"[config] {cls.model_type}: unknown architectures {named!r}; "
                f"known ones: {', '.join(cls.ARCHITECTURES)}"
            )
        known = {f.name for f in dataclasses.fields(cls)} - {"extra", "architecture"}
        given = {k: v for k, v in raw.items() if k in known} | {"architecture": named[0]}
        rest = {k: v for k, v in raw.items() if k not in known and k not in ("model_type", "architectures")}
        fixed = {**cls.FIXED, "is_decoder": (None, False), "add_cross_attention": (None, False)}
        fixed |= {"quantization_config": (None,), "problem_type": (None, *PROBLEMS)}
        for name, values in fixed.items():
            if name in rest and rest[name] not in values:
                raise ConfigError(
                    f"[config] {cls.model_type}: {name} = {rest[name]!r} is not supported; leave it out or set it to "
                    f"{json.dumps(values[-1])}"
                )
        required = [
            f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in given]
        if missing:
            raise ConfigError(f"[config] {cls.model_type}: {missing[0]} is missing")
        return cls(**given, extra=rest)

    @classmethod
    def modernise(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """A ``config.json`` with older key names replaced by today's."""
        return raw

    def __post_init__(self) -> None:
        check_types(self, f"config {self.model_type}")
        layers = getattr(self, self.SIZES["layers"], None)
        self.require(
            not isinstance(layers, int) or layers <= MOST_LAYERS,
            f"{layers} layers are more than {MOST_LAYERS}",
        )
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            self.require(
                not whole or -1 <= value <= MOST_SIZE,
                f"{f.name} must be from -1 to {MOST_SIZE}, got {value!r}",
            )
        labels = self.extra.get("id2label")
        self.require(
            not labels or isinstance(labels, (dict, list)), f"id2label must be a table, got {labels!r}"
        )
        self.check_sizes(num_labels=self.num_labels)
        if not self.architecture:
            self.fill(architecture=self.ARCHITECTURES[0])
        alibi = getattr(self, "position_embedding_type", "") == "alibi" or getattr(self, "alibi", False)
        self.require(
            not (self.prefix_lm and alibi),
            "prefixes and ALiBi exclude each other, for its bias falls to the left only and a prefix is read both ways",
        )
        name = getattr(self, self.ACTIVATION)
        self.require(
            name in F.ACTIVATIONS,
            f"{self.ACTIVATION} must be one of {', '.join(F.ACTIVATIONS)}, got {name!r}",
        )

    def fill(self, **values: Any) -> None:
        """Sets fields whose defaults follow from others; for ``__post_init__`` only."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        derived = ("extra", "architecture")
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in derived}
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        return {**head, **self.extra, **own}

    @property
    def num_labels(self) -> int:
        """How many classes a classification head tells apart: the length of ``id2label``, or ``num_labels``, or 2."""
        labels = self.extra.get("id2label")
        number: int | None = self.extra.get("num_labels")
        return len(labels) if labels else 2 if number is None else number

    @property
    def stretch(self) -> float:
        """How many times longer than its positions an input may be."""
        return 1.0

    @property
    def prefix_lm(self) -> bool:
        """Whether the tokens of a prompt see each other, later ones too, as in training with the objective "prefix"."""
        return self.extra.get("prefix_lm") is True

    @property
    def departure(self) -> str | None:
        """What other programs that open the folder do not know of, and would compute differently; None: nothing."""
        kind = getattr(self, "position_embedding_type", None)
        if self.prefix_lm:
            return "a prompt that is read both ways is pyrformer's own"
        if kind is None or kind in self.OWN_POSITIONS:
            return None
        return f"positions of kind {kind!r} are pyrformer's own in a {self.model_type} model"

    def require(self, ok: bool, message: str) -> None:
        """Raises ConfigError with ``message`` unless ``ok``."""
        if not ok:
            raise ConfigError(f"[config] {self.model_type}: {message}")

    def check_sizes(self, **sizes: int) -> None:
        """Raises ConfigError unless all sizes are positive whole numbers, and not beyond all reason."""
        for name, value in sizes.items():
            self.require(
                isinstance(value, int) and 0 < value <= MOST_SIZE,
                f"{name} must be a positive whole number up to {MOST_SIZE}, got {value!r}",
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

    def check_positions(self, kind: str, known: tuple[str, ...], width: int, head: int) -> None:
        """Raises ConfigError unless ``kind`` is one of ``known`` and fits the widths of the model and of a head."""
        why = ""
        if kind == "alibi" and kind not in known:
            # alibi_bias gives a bias of keys, −slope·distance less what all keys of a query share: distances of one
            # sign only.
            why = "; ALiBi's bias falls with the distance to the left, and an encoder looks both ways"
        self.require(kind in known, f"position_embedding_type must be one of {known}, got {kind!r}{why}")
        self.require(
            kind != "rope" or head % 2 == 0, f"rotary positions need an even width of heads, got {head}"
        )
        self.require(
            kind != "sinusoidal" or width % 2 == 0, f"sinusoidal positions need an even width, got {width}"
        )


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(ModelConfig):
    """The part of a configuration that rotary positions read."""

    #: What ``rope_parameters`` hold where the file does not say.
    ROPE: ClassVar[dict[str, Any]] = {"rope_type": "default", "rope_theta": 10000.0}

    #: Whether the reference reads ``partial_rotary_factor``.
    PARTIAL: ClassVar[bool] = False

    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None

    @classmethod
    def modernise(cls, raw: dict[str, Any]) -> dict[str, Any]:
        older = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct")
        return {**{k: v for k, v in raw.items() if k not in older}, "rope_parameters": rope_parameters(raw)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(max_position_embeddings=self.max_position_embeddings)
        self.fill(rope_parameters={**self.ROPE, **(self.rope_parameters or {})})
        part = (self.rope_parameters or {}).get("partial_rotary_factor")
        self.require(
            self.PARTIAL or part in (None, 1),
            f"partial_rotary_factor ({part!r}) is not part of this family; its heads turn whole",
        )

    def rotary_width(self) -> int:
        """D, the width of a head."""
        raise NotImplementedError

    @property
    def stretch(self) -> float:
        p = self.rope_parameters or {}
        return float(p["factor"]) if p.get("rope_type") == "dynamic" else 1.0

    def rope(self, length: int) -> Rope:
        """The rotary frequencies for inputs of ``length`` tokens."""
        parameters = self.rope_parameters or {}
        return rope(parameters, self.rotary_width(), self.max_position_embeddings, length, self.model_type)


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
    #: Where the sequences begin with these tokens: how many first ones all of them may see, int32[B].
    prompts: Tensor | None = None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: dict[str, object],
        key_bias: Tensor | None,
    ) -> Tensor:
        """Writes k and v, then attends over all that the sequences hold."""
        kept = []
        for name, new in (("key", k), ("value", v)):
            state = q.trace.state(f"{self.prefix}.{layer}.{name}", (*self.shape, new.shape[-1]))
            full = F.cache_write(state, new, self.row, self.start, self.count)
            q.trace.update(state, full)
            kept.append(full)
        if self.prompts is not None:
            # Nothing was read before, so what is new is all there is.
            return F.attention(q, k, v, spec, prefix=self.prompts)
        return F.cached_attention(q, kept[0], kept[1], self.rows, self.start, self.count, spec, key_bias)


@dataclass(frozen=True)
class Inputs:
    """Symbolic inputs of a model.

    ``input_ids``, ``position_ids`` and, where used, ``token_type_ids`` and ``segments`` are int32[B, T]; ``prefix``
    int32[B] counts the tokens at the start that all may see. Of permutation models: ``targets int32[B, P]``, the places
    that are predicted; ``hidden int32[B, T, T]``, 1 where the first place does not see the second; ``mems``, for each
    layer the states ``[B, M, C]`` of an earlier part, and with them ``key_types int32[B, M + T]``.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None = None
    segments: Tensor | None = None
    prefix: Tensor | None = None
    cache: Cache | None = None
    targets: Tensor | None = None
    hidden: Tensor | None = None
    mems: tuple[Tensor, ...] = ()
    key_types: Tensor | None = None
    #: Whether the second half of the batch is read from right to left.
    mirrored: bool = False
    #: What each layer's attention was given, of two streams the content's; filled while tracing.
    seen: dict[int, Attended] = field(default_factory=dict, compare=False)

    @property
    def trace(self) -> Trace:
        """The trace that all inputs belong to."""
        return self.input_ids.trace

    @property
    def length(self) -> int:
        """How many positions attention reaches over: T, or the cache's slots S."""
        return self.input_ids.shape[1] if self.cache is None else self.cache.shape[1]

    @property
    def key_positions(self) -> Tensor:
        """The position of each key: int32[B, T], or int32[S] of the cache's slots."""
        return self.position_ids if self.cache is None else F.iota(self.trace, self.cache.shape[1])

    def rope_table(self, angles: Rope) -> Tensor:
        """The rotations of the tokens' positions by these frequencies, ``[B, T, R]``."""
        return F.rope_table(self.position_ids, angles.inv_freq, angles.scale)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: dict[str, object],
        dropout_p: float = 0.0,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """Self-attention: over the cache while decoding, over the batch itself otherwise."""
        operands = {"q": q, "k": k, "v": v, **({} if key_bias is None else {"key_bias": key_bias})}
        self.seen[layer] = Attended(operands, spec)
        if self.cache is not None:
            return self.cache.attend(layer, q, k, v, spec, key_bias)
        optional = {"segments": self.segments, "key_bias": key_bias, "prefix": self.prefix}
        return F.attention(q, k, v, spec, **optional, dropout_p=dropout_p)


@dataclass(frozen=True)
class Positions:
    """What attention is told of positions, beside what the embeddings hold: rotations, or a bias on keys."""

    table: Tensor | None = None
    key_bias: Tensor | None = None

    @classmethod
    def of(cls, x: Inputs, kind: str, heads: int, angles: Rope | None) -> Positions:
        """Those of a ``position_embedding_type``: rotations by ``angles`` for "rope", a bias for "alibi"; else none."""
        if kind == "rope" and angles is not None:
            return cls(table=x.rope_table(angles))
        if kind == "alibi":
            return cls(key_bias=F.alibi_bias(x.key_positions, alibi_slopes(heads)))
        return cls()


def position_table(kind: str, rows: int, width: int, init: Init) -> Embedding | None:
    """The table ``[rows, C]`` that embeddings add: learned ("learned", "absolute"), fixed ("sinusoidal") or none."""
    if kind == "sinusoidal":
        return Embedding(rows, width, Table(sinusoids(rows, width)), trainable=False)
    return Embedding(rows, width, init) if kind in ("learned", "absolute") else None


class Family(Module):
    """A model as its paper has it: from ids to hidden states, from hidden states to logits or loss."""

    config: ModelConfig
    #: What the head predicts. "ar": of each position, the next token; "mlm" and "plm": the token that was masked or is
    #: sought there; "tokens": a class of each token; "sentence": a class of the whole; "none": nothing, the model ends
    #: at its hidden states.
    objective: str
    #: Whether ``token_type_ids`` are read.
    uses_token_types: ClassVar[bool] = False
    #: How many token types there are; None: any.
    token_types: int | None = None
    #: The longest input in tokens.
    max_positions: int
    #: Of permutation models: C and the number of layers.
    width: int = 0
    depth: int = 0
    #: The row of the position table that the first token reads.
    position_offset: int = 0

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        """Embeddings, then the result of each layer, each ``[B, T, C]``; the last one is what the head reads."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [.., C]`` → ``[.., V]``."""
        weight, bias = self.output(hidden.trace)
        with hidden.trace.scope("lm_head"):
            return F.linear(self.transform(hidden), hidden.trace.parameter(weight), bias)

    def loss(self, hidden: Tensor, labels: Tensor, **extras: float) -> Tensor:
        """The summed cross-entropy of ``hidden [.., C]`` against ``labels int32[..]``; negative labels are ignored.
        ``extras``: smoothing and z_loss of :func:`pyrformer.nn.functional.linear_cross_entropy`."""
        weight, bias = self.output(hidden.trace)
        with hidden.trace.scope("lm_head"):
            weight_value = hidden.trace.parameter(weight)
            return F.linear_cross_entropy(self.transform(hidden), weight_value, bias, labels, **extras)

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of each row of ``hidden [.., C]`` against ``labels int32[..]``, ``[..]``."""
        weight, bias = self.output(hidden.trace)
        with hidden.trace.scope("lm_head"):
            weight_value = hidden.trace.parameter(weight)
            return F.linear_token_losses(self.transform(hidden), weight_value, bias, labels)

    def transform(self, hidden: Tensor) -> Tensor:
        """What the head does to ``hidden [.., C]`` before it meets the output weights."""
        return hidden

    def output(self, trace: Trace) -> tuple[Parameter, Tensor | None]:
        """The output weights ``[V, C]`` and their bias ``[V]``."""
        raise NotImplementedError

    def sentence_output(self, hidden: Tensor, x: Inputs) -> tuple[Tensor, Parameter, Tensor | None] | None:
        """For models that classify whole sequences: what the head reads ``[B, C]``, its weights ``[N, C]`` and bias
        ``[N]``, from ``hidden [B, T, C]`` of the inputs ``x``."""
        return None

    def position_rows(self, ids: Ints, mask: Ints | None, given: Ints | None) -> Ints:
        """The rows of the position table that tokens read, int32[B, T], for ``input_ids``, ``attention_mask`` and
        ``position_ids`` in Hugging Face's conventions."""
        if given is not None:
            return given
        return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)

    def unseen(self, length: int) -> Ints | None:
        """Of permutation models: 1 where the first place never sees the second, int32[T, T]; None: all may be seen."""
        return None

    def absent_tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Tensors that Hugging Face's layout has and this configuration leaves out; files hold zeros for them."""
        return []

    def rename(self, name: str) -> str | None:
        """Today's name of a tensor in a file; None for one that is no parameter."""
        return name

    def stored_name(self, name: str) -> str:
        """The name of a parameter in files."""
        return name


class CausalLM(Family):
    """A family that predicts the next token through ``lm_head``, made by :meth:`make_head` once the body is there."""

    objective = "ar"
    lm_head: Linear

    def make_head(self, width: int, init: Init, words: Embedding) -> None:
        """Makes the head, tied to the word embeddings where configured, and names all parameters."""
        self.lm_head = Linear(width, self.config.vocab_size, init, bias=False)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = words.weight
        self.name_parameters()

    def output(self, trace: Trace) -> tuple[Parameter, Tensor | None]:
        return self.lm_head.weight, None


def masked_positions(mask: Ints) -> Ints:
    """Positions that count what is not padding, from 0: cumsum(mask) − 1, and −1 at padding. Shapes: [B, T]."""
    return ((np.cumsum(mask, axis=1) * mask) - 1).astype(np.int32)
