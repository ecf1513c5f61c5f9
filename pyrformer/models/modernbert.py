"""ModernBERT: an encoder with rotary positions, gated MLPs and windows. Source: Warner et al. 2024; transformers'
``modeling_modernbert.py``.

Pre-norm blocks; every third layer sees the whole text, the others ``local_attention`` // 2 tokens to either side, with
rotary frequencies of their own; the first block's attention has no norm before it, for the embeddings have one::

    x ← LN(tokens[ids])
    x ← x + Wo·attention(rope(q), rope(k), v),  [q k v] = Wqkv·ln(x)        for each layer
    x ← x + Wo·(gelu(a) ⊙ b),                   [a b] = Wi·ln'(x)
    logits = LN(gelu(W·ln_f(x)))·tokensᵀ + b

Letters: B batch, T tokens, C hidden_size, H heads, D head width, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pyrformer.errors import InputError
from pyrformer.models.base import Family, Inputs, ModelConfig, position_table
from pyrformer.models.positions import Rope, rope
from pyrformer.nn import ZEROS, Embedding, LayerNorm, Linear, Module, Normal, Parameter, Tensor, Trace
from pyrformer.nn import functional as F

FULL, SLIDING = "full_attention", "sliding_attention"
#: What a model may know of positions: rotations (ModernBERT's own), a learned table, sinusoids, or nothing.
POSITIONS = ("rope", "absolute", "sinusoidal", "none")


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(ModelConfig):
    """Hugging Face's ``ModernBertConfig``, and one of our own: ``position_embedding_type`` (one of ``POSITIONS``)."""

    model_type: ClassVar[str] = "modernbert"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = (
        "ModernBertForMaskedLM",
        "ModernBertModel",
        "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification",
    )
    ACTIVATION: ClassVar[str] = "hidden_activation"
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("rope",)

    SMALL: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 192,
    }

    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    classifier_dropout: float = 0.0
    classifier_pooling: str = "cls"
    local_attention: int = 128
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    position_embedding_type: str = "rope"

    @classmethod
    def modernise(cls, raw: dict[str, Any]) -> dict[str, Any]:
        raw = dict(raw)
        every = raw.pop("global_attn_every_n_layers", 3)
        layers = raw.get("num_hidden_layers", 22)
        if (
            raw.get("layer_types") is None
            and isinstance(layers, int)
            and isinstance(every, int)
            and every > 0
        ):
            raw["layer_types"] = [FULL if i % every == 0 else SLIDING for i in range(layers)]
        thetas = (raw.pop("global_rope_theta", 160000.0), raw.pop("local_rope_theta", 10000.0))
        if raw.get("rope_parameters") is None:
            raw["rope_parameters"] = {
                kind: {"rope_type": "default", "rope_theta": theta}
                for kind, theta in zip((FULL, SLIDING), thetas, strict=True)
            }
        return raw

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            max_position_embeddings=self.max_position_embeddings,
            local_attention=self.local_attention,
        )
        self.check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        self.check_probabilities(
            attention_dropout=self.attention_dropout,
            embedding_dropout=self.embedding_dropout,
            mlp_dropout=self.mlp_dropout,
            classifier_dropout=self.classifier_dropout,
        )
        self.require(
            self.classifier_pooling in ("cls", "mean"),
            f"classifier_pooling must be 'cls' or 'mean', got {self.classifier_pooling!r}",
        )
        if self.layer_types is None or self.rope_parameters is None:
            filled = self.modernise({"num_hidden_layers": self.num_hidden_layers})
            self.fill(
                layer_types=self.layer_types or filled["layer_types"],
                rope_parameters=self.rope_parameters or filled["rope_parameters"],
            )
        self.check_positions(self.position_embedding_type, POSITIONS, self.hidden_size, self.head_dim)
        types = self.layer_types or []
        self.require(
            len(types) == self.num_hidden_layers and all(t in (FULL, SLIDING) for t in types),
            f"layer_types must hold {FULL!r} or {SLIDING!r} for each of the {self.num_hidden_layers} layers",
        )
        for kind in set(types):
            self.require(
                isinstance((self.rope_parameters or {}).get(kind), dict), f"rope_parameters lack {kind!r}"
            )
            if self.position_embedding_type == "rope":
                self.rope(kind, 1)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    def rope(self, kind: str, length: int) -> Rope:
        """The rotary frequencies of a kind of layer for inputs of ``length`` tokens."""
        parameters = (self.rope_parameters or {})[kind]
        return rope(parameters, self.head_dim, self.max_position_embeddings, length, self.model_type)

    def norm(self) -> LayerNorm:
        """A norm over C."""
        return LayerNorm(self.hidden_size, self.norm_eps, bias=self.norm_bias)


