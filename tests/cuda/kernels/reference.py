"""The kernels' operations from their definitions, in float64. Dimensions as in `cuda/*.cu`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray

# ---- Random numbers -------------------------------------------------------------------------------------------------


def philox(key: tuple[int, int], counter: list[Array]) -> list[Array]:
    """Philox 4×32-10. Source: Salmon et al. 2011, section 3.3."""
    k0, k1 = key
    c = [np.asarray(x, np.uint64) for x in counter]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & low, high0 ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def words(rng: Array, stream: int, purpose: int, elements: int) -> Array:
    """The random words of a site's elements."""
    seed_low, seed_high, step_low, step_high = (int(x) & 0xFFFFFFFF for x in rng)
    key = seed_low, seed_high ^ ((stream * 0x9E3779B9 + purpose) & 0xFFFFFFFF)
    block = np.arange(-(-elements // 4), dtype=np.uint64)
    found = philox(
        key,
        [block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), np.uint64(step_low), np.uint64(step_high)],
    )
    return np.stack(found, axis=1).reshape(-1)[:elements]


def keep(rng: Array, stream: int, p: float, elements: int) -> Array:
    """What each element of a dropout site is multiplied by: 0 or 1 / (1 − p)."""
    unit = (words(rng, stream, 0xD0D0, elements) >> np.uint64(8)) / 2.0**24
    return np.where(unit < np.float32(p), 0.0, 1.0 / (1.0 - p))


def by_chance(x: Array, word: Array) -> Array:
    """float32 rounded to one of the two values of bfloat16 beside it: up where the upper half of a word and what is cut
    off together reach the last bit that stays."""
    bits = x.view(np.uint32).astype(np.uint64)
    up = (bits & np.uint64(0xFFFF)) + (word >> np.uint64(16)) >= 0x10000
    rounded = (bits & np.uint64(0xFFFF0000)) + np.where(up, np.uint64(0x10000), np.uint64(0))
    return np.where(np.isfinite(x), rounded.astype(np.uint32).view(np.float32), x)


# ---- Elementwise ----------------------------------------------------------------------------------------------------

erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(x: Array) -> Array:
    """1 / (1 + e⁻ˣ)."""
    return 1 / (1 + np.exp(-x))


UNARY: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * sigmoid(x),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "sqrt": np.sqrt,
    "sign": np.sign,
}


def slope(f: Callable[[Array], Array], x: Array, h: float = 1e-6) -> Array:
    """f'(x) of an elementwise function by central differences, whose error is about h² + 1e-16 / h."""
    return (f(x + h) - f(x - h)) / (2 * h)


def numeric_gradient(f: Callable[[Array], float], x: Array, h: float = 1e-5) -> Array:
    """The gradient of a scalar function of a tensor by central differences."""
    x = x.astype(float)
    d = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += h
        down[place] -= h
        d[place] = (f(up) - f(down)) / (2 * h)
    return d


# ---- Normalisation, loss, optimiser ---------------------------------------------------------------------------------


def layer_norm(
    x: Array, weight: Array, bias: Array | None, eps: float, center: bool = True
) -> tuple[Array, Array, Array]:
    """y, mean, rstd. Source: Ba et al. 2016, equation 4."""
    x = x.astype(float)
    mean = x.mean(axis=1) * center
    rstd = 1 / np.sqrt(((x - mean[:, None]) ** 2).mean(axis=1) + eps)
    y = (x - mean[:, None]) * rstd[:, None] * weight
    return y if bias is None else y + bias, mean, rstd


def layer_norm_grad(
    dy: Array, x: Array, weight: Array, mean: Array, rstd: Array, center: bool = True
) -> tuple[Array, Array, Array]:
    """dx, dweight, dbias."""
    hat = (x.astype(float) - mean[:, None]) * rstd[:, None]
    dhat = dy.astype(float) * weight
    dx = rstd[:, None] * (
        dhat - center * dhat.mean(1, keepdims=True) - hat * (dhat * hat).mean(1, keepdims=True)
    )
    return dx, (dy * hat).sum(0), dy.astype(float).sum(0)


