"""What each launch record moves and computes, from its kernel's name and arguments.

The rules restate how the kernels of ``cuda/*.cu`` walk their operands; tests hold them against what the kernels' PTX
does when it is run. FLOPs count a multiply-add as two, a function such as exp by the arithmetic of its usual expansion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

WORD = 4
BYTES = {"f32": 4, "bf16": 2, "f16": 2}
HALVES = ("bf16", "f16")
SECTOR = 32
#: FLOPs of one value of each function of ``elementwise.cu``, by its number there, and of its slope.
FUNCTION_FLOPS = (0, 8, 14, 12, 1, 22, 24, 12, 13, 2, 24, 1, 2)
FUNCTIONS = (
    "none", "exp", "tanh", "sigmoid", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2", "mish",
    "sqrt", "sign",
)  # fmt: skip
#: Tiles of ``attention.cu``.
TILE, DEPTH, SLICE, THREADS = 64, 32, 128, 256
#: The tile of a matrix product that cuBLASLt is taken to choose where there are many, and where there are few.
PRODUCT_TILE, SMALL_TILE = 128, 64


@dataclass(frozen=True)
class Work:
    """One record's work.

    ``unique``: distinct bytes that it reads, and distinct ones that it writes; ``sectors``: pieces of 32 bytes that its
    warps ask of the cache; ``flops``: in float32; ``tensor``: of them on tensor cores; ``passes``: rows of 128 bytes
    that shared memory delivers; ``blocks``: pieces that run independently of each other."""

    unique: int
    sectors: int
    flops: float
    passes: float = 0.0
    tensor: float = 0.0
    blocks: int = 1

    def __add__(self, other: Work) -> Work:
        """Both, in one launch."""
        return Work(
            self.unique + other.unique, self.sectors + other.sectors, self.flops + other.flops,
            self.passes + other.passes, self.tensor + other.tensor,
        )  # fmt: skip

    @property
    def moved(self) -> int:
        """Bytes between multiprocessors and caches."""
        return SECTOR * self.sectors


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _sectors(rows: int, cols: int, size: int = WORD) -> int:
    """Of rows that begin on a sector, of elements of so many bytes."""
    return rows * _ceil(size * cols, SECTOR)


def _beside(rows: int, cols: int, size: int) -> int:
    """Of float32 whose threads have as many columns as 128 bits hold of the other operands: beside bfloat16, each of
    two requests finds half of what it asks of a sector."""
    return _sectors(rows, cols) * WORD // size


def _warps(rows: int, cols: int, size: int = WORD) -> int:
    """Of a kernel whose threads have 128 bits of one row each, in the order of rows."""
    return _ceil(rows * _ceil(size * cols, 16), 32)


def _streams(reads: list[tuple[int, int]], writes: list[tuple[int, int]], flops: float) -> Work:
    """Matrices that are read or written once."""
    both = reads + writes
    return Work(sum(WORD * r * c for r, c in both), sum(_sectors(r, c) for r, c in both), flops)


def _alike(size: int, rows: int, cols: int, flops: float, *places: Any) -> Work:
    """Matrices of one shape, read or written once; null ones are absent."""
    present = sum(map(bool, places))
    return Work(size * present * rows * cols, present * _sectors(rows, cols, size), flops * rows * cols)


# ---- Rules: each takes the kernel's own arguments; a pointer is true where there is one -----------------------------
# Those of kernels that there are for float32 and for bfloat16 take the bytes of an element first.

Rule = Callable[..., Work]
RULES: dict[str, Rule] = {}


def _rule(f: Rule) -> Rule:
    RULES[f.__name__ + "_f32"] = f
    return f


def _enter(name: str, f: Rule) -> None:
    """The rule of a kernel for tensors of each type."""
    RULES.update({f"{name}_{of}": partial(f, size) for of, size in BYTES.items()})


def _stored(f: Rule) -> Rule:
    _enter(f.__name__, f)
    return f


def _unary(flops: int) -> Rule:
    return lambda size, grid, x, y, rows, cols, *_: _alike(size, rows, cols, flops, x, y)


def _unary_backward(flops: int) -> Rule:
    return lambda size, grid, x, dy, dx, rows, cols, *_: _alike(size, rows, cols, flops + 4, x, dy, dx)


def _repeated(size: int, rows: int, cols: int, b_rows: int, b_cols: int) -> Work:
    """A matrix that is read once for each of its copies in ``[rows, cols]``, and comes from memory once."""
    # A single element is asked for by each warp, which has 512 bytes of a row.
    sectors = _sectors(rows, cols, size) if b_cols == cols else 4 * rows * _ceil(size * cols, 512)
    return Work(size * b_rows * b_cols, sectors, 0)


def _heeding(halt: Any, warps: int) -> Work:
    """Each warp looks whether the program has ended."""
    return Work(WORD, warps, 0) if halt else Work(0, 0, 0)


def _binary(
    size: int, grid: Any, a: Any, b: Any, y: Any, rows: int, cols: int, b_rows: int, b_cols: int, a_ld: int, b_ld: int,
    y_ld: int, halt: Any,
) -> Work:  # fmt: skip
    repeated = _repeated(size, rows, cols, b_rows, b_cols)
    return _alike(size, rows, cols, 1, a, y) + repeated + _heeding(halt, _warps(rows, cols, size))


for _name, _flops in zip(FUNCTIONS[1:], FUNCTION_FLOPS[1:], strict=True):
    _enter(f"{_name}_forward", _unary(_flops))
    _enter(f"{_name}_backward", _unary_backward(_flops))
_enter("scale_forward", _unary(1))
for _name in ("add", "sub", "mul", "div"):
    _enter(f"{_name}_forward", _binary)


def _cast(grid: Any, x: Any, y: Any, rows: int, cols: int, *_: Any) -> Work:
    # Either may be the one in float32.
    return Work(6 * rows * cols, _beside(rows, cols, 2) + _sectors(rows, cols, 2), 0)


RULES.update({f"{way}_forward_{half}": _cast for way in ("narrow", "widen") for half in HALVES})


@_stored
def fill_forward(size: int, grid: Any, y: Any, rows: int, cols: int, *_: Any) -> Work:
    return _alike(size, rows, cols, 0, y)


@_stored
def broadcast_forward(
    size: int, grid: Any, x: Any, y: Any, rows: int, cols: int, x_rows: int, x_cols: int, x_ld: int, y_ld: int,
    halt: Any,
) -> Work:  # fmt: skip
    repeated = _repeated(size, rows, cols, x_rows, x_cols)
    return _alike(size, rows, cols, 0, y) + repeated + _heeding(halt, _warps(rows, cols, size))


@_stored
def dropout_forward(
    size: int, grid: Any, x: Any, rng: Any, residual: Any, y: Any, rows: int, cols: int, *_: Any
) -> Work:
    # Each warp reads the state; Philox gives four words for some hundred integer operations.
    state = Work(4 * WORD, _ceil(size * rows * cols, 512) * 4, 28 * rows * cols)
    return _alike(size, rows, cols, 2 + bool(residual), x, residual, y) + state


@_stored
def epilogue_forward(
    size: int, grid: Any, product: Any, bias: Any, x: Any, residual: Any, y: Any, pre: Any, rows: int, cols: int,
    *more: int,
) -> Work:  # fmt: skip
    act, slope = more[-2:]
    flops = FUNCTION_FLOPS[act] + (FUNCTION_FLOPS[slope] + 4 if slope else 0) + bool(residual)
    return _alike(size, rows, cols, flops, product, x, residual, y, pre)


@_stored
def gated_forward(
    size: int, grid: Any, gate: Any, up: Any, y: Any, rows: int, cols: int, gate_ld: int, up_ld: int, y_ld: int,
    act: int,
) -> Work:  # fmt: skip
    return _alike(size, rows, cols, FUNCTION_FLOPS[act] + 1, gate, up, y)


@_stored
def gated_backward(
    size: int, grid: Any, dy: Any, gate: Any, up: Any, dgate: Any, dup: Any, rows: int, cols: int, *more: int
) -> Work:
    return _alike(size, rows, cols, 2 * FUNCTION_FLOPS[more[-1]] + 7, dy, gate, up, dgate, dup)


@_stored
def layer_norm_forward(
    size: int,
    grid: Any,
    x: Any,
    weight: Any,
    bias: Any,
    y: Any,
    mean: Any,
    rstd: Any,
    rows: int,
    cols: int,
    *_: Any,
) -> Work:
    parameters = 1 + bool(bias)
    unique = size * 2 * rows * cols + WORD * (parameters * cols + 2 * rows)
    # What is not held of a row is read three times: mean, variance, result.
    again = rows * 2 * _sectors(1, _not_held(cols), size)
    sectors = 2 * _sectors(rows, cols, size) + again + parameters * _beside(rows, cols, size) + 2 * rows
    return Work(unique, sectors, 14 * rows * cols)


def _not_held(cols: int) -> int:
    """Columns of a row that a norm's threads do not hold in registers."""
    return max(0, cols - 8192)


