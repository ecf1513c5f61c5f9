"""From text to batches: reading, cleaning, tokenizing, packing or masking.

The batch of a step is a pure function of (seed, step): the same whatever the number of threads, and any step can be
asked for at once. Letters: B rows, T tokens in a row, M labelled positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.batch import Batch
from pyrformer.errors import InputError
from pyrformer.programs import Sizes
from pyrformer.tokenizers import Ragged, Tokenizer

#: Cleaning steps by name, in the order they are applied here; see ``rust/data/src/clean.rs``.
CLEANING = ("nfc", "nfkc", "control", "whitespace")
OBJECTIVES = ("ar", "mlm")


def read_documents(
    files: Sequence[str | PathLike[str]],
    *,
    column: str = "text",
    errors: str = "strict",
    clean: Sequence[str] = (),
) -> list[str]:
    """The documents of ``.txt`` files (one each) and ``.jsonl`` files (one a line, in field ``column``).

    Args:
        errors: "strict": bytes that are no UTF-8 are an error that names their position; "replace": they become U+FFFD.
        clean: names of cleaning steps (``CLEANING``), applied in this order.

    Raises:
        DataError: a file is missing, empty, not UTF-8 or not JSON; the message names the place.
    """
    if errors not in ("strict", "replace"):
        raise InputError(f"[data] errors must be 'strict' or 'replace', got {errors!r}")
    documents, _ = _core.read_documents([Path(f) for f in files], column, errors == "replace", list(clean))
    return documents


def tokenize(
    tokenizer: Tokenizer, documents: Sequence[str], *, objective: str, threads: int | None = None
) -> Ragged:
    """The ids of documents, without the template's special tokens; for "ar", each ends with the end token if there is
    one."""
    ragged = tokenizer.encode_batch(documents, add_special_tokens=False, threads=threads)
    eos = tokenizer.eos_token_id
    if objective != "ar" or eos is None:
        return ragged
    ids = np.insert(ragged.ids, ragged.offsets[1:], np.uint32(eos))
    return Ragged(ids, ragged.offsets + np.arange(len(ragged) + 1))


@dataclass(frozen=True)
class Masking:
    """Rates of masked training. Source: Devlin et al. 2019, section 3.1.

    Attributes:
        mlm_probability: share of tokens that get a label.
        mask_rate: share of those that become [MASK].
        random_rate: share of those that become a random token; the rest stays.
        whole_word: choose words, not tokens.
    """

    mlm_probability: float = 0.15
    mask_rate: float = 0.8
    random_rate: float = 0.1
    whole_word: bool = False


class Batches:
    """Batches of a tokenized corpus: an iterable of dicts of plain numpy arrays, and random access by step.

    ``objective="ar"``: packed rows. Each dict has int32 ``input_ids``, ``labels`` (the next token, −100 where there is
    none) and ``position_ids`` ``[B, T]``; where documents are kept apart, positions restart and ``segments [B, T]``
    says which tokens may see each other.

    ``objective="mlm"``: rows [CLS] … [SEP], padded. Each dict has int32 ``input_ids``, ``attention_mask``,
    ``token_type_ids``, ``labels`` (−100 where nothing is masked) ``[B, T]``, and the labelled places once more as flat
    ``positions`` and ``masked_labels`` ``[M]``.

    Iteration runs over one pass with ``shuffle=False`` and goes on for ever otherwise.
    """

    def __init__(
        self,
        corpus: Ragged,
        objective: str,
        *,
        seq_len: int,
        batch_size: int,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        shuffle: bool = True,
        cross_documents: bool = False,
        masking: Masking | None = None,
    ):
        """
        Args:
            corpus: what :func:`tokenize` gives.
            objective: "ar" or "mlm"; "mlm" needs the tokenizer for its special tokens.
            seq_len: T, for "mlm" the most it may be.
            cross_documents: for "ar", let tokens see the document before their own in the row.

        Raises:
            DataError: the corpus is too short or a size is out of range.
            InputError: the objective is unknown.
        """
        self.objective, self.batch_size, self.shuffle = objective, batch_size, shuffle
        ids, offsets = np.ascontiguousarray(corpus.ids), np.ascontiguousarray(corpus.offsets)
        self._core: _core.CausalBatches | _core.MaskedBatches
        if objective == "ar":
            separate = not cross_documents and len(corpus) > 1
            self._core = _core.CausalBatches(ids, offsets, seq_len, batch_size, seed, shuffle, separate)
        elif objective == "mlm":
            if tokenizer is None:
                raise InputError("[data] masked batches need the tokenizer")
            m = masking or Masking()
            rates = (m.mlm_probability, m.mask_rate, m.random_rate)
            continues = tokenizer.continues_word() if m.whole_word else None
            order = (seq_len, batch_size, seed, shuffle, tokenizer.vocab_size, tokenizer.masking_ids())
            # Few distinct widths: each is a program of its own.
            width = 8 if seq_len <= 64 else 32
            self._core = _core.MaskedBatches(ids, offsets, *order, *rates, continues, width)
        else:
            raise InputError(f"[data] unknown objective {objective!r}; use one of {', '.join(OBJECTIVES)}")

    @property
    def batches_per_pass(self) -> int:
        """How many batches visit the whole corpus once."""
        return self._core.batches_per_pass

    def batch(self, step: int) -> dict[str, npt.NDArray[np.int32]]:
        """The arrays of a step, counted from 0."""
        return self._core.batch(step)[0]

    def ready(self, step: int) -> Batch:
        """The batch of a step under the names that the programs take."""
        arrays, labels = self._core.batch(step)
        b, t = arrays["input_ids"].shape
        if self.objective == "ar":
            return Batch(Sizes(b, t, 0, "segments" in arrays), arrays, labels)
        mask, masked = arrays.pop("attention_mask"), arrays.pop("masked_labels")
        padded = not mask.all()
        given: dict[str, Any] = {**arrays, "labels": masked}
        given["position_ids"] = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
        if padded:
            given["segments"] = mask
        return Batch(Sizes(b, t, len(masked), padded), given, labels)

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.int32]]]:
        step = 0
        while self.shuffle or step < self.batches_per_pass:
            yield self.batch(step)
            step += 1
