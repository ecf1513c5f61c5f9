"""Sentences of paragraphs, for pairs of texts: what :class:`pyrformer.Batches` makes BERT's pre-training of.

Source: Devlin et al. 2019, section 3.1 and appendix A.2. A document is a paragraph (texts are cut at empty lines), its
sentences end at line ends and after ``.``, ``!`` or ``?``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyrformer.tokenizers import Ragged, Tokenizer

_PARAGRAPH, _SENTENCE = re.compile(r"\n\s*\n"), re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


@dataclass(frozen=True)
class Sentences:
    """The ids of sentences, and the number of the first sentence of each document, then of all: int64[D+1]."""

    texts: Ragged
    documents: npt.NDArray[np.int64]


def sentences(tokenizer: Tokenizer, texts: Sequence[str], threads: int | None = None) -> Sentences:
    """Cuts texts into documents and sentences and encodes these without special tokens; empty ones are left out."""
    cut = [_SENTENCE.split(p) for text in texts for p in _PARAGRAPH.split(text)]
    flat = [sentence for document in cut for sentence in document]
    ragged = tokenizer.without_truncation().encode_batch(flat, add_special_tokens=False, threads=threads)
    lengths = np.diff(ragged.offsets)
    # How many sentences that hold tokens stand before each document.
    before = np.concatenate([[0], np.cumsum(lengths > 0)])
    bounds = np.unique(before[np.cumsum([0, *map(len, cut)])])
    offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64)
    return Sentences(Ragged(ragged.ids, offsets), bounds.astype(np.int64))
