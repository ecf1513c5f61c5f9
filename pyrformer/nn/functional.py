"""The operations on traced tensors, one function each. Shapes as in ``rust/graph/src/op.rs``; ``..``: any leading axes.

Letters: B batch, T tokens, C width, H query heads, K key-value heads, D head width, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyrformer.errors import ConfigError
from pyrformer.nn.trace import Tensor, Trace

#: Hugging Face's activation names → the graph's.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}


def activation(name: str, x: Tensor) -> Tensor:
    """An activation by Hugging Face's name (``ACTIVATIONS``).

    Raises:
        ConfigError: there is no such activation.
    """
    return x.trace.apply({"unary": _activation(name)}, x)[0]


def gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) ⊙ up`` of two tensors of one shape (Shazeer 2020, equation 6), by Hugging Face's name.

    Raises:
        ConfigError: there is no such activation.
    """
    return gate.trace.apply({"gated": _activation(name)}, gate, up)[0]


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ConfigError(f"[model] unknown activation {name!r}; use one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table [V, C]`` at ``ids int32[..]``: ``[.., C]``; the trace remembers them."""
    rows = gather(table, ids)
    ids.trace.embedded.append((ids, rows))
    return rows


def gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows of ``table [R, C]`` at ``index int32[..]``: ``[.., C]``."""
    return table.trace.apply("gather", table, index)[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """``x·Wᵀ + b`` for ``x [.., C]``, ``weight [N, C]``; with ``transposed``, ``weight [C, N]`` (GPT-2's Conv1D)."""
    op = {"matmul": {"ta": False, "tb": not transposed, "epilogue": NO_EPILOGUE}}
    y = x.trace.apply(op, x, weight)[0]
    return y if bias is None else y + bias


#: Nothing fused: the compiler fills epilogues in.
NO_EPILOGUE = {"bias": False, "act": None, "keep_pre": False, "act_grad": None, "residual": False}


def matmul(a: Tensor, b: Tensor, *, ta: bool = False, tb: bool = False) -> Tensor:
    """``a·b`` of matrices, either of them transposed."""
    return a.trace.apply({"matmul": {"ta": ta, "tb": tb, "epilogue": NO_EPILOGUE}}, a, b)[0]


def sqrt(x: Tensor) -> Tensor:
    """√x of each element."""
    return x.trace.apply({"unary": "sqrt"}, x)[0]


def sign(x: Tensor) -> Tensor:
    """−1, 0 or 1 for each element."""
    return x.trace.apply({"unary": "sign"}, x)[0]


def sum_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Sums leading axes away until ``shape``, the last axes, is left."""
    return x.trace.apply("sum_to", x, declared=(x.dtype, list(shape)))[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the last axis of ``x [.., C]`` (Ba et al. 2016)."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return x.trace.apply({"layer_norm": {"eps": eps, "center": True}}, *operands)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / √(mean(x²) + eps) · weight`` over the last axis of ``x [.., C]`` (Zhang and Sennrich 2019, equation 4)."""
    return x.trace.apply({"layer_norm": {"eps": eps, "center": False}}, x, weight)[0]


def rope_table(positions: Tensor, inv_freq: Sequence[float], scale: float = 1.0) -> Tensor:
    """Cosines, then sines of ``positions int32[..]`` times each frequency, all times ``scale``: ``[.., R]``, R twice
    the number of frequencies."""
    op = {"inv_freq": list(inv_freq), "scale": scale, "dtype": DTYPES[positions.trace.dtype]}
    return positions.trace.apply({"rope_table": op}, positions)[0]


def rope(x: Tensor, table: Tensor, heads: int) -> Tensor:
    """Rotary position embedding (Su et al. 2021, equation 34) of ``x [.., H·D]`` by ``table [.., R]``: in each head
    column i < R/2 turns with column i + R/2; columns from R on stay."""
    return x.trace.apply({"rope": {"heads": heads, "inverse": False}}, x, table)[0]


def alibi_bias(
    positions: Tensor, slopes: Sequence[float], *, scale: float = 1.0, rounded: bool = False
) -> Tensor:
    """A bias on keys (Press et al. 2022, section 3) from their ``positions int32[.., T]``: ``[.., H, T]``.

    ``rounded`` keeps slope and product in bfloat16, as Falcon does, before they are multiplied by ``scale``.
    """
    op = {
        "slopes": list(slopes),
        "scale": scale,
        "round": rounded,
        "dtype": DTYPES[positions.trace.dtype],
    }
    return positions.trace.apply({"alibi_bias": op}, positions)[0]


def iota(trace: Trace, n: int, start: int = 0, step: int = 1) -> Tensor:
    """start, start + step, …: ``int32[n]``."""
    return trace.apply({"iota": {"start": start, "step": step}}, declared=("int32", [n]))[0]


#: NumPy's names of floating-point types → the graph's.
DTYPES = {"float32": "f32", "float64": "f64"}


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout while training, nothing otherwise."""
    if not x.trace.training or p == 0.0:
        return x
    op = {"dropout": {"p": p, "stream": x.trace.next_stream()}}
    return x.trace.apply(op, x, x.trace.rng())[0]


def split(x: Tensor, parts: int) -> list[Tensor]:
    """Cuts the last axis into equal parts."""
    return x.trace.apply({"split": {"sizes": [x.shape[-1] // parts] * parts}}, x)


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Joins along the last axis."""
    return parts[0].trace.apply("concat", *parts)[0]


def concat_tokens(a: Tensor, b: Tensor) -> Tensor:
    """Joins ``a [B, M, C]`` and ``b [B, T, C]`` along the tokens."""
    batch, width = a.shape[0], a.shape[2]
    flat = [reshape(x, (batch, x.shape[1] * width)) for x in (a, b)]
    return reshape(concat(flat), (batch, a.shape[1] + b.shape[1], width))


def split_groups(x: Tensor, groups: int, sizes: Sequence[int]) -> list[Tensor]:
    """Cuts each of ``groups`` equal runs of the last axis into parts of ``sizes`` and joins the parts of all groups:
    ``x [B, T, G·Σ sizes]`` → ``[B, T, G·sizes[i]]`` each."""
    lead = x.shape[:-1]
    grouped = reshape(x, (*lead, groups, x.shape[-1] // groups))
    parts = x.trace.apply({"split": {"sizes": list(sizes)}}, grouped)
    return [reshape(part, (*lead, groups * size)) for part, size in zip(parts, sizes, strict=True)]


def first_token(x: Tensor) -> Tensor:
    """The first position of each sequence: ``[B, T, C]`` → ``[B, C]``."""
    b, t, c = x.shape
    sizes = [c, (t - 1) * c] if t > 1 else [c]
    return x.trace.apply({"split": {"sizes": sizes}}, reshape(x, (b, t * c)))[0]


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The same elements under another shape."""
    return x.trace.apply("reshape", x, declared=(x.dtype, list(shape)))[0]


def attention_spec(
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
) -> dict[str, object]:
    """Attributes of an attention without optional operands; ``scale`` is 1/√D unless given. With ``window`` query i
    sees keys j with |i − j| < window only."""
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "causal": causal,
        "window": window,
        "scale": head_dim**-0.5 if scale is None else scale,
        "segments": False,
        "key_bias": False,
        "prefix": False,
        "dropout": None,
    }


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: dict[str, object],
    *,
    segments: Tensor | None = None,
    key_bias: Tensor | None = None,
    prefix: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1) of ``q [B, T, H·D]``, ``k, v [B, T, K·D]``.

    ``segments int32[B, T]``: a key is seen from its own segment only, segment 0 never. ``key_bias [B, H, T]`` is added
    to the scores. ``prefix int32[B]``: so many first keys are seen by all queries, although the rest is causal. Dropout
    on the probabilities is traced while training.
    """
    spec, operands = dict(spec), [q, k, v]
    for name, operand in (("segments", segments), ("key_bias", key_bias), ("prefix", prefix)):
        if operand is not None:
            spec[name] = True
            operands.append(operand)
    if q.trace.training and dropout_p > 0.0:
        spec["dropout"] = {"p": dropout_p, "stream": q.trace.next_stream()}
        operands.append(q.trace.rng())
    return q.trace.apply({"attention": spec}, *operands)[0]


def relative_attention(
    q: tuple[Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    r: Tensor,
    kinds: Tensor,
    at: Tensor,
    q_kinds: Tensor,
    k_kinds: Tensor,
    *,
    heads: int,
    scale: float,
    hidden: Tensor | None,
    sees_itself: bool,
    dropout_p: float = 0.0,
) -> Tensor:
    """XLNet's attention (Yang et al. 2019, section 2.5) of rows at places ``at int32[B, T]``: ``[B, T, H·D]``.

    ``q``: the queries ``[B, T, H·D]`` that meet keys, distances and kinds; ``k, v [B, S, H·D]``; ``r [S + U, H·D]``,
    row p for the distance S − p; ``kinds [2, H·D]``, for tokens of the same kind and of another; ``hidden int32[B, U,
    U]``.
    """
    operands = [*q, k, v, r, kinds, at, q_kinds, k_kinds, *([] if hidden is None else [hidden])]
    spec: dict[str, object] = {
        "heads": heads,
        "scale": scale,
        "hidden": hidden is not None,
        "sees_itself": sees_itself,
        "dropout": None,
    }
    if k.trace.training and dropout_p > 0.0:
        spec["dropout"] = {"p": dropout_p, "stream": k.trace.next_stream()}
        operands.append(k.trace.rng())
    return k.trace.apply({"relative_attention": spec}, *operands)[0]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The sum over ``labels int32[..] ≥ 0`` of −log softmax(x·Wᵀ + b), a scalar; the logits are never held in full.

    ``smoothing`` ε: the target is (1 − ε)·onehot + ε/V; ``z_loss`` times log² of the softmax's denominator is added.
    """
    operands = [x, weight, *([] if bias is None else [bias]), labels]
    spec = {"bias": bias is not None, "smoothing": smoothing, "z_loss": z_loss}
    return x.trace.apply({"linear_cross_entropy": spec}, *operands)[0]


def linear_token_losses(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """−log softmax(x·Wᵀ + b) at ``labels int32[..]``, ``[..]``, 0 where they are negative; the logits are never held in
    full."""
    operands = [x, weight, *([] if bias is None else [bias]), labels]
    return x.trace.apply({"linear_token_losses": {"bias": bias is not None}}, *operands)[0]


def best(logits: Tensor, temperature: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` greatest of ``logits [.., V]``: them ``[R, K]``, greatest first and of equals that of the lower
    token, their tokens ``int32[R, K]``, and ``[R, 4]`` what all V weigh beside the greatest m: Σ exp(x − m), and
    Σ exp(x/t − m/t) at ``temperature [R]``, each in two numbers whose sum it is."""
    found, tokens, masses = logits.trace.apply({"best": {"count": count}}, logits, temperature)
    return found, tokens, masses


def cache_write(cache: Tensor, new: Tensor, row: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """``new [B, T, C]`` into ``cache [R, S, C]``: the first count[b] tokens of b to row row[b] from slot start[b]."""
    return new.trace.apply("cache_write", cache, new, row, start, count)[0]


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    start: Tensor,
    count: Tensor,
    spec: dict[str, object],
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attention of ``q [B, T, H·D]`` over caches ``[R, S, K·D]``; position p of sequence b is in row rows[b, p].
    ``key_bias [H, S]`` is added to the scores."""
    extra = [] if key_bias is None else [key_bias]
    op = {"cached_attention": {**spec, "key_bias": key_bias is not None}}
    return q.trace.apply(op, q, k, v, rows, start, count, *extra)[0]


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """√(Σ ‖gᵢ‖²), a scalar."""
    return grads[0].trace.apply("global_norm", *grads)[0]


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
    return norm.trace.apply({"clip_factor": {"max_norm": max_norm}}, norm)[0]


def adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    clip: Tensor,
    lr: Tensor,
    step: Tensor,
    *rng: Tensor,
    **hyper: Any,
) -> list[Tensor]:
    """New p, m, v of AdamW (Loshchilov and Hutter 2019, algorithm 2); ``hyper``: beta1, beta2, eps, weight_decay. With
    ``rounding``, a stream of bits of ``rng int32[4]``, p is rounded by chance to values of bfloat16."""
    return p.trace.apply({"adamw": hyper}, p, g, m, v, clip, lr, step, *rng)
