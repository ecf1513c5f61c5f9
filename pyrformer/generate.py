"""Generation: the loop between a model and the search engine.

The engine (``rust/search``) keeps the sequences and says which token each appends and which sequence it continues; this
module keeps the key-value cache. Position p of a sequence may lie in any cache row: ``rows [A, S]`` says in which, so
that beams share a prefix and a beam step copies a row of that table, never keys or values.

Letters: A active sequences, R cache rows, S cache slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core, programs
from pyrformer.compile import Compiled
from pyrformer.errors import InputError
from pyrformer.model import Model

#: Cache slots are made in multiples of this, so that calls of similar length share programs.
SLOTS = 64
# fmt: off
#: What a stored ``generation_config.json`` may say about a search; its other keys concern other libraries.
STORED = frozenset([
    "max_new_tokens", "max_length", "min_length", "min_new_tokens", "do_sample", "num_beams",
    "num_return_sequences", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "early_stopping",
    "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values", "eos_token_id",
])
# fmt: on
#: Options that mean nothing without sampling, or without beams.
SAMPLING = {"temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
BEAMS = {"length_penalty", "early_stopping"}


@dataclass(frozen=True)
class Generation:
    """What was generated, one entry per returned sequence (prompts in order, ``num_return_sequences`` each).

    Attributes:
        texts: the new text, special tokens left out; empty strings without a tokenizer.
        ids: the new tokens only, end token included.
        scores: Hugging Face's ``sequences_scores`` in beam search, None otherwise.
        token_logprobs: the model's own log-probability of each token, nats.
        finish_reasons: "stop" (end token) or "length".
    """

    texts: list[str]
    ids: list[list[int]]
    scores: list[float | None]
    token_logprobs: list[list[float]]
    finish_reasons: list[str]


def generate(model: Model, prompts: Any, config: dict[str, Any] | None = None, **options: Any) -> Generation:
    """Continues prompts.

    Args:
        prompts: a string, a list of strings, a list of ids, lists of ids, or a padded integer array ``[B, T]`` with
            ``attention_mask`` among the options (padding is dropped).
        config: options as a dict; keywords override it, and it overrides the model's ``generation_config.json``.
        options: Hugging Face's names: max_new_tokens, max_length, min_new_tokens, do_sample, num_beams,
            num_return_sequences, temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
            no_repeat_ngram_size, length_penalty, early_stopping, eos_token_id, seed, …

    A text longer than the model's positions goes on: when they are used up, the older half is dropped from view.

    Raises:
        InputError: an option is unknown or contradictory, or a prompt is empty or too long.
    """
    mask = options.pop("attention_mask", None)
    ids = _prompt_ids(model, prompts, mask)
    merged = _options(model, config, options)
    search = _core.Search(merged, ids, model.family.config.vocab_size)
    with model.decoding:
        decoder = Decoder(model, ids, search, merged)
        while decoder.step() is not None:
            pass
    results = search.finish()
    tokenizer = model.tokenizer
    texts = [
        "" if tokenizer is None else tokenizer.decode(r["ids"], skip_special_tokens=True) for r in results
    ]
    return Generation(
        texts,
        [r["ids"] for r in results],
        [r["score"] for r in results],
        [r["token_logprobs"] for r in results],
        [r["finish_reason"] for r in results],
    )


def stream(model: Model, prompt: Any, config: dict[str, Any] | None = None, **options: Any) -> Iterator[str]:
    """Continues one prompt (greedy or sampled) and gives pieces of text as they become certain, never half a character.

    Raises:
        InputError: as :func:`generate`; also for several prompts or sequences, and for beam search.
    """
    ids = _prompt_ids(model, prompt, None)
    merged = _options(model, config, options)
    if len(ids) != 1 or merged.get("num_beams", 1) != 1 or merged.get("num_return_sequences", 1) != 1:
        raise InputError(
            "[stream] only one prompt with num_beams=1 and num_return_sequences=1 can be streamed"
        )
    search = _core.Search(merged, ids, model.family.config.vocab_size)
    pieces = model.require_tokenizer().stream_decoder(skip_special_tokens=True)
    with model.decoding:
        decoder = Decoder(model, ids, search, merged)
        while (emitted := decoder.step()) is not None:
            for _, token, _ in emitted:
                piece = pieces.push(token)
                if piece:
                    yield piece
    last = pieces.finish()
    if last:
        yield last


def _options(model: Model, config: dict[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
    """All options of a call, the model's own defaults first."""
    if model.family.objective != "ar":
        raise InputError(
            "[generate] this model predicts masked tokens and does not continue text; use fill_mask"
        )
    stored = {k: v for k, v in model.generation_config.items() if k in STORED}
    eos = {"eos_token_id": model.family.config.eos_token_id}
    asked = {**(config or {}), **options}
    # A stored default that the caller's own choice makes meaningless is not the caller's mistake.
    if not asked.get("do_sample", stored.get("do_sample", False)):
        stored = {k: v for k, v in stored.items() if k not in SAMPLING}
    if asked.get("num_beams", stored.get("num_beams", 1)) == 1:
        stored = {k: v for k, v in stored.items() if k not in BEAMS}
    return {k: v for k, v in {**eos, **stored, **asked}.items() if v is not None}


