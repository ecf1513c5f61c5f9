"""Each kernel once more in NumPy: what it computes, not how. For runs too long for the interpreter.

A twin takes the kernel's own arguments. `card.Card(how="both")` runs kernel and twin on the same memory and compares
all of it, which is what entitles the twins to stand in for the kernels elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import GLOBAL_BASE
from .memory import Fault, Memory, flags

f32, i32 = np.float32, np.int32
#: Between a kernel and its twin: |got - want| ≤ TOLERANCE · (1 + |want|). Sums of some hundred float32 terms in another
#: order; the twins compute in float64.
TOLERANCE = 2e-5
#: The same where the kernel rounds factors to 16 bits, which its twin does not; and a unit in the last place of such.
HALF_TOLERANCE = {"bf16": 3e-2, "f16": 4e-3}
LAST_PLACE = {"bf16": 2**-7, "f16": 2**-10}
NO_WINDOW = 2**31 - 1


def matrix(
    m: Memory, address: int, rows: int, cols: int, ld: int, dtype: Any = f32, *, write: bool = False
) -> np.ndarray:
    """Rows of device memory as an array; all allocated and, to be read, written before."""
    item = np.dtype(dtype).itemsize
    at, data = (int(address) - GLOBAL_BASE) // item, m.data.view(dtype)
    if address % item or at < 0 or at + (rows - 1) * ld + cols > len(data):
        raise Fault(f"no memory at {int(address):#x}")

    def cut(x: np.ndarray) -> np.ndarray:
        size = x.itemsize
        return np.lib.stride_tricks.as_strided(x[at:], (rows, cols), (ld * size, size))

    (allocated, all_set), (written, _) = flags(m.allocated, item), flags(m.written, item)
    if not (cut(allocated) == all_set).all():
        raise Fault(f"access out of bounds of global memory in {rows} x {cols} at {int(address):#x}")
    if write:
        cut(written)[:] = all_set
        cut(flags(m.narrow, item)[0])[:] = all_set if item == 2 else 0
    elif not (cut(written) == all_set).all():
        raise Fault(f"read of uninitialised global memory in {rows} x {cols} at {int(address):#x}")
    return cut(data)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even."""
    bits = x.astype(f32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(f32)


def narrowed(x: np.ndarray, to: Any = np.uint16) -> np.ndarray:
    """The nearest float16, or the bits of the nearest bfloat16 where `to` is uint16, ties to even; NaN is 0x7fff."""
    if to == np.float16:
        with np.errstate(over="ignore"):
            bits = x.astype(np.float16).view(np.uint16)
    else:
        bits = round_bf16(x).view(np.uint32) >> 16
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint16).view(to)


def widened(halves: np.ndarray) -> np.ndarray:
    """The values of float16, or of the bits of bfloat16."""
    if halves.dtype == np.float16:
        return halves.astype(f32)
    return (halves.astype(np.uint32) << 16).view(f32)


STORED = {"f32": f32, "bf16": np.uint16, "f16": np.float16}


def real(m: Memory, address: int, rows: int, cols: int, ld: int) -> np.ndarray:
    """As :func:`matrix`, of what the kernel's tensors are stored in, as float32."""
    found = matrix(m, address, rows, cols, ld, m.stored)
    return found if m.stored is f32 else widened(found)


def put(m: Memory, address: int, rows: int, cols: int, ld: int, value: Any) -> None:
    """Writes a tensor, rounded to what it is stored in."""
    to = matrix(m, address, rows, cols, ld, m.stored, write=True)
    to[:] = value if m.stored is f32 else narrowed(np.asarray(value, float).astype(f32), m.stored)


def product(m: Memory, p: Any) -> None:
    """y = op(a)·op(b) + c + bias."""
    m.stored = STORED[p.a.dtype]
    if p.b.dtype != p.a.dtype or (p.c and p.c.dtype != p.y.dtype) or p.y.dtype not in (p.a.dtype, "f32"):
        raise Fault(f"cuBLASLt has no product of {p}")
    a, b = (real(m, x.address, x.rows, x.cols, x.ld).astype(float) for x in (p.a, p.b))
    a, b = a.T if p.ta else a, b.T if p.tb else b
    m.stored = STORED[p.y.dtype]
    y = a @ b
    if p.c:
        y = y + real(m, p.c.address, p.c.rows, p.c.cols, p.c.ld)
    if p.bias is not None:
        y = y + real(m, p.bias, 1, p.y.cols, 0)
    put(m, p.y.address, p.y.rows, p.y.cols, p.y.ld, y)


# ---- The kernels ----------------------------------------------------------------------------------------------------

TWINS: dict[str, Callable[..., None]] = {}


def twin(f: Callable[..., None]) -> Callable[..., None]:
    """Enters a function under the kernel's name."""
    TWINS[f.__name__] = f
    return f


