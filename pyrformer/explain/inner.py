"""The stages inside: embedding, queries and keys, attention, the residual stream.

Letters: T tokens, C width, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from pyrformer.explain.journey import Journey
from pyrformer.explain.stage import Stage, esc, picker, strip


def embedding(j: Journey) -> Stage:
    """The looked-up rows and their sum."""
    tables, width = j.inside.embeddings, j.inside.states[0].shape[1]
    position = {
        True: "A second table has a row for each place in the text; both rows are added.",
        False: _position_without_table(j),
    }["positions" in tables]
    shown = [("words", "token embedding E[x]")]
    shown += [("positions", "position embedding P[i]")] if "positions" in tables else []
    shown += [("types", "token-type embedding S[s]")] if "types" in tables else []
    if len(shown) > 1 or "(" in _normed("x", j):
        shown.append(("sum", "what enters the first layer, h⁰"))
    terms = ["E[x<sub>i</sub>]"]
    terms += ["P[i]"] if "positions" in tables else []
    terms += ["S[s<sub>i</sub>]"] if "types" in tables else []
    return Stage(
        "embedding",
        "Embedding",
        f"Each id picks its row of a table of V × {tables['words'].shape[1]} learned numbers. {position}",
        f"h<sup>0</sup><sub>i</sub> = {_normed(' + '.join(terms), j)} &nbsp; ∈ ℝ<sup>{width}</sup>",
        "".join(strip(key, title) for key, title in shown)
        + '<p class="note"><i class="plus"></i> positive, <i class="minus"></i> negative; each picture has its own '
        "scale. On the right the length ‖·‖ of each row. Point at a picture for its numbers.</p>",
    )


def _normed(terms: str, j: Journey) -> str:
    """Whether the sum of the looked-up rows is what enters the first layer, or is normalised or projected first."""
    tables, first = j.inside.embeddings, j.inside.states[0]
    if any(t.shape != first.shape for t in tables.values()):
        return f"f({terms})"
    total = np.sum([t.astype(np.float64) for t in tables.values()], axis=0)
    same = np.allclose(total, first, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(first).max())))
    return terms if same else f"Norm({terms})"


def _position_without_table(j: Journey) -> str:
    if j.objective == "plm":
        return "Places are not added: attention compares distances i − j instead."
    kind = j.model.config.get("position_embedding_type")
    if kind == "alibi":
        return "Places are not added: ALiBi lowers attention’s scores in proportion to the distance of two tokens."
    if kind == "rope":
        return "Places are not added: rotary embedding turns queries and keys by angles that grow with the place."
    tells = "what its mask hides tells order" if j.inside.layers[0].causal else "nothing tells order"
    return f"Places are not added; without a bias or rotation, {tells}."


def projections(j: Journey) -> Stage:
    """Queries, keys and values of the chosen layer and head."""
    first = j.inside.layers[0]
    heads, kv, width = first.q.shape[0], first.k.shape[0], first.q.shape[2]
    shared = (
        f" {heads} heads of queries share {kv} of keys and values."
        if kv < heads
        else f" There are {heads} heads, each with its own."
    )
    turned = (
        " Queries and keys are shown after their rotation."
        if "rotary" in _position_without_table(j) and "positions" not in j.inside.embeddings
        else ""
    )
    return Stage(
        "qkv",
        "Queries, keys, values",
        "Three learned matrices make of each token’s state a query (what it looks for), a key (what it offers) and a "
        f"value (what it passes on), {width} numbers each.{shared}{turned}",
        "q<sub>i</sub> = W<sub>Q</sub> h<sub>i</sub>, &nbsp; k<sub>i</sub> = W<sub>K</sub> h<sub>i</sub>, &nbsp; "
        "v<sub>i</sub> = W<sub>V</sub> h<sub>i</sub>",
        picker()
        + '<div class="three">'
        + "".join(
            strip(f"qkv-{x}", name) for x, name in zip("qkv", ("queries", "keys", "values"), strict=True)
        )
        + "</div>",
    )


def attention(j: Journey) -> Stage:
    """The weights of the chosen layer and head."""
    causal = all(layer.causal for layer in j.inside.layers)
    windowed = any(layer.window is not None for layer in j.inside.layers)
    sees = (
        "A token sees itself and those before it; the hatched cells are hidden by the causal mask."
        if causal
        else "Every token sees all others, on both sides."
    )
    if windowed:
        sees += " Some layers see a window of near tokens only."
    relative = j.objective == "plm"
    if relative:
        sees += (
            " This is the content stream; the query stream, which guesses, does not see its own token either."
        )
    formula = (
        "w<sub>ij</sub> = softmax<sub>j</sub>((q<sub>i</sub>·k<sub>j</sub> + q<sub>i</sub>·r<sub>i−j</sub> + "
        "q<sub>i</sub>·s<sub>ij</sub>)/√D)"
        if relative
        else "w<sub>ij</sub> = softmax<sub>j</sub>(q<sub>i</sub>·k<sub>j</sub>/√D"
        + (" + mask<sub>ij</sub>" if causal or windowed else "")
        + ")"
    )
    return Stage(
        "attention",
        "Attention",
        "A token’s query is compared with every key; the softmax turns the scores into shares that sum to 1, and the "
        f"values are mixed in these shares. {sees}",
        f"{formula}, &nbsp; y<sub>i</sub> = Σ<sub>j</sub> w<sub>ij</sub> v<sub>j</sub>",
        picker()
        + '<p class="ask">Point at a token to see where it looks:</p><div class="line" id="looks"></div>'
        '<p class="readout" id="share" aria-live="polite"></p>'
        '<div class="scroll" id="matrix"></div>'
        '<p class="note">Rows look, columns are looked at; each row sums to 1.</p>'
        '<p class="ask">All heads of this layer:</p><div id="heads"></div>',
    )


def residual(j: Journey) -> Stage:
    """The lengths of all states."""
    norms = np.stack(j.norms)
    low, high = float(norms.min()), float(norms.max())
    span = math.log(high / low) if high > low > 0 else 1.0
    cell, tall, left, top = max(9, min(44, 640 // len(j.tokens))), 18, 74, 64
    rows, columns = norms.shape
    marks = []
    for layer in range(rows):
        name = "embedding" if layer == 0 else f"layer {layer}"
        marks.append(f'<text x="{left - 6}" y="{top + layer * tall + 13}" text-anchor="end">{name}</text>')
        for i in range(columns):
            x = float(norms[layer, i])
            share = math.log(x / low) / span if x > low > 0 else 0.0
            marks.append(
                f'<rect x="{left + i * cell}" y="{top + layer * tall}" width="{cell - 1}" height="{tall - 1}" '
                f'fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{esc(j.tokens[i].label)}, {name}: ‖h‖ = {x:.3f}'
                "</title></rect>"
            )
    for i, t in enumerate(j.tokens):
        x = left + i * cell + cell // 2
        marks.append(f'<text transform="translate({x + 3},{top - 6}) rotate(-50)">{esc(t.label[:9])}</text>')
    size = f'width="{left + columns * cell + 40}" height="{top + rows * tall + 4}"'
    return Stage(
        "residual",
        "Residual stream",
        "Every layer adds what it found to the token’s state and passes the sum on, so the state is a stream that all "
        "layers write to. Its length shows how much was written.",
        "h<sup>ℓ+1</sup> = h<sup>ℓ</sup> + attention(h<sup>ℓ</sup>) + MLP(h<sup>ℓ</sup>) &nbsp; "
        "<small>with normalisation where the family has it</small>",
        f'<div class="scroll"><svg class="norms" {size} role="img" aria-label="Norms of states by layer and token">'
        f'{"".join(marks)}</svg></div><p class="note">‖h‖ from {low:.2f} (faint) to {high:.2f} (full), on a '
        "logarithmic scale; the last row is what the head reads, after the model’s last normalisation if it has one. "
        "Point at a cell for its number.</p>",
    )