def _prompt_ids(model: Model, prompts: Any, mask: npt.ArrayLike | None) -> list[list[int]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, np.ndarray):
        keep = np.ones(prompts.shape, bool) if mask is None else np.asarray(mask) != 0
        if prompts.ndim != 2 or keep.shape != prompts.shape:
            raise InputError(
                f"[generate] prompts and attention_mask must be arrays [B, T], got {list(prompts.shape)}"
            )
        return [row[k].tolist() for row, k in zip(prompts, keep, strict=True)]
    prompts = list(prompts)
    if prompts and all(isinstance(p, (int, np.integer)) for p in prompts):
        return [[int(p) for p in prompts]]
    ids = []
    for i, prompt in enumerate(prompts):
        found = (
            model.require_tokenizer().encode(prompt).ids
            if isinstance(prompt, str)
            else [int(t) for t in prompt]
        )
        if not found and model.family.config.bos_token_id is not None:
            found = [model.family.config.bos_token_id]
        if not found:
            raise InputError(f"[generate] prompt {i} is empty; give at least one token to continue")
        ids.append(found)
    if not ids:
        raise InputError("[generate] there is no prompt")
    return ids


class Decoder:
    """Runs the model for a search, one step at a time."""

    def __init__(self, model: Model, prompts: list[list[int]], search: _core.Search, options: dict[str, Any]):
        longest, limit = max(map(len, prompts)), model.family.max_positions
        if longest > limit:
            raise InputError(
                f"[generate] a prompt of {longest} tokens is more than the model's {limit} positions"
            )
        wanted = options.get("max_new_tokens") or max(options.get("max_length", longest + 20) - longest, 1)
        self.model, self.search = model, search
        #: Prompt and new tokens of each active sequence.
        self.texts = [list(p) for p in prompts]
        self.slots = min(-(-(longest + wanted) // SLOTS) * SLOTS, limit)
        self.cache_rows = len(prompts) * max(
            options.get("num_beams", 1), options.get("num_return_sequences", 1)
        )
        #: How many positions of each sequence are in the cache, and in which row each is.
        self.lengths = np.zeros(len(prompts), np.int32)
        self.rows = np.zeros((len(prompts), self.slots), np.int32)

    def step(self) -> list[tuple[int, int, float]] | None:
        """One forward pass and one decision of the search; gives what became certain, None at the end."""
        wanted = self.search.step()
        if wanted is None:
            return None
        index, tokens, parents, sequences = wanted
        feeds = self.texts
        if index > 0:
            self.texts = [[*self.texts[p], t] for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
            self.rows, self.lengths = self.rows[parents], self.lengths[parents]
            feeds = [text[-1:] for text in self.texts]
        # Where the positions are used up, the newer half of the text is read again from position 0.
        for i in np.flatnonzero(self.lengths + [len(f) for f in feeds] > self.slots):
            feeds[i] = self.texts[i][-(self.slots // 2) :]
            self.lengths[i] = 0
        self.search.advance(self._feed(feeds, sequences))
        return self.search.emitted()

    def _feed(self, feeds: list[list[int]], sequences: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Puts tokens into the cache; gives the logits ``[A, V]`` after each sequence's last one."""
        active, counts = len(feeds), np.array([len(f) for f in feeds], np.int32)
        batch, width = _bucket(active), _bucket(int(counts.max()))
        ids, positions = np.zeros((2, batch, width), np.int32)
        row, start, count, last = np.zeros((4, batch), np.int32)
        rows = np.zeros((batch, self.slots), np.int32)
        for i, feed in enumerate(feeds):
            n, at = len(feed), int(self.lengths[i])
            ids[i, :n] = feed
            positions[i, :n] = np.arange(at, at + n) + self.model.family.position_offset
            # A sequence writes to the cache row of its own number: no other one ever needs that row at this position.
            self.rows[i, at : at + n] = sequences[i]
        row[:active], start[:active], count[:active], rows[:active] = (
            sequences,
            self.lengths,
            counts,
            self.rows,
        )
        last[:active] = np.arange(active) * width + counts - 1
        self.lengths = self.lengths + counts
        inputs = {"input_ids": ids, "position_ids": positions, "rows": rows, "row": row}
        out = self._program(batch, width)(**inputs, start=start, count=count, last=last)
        return np.ascontiguousarray(out["logits"][:active], dtype=np.float32)

    def _program(self, batch: int, width: int) -> Compiled:
        shape = (self.cache_rows, self.slots)
        self.model.use_cache(shape)
        make = partial(
            programs.decode_step, self.model.family, batch, width, shape, "cache", self.model.dtype
        )
        return self.model.program(("decode", batch, width, shape), make)


def _bucket(n: int) -> int:
    """The next power of two, so that few programs serve all sizes."""
    return 1 << (n - 1).bit_length()


def filter_logits(logits: npt.ArrayLike, **options: Any) -> npt.NDArray[np.float32]:
    """The distribution that sampling draws from: ``logits [.., V]`` filtered and renormalised, float32 ``[.., V]``.

    Args:
        options: temperature, top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, min_tokens_to_keep;
            they apply in this order.

    Raises:
        InputError: an option is unknown or out of range, or a row has NaN or no finite logit.
    """
    array = np.ascontiguousarray(logits, dtype=np.float32)
    if array.ndim == 0 or array.size == 0:
        raise InputError(f"[filter_logits] logits must be a non-empty array [.., V], got {list(array.shape)}")
    return _core.filter_logits(array.reshape(-1, array.shape[-1]), options).reshape(array.shape)
