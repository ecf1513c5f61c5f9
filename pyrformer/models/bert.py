"""BERT: an encoder that predicts masked tokens from both sides. Source: Devlin et al. 2019; transformers'
``modeling_bert.py``.

Post-norm blocks over token + position + type embeddings; the head transforms a masked position's state and compares
it with every token's embedding::

    x ← LN(words[ids] + positions[p] + types[t])
    x ← LN(x + attention(x));  x ← LN(x + W₂·gelu(W₁·x))     for each layer
    logits = LN(gelu(W·x))·wordsᵀ + b

Letters: B batch, T tokens, C hidden_size, V vocab_size, M masked positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyrformer.errors import InputError
from pyrformer.models.base import Family, Inputs, ModelConfig, Positions, position_table
from pyrformer.models.positions import rope
from pyrformer.nn import ZEROS, Embedding, LayerNorm, Linear, Module, Normal, Parameter, Tensor, Trace
from pyrformer.nn import functional as F

#: What an encoder may know of positions: a learned table (BERT's own), sinusoids, rotations, or nothing.
POSITIONS = ("absolute", "sinusoidal", "rope", "none")


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """Hugging Face's ``BertConfig``; of ``position_embedding_type`` the ``POSITIONS``, of which it knows the first."""

    model_type: ClassVar[str] = "bert"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = (
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertModel",
        "BertForSequenceClassification",
        "BertForTokenClassification",
    )
    OWN_POSITIONS: ClassVar[tuple[str, ...]] = ("absolute",)

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | None = None
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes(
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            type_vocab_size=self.type_vocab_size,
        )
        self.check_probabilities(
            hidden_dropout_prob=self.hidden_dropout_prob,
            attention_probs_dropout_prob=self.attention_probs_dropout_prob,
        )
        self.check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        head = self.hidden_size // self.num_attention_heads
        self.check_positions(self.position_embedding_type, POSITIONS, self.hidden_size, head)


class Embeddings(Module):
    """The sum of word, position and type embeddings, normalised."""

    def __init__(self, c: BertConfig, init: Normal):
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size, init)
        kind, rows = c.position_embedding_type, c.max_position_embeddings
        self.position_embeddings = position_table(kind, rows, c.hidden_size, init)
        self.token_type_embeddings = Embedding(c.type_vocab_size, c.hidden_size, init)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self._dropout = c.hidden_dropout_prob

    def __call__(self, x: Inputs) -> Tensor:
        if x.token_type_ids is None:
            raise InputError("[bert] token_type_ids are needed")
        types = self.token_type_embeddings(x.token_type_ids)
        h = self.word_embeddings(x.input_ids) + types
        if self.position_embeddings is not None:
            h = h + self.position_embeddings(x.position_ids)
        return F.dropout(self.LayerNorm(h), self._dropout)


