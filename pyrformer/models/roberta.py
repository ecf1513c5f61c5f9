"""RoBERTa: BERT with another head, one token type, and positions that skip padding. Source: Liu et al. 2019;
transformers' ``modeling_roberta.py``.

Positions are numbered from ``pad_token_id`` + 1, and padding, found by its id, keeps ``pad_token_id``::

    logits = LN(gelu(W·x))·wordsᵀ + b

Letters: B batch, T tokens, C hidden_size, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pyrformer.errors import InputError
from pyrformer.models.base import Family, Inputs, Ints, masked_positions
from pyrformer.models.bert import BertConfig, BertModel
from pyrformer.nn import ZEROS, LayerNorm, Linear, Module, Normal, Parameter, Tensor, Trace
from pyrformer.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Hugging Face's ``RobertaConfig``."""

    model_type: ClassVar[str] = "roberta"
    ARCHITECTURES: ClassVar[tuple[str, ...]] = (
        "RobertaForMaskedLM",
        "RobertaModel",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
    )

    pad_token_id: int | None = 1
    type_vocab_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.pad_token_id is not None and self.pad_token_id >= 0,
            "pad_token_id is needed: positions are counted from it",
        )
        self.require(
            self.max_position_embeddings > (self.pad_token_id or 0) + 1,
            f"max_position_embeddings ({self.max_position_embeddings}) leaves no position after pad_token_id",
        )


class Head(Module):
    """The masked-language-model head; its output weights are the word embeddings where tied."""

    def __init__(self, c: RobertaConfig, init: Normal):
        tied = c.tie_word_embeddings
        self.bias = Parameter((c.vocab_size,), ZEROS) if tied else None
        self.dense = Linear(c.hidden_size, c.hidden_size, init)
        self.layer_norm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.decoder = Linear(c.hidden_size, c.vocab_size, init, bias=not tied)

    def transform(self, h: Tensor) -> Tensor:
        """What a state goes through before it meets the embeddings."""
        return self.layer_norm(F.activation("gelu", self.dense(h)))


class SentenceHead(Module):
    """A class of the whole sequence from its first token."""

    def __init__(self, c: RobertaConfig, init: Normal):
        self.dense = Linear(c.hidden_size, c.hidden_size, init)
        self.out_proj = Linear(c.hidden_size, c.num_labels, init)


class Roberta(Family):
    """RoBERTa with the head that its configuration's ``architectures`` names."""

    objective = "mlm"
    uses_token_types = True

    def __init__(self, config: RobertaConfig):
        self.config: RobertaConfig = config
        self.position_offset = (config.pad_token_id or 0) + 1
        self.max_positions = config.max_position_embeddings - self.position_offset
        self.token_types = config.type_vocab_size
        init = Normal(config.initializer_range)
        self.objective = {
            "RobertaModel": "none",
            "RobertaForSequenceClassification": "sentence",
            "RobertaForTokenClassification": "tokens",
        }.get(config.architecture, "mlm")
        self.roberta = BertModel(config, init, pooler=self.objective == "none")
        self.lm_head = Head(config, init) if self.objective == "mlm" else None
        self.classifier: Module | None = None
        if self.objective == "sentence":
            self.classifier = SentenceHead(config, init)
        elif self.objective == "tokens":
            self.classifier = Linear(config.hidden_size, config.num_labels, init)
        if self.lm_head is not None and config.tie_word_embeddings:
            self.lm_head.decoder.weight = self.roberta.embeddings.word_embeddings.weight
        self.name_parameters()

    def hidden_states(self, x: Inputs) -> list[Tensor]:
        return self.roberta.hidden_states(x)

    def transform(self, hidden: Tensor) -> Tensor:
        if self.lm_head is None:
            return F.dropout(hidden, self._dropout)
        return self.lm_head.transform(hidden)

    def output(self, trace: Trace) -> tuple[Parameter, Tensor | None]:
        if self.lm_head is not None:
            bias = self.lm_head.bias or self.lm_head.decoder.bias
            return self.lm_head.decoder.weight, None if bias is None else trace.parameter(bias)
        if isinstance(self.classifier, Linear) and self.classifier.bias is not None:
            return self.classifier.weight, trace.parameter(self.classifier.bias)
        raise InputError("[roberta] this model has no head that predicts tokens")

    def sentence_output(self, hidden: Tensor, x: Inputs) -> tuple[Tensor, Parameter, Tensor | None] | None:
        head = self.classifier
        if not isinstance(head, SentenceHead) or head.out_proj.bias is None:
            return None
        first = F.dropout(F.first_token(hidden), self._dropout)
        pooled = F.dropout(F.activation("tanh", head.dense(first)), self._dropout)
        return pooled, head.out_proj.weight, hidden.trace.parameter(head.out_proj.bias)

    @property
    def _dropout(self) -> float:
        c = self.config
        return c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout

    def position_rows(self, ids: Ints, mask: Ints | None, given: Ints | None) -> Ints:
        if given is not None:
            return given
        real = (ids != self.config.pad_token_id).astype(np.int32)
        return (masked_positions(real) + self.position_offset).astype(np.int32)

    def absent_tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        untied = self.lm_head is not None and not self.config.tie_word_embeddings
        return [("lm_head.bias", (self.config.vocab_size,))] if untied else []

    def rename(self, name: str) -> str | None:
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith(("roberta.", "lm_head.", "classifier.")):
            name = f"roberta.{name}"
        surplus = ["roberta.embeddings.position_ids"]
        if self.config.tie_word_embeddings:
            surplus.append("lm_head.decoder.bias")
        elif name == "lm_head.bias":
            name = "lm_head.decoder.bias"
        surplus += ["lm_head."] if self.lm_head is None else []
        surplus += ["roberta.pooler."] if self.roberta.pooler is None else []
        return None if name.startswith(tuple(surplus)) else name

    def stored_name(self, name: str) -> str:
        return name.removeprefix("roberta.") if self.objective == "none" else name
