"""Bugs planted into the kernels, each of which the checks must find: by a fault, or by wrong numbers."""

# ruff: noqa: E501 (rows of the table quote kernels)

import functools
import re

import numpy as np
import pytest
import sim
from kernels import launches as run
from kernels import nvrtc, reference
from kernels.checks import attention as check_attention
from kernels.checks import attention_operands, relative_operands
from kernels.checks import relative_attention as check_relative
from kernels.narrow import Narrow

CROOKED = run.LAYOUTS["crooked"]


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


# ---- What each planted bug must get past ----------------------------------------------------------------------------


def elementwise(device, rng, close):
    x = normal(rng, 6, 5)
    close(run.scale(device, x, 2.0, CROOKED), 2.0 * x)
    close(run.binary(device, "add", x, normal(rng, 2, 5) * 0 + x[:2]), x + np.tile(x[:2], (3, 1)))


def in_bfloat16(device, rng, close, half="bf16"):
    device = Narrow(device, half)
    x, y = device.rounded(normal(rng, 6, 24)), device.rounded(normal(rng, 2, 24))
    for layout in (run.PLAIN, CROOKED):
        got = run.binary(device, "add", x, y, layout)
        device.near(got, x.astype(float) + np.tile(y, (3, 1)))
        np.testing.assert_array_equal(
            run.narrow(device, x + 1e-3, layout), device.rounded(x + np.float32(1e-3))
        )
        np.testing.assert_array_equal(run.widen(device, x, layout), x)
        np.testing.assert_array_equal(run.narrow(device, x[:1, :21], layout), x[:1, :21])


def layer_norm_in_bfloat16(device, rng, close):
    device = Narrow(device)
    for cols in (309, 296):
        x, w = device.rounded(normal(rng, 5, cols)), normal(rng, cols)
        got, want = run.layer_norm(device, x, w, None, 1e-5), reference.layer_norm(x, w, None, 1e-5)
        device.near(got[0], want[0])
        close(got[2], want[2], 1e-5)


def rows_in_bfloat16(device, rng, close):
    device = Narrow(device)
    table, source = normal(rng, 3, 69), device.rounded(normal(rng, 40, 300))
    got = run.gather_narrow(device, table, np.array([2, 0, 1]))
    np.testing.assert_array_equal(got, device.rounded(table)[[2, 0, 1]])
    base, index = np.zeros((4, 300), np.float32), rng.integers(4, size=40)
    want = base.copy()
    for n, r in enumerate(index):
        want[r] += source[n]
    np.testing.assert_array_equal(run.scatter_add(device, source, index, base), want)


def loss_in_bfloat16(device, rng, close):
    device = Narrow(device)
    z, labels = device.rounded(3 * normal(rng, 3, 2070) - 15), np.array([2069, 7, -1])
    loss, d = reference.cross_entropy(z, labels)
    for layout in (run.PLAIN, CROOKED):
        got = run.cross_entropy(device, z, labels, None, 0.5, layout)
        close(got[0], loss, 1e-5)
        device.near(got[1], 0.5 * d)


def sums_in_bfloat16(device, rng, close):
    device = Narrow(device)
    x = device.rounded(normal(rng, 35, 40))
    got = run.sum_to(device, x, 1, 16, CROOKED)
    close(got, x.astype(float).sum(0, keepdims=True))


def rope_in_bfloat16(device, rng, close):
    device = Narrow(device)
    x, table = device.rounded(normal(rng, 4, 6)), np.array([[0, 0, 1, 1]] * 4, np.float32)
    want = np.concatenate([-x[:, 2:4], x[:, :2], x[:, 4:]], 1)
    device.near(run.rope(device, x, table, 1, False), want)


def gelu_tanh(device, rng, close):
    x, dy = normal(rng, 3, 9), normal(rng, 3, 9)
    want = reference.slope(reference.UNARY["gelu_tanh"], x.astype(float)) * dy
    close(run.unary_grad(device, "gelu_tanh", x, dy, over="dy"), want)


def gated(device, rng, close):
    gate, up, dy = normal(rng, 3, 9), normal(rng, 3, 9), normal(rng, 3, 9)
    f, z = reference.UNARY["silu"], gate.astype(float)
    close(run.gated(device, "silu", gate, up, CROOKED), f(z) * up)
    got = run.gated_grad(device, "silu", dy, gate, up, CROOKED, ("dy", "gate"))
    for x, want in zip(got, (reference.slope(f, z) * dy * up, f(z) * dy), strict=True):
        close(x, want)


def dropout(device, rng, close):
    x, residual, state = normal(rng, 9, 7), normal(rng, 9, 7), np.array([1, 2, 3, 4])
    for layout in (run.PLAIN, CROOKED):
        want = x * reference.keep(state, 3, 0.4, 63).reshape(9, 7)
        close(run.dropout(device, x, state, 0.4, 3, layout), want)
        for over in ("x", "residual"):
            close(run.dropout(device, x, state, 0.4, 3, layout, residual, over), want + residual)


def layer_norm(device, rng, close):
    for cols, warps, layout in (
        (69, 1, CROOKED),
        (69, 1, run.Layout(3)),
        (136, 1, run.PLAIN),
        (136, 2, run.PLAIN),
    ):
        x, w, b = normal(rng, 5, cols), normal(rng, cols), normal(rng, cols)
        got = run.layer_norm(device, x, w, b, 1e-5, layout, warps=warps)
        for g, want in zip(got, reference.layer_norm(x, w, b, 1e-5), strict=True):
            close(g, want)


def layer_norm_grad(device, rng, close):
    for cols, warps, layout in (
        (33, 1, CROOKED),
        (33, 1, run.Layout(3)),
        (136, 1, run.PLAIN),
        (136, 2, run.PLAIN),
    ):
        x, dy, r, w = (normal(rng, *shape) for shape in ((35, cols),) * 3 + ((cols,),))
        _, mean, rstd = (z.astype(np.float32) for z in reference.layer_norm(x, w, None, 1e-5))
        dx, dw, db = reference.layer_norm_grad(dy, x, w, mean, rstd)
        for over in ("dy", "residual"):
            got = run.layer_norm_grad(device, dy, x, w, mean, rstd, r, layout, over, chunk=12, warps=warps)
            for g, want in zip(got, (dx + r, dw, db), strict=True):
                close(g, want)


def gather(device, rng, close):
    table = normal(rng, 3, 5)
    got = run.gather(device, table, np.array([2, 0, 3, -1]))
    close(got[:2], table[[2, 0]])
    assert np.isnan(got[2:]).all()


def scatter_add(device, rng, close):
    source, base, index = normal(rng, 70, 5), normal(rng, 9, 5), rng.integers(9, size=70)
    want = base.copy()
    for n, r in enumerate(index):
        want[r] += source[n]
    np.testing.assert_array_equal(run.scatter_add(device, source, index, base), want)


def count_labels(device, rng, close):
    assert run.count_labels(device, np.arange(-50, 300)) == 300


def cross_entropy(device, rng, close):
    z = 3 * normal(rng, 4, 1030) - 15
    z[1, 1029] = 9  # the largest comes last, in another thread's second round
    for labels in (np.array([0, 5, 1029, -1]), np.array([1026, -7, 3, 2])):
        loss, d = reference.cross_entropy(z, labels)
        close(run.cross_entropy(device, z, labels, None, None)[0], loss)
        got = run.cross_entropy(device, z, labels, None, 0.5, CROOKED)
        close(got[0], loss)
        close(got[1], 0.5 * d)


def sum_to(device, rng, close):
    x = normal(rng, 35, 40)
    close(run.sum_to(device, x, 1, 16, CROOKED), x.astype(float).sum(0, keepdims=True))


