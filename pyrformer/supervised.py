"""Batches beyond plain text: prefix and permutation language modelling, and texts with a class.

As everywhere, the batch of a step is a pure function of (seed, step). Letters: B rows, T tokens, P targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.batch import IGNORE, Batch
from pyrformer.data import Batches, Documents, as_corpus
from pyrformer.errors import DataError, InputError
from pyrformer.programs import Sizes
from pyrformer.tokenizers import Ragged, Tokenizer

#: Purposes of random draws, so that order, permutations and prefixes are independent.
ORDER, PERMUTE, PREFIX = 11, 12, 14


def draws_of(seed: int, purpose: int, step: int) -> np.random.Generator:
    """A generator that depends on its arguments alone: Philox, keyed by (seed, purpose), counted from the step."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, step]))


class PrefixBatches:
    """Packed rows that begin with a prefix all of whose tokens see each other; what follows is predicted, from left to
    right. Source: Raffel et al. 2020, section 3.2.1. A prefix has 1 … T − 1 tokens, each number as probable."""

    def __init__(self, rows: Batches, seed: int = 0):
        self._rows, self._seed = rows, seed

    @property
    def batches_per_pass(self) -> int:
        """How many batches visit the whole corpus once."""
        return self._rows.batches_per_pass

    @property
    def settled_steps(self) -> int:
        """How many of the first steps a longer corpus would leave as they are."""
        return self._rows.settled_steps

    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row of a step."""
        return self._rows.documents(step)

    def ready(self, step: int) -> Batch:
        """The batch of a step under the names that the programs take."""
        rows = self._rows.ready(step)
        b, t = rows.arrays["input_ids"].shape
        prefix = draws_of(self._seed, PREFIX, step).integers(1, max(t, 2), size=b).astype(np.int32)
        # The prefix's last token does not see the next one, those before it do.
        inside = np.arange(t) < prefix[:, None] - 1
        labels = np.where(inside, IGNORE, rows.arrays["labels"])
        arrays = {**rows.arrays, "prefix": prefix, "labels": labels.astype(np.int32)}
        return Batch(replace(rows.sizes, prefix=True), arrays, int((labels >= 0).sum()))


class PermutationBatches:
    """Packed rows with spans to predict, each from a random order of the row. Source: Yang et al. 2019, sections 2.2
    and 2.3; spans as in transformers' ``DataCollatorForPermutationLanguageModeling``: of 1 … ``max_span_length``
    tokens, each alone in a stretch of length / ``plm_probability``."""

    def __init__(
        self,
        corpus: Ragged | _core.Corpus,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        plm_probability: float = 1 / 6,
        max_span_length: int = 5,
    ):
        """
        Raises:
            DataError: the corpus is shorter than a row.
        """
        self._rows = _core.CausalBatches(as_corpus(corpus), seq_len, batch_size, seed, shuffle, False)
        self._seed, self._rate, self._span = seed, plm_probability, max_span_length
        # The most tokens that spans of a row can hold, to a multiple of 8.
        stretches = -(-seq_len // max(1, int(1 / plm_probability)))
        self._targets = min(seq_len, -(-stretches * 2 // 8) * 8)

    @property
    def batches_per_pass(self) -> int:
        """How many batches visit the whole corpus once."""
        return self._rows.batches_per_pass

    @property
    def settled_steps(self) -> int:
        """How many of the first steps a longer corpus would leave as they are."""
        return self._rows.settled_steps

    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row of a step."""
        return self._rows.documents(step)

    def batch(self, step: int) -> dict[str, npt.NDArray[np.int32]]:
        """``input_ids``, ``position_ids``, ``token_type_ids [B, T]``; ``hidden [B, T, T]``, 1 where the first token
        does not see the second; ``targets [B, P]``, −1 where there are fewer; ``labels [B, P]``, −100 there."""
        arrays, _ = self._rows.batch(step)
        ids = arrays["input_ids"]
        b, t = ids.shape
        draws = draws_of(self._seed, PERMUTE, step)
        sought = np.zeros((b, t), bool)
        for row in sought:
            at = 0
            while at < t:
                span = int(draws.integers(1, self._span + 1))
                stretch = int(span / self._rate)
                start = at + int(draws.integers(stretch - span + 1))
                row[start : start + span] = True
                at += stretch
        # At most P targets a row, the first ones.
        sought &= np.cumsum(sought, axis=1) <= self._targets
        order = draws.permuted(np.broadcast_to(np.arange(t), (b, t)), axis=1)
        # What is not sought comes first in the order and is seen by all.
        order = np.where(sought, order, -1)
        hidden = (order[:, :, None] <= order[:, None, :]) & sought[:, None, :]
        targets = np.full((b, self._targets), -1, np.int32)
        for i, row in enumerate(sought):
            places = np.flatnonzero(row)
            targets[i, : len(places)] = places
        labels = np.where(targets >= 0, np.take_along_axis(ids, np.maximum(targets, 0), axis=1), -100)
        return {
            "input_ids": ids,
            "position_ids": np.ascontiguousarray(np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))),
            "token_type_ids": np.zeros_like(ids),
            "hidden": hidden.astype(np.int32),
            "targets": targets,
            "labels": labels.astype(np.int32),
        }

    def ready(self, step: int) -> Batch:
        """The batch of a step under the names that the programs take."""
        arrays = self.batch(step)
        labels = arrays.pop("labels").reshape(-1)
        (b, t), p = arrays["input_ids"].shape, self._targets
        given = {**arrays, "labels": labels, "positions": np.arange(b * p, dtype=np.int32)}
        return Batch(Sizes(b, t, b * p, targets=p, hidden=True), given, int((labels >= 0).sum()))


