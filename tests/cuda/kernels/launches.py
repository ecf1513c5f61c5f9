"""How each kernel is launched: geometry and arguments, over NumPy arrays in and out.

Operands are uploaded with gaps between rows that were never written and off any alignment, as `layout` says, so that a
kernel that ignores a stride or assumes alignment is found out by the checks of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sim import Buffer, Device
from sim.twins import narrowed, widened

Array = np.ndarray
NO_WINDOW = 2**31 - 1
FUNCTIONS = (
    "none",
    "exp",
    "tanh",
    "sigmoid",
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "quick_gelu",
    "relu2",
    "mish",
    "sqrt",
    "sign",
)
i32, u32, f32 = np.int32, np.uint32, np.float32
#: What NumPy has for the 16-bit floats: bfloat16 as the upper halves of float32.
HALVES: dict[str, Any] = {"bf16": np.uint16, "f16": np.float16}


@dataclass(frozen=True)
class Layout:
    """How matrices lie: `gap` elements between rows, the first element `skew` elements past an aligned address."""

    gap: int = 0
    skew: int = 0


PLAIN = Layout()
LAYOUTS = {"plain": PLAIN, "strided": Layout(gap=8), "crooked": Layout(gap=3, skew=1)}


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


@dataclass(frozen=True)
class Matrix:
    """Rows in device memory. `shape` is what the caller sees, [.., C]."""

    rows: list[Buffer]
    ld: int
    shape: tuple[int, ...]

    @property
    def at(self) -> Buffer:
        """What a kernel is given."""
        return self.rows[0]


def blank(device: Device, shape: tuple[int, ...], layout: Layout = PLAIN, dtype: Any = None) -> Matrix:
    """Unwritten rows; the gaps between them do not exist as memory. By default of what the device stores tensors in."""
    dtype = dtype or getattr(device, "real", f32)
    rows, cols = int(np.prod(shape[:-1])), shape[-1]
    buffers = device.strided(rows, cols, cols + layout.gap, dtype, layout.skew)
    return Matrix(buffers, cols + layout.gap, shape)


def rounded(x: Any, half: str) -> Array:
    """To the nearest float16 or bfloat16, ties to even, as float32."""
    return widened(narrowed(np.asarray(x, f32), HALVES[half]))


def upload(device: Device, x: Array, layout: Layout = PLAIN, dtype: Any = None) -> Matrix:
    """A copy of x [.., C]; its type as of :func:`blank`."""
    matrix = blank(device, x.shape, layout, dtype)
    x = narrowed(np.asarray(x, f32), dtype) if dtype in HALVES.values() else np.asarray(x, dtype or f32)
    for buffer, row in zip(matrix.rows, x.reshape(-1, x.shape[-1]), strict=True):
        device.write(buffer, row)
    return matrix


def download(device: Device, matrix: Matrix) -> Array:
    """A copy of the rows; what was never written is NaN."""
    rows = np.stack([device.read(buffer) for buffer in matrix.rows]).reshape(matrix.shape)
    return widened(rows) if rows.dtype.itemsize == 2 else rows


def at(matrix: Matrix | None) -> Buffer | None:
    """The pointer of an optional operand."""
    return matrix and matrix.at


def ld(matrix: Matrix | None) -> i32:
    """The stride of an optional operand."""
    return i32(matrix.ld if matrix else 0)


def groups(rows: int, cols: int) -> int:
    """The grid of a kernel whose threads have four columns of a row each, in blocks of 256."""
    return ceil_div(rows * ceil_div(cols, 4), 256)


# ---- elementwise.cu -------------------------------------------------------------------------------------------------


def unary(device: Device, name: str, x: Array, layout: Layout = PLAIN, in_place: bool = False) -> Array:
    """f(x)."""
    xs = upload(device, x, layout)
    y = xs if in_place else blank(device, x.shape, layout)
    rows, cols = x.shape
    device.launch(
        f"{name}_forward_f32", groups(rows, cols), 256, xs.at, y.at, i32(rows), i32(cols), ld(xs), ld(y)
    )
    return download(device, y)


def unary_grad(
    device: Device, name: str, x: Array, dy: Array, layout: Layout = PLAIN, over: str = ""
) -> Array:
    """f'(x) · dy, written over x or dy if `over` names it."""
    xs, dys = upload(device, x, layout), upload(device, dy, layout)
    dx = {"x": xs, "dy": dys}.get(over) or blank(device, x.shape, layout)
    rows, cols = x.shape
    strides = (ld(xs), ld(dys), ld(dx))
    device.launch(
        f"{name}_backward_f32", groups(rows, cols), 256, xs.at, dys.at, dx.at, i32(rows), i32(cols), *strides
    )
    return download(device, dx)


