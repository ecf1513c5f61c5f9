"""The stages at the end: logits and loss; classes; or the text's vector."""

from __future__ import annotations

import math

from pyrformer.explain.journey import Journey
from pyrformer.explain.stage import Stage, esc, strip


def logits(j: Journey) -> Stage:
    """The best tokens, or classes, at each place."""
    lead = {
        "ar": "The last state of each token is compared with every token of the vocabulary; the softmax of these "
        "logits is the model’s expectation of the <em>next</em> token.",
        "mlm": "Each token is hidden in turn behind the mask token, the model reads the row again, and its logits "
        "there are its guess from both sides.",
        "plm": "Each token is guessed in a second stream that knows its place but not the token; here from those "
        "before it.",
        "tokens": "The head gives each token’s state a logit for each class.",
    }[j.objective]
    ask = {
        "ar": "Point at a token to see what may follow it:",
        "tokens": "Point at a token to see its classes:",
    }.get(j.objective, "Point at a token to see the guesses for its place:")
    return Stage(
        "logits",
        "Logits" if j.objective != "tokens" else "Classes",
        lead,
        "z = W h + b, &nbsp; p(v) = exp z<sub>v</sub> / Σ<sub>u</sub> exp z<sub>u</sub>",
        f'<p class="ask">{ask}</p><div class="line" id="places"></div><p class="readout" id="guess" '
        'aria-live="polite"></p><div id="top"></div>',
    )


def without_tokens(j: Journey) -> Stage:
    """Of a model that predicts no tokens: its classes, or its vector."""
    if j.classes:
        bars = "".join(
            f'<div class="bar"><code>{esc(name)}</code><i style="width:{60 * p:.2f}%"></i><b>{p:.1%}</b></div>'
            for name, p in j.classes
        )
        return Stage(
            "classes",
            "Classes",
            "The head reads one state for the whole text and gives each class a probability.",
            "p = softmax(W h + b)",
            bars,
        )
    return Stage(
        "vector",
        "The text’s vector",
        "This model has no head that predicts tokens, so there are no logits and no loss. What it gives is a vector of "
        "the whole text, made of its tokens’ last states; texts of like meaning have like vectors.",
        f"e = pool(h<sup>L</sup>), &nbsp; pool = {esc(str(j.model.pooling.get('pooling', 'mean')))}",
        strip("vector", "the vector"),
    )


def loss(j: Journey) -> Stage:
    """How surprising each token was."""
    worst = max(j.losses.values())
    coloured, rows = [], []
    for i, t in enumerate(j.tokens):
        nats = j.losses.get(i)
        if nats is None:
            coloured.append(f'<span class="silent">{esc(t.label)}</span>')
            continue
        share = nats / worst if worst > 0 else 0.0
        title = f"{nats:.3f} nats, {nats / math.log(2):.3f} bits"
        coloured.append(
            f'<span style="--share:{share:.3f}" title="{title}">{esc(t.label)}<small>{nats:.2f}</small></span>'
        )
        rows.append(
            f"<tr><td><code>{esc(t.label)}</code></td><td>{math.exp(-nats):.4f}</td><td>{nats:.4f}</td>"
            f"<td>{nats / math.log(2):.4f}</td></tr>"
        )
    total, size = sum(j.losses.values()), len(j.text.encode("utf-8"))
    masked = j.objective == "mlm"
    mean = total / len(j.losses)
    name = "pseudo-log-likelihood" if masked else "log-likelihood"
    lead = (
        "The loss of a token is how surprised the model is by it: 0 if it was sure, more the less it expected it. "
        + (
            "The sum over tokens, each guessed from all others, is a pseudo-log-likelihood: good for comparing "
            "sentences, not the length of a code."
            if masked
            else "The sum over tokens is the length of the shortest code for this text under this model."
        )
    )
    given = "all others" if masked else "those before"
    figures = [
        (name, f"{-total:.3f} nats"),
        ("mean loss", f"{mean:.4f} nats, {mean / math.log(2):.4f} bits a token"),
        ("pseudo-perplexity" if masked else "perplexity", f"{math.exp(mean):.3f}"),
        ("bits per byte", f"{total / math.log(2) / size:.4f}"),
    ]
    listed = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in figures)
    return Stage(
        "loss",
        "Loss",
        lead,
        f"loss<sub>i</sub> = −ln p(x<sub>i</sub> | {given}), &nbsp; 1 nat = 1/ln 2 ≈ 1.4427 bits",
        f'<p class="losses">{"".join(coloured)}</p><dl>{listed}</dl><details><summary>All tokens as a table</summary>'
        '<table class="losses"><thead><tr><th>token</th><th>p</th><th>nats</th><th>bits</th></tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></details>",
    )