def launch(m: Memory, kernel: str, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """Runs a kernel's twin."""
    values = [x.item() for x in args]
    with np.errstate(all="ignore"):
        name, kind = kernel.rsplit("_", 1)
        m.stored = STORED[kind]
        if name in TWINS:
            TWINS[name](m, grid, *values)
        else:
            elementwise(m, name, *values)


def erf(x: np.ndarray) -> np.ndarray:
    """Of each element."""
    return np.vectorize(math.erf, otypes=[float])(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e⁻ˣ)."""
    return 1 / (1 + np.exp(-x))


def _tanh_gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(c * (x + k * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * k * x * x)


def _gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    phi = 0.5 * (1 + erf(x / math.sqrt(2)))
    return x * phi, phi + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _sloped_silu(x: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    s = sigmoid(c * x)
    return x * s, s * (1 + c * x * (1 - s))


def _mish(x: np.ndarray, gate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x * gate, gate + x * (1 - gate * gate) * sigmoid(x)


#: Function → (value, derivative).
FUNCTIONS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "none": lambda x: (x, np.ones_like(x)),
    "exp": lambda x: (np.exp(x), np.exp(x)),
    "tanh": lambda x: (np.tanh(x), 1 - np.tanh(x) ** 2),
    "sigmoid": lambda x: (sigmoid(x), sigmoid(x) * (1 - sigmoid(x))),
    "relu": lambda x: (np.maximum(x, 0), (x > 0).astype(float)),
    "gelu": _gelu,
    "gelu_tanh": _tanh_gelu,
    "silu": lambda x: (x * sigmoid(x), sigmoid(x) * (1 + x * (1 - sigmoid(x)))),
    "quick_gelu": lambda x: _sloped_silu(x, 1.702),
    "relu2": lambda x: (np.maximum(x, 0) ** 2, 2 * np.maximum(x, 0)),
    "mish": lambda x: _mish(x, np.tanh(np.logaddexp(0, x))),
    "sqrt": lambda x: (np.sqrt(x), 0.5 / np.sqrt(x)),
    "sign": lambda x: (np.sign(x), np.zeros_like(x)),
}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


def halted(m: Memory, halt: int) -> bool:
    """Whether a global norm before was not finite."""
    return bool(halt) and bool(matrix(m, halt, 1, 1, 0, i32)[0, 0])


def elementwise(m: Memory, name: str, *args: Any) -> None:
    """<f>_forward, <f>_backward for functions of one or two arguments."""
    function, way = name.rsplit("_", 1)
    if function in BINARY:
        a, b, y, rows, cols, b_rows, b_cols, a_ld, b_ld, y_ld, halt = args
        if halted(m, halt):
            return
        left = real(m, a, rows, cols, a_ld).astype(float)
        right = np.tile(real(m, b, b_rows, b_cols, b_ld), (rows // b_rows, cols // b_cols))
        put(m, y, rows, cols, y_ld, BINARY[function](left, right))
    elif way == "forward":
        x, y, rows, cols, x_ld, y_ld = args
        value = FUNCTIONS[function](real(m, x, rows, cols, x_ld).astype(float))[0]
        put(m, y, rows, cols, y_ld, value)
    else:
        x, dy, dx, rows, cols, x_ld, dy_ld, dx_ld = args
        slope = FUNCTIONS[function](real(m, x, rows, cols, x_ld).astype(float))[1]
        slope = slope * real(m, dy, rows, cols, dy_ld)
        put(m, dx, rows, cols, dx_ld, slope)


@twin
def gated_forward(m, grid, gate, up, y, rows, cols, gate_ld, up_ld, y_ld, act):
    value = FUNCTIONS[list(FUNCTIONS)[act]](real(m, gate, rows, cols, gate_ld).astype(float))[0]
    value = value * real(m, up, rows, cols, up_ld)
    put(m, y, rows, cols, y_ld, value)


@twin
def gated_backward(
    m, grid, dy, gate, up, dgate, dup, rows, cols, dy_ld, gate_ld, up_ld, dgate_ld, dup_ld, act
):
    value, slope = FUNCTIONS[list(FUNCTIONS)[act]](real(m, gate, rows, cols, gate_ld).astype(float))
    d, up = real(m, dy, rows, cols, dy_ld).astype(float), real(m, up, rows, cols, up_ld).astype(float)
    put(m, dgate, rows, cols, dgate_ld, d * up * slope)
    put(m, dup, rows, cols, dup_ld, d * value)


@twin
def scale_forward(m, grid, x, y, rows, cols, x_ld, y_ld, s):
    value = s * real(m, x, rows, cols, x_ld)
    put(m, y, rows, cols, y_ld, value)


@twin
def fill_forward(m, grid, y, rows, cols, y_ld, value):
    put(m, y, rows, cols, y_ld, value)


@twin
def broadcast_forward(m, grid, x, y, rows, cols, x_rows, x_cols, x_ld, y_ld, halt):
    if halted(m, halt):
        return
    bits = np.uint32 if m.stored is f32 else np.uint16
    value = np.tile(matrix(m, x, x_rows, x_cols, x_ld, bits), (rows // x_rows, cols // x_cols))
    matrix(m, y, rows, cols, y_ld, bits, write=True)[:] = value


@twin
def narrow_forward(m, grid, x, y, rows, cols, x_ld, y_ld):
    put(m, y, rows, cols, y_ld, matrix(m, x, rows, cols, x_ld))


@twin
def widen_forward(m, grid, x, y, rows, cols, x_ld, y_ld):
    matrix(m, y, rows, cols, y_ld, write=True)[:] = real(m, x, rows, cols, x_ld)


def keep(m: Memory, rng: int, stream: int, p: float, factor: float, elements: int) -> np.ndarray:
    """The factors of a dropout site's elements."""
    from kernels import reference

    kept = reference.keep(matrix(m, rng, 1, 4, 0, i32)[0], stream, p, elements)
    return np.where(kept > 0, factor, 0)


@twin
def dropout_forward(m, grid, x, rng, residual, y, rows, cols, x_ld, residual_ld, y_ld, stream, p, factor):
    factors = keep(m, rng, stream, p, factor, rows * cols).reshape(rows, cols)
    value = np.where(factors > 0, real(m, x, rows, cols, x_ld) * factors, 0)
    if residual:
        value = value + real(m, residual, rows, cols, residual_ld)
    put(m, y, rows, cols, y_ld, value)


@twin
def epilogue_forward(
    m,
    grid,
    made,
    bias,
    x,
    residual,
    y,
    pre,
    rows,
    cols,
    made_ld,
    x_ld,
    residual_ld,
    y_ld,
    pre_ld,
    act,
    act_grad,
):
    names = list(FUNCTIONS)
    value = real(m, made, rows, cols, made_ld).astype(float)
    if bias:
        value = value + real(m, bias, 1, cols, 0)
    if pre:
        put(m, pre, rows, cols, pre_ld, value)
    value = FUNCTIONS[names[act]](value)[0]
    if x:
        value = value * FUNCTIONS[names[act_grad]](real(m, x, rows, cols, x_ld).astype(float))[1]
    if residual:
        value = value + real(m, residual, rows, cols, residual_ld)
    put(m, y, rows, cols, y_ld, value)


@twin
def layer_norm_forward(m, grid, x, weight, bias, y, mean, rstd, rows, cols, x_ld, y_ld, eps, center, warps):
    xs = real(m, x, rows, cols, x_ld).astype(float)
    average = center * xs.mean(1, keepdims=True)
    inverse = 1 / np.sqrt(((xs - average) ** 2).mean(1, keepdims=True) + eps)
    value = (xs - average) * inverse * matrix(m, weight, 1, cols, 0)
    if bias:
        value = value + matrix(m, bias, 1, cols, 0)
    put(m, y, rows, cols, y_ld, value)
    matrix(m, mean, rows, 1, 1, write=True)[:] = average
    matrix(m, rstd, rows, 1, 1, write=True)[:] = inverse


@twin
def layer_norm_backward(
    m,
    grid,
    dy,
    x,
    weight,
    mean,
    rstd,
    residual,
    dx,
    parts,
    rows,
    cols,
    dy_ld,
    x_ld,
    residual_ld,
    dx_ld,
    per,
    center,
    warps,
):
    inverse = matrix(m, rstd, rows, 1, 1).astype(float)
    hat = (real(m, x, rows, cols, x_ld) - matrix(m, mean, rows, 1, 1).astype(float)) * inverse
    d = real(m, dy, rows, cols, dy_ld).astype(float)
    chunks = range(0, rows, per)
    sums = [[(z[r : r + per]).sum(0) for r in chunks] for z in (d * hat, d)]
    matrix(m, parts, 2 * len(chunks), cols, cols, write=True)[:] = np.reshape(sums, (-1, cols))
    d = d * matrix(m, weight, 1, cols, 0)
    value = inverse * (d - center * d.mean(1, keepdims=True) - hat * (d * hat).mean(1, keepdims=True))
    if residual:
        value = value + real(m, residual, rows, cols, residual_ld)
    put(m, dx, rows, cols, dx_ld, value)


@twin
def gather_forward(m, grid, table, index, y, table_rows, rows, cols, table_ld, y_ld):
    at = matrix(m, index, rows, 1, 1, i32)[:, 0]
    inside = (at >= 0) & (at < table_rows)
    bits, nan = (np.uint32, 0x7FFFFFFF) if m.stored is f32 else (np.uint16, 0x7FFF)
    to = matrix(m, y, rows, cols, y_ld, bits, write=True)
    for n in range(rows):
        row = table + np.dtype(bits).itemsize * int(at[n]) * table_ld
        to[n] = matrix(m, row, 1, cols, 0, bits)[0] if inside[n] else nan


@twin
def gather_narrow_forward(m, grid, table, index, y, table_rows, rows, cols, table_ld, y_ld):
    at = matrix(m, index, rows, 1, 1, i32)[:, 0]
    value = np.full((rows, cols), np.nan, f32)
    for n in np.flatnonzero((at >= 0) & (at < table_rows)):
        value[n] = matrix(m, table + 4 * int(at[n]) * table_ld, 1, cols, 0)[0]
    put(m, y, rows, cols, y_ld, value)


@twin
def scatter_add_forward(m, grid, source, index, y, table_rows, rows, cols, source_ld, y_ld):
    at = matrix(m, index, rows, 1, 1, i32)[:, 0]
    x, to = real(m, source, rows, cols, source_ld), matrix(m, y, table_rows, cols, y_ld)
    for n in range(rows):
        if 0 <= at[n] < table_rows:
            to[at[n]] += x[n]


@twin
def count_labels_forward(m, grid, labels, y, rows):
    matrix(m, y, 1, 1, 0, write=True)[:] = (matrix(m, labels, 1, rows, 0, i32) >= 0).sum()


def _cross_entropy(m, rows, logits, bias, labels, loss, classes, logits_ld, smoothing, z_loss):
    z = real(m, logits, rows, classes, logits_ld).astype(float)
    if bias:
        z = z + matrix(m, bias, 1, classes, 0)
    label = matrix(m, labels, rows, 1, 1, i32)[:, 0]
    top = z.max(1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(1))
    seen = (label >= 0) & (label < classes)
    target = (1 - smoothing) * z[np.arange(rows), np.where(seen, label, 0)]
    if smoothing:
        target = target + smoothing * z.mean(1)
    value = np.where(label < 0, 0, np.where(seen, lse - target + z_loss * lse**2, np.nan))
    matrix(m, loss, rows, 1, 1, write=True)[:, 0] = value
    slope = np.exp(z - lse[:, None]) * (1 + 2 * z_loss * lse[:, None]) - smoothing / classes
    slope[np.flatnonzero(seen), label[seen]] -= 1 - smoothing
    return np.where(seen[:, None], slope, 0)


@twin
def cross_entropy_forward(m, grid, *args):
    _cross_entropy(m, grid[0], *args)


@twin
def cross_entropy_backward(m, grid, logits, bias, labels, dloss, loss, classes, logits_ld, *tail):
    slope = _cross_entropy(m, grid[0], logits, bias, labels, loss, classes, logits_ld, *tail)
    slope = slope * float(matrix(m, dloss, 1, 1, 0)[0, 0])
    put(m, logits, grid[0], classes, logits_ld, slope)


@twin
def sum_to_forward(m, grid, x, y, other, copies, result_rows, cols, x_ld, per):
    rows = copies * result_rows
    values = real(m, x, grid[2] * rows, cols, x_ld).astype(float).reshape(grid[2], copies, result_rows, cols)
    for value, to in zip(values, (y, other), strict=False):
        value = np.stack([value[i : i + per].sum(0) for i in range(0, copies, per)]).reshape(-1, cols)
        matrix(m, to, len(value), cols, cols, write=True)[:] = value


def _chunks(m, x, elements, cols, x_ld, per, f):
    value = f(real(m, x, elements // cols, cols, x_ld).astype(float)).reshape(-1)
    return [value[i : i + per].sum() for i in range(0, elements, per)]


def table(m: Memory, address: int, count: int, kind: str) -> list[tuple[Any, ...]]:
    """An array of structs: of each cell a letter, p of a pointer, i of an int, u of an unsigned, f of a float."""
    types = {"p": np.uint64, "i": i32, "u": np.uint32, "f": f32}
    struct = np.dtype([(str(i), types[k]) for i, k in enumerate(kind)])
    words = struct.itemsize // 4
    return matrix(m, address, count, words, words, np.uint32).copy().view(struct).reshape(-1).tolist()


def check_blocks(m: Memory, grid: Any, first: int, counts: list[int]) -> None:
    """That the blocks of a launch for many tensors are dealt out to them."""
    if matrix(m, first, 1, len(counts) + 1, 0, i32)[0].tolist() != np.cumsum([0, *counts]).tolist() or grid[
        0
    ] != sum(counts):
        raise Fault(f"{grid[0]} blocks for tensors that have {counts}")


@twin
def sum_forward(m, grid, x, y, elements, cols, x_ld, per):
    value = _chunks(m, x, elements, cols, x_ld, per, lambda z: z)
    matrix(m, y, 1, len(value), 0, write=True)[:] = value


@twin
def global_norm_parts_forward(m, grid, gradients, first, count, parts):
    sums = [_chunks(m, *row, np.square) for row in table(m, gradients, count, "piiii")]
    check_blocks(m, grid, first, [len(z) for z in sums])
    matrix(m, parts, 1, grid[0], 0, write=True)[:] = np.concatenate(sums)


@twin
def global_norm_forward(m, grid, parts, y, count, halt):
    norm = np.sqrt(matrix(m, parts, 1, count, 0).astype(float).sum())
    matrix(m, y, 1, 1, 0, write=True)[:] = norm = np.nan if halted(m, halt) else f32(norm)
    if halt and not np.isfinite(norm):
        matrix(m, halt, 1, 1, 0, i32, write=True)[:] = 1


@twin
def clip_factor_forward(m, grid, norm, y, max_norm):
    matrix(m, y, 1, 1, 0, write=True)[:] = np.minimum(1, max_norm / (matrix(m, norm, 1, 1, 0) + 1e-6))


def by_chance(m: Memory, rng: int, stream: int, x: np.ndarray) -> np.ndarray:
    """Rounded by the words of a stream to values of bfloat16."""
    from kernels import reference

    words = reference.words(matrix(m, rng, 1, 4, 0, i32)[0], stream, 0xB16F, x.size)
    return reference.by_chance(x, words.reshape(x.shape))


@twin
def adamw_forward(
    m, grid, tensors, first, count, clip, lr, step, beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1,
    log_beta2, eps, halt, rng=0,
):  # fmt: skip
    rows_of_all = table(m, tensors, count, "ppppppppiiifui")
    check_blocks(
        m, grid, first, [-(-rows * -(-cols // 4) // 1024) for *_, rows, cols, _, _, _, _ in rows_of_all]
    )
    if halted(m, halt):
        return
    factor, rate = (float(matrix(m, z, 1, 1, 0)[0, 0]) for z in (clip, lr))
    t = int(matrix(m, step, 1, 1, 0, i32)[0, 0])
    bias1, bias2 = -math.expm1(t * log_beta1), -math.expm1(t * log_beta2)
    half = m.stored
    for p, g, one, two, new_p, new_one, new_two, copy, rows, cols, g_ld, decay, stream, narrow in rows_of_all:
        m.stored = half if narrow else f32
        old = real(m, p, rows, cols, cols).astype(float)
        moments = [matrix(m, z, rows, cols, cols).astype(float) for z in (one, two)]
        gs = factor * matrix(m, g, rows, cols, g_ld).astype(float)
        first_moment = beta1 * moments[0] + one_minus_beta1 * gs
        second_moment = beta2 * moments[1] + one_minus_beta2 * gs * gs
        new = old * (1 - rate * decay) - rate / bias1 * first_moment / (np.sqrt(second_moment / bias2) + eps)
        if rng:
            new = by_chance(m, rng, stream, new.astype(f32))
        put(m, new_p, rows, cols, cols, new)
        for z, value in ((new_one, first_moment), (new_two, second_moment)):
            matrix(m, z, rows, cols, cols, write=True)[:] = value
        if copy:
            m.stored = half
            put(m, copy, rows, cols, cols, new)


@twin
def adamw_rounded_forward(m, grid, tensors, first, count, clip, lr, step, rng, *hyper):
    adamw_forward(m, grid, tensors, first, count, clip, lr, step, *hyper, rng=rng)


# ---- Positions ------------------------------------------------------------------------------------------------------


@twin
def iota_forward(m, grid, y, rows, start, step):
    matrix(m, y, 1, rows, 0, i32, write=True)[:] = start + step * np.arange(rows)


@twin
def rope_table_forward(m, grid, positions, turns, table, rows, half, table_ld, scale):
    words = matrix(m, turns, half, 2, 2, np.uint32).tolist()
    at = matrix(m, positions, 1, rows, 0, i32)[0].tolist()
    # Python's integers keep what is left of whole turns.
    parts = [[p * (high << 32 | low) % 2**64 / 2.0**63 for low, high in words] for p in at]
    angle = np.pi * np.array(parts).reshape(rows, half)
    value = scale * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    matrix(m, table, rows, 2 * half, table_ld, write=True)[:] = value


@twin
def rope_forward(m, grid, x, table, y, rows, heads, width, half, x_ld, table_ld, y_ld, sign):
    value = real(m, x, rows, heads * width, x_ld).astype(float).reshape(rows, heads, width)
    angles = matrix(m, table, rows, 2 * half, table_ld).astype(float)[:, None]
    cosine, sine = angles[..., :half], sign * angles[..., half:]
    a, b = value[..., :half].copy(), value[..., half : 2 * half].copy()
    value[..., :half], value[..., half : 2 * half] = a * cosine - b * sine, b * cosine + a * sine
    put(m, y, rows, heads * width, y_ld, value.reshape(rows, -1))


@twin
def alibi_bias_forward(m, grid, positions, slopes, bias, rows, heads, tokens, bias_ld, scale, rounded):
    slope = matrix(m, slopes, 1, heads, 0)[0]
    at = matrix(m, positions, rows, tokens, tokens, i32).astype(f32)
    if rounded:
        slope, at = round_bf16(slope), round_bf16(at)
    value = slope[None, :, None] * at[:, None]
    value = scale * (round_bf16(value) if rounded else value)
    matrix(m, bias, rows * heads, tokens, bias_ld, write=True)[:] = value.reshape(rows * heads, tokens)


# ---- Attention ------------------------------------------------------------------------------------------------------


class Scores:
    """Scores and probabilities of attention as the kernels see them. q, k, v [B, T, ..]."""

    def __init__(self, m, q, k, v, extras, sizes, strides, causal, window, scale, stream, p, factor):
        b, t, h, kv, d = self.sizes = sizes
        segments, key_bias, prefix, rng = extras
        self.m, self.scale, self.group = m, scale, h // kv
        heads = (h, kv, kv)
        loaded = [
            real(m, x, b * t, n * d, ld).astype(float).reshape(b, t, n, d)
            for x, n, ld in zip((q, k, v), heads, strides, strict=True)
        ]
        self.q, self.k, self.v = loaded[0], *(np.repeat(x, self.group, 2) for x in loaded[1:])
        i, j = np.arange(t)[:, None], np.arange(t)
        first = matrix(m, prefix, b, 1, 1, i32).reshape(b, 1, 1, 1) if prefix else np.zeros((b, 1, 1, 1))
        seen = ((j <= i) | (not causal) | (j < first)) & (abs(i - j) < window)
        if segments:
            s = matrix(m, segments, b, t, t, i32)
            own, other = s[:, None, :, None], s[:, None, None, :]
            seen = seen & (other != 0) & ((own == other) | (own == 0))
        z = scale * np.einsum("bihd,bjhd->bhij", self.q, self.k)
        if key_bias:
            z = z + matrix(m, key_bias, b * h, t, t).reshape(b, h, 1, t)
        z = np.where(seen, z, -np.inf)
        top = z.max(-1, keepdims=True)
        top[np.isneginf(top)] = 0
        self.lse = top[..., 0] + np.log(np.exp(z - top).sum(-1))
        self.blind = np.isneginf(self.lse)
        self.p = np.exp(z - np.where(self.blind, 0, self.lse)[..., None])
        self.p[self.blind] = 1 / t
        self.factors = keep(m, rng, stream, p, factor, b * h * t * t).reshape(b, h, t, t) if rng else 1.0

    def load(self, x, ld):
        """[B, T, H, D]."""
        b, t, h, _, d = self.sizes
        return real(self.m, x, b * t, h * d, ld).astype(float).reshape(b, t, h, d)

    def store(self, x, ld, value):
        """[B, T, .., D]."""
        b, t, _, _, d = self.sizes
        put(self.m, x, b * t, value.shape[2] * d, ld, value.reshape(b * t, -1))

    def ds(self, dout, delta):
        """The gradient of the scores."""
        b, t, h, _, _ = self.sizes
        delta = matrix(self.m, delta, b * h, t, t).reshape(b, h, t, 1)
        dp = self.factors * np.einsum("bihd,bjhd->bhij", dout, self.v)
        return self.p * (dp - delta) * self.scale * ~self.blind[..., None]


@twin
def attention_forward(
    m,
    grid,
    q,
    k,
    v,
    segments,
    key_bias,
    prefix,
    rng,
    out,
    lse,
    b,
    t,
    h,
    kv,
    d,
    q_ld,
    k_ld,
    v_ld,
    out_ld,
    *mask,
):
    s = Scores(m, q, k, v, (segments, key_bias, prefix, rng), (b, t, h, kv, d), (q_ld, k_ld, v_ld), *mask)
    s.store(out, out_ld, np.einsum("bhij,bjhd->bihd", s.p * s.factors, s.v))
    matrix(m, lse, b * h, t, t, write=True)[:] = s.lse.reshape(b * h, t)


@twin
def attention_delta_backward(m, grid, dout, out, delta, b, t, h, d, dout_ld, out_ld):
    x, y = (real(m, z, b * t, h * d, ld).astype(float) for z, ld in ((dout, dout_ld), (out, out_ld)))
    value = (x * y).reshape(b, t, h, d).sum(-1).transpose(0, 2, 1)
    matrix(m, delta, b * h, t, t, write=True)[:] = value.reshape(b * h, t)


@twin
def attention_dq_backward(
    m,
    grid,
    dout,
    q,
    k,
    v,
    lse,
    delta,
    segments,
    key_bias,
    prefix,
    rng,
    dq,
    b,
    t,
    h,
    kv,
    d,
    dout_ld,
    q_ld,
    k_ld,
    v_ld,
    dq_ld,
    *mask,
):
    s = Scores(m, q, k, v, (segments, key_bias, prefix, rng), (b, t, h, kv, d), (q_ld, k_ld, v_ld), *mask)
    s.store(dq, dq_ld, np.einsum("bhij,bjhd->bihd", s.ds(s.load(dout, dout_ld), delta), s.k))


@twin
def attention_dkv_backward(
    m, grid, dout, q, k, v, lse, delta, segments, key_bias, prefix, rng, dk, dv, b, t, h, kv, d, dout_ld, q_ld, k_ld,
    v_ld, dk_ld, dv_ld, *mask,
):  # fmt: skip
    s = Scores(m, q, k, v, (segments, key_bias, prefix, rng), (b, t, h, kv, d), (q_ld, k_ld, v_ld), *mask)
    d_out = s.load(dout, dout_ld)
    for x, ld, value in (
        (dk, dk_ld, np.einsum("bhij,bihd->bjhd", s.ds(d_out, delta), s.q)),
        (dv, dv_ld, np.einsum("bhij,bihd->bjhd", s.p * s.factors, d_out)),
    ):
        s.store(x, ld, value.reshape(b, t, kv, -1, d).sum(3))


# On tensor cores: the same, but for the rounding of what goes from one product to the next.
for _width in (64, 128, 256):
    for _way in ("forward", "dq_backward", "dkv_backward"):
        TWINS[f"attention{_width}_{_way}"] = TWINS[f"attention_{_way}"]


@twin
def cache_write_forward(m, grid, source, row, start, count, cache, b, t, cols, source_ld, cache_rows, slots):
    rows, starts, counts = (matrix(m, x, 1, b, 0, i32)[0].tolist() for x in (row, start, count))
    for n in range(b):
        if counts[n] > 0 and 0 <= rows[n] < cache_rows:
            size = np.dtype(m.stored).itemsize
            x = real(m, source + size * n * t * source_ld, counts[n], cols, source_ld)
            put(m, cache + size * (rows[n] * slots + starts[n]) * cols, counts[n], cols, cols, x)


@twin
def cached_attention_forward(
    m,
    grid,
    q,
    k,
    v,
    rows,
    start,
    count,
    key_bias,
    out,
    sums,
    bounds,
    t,
    h,
    kv,
    d,
    q_ld,
    out_ld,
    cache_rows,
    slots,
    window,
    scale,
    spans,
    span,
):
    b, group, size = grid[2], h // kv, np.dtype(m.stored).itemsize
    places = matrix(m, rows, b, slots, slots, i32)
    starts, counts = (matrix(m, x, 1, b, 0, i32)[0].tolist() for x in (start, count))
    qs = real(m, q, b * t, h * d, q_ld).astype(float).reshape(b, t, h, d)
    if sums:
        edges = matrix(m, bounds, b * t * h, 2 * spans, 2 * spans, write=True).reshape(b, t, h, spans, 2)
        edges[..., 0], edges[..., 1] = -np.inf, 0
    result = np.zeros((b, t, h, d))
    for n, i, part in np.ndindex(b, t, spans):
        if i < counts[n]:
            end = min(starts[n] + i + 1, slots)
            p = np.arange(max(0, end - window, part * span), min(end, (part + 1) * span))
            if not len(p):
                continue
            tokens = [int(places[n, s]) * slots + int(s) for s in p]
            keys, values = (
                np.stack([real(m, x + size * token * kv * d, kv, d, d) for token in tokens])
                .astype(float)
                .repeat(group, 1)
                for x in (k, v)
            )
            z = scale * np.einsum("hd,phd->hp", qs[n, i], keys)
            if key_bias:
                z = z + matrix(m, key_bias, h, slots, slots)[:, p]
            w = np.exp(z - z.max(1, keepdims=True))
            summed, total = np.einsum("hp,phd->hd", w, values), w.sum(1)
            result[n, i] = summed / total[:, None]
            if sums:
                edges[n, i, :, part] = np.stack([z.max(1), total], 1)
                first = sums + 4 * ((n * t + i) * h * spans + part) * d
                matrix(m, first, h, d, spans * d, write=True)[:] = summed
    if out:
        put(m, out, b * t, h * d, out_ld, result.reshape(b * t, -1))


@twin
def cached_attention_join_forward(m, grid, sums, bounds, out, t, h, d, out_ld, spans):
    rows = grid[2] * t * h
    edges = matrix(m, bounds, rows, 2 * spans, 2 * spans).reshape(rows, spans, 2).astype(float)
    shift = np.maximum(edges[..., 0].max(1), -1e30)[:, None]
    factors = np.exp(edges[..., 0] - shift)
    total = (factors * edges[..., 1]).sum(1)
    result = np.zeros((rows, d))
    for row, part in np.argwhere(edges[..., 1]).tolist():
        summed = matrix(m, sums + 4 * (row * spans + part) * d, 1, d, d)[0]
        result[row] += factors[row, part] / total[row] * summed
    put(m, out, rows // h, h * d, out_ld, result.reshape(rows // h, -1))


@twin
def best_forward(m, grid, x, tokens, parts, temperature, best, best_tokens, masses, cols, x_ld, piece, count):
    from kernels import reference

    pieces, rows = grid[:2]
    values = matrix(m, x, rows, cols, x_ld)
    places = matrix(m, tokens, rows, cols, cols, i32) if tokens else np.arange(cols)[None].repeat(rows, 0)
    t = matrix(m, temperature, 1, rows, 0)[0]
    weights = matrix(m, parts, rows, cols // count * 5, cols // count * 5) if parts else None
    found = matrix(m, best, rows, pieces * count, pieces * count, write=True)
    columns = matrix(m, best_tokens, rows, pieces * count, pieces * count, i32, write=True)
    width = 4 if pieces == 1 else 5
    sums = matrix(m, masses, rows, pieces * width, pieces * width, write=True)
    for r, p in np.ndindex(rows, pieces):
        a, b = p * piece, min(cols, (p + 1) * piece)
        there = places[r, a:b] >= 0
        mine, own = values[r, a:b][there], places[r, a:b][there]
        n = min(count, len(mine))
        _, order, mass = reference.best(mine[None], t[r : r + 1], n)
        order, mass, largest = order[0], mass[0], mine.max()
        if weights is not None:
            part = weights[r].reshape(-1, 5)[a // count : -(-b // count)].astype(float)
            largest = f32(part[:, 0].max())
            quotients = [part[:, 0], (part[:, 0].astype(f32) / t[r]).astype(float)]
            tops = [float(largest), float(f32(largest / t[r]))]
            mass = [
                ((part[:, i] + part[:, i + 1]) * np.exp(q - top)).sum()
                for i, q, top in zip((1, 3), quotients, tops, strict=True)
            ]
        order = order if pieces == 1 else np.sort(order)
        at = slice(p * count, p * count + n)
        found[r, p * count : (p + 1) * count], columns[r, p * count : (p + 1) * count] = -np.inf, -1
        found[r, at], columns[r, at] = mine[order], own[order]
        high = np.array(mass).astype(f32)
        halves = np.stack([high, (mass - high.astype(float)).astype(f32)], 1).reshape(-1)
        sums[r, p * width : (p + 1) * width] = halves if pieces == 1 else [largest, *halves]


# ---- Relative attention ---------------------------------------------------------------------------------------------


class _Relative:
    """What the launches of relative attention share. The dense definition is the reference's."""

    def __init__(self, m, operands, batch, heads, sizes, strides, sees_itself, scale, stream, p, factor):
        from kernels import reference

        t, s, u, d = sizes
        rows = (batch * t,) * 3 + (batch * s,) * 2 + (s + u, 2)
        shapes = ((batch, t),) * 3 + ((batch, s),) * 2 + ((s + u,), (2,))
        names = ("q_k", "q_r", "q_s", "k", "v", "r", "kinds")
        x = {
            name: matrix(m, at, n, heads * d, ld).reshape(*shape, heads, d)
            for name, at, n, shape, ld in zip(names, operands, rows, shapes, strides, strict=False)
        }
        *counted, hidden, rng = operands[7:]
        for name, at, n in zip(("at", "q_kinds", "k_kinds"), counted, (t, u, s), strict=True):
            x[name] = matrix(m, at, batch, n, n, i32)
        x["hidden"] = matrix(m, hidden, batch * u, u, u, i32).reshape(batch, u, u) if hidden else None
        kept = keep(m, rng, stream, p, factor, batch * heads * t * s) if rng else None
        kept = None if kept is None else kept.reshape(batch, heads, t, s)
        self.dense = reference.RelativeAttention(x, scale, bool(sees_itself), kept)
        self.m, self.batch, self.heads, self.sizes = m, batch, heads, sizes

    def gradient(self, dout, ld):
        t, _, _, d = self.sizes
        value = matrix(self.m, dout, self.batch * t, self.heads * d, ld)
        return self.dense.gradient(value.reshape(self.batch, t, self.heads, d))

    def store(self, at, ld, value):
        value = value.reshape(-1, self.heads * self.sizes[3])
        matrix(self.m, at, *value.shape, ld, write=True)[:] = value


@twin
def relative_attention_forward(m, grid, *args):
    operands, out, sizes, strides, out_ld, tail = (
        args[:12],
        args[12],
        args[13:17],
        args[17:24],
        args[24],
        args[25:],
    )
    x = _Relative(m, operands, grid[2], grid[1], sizes, strides, *tail)
    x.store(out, out_ld, x.dense.out)


@twin
def relative_attention_dq_backward(m, grid, dout, *args):
    operands, results, rows, sizes = args[:12], args[12:15], args[15:19], args[19:23]
    (dout_ld, *strides), lds, tail = args[23:31], args[31:34], args[34:]
    batch, heads, tokens = grid[2], grid[1], sizes[0]
    x = _Relative(m, operands, batch, heads, sizes, strides, *tail)
    found = x.gradient(dout, dout_ld)
    for name, at, ld in zip(("q_k", "q_r", "q_s"), results, lds, strict=True):
        x.store(at, ld, found[name])
    dense, shape = x.dense, (batch * heads, tokens, tokens)
    for at, value in zip(rows, (dense.largest, dense.inverse, dense.delta), strict=False):
        matrix(m, at, *shape, write=True)[:] = value.reshape(batch * heads, tokens)
    by_kind = np.stack([(dense.ds * (dense.other[:, None] == kind)).sum(-1) for kind in (0, 1)])
    matrix(m, rows[3], 2 * batch * heads, tokens, tokens, write=True)[:] = by_kind.reshape(-1, tokens)


@twin
def relative_attention_dkv_backward(m, grid, dout, *args):
    operands, results, sizes = args[:12], args[15:17], args[17:21]
    (dout_ld, *strides), lds, tail = args[21:29], args[29:31], args[31:]
    x = _Relative(m, operands, grid[2], grid[1], sizes, strides, *tail)
    found = x.gradient(dout, dout_ld)
    for name, at, ld in zip("kv", results, lds, strict=True):
        x.store(at, ld, found[name])


@twin
def relative_attention_dr_backward(m, grid, dout, *args):
    operands, dr, batch, sizes = args[:12], args[15], args[16], args[17:21]
    (dout_ld, *strides), dr_ld, tail = args[21:29], args[29], args[30:]
    x = _Relative(m, operands, batch, grid[1], sizes, strides, *tail)
    x.store(dr, dr_ld, x.gradient(dout, dout_ld)["r"])


@twin
def relative_attention_dkinds_backward(
    m, grid, by_kind, q_s, dkinds, batch, tokens, heads, width, q_s_ld, dkinds_ld
):
    sums = (
        matrix(m, by_kind, 2 * batch * heads, tokens, tokens).astype(float).reshape(2, batch, heads, tokens)
    )
    q = matrix(m, q_s, batch * tokens, heads * width, q_s_ld).reshape(batch, tokens, heads, width)
    value = np.einsum("nbhi,bihd->nhd", sums, q)
    matrix(m, dkinds, 2, heads * width, dkinds_ld, write=True)[:] = value.reshape(2, -1)