def gated(device: Device, act: str, gate: Array, up: Array, layout: Layout = PLAIN, over: str = "") -> Array:
    """act(gate) · up, written over gate or up if `over` names it."""
    gates, ups = upload(device, gate, layout), upload(device, up, layout)
    y = {"gate": gates, "up": ups}.get(over) or blank(device, gate.shape, layout)
    sizes = (i32(gate.shape[0]), i32(gate.shape[1]), ld(gates), ld(ups), ld(y))
    number = i32(FUNCTIONS.index(act))
    device.launch("gated_forward_f32", groups(*gate.shape), 256, gates.at, ups.at, y.at, *sizes, number)
    return download(device, y)


def gated_grad(
    device: Device, act: str, dy: Array, gate: Array, up: Array, layout: Layout = PLAIN,
    over: tuple[str, str] = ("", ""),
) -> tuple[Array, Array]:  # fmt: skip
    """dy · up · act'(gate) and dy · act(gate), written over the operands that `over` names."""
    operands = {n: upload(device, x, layout) for n, x in (("dy", dy), ("gate", gate), ("up", up))}
    d = [operands.get(name) or blank(device, dy.shape, layout) for name in over]
    all_of = (*operands.values(), *d)
    sizes = (i32(dy.shape[0]), i32(dy.shape[1]), *map(ld, all_of))
    number = i32(FUNCTIONS.index(act))
    device.launch("gated_backward_f32", groups(*dy.shape), 256, *(x.at for x in all_of), *sizes, number)
    return download(device, d[0]), download(device, d[1])


def scale(device: Device, x: Array, s: float, layout: Layout = PLAIN) -> Array:
    """s · x."""
    xs, y = upload(device, x, layout), blank(device, x.shape, layout)
    sizes = (i32(x.shape[0]), i32(x.shape[1]), ld(xs), ld(y))
    device.launch("scale_forward_f32", groups(*x.shape), 256, xs.at, y.at, *sizes, f32(s))
    return download(device, y)


def _cast(device: Device, kernel: str, x: Array, layout: Layout, types: tuple[Any, Any]) -> Array:
    xs, y = upload(device, x, layout, types[0]), blank(device, x.shape, layout, types[1])
    sizes = (i32(x.shape[0]), i32(x.shape[1]), ld(xs), ld(y))
    grid = ceil_div(x.shape[0] * ceil_div(x.shape[1], 8), 256)
    device.launch(kernel, grid, 256, xs.at, y.at, *sizes)
    return download(device, y)


def narrow(device: Device, x: Array, layout: Layout = PLAIN) -> Array:
    """x in what the device stores tensors in."""
    return _cast(device, "narrow_forward_f32", x, layout, (f32, None))


def widen(device: Device, x: Array, layout: Layout = PLAIN) -> Array:
    """x, of what the device stores tensors in, in float32."""
    return _cast(device, "widen_forward_f32", x, layout, (None, f32))


def fill(device: Device, shape: tuple[int, int], value: float, layout: Layout = PLAIN) -> Array:
    """`value` everywhere."""
    y = blank(device, shape, layout)
    device.launch(
        "fill_forward_f32", groups(*shape), 256, y.at, i32(shape[0]), i32(shape[1]), ld(y), f32(value)
    )
    return download(device, y)


def binary(
    device: Device, name: str, a: Array, b: Array, layout: Layout = PLAIN, in_place: bool = False,
    halt: Buffer | None = None,
) -> Array:  # fmt: skip
    """a ∘ b with b [M, C] or [1, 1]."""
    left, right = upload(device, a, layout), upload(device, b, layout)
    y = left if in_place else blank(device, a.shape, layout)
    sizes = (*map(i32, (*a.shape, *b.shape)), ld(left), ld(right), ld(y))
    device.launch(f"{name}_forward_f32", groups(*a.shape), 256, left.at, right.at, y.at, *sizes, halt)
    return download(device, y)


def broadcast(
    device: Device, x: Array, shape: tuple[int, int], layout: Layout = PLAIN, dtype: Any = None,
    halt: Buffer | None = None,
) -> Array:  # fmt: skip
    """x [M, C] or [1, 1] repeated to `shape`."""
    xs = upload(device, x, layout, dtype)
    y = upload(device, np.zeros(shape), layout, dtype) if halt else blank(device, shape, layout, dtype)
    sizes = (*map(i32, (*shape, *x.shape)), ld(xs), ld(y))
    device.launch("broadcast_forward_f32", groups(*shape), 256, xs.at, y.at, *sizes, halt)
    return download(device, y)


def dropout_args(p: float, stream: int) -> tuple[np.generic, ...]:
    """stream, p, 1 / (1 − p)."""
    return u32(stream), f32(p), f32(1 / (1 - p))