@dataclass(frozen=True)
class Labelled:
    """Texts with a class each: ids with the template's special tokens, and class numbers."""

    texts: Ragged
    classes: npt.NDArray[np.int32]

    @property
    def ids(self) -> npt.NDArray[np.uint32]:
        """All ids, for counting."""
        return self.texts.ids


def read_labelled(
    files: Sequence[str], *, column: str = "text", label_column: str = "label"
) -> tuple[list[str], list[str]]:
    """Texts and labels of the rows of files, see :meth:`pyrformer.data.Documents.rows`; labels are strings, whole
    numbers are written as such.

    Raises:
        DataError: a file is missing or a row does not hold both fields; the message names the place.
    """
    texts, labels = [], []
    for number, row in enumerate(Documents(list(files), column=column).rows(), 1):
        label = row.get(label_column)
        if not isinstance(label, (str, int)):
            names = ", ".join(files)
            raise DataError(
                f"[data] row {number} of {names} must have a string or a whole number in {label_column!r}"
            )
        texts.append(row[column])
        labels.append(str(label))
    return texts, labels


def labelled(
    tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[str], names: Sequence[str], seq_len: int
) -> Labelled:
    """Encodes texts, cut to ``seq_len`` tokens with their special ones kept.

    Raises:
        DataError: a label is not among ``names``.
    """
    number = {name: i for i, name in enumerate(names)}
    strange = sorted(set(labels) - number.keys())
    if strange:
        raise DataError(f"[data] label {strange[0]!r} occurs in the files to measure on only")
    bare = tokenizer.encode_batch(texts, add_special_tokens=False)
    frame = tokenizer.encode("").ids
    half = len(frame) - len(frame) // 2
    rows = [
        [*frame[:half], *bare.ids[a : min(b, a + seq_len - len(frame))].tolist(), *frame[half:]]
        for a, b in zip(bare.offsets[:-1].tolist(), bare.offsets[1:].tolist(), strict=True)
    ]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    ids = np.array([i for row in rows for i in row], np.uint32)
    return Labelled(Ragged(ids, offsets), np.array([number[label] for label in labels], np.int32))


class LabelledBatches:
    """Padded rows with a class each."""

    def __init__(
        self,
        corpus: Labelled,
        *,
        seq_len: int,
        batch_size: int,
        pad_token_id: int | None,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """
        Raises:
            InputError: there is no padding token.
        """
        if pad_token_id is None:
            raise InputError("[data] rows of texts need a tokenizer with a padding token")
        self._corpus, self._size, self._pad = corpus, batch_size, pad_token_id
        self._seed, self._shuffle, self._seq_len = seed, shuffle, seq_len

    @property
    def batches_per_pass(self) -> int:
        """How many batches visit all texts once."""
        return -(-len(self._corpus.classes) // self._size)

    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row of a step."""
        return [[i] for i in self._chosen(step).tolist()]

    def _chosen(self, step: int) -> npt.NDArray[np.int64]:
        """The numbers of the texts of a step."""
        count = len(self._corpus.classes)
        epoch, at = divmod(step, self.batches_per_pass)
        order = draws_of(self._seed, ORDER, epoch).permutation(count) if self._shuffle else np.arange(count)
        return order[at * self._size : (at + 1) * self._size]

    def ready(self, step: int) -> Batch:
        """The batch of a step under the names that the programs take."""
        chosen = self._chosen(step)
        offsets = self._corpus.texts.offsets
        lengths = offsets[chosen + 1] - offsets[chosen]
        # Few distinct widths: each is a program of its own.
        width = min(-(-int(lengths.max()) // 16) * 16, self._seq_len)
        b = self._size
        ids = np.full((b, width), self._pad, np.int32)
        mask = np.zeros((b, width), np.int32)
        classes = np.full(b, -100, np.int32)
        for i, (row, n) in enumerate(zip(chosen.tolist(), lengths.tolist(), strict=True)):
            ids[i, :n] = self._corpus.texts.ids[offsets[row] : offsets[row] + n]
            mask[i, :n] = 1
            classes[i] = self._corpus.classes[row]
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(width, dtype=np.int32), (b, width)))
        arrays = {
            "input_ids": ids,
            "position_ids": positions,
            "token_type_ids": np.zeros_like(ids),
            "segments": mask,
            "sentence_labels": classes,
        }
        return Batch(Sizes(b, width, 0, True, sentences=True), arrays, 0, len(chosen))
