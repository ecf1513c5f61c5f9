"""Minimum Bayes risk: of several samples, the one that the others agree with most.

The score of a sample is its mean utility with all samples as references. The candidates stand for the model's
distribution, so they should be drawn without filters that bend it much.
Source: Eikema & Aziz 2020, "Is MAP Decoding All You Need?", section 5, equation 4.

Letters: S samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pyrformer.errors import InputError

#: The longest character n-grams of chrF, and how much more recall weighs than precision.
CHRF_ORDER, CHRF_BETA = 6, 2.0


@dataclass(frozen=True)
class Ranking:
    """Samples by their expected utility.

    Attributes:
        order: indices of the samples, best first; of equals the earlier.
        scores: the expected utility of each sample, in the order given.
    """

    order: list[int]
    scores: list[float]

    @property
    def best(self) -> int:
        """Index of the best sample."""
        return self.order[0]


def mbr(
    texts: Sequence[str],
    utility: str | Callable[[str, str], float] = "chrf",
    *,
    weights: Sequence[float] | None = None,
) -> Ranking:
    """Ranks samples of one prompt by expected utility.

    Args:
        texts: the samples, S of them.
        utility: "chrf" (Popović 2015), "f1" (of words), or ``utility(sample, reference) -> number``, higher is better.
        weights: how much each sample counts as a reference, not negative; default: all alike.

    Raises:
        InputError: there are no texts, the utility is unknown, or the weights do not fit.
    """
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        raise InputError("[mbr] texts must be a list of at least one string")
    function = UTILITIES.get(utility) if isinstance(utility, str) else utility
    if function is None:
        raise InputError(
            f"[mbr] utility must be one of {', '.join(UTILITIES)} or a function, got {utility!r}"
        )
    given = [1.0] * len(texts) if weights is None else list(weights)
    numbers = all(isinstance(w, (int, float, np.number)) and 0 <= w < 1e300 for w in given)
    shares = [float(w) for w in given] if numbers else []
    total = sum(shares)
    if len(shares) != len(texts) or not 0 < total < float("inf"):
        raise InputError(f"[mbr] weights must be {len(texts)} numbers from 0, not all of them 0")
    # Samples repeat often; each pair of distinct texts is compared once.
    mass: dict[str, float] = {}
    for text, share in zip(texts, shares, strict=True):
        mass[text] = mass.get(text, 0.0) + share
    expected = {t: sum(w * function(t, r) for r, w in mass.items()) / total for t in mass}
    scores = [expected[t] for t in texts]
    return Ranking(sorted(range(len(texts)), key=lambda i: -scores[i]), scores)


def chrf(sample: str, reference: str) -> float:
    """chrF in 0..1: the F-score, recall weighing β² = 4 times, of character n-grams up to 6, spaces left out;
    1 for two empty texts.

    Precision and recall are means over the orders for which both texts have n-grams.
    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation"; sacrebleu's defaults.
    """
    a, b = "".join(sample.split()), "".join(reference.split())
    if not a or not b:
        return float(a == b)
    precision = recall = 0.0
    orders = min(CHRF_ORDER, len(a), len(b))
    for n in range(1, orders + 1):
        ours, theirs = _ngrams(a, n), _ngrams(b, n)
        common = (ours & theirs).total()
        precision += common / ours.total() / orders
        recall += common / theirs.total() / orders
    return _f(precision, recall, CHRF_BETA)


def f1(sample: str, reference: str) -> float:
    """F1 in 0..1 of the words of two texts, as multisets; 1 for two empty texts."""
    a, b = Counter(sample.split()), Counter(reference.split())
    if not a or not b:
        return float(a == b)
    common = (a & b).total()
    return _f(common / a.total(), common / b.total(), 1.0)


def _f(precision: float, recall: float, beta: float) -> float:
    both = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / both if both > 0 else 0.0


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


UTILITIES: dict[str, Callable[[str, str], float]] = {"chrf": chrf, "f1": f1}