class Embeddings(Module):
    """Token embeddings, normalised."""

    def __init__(self, c: ModernBertConfig, init: Normal):
        self.tok_embeddings = Embedding(c.vocab_size, c.hidden_size, init)
        kind, rows = c.position_embedding_type, c.max_position_embeddings
        self.position_embeddings = position_table(kind, rows, c.hidden_size, init)
        self.norm = c.norm()
        self._dropout = c.embedding_dropout

    def __call__(self, x: Inputs) -> Tensor:
        h = self.tok_embeddings(x.input_ids)
        if self.position_embeddings is not None:
            h = h + self.position_embeddings(x.position_ids)
        return F.dropout(self.norm(h), self._dropout)


class Attention(Module):
    """Attention over the whole text or a window, with q, k and v from one product."""

    def __init__(self, c: ModernBertConfig, layer: int, init: Normal):
        self.Wqkv = Linear(c.hidden_size, 3 * c.hidden_size, init, bias=c.attention_bias)
        self.Wo = Linear(c.hidden_size, c.hidden_size, init, bias=c.attention_bias)
        self._heads, self._layer, self._dropout = c.num_attention_heads, layer, c.attention_dropout
        window = c.local_attention // 2 + 1 if (c.layer_types or [])[layer] == SLIDING else None
        self._spec = F.attention_spec(self._heads, self._heads, c.head_dim, causal=False, window=window)

    def __call__(self, h: Tensor, x: Inputs, table: Tensor | None) -> Tensor:
        q, k, v = F.split(self.Wqkv(h), 3)
        if table is not None:
            q, k = F.rope(q, table, self._heads), F.rope(k, table, self._heads)
        y = self.Wo(x.attend(self._layer, q, k, v, self._spec, self._dropout))
        return F.dropout(y, self._dropout)


class MLP(Module):
    """The gated MLP (Shazeer 2020): GeGLU with ``hidden_activation`` "gelu"."""

    def __init__(self, c: ModernBertConfig, init: Normal):
        self.Wi = Linear(c.hidden_size, 2 * c.intermediate_size, init, bias=c.mlp_bias)
        self.Wo = Linear(c.intermediate_size, c.hidden_size, init, bias=c.mlp_bias)
        self._c = c

    def __call__(self, h: Tensor) -> Tensor:
        gate, value = F.split(self.Wi(h), 2)
        inner = F.gated(self._c.hidden_activation, gate, value)
        return self.Wo(F.dropout(inner, self._c.mlp_dropout))


class Layer(Module):
    """Attention and MLP, each beside a residual."""

    def __init__(self, c: ModernBertConfig, layer: int, init: Normal):
        self.attn_norm = c.norm() if layer > 0 else None
        self.attn = Attention(c, layer, init)
        self.mlp_norm = c.norm()
        self.mlp = MLP(c, init)

    def __call__(self, h: Tensor, x: Inputs, table: Tensor | None) -> Tensor:
        with h.trace.scope("attn"):
            h = h + self.attn(h if self.attn_norm is None else self.attn_norm(h), x, table)
        with h.trace.scope("mlp"):
            return h + self.mlp(self.mlp_norm(h))


class Body(Module):
    """Everything but the head."""

    def __init__(self, c: ModernBertConfig, init: Normal):
        self.embeddings = Embeddings(c, init)
        self.layers = [Layer(c, i, init) for i in range(c.num_hidden_layers)]
        self.final_norm = c.norm()