def global_norm(device, rng, close):
    # More tensors than a block has threads to look for its own.
    g = [normal(rng, 5, 70), normal(rng, 3, 3), *(normal(rng, 1, 1) for _ in range(260))]
    want = np.sqrt(sum((x.astype(float) ** 2).sum() for x in g))
    norm = run.global_norm(device, g, 100, CROOKED)
    close(device.read(norm), [want])
    close(device.read(run.clip_factor(device, norm, 1.0)), [1 / (want + 1e-6)])


def halt(device, rng, close):
    word, x = device.array([0], np.int32), normal(rng, 2, 5)
    for value in (np.inf, 1.0):
        norm = device.read(run.global_norm(device, [np.full((1, 3), value, np.float32)], 9, halt=word))
        assert not np.isfinite(norm)[0]
        assert device.read(word)[0] == 1
    assert (run.binary(device, "add", x, x, in_place=True, halt=word) == x).all()
    assert not run.broadcast(device, x, x.shape, halt=word).any()
    got = run.adamw(device, x, x, x, x * x, 1.0, 0.1, 1, (0.9, 0.95), 1e-8, 0.1, halt=word)
    assert all((new == old).all() for new, old in zip(got, (x, x, x * x), strict=True))


def adamw(device, rng, close):
    settings = {"clip": 0.5, "lr": 0.01, "step": 3, "betas": (0.9, 0.999), "eps": 1e-3}
    # The second has more than one block.
    tensors = [tuple(np.abs(normal(rng, *shape)) for _ in range(4)) for shape in ((3, 7), (600, 7), (2, 4))]
    decays, copies = [0.1, 0.0, 0.3], ["bf16", "", "bf16"]
    found = run.adamw_of_all(device, tensors, **settings, decays=decays, layout=CROOKED, copies=copies)
    for got, tensor, decay, copy in zip(found, tensors, decays, copies, strict=True):
        for x, y in zip(got, reference.adamw(*tensor, **settings, decay=decay), strict=False):
            close(x, y)
        if copy:
            np.testing.assert_array_equal(got[3], run.rounded(got[0], "bf16"))


def rounded_adamw(device, rng, close):
    settings = {"clip": 0.5, "lr": 0.01, "step": 3, "betas": (0.9, 0.999), "eps": 1e-3}
    tensors = [tuple(np.abs(normal(rng, *shape)) for _ in range(4)) for shape in ((60, 7), (9, 8), (5, 6))]
    tensors = [(run.rounded(p, "bf16"), g, m, v) for p, g, m, v in tensors]
    tensors[1][2][0, :4] = np.inf  # so that weights become infinite, or no number
    tensors[1][2][1, :4] = np.nan
    state, streams = np.array([5, 6, 7, 8], np.int32), [1, 2, 3]
    for layout in (run.PLAIN, CROOKED):
        plain = run.adamw_of_all(device, tensors, **settings, decays=[0.1] * 3, layout=layout)
        for narrow in ([True, False, True], [False, True, False]):
            options = {"layout": layout, "chance": run.Chance(state, streams, narrow)}
            found = run.adamw_of_all(device, tensors, **settings, decays=[0.1] * 3, **options)
            for got, exact, stream in zip(found, plain, streams, strict=True):
                words = reference.words(state, stream, 0xB16F, exact[0].size).reshape(exact[0].shape)
                np.testing.assert_array_equal(got[0], reference.by_chance(exact[0], words))


def attention(device, rng, close, backward=False):
    site = run.Site(np.array([1, 2, 3, 4]), 9, 0.2)
    segments = np.array([[1] * 20 + [0] * 2 + [1] * 40 + [2] * 7])
    x = attention_operands(rng, 1, 69, 2, 1, 36)
    check_attention(
        device,
        close,
        *x[:3],
        x[3] if backward else None,
        causal=True,
        window=50,
        segments=segments,
        site=site,
    )


def attention_grad(device, rng, close):
    attention(device, rng, close, backward=True)


def tensor_cores(device, rng, close, half="bf16"):
    site, segments = (
        run.Site(np.array([1, 2, 3, 4]), 9, 0.2),
        np.array([[1] * 20 + [0] * 2 + [1] * 40 + [2] * 7]),
    )
    x = attention_operands(rng, 1, 69, 2, 1, 40)
    x[1][0, 60] *= 3  # a large score comes late
    check_attention(device, close, *x, causal=True, window=50, segments=segments, site=site, half=half)


def blind_tensor_cores(device, rng, close):
    x = attention_operands(rng, 1, 70, 2, 1, 8)
    check_attention(device, close, *x, causal=True, segments=np.array([[0] * 66 + [1] * 4]), half="bf16")


def tensor_tiles(device, rng, close):
    """Without dropout or segments, so that some tiles are seen by all; key bias, a window, several heads and tiles."""
    x = attention_operands(rng, 1, 170, 2, 1, 8)
    check_attention(device, close, *x, causal=True, window=100, key_bias=normal(rng, 1, 2, 170), half="bf16")


def wide_tensor_cores(device, rng, close):
    check_attention(device, close, *attention_operands(rng, 1, 33, 2, 1, 216), causal=True, half="bf16")


def blind(device, rng, close):
    x = attention_operands(rng, 1, 70, 2, 1, 4)
    check_attention(device, close, *x, causal=True, segments=np.array([[0] * 66 + [1] * 4]))


def attention_of_wide_heads(device, rng, close):
    check_attention(device, close, *attention_operands(rng, 1, 5, 2, 1, 141)[:3], None, layout=CROOKED)


def cache_write(device, rng, close):
    cache, source = normal(rng, 2, 3, 5), normal(rng, 2, 2, 5)
    got = run.cache_write(
        device, cache, source, np.array([1, 0]), np.array([1, 0]), np.array([1, 2]), CROOKED
    )
    want = cache.copy()
    want[1, 1], want[0, :2] = source[0, 0], source[1]
    close(got, want)


def cached(device, rng, close):
    # More positions than teams.
    q, k, v = normal(rng, 2, 2, 2, 36), normal(rng, 3, 31, 1, 36), normal(rng, 3, 31, 1, 36)
    operands = q, k, v, rng.integers(3, size=(2, 31)), np.array([0, 29]), np.array([1, 2]), 0.3, 25
    close(run.cached_attention(device, *operands), reference.cached_attention(*operands))


def cached_spans(device, rng, close):
    q, k, v = normal(rng, 2, 2, 2, 36), normal(rng, 3, 9, 1, 36), normal(rng, 3, 9, 1, 36)
    operands = q, k, v, rng.integers(3, size=(2, 9)), np.array([0, 7]), np.array([1, 2]), 0.3, 7
    close(run.cached_attention(device, *operands, span=3), reference.cached_attention(*operands))


def best(device, rng, close):
    x, t = rng.integers(-20, 20, size=(2, 200)).astype(np.float32) / 8, np.array([0.5, 1], np.float32)
    got, want = run.best(device, x, t, 9, most=64), reference.best(x, t, 9)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=1e-13)


def cached_bias(device, rng, close):
    q, k, v = normal(rng, 1, 2, 2, 8), normal(rng, 2, 9, 1, 8), normal(rng, 2, 9, 1, 8)
    operands = q, k, v, rng.integers(2, size=(1, 9)), np.array([5]), np.array([2]), 0.3, None
    bias = normal(rng, 2, 9)
    close(run.cached_attention(device, *operands, key_bias=bias), reference.cached_attention(*operands, bias))