@_stored
def layer_norm_backward(
    size: int, grid: list[int], dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, residual: Any, dx: Any, parts: Any,
    rows: int, cols: int, *more: int,
) -> Work:  # fmt: skip
    warps, chunks, wide = more[-1], grid[0], _not_held(cols)
    tensors = 3 + bool(residual)
    unique = size * tensors * rows * cols + WORD * (cols + 2 * rows + 2 * chunks * (cols + wide))
    # The weight is read twice; so is what is not held of x and dy, whose sums are read and written with each row.
    again = rows * 2 * (_sectors(1, wide, size) + 2 * _beside(1, wide, size))
    sums = 2 * _sectors(chunks, cols - wide)
    sectors = (
        tensors * _sectors(rows, cols, size) + 2 * _beside(rows, cols, size) + again + sums + 2 * rows * warps
    )
    return Work(unique, sectors, 24 * rows * cols + 16 * chunks * cols)


def _gather(
    size: int, table_size: int, grid: Any, table: Any, index: Any, y: Any, table_rows: int, rows: int, cols: int,
    *_: Any,
) -> Work:  # fmt: skip
    # At most: rows that are looked up twice come from memory once.
    table_sectors = _sectors(rows, cols, size) if table_size == size else _beside(rows, cols, size)
    sectors = table_sectors + _sectors(rows, cols, size) + rows * _ceil(size * cols, 512)
    read = table_size * min(table_rows, rows) * cols + WORD * rows
    return Work(read + size * rows * cols, sectors, 0)


RULES.update({f"gather_forward_{of}": partial(_gather, size, size) for of, size in BYTES.items()})
RULES.update({f"gather_narrow_forward_{half}": partial(_gather, 2, 4) for half in HALVES})