def dropout(
    device: Device, x: Array, rng: Array, p: float, stream: int, layout: Layout = PLAIN,
    residual: Array | None = None, over: str = "",
) -> Array:  # fmt: skip
    """x · mask / (1 − p) (+ residual), written over x or the residual if `over` names it."""
    xs, r = upload(device, x, layout), device.array(rng, i32)
    residuals = None if residual is None else upload(device, residual, layout)
    y = {"x": xs, "residual": residuals}.get(over) or blank(device, x.shape, layout)
    device.launch(
        "dropout_forward_f32", groups(*x.shape), 256, xs.at, r, at(residuals), y.at, i32(x.shape[0]), i32(x.shape[1]),
        ld(xs), ld(residuals), ld(y), *dropout_args(p, stream),
    )  # fmt: skip
    return download(device, y)


def epilogue(
    device: Device, product: Array, bias: Array | None, act: str, keep_pre: bool, act_grad: str, x: Array | None,
    residual: Array | None, layout: Layout = PLAIN, over: str = "",
) -> tuple[Array, Array | None]:  # fmt: skip
    """y = act(product + bias) · act_grad'(x) + residual, and the value before act."""
    products = upload(device, product, layout)
    xs, residuals = (None if z is None else upload(device, z, layout) for z in (x, residual))
    biases = None if bias is None else device.array(bias)
    y = {"product": products, "residual": residuals}.get(over) or blank(device, product.shape, layout)
    pre = blank(device, product.shape, layout) if keep_pre else None
    device.launch(
        "epilogue_forward_f32", groups(*product.shape), 256, products.at, biases, at(xs), at(residuals), y.at, at(pre),
        i32(product.shape[0]), i32(product.shape[1]), ld(products), ld(xs), ld(residuals), ld(y), ld(pre),
        i32(FUNCTIONS.index(act)), i32(FUNCTIONS.index(act_grad)),
    )  # fmt: skip
    return download(device, y), None if pre is None else download(device, pre)


# ---- norm.cu --------------------------------------------------------------------------------------------------------


def row_warps(cols: int) -> int:
    """The fewest of 1, 2, 4 and 8 warps that hold a row of so many columns, or 8."""
    return next((warps for warps in (1, 2, 4) if cols <= 1024 * warps), 8)


def layer_norm(
    device: Device,
    x: Array,
    weight: Array,
    bias: Array | None,
    eps: float,
    layout: Layout = PLAIN,
    center: bool = True,
    warps: int = 0,
) -> tuple[Array, Array, Array]:
    """y, mean, rstd. `warps` have a row, by default as many as :func:`row_warps` says."""
    rows, cols = x.shape
    xs, y = upload(device, x, layout), blank(device, x.shape, layout)
    w, b = device.array(weight), None if bias is None else device.array(bias)
    mean, rstd = device.empty((rows,)), device.empty((rows,))
    warps = warps or row_warps(cols)
    sizes = (i32(rows), i32(cols), ld(xs), ld(y), f32(eps), i32(center), i32(warps))
    grid = ceil_div(rows * warps, 8)
    device.launch("layer_norm_forward_f32", grid, 256, xs.at, w, b, y.at, mean, rstd, *sizes)
    return download(device, y), device.read(mean), device.read(rstd)


