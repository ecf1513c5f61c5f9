"""Pairs of texts for BERT's pre-training: masked tokens, and whether the second text follows the first.

Source: Devlin et al. 2019, section 3.1 and appendix A.2. A document is a paragraph (texts are cut at empty lines), its
sentences end at line ends and after ``.``, ``!`` or ``?``. Sentences that follow each other and fill a row are cut in
two at a random place; in half of the rows the second part is replaced by sentences from a random place of another
document.

As everywhere, the batch of a step is a pure function of (seed, step). Letters: B rows, T tokens, M labelled positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyrformer.batch import IGNORE, Batch
from pyrformer.data import Masking
from pyrformer.errors import DataError, InputError
from pyrformer.programs import Sizes
from pyrformer.supervised import ORDER, draws_of
from pyrformer.tokenizers import Ragged, Tokenizer

#: The purpose of the random draws of pairs and their masks.
PAIRS = 13
_PARAGRAPH, _SENTENCE = re.compile(r"\n\s*\n"), re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sentences:
    """The ids of sentences, and the number of the first sentence of each document, then of all: int64[D+1]."""

    texts: Ragged
    documents: npt.NDArray[np.int64]


def sentences(tokenizer: Tokenizer, texts: Sequence[str], threads: int | None = None) -> Sentences:
    """Cuts texts into documents and sentences and encodes these without special tokens; empty ones are left out."""
    cut = [_SENTENCE.split(p) for text in texts for p in _PARAGRAPH.split(text)]
    flat = [sentence for document in cut for sentence in document]
    ragged = tokenizer.encode_batch(flat, add_special_tokens=False, threads=threads)
    lengths = np.diff(ragged.offsets)
    # How many sentences that hold tokens stand before each document.
    before = np.concatenate([[0], np.cumsum(lengths > 0)])
    bounds = np.unique(before[np.cumsum([0, *map(len, cut)])])
    offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64)
    return Sentences(Ragged(ragged.ids, offsets), bounds.astype(np.int64))


class PairBatches:
    """Rows ``[CLS] A [SEP] B [SEP]`` with masked tokens; token types are 0 up to the first [SEP], then 1."""

    def __init__(
        self,
        corpus: Sentences,
        *,
        seq_len: int,
        batch_size: int,
        tokenizer: Tokenizer,
        masking: Masking,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """
        Raises:
            InputError: the masking is by spans, which pairs do not have.
            DataError: there is no place with two sentences, or no other place to take a second text from.
            TokenizerError: the tokenizer lacks [CLS], [SEP], [PAD] or [MASK].
        """
        if masking.span_p:
            raise InputError("[data] span_p is for objective 'mlm'; rows of two texts mask tokens or words")
        self._ids, self._offsets = corpus.texts.ids, corpus.texts.offsets
        self._bounds, self._room = corpus.documents, seq_len - 3
        self._cls, self._sep, self._pad, self._mask = tokenizer.masking_ids()
        self._continues = np.array(tokenizer.continues_word()) if masking.whole_word else None
        self._vocab, self._masking, self._seq_len = tokenizer.vocab_size, masking, seq_len
        self._size, self._seed, self._shuffle = batch_size, seed, shuffle
        if self._room < 2:
            raise DataError(f"[data] rows of two texts need 5 tokens or more, got seq_len {seq_len}")
        #: First sentence, end, document.
        self._chunks = [(*c, d) for d in range(len(self._bounds) - 1) for c in self._cut(d)]
        if not self._chunks or all(self._others(*chunk)[1] == 0 for chunk in self._chunks):
            raise DataError(
                "[data] pairs of sentences need two paragraphs or more, one of them with two sentences; "
                "give more text, or files to measure on with --valid"
            )

    def _cut(self, document: int) -> list[tuple[int, int]]:
        """Runs of at least two sentences of a document, as many as fit into a row."""
        at, end = self._bounds[document : document + 2].tolist()
        first, found = at, []
        while at < end:
            stop = int(np.searchsorted(self._offsets, self._offsets[at] + self._room, "right")) - 1
            stop = min(max(stop, at + 2), end)
            if stop - at == 1:
                # The last sentence alone: the one before it is used twice.
                at -= 1
            if at >= first:
                found.append((at, stop))
            at = stop
        return found

    def _others(self, first: int, end: int, document: int) -> tuple[tuple[int, int], int]:
        """The sentences that a random second text does not begin with, and how many are left: it begins outside the
        document, or, where there is only one, outside the run."""
        total = int(self._bounds[-1])
        around = (
            tuple(self._bounds[document : document + 2].tolist()) if len(self._bounds) > 2 else (first, end)
        )
        return (around[0], around[1]), total - (around[1] - around[0])

    @property
    def batches_per_pass(self) -> int:
        """How many batches visit all text once."""
        return -(-len(self._chunks) // self._size)

    def _tokens(self, first: int, end: int) -> npt.NDArray[np.uint32]:
        return self._ids[self._offsets[first] : self._offsets[end]]

    def _pair(
        self, chunk: tuple[int, int, int], draws: np.random.Generator
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], int]:
        """Both texts, and 0 where the second follows the first, 1 where it does not."""
        first, end, _ = chunk
        middle = int(draws.integers(first + 1, end))
        a, b, label = self._tokens(first, middle), self._tokens(middle, end), 0
        (hole, after), count = self._others(*chunk)
        if draws.random() < 0.5 and count:
            at = int(draws.integers(count))
            at += after - hole if at >= hole else 0
            last = int(self._bounds[np.searchsorted(self._bounds, at, "right")])
            b, label = self._tokens(at, last)[: max(1, self._room - len(a))], 1
        return *self._fitted(a, b, draws), label

    def _fitted(
        self, a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32], draws: np.random.Generator
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """Shortens the longer one until both fit, each token taken from the front or the back at random."""
        over = len(a) + len(b) - self._room
        if over <= 0:
            return a, b
        half = self._room // 2
        keep_a = len(a) if len(a) <= half else max(self._room - len(b), self._room - half)
        kept = []
        for text, keep in ((a, keep_a), (b, self._room - keep_a)):
            front = int(draws.binomial(len(text) - keep, 0.5))
            kept.append(text[front : front + keep])
        return kept[0], kept[1]

    def documents(self, step: int) -> list[list[int]]:
        """The number of the paragraph that each row of a step begins in; sentences of others may follow."""
        return [[self._chunks[i][2]] for i in self._chosen(step)]

    def _chosen(self, step: int) -> list[int]:
        """The runs of sentences of a step."""
        epoch, at = divmod(step, self.batches_per_pass)
        count = len(self._chunks)
        order = draws_of(self._seed, ORDER, epoch).permutation(count) if self._shuffle else np.arange(count)
        chosen: list[int] = order[at * self._size : (at + 1) * self._size].tolist()
        return chosen

    def ready(self, step: int) -> Batch:
        """The batch of a step under the names that the programs take; ``sentence_labels`` are Hugging Face's: 0 where
        the second text follows, 1 where it is random."""
        draws = draws_of(self._seed, PAIRS, step)
        pairs = [self._pair(self._chunks[i], draws) for i in self._chosen(step)]
        longest = max(len(a) + len(b) + 3 for a, b, _ in pairs)
        # Few distinct widths: each is a program of its own.
        width = min(-(-longest // 32) * 32, self._seq_len)
        shape = (self._size, width)
        ids = np.full(shape, self._pad, np.int32)
        types, real = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        labels = np.full(self._size, IGNORE, np.int32)
        for i, (a, b, label) in enumerate(pairs):
            n = len(a) + len(b) + 3
            ids[i, :n] = [self._cls, *a.tolist(), self._sep, *b.tolist(), self._sep]
            types[i, len(a) + 2 : n], real[i, :n], labels[i] = 1, 1, label
        ids, positions, masked, sought = self._masked(ids, draws)
        arrays = {
            "input_ids": ids,
            "token_type_ids": types,
            "position_ids": np.ascontiguousarray(np.broadcast_to(np.arange(width, dtype=np.int32), shape)),
            "segments": real,
            "positions": positions,
            "labels": masked,
            "sentence_labels": labels,
        }
        sizes = Sizes(*shape, len(positions), segments=True, sentences=True)
        return Batch(sizes, arrays, sought, len(pairs))

    def _masked(self, ids: Ints, draws: np.random.Generator) -> tuple[Ints, Ints, Ints, int]:
        """The ids after masking, the flat places of labels, the labels, both padded to a multiple of 32, and their
        number."""
        m = self._masking
        special = np.isin(ids, (self._cls, self._sep, self._pad, self._mask))
        chosen = draws.random(ids.shape) < m.mlm_probability
        if self._continues is not None:
            # A token that continues a word shares the draw of the word's first token.
            begins = ~self._continues[ids] | special | np.roll(special, 1, axis=1)
            begins[:, 0] = True
            place = np.maximum.accumulate(np.where(begins, np.arange(ids.shape[1]), 0), axis=1)
            chosen = np.take_along_axis(chosen, place, axis=1)
        chosen &= ~special
        what, other = draws.random(ids.shape), draws.integers(self._vocab, size=ids.shape)
        new = np.where(chosen & (what < m.mask_replace_prob), self._mask, ids)
        swapped = (
            chosen & (what >= m.mask_replace_prob) & (what < m.mask_replace_prob + m.random_replace_prob)
        )
        new = np.where(swapped, other, new).astype(np.int32)
        places = np.flatnonzero(chosen).astype(np.int32)
        pad = (0, max(32, -(-len(places) // 32) * 32) - len(places))
        labels = np.pad(ids.reshape(-1)[places], pad, constant_values=IGNORE)
        return new, np.pad(places, pad), labels, len(places)