class Head(Module):
    """What a state goes through before it meets the output weights."""

    def __init__(self, c: ModernBertConfig, init: Normal):
        self.dense = Linear(c.hidden_size, c.hidden_size, init, bias=c.classifier_bias)
        self.norm = c.norm()
        self._act = c.classifier_activation

    def __call__(self, h: Tensor) -> Tensor:
        return self.norm(F.activation(self._act, self.dense(h)))


class Decoder(Module):
    """Output weights, tied to the token embeddings where configured."""

    def __init__(self, c: ModernBertConfig, init: Normal):
        self.weight = Parameter((c.vocab_size, c.hidden_size), init)
        self.bias = Parameter((c.vocab_size,), ZEROS) if c.decoder_bias else None


class ModernBert(Family):
    """ModernBERT with the head that its configuration's ``architectures`` names."""

    objective = "mlm"

    def __init__(self, config: ModernBertConfig):
        self.config: ModernBertConfig = config
        self.max_positions = config.max_position_embeddings
        init = Normal(config.initializer_range)
        self.objective = {
            "ModernBertModel": "none",
            "ModernBertForSequenceClassification": "sentence",
            "ModernBertForTokenClassification": "tokens",
        }.get(config.architecture, "mlm")
        self.model = Body(config, init)
        self.head = None if self.objective == "none" else Head(config, init)
        self.decoder = Decoder(config, init) if self.objective == "mlm" else None
        classifies = self.objective in ("sentence", "tokens")
        self.classifier = Linear(config.hidden_size, config.num_labels, init) if classifies else None
        if self.decoder is not None and config.tie_word_embeddings:
            self.decoder.weight = self.model.embeddings.tok_embeddings.weight
        self.name_parameters()

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        with x.trace.scope("embeddings"):
            states = [self.model.embeddings(x)]
            tables = {}
            if self.config.position_embedding_type == "rope":
                for kind in sorted(set(self.config.layer_types or [])):
                    tables[kind] = x.rope_table(self.config.rope(kind, x.length))
        for i, layer in enumerate(self.model.layers):
            with x.trace.scope(f"layers.{i}"):
                states.append(layer(states[-1], x, tables.get((self.config.layer_types or [])[i])))
        with x.trace.scope("final_norm"):
            states[-1] = self.model.final_norm(states[-1])
        return states

    def transform(self, hidden: Tensor) -> Tensor:
        if self.head is None:
            return hidden
        hidden = self.head(hidden)
        return F.dropout(hidden, self.config.classifier_dropout) if self.classifier else hidden

    def output(self, trace: Trace) -> tuple[Parameter, Tensor | None]:
        head = self.decoder or self.classifier
        if head is None:
            raise InputError("[modernbert] this model has no head that predicts tokens")
        return head.weight, None if head.bias is None else trace.parameter(head.bias)

    def sentence_output(self, hidden: Tensor, x: Inputs) -> tuple[Tensor, Parameter, Tensor | None] | None:
        if self.objective != "sentence":
            return None
        c = self.config
        if c.classifier_pooling == "mean":
            # Where all scores are equal, attention is the mean over what is no padding.
            equal = hidden.trace.fill(0.0, hidden.shape)
            heads = c.num_attention_heads
            spec = F.attention_spec(heads, heads, c.head_dim, causal=False)
            hidden = F.attention(equal, equal, hidden, spec, segments=x.segments)
        return self.transform(F.first_token(hidden)), *self.output(hidden.trace)

    def rename(self, name: str) -> str | None:
        if name.startswith(("embeddings.", "layers.", "final_norm.")):
            name = f"model.{name}"
        known = {n for n, _ in self.named_parameters()} | set(self.tied_names())
        return None if name.startswith(("head.", "decoder.", "classifier.")) and name not in known else name

    def stored_name(self, name: str) -> str:
        return name.removeprefix("model.") if self.objective == "none" else name
