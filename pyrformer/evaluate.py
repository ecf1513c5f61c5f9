"""What a model knows of a text, in figures that models of different kinds share.

Autoregressive models are measured exactly; masked ones by pseudo-log-likelihood and by how often they guess what was
hidden. Both come in bits per byte, which do not depend on a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrformer.errors import InputError
from pyrformer.fields import checked
from pyrformer.score import Row, batches_of, logprobs, pieces, text_ids

if TYPE_CHECKING:
    from pyrformer.model import Model


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on texts.

    Attributes:
        objective: "ar", "plm" (both exact) or "mlm" (pseudo).
        log_likelihood: nats, over all tokens; a masked model's is the pseudo-log-likelihood.
        tokens, bytes: what was scored.
        perplexity: exp of the mean −log p of a token.
        bits_per_byte: −log₂ p over the bytes.
        orders: of permutation models measured in drawn orders: the bits per byte of each, by its seed; others
            are of the mean log-likelihood.
        masked_accuracy: of masked models, how often the hidden token is the most probable one, 15 % hidden at once.
    """

    objective: str
    log_likelihood: float
    tokens: int
    bytes: int
    perplexity: float
    bits_per_byte: float
    masked_accuracy: float | None = None
    orders: dict[int, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


@checked("eval")
def evaluate(
    model: Model,
    texts: Sequence[str],
    *,
    stride: int | None = None,
    within_word: bool = False,
    orders: Sequence[int] = (),
) -> Evaluation:
    """Measures a model on texts; see :func:`pyrformer.score.score` for the options. ``orders``: seeds of orders to
    measure a permutation model in; without any, from left to right.

    Raises:
        InputError: the model predicts no tokens, or there is nothing to score.
    """
    if not all(isinstance(text, str) for text in texts):
        raise InputError("[eval] texts must be strings")
    options = {"stride": stride, "within_word": within_word}
    runs = {order: model.score(texts, **options, order=order) for order in (orders or (None,))}
    scores = next(iter(runs.values()))
    total = float(np.mean([run.log_likelihood.sum() for run in runs.values()]))
    tokens, size = int(scores.tokens.sum()), int(scores.bytes.sum())
    if tokens == 0:
        raise InputError("[eval] the text has no token to score")
    accuracy = masked_accuracy(model, texts) if model.family.objective == "mlm" else None
    bits = 1 / math.log(2) / size
    each = {seed: -float(run.log_likelihood.sum()) * bits for seed, run in runs.items() if seed is not None}
    perplexity = math.exp(-total / tokens)
    objective = model.family.objective
    return Evaluation(objective, total, tokens, size, perplexity, -total * bits, accuracy, each or None)


@checked("eval")
def masked_accuracy(model: Model, texts: Sequence[str], *, rate: float = 0.15, seed: int = 0) -> float:
    """How often the most probable token is the right one where ``rate`` of the tokens are hidden at once."""
    if not 0 <= rate <= 1:
        raise InputError(f"[eval] rate must be from 0 to 1, got {rate}")
    tokenizer = model.require_tokenizer()
    mask, draws = tokenizer.mask_token_id, np.random.default_rng(seed)
    right = count = 0
    for text in texts:
        for piece in pieces(text_ids(model, text), model.family.max_positions):
            places = [i for i, token in enumerate(piece) if not tokenizer.is_special(token)]
            if not places:
                continue
            chosen = draws.permutation(places)[: max(1, round(rate * len(places)))]
            row = np.array(piece)
            row[chosen] = mask
            logits = np.asarray(model(row[None]).logits)[0, chosen]
            right += int((logits.argmax(-1) == np.array(piece)[chosen]).sum())
            count += len(chosen)
    return right / max(1, count)


@dataclass(frozen=True)
class Gap:
    """What a masked model loses by guessing the tokens of a span independently.

    Attributes:
        length: tokens in a span.
        spans: how many were measured.
        independent: mean log p of a token with its whole span hidden, nats.
        chain: the same where the tokens before it in the span are shown, as the chain rule has it.
    """

    length: int
    spans: int
    independent: float
    chain: float

    @property
    def gap(self) -> float:
        """Nats a token that independence costs."""
        return self.chain - self.independent


@checked("eval", length=1, spans=1)
def independence_gap(
    model: Model, texts: Sequence[str], *, length: int = 3, spans: int = 100, seed: int = 0
) -> Gap:
    """Measures spans drawn from texts.

    Raises:
        InputError: the model is not a masked one, or no text has a span of that length.
    """
    tokenizer = model.require_tokenizer()
    mask = tokenizer.mask_token_id
    if model.family.objective != "mlm" or mask is None:
        raise InputError("[compare] the independence gap is a matter of masked models")
    draws = np.random.default_rng(seed)
    cut = [p for text in texts for p in pieces(text_ids(model, text), model.family.max_positions)]
    starts = [
        (i, at)
        for i, piece in enumerate(cut)
        for at in range(len(piece) - length + 1)
        if not any(tokenizer.is_special(t) for t in piece[at : at + length])
    ]
    if not starts:
        raise InputError(f"[compare] no text has {length} tokens in a row")
    chosen = draws.permutation(len(starts))[:spans]
    rows = []
    for n in chosen.tolist():
        i, at = starts[n]
        for k in range(length):
            # All hidden; then all from the k-th token of the span on.
            for kind, first in ((0, at), (1, at + k)):
                row = list(cut[i])
                row[first : at + length] = [mask] * (at + length - first)
                rows.append(Row(kind, row, [(at + k, 0)], cut[i][at + k]))
    sums = [0.0, 0.0]
    for batch in batches_of(model, rows):
        for one, values in zip(batch, logprobs(model, batch), strict=True):
            sums[one.text] += values[0]
    count = len(chosen) * length
    return Gap(length, len(chosen), sums[0] / count, sums[1] / count)