def cross_entropy(
    logits: Array, labels: Array, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Loss of each row, and its gradient; rows with a negative label have none."""
    z = logits.astype(float)
    largest = z.max(1, keepdims=True)
    lse = largest + np.log(np.exp(z - largest).sum(1, keepdims=True))
    seen = labels >= 0
    target = np.zeros(z.shape)
    target[np.arange(len(labels)), np.where(seen, labels, 0)] = 1 - smoothing
    target += smoothing / z.shape[1]
    with np.errstate(invalid="ignore"):  # 0 · ∞ is nothing here: what is no target is not asked for
        loss = -np.where(target > 0, target * (z - lse), 0).sum(1) + z_loss * lse[:, 0] ** 2
    d = np.exp(z - lse) * (1 + 2 * z_loss * lse) - target
    return np.where(seen, loss, 0), d * seen[:, None]


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    clip: float,
    lr: float,
    step: int,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[Array, Array, Array]:
    """p, m, v. Source: Loshchilov and Hutter 2019, algorithm 2."""
    g = g.astype(float) * clip
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    update = m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)
    return p * (1 - lr * decay) - lr * update, m, v


# ---- Attention ------------------------------------------------------------------------------------------------------


class Attention:
    """Dense attention and its gradient. q [B, T, H, D]; k, v [B, T, K, D]; segments [B, T]; factors [B, H, T, T]."""

    def __init__(
        self, q: Array, k: Array, v: Array, scale: float, *, causal: bool = False, window: int | None = None,
        segments: Array | None = None, key_bias: Array | None = None, prefix: Array | None = None,
        factors: Array | None = None,
    ) -> None:  # fmt: skip
        self.q, group = q.astype(float), q.shape[2] // k.shape[2]
        self.k, self.v = (np.repeat(x.astype(float), group, axis=2) for x in (k, v))
        self.kv_shape, self.scale = k.shape, scale
        t = q.shape[1]
        i, j = np.arange(t)[:, None], np.arange(t)
        open_keys = np.zeros((q.shape[0], 1, 1, 1)) if prefix is None else np.reshape(prefix, (-1, 1, 1, 1))
        seen = ((j <= i) | (not causal) | (j < open_keys)) & (abs(i - j) < (window or t))
        if segments is not None:
            own, other = segments[:, None, :, None], segments[:, None, None, :]
            seen = seen & (other != 0) & ((own == other) | (own == 0))
        scores = scale * np.einsum("bihd,bjhd->bhij", self.q, self.k)
        if key_bias is not None:
            scores = scores + key_bias[:, :, None, :]
        scores = np.where(seen, scores, -np.inf)
        largest = scores.max(-1, keepdims=True)
        largest[np.isneginf(largest)] = 0
        with np.errstate(divide="ignore"):
            self.lse = largest[..., 0] + np.log(np.exp(scores - largest).sum(-1))
        self.p = np.exp(scores - np.where(np.isneginf(self.lse), 0, self.lse)[..., None])
        # A query that sees nothing averages all values, whatever the scores.
        self.blind = np.isneginf(self.lse)
        self.p[self.blind] = 1 / t
        self.factors = np.ones_like(self.p) if factors is None else factors
        self.out = np.einsum("bhij,bjhd->bihd", self.p * self.factors, self.v)

    def gradient(self, dout: Array) -> tuple[Array, Array, Array]:
        """dq, dk, dv."""
        dout = dout.astype(float)
        dv = np.einsum("bhij,bihd->bjhd", self.p * self.factors, dout)
        dp = self.factors * np.einsum("bihd,bjhd->bhij", dout, self.v)
        ds = self.p * (dp - (self.p * dp).sum(-1, keepdims=True)) * self.scale * ~self.blind[..., None]
        dq, dk = np.einsum("bhij,bjhd->bihd", ds, self.k), np.einsum("bhij,bihd->bjhd", ds, self.q)
        b, t, heads, d = self.kv_shape
        return dq, dk.reshape(b, t, heads, -1, d).sum(3), dv.reshape(b, t, heads, -1, d).sum(3)


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    rows: Array,
    start: Array,
    count: Array,
    scale: float,
    window: int | None,
    key_bias: Array | None = None,
) -> Array:
    """out [B, T, H, D] of q likewise over caches [R, S, K, D], position p of sequence b in cache row rows[b, p]."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t in np.ndindex(q.shape[:2]):
        end = start[b] + t + 1
        p = np.arange(max(0, end - (window or end)), end)
        if t >= count[b]:
            continue
        for h in range(q.shape[2]):
            keys, values = (x[rows[b, p], p, h // group].astype(float) for x in (k, v))
            s = scale * keys @ q[b, t, h] + (0 if key_bias is None else key_bias[h, p])
            w = np.exp(s - s.max())
            out[b, t, h] = w @ values / w.sum()
    return out


def best(x: Array, temperature: Array, count: int) -> tuple[Array, Array, Array]:
    """The `count` greatest of each row of x [R, V], of equals the first, their columns, and the masses [R, 2] of all
    beside the greatest, as they are and at temperature [R]. Quotients are rounded to float32, as the host's are."""
    order = np.argsort(-x, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(x, order, 1)
    with np.errstate(invalid="ignore"):
        cold, hot = (
            np.exp(y.astype(float) - y.max(1, keepdims=True)).sum(1)
            for y in (x, (x / temperature[:, None]).astype(np.float32))
        )
    return values, order, np.stack([cold, hot], 1)


class RelativeAttention:
    """Dense attention with relative positions and kinds, and its gradient. q_k, q_r, q_s [B, T, H, D],
    k, v [B, S, H, D], r [S + U, H, D], kinds [2, H, D], at [B, T], q_kinds [B, U], k_kinds [B, S], hidden [B, U, U]
    or None, factors [B, H, T, S]. Source: Yang et al. 2019, sections 2.3 and 2.5."""

    def __init__(
        self, x: dict[str, Array], scale: float, sees_itself: bool = True, factors: Array | None = None
    ) -> None:
        f = {n: x[n].astype(float) for n in ("q_k", "q_r", "q_s", "k", "v", "r", "kinds")}
        self.f, self.scale = f, scale
        at = x["at"]
        batch, places, keys = len(at), x["q_kinds"].shape[1], x["k"].shape[1]
        self.stands, j = (at >= 0)[:, None, :, None], np.arange(keys)
        p = np.maximum(at, 0)
        # Row of r, and kind, of each pair [B, T, S].
        self.rows = places - p[:, :, None] + j
        self.other = (np.take_along_axis(x["q_kinds"], p, 1)[:, :, None] != x["k_kinds"][:, None]).astype(int)
        content = np.einsum("bihd,bjhd->bhij", f["q_k"], f["k"])
        position = np.einsum("bihd,bijhd->bhij", f["q_r"], f["r"][self.rows])
        kind = np.einsum("bihd,bijhd->bhij", f["q_s"], f["kinds"][self.other])
        scores = scale * (content + position + kind)
        own = j - (keys - places)
        if x["hidden"] is not None:
            unseen = x["hidden"][np.arange(batch)[:, None, None], p[:, :, None], np.maximum(own, 0)] != 0
            unseen &= (own >= 0) & ~(sees_itself & (own == p[:, :, None]))
            scores = np.where(unseen[:, None], -1e30, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        # What the kernels keep of each query between their launches.
        self.largest = (scores.max(-1, keepdims=True) * self.stands)[..., 0]
        self.inverse = (self.stands / weights.sum(-1, keepdims=True))[..., 0]
        self.p = weights * self.inverse[..., None]
        self.factors = np.ones_like(self.p) if factors is None else factors
        self.out = np.einsum("bhij,bjhd->bihd", self.p * self.factors, f["v"])

    def gradient(self, dout: Array) -> dict[str, Array]:
        """By operand."""
        f, dout = self.f, dout.astype(float)
        dp = self.factors * np.einsum("bihd,bjhd->bhij", dout, f["v"])
        self.delta = (self.p * dp).sum(-1)
        self.ds = ds = self.scale * self.p * (dp - self.delta[..., None])
        dr, dkinds = np.zeros_like(f["r"]), np.zeros_like(f["kinds"])
        np.add.at(dr, self.rows, np.einsum("bhij,bihd->bijhd", ds, f["q_r"]))
        np.add.at(dkinds, self.other, np.einsum("bhij,bihd->bijhd", ds, f["q_s"]))
        return {
            "q_k": np.einsum("bhij,bjhd->bihd", ds, f["k"]),
            "q_r": np.einsum("bhij,bijhd->bihd", ds, f["r"][self.rows]),
            "q_s": np.einsum("bhij,bijhd->bihd", ds, f["kinds"][self.other]),
            "k": np.einsum("bhij,bihd->bjhd", ds, f["q_k"]),
            "v": np.einsum("bhij,bihd->bjhd", self.p * self.factors, dout),
            "r": dr,
            "kinds": dkinds,
        }
