"""Comparisons that the tests of attention and of planted bugs share."""

import numpy as np

from kernels import launches as run
from kernels import reference


def attention_operands(rng, batch, tokens, heads, kv_heads, width):
    q, dout = (rng.normal(size=(batch, tokens, heads, width)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(batch, tokens, kv_heads, width)).astype(np.float32) for _ in range(2))
    return q, k, v, dout


def attention(device, close, q, k, v, dout, *, site=None, layout=run.PLAIN, **mask):
    """Forward, and backward if there is a dout, against the dense definition."""
    scale = q.shape[3] ** -0.5
    batch, tokens, heads, _ = q.shape
    factors = None
    if site is not None:
        shape = (batch, heads, tokens, tokens)
        factors = reference.keep(site.rng, site.stream, site.p, int(np.prod(shape))).reshape(shape)
    dense = reference.Attention(q, k, v, scale, factors=factors, **mask)
    got = run.attention(device, q, k, v, scale, dout=dout, site=site, layout=layout, **mask)
    close(got["out"], dense.out)
    close(got["lse"], dense.lse)
    if dout is None:
        return
    for name, want in zip(("dq", "dk", "dv"), dense.gradient(dout), strict=True):
        close(got[name], want, 1e-5)
