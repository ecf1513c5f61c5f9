"""Batches of a tokenized corpus, for all that is learned from plain text.

The batch of a step is a pure function of (seed, step), and what is drawn for a row one of (seed, epoch, its place in
the corpus, position): the same whatever the number of threads and the size of the batch, and any step can be asked for
at once. Letters: B rows, T tokens in a row, M labelled positions, P targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.batch import Batch
from pyrformer.data.pairs import Sentences
from pyrformer.errors import InputError
from pyrformer.fields import MOST, check_types, checked
from pyrformer.programs import Sizes
from pyrformer.tokenizers import Ragged, Tokenizer

OBJECTIVES = ("ar", "prefix", "mlm", "mlm+nsp", "plm")

Arrays = dict[str, npt.NDArray[Any]]


def as_corpus(corpus: Ragged | _core.Corpus) -> _core.Corpus:
    """Encoded documents as batches take them; a :class:`Ragged` is copied."""
    if isinstance(corpus, Ragged):
        return _core.Corpus(np.ascontiguousarray(corpus.ids), np.ascontiguousarray(corpus.offsets))
    return corpus


@dataclass(frozen=True)
class Masking:
    """Rates of masked training. Sources: Devlin et al. 2019, section 3.1; spans: Joshi et al. 2020, section 3.1.

    Attributes:
        mlm_probability: share of tokens (or words) that get a label.
        mask_replace_prob: share of those that become [MASK].
        random_replace_prob: share of those that become a random token; the rest stays.
        whole_word: choose words, not tokens.
        span_p: above 0, choose runs of neighbouring words (tokens without ``whole_word``), of length k with a chance
            proportional to ``span_p * (1 - span_p) ** (k - 1)``; SpanBERT: 0.2. The tokens of a run share one fate.
        span_max_length: the greatest length of a run, at most 255.
    """

    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    whole_word: bool = False
    span_p: float = 0.0
    span_max_length: int = 10


class Batches:
    """Batches of a tokenized corpus: an iterable of dicts of plain numpy arrays, and random access by step.

    Integers are int32. By ``objective``:

    - "ar": packed rows. ``input_ids``, ``labels`` (the next token, −100 where there is none) and ``position_ids``
      ``[B, T]``; where documents are kept apart, positions restart and ``segments [B, T]`` says which tokens may see
      each other.
    - "prefix": the same, and ``prefix [B]``: so many tokens of each row see each other, and what follows is predicted.
    - "mlm": rows [CLS] … [SEP], padded. ``input_ids``, ``attention_mask``, ``token_type_ids``, ``labels`` (−100 where
      nothing is masked) ``[B, T]``, and the labelled places once more, flat: ``positions``, ``masked_labels`` ``[M]``.
    - "mlm+nsp": rows [CLS] … [SEP] … [SEP]. The arrays of "mlm", and ``next_sentence_label [B]``: 0 where the second
      text follows the first, 1 where it is random, −100 in a missing row. The corpus is one of
      :func:`pyrformer.data.pairs.sentences`.
    - "plm": packed rows. ``input_ids [B, T]``; as float32 ``perm_mask [B, T, T]``, 1 where the first token does not see
      the second, and ``target_mapping [B, P, T]``, one-hot at the token to predict or zero; ``labels [B, P]``.

    Training visits all text in each pass; the first pass is shuffled in windows that follow the text, one of 2^18
    tokens and then each as long as all before it, later ones as a whole.

    Iteration runs over one pass with ``shuffle=False`` and goes on for ever otherwise. Any step can be had at once:
    ``batch(step)``, or ``iterate(step)`` to go on from it.

    With ``world_size`` processes, each sees every ``world_size``-th batch, so that together they see what a single one
    would: step s of rank r is batch ``s * world_size + r``.
    """

    @checked("data")
    def __init__(
        self,
        corpus: Ragged | _core.Corpus | Sentences,
        objective: str,
        *,
        seq_len: int,
        batch_size: int,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        shuffle: bool = True,
        cross_documents: bool = False,
        masking: Masking | None = None,
        plm_probability: float = 1 / 6,
        max_span_length: int = 5,
        rank: int = 0,
        world_size: int = 1,
    ):
        """
        Args:
            corpus: what :func:`pyrformer.data.documents.tokenize` gives, or ``corpus`` of :class:`pyrformer.Prepared`.
            objective: see the class; masked ones need the tokenizer for its special tokens.
            seq_len: T, for masked objectives the most it may be.
            cross_documents: for "ar" and "prefix", let tokens see the document before their own in the row.
            masking: rates of the masked objectives.
            plm_probability, max_span_length: for "plm", the share of tokens to predict and the greatest length of a run
                of them (Yang et al. 2019, section 2.3; drawn as transformers'
                ``DataCollatorForPermutationLanguageModeling`` does).
            rank, world_size: which process this is, of how many.

        Raises:
            DataError: the corpus is too short or a size is out of range.
            InputError: the objective is unknown, the corpus is not one for it, or the rank is not below ``world_size``.
            TokenizerError: the tokenizer lacks [CLS], [SEP], [PAD] or [MASK].
        """
        if not 0 <= rank < world_size:
            raise InputError(f"[data] rank must be from 0 to world_size - 1 ({world_size - 1}), got {rank}")
        if objective not in OBJECTIVES:
            raise InputError(f"[data] unknown objective {objective!r}; use one of {', '.join(OBJECTIVES)}")
        if isinstance(corpus, Sentences) != (objective == "mlm+nsp"):
            raise InputError(
                "[data] objective 'mlm+nsp' is for what pyrformer.data.pairs.sentences gives, and that for it"
            )
        self.rank, self.world_size = rank, world_size
        self.objective, self.batch_size, self.shuffle = objective, batch_size, shuffle
        self._core: _core.CausalBatches | _core.MaskedBatches | _core.PairBatches | _core.PermutedBatches
        texts = as_corpus(corpus.texts if isinstance(corpus, Sentences) else corpus)
        order = (seq_len, batch_size, seed, shuffle)
        if objective == "plm":
            self._core = _core.PermutedBatches(texts, *order, plm_probability, max_span_length)
        elif objective in ("ar", "prefix"):
            separate = not cross_documents and texts.documents > 1
            self._core = _core.CausalBatches(texts, *order, separate, objective == "prefix")
        else:
            if tokenizer is None:
                raise InputError("[data] masked batches need the tokenizer")
            options = _masked(tokenizer, masking or Masking(), *order)
            if isinstance(corpus, Sentences):
                self._core = _core.PairBatches(texts, np.ascontiguousarray(corpus.documents), options)
            else:
                self._core = _core.MaskedBatches(texts, options)

    @property
    def batches_per_pass(self) -> int:
        """How many batches of this rank visit its share of the corpus once."""
        return -(-(self._core.batches_per_pass - self.rank) // self.world_size)

    @property
    def settled_steps(self) -> int:
        """How many of the first steps would be the same for any longer corpus that begins with this one: training may
        begin before all text is tokenized. Evaluations need all of it: 0."""
        return max(0, -(-(self._core.settled_steps - self.rank) // self.world_size))

    def _place(self, step: int) -> int:
        place = step * self.world_size + self.rank
        if place > MOST:
            raise InputError(f"[data] there is no batch {place}; give a step below 2^63")
        return place

    @checked("data")
    def batch(self, step: int) -> Arrays:
        """The arrays of a step, counted from 0."""
        arrays: Arrays = dict(self._core.batch(self._place(step))[0])
        if self.objective == "plm":
            targets, t = arrays.pop("targets"), arrays["input_ids"].shape[1]
            arrays["perm_mask"] = arrays["perm_mask"].astype(np.float32)
            arrays["target_mapping"] = (targets[:, :, None] == np.arange(t)).astype(np.float32)
        return arrays

    @checked("data")
    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row of a step."""
        return self._core.documents(self._place(step))

    @checked("data")
    def ready(self, step: int) -> Batch:
        """The batch of a step under the names that the programs take."""
        found, labels = self._core.batch(self._place(step))
        arrays: Arrays = dict(found)
        b, t = arrays["input_ids"].shape
        if self.objective in ("ar", "prefix"):
            return Batch(Sizes(b, t, 0, "segments" in arrays, prefix="prefix" in arrays), arrays, labels)
        arrays["position_ids"] = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
        if self.objective == "plm":
            p = arrays["targets"].shape[1]
            arrays |= {"hidden": arrays.pop("perm_mask"), "labels": arrays["labels"].reshape(-1)}
            arrays["positions"] = np.arange(b * p, dtype=np.int32)
            arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
            return Batch(Sizes(b, t, b * p, targets=p, hidden=True), arrays, labels)
        mask, arrays["labels"] = arrays.pop("attention_mask"), arrays.pop("masked_labels")
        m = len(arrays["labels"])
        if self.objective == "mlm+nsp":
            arrays |= {"segments": mask, "sentence_labels": arrays.pop("next_sentence_label")}
            rows = int((arrays["sentence_labels"] >= 0).sum())
            return Batch(Sizes(b, t, m, segments=True, sentences=True), arrays, labels, rows)
        padded = not mask.all()
        if padded:
            arrays["segments"] = mask
        return Batch(Sizes(b, t, m, padded), arrays, labels)

    def __iter__(self) -> Iterator[Arrays]:
        return self.iterate()

    def iterate(self, step: int = 0) -> Iterator[Arrays]:
        """The batches from ``step`` on; the ones before it are not made."""
        while self.shuffle or step < self.batches_per_pass:
            yield self.batch(step)
            step += 1


def _masked(
    tokenizer: Tokenizer, masking: Masking, seq_len: int, batch_size: int, seed: int, shuffle: bool
) -> dict[str, Any]:
    """The options of masked rows as the core takes them."""
    m = masking
    check_types(m, "data")
    if m.span_max_length < 0:
        raise InputError(f"[data] span_max_length must not be negative, got {m.span_max_length}")
    return {
        "max_length": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
        "vocab_size": tokenizer.vocab_size,
        "special": tokenizer.masking_ids(),
        "rates": (m.mlm_probability, m.mask_replace_prob, m.random_replace_prob),
        "words": tokenizer.core if m.whole_word else None,
        "spans": (m.span_p, m.span_max_length) if m.span_p else None,
        # Few distinct widths: each is a program of its own.
        "pad_to_multiple_of": 8 if seq_len <= 64 else 32,
    }
