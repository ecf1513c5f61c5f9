"""Texts out of models that predict masked tokens: what fits in the place of a mask; all masks filled by repeated
prediction or by Gibbs sampling.

Letters: S samples, T tokens, N masks of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core, programs
from pyrformer.arrow import Columns
from pyrformer.errors import InputError
from pyrformer.fields import checked, whole
from pyrformer.generation.decoder import log_softmax
from pyrformer.generation.generate import filter_logits
from pyrformer.model import FillMask, Model
from pyrformer.programs import Sizes
from pyrformer.score import Row, arrays_of, batches_of, stretches, text_ids
from pyrformer.tokenizers import Tokenizer

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@checked("fill_mask")
def fill_mask(model: Model, texts: Iterable[str], top_k: int = 5) -> list[list[list[FillMask]]]:
    """The most probable tokens for each mask of each text, most probable first.

    Raises:
        InputError: the model has no masked objective or no tokenizer, a text has no mask token or is too long, or top_k
            is out of range.
    """
    tokenizer, most = model.require_tokenizer(), model.family.max_positions
    mask = tokenizer.mask_token_id
    if model.family.objective != "mlm" or mask is None:
        raise InputError("[fill_mask] this model was not trained on masked tokens; use generate instead")
    if not 1 <= top_k <= model.family.config.vocab_size:
        raise InputError(f"[fill_mask] top_k must be in 1..{model.family.config.vocab_size}, got {top_k}")
    found: list[list[list[FillMask]]] = []
    for stretch in stretches(texts):
        rows = [Row(i, text_ids(model, text), []) for i, text in enumerate(stretch)]
        for row in rows:
            row.places = [(at, k) for k, at in enumerate(np.flatnonzero(np.array(row.ids) == mask).tolist())]
            if not row.places:
                raise InputError(f"[fill_mask] text {row.text} has no {tokenizer.id_to_token(mask)} token")
            if len(row.ids) > most:
                raise InputError(
                    f"[fill_mask] text {row.text} has {len(row.ids)} tokens, more than the model's {most} positions"
                )
        part: list[list[list[FillMask]]] = [[] for _ in rows]
        for batch in batches_of(model, rows):
            sizes, arrays = arrays_of(model, batch)
            flat = [i * sizes.tokens + at for i, row in enumerate(batch) for at, _ in row.places]
            # A power of two: each number of masks is a program.
            count = 1 << (len(flat) - 1).bit_length()
            positions = np.array(flat + [0] * (count - len(flat)), np.int32)
            sizes = replace(sizes, labelled=count)
            make = partial(programs.token_logits, model.family, sizes, model.dtype)
            logits = model.program(("token_logits", sizes), make)(**arrays, positions=positions)["logits"]
            values = iter(np.exp(log_softmax(np.asarray(logits).astype(np.float64))))
            for row in batch:
                part[row.text] = [
                    _proposals(tokenizer, row.ids, at, next(values), top_k) for at, _ in row.places
                ]
        found += part
    return found


def _proposals(tokenizer: Tokenizer, ids: list[int], at: int, p: Floats, top_k: int) -> list[FillMask]:
    proposals = []
    for token in np.argsort(-p, kind="stable")[:top_k].tolist():
        sequence = tokenizer.decode([*ids[:at], token, *ids[at + 1 :]], skip_special_tokens=True)
        proposals.append(FillMask(float(p[token]), token, tokenizer.decode([token]), sequence))
    return proposals


@dataclass(frozen=True)
class Filling(Columns):
    """Texts whose masks were filled, one entry a sample (texts in order); a table for readers of Arrow.

    Attributes:
        texts: the whole text, special tokens left out; empty strings without a tokenizer.
        ids: all tokens, special ones included.
        token_logprobs: of each filled token, left to right, the model's log-probability when it was chosen, nats.
    """

    texts: list[str]
    ids: list[list[int]]
    token_logprobs: list[list[float]]

    def _columns(self) -> Iterator[tuple[str, Any]]:
        yield from (("text", self.texts), ("ids", self.ids), ("token_logprobs", self.token_logprobs))


@checked("mask_predict")
def mask_predict(
    model: Model,
    texts: str | Iterable[str | Sequence[int]],
    *,
    iterations: int = 10,
    mask_token_id: int | None = None,
) -> Filling:
    """Fills all masks of each text at once, then predicts the least certain ones again and again.

    After iteration t of T, the N·(T − t)/T least probable of the filled tokens are masked for the next one; those
    predicted again get their new probabilities. Special tokens are never filled in.
    Source: Ghazvininejad et al. 2019, "Mask-Predict: Parallel Decoding of Conditional Masked Language Models",
    section 3; the length is that of the text given.

    Args:
        texts: texts, or lists of ids, with mask tokens; a text without one stays as it is.
        iterations: T, at least 1; with 1, all tokens come from one prediction.
        mask_token_id: default: the tokenizer's.

    Raises:
        InputError: the model is not a masked one, a text is too long, or an option makes no sense.
    """
    task = _Task(model, "mask_predict", texts, iterations, mask_token_id)

    def fill(index: int, ids: Ints, places: Ints) -> tuple[Ints, Floats]:
        rows, logprobs = ids[None].copy(), np.zeros((1, len(places)))
        open_ = np.arange(len(places))
        for done in range(1, iterations + 1 if len(places) else 1):
            rows[0, places[open_]] = task.mask
            found = task.logprobs(rows, places[None, open_])[0]
            tokens = found.argmax(-1)
            rows[0, places[open_]] = tokens
            logprobs[0, open_] = found[np.arange(len(open_)), tokens]
            again = len(places) * (iterations - done) // iterations
            open_ = np.sort(np.argsort(logprobs[0], kind="stable")[:again])
            if again == 0:
                break
        return rows, logprobs

    return task.run(fill)


@checked("gibbs")
def gibbs(
    model: Model,
    texts: str | Iterable[str | Sequence[int]],
    *,
    iterations: int = 20,
    num_return_sequences: int = 1,
    seed: int = 0,
    mask_token_id: int | None = None,
    **filters: Any,
) -> Filling:
    """Draws the masked tokens of each text by Gibbs sampling.

    All begin as masks. An iteration visits each place once, in an order drawn anew: the token there is masked and drawn
    from what the model says, given all others. Special tokens are never drawn. A sample is a function of (seed, its
    number); other samples have no part in it but for rounding.
    Source: Wang & Cho 2019, "BERT has a Mouth, and It Must Speak: BERT as a Markov Random Field Language Model",
    section 3, with sweeps in the place of single draws.

    Args:
        texts: texts, or lists of ids, with mask tokens; a text without one stays as it is.
        iterations: visits to each place, at least 1.
        num_return_sequences: samples of each text.
        mask_token_id: default: the tokenizer's.
        filters: temperature, top_k, top_p and the other options of :func:`pyrformer.filter_logits`.

    Raises:
        InputError: the model is not a masked one, a text is too long, or an option makes no sense.
    """
    task = _Task(model, "gibbs", texts, iterations, mask_token_id)
    count = whole("gibbs", "num_return_sequences", num_return_sequences, 1, _core.MOST_SEQUENCES)
    filter_logits(np.zeros(2, np.float32), **filters)  # names and ranges

    def fill(index: int, ids: Ints, places: Ints) -> tuple[Ints, Floats]:
        rows, logprobs = np.repeat(ids[None], count, 0), np.zeros((count, len(places)))
        each = np.arange(count)
        for iteration in range(iterations if len(places) else 0):
            # Of each sample: numbers that order the places, then one a draw.
            uniform = np.stack(
                [
                    _core.uniform(seed, (index * count + s) << 32 | iteration, 2 * len(places))
                    for s in range(count)
                ]
            )
            order = uniform[:, : len(places)].argsort(1, kind="stable")
            for step in range(len(places)):
                number = order[:, step]
                at = places[number]
                rows[each, at] = task.mask
                found = task.logprobs(rows, at[:, None])[:, 0]
                kept = filter_logits(found, **filters).astype(np.float64).cumsum(-1)
                wanted = uniform[:, len(places) + step] * kept[:, -1]
                tokens = (kept <= wanted[:, None]).sum(-1)
                rows[each, at] = tokens
                logprobs[each, number] = found[each, tokens]
        return rows, logprobs

    return task.run(fill)


class _Task:
    """What both ways share: checked texts, and what the model says of places."""

    def __init__(self, model: Model, name: str, texts: Any, iterations: int, mask_token_id: int | None):
        self.model, self.name = model, name
        tokenizer = model.tokenizer
        mask = tokenizer.mask_token_id if mask_token_id is None and tokenizer is not None else mask_token_id
        if model.family.objective != "mlm":
            raise InputError(f"[{name}] this model was not trained on masked tokens; use generate instead")
        if mask is None:
            raise InputError(f"[{name}] a tokenizer with a mask token is needed, or mask_token_id")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise InputError(f"[{name}] iterations must be a whole number of 1 or more, got {iterations!r}")
        self.mask = mask
        self.banned = [mask]
        if tokenizer is not None:
            vocabulary = range(min(tokenizer.vocab_size, model.family.config.vocab_size))
            self.banned = sorted({mask, *(i for i in vocabulary if tokenizer.is_special(i))})
        self.texts = [
            np.array(text_ids(model, t), np.int32) for t in ([texts] if isinstance(texts, str) else texts)
        ]
        most = model.family.max_positions
        for i, ids in enumerate(self.texts):
            if not 0 < len(ids) <= most:
                raise InputError(f"[{name}] text {i} has {len(ids)} tokens; the model takes 1 to {most}")

    def logprobs(self, rows: Ints, places: Ints) -> Floats:
        """Log-probabilities ``[S, N, V]`` at ``places [S, N]`` of ``rows [S, T]``, special tokens at −∞."""
        (samples, tokens), each = rows.shape, places.shape[1]
        batch = self.model.batch(rows)
        sizes = Sizes(samples, tokens, samples * each)
        make = partial(programs.token_logits, self.model.family, sizes, self.model.dtype)
        flat = (np.arange(samples)[:, None] * tokens + places).astype(np.int32).reshape(-1)
        out = self.model.program(("token_logits", sizes), make)(**batch.arrays, positions=flat)
        logits = np.asarray(out["logits"]).reshape(samples, each, -1).astype(np.float64)
        logits[..., self.banned] = -np.inf
        return log_softmax(logits)

    def run(self, fill: Any) -> Filling:
        """Fills each text."""
        tokenizer = self.model.tokenizer
        out = Filling([], [], [])
        for index, ids in enumerate(self.texts):
            rows, logprobs = fill(index, ids, np.flatnonzero(ids == self.mask).astype(np.int32))
            for row, values in zip(rows.tolist(), logprobs.tolist(), strict=True):
                out.texts.append("" if tokenizer is None else tokenizer.decode(row, skip_special_tokens=True))
                out.ids.append(row)
                out.token_logprobs.append(values)
        return out
