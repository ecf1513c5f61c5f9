"""What a search looked at: the record of its steps, for people to see.

Letters: A active sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyrformer import _core
from pyrformer.generation.decoder import Floats, Ints


@dataclass(frozen=True)
class Candidate:
    """A token that could come next.

    Attributes:
        token: its id.
        probability: the model's own.
        weight: its probability among what the search draws or ranks, after processors and filters; 0 if they ban it.
    """

    token: int
    probability: float
    weight: float


@dataclass(frozen=True)
class Step:
    """One pass of the model: a row each for the sequences it continued. At the first step a row is a prompt.

    Attributes:
        tokens: the last token of each row.
        parents: the row of the step before that each continues; at the first step, the prompt.
        sequences: the number of each row's sequence.
        scores: in beam search, the summed log-probability of each row; otherwise 0.
        logprobs: the model's log-probability of each row's last token; 0 for prompts.
        candidates: for each row the most probable continuations, by the model's own probability.
    """

    tokens: list[int]
    parents: list[int]
    sequences: list[int]
    scores: list[float]
    logprobs: list[float]
    candidates: list[list[Candidate]]


class Recorder:
    """Writes a :class:`Step` for each pass that it is shown.

    Args:
        most: candidates of a row.
    """

    def __init__(self, most: int):
        self.most = most
        self.steps: list[Step] = []

    def __call__(self, search: _core.Search, wanted: tuple[int, Ints, Ints, Ints], logits: Floats) -> None:
        _, tokens, parents, sequences = wanted
        paths = search.path_scores()
        candidates = [self._candidates(search, i, row) for i, row in enumerate(logits)]
        self.steps.append(
            Step(
                tokens.tolist(),
                parents.tolist(),
                sequences.tolist(),
                [score for score, _ in paths],
                [logprob for _, logprob in paths],
                candidates,
            )
        )

    def _candidates(self, search: _core.Search, row: int, logits: Floats) -> list[Candidate]:
        own = _softmax(logits)
        weights = _softmax(search.scores(row, [], np.ascontiguousarray(logits)))
        top = np.argsort(-own, kind="stable")[: self.most].tolist()
        return [Candidate(t, float(own[t]), float(weights[t])) for t in top]


def _softmax(scores: Floats) -> Floats:
    e = np.exp(scores - scores.max())
    p: Floats = e / e.sum()
    return p
