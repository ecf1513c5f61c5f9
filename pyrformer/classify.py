"""Classes of texts, or of their tokens, by models with a classification head; batched like scores and vectors.

Letters: N texts, T tokens of a text, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyrformer import programs
from pyrformer.arrow import Columns
from pyrformer.data.tagging import Entity, entities
from pyrformer.errors import InputError
from pyrformer.score import Row, arrays_of, batches_of, cut, stretches, text_ids

if TYPE_CHECKING:
    from pyrformer.model import Model


@dataclass(frozen=True)
class Classes(Columns):
    """The classes of texts; a table with a row per text for readers of Arrow.

    Attributes:
        names: of the K classes, from the configuration's ``id2label``; "LABEL_0", … without one.
        ids: the ids that were read of each text, special tokens included.
        scores: the probabilities of each text's classes, float32 ``[K]``, or of each of its tokens', ``[T, K]``.
    """

    names: list[str]
    ids: list[list[int]]
    scores: list[npt.NDArray[np.float32]]
    #: Of a model that classifies tokens, for each text that was given as one: the entities in it.
    entities: list[list[Entity]] = field(default_factory=list)

    def _columns(self) -> Iterator[tuple[str, Any]]:
        yield "ids", self.ids
        yield "scores", [s if s.ndim == 1 else list(s) for s in self.scores]
        yield "labels", self.labels

    @property
    def labels(self) -> list[Any]:
        """The most probable class: a name for each text, or a list of one for each of its tokens."""
        best = [s.argmax(-1) for s in self.scores]
        return [self.names[int(b)] if b.ndim == 0 else [self.names[i] for i in b.tolist()] for b in best]


def classify(model: Model, texts: Iterable[str | Sequence[int]]) -> Classes:
    """The classes of texts or lists of ids; those longer than the model's positions are cut.

    Probabilities follow Hugging Face's pipelines: the softmax over classes; for whole texts the sigmoid of each class
    where there is one only, or where ``problem_type`` is "multi_label_classification".

    Raises:
        InputError: the model has no classification head, or one that predicts quantities.
    """
    family = model.family
    if family.objective not in ("sentence", "tokens"):
        raise InputError("[classify] this model has no classification head")
    extra = family.config.extra
    if extra.get("problem_type") == "regression":
        raise InputError("[classify] this model predicts quantities, not classes; call it for its logits")
    whole = family.objective == "sentence"
    single = family.config.num_labels == 1 or extra.get("problem_type") == "multi_label_classification"
    found = Classes(_names(model), [], [])
    for stretch in stretches(texts):
        ids = [cut(text_ids(model, text, framed=True), family.max_positions) for text in stretch]
        empty = [len(found.ids) + i for i, row in enumerate(ids) if not row]
        if empty:
            raise InputError(f"[classify] text {empty[0]} has no tokens")
        part: dict[int, npt.NDArray[np.float32]] = {}
        for batch in batches_of(model, [Row(i, row, []) for i, row in enumerate(ids)]):
            sizes, arrays = arrays_of(model, batch)
            make = partial(programs.forward, family, sizes, model.dtype)
            out = model.program(("forward", sizes, False, False), make)(**arrays)
            logits = out["sentence_logits" if whole else "logits"]
            for row, values in zip(batch, logits, strict=False):
                real = (values if whole else values[: len(row.ids)]).astype(np.float64)
                part[row.text] = _probabilities(real, each=whole and single).astype(np.float32)
        found.ids.extend(ids)
        found.scores.extend(part[i] for i in range(len(ids)))
        if not whole:
            found.entities.extend(
                _entities(model, text, part[i], found.names) if isinstance(text, str) else []
                for i, text in enumerate(stretch)
            )
    return found


def _entities(model: Model, text: str, scores: npt.NDArray[np.float32], names: list[str]) -> list[Entity]:
    """Those of a text whose tokens have these probabilities ``[T, K]``."""
    encoding = model.require_tokenizer().encode(text)
    real = cut([i for i, m in enumerate(encoding.attention_mask) if m], len(scores))
    shown = [(k, i) for k, i in enumerate(real) if not encoding.special_tokens_mask[i]]
    best = scores.argmax(-1)
    return entities(
        text,
        [encoding.offsets[i] for _, i in shown],
        [names[int(best[k])] for k, _ in shown],
        np.array([scores[k, best[k]] for k, _ in shown], np.float64),
    )


def _names(model: Model) -> list[str]:
    config = model.family.config
    given = {int(k): str(v) for k, v in (config.extra.get("id2label") or {}).items()}
    return [given.get(i, f"LABEL_{i}") for i in range(config.num_labels)]


def _probabilities(logits: npt.NDArray[np.float64], *, each: bool) -> npt.NDArray[np.float64]:
    """Of logits ``[.., K]``: of each class by itself, or over all."""
    if each:
        return 0.5 * (1 + np.tanh(0.5 * logits))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))
