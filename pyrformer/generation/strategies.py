"""How a search and a model take turns.

The engine (``rust/search``) keeps the sequences and says which token each appends and which sequence it continues;
:class:`.Decoder` keeps the cache. A strategy here stands between the two: its ``step`` gives the
tokens that became certain as (sequence, token, log-probability), None at the end.

Letters: A active sequences, K candidates, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.errors import InputError
from pyrformer.generation.decoder import (
    BEST,
    Decoder,
    Floats,
    Following,
    Ints,
    Positions,
    Rereader,
    log_softmax,
)
from pyrformer.model import Model

Emitted = list[tuple[int, int, float]]
#: Sees each pass of the model: the search, the step that it wants, and the logits [A, V].
Watch = Callable[[_core.Search, tuple[int, Ints, Ints, Ints], Floats], None]


class Strategy(Protocol):
    """What a call of generate drives."""

    def step(self) -> Emitted | None: ...


class Sequences:
    """The active sequences of a search whose steps all append one token: greedy search, sampling, beams.

    Attributes:
        wanted: the step of the search under way.
    """

    def __init__(self, search: _core.Search, positions: Positions):
        self.search, self.positions = search, positions
        self.wanted: tuple[int, Ints, Ints, Ints] | None = None

    def feeds(self) -> tuple[list[list[int]], Ints] | None:
        """What the active sequences read next, and their numbers int32[A]; None at the end."""
        self.wanted = self.search.step()
        if self.wanted is None:
            return None
        index, tokens, parents, sequences = self.wanted
        positions = self.positions
        if index > 0:
            positions.follow(parents)
        feeds = self.search.texts() if index == 0 else [[token] for token in tokens.tolist()]
        # Where the positions are used up, the newer half of the text is read again from position 0.
        full = np.flatnonzero(positions.lengths + [len(f) for f in feeds] > positions.slots)
        texts = self.search.texts() if len(full) else []
        for i in full:
            feeds[i] = texts[i][-(positions.slots // 2) :]
            positions.lengths[i] = 0
        return feeds, sequences

    def take(self, following: Following) -> Emitted:
        """Goes on with what follows the feeds; gives what became certain."""
        following.advance(self.search)
        return self.search.emitted()


class Lockstep(Sequences):
    """A search with a model to itself.

    Args:
        watch: sees each pass.
        steps: how many may pass before :meth:`step` returns; None: as many as it takes some hundredths of a second.
        hooked: whether the search calls functions of the caller's.
        in_8bit: whether keys and values are kept in 8 bits.
    """

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        search: _core.Search,
        slots: int,
        cache_rows: int,
        watch: Watch | None,
        steps: int | None,
        hooked: bool,
        in_8bit: bool,
    ):
        self.watch, self.steps = watch, steps
        self.decoder: Decoder | Rereader = (
            Rereader(model, len(prompts), slots)
            if model.family.objective == "plm"
            else Decoder(model, len(prompts), cache_rows, slots, in_8bit)
        )
        # A function may fork, which waits for the core, or run the model itself: then each step comes back here.
        self.alone = isinstance(self.decoder, Decoder) and watch is None and not hooked
        super().__init__(search, self.decoder)

    def step(self) -> Emitted | None:
        if self.alone and isinstance(self.decoder, Decoder):
            emitted = self.decoder.run(self.search, self.steps)
            if emitted is not None:
                return emitted
        found = self.feeds()
        if found is None:
            return None
        # A sequence writes to the cache row of its own number: no other one ever needs that row at this position.
        if isinstance(self.decoder, Decoder) and self.watch is None:
            temperature = self.search.wants_best(min(BEST, self.decoder.model.family.config.vocab_size))
            return self.take(self.decoder.follow_up(*found, [temperature] * len(found[0])))
        logits = self.decoder.read(*found)[0][:, 0]
        if self.watch is not None and self.wanted is not None:
            self.watch(self.search, self.wanted, logits)
        return self.take(Following.whole(logits))


class Proposer(Protocol):
    """What drafts tokens for a speculative step."""

    def propose(self, search: _core.Search, ids: list[int], most: int) -> list[tuple[int, Floats | None]]:
        """At most ``most`` tokens that may follow ``ids``, each with the distribution ``[V]`` that it was drawn from;
        None if the proposal is certain."""
        ...


class Lookup:
    """Proposes what followed the last tokens where they occurred before.

    Source: Saxena 2023, "Prompt Lookup Decoding".
    """

    def __init__(self, tokens: int, ngram: int):
        self.tokens, self.ngram = tokens, ngram

    def propose(self, search: _core.Search, ids: list[int], most: int) -> list[tuple[int, Floats | None]]:
        array = np.asarray(ids)
        for n in range(min(self.ngram, len(ids) - 1), 0, -1):
            # All windows but the last one, which is the n-gram itself.
            windows = np.lib.stride_tricks.sliding_window_view(array[:-1], n)
            found = np.flatnonzero((windows == array[-n:]).all(1))
            if len(found):
                # The latest that leaves as many tokens as wanted; if none does, the first leaves the most.
                count = min(self.tokens, most)
                full = found[found + n + count <= len(ids)]
                at = int(full[-1] if len(full) else found[0]) + n
                return [(t, None) for t in ids[at : at + count]]
        return []


class Assistant:
    """Proposes what a cheaper model of the same vocabulary says."""

    def __init__(self, model: Model, tokens: int, slots: int):
        self.tokens = tokens
        self.decoder = Decoder(model, 1, 1, min(slots, model.family.max_positions))
        #: What is in the cache.
        self.cached: list[int] = []

    def propose(self, search: _core.Search, ids: list[int], most: int) -> list[tuple[int, Floats | None]]:
        decoder, row = self.decoder, np.zeros(1, np.int32)
        shared = 0
        for a, b in zip(self.cached, ids[:-1], strict=False):
            if a != b:
                break
            shared += 1
        feed = ids[shared:]
        after: list[int] = []
        drafts: list[tuple[int, Floats | None]] = []
        for _ in range(min(self.tokens, most)):
            if shared + len(feed) > decoder.slots:
                shared, feed = 0, [*ids, *after][-(decoder.slots // 2) :]
            decoder.lengths[0] = shared
            logits, _ = decoder.read([feed], row)
            self.cached = [*self.cached[:shared], *feed]
            shared = len(self.cached)
            token, probabilities = search.draft(after, np.ascontiguousarray(logits[0, 0]))
            drafts.append((token, probabilities))
            after.append(token)
            feed = [token]
        return drafts


class Speculative:
    """One sequence; a proposer drafts several tokens and the model checks them in one pass.

    What comes out is distributed as without drafts (Leviathan et al. 2023, algorithm 1). In greedy search, and in
    sampling where proposals are certain, it is the very same.
    """

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        search: _core.Search,
        slots: int,
        proposer: Proposer,
        sampled: bool,
        in_8bit: bool,
    ):
        self.search, self.proposer, self.sampled = search, proposer, sampled
        self.decoder = Decoder(model, 1, 1, slots, in_8bit)
        self.ids = list(prompt)
        #: The end of ``ids`` that is not in the cache.
        self.unread = list(prompt)

    def step(self) -> Emitted | None:
        if self.search.step() is None:
            return None
        decoder, feed = self.decoder, self.unread
        if decoder.lengths[0] + len(feed) > decoder.slots:
            feed, decoder.lengths[0] = self.ids[-(decoder.slots // 2) :], 0
        base = int(decoder.lengths[0]) + len(feed)
        drafts = self.proposer.propose(self.search, self.ids, decoder.slots - base)
        # As many outputs as a power of two, so that few programs serve all numbers of drafts.
        outputs = 1 << len(drafts).bit_length()
        logits, _ = decoder.read(
            [[*feed, *(t for t, _ in drafts)]], np.zeros(1, np.int32), outputs=outputs, drafts=len(drafts)
        )
        rows = logits[0, outputs - len(drafts) - 1 :]
        emitted: Emitted = []
        kept = 0
        for row, (token, probabilities) in zip(rows, drafts, strict=False):
            if probabilities is not None and self.sampled:
                self.search.advance_drafted(row, token, probabilities)
            else:
                self.search.advance(row[None])
            emitted += self.search.emitted()
            if emitted[-1][1] != token or self.search.step() is None:
                break
            kept += 1
        else:
            self.search.advance(rows[-1:])
            emitted += self.search.emitted()
        self.ids += [token for _, token, _ in emitted]
        self.unread = self.ids[-1:]
        decoder.lengths[0] = base + kept
        return emitted


class Contrastive:
    """Of the K most probable tokens, the one that is probable and unlike what is there.

    The score of token v is (1 − α) p(v) − α max cos(h_v, h_j) over the hidden states of all tokens before it; the pass
    that finds h_v for the K candidates gives what follows the chosen one, too.
    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", equation 5.
    """

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        search: _core.Search,
        slots: int,
        alpha: float,
        candidates: int,
        watch: Watch | None,
        in_8bit: bool,
    ):
        self.search, self.alpha, self.k, self.watch = search, alpha, candidates, watch
        self.decoder = Decoder(model, len(prompts), len(prompts) * candidates, slots, in_8bit)
        self.prompts = prompts
        #: Of each active sequence: logits after it [V], and its hidden states [T, C] scaled to length 1.
        self.logits: Floats = np.zeros((0, 0), np.float32)
        self.states: list[npt.NDArray[np.float64]] = []

    def step(self) -> Emitted | None:
        wanted = self.search.step()
        if wanted is None:
            return None
        index, _, parents, sequences = wanted
        decoder, k = self.decoder, self.k
        if index == 0:
            logits, hidden = decoder.read(self.prompts, sequences * np.int32(k), hidden=True)
            assert hidden is not None
            self.logits = logits[:, 0]
            self.states = [_units(h[: len(p)]) for h, p in zip(hidden, self.prompts, strict=True)]
        else:
            decoder.follow(parents)
            self.logits, self.states = self.logits[parents], [self.states[p] for p in parents]
        if (decoder.lengths >= decoder.slots).any():
            raise InputError(
                f"[generate] penalty_alpha: contrastive search ends at the {decoder.slots} positions of the model; "
                "ask for fewer new tokens"
            )
        if self.watch is not None:
            self.watch(self.search, wanted, self.logits)
        active = len(sequences)
        scores = np.stack([self.search.scores(i, [], self.logits[i]) for i in range(active)])
        probabilities = np.exp(log_softmax(scores))
        top = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
        decoder.follow(np.repeat(np.arange(active, dtype=np.int32), k))
        into = (sequences[:, None] * np.int32(k) + np.arange(k, dtype=np.int32)).reshape(-1)
        logits, hidden = decoder.read([[t] for t in top.reshape(-1).tolist()], into, hidden=True)
        assert hidden is not None
        states = _units(hidden[:, 0]).reshape(active, k, -1)
        own = log_softmax(self.logits)
        chosen: list[tuple[int, float]] = []
        rows = []
        for i in range(active):
            p = probabilities[i, top[i]]
            likeness = (states[i] @ self.states[i].T).max(1)
            score = np.where(p > 0, (1 - self.alpha) * p - self.alpha * likeness, -np.inf)
            best = int(score.argmax())
            token = int(top[i, best])
            chosen.append((token, float(own[i, token])))
            rows.append(i * k + best)
            self.states[i] = np.concatenate([self.states[i], states[i, best : best + 1]])
        self.search.choose(chosen)
        decoder.follow(np.array(rows, np.int32))
        self.logits = np.ascontiguousarray(logits[rows, 0])
        return self.search.emitted()


def _units(states: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Vectors ``[.., C]`` scaled to length 1."""
    states = states.astype(np.float64)
    units: npt.NDArray[np.float64] = states / np.maximum(
        np.linalg.norm(states, axis=-1, keepdims=True), 1e-12
    )
    return units