def rms_norm(device, rng, close):
    x, dy, w = normal(rng, 5, 69) + 2, normal(rng, 5, 69), normal(rng, 69)
    want = reference.layer_norm(x, w, None, 1e-5, center=False)
    for got, z in zip(run.layer_norm(device, x, w, None, 1e-5, center=False), want, strict=True):
        close(got, z)
    _, mean, rstd = (z.astype(np.float32) for z in want)
    dx, dw, _ = reference.layer_norm_grad(dy, x, w, mean, rstd, center=False)
    got = run.layer_norm_grad(device, dy, x, w, mean, rstd, center=False)
    close(got[0], dx)
    close(got[1], dw)


def rope(device, rng, close):
    positions, frequencies = np.array([0, -3, 131071]), [1.0, 0.1, 3e-4]
    angle = positions[:, None] * np.array(frequencies)
    want = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    table = run.rope_table(device, positions, frequencies, 1.0)
    close(table, want, 2e-6)
    x = normal(rng, 3, 2 * 7)
    heads = x.reshape(3, 2, 7).astype(float)
    c, s = want[:, None, :3], want[:, None, 3:]
    a, b = heads[..., :3], heads[..., 3:6]
    turned = np.concatenate([a * c - b * s, b * c + a * s, heads[..., 6:]], axis=-1).reshape(3, 14)
    close(run.rope(device, x, table, 2, False, CROOKED), turned)
    close(run.rope(device, turned.astype(np.float32), table, 2, True, in_place=True), x)


def alibi(device, rng, close):
    positions, slopes = np.array([[0, 300, 514], [9, 1000, 3]]), np.array([0.5, 0.0883883], np.float32)
    want = 0.25 * (slopes[None, :, None] * positions[:, None].astype(float)).reshape(4, 3)
    close(run.alibi_bias(device, positions, slopes, 0.25, False, CROOKED), want)
    assert run.alibi_bias(device, positions, slopes, 0.25, True)[0, 2] == 0.25 * 0.5 * 512


def iota(device, rng, close):
    np.testing.assert_array_equal(run.iota(device, 300, -3, 2), -3 + 2 * np.arange(300))


def key_bias(device, rng, close):
    x = attention_operands(rng, 1, 69, 2, 1, 4)
    bias, prefix = normal(rng, 1, 2, 69), np.array([66])
    check_attention(device, close, *x, causal=True, window=66, key_bias=bias, prefix=prefix)


def both_ways(device, rng, close):
    check_attention(device, close, *attention_operands(rng, 1, 130, 1, 1, 4), window=3)


def activations(device, rng, close):
    x, dy = normal(rng, 3, 9), normal(rng, 3, 9)
    for name in ("quick_gelu", "relu2", "mish"):
        close(run.unary(device, name, x), reference.UNARY[name](x.astype(float)))
        want = reference.slope(reference.UNARY[name], x.astype(float)) * dy
        close(run.unary_grad(device, name, x, dy), want)


def relative(device, rng, close):
    x = relative_operands(rng, 1, 4, 7, 5, 2, 6)
    x["at"][0, :2] = [0, 4]
    check_relative(device, close, x, normal(rng, 1, 4, 2, 6), site=run.Site(np.array([1, 2, 3, 4]), 9, 0.2))


def relative_long(device, rng, close):
    x = relative_operands(rng, 1, 2, 131, 3, 1, 2)
    x["hidden"] = None
    x["k"][0, 130] = 4 * x["q_k"][0, 0]  # the largest score comes last, in the second round
    check_relative(device, close, x, normal(rng, 1, 2, 1, 2))


def relative_spread(device, rng, close):
    """Queries anywhere among many places: their tile meets each tile of keys at many distances."""
    x = relative_operands(rng, 1, 70, 150, 140, 1, 2)
    check_relative(device, close, x, normal(rng, 1, 70, 1, 2))


def relative_wide(device, rng, close):
    check_relative(device, close, relative_operands(rng, 1, 2, 3, 2, 1, 141), normal(rng, 1, 2, 1, 141))


def relative_queries(device, rng, close):
    check_relative(device, close, relative_operands(rng, 1, 130, 3, 2, 1, 2), normal(rng, 1, 130, 1, 2))


def roots_and_signs(device, rng, close):
    x, dy = np.abs(normal(rng, 3, 9)) + 0.1, normal(rng, 3, 9)
    close(run.unary_grad(device, "sqrt", x, dy), dy / (2 * np.sqrt(x.astype(float))))
    close(run.unary(device, "sign", dy), np.sign(dy))


def smoothed(device, rng, close):
    z, labels = normal(rng, 3, 9) + 5, np.array([0, -1, 8])
    loss, d = reference.cross_entropy(z, labels, 0.2, 0.01)
    got = run.cross_entropy(device, z, labels, None, 0.5, CROOKED, 0.2, 0.01)
    close(got[0], loss)
    close(got[1], 0.5 * d)


CASES = {f.__name__: f for f in (
    elementwise, gelu_tanh, gated, dropout, layer_norm, layer_norm_grad, gather, scatter_add, count_labels, cross_entropy, sum_to,
    global_norm, halt, adamw, rounded_adamw, attention, attention_grad, blind, tensor_cores,
    blind_tensor_cores, tensor_tiles, wide_tensor_cores, attention_of_wide_heads, best, cache_write, cached,
    cached_spans, cached_bias, rms_norm, rope, alibi, iota, key_bias, both_ways, activations, relative, relative_long,
    relative_queries, relative_spread, relative_wide, roots_and_signs, smoothed, in_bfloat16,
    layer_norm_in_bfloat16, rows_in_bfloat16, loss_in_bfloat16, sums_in_bfloat16, rope_in_bfloat16,
)}  # fmt: skip
CASES |= {
    "in_float16": functools.partial(in_bfloat16, half="f16"),
    "tensor_cores_in_float16": functools.partial(tensor_cores, half="f16"),
    "older_tensor_cores": functools.partial(tensor_cores, half="f16"),
}

# ---- The bugs: case, file (and architecture), kernels to compile, text, replacement -----------------------------------