class SelfAttention(Module):
    """Queries, keys and values; every token sees every token that is not padding."""

    def __init__(self, c: BertConfig, layer: int, init: Normal):
        self.query = Linear(c.hidden_size, c.hidden_size, init)
        self.key = Linear(c.hidden_size, c.hidden_size, init)
        self.value = Linear(c.hidden_size, c.hidden_size, init)
        self._layer, self._dropout = layer, c.attention_probs_dropout_prob
        self._heads = heads = c.num_attention_heads
        self._spec = F.attention_spec(heads, heads, c.hidden_size // heads, causal=False)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        q, k, v = self.query(h), self.key(h), self.value(h)
        if at.table is not None:
            q, k = (F.rope(y, at.table, self._heads) for y in (q, k))
        return x.attend(self._layer, q, k, v, self._spec, self._dropout)


class Output(Module):
    """A linear layer whose result is added to the residual and normalised."""

    def __init__(self, c: BertConfig, inputs: int, init: Normal):
        self.dense = Linear(inputs, c.hidden_size, init)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self._dropout = c.hidden_dropout_prob

    def __call__(self, y: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(F.dropout(self.dense(y), self._dropout) + residual)


class AttentionBlock(Module):
    def __init__(self, c: BertConfig, layer: int, init: Normal):
        # Hugging Face's parameter is called `self`.
        self.self = SelfAttention(c, layer, init)
        self.output = Output(c, c.hidden_size, init)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        return self.output(self.self(h, x, at), h)


class Intermediate(Module):
    def __init__(self, c: BertConfig, init: Normal):
        self.dense = Linear(c.hidden_size, c.intermediate_size, init)
        self._act = c.hidden_act

    def __call__(self, h: Tensor) -> Tensor:
        return F.activation(self._act, self.dense(h))


class Layer(Module):
    def __init__(self, c: BertConfig, layer: int, init: Normal):
        self.attention = AttentionBlock(c, layer, init)
        self.intermediate = Intermediate(c, init)
        self.output = Output(c, c.intermediate_size, init)

    def __call__(self, h: Tensor, x: Inputs, at: Positions) -> Tensor:
        with h.trace.scope("attention"):
            h = self.attention(h, x, at)
        with h.trace.scope("mlp"):
            return self.output(self.intermediate(h), h)


class Encoder(Module):
    def __init__(self, c: BertConfig, init: Normal):
        self.layer = [Layer(c, i, init) for i in range(c.num_hidden_layers)]


class Pooler(Module):
    """The first token's state, transformed: what sentence heads read."""

    def __init__(self, c: BertConfig, init: Normal):
        self.dense = Linear(c.hidden_size, c.hidden_size, init)

    def __call__(self, first: Tensor) -> Tensor:
        return F.activation("tanh", self.dense(first))


class BertModel(Module):
    """Everything but the head."""

    def __init__(self, c: BertConfig, init: Normal, *, pooler: bool):
        self.embeddings = Embeddings(c, init)
        self.encoder = Encoder(c, init)
        self.pooler = Pooler(c, init) if pooler else None
        self._c = c

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        """Embeddings, then each layer's result."""
        with x.trace.scope("embeddings"):
            states = [self.embeddings(x)]
            c, kind, angles = self._c, self._c.position_embedding_type, None
            if kind == "rope":
                head, most = c.hidden_size // c.num_attention_heads, c.max_position_embeddings
                angles = rope({}, head, most, x.length, c.model_type)
            at = Positions.of(x, kind, c.num_attention_heads, angles)
        for i, layer in enumerate(self.encoder.layer):
            with x.trace.scope(f"layer.{i}"):
                states.append(layer(states[-1], x, at))
        return states


class Transform(Module):
    """What the head does to a state before it meets the embeddings."""

    def __init__(self, c: BertConfig, init: Normal):
        self.dense = Linear(c.hidden_size, c.hidden_size, init)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self._act = c.hidden_act

    def __call__(self, h: Tensor) -> Tensor:
        return self.LayerNorm(F.activation(self._act, self.dense(h)))


class Predictions(Module):
    """The masked-language-model head; its output weights are the word embeddings where tied."""

    def __init__(self, c: BertConfig, init: Normal):
        # As transformers has it: a bias of the head's own beside tied weights, the layer's own otherwise.
        tied = c.tie_word_embeddings
        self.bias = Parameter((c.vocab_size,), ZEROS) if tied else None
        self.transform = Transform(c, init)
        self.decoder = Linear(c.hidden_size, c.vocab_size, init, bias=not tied)


class Heads(Module):
    """What pre-training predicts: masked tokens and, for pairs, whether the second text follows the first."""

    def __init__(self, c: BertConfig, init: Normal):
        self.predictions = Predictions(c, init)
        pretraining = c.architecture == "BertForPreTraining"
        self.seq_relationship = Linear(c.hidden_size, 2, init) if pretraining else None


class Bert(Family):
    """BERT with the head that its configuration's ``architectures`` names."""

    objective = "mlm"
    uses_token_types = True

    def __init__(self, config: BertConfig):
        self.config: BertConfig = config
        self.max_positions = config.max_position_embeddings
        self.token_types = config.type_vocab_size
        init, kind = Normal(config.initializer_range), config.architecture
        self.objective = {
            "BertModel": "none",
            "BertForSequenceClassification": "sentence",
            "BertForTokenClassification": "tokens",
        }.get(kind, "mlm")
        pooled = ("BertForPreTraining", "BertModel", "BertForSequenceClassification")
        self.bert = BertModel(config, init, pooler=kind in pooled)
        self.cls = Heads(config, init) if self.objective == "mlm" else None
        classifies = self.objective in ("sentence", "tokens")
        self.classifier = Linear(config.hidden_size, config.num_labels, init) if classifies else None
        if self.cls is not None and config.tie_word_embeddings:
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.name_parameters()

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        return self.bert.hidden_states(x)

    def transform(self, hidden: Tensor) -> Tensor:
        if self.cls is None:
            return F.dropout(hidden, self._classifier_dropout)
        return self.cls.predictions.transform(hidden)

    def output(self, trace: Trace) -> tuple[Parameter, Tensor | None]:
        if self.cls is not None:
            predictions = self.cls.predictions
            bias = predictions.bias or predictions.decoder.bias
            return predictions.decoder.weight, None if bias is None else trace.parameter(bias)
        return self._classes(self.classifier, trace)

    def sentence_output(self, hidden: Tensor, x: Inputs) -> tuple[Tensor, Parameter, Tensor | None] | None:
        pooler = self.bert.pooler
        head = self.classifier if self.objective == "sentence" else None
        if self.cls is not None:
            head = self.cls.seq_relationship
        if pooler is None or head is None:
            return None
        pooled = pooler(F.first_token(hidden))
        if self.objective == "sentence":
            pooled = F.dropout(pooled, self._classifier_dropout)
        return pooled, *self._classes(head, hidden.trace)

    @staticmethod
    def _classes(head: Linear | None, trace: Trace) -> tuple[Parameter, Tensor | None]:
        if head is None or head.bias is None:
            raise InputError("[bert] this model has no head that predicts tokens")
        return head.weight, trace.parameter(head.bias)

    @property
    def _classifier_dropout(self) -> float:
        c = self.config
        return c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout

    def absent_tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        untied = self.cls is not None and not self.config.tie_word_embeddings
        return [("cls.predictions.bias", (self.config.vocab_size,))] if untied else []

    def rename(self, name: str) -> str | None:
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith(("bert.", "cls.", "classifier.")):
            name = f"bert.{name}"
        if name == "cls.predictions.bias" and not self.config.tie_word_embeddings:
            name = "cls.predictions.decoder.bias"
        # Further heads are not part of the model, as in transformers.
        known = {n for n, _ in self.named_parameters()} | set(self.tied_names())
        if name.startswith("cls.") and name not in known:
            return None
        surplus = ["bert.embeddings.position_ids"]
        surplus += ["bert.pooler."] if self.bert.pooler is None else []
        return None if name.startswith(tuple(surplus)) else name

    def stored_name(self, name: str) -> str:
        return name.removeprefix("bert.") if self.objective == "none" else name