@_stored
def scatter_add_forward(
    size: int, grid: Any, source: Any, index: Any, y: Any, table_rows: int, rows: int, cols: int, *_: Any
) -> Work:
    # Each warp scans the index for its row: half of it on the average before, all of it after.
    touched = min(table_rows, rows)
    # A warp adds all columns that it could have.
    warps = rows * _ceil(size * cols, 512)
    scan = warps * _sectors(1, rows)
    sectors = _sectors(rows, cols, size) + 2 * _beside(touched, cols, size) + scan
    return Work(size * rows * cols + WORD * (2 * touched * cols + rows), sectors, warps * 512 // size)


@_rule
def count_labels_forward(grid: Any, labels: Any, y: Any, rows: int) -> Work:
    return _streams([(1, rows)], [(1, 1)], rows)


@_stored
def cross_entropy_forward(
    size: int, grid: list[int], logits: Any, bias: Any, labels: Any, loss: Any, classes: int, *_: Any
) -> Work:
    rows = grid[0]
    unique = size * rows * classes + WORD * (bool(bias) * classes + 2 * rows)
    # Two sums over the block come to each row's exponentials.
    flops = rows * (14 * classes + 26 * THREADS)
    sectors = _sectors(rows, classes, size) + bool(bias) * _beside(rows, classes, size) + 17 * rows
    return Work(unique, sectors, flops)


@_stored
def cross_entropy_backward(
    size: int,
    grid: list[int],
    logits: Any,
    bias: Any,
    labels: Any,
    dloss: Any,
    loss: Any,
    classes: int,
    *_: Any,
) -> Work:
    rows = grid[0]
    unique = 2 * size * rows * classes + WORD * (bool(bias) * classes + 2 * rows + 1)
    flops = rows * (26 * classes + 26 * THREADS)
    sectors = 3 * _sectors(rows, classes, size) + 2 * bool(bias) * _beside(rows, classes, size) + 25 * rows
    return Work(unique, sectors, flops)


@_stored
def sum_to_forward(
    size: int, grid: Any, x: Any, y: Any, other: Any, copies: int, result_rows: int, cols: int, x_ld: int, per: int
) -> Work:  # fmt: skip
    rows = result_rows * (2 if other else 1)
    read, written = copies * rows, _ceil(copies, per) * rows
    return _alike(size, read, cols, 0, x) + _streams([], [(written, cols)], (read + 7 * written) * cols)


def _chunks(size: int, grid: list[int], x: Any, y: Any, elements: int, cols: int, *_: Any) -> Work:
    flops = 2 * elements + 12 * THREADS * grid[0]
    return _alike(size, elements // cols, cols, 0, x) + _streams([], [(1, grid[0])], flops)


_enter("sum_forward", _chunks)


def _tensors(table: list[Any], cells: int) -> list[list[Any]]:
    """What a launch for many tensors is given of each."""
    return [table[at : at + cells] for at in range(0, len(table), cells)]


def _dealt(blocks: int, bytes_: int, count: int, reads: int) -> Work:
    """Each block of eight warps looks for its tensor among ``count``, of which a table has so many bytes, and each warp
    reads of it so often."""
    # A warp's lanes look at 32 tensors' first blocks and at their ends, which begin in the middle of a sector.
    search = _ceil(count, 32) * 2 + 2 * _sectors(1, count)
    return Work(bytes_ + WORD * (count + 1), blocks * (search + 8 * reads), 0)


@_rule
def global_norm_parts_forward(
    grid: list[int], gradients: list[Any], first: Any, count: int, parts: Any
) -> Work:
    sums = [
        _chunks(WORD, [_ceil(elements, per)], x, None, elements, cols)
        for x, elements, cols, _, per in _tensors(gradients, 5)
    ]
    return sum(sums, _dealt(grid[0], 24 * count, count, 6))


@_rule
def global_norm_forward(grid: Any, parts: Any, y: Any, count: int, halt: Any) -> Work:
    return _streams([(1, count), (1, bool(halt))], [(1, 1)], count + 12 * THREADS)


@_rule
def clip_factor_forward(grid: Any, norm: Any, y: Any, max_norm: float) -> Work:
    return _streams([(1, 1)], [(1, 1)], 2)


@_rule
def adamw_forward(grid: list[int], tensors: list[Any], first: Any, count: int, *more: Any) -> Work:
    total = _dealt(grid[0], 80 * count, count, 8 + 4 + 3) + Work(3 * WORD, 0, 0)
    for p, g, m, v, new_p, new_m, new_v, copy, rows, cols, *_, narrow in _tensors(tensors, 14):
        total += _alike(2 if narrow else WORD, rows, cols, 0, p, new_p) + _alike(2, rows, cols, 0, copy)
        total += _alike(WORD, rows, cols, 28, g, m, v, new_m, new_v)
    return total + _heeding(more[-1], 8 * grid[0])


RULES.update({f"adamw_forward_{half}": adamw_forward for half in HALVES})


@_rule
def adamw_rounded_forward(grid: list[int], tensors: list[Any], first: Any, count: int, *more: Any) -> Work:
    # As dropout does, it reads the random state and runs Philox.
    words = sum(rows * cols for *_, rows, cols, _, _, _, _ in _tensors(tensors, 14))
    update: Work = adamw_forward(grid, tensors, first, count, *more)
    return update + Work(4 * WORD + 8 * count, 8 * grid[0] * 6, 28 * words)


RULES.update({f"adamw_rounded_forward_{half}": adamw_rounded_forward for half in HALVES})


@_rule
def iota_forward(grid: Any, y: Any, rows: int, *_: Any) -> Work:
    return _streams([], [(1, rows)], 0)


@_rule
def rope_table_forward(
    grid: Any, positions: Any, turns: Any, table: Any, rows: int, half: int, *_: Any
) -> Work:
    unique = WORD * (rows + 2 * half + 2 * rows * half)
    return Work(unique, 4 * _sectors(rows, half) + rows * _ceil(half, 32), 24 * rows * half)


@_stored
def rope_forward(
    size: int, grid: Any, x: Any, table: Any, y: Any, rows: int, heads: int, width: int, half: int, *_: Any
) -> Work:
    table_work = Work(WORD * rows * 2 * half, 2 * _sectors(rows * heads, half), 6 * rows * heads * half)
    return _alike(size, rows, heads * width, 0, x, y) + table_work


@_rule
def alibi_bias_forward(
    grid: Any, positions: Any, slopes: Any, bias: Any, rows: int, heads: int, tokens: int, *_: Any
) -> Work:
    cells = rows * heads
    unique = WORD * (rows * tokens + heads + cells * tokens)
    return Work(unique, 2 * _sectors(cells, tokens) + cells * _ceil(tokens, 32), 2 * cells * tokens)


# ---- Attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mask:
    """Which tiles a block visits: the rules of ``struct Mask`` without prefix."""

    tokens: int
    causal: int
    window: int

    def keys(self, query: int, rows: int = TILE) -> tuple[int, int]:
        """The keys that the ``rows`` queries at ``query`` visit, from a tile's start."""
        end = query + rows
        last = min(end, self.tokens) if self.causal else self.tokens
        last = last if self.window >= self.tokens else min(last, end - 1 + self.window)
        return max(0, query - self.window + 1) // TILE * TILE, last

    def queries(self, key: int, rows: int = TILE) -> tuple[int, int]:
        """The queries that the ``rows`` keys at ``key`` visit."""
        end = min(key + rows, self.tokens)
        last = self.tokens if self.window >= self.tokens else min(self.tokens, end - 1 + self.window)
        return key if self.causal else max(0, key - self.window + 1) // TILE * TILE, last

    def some(self, i: int, n: int, j: int, m: int) -> bool:
        """Whether of queries i .. i + n some may see some of keys j .. j + m."""
        inside = i < self.tokens and j < self.tokens and not (self.causal and j > i + n - 1)
        return inside and i - (j + m - 1) < self.window and j - (i + n - 1) < self.window

    def visits(self, others: Callable[[int], tuple[int, int]]) -> tuple[int, int, int]:
        """Of all blocks of one head: tiles visited, and their rows in all, on the block's own side and on the other."""
        tiles = own = other = 0
        for at in range(0, self.tokens, TILE):
            first, last = others(at)
            count = _ceil(last - first, TILE)
            tiles += count
            own += count * min(TILE, self.tokens - at)
            other += min(first + TILE * count, self.tokens) - first
        return tiles, own, other


def _multiply(depth: int) -> tuple[float, float]:
    """FLOPs and passes of shared memory of one 64 × 64 product over ``depth``: each step, a warp reads 32 bytes of one
    factor and 256 of the other."""
    return 2.0 * TILE * TILE * depth, THREADS / 32 * 3.0 * depth


def _attention(
    visits: tuple[int, int, int], heads: int, d: int, own: int, other: int, dots: int, sums: int, softmax: int
) -> Work:
    """The tiles that the blocks of ``heads`` heads visit: ``own`` and ``other`` tiles of both sides are read turned,
    by 16 bytes of a row at a time, half of a sector; ``dots`` products over the head's width, ``sums`` with a result of
    its width, whose second factor is read plainly; ``softmax``: FLOPs of each score besides."""
    tiles, own_rows, other_rows = (heads * n for n in visits)
    slices, parts = _ceil(d, SLICE), _ceil(d, TILE)
    depth = _ceil(d, DEPTH) * DEPTH
    dot_flops, dot_passes = _multiply(depth)
    sum_flops, sum_passes = _multiply(TILE)
    turned = own * own_rows + other * other_rows
    # Into shared memory: both factors of a dot, one of a sum; and the weights, whose rows meet in the same banks.
    stores = slices * (dots * 2 * TILE * depth / 32 + sums * 256) + sums * parts * TILE * TILE / 32
    return Work(
        0,
        slices * 2 * _sectors(turned, d) + sums * _sectors(other_rows, d),
        tiles * (slices * (dots * dot_flops + softmax * TILE * TILE) + sums * parts * sum_flops),
        tiles * (slices * dots * dot_passes + sums * parts * sum_passes + stores),
    )


def _extras(segments: Any, key_bias: Any, prefix: Any, rng: Any, b: int, t: int, h: int) -> int:
    words = bool(segments) * b * t + bool(key_bias) * b * h * t + bool(prefix) * b + bool(rng) * 4
    return WORD * words


@_rule
def attention_forward(
    grid: Any, q: Any, k: Any, v: Any, segments: Any, key_bias: Any, prefix: Any, rng: Any, out: Any, lse: Any, b: int,
    t: int, h: int, kv: int, d: int, q_ld: int, k_ld: int, v_ld: int, out_ld: int, causal: int, window: int, *_: Any,
) -> Work:  # fmt: skip
    mask = _Mask(t, causal, window)
    tiles = _attention(mask.visits(mask.keys), b * h, d, own=1, other=1, dots=1, sums=1, softmax=50)
    unique = WORD * (b * t * d * (2 * h + 2 * kv) + b * h * t) + _extras(
        segments, key_bias, prefix, rng, b, t, h
    )
    return tiles + Work(unique, _sectors(b * t * h, d) + _sectors(1, b * h * t), 0)


@_rule
def attention_delta_backward(
    grid: Any, dout: Any, out: Any, delta: Any, b: int, t: int, h: int, d: int, *_: Any
) -> Work:
    rows = b * t * h
    return Work(WORD * (2 * rows * d + rows), 2 * _sectors(rows, d) + rows, rows * (2 * d + 160))


@_rule
def attention_dq_backward(
    grid: Any, dout: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, segments: Any, key_bias: Any, prefix: Any,
    rng: Any, dq: Any, b: int, t: int, h: int, kv: int, d: int, dout_ld: int, q_ld: int, k_ld: int, v_ld: int,
    dq_ld: int, causal: int, window: int, *_: Any,
) -> Work:  # fmt: skip
    mask = _Mask(t, causal, window)
    tiles = _attention(mask.visits(mask.keys), b * h, d, own=2, other=2, dots=2, sums=1, softmax=16)
    unique = WORD * (b * t * d * (3 * h + 2 * kv) + 2 * b * h * t)
    unique += _extras(segments, key_bias, prefix, rng, b, t, h)
    return tiles + Work(unique, _sectors(b * t * h, d) + 2 * _sectors(1, b * h * t), 0)


@_rule
def attention_dkv_backward(
    grid: Any, dout: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, segments: Any, key_bias: Any, prefix: Any,
    rng: Any, dk: Any, dv: Any, b: int, t: int, h: int, kv: int, d: int, dout_ld: int, q_ld: int, k_ld: int, v_ld: int,
    dk_ld: int, dv_ld: int, causal: int, window: int, *_: Any,
) -> Work:  # fmt: skip
    mask = _Mask(t, causal, window)
    tiles = _attention(mask.visits(mask.queries), b * h, d, own=2, other=2, dots=2, sums=2, softmax=16)
    unique = WORD * (b * t * d * (2 * h + 4 * kv) + 2 * b * h * t)
    unique += _extras(segments, key_bias, prefix, rng, b, t, h)
    return tiles + Work(unique, 2 * _sectors(b * t * kv, d) + 2 * _sectors(1, b * h * t), 0)


# On tensor cores: the rules of attention_mma.cu, and of attention_wgmma.cu. A block has four warps.
WARPS, HALF = 4, 2  # bytes of an element
MMA_FLOPS = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class _Tensor:
    """A kernel for heads of up to ``width`` columns: ``m`` times 16 rows a warp, ``step`` rows of the other side a
    tile, ``cols`` columns of the result a block; ``dots`` products over the width, ``sums`` of the result's columns;
    ``own`` matrices of which a block keeps its rows."""

    width: int
    cols: int
    m: int
    step: int
    dots: int
    sums: int
    own: int

    @property
    def rows(self) -> int:
        """Of a block."""
        return 16 * self.m * WARPS

    @property
    def unit(self) -> tuple[int, int]:
        """Rows that visit a tile together, or leave it out, and the warps that they belong to."""
        return 16 * self.m, 1

    def tile_work(self) -> tuple[int, int]:
        """Passes and FLOPs of a warp and a tile: of a dot, each step of 16 columns reads one factor for all of the
        warp's rows, the other for all of the tile's; of a sum, each pair of results reads the tile alone."""
        n, c = self.step // 8, self.cols // 8
        passes = self.dots * self.width // 16 * (4 * self.m + 2 * n) + self.sums * n * c
        return passes, MMA_FLOPS * self.m * n * (self.dots * self.width // 16 + self.sums * c // 2)


class _Warpgroup(_Tensor):
    """A kernel of attention_wgmma.cu: ``m`` times 64 rows a warpgroup, one after the other."""

    @property
    def rows(self) -> int:
        """Of a block."""
        return 64 * self.m

    @property
    def unit(self) -> tuple[int, int]:
        """64 rows, of all four warps."""
        return 64, WARPS

    def tile_work(self) -> tuple[int, int]:
        """Of 64 rows and a tile: of a dot, each step of 16 columns reads 64 rows of one factor and all of the other; of
        a sum, each 16 rows of the tile are read once."""
        passes = (self.dots * self.width * (64 + self.step) + self.sums * self.step * self.cols) * HALF // 128
        return passes, 2 * 64 * self.step * (self.dots * self.width + self.sums * self.cols)


def _on_tensor_cores(
    k: _Tensor, mask: _Mask, heads: int, d: int, results: int, *, keys: bool, score: float, row: float, numbers: int
) -> Work:  # fmt: skip
    """All blocks of ``heads`` heads that visit ``keys``, or queries: ``results`` matrices with a row for each of the
    block's own; ``score`` and ``row``: FLOPs of a score, and of a row and tile; ``numbers``: float32 numbers of each
    row that a tile brings along."""
    tiles = visits = fetched = 0
    unit, warps = k.unit
    own_rows = _ceil(mask.tokens, k.rows) * k.rows
    for at in range(0, mask.tokens, k.rows):
        first, last = mask.keys(at, k.rows) if keys else mask.queries(at, k.rows)
        starts = range(first, last, k.step)
        tiles += len(starts)
        fetched += min(first + k.step * len(starts), mask.tokens) - first
        for mine in range(at, at + k.rows, unit):
            pairs = ((mine, unit, other, k.step) for other in starts)
            visits += sum(mask.some(*(p if keys else (*p[2:], *p[:2]))) for p in pairs)
    passes, products = k.tile_work()
    tensor = heads * visits * products
    # Two matrices of the other side pass through shared memory; the block's own and its results do once.
    width = k.width * HALF
    moved = 2 * tiles * k.step * width + k.own * own_rows * width + 2 * results * own_rows * k.cols * HALF
    line = _ceil(d * HALF, SECTOR)
    sectors = (2 * fetched + k.own * mask.tokens) * line + numbers * tiles * _ceil(k.step * WORD, SECTOR)
    scores = visits * unit * k.step
    return Work(
        0,
        heads * (sectors + results * mask.tokens * _ceil(min(d, k.cols) * HALF, SECTOR)),
        tensor + heads * (score * scores + row * visits * unit + results * own_rows * k.cols),
        heads
        * (moved / 128 + visits * (passes + warps * numbers * k.step // 8) + numbers * tiles * k.step / 32),
        tensor,
    )


def _tensor_unique(k: _Tensor, rows: int, kv_rows: int, d: int, queries: int, others: int, words: int) -> int:
    return HALF * d * (queries * rows + others * kv_rows) + WORD * words


def _tensor_forward(k: _Tensor) -> Rule:
    def rule(grid: Any, *a: Any) -> Work:
        b, t, h, kv, d = a[9:14]
        # Besides the scores: the largest and the sum of each row, and the rescaling of its sums.
        tiles = _on_tensor_cores(
            k, _Mask(t, a[18], a[19]), b * h, d, 1, keys=True, score=5, row=24 + k.cols, numbers=0
        )
        unique = _tensor_unique(k, b * t * h, b * t * kv, d, 2, 2, b * h * t)
        return tiles + Work(unique + _extras(a[3], a[4], a[5], a[6], b, t, h), _sectors(1, b * h * t), 0)

    return rule


def _tensor_dq(k: _Tensor) -> Rule:
    def rule(grid: Any, *a: Any) -> Work:
        b, t, h, kv, d = a[11:16]
        tiles = _on_tensor_cores(k, _Mask(t, a[21], a[22]), b * h, d, 1, keys=True, score=5, row=0, numbers=0)
        unique = _tensor_unique(k, b * t * h, b * t * kv, d, 3, 2, 2 * b * h * t)
        return tiles + Work(unique + _extras(a[6], a[7], a[8], a[9], b, t, h), 2 * _sectors(1, b * h * t), 0)

    return rule


def _tensor_dkv(k: _Tensor) -> Rule:
    def rule(grid: Any, *a: Any) -> Work:
        b, t, h, kv, d = a[12:17]
        slices, group = _ceil(k.width, k.cols), h // kv
        # A key-value head's own rows and results pass once for all of its query heads.
        mask = _Mask(t, a[23], a[24])
        each = _on_tensor_cores(k, mask, b * h * slices, d, 2, keys=False, score=5.5, row=0, numbers=2)
        own = 2 * _ceil(t, k.rows) * k.rows
        lines = 2 * t * (_ceil(d * HALF, SECTOR) + _ceil(min(d, k.cols) * HALF, SECTOR))
        spared = b * kv * slices * (group - 1)
        passes = own * HALF * (k.width + 2 * k.cols) / 128
        unique = _tensor_unique(k, b * t * h, b * t * kv, d, 2, 4, 2 * b * h * t)
        unique += _extras(a[6], a[7], a[8], a[9], b, t, h)
        return each + Work(unique, -spared * lines, -spared * own * k.cols, -spared * passes)

    return rule


#: Of each target that has kernels of its own, their rules.
OWN_RULES: dict[str, dict[str, Rule]] = {"sm_90a": {}}

for _rules, _kind, _half, _width, _ms, _steps in (
    (RULES, _Tensor, "bf16", 64, (2, 2, 2), (64, 32, 32)),
    (RULES, _Tensor, "bf16", 128, (2, 2, 1), (32, 32, 32)),
    (RULES, _Tensor, "bf16", 256, (1, 1, 1), (32, 16, 16)),
    (RULES, _Tensor, "f16", 64, (2, 2, 2), (32, 32, 32)),
    (RULES, _Tensor, "f16", 128, (2, 1, 1), (32, 32, 16)),
    (OWN_RULES["sm_90a"], _Warpgroup, "bf16", 64, (2, 2, 2), (64, 64, 64)),
    (OWN_RULES["sm_90a"], _Warpgroup, "bf16", 128, (2, 2, 1), (64, 32, 64)),
    (OWN_RULES["sm_90a"], _Warpgroup, "bf16", 256, (1, 1, 1), (32, 64, 64)),
):
    _cols = min(_width, 128)
    _kernel = f"attention{_width}_{{}}_{_half}"
    _rules[_kernel.format("forward")] = _tensor_forward(_kind(_width, _width, _ms[0], _steps[0], 1, 1, 1))
    _rules[_kernel.format("dq_backward")] = _tensor_dq(_kind(_width, _width, _ms[1], _steps[1], 2, 1, 2))
    _rules[_kernel.format("dkv_backward")] = _tensor_dkv(_kind(_width, _cols, _ms[2], _steps[2], 2, 2, 2))


def _delta_of_halves(
    grid: Any, dout: Any, out: Any, delta: Any, b: int, t: int, h: int, d: int, *_: Any
) -> Work:
    rows = b * t * h
    return Work(
        (2 * HALF * d + WORD) * rows, 2 * rows * _ceil(d * HALF, SECTOR) + rows // 4, rows * (2 * d + 24)
    )


RULES.update({f"attention_delta_backward_{half}": _delta_of_halves for half in HALVES})


@_stored
def cache_write_forward(
    size: int,
    grid: Any,
    source: Any,
    row: Any,
    start: Any,
    count: Any,
    cache: Any,
    b: int,
    t: int,
    cols: int,
    *_: Any,
) -> Work:
    moved = 2 * b * t * cols
    return Work(size * moved + WORD * 3 * b, 2 * _sectors(b * t, cols, size) + _sectors(3, b), 0)


@_stored
def cached_attention_forward(
    size: int, grid: Any, q: Any, k: Any, v: Any, rows: Any, start: Any, count: Any, key_bias: Any, out: Any,
    sums: Any, bounds: Any, t: int, h: int, kv: int, d: int, q_ld: int, out_ld: int, cache_rows: int, slots: int,
    window: int, scale: Any, spans: int, span: int,
) -> Work:  # fmt: skip
    # At most: every slot of the cache is filled.
    b, seen, queries = grid[2], min(slots, window), grid[2] * t * h
    kept = WORD * queries * spans * (d + 2) if spans > 1 else size * queries * d
    unique = size * queries * d + kept + b * seen * (size * 2 * kv * d + WORD) + WORD * 2 * b
    sectors = 2 * _sectors(queries * seen, d, size) + (1 + spans) * _sectors(queries, d)
    # A team of lanes has a position.
    lanes = 1
    while lanes < 32 and lanes * 16 // size < d:
        lanes *= 2
    return Work(unique, sectors, 76 * lanes * queries * seen)


@_stored
def cached_attention_join_forward(
    size: int, grid: Any, sums: Any, bounds: Any, out: Any, t: int, h: int, d: int, out_ld: int, spans: int
) -> Work:
    rows = grid[2] * t * h
    unique = WORD * rows * spans * (d + 2) + size * rows * d
    # Each of four warps reads all bounds twice, and again for each row of columns.
    edges = rows * (spans * (8 + _ceil(d, 32)) + 1)
    moved = spans * _sectors(rows, d) + _sectors(rows, d, size)
    return Work(unique, moved + edges, rows * spans * (3 * 128 + 2 * d))


@_rule
def best_forward(
    grid: Any, x: Any, tokens: Any, parts: Any, temperature: Any, best: Any, best_tokens: Any, masses: Any, cols: int,
    x_ld: int, piece: int, count: int,
) -> Work:  # fmt: skip
    pieces, rows, later = grid[0], grid[1], parts is not None
    sums = 4 if pieces == 1 else 5
    read = cols * (1 + later) + (5 * (cols // count) if later else 0)
    unique = WORD * rows * (read + pieces * (2 * count + sums) + 1)
    # A thread reads eight neighbours one by one, and in the first launch once more.
    sectors = rows * (8 * _sectors(1, cols) * 2 + 2 * _sectors(pieces, count) + _sectors(pieces, sums))
    # Exponentials in float64; the block's own sums.
    exponentials = cols // count if later else cols
    return Work(unique, sectors, rows * (11000 * pieces + 50 * exponentials))


# ---- Relative attention ---------------------------------------------------------------------------------------------


def _relative(
    b: int, h: int, t: int, s: int, u: int, d: int, *, dots: int, products: int, sums: int, spread: int, score: int,
    meets: float, looks: int,
) -> Work:  # fmt: skip
    """All pairs of 64 queries and 64 keys, for queries in the order of their places: ``dots`` products of their rows a
    pair, ``products`` and ``spread`` of rows and distances, of which a pair has as many tiles as its queries are spread
    over, with a sum behind the latter; ``sums`` with a result of the head's width; ``score``: FLOPs of one, once for
    each part of a head; ``meets``: how often a pair looks where its queries stand and multiplies them with kinds, of
    whose rows each thread reads one; ``looks``: how often at what its keys are and what is hidden."""
    down, across, slices, parts = _ceil(t, TILE), _ceil(s, TILE), _ceil(d, SLICE), _ceil(d, TILE)
    distances = 1 + _ceil(min(u, _ceil(TILE * u, t)) - 1, TILE)
    every = slices * (dots + products * distances)
    added = sums + spread * distances
    depth = _ceil(d, RELATIVE_DEPTH) * RELATIVE_DEPTH
    dot_flops, dot_passes = _multiply(depth)
    sum_flops, sum_passes = _multiply(TILE)
    rows = t * across + s * down
    pairs = b * h * down * across
    # Into shared memory: both factors of a dot; the weights, cleared and put at their distances; the position's parts.
    placed = TILE * TILE / 32 * (products * distances * slices * 4 + spread * distances * parts * 5)
    stores = slices * dots * 2 * TILE * depth / 32 + added * parts * (TILE * TILE / 32 + 256) + placed
    return Work(
        0,
        int(
            b * h * rows * (2 * every + added / 2) * _sectors(1, d)
            + pairs * slices * (36 * d * meets + 640 * looks)
        ),
        pairs * (every * dot_flops + slices * score * TILE * TILE + added * parts * sum_flops),
        pairs * (every * dot_passes + added * parts * sum_passes + stores),
    )


#: The step of the inner dimension in ``relative.cu``.
RELATIVE_DEPTH = 16


def _relative_bytes(b: int, h: int, t: int, s: int, u: int, d: int, hidden: Any) -> int:
    floats = b * h * d * (4 * t + 2 * s) + (s + u + 2) * h * d
    return WORD * (floats + b * (t + u + s) + bool(hidden) * b * min(t, u) * u)


@_rule
def relative_attention_forward(grid: list[int], *a: Any) -> Work:
    (_, h, b), hidden = grid, a[10]
    t, s, u, d = a[13:17]
    tiles = _relative(
        b, h, t, s, u, d, dots=1, products=1, sums=1, spread=0, score=50, meets=1 / _ceil(s, TILE), looks=1
    )
    return tiles + Work(_relative_bytes(b, h, t, s, u, d, hidden), _sectors(b * t * h, d), 0)


@_rule
def relative_attention_dq_backward(grid: list[int], *a: Any) -> Work:
    (_, h, b), hidden = grid, a[11]
    t, s, u, d = a[20:24]
    # Once for the softmax and once for what follows from it.
    tiles = _relative(
        b, h, t, s, u, d, dots=4, products=2, sums=1, spread=1, score=90, meets=1 / _ceil(s, TILE), looks=2
    )
    unique = _relative_bytes(b, h, t, s, u, d, hidden) + WORD * (3 * d + 5) * b * h * t
    return tiles + Work(unique, 3 * _sectors(b * t * h, d), 0)


@_rule
def relative_attention_dkv_backward(grid: list[int], *a: Any) -> Work:
    (_, h, b), hidden = grid, a[11]
    t, s, u, d = a[18:22]
    tiles = _relative(b, h, t, s, u, d, dots=2, products=1, sums=2, spread=0, score=20, meets=1, looks=1)
    unique = _relative_bytes(b, h, t, s, u, d, hidden) + WORD * (2 * d * s + 3 * t) * b * h
    return tiles + Work(unique, 2 * _sectors(b * s * h, d), 0)


@_rule
def relative_attention_dr_backward(grid: list[int], *a: Any) -> Work:
    h, hidden, b = grid[1], a[11], a[17]
    t, s, u, d = a[18:22]
    # A tile of distances meets as many tiles of keys as a tile of keys meets of distances.
    tiles = _relative(
        b, h, t, s, u, d, dots=1, products=2, sums=1, spread=0, score=30, meets=(s + u) / s, looks=3
    )
    unique = _relative_bytes(b, h, t, s, u, d, hidden) + WORD * ((s + u) * h * d + 3 * b * h * t)
    return tiles + Work(unique, _sectors((s + u) * h, d), 0)


@_rule
def relative_attention_dkinds_backward(
    grid: list[int], by_kind: Any, q_s: Any, dkinds: Any, b: int, t: int, h: int, d: int, *_: Any
) -> Work:
    rows = b * t * h
    return Work(
        WORD * (2 * rows + rows * d + 2 * h * d), 2 * rows * (_sectors(1, d) + _ceil(d, 32)), 4 * rows * d
    )


# ---- Records --------------------------------------------------------------------------------------------------------


def product(p: dict[str, Any]) -> Work:
    """A matrix product, on tensor cores where its factors have 16 bits. cuBLASLt chooses tiles by itself; its sectors
    are taken to be those of large ones, its blocks those of small ones that share out an inner dimension beyond 512."""
    m, n = p["y"]["rows"], p["y"]["cols"]
    k = p["a"]["rows"] if p["ta"] else p["a"]["cols"]
    added = p["c"] is not None
    size, made = BYTES[p["a"]["dtype"]], BYTES[p["y"]["dtype"]]
    unique = size * (m * k + k * n) + made * ((1 + added) * m * n + (p["bias"] is not None) * n)
    down, across = _ceil(m, PRODUCT_TILE), _ceil(n, PRODUCT_TILE)
    sectors = (
        _sectors(1, m * k, size) * across
        + _sectors(1, k * n, size) * down
        + (1 + added) * _sectors(m, n, made)
    )
    blocks = _ceil(m, SMALL_TILE) * _ceil(n, SMALL_TILE) * max(1, k // 512)
    flops = 2.0 * m * n * k
    return Work(unique, sectors, flops, tensor=flops if size == HALF else 0.0, blocks=blocks)


def _value(arg: dict[str, Any]) -> Any:
    """A number; a pointer's place, None where it is null; of a table, those of all its cells."""
    ((kind, value),) = arg.items()
    return [_value(cell) for cell in value] if kind == "table" else value


def work(record: dict[str, Any], own: str = "") -> Work:
    """The work of a launch record of ``_core.cuda_program``, by the kernels that a target such as "sm_90a" has of its
    own, if any."""
    if "product" in record:
        return product(record["product"])
    launch = record["launch"]
    grid = launch["grid"]
    arguments = [_value(arg) for arg in launch["args"]]
    rule = (RULES | OWN_RULES.get(own, {}))[launch["kernel"]]
    return replace(rule(grid, *arguments), blocks=grid[0] * grid[1] * grid[2])
