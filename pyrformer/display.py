"""How objects look in a notebook: the HTML of their ``_repr_html_``, small and bounded.

Colours are translucent, so that they fit light and dark pages; all text is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pyrformer import _core
    from pyrformer.batch import Batch
    from pyrformer.generation.generate import Generation
    from pyrformer.model import Model
    from pyrformer.tokenizers import Encoding, Tokenizer

#: Rows of a table, characters of a cell, and columns of an array that are shown at most.
ROWS, CHARACTERS, COLUMNS = 20, 300, 16
#: Hues that tell neighbouring tokens apart.
HUES = (215, 28, 150, 285, 345)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]], count: int) -> str:
    """A table of the first :data:`ROWS` of ``count`` rows; numbers stand on the right."""
    body = ["".join(_cell(value) for value in row) for row in islice(rows, ROWS)]
    if count > ROWS:
        body.append(f'<td colspan="{len(head)}">… {count - ROWS:,} more</td>')
    heads = "".join(f'<th style="text-align:left">{html.escape(name)}</th>' for name in head)
    header = f"<thead><tr>{heads}</tr></thead>" if head else ""
    return (
        '<table><caption style="text-align:left;white-space:nowrap">'
        f"<b>{html.escape(caption)}</b></caption>{header}<tbody>"
        + "".join(f"<tr>{row}</tr>" for row in body)
        + "</tbody></table>"
    )


def chips(tokens: Iterable[tuple[str, int]]) -> str:
    """Tokens in changing colours; pointing at one shows its id."""
    return '<div style="line-height:2;font-family:monospace">' + " ".join(
        f'<span title="{number}" style="padding:.15em .3em;border-radius:.3em;white-space:pre;'
        f'background:hsl({HUES[i % 5]} 75% 55% / .2)">{html.escape(token)}</span>'
        for i, (token, number) in enumerate(tokens)
    ) + "</div>"  # fmt: skip


def tokenizer(tok: Tokenizer) -> str:
    """Its kind, its size, its special tokens, and tokens from all over its vocabulary."""
    special = {i: tok.id_to_token(i) or "" for i in range(tok.vocab_size) if tok.is_special(i)}
    places = np.linspace(0, tok.vocab_size - 1, min(24, tok.vocab_size)).astype(int).tolist()
    sample = [(tok.id_to_token(i) or "", i) for i in dict.fromkeys(places) if i not in special]
    caption = f"Tokenizer: {tok.kind}, {tok.vocab_size:,} tokens"
    rows = [(text, i) for i, text in special.items()]
    return table(caption, ("special token", "id") if rows else (), rows, len(rows)) + chips(sample)


def encoding(e: Encoding) -> str:
    """Its tokens."""
    shown = list(zip(e.tokens, e.ids, strict=True))[: ROWS * COLUMNS]
    more = f"<p>… {len(e) - len(shown):,} more</p>" if len(e) > len(shown) else ""
    return f"<p><b>{len(e):,} tokens</b></p>{chips(shown)}{more}"


def generation(g: Generation) -> str:
    """A row for each text: the text, its tokens, the mean of their log-probabilities, why it ended."""
    scored = any(score is not None for score in g.scores)
    rows = (
        (
            text,
            len(ids),
            float(np.mean(p)) if p else "–",
            *((score if score is not None else "–",) if scored else ()),
            reason,
        )
        for text, ids, p, score, reason in zip(
            g.texts, g.ids, g.token_logprobs, g.scores, g.finish_reasons, strict=True
        )
    )
    head = ("text", "tokens", "mean log p", *(("score",) if scored else ()), "ended by")
    return table(f"{len(g.texts):,} generated", head, rows, len(g.texts))


def batch(b: Batch) -> str:
    """Its arrays, and the first ids."""
    rows = [
        (name, f"{a.dtype}{list(a.shape)}", f"{a.min():.6g} … {a.max():.6g}" if a.size else "–")
        for name, a in b.arrays.items()
    ]
    size = b.sizes
    caption = f"Batch: {size.batch} × {size.tokens} tokens, {b.labels + b.sentence_labels:,} labels"
    ids = b.arrays["input_ids"]
    cut = [row[:COLUMNS].tolist() + ["…"] * (ids.shape[1] > COLUMNS) for row in ids[:ROWS]]
    return table(caption, ("array", "type", "values"), rows, len(rows)) + table(
        "input_ids", (), cut, len(ids)
    )


def model(m: Model) -> str:
    """Its family, its size, where it lives."""
    tok = m.tokenizer
    rows = [
        ("family", m.config["model_type"]),
        ("predicts", m.family.objective),
        ("parameters", m.parameter_count),
        ("positions", m.family.max_positions),
        ("vocabulary", m.family.config.vocab_size),
        ("tokenizer", "none" if tok is None else f"{tok.kind}, {tok.vocab_size:,} tokens"),
        ("values", f"{m.dtype} on {m.device}"),
    ]
    return table("Model", (), rows, len(rows))


def plan(name: str, p: _core.Plan) -> str:
    """Its steps and what they cost."""
    rows = (
        (int(number), operation, results, int(size), int(flops), scope)
        for number, operation, _, results, _, size, flops, scope in p.table()
    )
    caption = (
        f"{name}: {len(p)} steps, {p.flops / 1e9:.3g} GFLOP, {p.traffic_bytes / 1e6:.3g} MB moved, "
        f"arena {p.arena_bytes / 1e6:.3g} MB, states {p.state_bytes / 1e6:.3g} MB"
    )
    return table(caption, ("#", "operation", "results", "bytes", "FLOP", "part"), rows, len(p))


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f'<td style="text-align:right">{value:,}</td>'
    if isinstance(value, float):
        return f'<td style="text-align:right">{value:.4g}</td>'
    text = str(value)
    cut = text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
    return f'<td style="text-align:left;white-space:pre-wrap">{html.escape(cut)}</td>'
