"""DistilBERT: a smaller BERT without token types and pooler. Source: Sanh et al. 2019; transformers'
``modeling_distilbert.py``.

::

    x ← LN(words[ids] + positions[p])
    x ← LN(x + attention(x));  x ← LN(x + W₂·gelu(W₁·x))     for each layer
    logits = LN(gelu(W·x))·wordsᵀ + b

Letters: B batch, T tokens, C dim, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pyrformer.errors import InputError
from pyrformer.models.base import Family, Inputs, ModelConfig, Positions, position_table
from pyrformer.models.bert import POSITIONS
from pyrformer.models.positions import rope
from pyrformer.nn import ZEROS, Embedding, LayerNorm, Linear, Module, Normal, Parameter, Tensor, Trace
from pyrformer.nn import functional as F

#: The epsilon of all norms; the configuration has none.
EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(ModelConfig):
    """Hugging Face's ``DistilBertConfig``, and one of our own: ``position_embedding_type`` (one of BERT's
    ``POSITIONS``; default: what ``sinusoidal_pos_embds`` says)."""

    model_type: ClassVar[str] = "distilbert"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = (
        "DistilBertForMaskedLM",
        "DistilBertModel",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
    )
    ACTIVATION: ClassVar[str] = "activation"
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("absolute", "sinusoidal")

    SIZES: ClassVar[dict[str, str]] = {
        "layers": "n_layers",
        "width": "dim",
        "heads": "n_heads",
        "positions": "max_position_embeddings",
    }
    SMALL: ClassVar[dict[str, Any]] = {"n_layers": 4, "dim": 128, "n_heads": 4, "hidden_dim": 512}

    dim: int = 768
    n_layers: int = 6
    n_heads: int = 12
    hidden_dim: int = 3072
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    activation: str = "gelu"
    initializer_range: float = 0.02
    position_embedding_type: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            n_layers=self.n_layers,
            hidden_dim=self.hidden_dim,
            max_position_embeddings=self.max_position_embeddings,
        )
        self.check_heads("dim", self.dim, "n_heads", self.n_heads)
        self.check_probabilities(
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            seq_classif_dropout=self.seq_classif_dropout,
        )
        kind = self.position_embedding_type or ("sinusoidal" if self.sinusoidal_pos_embds else "absolute")
        self.check_positions(kind, POSITIONS, self.dim, self.dim // self.n_heads)
        self.require(
            kind == "sinusoidal" or not self.sinusoidal_pos_embds,
            f"sinusoidal_pos_embds and position_embedding_type {kind!r} contradict each other",
        )
        self.fill(position_embedding_type=kind, sinusoidal_pos_embds=kind == "sinusoidal")


class Embeddings(Module):
    """The sum of word and position embeddings, normalised."""

    def __init__(self, c: DistilBertConfig, init: Normal):
        kind, rows = c.position_embedding_type, c.max_position_embeddings
        self.word_embeddings = Embedding(c.vocab_size, c.dim, init)
        self.position_embeddings = position_table(kind, rows, c.dim, init)
        self.LayerNorm = LayerNorm(c.dim, EPS)
        self._dropout = c.dropout

    def __call__(self, x: Inputs) -> Tensor:
        h = self.word_embeddings(x.input_ids)
        if self.position_embeddings is not None:
            h = h + self.position_embeddings(x.position_ids)
        return F.dropout(self.LayerNorm(h), self._dropout)


class Attention(Module):
    """Every token sees every token that is not padding."""

    def __init__(self, c: DistilBertConfig, layer: int, init: Normal):
        self.q_lin, self.k_lin = Linear(c.dim, c.dim, init), Linear(c.dim, c.dim, init)
        self.v_lin, self.out_lin = Linear(c.dim, c.dim, init), Linear(c.dim, c.dim, init)
        self._layer, self._dropout, self._heads = layer, c.attention_dropout, c.n_heads
        self._spec = F.attention_spec(c.n_heads, c.n_heads, c.dim // c.n_heads, causal=False)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        q, k, v = self.q_lin(h), self.k_lin(h), self.v_lin(h)
        if at.table is not None:
            q, k = (F.rope(y, at.table, self._heads) for y in (q, k))
        return self.out_lin(x.attend(self._layer, q, k, v, self._spec, self._dropout))


class FFN(Module):
    """Two linear layers with an activation between them."""

    def __init__(self, c: DistilBertConfig, init: Normal):
        self.lin1, self.lin2 = Linear(c.dim, c.hidden_dim, init), Linear(c.hidden_dim, c.dim, init)
        self._c = c

    def __call__(self, h: Tensor) -> Tensor:
        return F.dropout(self.lin2(F.activation(self._c.activation, self.lin1(h))), self._c.dropout)


class Layer(Module):
    def __init__(self, c: DistilBertConfig, layer: int, init: Normal):
        self.attention = Attention(c, layer, init)
        self.sa_layer_norm = LayerNorm(c.dim, EPS)
        self.ffn = FFN(c, init)
        self.output_layer_norm = LayerNorm(c.dim, EPS)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        with h.trace.scope("attention"):
            h = self.sa_layer_norm(self.attention(h, x, at) + h)
        with h.trace.scope("ffn"):
            return self.output_layer_norm(self.ffn(h) + h)


class Transformer(Module):
    def __init__(self, c: DistilBertConfig, init: Normal):
        self.layer = [Layer(c, i, init) for i in range(c.n_layers)]


class DistilBertModel(Module):
    """Everything but the head."""

    def __init__(self, c: DistilBertConfig, init: Normal):
        self.embeddings = Embeddings(c, init)
        self.transformer = Transformer(c, init)


class Projector(Module):
    """Output weights, tied to the word embeddings where configured, and their bias."""

    def __init__(self, c: DistilBertConfig, init: Normal):
        self.weight = Parameter((c.vocab_size, c.dim), init)
        self.bias = Parameter((c.vocab_size,), ZEROS)


class DistilBert(Family):
    """DistilBERT with the head that its configuration's ``architectures`` names."""

    objective = "mlm"

    def __init__(self, config: DistilBertConfig):
        self.config: DistilBertConfig = config
        self.max_positions = config.max_position_embeddings
        init = Normal(config.initializer_range)
        self.objective = {
            "DistilBertModel": "none",
            "DistilBertForSequenceClassification": "sentence",
            "DistilBertForTokenClassification": "tokens",
        }.get(config.architecture, "mlm")
        self.distilbert = DistilBertModel(config, init)
        masked, classifies = self.objective == "mlm", self.objective in ("sentence", "tokens")
        self.vocab_transform = Linear(config.dim, config.dim, init) if masked else None
        self.vocab_layer_norm = LayerNorm(config.dim, EPS) if masked else None
        self.vocab_projector = Projector(config, init) if masked else None
        self.pre_classifier = Linear(config.dim, config.dim, init) if self.objective == "sentence" else None
        self.classifier = Linear(config.dim, config.num_labels, init) if classifies else None
        if self.vocab_projector is not None and config.tie_word_embeddings:
            self.vocab_projector.weight = self.distilbert.embeddings.word_embeddings.weight
        self.name_parameters()

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        with x.trace.scope("embeddings"):
            states = [self.distilbert.embeddings(x)]
            c, kind, angles = self.config, self.config.position_embedding_type, None
            if kind == "rope":
                angles = rope({}, c.dim // c.n_heads, c.max_position_embeddings, x.length, c.model_type)
            at = Positions.of(x, kind, c.n_heads, angles)
        for i, layer in enumerate(self.distilbert.transformer.layer):
            with x.trace.scope(f"layer.{i}"):
                states.append(layer(states[-1], x, at))
        return states

    def transform(self, hidden: Tensor) -> Tensor:
        if self.vocab_transform is None or self.vocab_layer_norm is None:
            return F.dropout(hidden, self.config.dropout)
        return self.vocab_layer_norm(F.activation(self.config.activation, self.vocab_transform(hidden)))

    def output(self, trace: Trace) -> tuple[Parameter, Tensor | None]:
        head = self.vocab_projector or self.classifier
        if head is None or head.bias is None:
            raise InputError("[distilbert] this model has no head that predicts tokens")
        return head.weight, trace.parameter(head.bias)

    def sentence_output(self, hidden: Tensor, x: Inputs) -> tuple[Tensor, Parameter, Tensor | None] | None:
        if self.pre_classifier is None:
            return None
        pooled = F.activation("relu", self.pre_classifier(F.first_token(hidden)))
        return F.dropout(pooled, self.config.seq_classif_dropout), *self.output(hidden.trace)

    def rename(self, name: str) -> str | None:
        if name.startswith(("embeddings.", "transformer.")):
            name = f"distilbert.{name}"
        known = {n for n, _ in self.named_parameters()} | set(self.tied_names())
        heads = ("vocab_", "pre_classifier.", "classifier.", "distilbert.embeddings.position_ids")
        return None if name.startswith(heads) and name not in known else name

    def stored_name(self, name: str) -> str:
        return name.removeprefix("distilbert.") if self.objective == "none" else name
