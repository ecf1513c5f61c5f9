"""Looking inside: the attention weights of a model, computed afresh from queries and keys.

Training and scoring never hold them; here they are made in float64 from what each layer's attention was given.

Letters: B batch, T tokens, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyrformer.compile import Traced
from pyrformer.errors import InputError
from pyrformer.models.base import Family
from pyrformer.nn import Trace
from pyrformer.programs import Sizes, batch_inputs
from pyrformer.score import text_ids

if TYPE_CHECKING:
    from pyrformer.model import Model

Array = npt.NDArray[Any]


def attention(model: Model, text: str | Sequence[int]) -> list[npt.NDArray[np.float32]]:
    """The attention weights of each layer, float32 ``[H, T, T]``: row i says how much token i takes from each token.

    Args:
        text: a text, or ids with their special tokens.

    Raises:
        InputError: the text is empty or too long, or the family has relative attention (XLNet).
    """
    if model.family.objective == "plm":
        raise InputError("[attention] the scores of XLNet's relative attention are not shown")
    ids = text_ids(model, text, framed=True)
    if not ids:
        raise InputError("[attention] the text has no tokens")
    batch = model.batch([ids])
    traced, specs = _traced(model.family, batch.sizes, model.dtype)
    out = model.program(("attention", batch.sizes), lambda: traced)(**batch.arrays)
    found = []
    for layer, spec in enumerate(specs):
        bias = out.get(f"key_bias.{layer}")
        found.append(weights(out[f"q.{layer}"], out[f"k.{layer}"], spec, key_bias=bias)[0].astype(np.float32))
    return found


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


def _traced(family: Family, sizes: Sizes, dtype: str) -> tuple[Traced, list[dict[str, Any]]]:
    """A program whose outputs are what each layer's attention is given, and each layer's attributes."""
    trace = Trace(dtype)
    x = batch_inputs(trace, family, sizes)
    family.hidden_states(x)
    specs = []
    for layer, (q, k, _, bias, spec) in sorted(x.seen.items()):
        for name, value in (("q", q), ("k", k), ("key_bias", bias)):
            if value is not None:
                trace.output(f"{name}.{layer}", value)
        specs.append(spec)
    return Traced("attention", trace), specs
