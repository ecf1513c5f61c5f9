"""Looking inside: what a model makes of one text on its way from ids to logits.

Training and scoring never hold attention weights; here they are made in float64 from what each layer's attention was
given.

Letters: B batch, T tokens, C width, H query heads, K key-value heads, D head width, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyrformer.compile import Traced
from pyrformer.errors import InputError
from pyrformer.models.base import Family
from pyrformer.nn import Trace
from pyrformer.programs import Sizes, batch_inputs, token_logits
from pyrformer.score import text_ids

if TYPE_CHECKING:
    from pyrformer.model import Model

Array = npt.NDArray[Any]
#: What an attention may be given, by name.
OPERANDS = ("q", "q_r", "q_s", "k", "v", "r", "kinds", "key_bias")
#: Rows that go through the model together in :func:`logits_at`.
ROWS = 8


@dataclass(frozen=True)
class Layer:
    """What the attention of one layer was given, and its weights.

    Attributes:
        q: queries ``[H, T, D]``; k, v: keys and values ``[K, T, D]``. Rotary positions have turned q and k already.
        weights: float32 ``[H, T, T]``: row i says how much token i takes from each token.
        causal: whether a token sees those before it only.
        window: query i sees keys j with |i − j| < window; None: all.
    """

    q: Array
    k: Array
    v: Array
    weights: npt.NDArray[np.float32]
    causal: bool
    window: int | None


@dataclass(frozen=True)
class Inside:
    """One text inside a model.

    Attributes:
        embeddings: the rows looked up by ids ("words"), by places ("positions") and by "types", ``[T, C]`` each; a
            family without a table has no entry.
        states: what enters the first layer, then each layer's result, ``[T, C]`` each.
        layers: the attention of each layer.
    """

    embeddings: dict[str, Array]
    states: list[Array]
    layers: list[Layer]


def attention(
    model: Model, text: str | Sequence[int], *, perm_mask: npt.ArrayLike | None = None
) -> list[npt.NDArray[np.float32]]:
    """The attention weights of each layer, float32 ``[H, T, T]``: row i says how much token i takes from each token.

    Args:
        text: a text, or ids with their special tokens.
        perm_mask: ``[1, T, T]``, 1 where the first token does not see the second (XLNet, whose content stream is
            shown; there a token always sees itself).

    Raises:
        InputError: the text is empty or too long, or ``perm_mask`` does not fit.
    """
    ids = text_ids(model, text, framed=True)
    if not ids:
        raise InputError("[attention] the text has no tokens")
    return [layer.weights for layer in look_inside(model, ids, perm_mask=perm_mask).layers]


def look_inside(model: Model, ids: Sequence[int], *, perm_mask: npt.ArrayLike | None = None) -> Inside:
    """Embeddings, states and attention of one row of ids, special tokens included; ``perm_mask`` as in
    :func:`attention`.

    Raises:
        InputError: there are no ids, or too many, or ``perm_mask`` does not fit.
    """
    batch = model.batch([list(ids)], perm_mask=perm_mask)
    traced, specs = _traced(model.family, batch.sizes, model.dtype)
    out = model.program(("look_inside", batch.sizes), lambda: traced)(**batch.arrays)
    hidden = batch.arrays.get("hidden")
    layers = []
    for layer, spec in enumerate(specs):
        given = {name: out[f"{name}.{layer}"] for name in OPERANDS if f"{name}.{layer}" in out}
        if "r" in given:
            found = relative_weights(given, spec, batch.arrays["token_type_ids"], hidden)
            causal, window = not np.triu(found, 1).any(), None
        else:
            found = weights(given["q"], given["k"], spec, key_bias=given.get("key_bias"))
            causal, window = spec["causal"], spec["window"]
        q, k, v = (
            given[name][0].reshape(len(ids), spec.get(heads, spec["heads"]), -1).swapaxes(0, 1)
            for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
        )
        layers.append(Layer(q, k, v, found[0].astype(np.float32), causal, window))
    tables: dict[str, Array] = {name: out[name][0] for name in ("words", "positions", "types") if name in out}
    states = [out[f"state.{i}"][0] for i in range(len(out)) if f"state.{i}" in out]
    return Inside(tables, states, layers)


def logits_at(model: Model, rows: npt.NDArray[np.int32], places: Sequence[int]) -> npt.NDArray[np.float32]:
    """The logits of one place of each row, ``[N, V]``, for ``rows [N, T]``; no others are computed."""
    n = len(rows)
    full = -(-n // ROWS) * ROWS
    rows, at = np.resize(rows, (full, rows.shape[1])), np.resize(places, full)
    found = []
    for start in range(0, full, ROWS):
        batch = model.batch(rows[start : start + ROWS])
        flat = np.arange(ROWS) * rows.shape[1] + at[start : start + ROWS]
        sizes = replace(batch.sizes, labelled=ROWS)
        make = partial(token_logits, model.family, sizes, model.dtype)
        program = model.program(("token_logits", sizes), make)
        found.append(program(**batch.arrays, positions=flat.astype(np.int32))["logits"])
    return np.concatenate(found)[:n]


def weights(
    q: Array,
    k: Array,
    spec: dict[str, Any],
    *,
    segments: Array | None = None,
    key_bias: Array | None = None,
) -> npt.NDArray[np.float64]:
    """softmax(scale·q·k + bias) under a mask, ``[B, H, T, T]``, for ``q [B, T, H·D]``, ``k [B, T, K·D]``; see
    ``AttentionSpec`` in ``rust/graph/src/op.rs`` for the mask."""
    b, t, _ = q.shape
    heads, kv = spec["heads"], spec["kv_heads"]
    queries = q.reshape(b, t, heads, -1).astype(np.float64)
    keys = np.repeat(k.reshape(b, t, kv, -1), heads // kv, axis=2).astype(np.float64)
    scores = spec["scale"] * np.einsum("bihd,bjhd->bhij", queries, keys)
    if key_bias is not None:
        scores += key_bias[:, :, None, :]
    i, j = np.arange(t)[:, None], np.arange(t)[None, :]
    seen = (j <= i) if spec["causal"] else np.ones((t, t), bool)
    if spec["window"] is not None:
        seen = seen & (np.abs(i - j) < spec["window"])
    seen = np.array(np.broadcast_to(seen, (b, t, t)))
    if segments is not None:
        own, other = segments[:, :, None], segments[:, None, :]
        seen = seen & (other != 0) & ((own == other) | (own == 0))
    # A query that sees nothing takes alike from all.
    blind = ~np.any(seen, axis=-1, keepdims=True)
    scores = np.where(seen[:, None], scores, np.where(blind[:, None], 0.0, -np.inf))
    scores = np.where(blind[:, None], 0.0, scores)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(scores / scores.sum(-1, keepdims=True), np.float64)


def relative_weights(
    given: dict[str, Array], spec: dict[str, Any], types: Array, hidden: Array | None
) -> npt.NDArray[np.float64]:
    """The weights of XLNet's content stream, ``[B, H, T, T]``: softmax(scale·(q·k + q_r·r + q_s·kinds)); see
    ``RelativeAttention`` in ``rust/graph/src/op.rs``.

    Args:
        given: ``q``, ``q_r``, ``q_s``, ``k`` ``[B, T, H·D]``, ``r [2·T, H·D]``, ``kinds [2, H·D]``.
        types: int32[B, T].
        hidden: int32[B, T, T], 1 where the first token does not see the second, unless it is itself.
    """
    t = given["q"].shape[1]
    wide = {name: x.reshape(*x.shape[:-1], spec["heads"], -1).astype(np.float64) for name, x in given.items()}
    i, j = np.arange(t)[:, None], np.arange(t)[None, :]
    content = np.einsum("bihd,bjhd->bhij", wide["q"], wide["k"])
    # Row t − i + j of the table is for the distance i − j.
    distance = np.einsum("bihd,ijhd->bhij", wide["q_r"], wide["r"][t - i + j])
    by_kind = np.einsum("bihd,khd->kbhi", wide["q_s"], wide["kinds"])
    other = (types[:, :, None] != types[:, None, :])[:, None]
    scores = content + distance + np.where(other, by_kind[1][..., None], by_kind[0][..., None])
    scores *= spec["scale"]
    if hidden is not None:
        unseen = (hidden != 0) & ~np.eye(t, dtype=bool)
        scores = np.where(unseen[:, None], -np.inf, scores)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(scores / scores.sum(-1, keepdims=True), np.float64)


def _traced(family: Family, sizes: Sizes, dtype: str) -> tuple[Traced, list[dict[str, Any]]]:
    """A program whose outputs are :class:`Inside`'s parts, and the attributes of each layer's attention."""
    trace = Trace(dtype)
    x = batch_inputs(trace, family, sizes)
    for i, state in enumerate(family.hidden_states(x)):
        trace.output(f"state.{i}", state)
    tables = {"words": x.input_ids, "positions": x.position_ids, "types": x.token_type_ids}
    for index, rows in trace.embedded:
        for name, ids in tables.items():
            if index is ids:
                trace.output(name, rows)
    specs = []
    for layer, (operands, spec) in sorted(x.seen.items()):
        for name, value in operands.items():
            trace.output(f"{name}.{layer}", value)
        specs.append(spec)
    return Traced("look_inside", trace), specs