def layer_norm_grad(
    device: Device, dy: Array, x: Array, weight: Array, mean: Array, rstd: Array, residual: Array | None = None,
    layout: Layout = PLAIN, over: str = "", chunk: int = 64, center: bool = True, warps: int = 0,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """dx (+ residual), dweight, dbias: two launches. `chunk` rows are summed at a time, `warps` have a row."""
    rows, cols = x.shape
    dys, xs = upload(device, dy, layout), upload(device, x, layout)
    residuals = None if residual is None else upload(device, residual, layout)
    w, m, r = device.array(weight), device.array(mean), device.array(rstd)
    chunks = ceil_div(rows, chunk)
    parts = device.empty((2, chunks, cols))
    dx = {"dy": dys, "residual": residuals}.get(over) or blank(device, x.shape, layout)
    device.launch(
        "layer_norm_backward_f32", chunks, 256, dys.at, xs.at, w, m, r, at(residuals), dx.at, parts, i32(rows),
        i32(cols), ld(dys), ld(xs), ld(residuals), ld(dx), i32(chunk), i32(center), i32(warps or row_warps(cols)),
    )  # fmt: skip
    dweight, dbias = device.empty((cols,)), device.empty((cols,))
    sizes = tuple(map(i32, (chunks, 1, cols, cols, chunks)))
    grid = (ceil_div(cols, 32), 1, 2)
    device.launch("sum_to_forward_f32", grid, (32, 8), parts, dweight, dbias, *sizes)
    return download(device, dx), device.read(dweight), device.read(dbias)


# ---- rows.cu --------------------------------------------------------------------------------------------------------


def gather(device: Device, table: Array, index: Array, layout: Layout = PLAIN) -> Array:
    """table[index]."""
    t, n, y = (
        upload(device, table, layout),
        device.array(index, i32),
        blank(device, (len(index), table.shape[1]), layout),
    )
    sizes = (i32(table.shape[0]), i32(len(index)), i32(table.shape[1]), ld(t), ld(y))
    device.launch("gather_forward_f32", groups(len(index), table.shape[1]), 256, t.at, n, y.at, *sizes)
    return download(device, y)


def gather_narrow(device: Device, table: Array, index: Array, layout: Layout = PLAIN) -> Array:
    """table[index], of float32, in what the device stores tensors in."""
    t, n, y = (
        upload(device, table, layout, f32),
        device.array(index, i32),
        blank(device, (len(index), table.shape[1]), layout),
    )
    sizes = (i32(table.shape[0]), i32(len(index)), i32(table.shape[1]), ld(t), ld(y))
    grid = groups(len(index), table.shape[1])
    device.launch("gather_narrow_forward_f32", grid, 256, t.at, n, y.at, *sizes)
    return download(device, y)


def scatter_add(device: Device, source: Array, index: Array, base: Array, layout: Layout = PLAIN) -> Array:
    """base with each source row added at its index."""
    s, n, y = upload(device, source, layout), device.array(index, i32), upload(device, base, layout, f32)
    rows, cols = source.shape
    sizes = (i32(base.shape[0]), i32(rows), i32(cols), ld(s), ld(y))
    device.launch(
        "scatter_add_forward_f32", (ceil_div(rows, 4), ceil_div(cols, 128)), 128, s.at, n, y.at, *sizes
    )
    return download(device, y)


def count_labels(device: Device, labels: Array) -> float:
    """How many labels are 0 or more."""
    n, y = device.array(labels, i32), device.empty((1,))
    device.launch("count_labels_forward_f32", 1, 256, n, y, i32(len(labels)))
    return float(device.read(y)[0])


# ---- loss.cu --------------------------------------------------------------------------------------------------------


def cross_entropy(
    device: Device,
    logits: Array,
    labels: Array,
    bias: Array | None,
    dloss: float | None,
    layout: Layout = PLAIN,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, Array | None]:
    """The loss of each row; with dloss also the gradient, computed over the logits."""
    tail = (f32(smoothing), f32(z_loss))
    z, n, loss = upload(device, logits, layout), device.array(labels, i32), device.empty((len(labels),))
    b = None if bias is None else device.array(bias)
    rows, classes = logits.shape
    if dloss is None:
        device.launch("cross_entropy_forward_f32", rows, 256, z.at, b, n, loss, i32(classes), ld(z), *tail)
        return device.read(loss), None
    scale = device.array([dloss])
    sizes = (i32(classes), ld(z), *tail)
    device.launch("cross_entropy_backward_f32", rows, 256, z.at, b, n, scale, loss, *sizes)
    return device.read(loss), download(device, z)


# ---- reduce.cu, optimizer.cu ----------------------------------------------------------------------------------------


def sum_to(device: Device, x: Array, result_rows: int, chunk: int, layout: Layout = PLAIN) -> Array:
    """Sums x [copies · M, C] to [M, C], `chunk` copies at a time."""
    xs, cols = upload(device, x, layout), x.shape[1]
    copies = x.shape[0] // result_rows
    chunks = ceil_div(copies, chunk)
    parts, y = device.empty((chunks * result_rows, cols)), device.empty((result_rows, cols))
    blocks = ceil_div(result_rows * cols, 32)
    first = (i32(copies), i32(result_rows), i32(cols), ld(xs), i32(chunk))
    device.launch("sum_to_forward_f32", (blocks, chunks), (32, 8), xs.at, parts, None, *first)
    second = tuple(map(i32, (chunks, result_rows, cols, cols, chunks)))
    device.launch("sum_to_forward_f32", (blocks, 1), (32, 8), parts, y, None, *second)
    return device.read(y)


def sum_all(device: Device, x: Array, chunk: int, layout: Layout = PLAIN) -> float:
    """The sum of all elements of x [N, C], `chunk` elements at a time."""
    xs, chunks = upload(device, x, layout), ceil_div(x.size, chunk)
    parts, y = device.empty((chunks,)), device.empty((1,))
    device.launch(
        "sum_forward_f32", chunks, 256, xs.at, parts, i32(x.size), i32(x.shape[1]), ld(xs), i32(chunk)
    )
    device.launch("sum_forward_f32", 1, 256, parts, y, *map(i32, (chunks, chunks, chunks, chunks)))
    return float(device.read(y)[0])


def table(device: Device, cells: list[Any]) -> Buffer:
    """An array of structs: buffers, None and NumPy scalars, one behind the other."""
    wide = (np.uint64(x.address if x else 0) if x is None or isinstance(x, Buffer) else x for x in cells)
    return device.array(np.frombuffer(b"".join(x.tobytes() for x in wide), u32), u32)


def first_blocks(counts: list[int]) -> list[np.int32]:
    """Where the blocks of tensors with so many each begin, and how many there are."""
    return list(np.cumsum([0, *counts], dtype=i32))


def global_norm(
    device: Device, gradients: list[Array], chunk: int, layout: Layout = PLAIN, halt: Buffer | None = None
) -> Buffer:
    """√(Σ ‖g‖²), left on the device."""
    first = first_blocks([ceil_div(g.size, chunk) for g in gradients])
    parts, y = device.empty((int(first[-1]),)), device.empty((1,))
    cells: list[Any] = []
    for g in gradients:
        gs = upload(device, g, layout)
        cells += [gs.at, i32(g.size), i32(g.shape[1]), ld(gs), i32(chunk)]
    tables = table(device, cells), table(device, first), i32(len(gradients))
    device.launch("global_norm_parts_forward_f32", int(first[-1]), 256, *tables, parts)
    device.launch("global_norm_forward_f32", 1, 256, parts, y, first[-1], halt)
    return y


def clip_factor(device: Device, norm: Buffer, max_norm: float) -> Buffer:
    """min(1, max_norm / (norm + 1e-6)), left on the device."""
    y = device.empty((1,))
    device.launch("clip_factor_forward_f32", 1, 1, norm, y, f32(max_norm))
    return y


#: Groups of four columns that a block of AdamW updates.
UPDATE_GROUPS = 1024


@dataclass(frozen=True)
class Chance:
    """How AdamW rounds new weights: the random state, each one's stream, and whether it is stored as bfloat16."""

    rng: Array
    streams: list[int]
    narrow: list[bool]


def adamw_of_all(
    device: Device, tensors: list[tuple[Array, ...]], clip: float, lr: float, step: int,
    betas: tuple[float, float], eps: float, decays: list[float], layout: Layout = PLAIN, in_place: bool = True,
    halt: Buffer | None = None, copies: list[str] | None = None, chance: Chance | None = None,
) -> list[tuple[Array, ...]]:  # fmt: skip
    """Of each p, g, m, v with its decay: p, m, v after one update, and p in the type of `copies`, "bf16" or "f16":
    those of a launch have one type."""
    copies = copies or [""] * len(tensors)
    cells: list[Any] = []
    made: list[tuple[Any, ...]] = []
    streams, narrow = (
        (chance.streams, chance.narrow) if chance else ([0] * len(tensors), [False] * len(tensors))
    )
    each = zip(tensors, decays, copies, streams, narrow, strict=True)
    for (p, g, m, v), decay, copy, stream, small in each:
        kinds = (HALVES["bf16"] if small else f32, f32, f32)
        values = (narrowed(p, kinds[0]) if small else p, m, v)
        old = [device.array(z, kind) for z, kind in zip(values, kinds, strict=True)]
        new = old if in_place else [device.empty(p.shape, kind) for kind in kinds]
        gs = upload(device, g, layout)
        beside = device.empty(p.shape, HALVES[copy]) if copy else None
        cells += [old[0], gs.at, old[1], old[2], *new, beside, i32(p.shape[0]), i32(p.shape[1]), ld(gs)]
        cells += [f32(decay), u32(stream), i32(small)]
        made.append((*new, *([beside] if copy else [])))
    first = first_blocks([ceil_div(p.shape[0] * ceil_div(p.shape[1], 4), UPDATE_GROUPS) for p, *_ in tensors])
    args = [table(device, cells), table(device, first), i32(len(tensors))]
    args += [device.array([clip]), device.array([lr]), device.array([step], i32)]
    args += [device.array(chance.rng, i32)] if chance else []
    args += map(f32, (*betas, 1 - betas[0], 1 - betas[1], np.log(betas[0]), np.log(betas[1]), eps))
    kind = "bf16" if any(narrow) else next(filter(None, copies), "f32")
    kernel = f"adamw_rounded_forward_{kind}" if chance else f"adamw_forward_{kind}"
    device.launch(kernel, int(first[-1]), 256, *args, halt)

    def read(buffer: Buffer) -> Array:
        found = device.read(buffer)
        return found if found.dtype == f32 else widened(found)

    return [tuple(map(read, buffers)) for buffers in made]


def adamw(
    device: Device, p: Array, g: Array, m: Array, v: Array, clip: float, lr: float, step: int,
    betas: tuple[float, float], eps: float, decay: float, layout: Layout = PLAIN, in_place: bool = True,
    halt: Buffer | None = None, copy: str = "",
) -> tuple[Array, ...]:  # fmt: skip
    """The same of one tensor."""
    tensor = (p, g, m, v)
    return adamw_of_all(
        device, [tensor], clip, lr, step, betas, eps, [decay], layout, in_place, halt, [copy]
    )[0]


# ---- positions.cu ---------------------------------------------------------------------------------------------------


def iota(device: Device, rows: int, start: int, step: int) -> Array:
    """start, start + step, …"""
    y = device.empty((rows,), i32)
    device.launch("iota_forward_f32", ceil_div(rows, 256), 256, y, i32(rows), i32(start), i32(step))
    return device.read(y)


def rope_table(
    device: Device, positions: Array, inv_freq: list[float], scale: float, layout: Layout = PLAIN
) -> Array:
    """[cos, sin] of position · frequency, times scale: [N, R]."""
    fixed = [int((f / (2 * np.pi)) % 1 * 2.0**64) for f in inv_freq]
    turns = device.array([word for x in fixed for word in (x & 0xFFFFFFFF, x >> 32)], u32)
    n, half = len(positions), len(inv_freq)
    p, table = device.array(positions, i32), blank(device, (n, 2 * half), layout)
    sizes = (i32(n), i32(half), ld(table), f32(scale))
    device.launch("rope_table_forward_f32", ceil_div(n * half, 256), 256, p, turns, table.at, *sizes)
    return download(device, table)


def rope(
    device: Device, x: Array, table: Array, heads: int, inverse: bool, layout: Layout = PLAIN,
    in_place: bool = False,
) -> Array:  # fmt: skip
    """x [N, H · D] with the pairs of each head turned."""
    xs, t = upload(device, x, layout), upload(device, table, layout, f32)
    y = xs if in_place else blank(device, x.shape, layout)
    width, half = x.shape[1] // heads, table.shape[1] // 2
    sizes = (*map(i32, (x.shape[0], heads, width, half)), ld(xs), ld(t), ld(y), f32(-1 if inverse else 1))
    grid = ceil_div(x.shape[0] * heads * (width - half), 256)
    device.launch("rope_forward_f32", grid, 256, xs.at, t.at, y.at, *sizes)
    return download(device, y)


def alibi_bias(
    device: Device, positions: Array, slopes: Array, scale: float, rounded: bool, layout: Layout = PLAIN
) -> Array:
    """[N · H, T] of positions [N, T]."""
    n, tokens = positions.shape
    p, s = device.array(positions, i32), device.array(slopes)
    y = blank(device, (n * len(slopes), tokens), layout)
    sizes = (*map(i32, (n, len(slopes), tokens)), ld(y), f32(scale), i32(rounded))
    grid = ceil_div(n * len(slopes) * tokens, 256)
    device.launch("alibi_bias_forward_f32", grid, 256, p, s, y.at, *sizes)
    return download(device, y)


# ---- attention.cu, cache.cu -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Dropout: rng [4], the site's stream and p."""

    rng: Array
    stream: int
    p: float


#: Rows of a block of each kernel of attention_mma.cu, by type and the widest head that it takes.
TENSOR_ROWS = {
    "bf16": {
        64: {"forward": 128, "dq_backward": 128, "dkv_backward": 128},
        128: {"forward": 128, "dq_backward": 128, "dkv_backward": 64},
        256: {"forward": 64, "dq_backward": 64, "dkv_backward": 64},
    },
    "f16": {
        64: {"forward": 128, "dq_backward": 128, "dkv_backward": 128},
        128: {"forward": 128, "dq_backward": 64, "dkv_backward": 64},
    },
}


def attention(
    device: Device, q: Array, k: Array, v: Array, scale: float, *, dout: Array | None = None, causal: bool = False,
    window: int | None = None, segments: Array | None = None, key_bias: Array | None = None,
    prefix: Array | None = None, site: Site | None = None, layout: Layout = PLAIN, half: str = "",
) -> dict[str, Array]:  # fmt: skip
    """out and lse; with dout also dq, dk, dv. q [B, T, H, D]; k, v [B, T, K, D]; with `half` ("bf16", "f16"), on
    tensor cores, all but lse rounded to that type."""
    batch, tokens, heads, width = q.shape
    kernel, block, dtype = "attention_{}_f32", 256, f32
    rows, slices = dict.fromkeys(("forward", "dq_backward", "dkv_backward"), 64), ceil_div(width, 128)
    if half:
        widest = next(w for w in TENSOR_ROWS[half] if width <= w)
        kernel, block, dtype = f"attention{widest}_{{}}_{half}", 128, HALVES[half]
        rows, slices = TENSOR_ROWS[half][widest], 1
    kv_heads = k.shape[2]
    flat = [upload(device, x.reshape(batch, tokens, -1), layout, dtype) for x in (q, k, v)]
    out, lse = blank(device, flat[0].shape, layout, dtype), device.empty((batch, heads, tokens))
    s = None if segments is None else device.array(segments, i32)
    r = None if site is None else device.array(site.rng, i32)
    kb = None if key_bias is None else device.array(key_bias)
    pre = None if prefix is None else device.array(prefix, i32)
    sizes = tuple(map(i32, (batch, tokens, heads, kv_heads, width)))
    rule = dropout_args(site.p, site.stream) if site else dropout_args(0, 0)
    tail = (i32(causal), i32(window or NO_WINDOW), f32(scale), *rule)
    pointers, strides = [x.at for x in flat], [ld(x) for x in flat]
    device.launch(
        kernel.format("forward"),
        (ceil_div(tokens, rows["forward"]), heads, batch * slices),
        block,
        *pointers,
        s,
        kb,
        pre,
        r,
        out.at,
        lse,
        *sizes,
        *strides,
        ld(out),
        *tail,
    )
    results = {"out": download(device, out).reshape(q.shape), "lse": device.read(lse)}
    if dout is None:
        return results
    d = upload(device, dout.reshape(batch, tokens, -1), layout, dtype)
    delta = device.empty((batch, heads, tokens))
    delta_sizes = (*map(i32, (batch, tokens, heads, width)), ld(d), ld(out))
    device.launch(
        f"attention_delta_backward_{half or 'f32'}",
        ceil_div(batch * tokens * heads, 16 if half else 4),
        128,
        d.at,
        out.at,
        delta,
        *delta_sizes,
    )
    dq, dk, dv = (blank(device, x.shape, layout, dtype) for x in flat)
    inputs = (d.at, *pointers, lse, delta, s, kb, pre, r)
    grid = (ceil_div(tokens, rows["dq_backward"]), heads, batch * slices)
    device.launch(
        kernel.format("dq_backward"), grid, block, *inputs, dq.at, *sizes, ld(d), *strides, ld(dq), *tail
    )
    if half:
        slices = 2 if widest == 256 else 1
    grid = (ceil_div(tokens, rows["dkv_backward"]), kv_heads, batch * slices)
    strides = [ld(d), *strides, ld(dk), ld(dv)]
    device.launch(kernel.format("dkv_backward"), grid, block, *inputs, dk.at, dv.at, *sizes, *strides, *tail)
    shapes = {"dq": (dq, q.shape), "dk": (dk, k.shape), "dv": (dv, v.shape)}
    return results | {name: download(device, x).reshape(shape) for name, (x, shape) in shapes.items()}


def cache_write(
    device: Device,
    cache: Array,
    source: Array,
    row: Array,
    start: Array,
    count: Array,
    layout: Layout = PLAIN,
) -> Array:
    """cache [R, S, C] with source [B, T, C] written into it."""
    c, s = upload(device, cache.reshape(1, -1)), upload(device, source, layout)
    batch, tokens, cols = source.shape
    numbers = [device.array(x, i32) for x in (row, start, count)]
    sizes = (*map(i32, (batch, tokens, cols)), ld(s), i32(cache.shape[0]), i32(cache.shape[1]))
    device.launch("cache_write_forward_f32", groups(batch * tokens, cols), 256, s.at, *numbers, c.at, *sizes)
    return download(device, c).reshape(cache.shape)


def cached_attention(
    device: Device, q: Array, k: Array, v: Array, rows: Array, start: Array, count: Array, scale: float,
    window: int | None = None, layout: Layout = PLAIN, key_bias: Array | None = None, span: int | None = None,
) -> Array:  # fmt: skip
    """out [B, T, H, D]; q likewise, caches [R, S, K, D], rows [B, S], key_bias [H, S]; positions in spans."""
    batch, tokens, heads, width = q.shape
    qs, out = (
        f(device, x, layout)
        for f, x in ((upload, q.reshape(batch, tokens, -1)), (blank, (batch, tokens, heads * width)))
    )
    caches, numbers = (
        [upload(device, x.reshape(1, -1)).at for x in (k, v)],
        [device.array(x, i32) for x in (rows, start, count)],
    )
    sizes = (*map(i32, (tokens, heads, k.shape[2], width)), ld(qs), ld(out), i32(k.shape[0]), i32(k.shape[1]))
    grid, slots = (tokens, heads, batch), k.shape[1]
    spans = ceil_div(slots, span or slots)
    sums = device.empty((batch, tokens, heads, spans, width)) if span else None
    bounds = device.empty((batch, tokens, heads, spans, 2)) if span else None
    device.launch(
        "cached_attention_forward_f32",
        (spans * tokens, heads, batch),
        128,
        qs.at,
        *caches,
        *numbers,
        None if key_bias is None else device.array(key_bias),
        None if span else out.at,
        sums,
        bounds,
        *sizes,
        i32(window or NO_WINDOW),
        f32(scale),
        i32(spans),
        i32(span or slots),
    )
    if span:
        sizes = (*map(i32, (tokens, heads, width)), ld(out), i32(spans))
        device.launch("cached_attention_join_forward_f32", grid, 128, sums, bounds, out.at, *sizes)
    return download(device, out).reshape(q.shape)


# ---- best.cu --------------------------------------------------------------------------------------------------------


def best(
    device: Device, x: Array, temperature: Array, count: int, layout: Layout = PLAIN, most: int = 4096
) -> tuple[Array, Array, Array]:
    """best and tokens [R, K], masses [R, 2] in float64, by way of pieces of at most `most` columns."""
    xs, t = upload(device, x, layout), device.array(temperature)
    rows, cols = x.shape
    place, stride, tokens, parts, piece = xs.at, ld(xs), None, None, most
    while True:
        pieces = ceil_div(cols, piece)
        shape = (rows, pieces * count)
        values, columns = device.empty(shape), device.empty(shape, i32)
        masses = device.empty((rows, pieces, 5) if pieces > 1 else (rows, 4))
        sizes = (i32(cols), i32(stride), i32(piece), i32(count))
        device.launch(
            "best_forward_f32", (pieces, rows), 512, place, tokens, parts, t, values, columns, masses, *sizes
        )
        if pieces == 1:
            halves = device.read(masses).astype(float).reshape(rows, 2, 2)
            return device.read(values), device.read(columns), halves.sum(2)
        place, tokens, parts, cols, stride = values, columns, masses, pieces * count, pieces * count
        piece = most // count * count


# ---- relative.cu ----------------------------------------------------------------------------------------------------


def relative_attention(
    device: Device, x: dict[str, Array], scale: float, *, sees_itself: bool = True, dout: Array | None = None,
    site: Site | None = None, layout: Layout = PLAIN,
) -> dict[str, Array]:  # fmt: skip
    """out; with dout also the gradients of x's float operands: q_k, q_r, q_s [B, T, H, D], k, v [B, S, H, D],
    r [S + U, H, D], kinds [2, H, D]; at, q_kinds, k_kinds, hidden (or None) as the kernels take them."""
    names = ("q_k", "q_r", "q_s", "k", "v", "r", "kinds")
    batch, tokens, heads, width = x["q_k"].shape
    keys, places = x["k"].shape[1], x["q_kinds"].shape[1]
    flat = [upload(device, x[n].reshape(*x[n].shape[:-2], -1), layout) for n in names]
    integers = [
        None if x[n] is None else device.array(x[n], i32) for n in ("at", "q_kinds", "k_kinds", "hidden")
    ]
    rng = None if site is None else device.array(site.rng, i32)
    rule = dropout_args(site.p, site.stream) if site else dropout_args(0, 0)
    tail = (i32(sees_itself), f32(scale), *rule)
    operands = (*(m.at for m in flat), *integers, rng)
    counts, strides = tuple(map(i32, (tokens, keys, places, width))), [ld(m) for m in flat]
    out, kernel = blank(device, flat[0].shape, layout), "relative_attention_{}_f32"
    slices = ceil_div(width, 128)
    grid = (ceil_div(tokens, 64) * slices, heads, batch)
    device.launch(kernel.format("forward"), grid, 256, *operands, out.at, *counts, *strides, ld(out), *tail)
    results = {"out": download(device, out).reshape(x["q_k"].shape)}
    if dout is None:
        return results
    d = upload(device, dout.reshape(batch, tokens, -1), layout)
    made = {n: blank(device, m.shape, layout) for n, m in zip(names, flat, strict=True)}
    rows = [device.empty((batch, heads, tokens)) for _ in range(3)]
    by_kind = device.empty((2, batch, heads, tokens))

    def launch(which: str, grid: tuple[int, ...], results: Any, more: Any = (), count: Any = ()) -> None:
        pointers = (*results, *(made[n].at for n in more))
        lds = (ld(d), *strides, *(ld(made[n]) for n in more))
        name = kernel.format(f"{which}_backward")
        device.launch(name, grid, 256, d.at, *operands, *pointers, *count, *counts, *lds, *tail)

    dq = [made[n] for n in ("q_k", "q_r", "q_s")]
    pointers = (*(m.at for m in dq), *rows, by_kind)
    lds = (ld(d), *strides, *(ld(m) for m in dq))
    device.launch(kernel.format("dq_backward"), grid, 256, d.at, *operands, *pointers, *counts, *lds, *tail)
    launch("dkv", (ceil_div(keys, 64) * slices, heads, batch), rows, ("k", "v"))
    launch("dr", (ceil_div(keys + places, 64) * slices, heads), rows, ("r",), (i32(batch),))
    sizes = (*map(i32, (batch, tokens, heads, width)), strides[2], ld(made["kinds"]))
    grid = (ceil_div(width, 32), 2, heads)
    pointers = by_kind, flat[2].at, made["kinds"].at
    device.launch(kernel.format("dkinds_backward"), grid, (32, 8), *pointers, *sizes)
    return results | {n: download(device, m).reshape(x[n].shape) for n, m in made.items()}