FORWARD, DQ, DKV = "attention_forward_f32", "attention_dq_backward_f32", "attention_dkv_backward_f32"
MUTANTS = [
    # Shared by all files.
    ("elementwise", "elementwise", "scale_forward_f32", "return n >= COLUMNS && (reinterpret_cast<unsigned long long>(p) & 15) == 0;", "return n >= COLUMNS;"),
    ("elementwise", "elementwise", "scale_forward_f32", "if (i < n) p[i] = v.x[i];", "p[i] = v.x[i];"),
    ("elementwise", "elementwise", "scale_forward_f32", "v.x[i] = i < n ? widen(p[i]) : 0.f;", "v.x[i] = widen(p[i]);"),
    ("layer_norm", "norm", "layer_norm_forward_f32", "for (int step = WARP / 2; step > 0; step /= 2) x += ", "for (int step = WARP / 4; step > 0; step /= 2) x += "),
    ("count_labels", "rows", "count_labels_forward_f32", "    __syncthreads();\n    x = totals[0];", "    x = totals[0];"),
    ("cross_entropy", "loss", "cross_entropy_", "    __syncthreads();\n    x = largest[0];", "    x = largest[0];"),
    ("gated", "elementwise", "gated_forward_f32", "value * load(at(up, g.row, up_ld, g.col), g.n)", "value * load(at(gate, g.row, gate_ld, g.col), g.n)"),
    ("gated", "elementwise", "gated_backward_f32", "store(at(dup, g.row, dup_ld, g.col), d * apply(act, x), g.n);", "store(at(dup, g.row, dup_ld, g.col), load(at(dy, g.row, dy_ld, g.col), g.n) * apply(act, x), g.n);"),
    ("gated", "elementwise", "gated_backward_f32", "through * apply_slope(act, x)", "d * apply_slope(act, x)"),
    ("dropout", "elementwise", "dropout_forward_f32", "round < 10", "round < 9"),
    ("dropout", "elementwise", "dropout_forward_f32", "make_uint4(a.z, a.w, b.x, b.y)", "make_uint4(a.z, a.w, b.y, b.x)"),
    ("dropout", "elementwise", "dropout_forward_f32", "words_of_block(draws, first / 4 + 1)", "words_of_block(draws, first / 4)"),
    ("dropout", "elementwise", "dropout_forward_f32", "(unsigned long long)g.row * cols + g.col", "(unsigned long long)g.row * x_ld + g.col"),
    ("dropout", "elementwise", "dropout_forward_f32", "if (residual) value = value + load(at(residual, g.row, residual_ld, g.col), g.n);", "if (residual) value = value + load(at(residual, g.row, residual_ld, 0), g.n);"),
    ("dropout", "elementwise", "dropout_forward_f32", "    store(at(y, g.row, y_ld, g.col), value, g.n);\n}\n\n// ---- The epi", "    store(at(y, g.row, y_ld, g.col), value, g.n);\n    if (residual) store(at(y, g.row, y_ld, g.col), value + load(at(residual, g.row, residual_ld, g.col), g.n), g.n);\n}\n\n// ---- The epi"),
    # Elementwise.
    ("elementwise", "elementwise", "scale_forward_f32", "if (i >= per_row * rows) return {0, 0, 0};", ""),
    ("elementwise", "elementwise", "scale_forward_f32", "return x + (long long)row * ld + col;", "return x + (long long)row * (ld - 3) + col;"),
    ("elementwise", "elementwise", "BINARY(", "at(b, g.row % b_rows, b_ld, 0)", "at(b, g.row, b_ld, 0)"),
    ("activations", "elementwise", "UNARY(", "s * (1.f + QUICK * x", "s * (1.f + x"),
    ("activations", "elementwise", "UNARY(", "2.f * Relu::f(x)", "Relu::f(x)"),
    ("activations", "elementwise", "UNARY(", "n / (n + 2.f)", "n / (n + 1.f)"),
    ("gelu_tanh", "elementwise", "UNARY(", "1.f + 3.f * GELU_CUBIC", "1.f + GELU_CUBIC"),
    ("roots_and_signs", "elementwise", "UNARY(", "0.5f / sqrtf(x)", "0.5f * sqrtf(x)"),
    ("roots_and_signs", "elementwise", "UNARY(", "x < 0.f ? -1.f : 0.f", "0.f"),
    # Normalisation.
    ("layer_norm", "norm", "layer_norm_forward_f32", "i < n ? v.x[i] - shift : 0.f", "v.x[i] - shift"),
    ("layer_norm", "norm", "layer_norm_forward_f32", "int mine = row < rows ? cols : 0;", "int mine = cols;"),
    ("layer_norm", "norm", "layer_norm_forward_f32", "cols % COLUMNS == 0 && rows_fit(x, x_ld)", "rows_fit(x, x_ld)"),
    ("layer_norm", "norm", "layer_norm_forward_f32", "int c = team.first + p * team.step;", "int c = team.first + p * (team.step - 4);"),
    ("layer_norm", "norm", "layer_norm_forward_f32", "for (; c < cols; c += team.step) f(", "for (; c < cols - 1; c += team.step) f("),
    ("layer_norm", "norm", "layer_norm_forward_f32", "    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < N; ++i) {\n        x[i] = totals", "#pragma unroll\n    for (int i = 0; i < N; ++i) {\n        x[i] = totals"),
    ("layer_norm", "norm", "layer_norm_forward_f32", "    __syncthreads();  // `totals` may", "    // `totals` may"),
    ("layer_norm", "norm", "layer_norm_forward_f32", "first = warp / warps * warps;", "first = 0;"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "along[1] * inverse / cols", "along[1] / cols"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "if (!holds) warps = WARPS;", ""),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "int mine = row < to ? cols : 0;", "int mine = row < rows ? cols : 0;"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "at > from ? load(dbias", "at > 0 ? load(dbias"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "dw[p].x[i] += gh.x[i];", "dw[p].x[i] = gh.x[i];"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "(which ? dbias : dweight)[c] = total;", "(which ? dweight : dbias)[c] = total;"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "            if (c >= cols) continue;\n", ""),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "for (int t = 0; t < team.count; ++t)", "for (int t = 0; t < team.count - 1; ++t)"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "        __syncthreads();\n#pragma unroll 1\n        for (int k", "#pragma unroll 1\n        for (int k"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "        __syncthreads();  // `sums` is used again", "        // `sums` is used again"),
    ("layer_norm_grad", "norm", "layer_norm_backward_f32", "parts + (long long)blockIdx.x * cols;", "parts;"),
    ("layer_norm_grad", "reduce", "sum_to_forward_f32", "x += (long long)copies * result_rows * x_ld;", ""),
    ("layer_norm_grad", "reduce", "sum_to_forward_f32", "y = other;", ""),
    ("rms_norm", "norm", "layer_norm_forward_f32", "    if (center) {\n", "    {\n"),
    ("rms_norm", "norm", "layer_norm_backward_f32", "center ? along[0] / cols : 0.f", "along[0] / cols"),
    # Positions.
    ("rope", "positions", "rope_", "__umulhi(position, turn.x) + ", ""),
    ("rope", "positions", "rope_", "scale) * sinpif", "scale) * cospif"),
    ("rope", "positions", "rope_", "(positions[n] < 0 ? -scale : scale)", "scale"),
    ("rope", "positions", "rope_forward_f32", "sine = sign * ", "sine = "),
    ("rope", "positions", "rope_forward_f32", "y[half + c] = x[half + c];\n        return;", "return;"),
    ("rope", "positions", "rope_forward_f32", "put(y + half + c, b * cosine + a * sine)", "put(y + half + c, b * cosine + y[c] * sine)"),
    ("alibi", "positions", "alibi_bias_forward_f32", "((bits >> 16) & 1u)", "1u"),
    ("alibi", "positions", "alibi_bias_forward_f32", "slopes[r % heads]", "slopes[r / heads]"),
    ("iota", "positions", "iota_forward_f32", "if (n < rows) ", ""),
    # Rows.
    ("gather", "rows", "gather_forward_f32", "from >= 0 && from < table_rows", "from < table_rows"),
    ("scatter_add", "rows", "scatter_add_forward_f32", "if (__ballot_sync(ALL_LANES, earlier)) return;", "__ballot_sync(ALL_LANES, earlier);"),
    ("scatter_add", "rows", "scatter_add_forward_f32", "from + lane < row && index", "from + lane <= row && index"),
    ("scatter_add", "rows", "scatter_add_forward_f32", "found &= found - 1", "found = 0"),
    # Loss.
    ("cross_entropy", "loss", "cross_entropy_", "sum = sum * expf(largest - shift) + sum_of(z)", "sum = sum + sum_of(z)"),
    ("cross_entropy", "loss", "cross_entropy_", "z.x[i] -= v + i == label", "z.x[i] -= v + (i & 1) == label"),
    ("cross_entropy", "loss", "cross_entropy_forward_f32", "if (label < 0 || label >= classes)", "if (label >= classes)"),
    ("cross_entropy", "loss", "cross_entropy_", "z.x[i] = i < n ? z.x[i] : -INFINITY", "z.x[i] = i != 2 || i < n ? z.x[i] : z.x[1]"),
    ("smoothed", "loss", "cross_entropy_", "scale *= 1.f - smoothing;", ""),
    ("smoothed", "loss", "cross_entropy_", "1.f + 2.f * z_loss", "1.f + z_loss"),
    ("smoothed", "loss", "cross_entropy_", "smoothing * (target - mean)", "smoothing * target"),
    # Relative attention.
    ("relative", "relative", "relative_", 'from + 4 * tx + j - x.places + p - key0', 'from + 4 * tx + j - x.places - p - key0'),
    ("relative", "relative", "relative_", 'if (sees_itself && own + n == p)', 'if (own + n == p - 1)'),
    ("relative", "relative", "relative_", 'if (p >= x.places) p = -1;\n        if (kind == 0) shared.places[i] = p,', 'if (kind == 0) shared.places[i] = max(p, 0),'),
    ("relative", "relative", "relative_attention_forward", 'shared.kinds[i] != kind', 'shared.kinds[i] == kind'),
    ("relative", "relative", "relative_attention_forward", 'largest[i] == -INFINITY ? 0.f : 1.f / denominator[i]', '1.f / denominator[i]'),
    ("relative", "relative", "relative_attention_dq", 'other[i] += p[i][j];\n                        else same[i] += p[i][j];', 'same[i] += p[i][j];\n                        else other[i] += p[i][j];'),
    ("relative", "relative", "relative_attention_dq", 'expf(p[i][j] - above[i]) * total[i]', 'expf(p[i][j] - above[i])'),
    ("relative", "relative", "relative_attention_dq", 'clear_weights(shared);\n#pragma unroll\n                for (int i = 0; i < 4; ++i) {\n                    int place', '__syncthreads();\n#pragma unroll\n                for (int i = 0; i < 4; ++i) {\n                    int place'),
    ("relative", "relative", "relative_attention_dkv", 'p[i][j] = weight * factors[i];', 'p[i][j] = weight;'),
    ("relative_spread", "relative", "relative_attention_dr", 'distance < 0 || distance >= TILE) continue;', 'distance < 0) continue;'),
    ("relative_queries", "relative", "relative_attention_dkinds", 'n < 8; ++n) sum', 'n < 7; ++n) sum'),
    ("relative", "relative", "relative_attention_dkinds", '    __syncthreads();\n    if (threadIdx.y', '    if (threadIdx.y'),
    ("relative_long", "relative", "relative_attention_forward", 'sum[part][i][j] *= correction;', 'sum[part][i][j] *= 1.f;'),
    ("relative_long", "relative", "relative_attention_dq", 'along[i] = along[i] * correction + ', 'along[i] = along[i] + '),
    ("relative_queries", "relative", "relative_attention_dkv", '__syncthreads();  // the probabilities are used up', ''),
    ("relative_queries", "relative", "relative_attention_dq", '__syncthreads();  // the last weights are used up\n    for', '    for'),
    ("relative_queries", "relative", "relative_attention_dq", 'column != 0 || query0 + 4 * ty + i >= tokens', 'column != 0'),
    ("relative_spread", "relative", "relative_", 'places - shared.high + key0', 'places - shared.low + key0'),
    ("relative_spread", "relative", "relative_", 'min(x.places - shared.low + key0 + TILE', 'min(x.places - shared.low + key0'),
    ("relative_spread", "relative", "relative_attention_dr", 'min(from + TILE - places + shared.high, keys)', 'min(from + TILE - places + shared.low, keys)'),
    ("relative_spread", "relative", "relative_attention_forward", 'greatest = max(first, second)', 'greatest = 0'),
    ("relative_wide", "relative", "relative_attention_forward", 'blockIdx.x / tiles * SLICE', '0'),
    ("relative_wide", "relative", "relative_attention_dq", 'tx != 0 || column != 0 ||', 'tx != 0 ||'),
    # Reductions, optimiser.
    ("sum_to", "reduce", "sum_to_forward_f32", "    __syncthreads();\n    if (threadIdx.y == 0", "    if (threadIdx.y == 0"),
    ("sum_to", "reduce", "sum_to_forward_f32", "int from = blockIdx.y * per, to = min(from + per, copies)", "int from = blockIdx.y * per, to = from + per"),
    ("global_norm", "reduce", "global_norm_", "to = from + min(per, elements - from)", "to = from + per"),
    ("global_norm", "reduce", "global_norm_", "x[(long long)(i / cols) * x_ld + i % cols]", "x[i]"),
    ("halt", "reduce", "global_norm_", "halt && !(norm < INFINITY)", "halt && norm > INFINITY"),
    ("halt", "reduce", "global_norm_", "halted(halt) ? NAN : ", ""),
    ("halt", "elementwise", "BINARY(add", "g.n == 0 || halted(halt)", "g.n == 0"),
    ("halt", "elementwise", "broadcast_forward_f32", "g.n == 0 || halted(halt)", "g.n == 0"),
    ("halt", "optimizer", "adamw_forward_f32", "if (halted(halt)) return;", ""),
    ("adamw", "optimizer_bf16", "adamw", "-expm1f(t * common.log_beta2)", "-expm1f(t * common.log_beta1)"),
    ("adamw", "optimizer_bf16", "adamw", "(long long)row * x.g_ld + c", "at"),
    ("adamw", "optimizer_bf16", "adamw", "for (unsigned i = from + threadIdx.x; i < to;", "for (unsigned i = from + threadIdx.x; i < groups;"),
    ("adamw", "optimizer_bf16", "adamw", "(blockIdx.x - first[number]) * GROUPS", "blockIdx.x * GROUPS"),
    ("adamw", "optimizer_bf16", "adamw", "1.f - rate * x.weight_decay", "1.f - rate * tensors->weight_decay"),
    ("adamw", "optimizer_bf16", "adamw", "first[i] <= block && block < first[i + 1]", "first[i] < block && block <= first[i + 1]"),
    ("adamw", "optimizer_bf16", "adamw", "found = i;\n    }\n    __syncthreads();", "found = i;\n    }"),
    ("rounded_adamw", "optimizer_bf16", "adamw_rounded", "bits + (word >> 16)", "bits + (word >> 17)"),
    ("rounded_adamw", "optimizer_bf16", "adamw_rounded", "x.stream, 0xB16Fu), at)", "x.stream, 0xB16Fu), c)"),
    ("rounded_adamw", "optimizer_bf16", "adamw_rounded", "draws_of(rng, x.stream", "draws_of(rng, tensors->stream"),
    ("rounded_adamw", "optimizer_bf16", "adamw_rounded", "narrow ? load4((const real*)p + at, n) : ", ""),
    ("rounded_adamw", "optimizer_bf16", "adamw_rounded", "low_of(two.x), high_of(two.x), low_of(two.y)", "low_of(two.x), high_of(two.x), high_of(two.y)"),
    ("rounded_adamw", "optimizer_bf16", "adamw_rounded", "if (n > 1) x.y = widen(p[1]);", "if (n > 2) x.y = widen(p[1]);"),
    ("rounded_adamw", "optimizer_bf16", "adamw_rounded", "if (skip == 1) return make_uint4(a.y, a.z, a.w, b.x)", "if (skip == 1) return make_uint4(a.y, a.z, a.w, b.y)"),
    ("global_norm", "reduce", "global_norm_", "chunk_sum<true>(from_table(g.x), blockIdx.x - first[number]", "chunk_sum<true>(from_table(g.x), 0"),
    ("global_norm", "reduce", "global_norm_", "i += (int)blockDim.x", "i += tensors"),
    # Attention: masks and numbers.
    ("attention", "attention", FORWARD, "causal && j > i &&", "causal && j >= i &&"),
    ("attention", "attention", FORWARD, "i - j >= window", "i - j > window"),
    ("attention", "attention", FORWARD, "other != 0 && (own", "(own"),
    ("attention", "attention", FORWARD, "step = 8; step > 0; step /= 2) x = fmaxf", "step = 4; step > 0; step /= 2) x = fmaxf"),
    ("attention", "attention", FORWARD, "denominator[i] * correction + row_sum", "denominator[i] + row_sum"),
    ("attention", "attention", FORWARD, "kv_head = head / (heads / kv_heads)", "kv_head = head % kv_heads + head"),
    ("attention", "attention", FORWARD, "(row0 + i) * tokens + key0 + 4 * tx", "(row0 + i) * tokens + key0 + tx"),
    ("attention", "attention", FORWARD, "from + r < x.rows ? x.width - d0 - d : 0", "x.width - d0 - d"),
    ("attention_of_wide_heads", "attention", FORWARD, "from + r < x.rows ? x.width - c0 - c : 0", "x.width - c0 - c"),
    ("attention_of_wide_heads", "attention", FORWARD, "store4(to + (long long)row * ld + c, value, width - c)", "store4(to + (long long)row * ld + c, value, 4)"),
    ("attention_of_wide_heads", "attention", FORWARD, "struct __align__(16) Factors", "struct Factors"),
    ("attention_grad", "attention", DQ, "dp = p * (dp * factor - delta) * scale", "dp = p * (dp - delta) * scale"),
    ("attention_grad", "attention", DKV, "min(tokens, end - 1 + window)", "min(tokens, end - 60 + window)"),
    ("attention_grad", "attention", DKV, "head < (kv_head + 1) * group", "head < kv_head * group + 1"),
    ("attention", "attention", FORWARD, "own == other || own == 0", "own == other"),
    ("blind", "attention", FORWARD, "__syncthreads();  // the last weights are used up", ""),
    ("blind", "attention", FORWARD, "1.f / tokens", "1.f / (tokens + 1)"),
    ("blind", "attention", FORWARD, "segments && __syncthreads_or(blind)", "segments && blind"),
    ("blind", "attention", DKV, "blind[j] = query < tokens && ", "blind[j] = "),
    ("blind", "attention", DKV, "if (!__syncthreads_or(some)) continue;", "if (!some) continue; __syncthreads();"),
    ("blind", "attention", DKV, "segments && head < (kv_head + 1) * group", "segments && head < kv_head * group + 1"),
    ("key_bias", "attention", FORWARD, "causal && j > i && j >= prefix", "causal && j > i && j > prefix"),
    ("key_bias", "attention", FORWARD, "min(max(end, prefix), tokens)", "min(end, tokens)"),
    ("key_bias", "attention", DQ, "expf(p * scale + bias - lse)", "expf(p * scale - lse)"),
    ("key_bias", "attention", DKV, "key_bias[head0 + key]", "key_bias[key]"),
    ("key_bias", "attention", DKV, "causal && j >= prefix ? j", "causal ? j"),
    ("both_ways", "attention", FORWARD, " || j - i >= window", ""),
    ("both_ways", "attention", FORWARD, "min(last, end - 1 + window)", "min(last, end - TILE + window)"),
    # Attention: barriers.
    ("attention", "attention", FORWARD, "__syncthreads();  // the last users of a and b are done", ""),
    ("attention", "attention", FORWARD, "        __syncthreads();\n        multiply<S::DEPTH>(product", "        multiply<S::DEPTH>(product"),
    ("attention", "attention", FORWARD, "__syncthreads();  // the weights are written, the last users of b are done", ""),
    ("attention", "attention", FORWARD, "                __syncthreads();\n                multiply<S::DEPTH>(sum[part]", "                multiply<S::DEPTH>(sum[part]"),
    ("attention_grad", "attention", DKV, "__syncthreads();  // the probabilities are used up", ""),
    # Attention on tensor cores.
    ("tensor_cores", "attention_mma_bf16", "attention64_", '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    ("tensor_cores", "attention_mma_bf16", "attention64_", "{%0, %1, %2, %3}, {%4, %5, %6, %7}", "{%0, %1, %2, %3}, {%4, %6, %5, %7}"),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "multiply(product[m][n + 1], a[m], b[2], b[3])", "multiply(product[m][n + 1], a[m], b[1], b[3])"),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "load_tiles<true>(b", "load_tiles<false>(b"),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "__syncthreads();  // these keys and values are there, the last ones used up", ""),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", 'asm volatile("cp.async.wait_group 0;" ::: "memory");', ''),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", 'asm volatile("cp.async.commit_group;" ::: "memory");', ''),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "bool inside = from + r < x.rows && 8 * c < x.width;", "bool inside = 8 * c < x.width;"),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "return at + row * CHUNKS + (c ^ (row & 7));", "return at + row * CHUNKS + (c ^ (row & 3));"),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "sum[m][n][2 * r] *= correction, ", ""),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));", ""),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "factor[m][r] *= dropout_scale;", ""),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "if (from + r < rows && col + 8 * c < width) {", "if (from + r < rows) {"),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "    __syncwarp();\n#pragma unroll 4", "#pragma unroll 4"),
    ("tensor_cores", "attention_mma_bf16", "attention64_forward", "rng ? only(weights, kept) : weights", "weights"),
    ("tensor_cores", "attention_mma_bf16", "attention64_dq", "(x[m][n][e] - row_delta[m][e / 2])", "(x[m][n][e] - row_delta[m][e % 2])"),
    ("tensor_cores", "attention_mma_bf16", "attention64_dq", "bit(kept[m], n, e) ? x[m][n][e] * dropout_scale : 0.f", "x[m][n][e]"),
    ("tensor_cores", "attention_mma_bf16", "attention64_dq", "__syncthreads();  // these keys and values are there, the last ones used up", ""),
    ("tensor_cores", "attention_mma_bf16", "attention64_dkv", "__syncthreads();  // these queries are there, the last ones used up", ""),
    ("tensor_cores", "attention_mma_bf16", "attention64_dkv", "mask.sees(col + c, row + r)", "mask.sees(row + r, col + c)"),
    ("tensor_cores", "attention_mma_bf16", "attention64_dkv", "visits = group * per_head", "visits = per_head"),
    ("tensor_cores", "attention_mma_bf16", "attention64_dkv", "kept_scales[m][1] = rng ? dropout_scale : 1.f", "kept_scales[m][1] = 1.f"),
    ("tensor_tiles", "attention_mma_bf16", "attention64_forward", "bool before = !causal || j + m - 1 <= i ||", "bool before = !causal || j + m - 33 <= i ||"),
    ("tensor_tiles", "attention_mma_bf16", "attention64_forward", "i + n - 1 - j < window && j + m", "i - j < window && j + m"),
    ("tensor_tiles", "attention_mma_bf16", "attention64_forward", "bool after = causal && j > i + n - 1", "bool after = causal && j >= i"),
    ("tensor_tiles", "attention_mma_bf16", "attention64_forward", "LOG2_E * key_bias[head0", "key_bias[head0"),
    ("tensor_tiles", "attention_mma_bf16", "attention64_dq", "if (key_bias) above -= bias[e % 2];", ""),
    ("tensor_tiles", "attention_mma_bf16", "attention64_dkv", "            unit = 1.f;\n", ""),
    ("tensor_tiles", "attention_mma_bf16", "attention64_dkv", "threadIdx.x < QUERIES ? lse : delta", "lse"),
    ("wide_tensor_cores", "attention_mma_bf16", "attention_delta", "step = 4; step > 0; step /= 2) sum", "step = 2; step > 0; step /= 2) sum"),
    ("tensor_tiles", "attention_mma_bf16", "attention_delta", "n / tokens % heads", "n % heads"),
    ("wide_tensor_cores", "attention_mma_bf16", "attention256_dkv", "blockIdx.z / batch * COLS", "blockIdx.z % batch * COLS"),
    ("wide_tensor_cores", "attention_mma_bf16", "attention256_dkv", "16 * (rows * CHUNKS + (c & ~7))", "16 * (rows * CHUNKS)"),
    ("wide_tensor_cores", "attention_mma_bf16", "attention256_dq", "tiles_bytes<256>(2,", "tiles_bytes<256>(1,"),
    ("blind_tensor_cores", "attention_mma_bf16", "attention64_forward", "mask.blind_weight(largest[m][e / 2]", "mask.blind_weight(largest[m][e % 2]"),
    ("blind_tensor_cores", "attention_mma_bf16", "attention64_forward", "__syncthreads();  // the last values are used up", ""),
    ("blind_tensor_cores", "attention_mma_bf16", "attention64_dkv", "if (!__syncthreads_or(some)) continue;", "if (!some) continue; __syncthreads();"),
    # The same by products of warpgroups.
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");', ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", 'asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");', ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", 'asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");', ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", 'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");', ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "        show();\n        __syncthreads();  // these keys and values are there, the last ones used up", "        __syncthreads();\n        show();"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "__syncthreads();  // these keys and values are there, the last ones used up", ""),
    ("tensor_tiles", "attention_wgmma_bf16@90a", "attention64_forward", "__syncthreads();  // the queries are used up", ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "    commit();\n    wait<0>();\n    hold(sum);", "    commit();\n    hold(sum);"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "64ull << 32", "32ull << 32"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "(c % 8 ^ row % 8)", "(c % 8 ^ row % 4)"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;", "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "%32, %33, %34, 1, 1, 0, 0;", "%32, %33, %34, 1, 1, 0, 1;"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "{%32, %33, %34, %35}", "{%32, %34, %33, %35}"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "col % 64 * 2", "col % 64"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "x.factor(16 * k, col", "x.factor(8 * k, col"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "multiply<true>(product", "multiply<false>(product"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "sum[m][n / 8][n % 8][2 * r] *= correction;", ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "if (rng) weights = only(weights, kept);", ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "own = threadIdx.x / WARP * 16, g", "own = threadIdx.x / WARP * 8, g"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "    __syncwarp();\n#pragma unroll 4", "#pragma unroll 4"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_dq", "wait<1>();", "wait<2>();"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_dq", "dot_rows(y, douts, 64 * m, values);", "dot_rows(y, queries, 64 * m, values);"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_dq", "bit(kept, n, e) ? y[n][e] * dropout_scale : 0.f", "y[n][e]"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_dkv", "__syncthreads();  // these queries are there, the last ones used up", ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_dkv", "mask.sees(col + c, row + r)", "mask.sees(row + r, col + c)"),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_dkv", "if (rng) p = only(p, kept);", ""),
    ("tensor_cores", "attention_wgmma_bf16@90a", "attention64_dkv", "rng ? dropout_scale : 1.f;", "1.f;"),
    ("tensor_tiles", "attention_wgmma_bf16@90a", "attention64_dkv", "__syncthreads();  // the keys and values are used up", ""),
    ("tensor_tiles", "attention_wgmma_bf16@90a", "attention64_forward", "mask.all(row0, 64, key0, KEYS)", "mask.all(row0, 32, key0, KEYS)"),
    ("tensor_tiles", "attention_wgmma_bf16@90a", "attention64_forward", "mask.some(row0, 64, key0, KEYS)", "mask.some(query0, 64, key0, KEYS)"),
    ("tensor_tiles", "attention_wgmma_bf16@90a", "attention64_dq", "if (key_bias) above -= bias[e % 2];", ""),
    ("tensor_tiles", "attention_wgmma_bf16@90a", "attention64_dkv", "if (key_bias) shift -= bias[e / 2];", "if (key_bias) shift -= bias[e % 2];"),
    ("tensor_tiles", "attention_wgmma_bf16@90a", "attention64_dkv", "const float* row_lse = sides + 2 * stage * QUERIES;", "const float* row_lse = sides;"),
    ("wide_tensor_cores", "attention_wgmma_bf16@90a", "attention256_dkv", "blockIdx.z / batch * COLS", "blockIdx.z % batch * COLS"),
    ("wide_tensor_cores", "attention_wgmma_bf16@90a", "attention256_dq", "(col / 64 * ROWS + row) * 128", "(col / 64 * 32 + row) * 128"),
    ("wide_tensor_cores", "attention_wgmma_bf16@90a", "attention256_dq", "tiles_bytes<256>(2, 64, 64);", "tiles_bytes<256>(2, 64, 16);"),
    ("wide_tensor_cores", "attention_wgmma_bf16@90a", "attention256_forward", "col + 64 * c));", "col));"),
    ("blind_tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "__syncthreads();  // the last values are used up", ""),
    ("blind_tensor_cores", "attention_wgmma_bf16@90a", "attention64_forward", "values.fetch(vs, key0);\n            arrive();\n            show();", "values.fetch(vs, key0);\n            arrive();"),
    ("blind_tensor_cores", "attention_wgmma_bf16@90a", "attention64_dkv", "if (!__syncthreads_or(some)) continue;", "if (!some) continue; __syncthreads();"),
    # In bfloat16.
    ("adamw", "optimizer_bf16", "adamw", "store4(from_table(x.copy) + at, ps, n)", "store4(from_table(x.copy) + c, ps, n)"),
    ("adamw", "optimizer_bf16", "adamw", "if (n > 2) put(p + 2, x.z);", "if (n > 3) put(p + 2, x.z);"),
    ("adamw", "optimizer_bf16", "adamw", "make_uint2(narrow(x.x, x.y), narrow(x.z, x.w))", "make_uint2(narrow(x.x, x.y), narrow(x.w, x.z))"),
    ("in_bfloat16", "elementwise_bf16", ("BINARY", "narrow", "widen"), "make_uint4(narrow(v.x[0], v.x[1])", "make_uint4(narrow(v.x[1], v.x[0])"),
    ("in_bfloat16", "elementwise_bf16", ("BINARY", "narrow", "widen"), "v.x[2 * i + 1] = high_of(words[i])", "v.x[2 * i + 1] = low_of(words[i])"),
    ("in_bfloat16", "elementwise_bf16", ("BINARY", "narrow", "widen"), "for (int i = 0; i < COLUMNS; i += 4) {\n        float4 four = *reinterpret_cast<const float4*>(p + i)", "for (int i = 0; i < COLUMNS; i += 4) {\n        float4 four = *reinterpret_cast<const float4*>(p)"),
    ("in_bfloat16", "elementwise_bf16", ("BINARY", "narrow", "widen"), "return n >= COLUMNS && (reinterpret_cast<unsigned long long>(p) & 15) == 0", "return n >= COLUMNS && (reinterpret_cast<unsigned long long>(p) & 7) == 0"),
    ("in_bfloat16", "elementwise_bf16", ("BINARY", "narrow", "widen"), "return n >= COLUMNS &&", "return n >= 4 &&"),
    ("in_bfloat16", "elementwise_bf16", ("BINARY", "narrow", "widen"), "*p = (real)narrow(x, 0.f)", "*p = (real)(__float_as_uint(x) >> 16)"),
    ("in_float16", "elementwise_f16", ("BINARY", "narrow", "widen"), '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    ("in_float16", "elementwise_f16", ("BINARY", "narrow", "widen"), "widen((real)(word >> 16))", "widen((real)word)"),
    ("tensor_cores_in_float16", "attention_mma_f16", "attention64_dq", "e % 2 ? high_of(word) : low_of(word)", "low_of(word)"),
    ("older_tensor_cores", "attention_mma_f16@75", "attention64_forward", "multiply(sum, a[2], a[3], b1)", "multiply(sum, a[2], a[3], b0)"),
    ("older_tensor_cores", "attention_mma_f16@75", "attention64_forward", "inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0)", "*reinterpret_cast<const uint4*>(from)"),
    ("older_tensor_cores", "attention_mma_f16@75", "attention64_forward", "__syncthreads();  // these keys and values are there, the last ones used up", ""),
    ("older_tensor_cores", "attention_mma_f16@75", "attention64_dkv", "inside ? *reinterpret_cast<const float*>(from) : 0.f", "0.f"),
    ("layer_norm_in_bfloat16", "norm_bf16", "layer_norm_forward", "i < n ? v.x[i] - shift : 0.f", "v.x[i] - shift"),
    ("layer_norm_in_bfloat16", "norm_bf16", "layer_norm_forward", "COLUMNS * threads, holds}", "4 * threads, holds}"),
    ("layer_norm_in_bfloat16", "norm_bf16", "layer_norm_forward", "v.x[2 * i + 1] = high_of(words[i]);", "v.x[2 * i + 1] = low_of(words[i]);"),
    ("layer_norm_in_bfloat16", "norm_bf16", "layer_norm_forward", "for (int i = 4; i < COLUMNS; i += 4) sum +=", "for (int i = 8; i < COLUMNS; i += 4) sum +="),
    ("rows_in_bfloat16", "rows_bf16", ("gather_narrow", "scatter"), "int c = blockIdx.y * COLUMNS * WARP + COLUMNS * lane;", "int c = blockIdx.y * 4 * WARP + COLUMNS * lane;"),
    ("rows_in_bfloat16", "rows_bf16", ("gather_narrow", "scatter"), "int row = (int)(i / per_row), c = COLUMNS * (int)(i % per_row);", "int row = (int)(i / per_row), c = 4 * (int)(i % per_row);"),
    ("loss_in_bfloat16", "loss_bf16", "cross_entropy", "z.x[i] -= v + i == label ? scale : 0.f;", "z.x[i] -= v + (i & 3) == label ? scale : 0.f;"),
    ("loss_in_bfloat16", "loss_bf16", "cross_entropy", "z.x[i] = i < n ? z.x[i] : -INFINITY;", "z.x[i] = z.x[i];"),
    ("loss_in_bfloat16", "loss_bf16", "cross_entropy", "#define STEP (COLUMNS * THREADS)", "#define STEP (4 * THREADS)"),
    ("sums_in_bfloat16", "reduce_bf16", "sum_to", "return low_of(x);", "return high_of(x);"),
    ("rope_in_bfloat16", "positions_bf16", "rope_forward", "put(y + half + c, b * cosine + a * sine)", "put(y + half + c, b * cosine - a * sine)"),
    # Decoding.
    ("best", "best", "best_forward_f32", "equal_before < taken)", "equal_before <= taken)"),
    ("best", "best", "best_forward_f32", "if (lane & step) before += other;", "before += other;"),
    ("best", "best", "best_forward_f32", "bits & 0x80000000u ? ~bits : bits", "bits"),
    ("best", "best", "best_forward_f32", "__syncthreads();  // `totals` may be used again\n    *all", "*all"),
    ("best", "best", "best_forward_f32", "__syncthreads();\n\n    for (int i", "\n    for (int i"),
    ("best", "best", "best_forward_f32", "(theirs == order && other < i)", "(theirs == order && other > i)"),
    ("best", "best", "best_forward_f32", "1.0 / 720.0", "1.0 / 721.0"),
    ("best", "best", "best_forward_f32", "fma(n, -1.9082149292705877e-10, ", "(0.0 + "),
    ("best", "best", "best_forward_f32", "exp_below((double)(part[0] / t) - shift / t)", "exp_below((double)part[0] - shift)"),
    ("best", "best", "best_forward_f32", "(float)(x - high)", "0.f"),
    ("cache_write", "cache", "cache_write_forward_f32", "t >= count[b] || ", ""),
    ("cached", "cache", "cached_attention_forward_f32", "max(0, end - window)", "max(0, end - window - 1)"),
    ("cached", "cache", "cached_attention_forward_f32", "    __syncthreads();\n\n    float above", "    float above"),
    ("cached", "cache", "cached_attention_forward_f32", "denominators[w] * factors[w]", "denominators[w]"),
    ("cached", "cache", "cached_attention_forward_f32", "sum[part].x[i] * next.keep", "sum[part].x[i]"),
    ("cached_spans", "cache", "cached_attention_forward_f32", "min(end, (part_of + 1) * span)", "end"),
    ("cached_spans", "cache", "cached_attention_forward_f32", "sums[place * width + c] = value;", "sums[place * width + c] = value * factor;"),
    ("cached_spans", "cache", "cached_attention_forward_f32", "if (threadIdx.x < 2) bounds", "if (threadIdx.x < 1) bounds"),
    ("cached", "cache", "cached_attention_forward_f32", "= expf(largests[threadIdx.x] - shift);\n    __syncthreads();", "= expf(largests[threadIdx.x] - shift);"),
    ("cached", "cache", "cached_attention_forward_f32", "thread_sums[w * lanes + of]", "thread_sums[w * lanes]"),
    ("cached", "cache", "cached_attention_forward_f32", "from += teams", "from += teams - 1"),
    ("cached_spans", "cache", "cached_attention_join", "    __syncthreads();\n\n    float total", "    float total"),
    ("cached_spans", "cache", "cached_attention_join", "sums[s * width + c] * factors[s]", "sums[s * width + c]"),
    ("cached_spans", "cache", "cached_attention_join", "if (bounds[2 * s + 1] != 0.f) ", ""),
    ("cached_bias", "cache", "cached_attention_forward_f32", "(long long)head * slots + p", "(long long)head * slots"),
]  # fmt: skip


def only(text, kept):
    """The text without the kernels, and without the macros that make kernels, that do not begin with `kept`."""
    text = re.sub(
        r'(?m)^extern "C" __global__[^\n]*\n(\w+)\(.*?\n\}\n',
        lambda m: m[0] if m[1].startswith(kept) else "",
        text,
        flags=re.S,
    )
    return re.sub(r"(?m)^(?:UNARY|BINARY)\((.*)\)$", lambda m: m[0] if m[0].startswith(kept) else "", text)


@functools.cache
def rebuilt(file, kernels, old, new):
    file, _, arch = file.partition("@")
    text = nvrtc.unit(file)
    assert not old or text.count(old) >= 1, "the text that this bug changes is gone"
    return sim.load(nvrtc.ptx(only(text.replace(old, new), kernels), file, arch or 80))


@pytest.fixture
def against(programs_80, close):
    """Runs a case on the kernels with some of them replaced."""

    def go(case, file, kernels, old, new):
        programs = programs_80 | rebuilt(file, kernels, old, new)
        CASES[case](sim.Device(programs), np.random.default_rng(3), close)

    return go


@pytest.mark.parametrize("case", CASES if nvrtc.LONG else list(CASES)[::3])
def test_correct_kernels_pass(against, case):
    file, kernels = next(m[1:3] for m in MUTANTS if m[0] == case)
    against(case, file, kernels, "", "")


# Every third one where time is short, each family of kernels among them.
@pytest.mark.parametrize(
    "mutant", MUTANTS if nvrtc.LONG else MUTANTS[::3], ids=lambda m: f"{m[1]}-{m[3].strip()[:40]}"
)
def test_planted_bugs_are_found(against, mutant):
    with pytest.raises((sim.Fault, AssertionError)) as caught:
        against(*mutant)
    assert "is gone" not in str(caught.value)
