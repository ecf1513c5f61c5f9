"""Generation: the loop between a model and the search engine.

The engine (``rust/search``) keeps the sequences and says which token each appends and which sequence it continues; this
module keeps the key-value cache. Position p of a sequence may lie in any cache row: ``rows [A, S]`` says in which, so
that beams share a prefix and a beam step copies a row of that table, never keys or values.

Letters: A active sequences, R cache rows, S cache slots, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core, programs
from pyrformer.compile import Compiled
from pyrformer.errors import InputError
from pyrformer.generation_config import STORED, GenerationConfig
from pyrformer.model import Model

#: Cache slots are made in multiples of this, so that calls of similar length share programs.
SLOTS = 64
#: Options that mean nothing without sampling, or without beams.
SAMPLING = {"temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
BEAMS = {
    "length_penalty",
    "early_stopping",
    "num_beam_groups",
    "diversity_penalty",
    "patience",
    "stochastic_beams",
    "force_words_ids",
}


@dataclass(frozen=True)
class Generation:
    """What was generated, one entry per returned sequence (prompts in order, ``num_return_sequences`` each).

    Attributes:
        texts: the new text, special tokens left out; empty strings without a tokenizer.
        ids: the new tokens only, end token included.
        scores: Hugging Face's ``sequences_scores`` in beam search, None otherwise.
        token_logprobs: the model's own log-probability of each token, nats.
        finish_reasons: "stop" (end token, stop string, stopping criterion) or "length" (or the time ran out).
    """

    texts: list[str]
    ids: list[list[int]]
    scores: list[float | None]
    token_logprobs: list[list[float]]
    finish_reasons: list[str]


def generate(
    model: Model, prompts: Any, config: GenerationConfig | dict[str, Any] | None = None, **options: Any
) -> Generation:
    """Continues prompts.

    Args:
        prompts: a string, a list of strings, a list of ids, lists of ids, or a padded integer array ``[B, T]`` with
            ``attention_mask`` among the options (padding counts in min_length and max_length, nowhere else).
        config: options; keywords override it, and it overrides the model's ``generation_config.json``.
        options: Hugging Face's names: max_new_tokens, max_length, min_new_tokens, do_sample, num_beams,
            num_beam_groups, diversity_penalty, force_words_ids, num_return_sequences, temperature, top_k, top_p,
            min_p, typical_p, repetition_penalty, no_repeat_ngram_size, length_penalty, early_stopping, eos_token_id,
            stop_strings, max_time (seconds), …; besides presence_penalty, frequency_penalty, patience,
            stochastic_beams and seed. And functions of one call:
            ``prefix_allowed_tokens_fn(prompt, ids) -> token ids`` that may follow;
            ``logits_processor(ids, scores [V]) -> scores [V]``, after all processors, before temperature and filters;
            ``stopping_criteria(ids) -> bool``, whether the sequence ends here (not with beams).
            ``first_sequence`` numbers the first sequence in the coordinates of draws: with 3, the one sequence that is
            drawn is the fourth of a call that draws many with this seed.

    A text longer than the model's positions goes on: when they are used up, the older half is dropped from view.

    Raises:
        InputError: an option is unknown or contradictory, a prompt is empty or too long, or a function failed.
    """
    call = _Call(model, prompts, config, options)
    with model.decoding:
        for _ in call.run():
            pass
    results = call.search.finish()
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


def stream(
    model: Model, prompt: Any, config: GenerationConfig | dict[str, Any] | None = None, **options: Any
) -> Iterator[str]:
    """Continues one prompt (greedy or sampled) and gives pieces of text as they become certain, never half a character.

    Raises:
        InputError: as :func:`generate`; also for several prompts or sequences, and for beam search.
    """
    model.require_tokenizer()
    call = _Call(model, prompt, config, options)
    if (
        call.prompts != 1
        or call.options.get("num_beams", 1) != 1
        or call.options.get("num_return_sequences", 1) != 1
    ):
        raise InputError(
            "[stream] only one prompt with num_beams=1 and num_return_sequences=1 can be streamed"
        )
    pieces = model.require_tokenizer().stream_decoder(skip_special_tokens=True)
    with model.decoding:
        for emitted in call.run():
            for _, token, _ in emitted:
                piece = pieces.push(token)
                if piece:
                    yield piece
    last = pieces.finish()
    if last:
        yield last


async def astream(
    model: Model, prompt: Any, config: GenerationConfig | dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[str]:
    """:func:`stream` for ``async for``: each step runs in a thread, so the event loop goes on."""
    import asyncio  # slow to import, and few need it

    pieces = stream(model, prompt, config, **options)
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


class _Call:
    """One generation: its options, its search, and when it stops."""

    def __init__(self, model: Model, prompts: Any, config: Any, given: dict[str, Any]):
        given = dict(given)
        mask, first = given.pop("attention_mask", None), given.pop("first_sequence", None)
        allowed, processor = given.pop("prefix_allowed_tokens_fn", None), given.pop("logits_processor", None)
        self.criterion = given.pop("stopping_criteria", None)
        stored = config.options if isinstance(config, GenerationConfig) else config
        self.options = _options(model, stored, given)
        self.stop_strings, self.max_time = _stops(self.options)
        if self.options.get("num_beams", 1) != 1 and (self.stop_strings or self.criterion):
            name = "stop_strings" if self.stop_strings else "stopping_criteria"
            raise InputError(f"[generate] {name} needs num_beams=1; leave one of them out")
        ids, padding = _prompt_ids(model, prompts, mask)
        number = self.options.get("num_return_sequences", 1)
        firsts = [None if first is None else first + i * number for i in range(len(ids))]
        self.prompts, self.model, self.started = len(ids), model, time.monotonic()
        places = list(zip(ids, padding, firsts, strict=True))
        self.search = _core.Search(self.options, places, model.family.config.vocab_size, allowed, processor)
        self.decoder = Decoder(model, ids, self.search, self.options)
        #: Per sequence: what decodes it, and its latest text.
        self.texts: dict[int, tuple[Any, str]] = {}
        self.ids = [list(p) for p in ids for _ in range(number)]

    def run(self) -> Iterator[list[tuple[int, int, float]]]:
        """Steps until the search or the time is over; gives the tokens that each made certain."""
        while (emitted := self.decoder.step()) is not None:
            for sequence, token, _ in emitted:
                if self._ends(sequence, token):
                    self.search.stop(sequence)
            yield emitted
            if self.max_time is not None and time.monotonic() - self.started >= self.max_time:
                return

    def _ends(self, sequence: int, token: int) -> bool:
        if self.criterion is not None:
            self.ids[sequence].append(token)
            if self.criterion(list(self.ids[sequence])):
                return True
        if not self.stop_strings:
            return False
        if sequence not in self.texts:
            self.texts[sequence] = (
                self.model.require_tokenizer().stream_decoder(skip_special_tokens=True),
                "",
            )
        decoder, text = self.texts[sequence]
        piece = decoder.push(token)
        text += piece
        # A stop string that ends in this piece begins at most its own length before it.
        found = any(stop in text[-(len(piece) + len(stop)) :] for stop in self.stop_strings)
        self.texts[sequence] = (decoder, text[-max(map(len, self.stop_strings)) :])
        return bool(piece) and found


def _stops(options: dict[str, Any]) -> tuple[list[str], float | None]:
    """Takes out what the search does not know: stop strings, and the time in seconds."""
    stops, seconds = options.pop("stop_strings", []), options.pop("max_time", None)
    stops = [stops] if isinstance(stops, str) else list(stops)
    if not all(isinstance(s, str) and s for s in stops):
        raise InputError(f"[generate] stop_strings must be non-empty strings, got {stops!r}")
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise InputError(f"[generate] max_time must be a number of seconds above 0, got {seconds!r}")
    return stops, seconds


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


def _prompt_ids(model: Model, prompts: Any, mask: npt.ArrayLike | None) -> tuple[list[list[int]], list[int]]:
    """The ids of each prompt, and how many padding tokens stood among them."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, np.ndarray):
        keep = np.ones(prompts.shape, bool) if mask is None else np.asarray(mask) != 0
        if prompts.ndim != 2 or keep.shape != prompts.shape:
            raise InputError(
                f"[generate] prompts and attention_mask must be arrays [B, T], got {list(prompts.shape)}"
            )
        ids = [row[k].tolist() for row, k in zip(prompts, keep, strict=True)]
        return ids, (~keep).sum(1).tolist()
    prompts = list(prompts)
    if prompts and all(isinstance(p, (int, np.integer)) for p in prompts):
        return [[int(p) for p in prompts]], [0]
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
    return ids, [0] * len(ids)


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
