"""Texts with a class each, or with classes of their words, and their batches.

As everywhere, the batch of a step is a pure function of (seed, step). Letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyrformer.batch import IGNORE, Batch
from pyrformer.data.documents import Documents
from pyrformer.data.tagging import Tagged, first_tokens
from pyrformer.errors import DataError, InputError
from pyrformer.programs import Sizes
from pyrformer.tokenizers import Ragged, Tokenizer

#: The purpose of the random draws of the order.
ORDER = 11


def draws_of(seed: int, purpose: int, step: int) -> np.random.Generator:
    """A generator that depends on its arguments alone: Philox, keyed by (seed, purpose), counted from the step."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, step]))


@dataclass(frozen=True)
class Labelled:
    """Texts as ids with the template's special tokens, and class numbers: of each text, or of each token, −100 where a
    token has none."""

    texts: Ragged
    classes: npt.NDArray[np.int32]
    of_tokens: bool = False

    @property
    def ids(self) -> npt.NDArray[np.uint32]:
        """All ids, for counting."""
        return self.texts.ids


def read_labelled(
    files: Sequence[str], *, column: str = "text", label_column: str = "label"
) -> tuple[list[str], list[str]]:
    """Texts and labels of the rows of files, see :meth:`pyrformer.Documents.rows`; labels are strings, whole
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
    bare = tokenizer.without_truncation().encode_batch(texts, add_special_tokens=False)
    frame = tokenizer.encode("").ids
    half = len(frame) - len(frame) // 2
    rows = [
        [*frame[:half], *bare.ids[a : min(b, a + seq_len - len(frame))].tolist(), *frame[half:]]
        for a, b in zip(bare.offsets[:-1].tolist(), bare.offsets[1:].tolist(), strict=True)
    ]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    ids = np.array([i for row in rows for i in row], np.uint32)
    return Labelled(Ragged(ids, offsets), np.array([number[label] for label in labels], np.int32))


def tagged(tokenizer: Tokenizer, rows: Sequence[Tagged], names: Sequence[str], seq_len: int) -> Labelled:
    """Encodes texts of words, cut to ``seq_len`` tokens; the first token of each word has the word's class.

    Raises:
        DataError: a class is not among ``names``.
    """
    number = {name: i for i, name in enumerate(names)}
    ids: list[int] = []
    classes: list[int] = []
    offsets = [0]
    for row in rows:
        strange = sorted(set(row.labels) - number.keys())
        if strange:
            raise DataError(f"[data] label {strange[0]!r} occurs in the files to measure on only")
        text, places = first_tokens(tokenizer, row, seq_len)
        here = [IGNORE] * len(text)
        for place, label in zip(places, row.labels, strict=True):
            if place is not None:
                here[place] = number[label]
        ids += text
        classes += here
        offsets.append(len(ids))
    texts = Ragged(np.array(ids, np.uint32), np.array(offsets, np.int64))
    return Labelled(texts, np.array(classes, np.int32), of_tokens=True)


class LabelledBatches:
    """Padded rows with a class each, or one of each token."""

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
        return -(-self._count // self._size)

    @property
    def _count(self) -> int:
        """How many texts there are."""
        return len(self._corpus.texts.offsets) - 1

    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row of a step."""
        return [[i] for i in self._chosen(step).tolist()]

    def _chosen(self, step: int) -> npt.NDArray[np.int64]:
        """The numbers of the texts of a step."""
        count = self._count
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
        of_tokens = self._corpus.of_tokens
        classes = np.full((b, width) if of_tokens else b, IGNORE, np.int32)
        for i, (row, n) in enumerate(zip(chosen.tolist(), lengths.tolist(), strict=True)):
            ids[i, :n] = self._corpus.texts.ids[offsets[row] : offsets[row] + n]
            mask[i, :n] = 1
            if of_tokens:
                classes[i, :n] = self._corpus.classes[offsets[row] : offsets[row] + n]
            else:
                classes[i] = self._corpus.classes[row]
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(width, dtype=np.int32), (b, width)))
        arrays = {
            "input_ids": ids,
            "position_ids": positions,
            "token_type_ids": np.zeros_like(ids),
            "segments": mask,
        }
        if of_tokens:
            arrays |= {"positions": np.arange(b * width, dtype=np.int32), "labels": classes.reshape(-1)}
            return Batch(Sizes(b, width, b * width, True), arrays, int((classes >= 0).sum()))
        arrays["sentence_labels"] = classes
        return Batch(Sizes(b, width, 0, True, sentences=True), arrays, 0, len(chosen))
