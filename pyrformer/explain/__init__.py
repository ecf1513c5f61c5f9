"""One sentence on its way through a model, as a page: text, tokens, row, embeddings, attention, logits, loss.

``journey.py`` measures; ``reading.py``, ``inner.py`` and ``outcome.py`` tell; ``page.css`` and ``page.js`` show. It
loads nothing from elsewhere.

Letters: B batch, T tokens, C width, H query heads, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyrformer.errors import InputError
from pyrformer.explain import inner, outcome, reading
from pyrformer.explain.journey import Journey, travel
from pyrformer.explain.stage import Stage, esc
from pyrformer.fields import checked
from pyrformer.page import assemble

if TYPE_CHECKING:
    from pyrformer.model import Model

#: What a model learned to do, for a reader.
OBJECTIVES = {
    "ar": "autoregressive: it guesses each next token from those before it",
    "mlm": "masked: it guesses a hidden token from both sides",
    "plm": "permutation: it guesses tokens in any order; here from left to right",
    "tokens": "a classifier of tokens",
    "sentence": "a classifier of texts",
    "none": "an encoder without a head: it gives vectors",
}
#: Tokens that a page shows unless told otherwise, and the most it can be told.
TOKENS, MOST_TOKENS = 64, 256
#: Characters of data that a page may hold; browsers still scroll it smoothly.
MOST_DATA = 32_000_000


@checked("explain")
def explain(model: Model, text: str, *, max_tokens: int = TOKENS) -> str:
    """A self-contained HTML page that follows ``text`` through ``model``.

    The page shows the ids and the row that :func:`pyrformer.score.score` reads, the embeddings, queries, keys, values
    and attention of every layer and head, the norms of the states, the ten most probable tokens at each place, and
    the loss of each token; a model without a token head ends with its classes or its vector.

    Args:
        max_tokens: longer texts are refused; at most 256.

    Raises:
        InputError: the text is empty or too long, or the model has no tokenizer.
    """
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise InputError(f"[explain] max_tokens must be in 1..{MOST_TOKENS}, got {max_tokens}")
    journey = travel(model, text, max_tokens)
    data = json.dumps(journey.data(), ensure_ascii=True, separators=(",", ":"))
    if len(data) > MOST_DATA:
        raise InputError(
            f"[explain] {len(journey.tokens)} tokens in all layers and heads of this model make a page of "
            f"{len(data) / 1e6:.0f} MB, more than {MOST_DATA / 1e6:.0f}; shorten the text"
        )
    return _page(journey, _stages(journey), data)


def _stages(journey: Journey) -> list[Stage]:
    """All stages that this model has, in order."""
    told: list[Callable[[Journey], Stage]] = [
        *(reading.text, reading.tokens, reading.special, reading.row, inner.embedding),
        *((inner.projections, inner.attention) if journey.inside.layers else ()),
        inner.residual,
        outcome.logits if journey.predictions else outcome.without_tokens,
        *((outcome.loss,) if journey.losses else ()),
    ]
    return [tell(journey) for tell in told]


def _page(journey: Journey, told: list[Stage], data: str) -> str:
    links = "".join(f'<a href="#{s.key}"><b>{i}</b> {s.title}</a>' for i, s in enumerate(told, 1))
    sections = "".join(
        f'<section id="{s.key}"><h2><b>{i}</b> {s.title}</h2><p class="lead">{s.lead}</p>'
        f'<p class="formula">{s.formula}</p>{s.body}</section>'
        for i, s in enumerate(told, 1)
    )
    body = (
        f'<nav aria-label="Stages">{links}<button id="theme" type="button">light / dark</button></nav>'
        f"<main>{_head(journey)}{sections}</main>"
    )
    return assemble("pyrformer.explain", esc(journey.title), body, data)


def _head(journey: Journey) -> str:
    model, inside = journey.model, journey.inside
    facts = [
        ("family", esc(str(model.config["model_type"]))),
        ("layers", str(len(inside.states) - 1)),
        *([("heads", str(len(inside.layers[0].weights)))] if inside.layers else []),
        ("width", str(inside.states[-1].shape[1])),
        ("parameters", f"{model.parameter_count:,}"),
    ]
    listed = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)
    return (
        f'<header><p class="kicker">One sentence on its way through a transformer</p><h1>{esc(journey.title)}</h1>'
        f'<p class="facts">{listed}<span>{OBJECTIVES[journey.objective]}</span></p></header>'
    )
