"""Comparisons that the tests of attention and of planted bugs share."""

import numpy as np

from kernels import launches as run
from kernels import reference


def attention_operands(rng, batch, tokens, heads, kv_heads, width):
    """q, k, v, dout, of numbers that bfloat16 holds, and float16 nearly."""
    q, dout = (rng.normal(size=(batch, tokens, heads, width)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(batch, tokens, kv_heads, width)).astype(np.float32) for _ in range(2))
    return tuple(run.rounded(x, "bf16") for x in (q, k, v, dout))


#: bfloat16 keeps eight bits: results and factors are off by up to 1 / 512 of themselves, sums of many factors by less.
#: float16 keeps eleven.
TOLERANCES = {"bf16": (1.5e-2, 1.5e-2), "f16": (2e-3, 2e-3), "": (3e-6, 1e-5)}


def attention(device, close, q, k, v, dout, *, site=None, layout=run.PLAIN, half="", **mask):
    """Forward, and backward if there is a dout, against the dense definition."""
    tolerances = TOLERANCES[half]
    scale = q.shape[3] ** -0.5
    batch, tokens, heads, _ = q.shape
    factors = None
    if site is not None:
        shape = (batch, heads, tokens, tokens)
        factors = reference.keep(site.rng, site.stream, site.p, int(np.prod(shape))).reshape(shape)
    dense = reference.Attention(q, k, v, scale, factors=factors, **mask)
    got = run.attention(device, q, k, v, scale, dout=dout, site=site, layout=layout, half=half, **mask)
    close(got["out"], dense.out, tolerances[0])
    close(got["lse"], dense.lse, tolerances[0])
    if dout is None:
        return
    for name, want in zip(("dq", "dk", "dv"), dense.gradient(dout), strict=True):
        close(got[name], want, tolerances[1])


def relative_operands(rng, batch, tokens, keys, places, heads, width, hidden=True):
    """Queries at random places, one of them nowhere; the last `places` keys are the sequence's own."""

    def normal(*shape):
        return rng.normal(size=(*shape, heads, width)).astype(np.float32)

    x = {name: normal(batch, tokens) for name in ("q_k", "q_r", "q_s")}
    x |= {name: normal(batch, keys) for name in ("k", "v")}
    x |= {"r": normal(keys + places), "kinds": normal(2), "at": rng.integers(places, size=(batch, tokens))}
    x["at"][0, -1] = -1
    x["q_kinds"] = rng.integers(2, size=(batch, places))
    x["k_kinds"] = rng.integers(2, size=(batch, keys))
    x["hidden"] = (rng.random((batch, places, places)) < 0.4).astype(int) if hidden else None
    return x


def relative_attention(device, close, x, dout, *, sees_itself=True, site=None, layout=run.PLAIN):
    scale = x["q_k"].shape[3] ** -0.5
    factors = None
    if site is not None:
        batch, tokens, heads, _ = x["q_k"].shape
        shape = (batch, heads, tokens, x["k"].shape[1])
        factors = reference.keep(site.rng, site.stream, site.p, int(np.prod(shape))).reshape(shape)
    dense = reference.RelativeAttention(x, scale, sees_itself, factors)
    got = run.relative_attention(
        device, x, scale, sees_itself=sees_itself, dout=dout, site=site, layout=layout
    )
    close(got["out"], dense.out)
    for name, want in dense.gradient(dout).items():
        close(got[name], want, 1e-5)
