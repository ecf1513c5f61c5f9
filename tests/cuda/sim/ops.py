"""The meaning of each PTX instruction that runs thread by thread: a pattern of the opcode, and the Python it becomes.

Source: NVIDIA, "PTX ISA" 9.x, chapter 9.7. Anything without a pattern here raises `UnknownInstruction`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .ptx import DTYPES, Instruction, Kernel, UnknownInstruction, Writer, registers_of

RULES: list[tuple[re.Pattern[str], Callable[..., None]]] = []
SMALLEST_NORMAL = np.finfo(np.float32).tiny


def rule(pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers `f(writer, match, *args)` for opcodes that match."""

    def add(f: Callable[..., None]) -> Callable[..., None]:
        RULES.append((re.compile(pattern), f))
        return f

    return add


# ---- Helpers that the written code calls ----------------------------------------------------------------------------


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormals to zero of their sign."""
    return x * (np.abs(x) >= SMALLEST_NORMAL)


def fma_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c rounded towards −∞. The product is exact in float64; the sum's error is found by Knuth's two-sum."""
    p, c = a.astype(np.float64) * b, c.astype(np.float64)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    y = s.astype(np.float32)
    above = (y > s) | ((y == s) & (error < 0))
    return np.where(above, np.nextafter(y, np.float32(-np.inf)), y)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c rounded once, but for the last bit of what Dekker's product and Knuth's sum leave."""
    split = 134217729.0
    high_a, high_b = (x * split - (x * split - x) for x in (a, b))
    low_a, low_b, p = a - high_a, b - high_b, a * b
    low = ((high_a * high_b - p) + high_a * low_b + low_a * high_b) + low_a * low_b
    s = p + c
    t = s - p
    rest = (p - (s - t)) + (c - t) + low
    return np.where(np.isfinite(rest), s + rest, s)


def divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    """Integer division that rounds towards zero."""
    if (b == 0).any():
        raise ZeroDivisionError("integer division by zero")
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    quotient = np.abs(wide_a) // np.abs(wide_b) * np.where((wide_a < 0) != (wide_b < 0), -1, 1)
    return (wide_a - quotient * wide_b if remainder else quotient).astype(np.result_type(a, b))


#: Halves of ever wider groups of bits: how far apart, and the lower ones.
HALVES = ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF))


def reverse_bits(x: np.ndarray) -> np.ndarray:
    """Bit 0 becomes bit 31."""
    for shift, mask in HALVES:
        m = np.uint32(mask)
        x = ((x >> np.uint32(shift)) & m) | ((x & m) << np.uint32(shift))
    return x


def count_bits(x: np.ndarray) -> np.ndarray:
    """How many bits are set."""
    for shift, mask in HALVES:
        m = np.uint32(mask)
        x = ((x >> np.uint32(shift)) & m) + (x & m)
    return x


def leading_zeros(x: np.ndarray) -> np.ndarray:
    """By how much a left shift brings the highest set bit to bit 31; all ones where none is set."""
    _, exponent = np.frexp(x.astype(np.float64))
    return np.where(x == 0, np.uint32(0xFFFFFFFF), (32 - exponent).astype(np.uint32))


def insert_bits(field: np.ndarray, base: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The low `length` bits of `field` into `base` from bit `at` on."""
    at, length = np.minimum(at & 0xFF, 32).astype(np.uint64), np.minimum(length & 0xFF, 32).astype(np.uint64)
    one = np.uint64(1)
    mask = (((one << length) - one) << at) & np.uint64(0xFFFFFFFF)
    return ((base & ~mask) | ((field.astype(np.uint64) << at) & mask)).astype(np.uint32)


def shift(x: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    """Shifts of the width or more give what shifting by one bit that often gives."""
    bits = 8 * x.dtype.itemsize
    # The last bit is shifted apart, since NumPy leaves a shift by the full width undefined.
    first, one = np.minimum(by, bits - 1).astype(x.dtype), (by >= bits).astype(x.dtype)
    return (x << first) << one if left else (x >> first) >> one


def to_integer(x: np.ndarray) -> np.ndarray:
    """Whole floats as int32, clamped to its range; NaN is 0."""
    wide = np.where(np.isnan(x), 0, x).astype(np.float64)
    return np.clip(wide, -(2.0**31), 2.0**31 - 1).astype(np.int32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Floats as bfloat16, ties to even, in the lower halves of words; NaN is 0x7fff."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def round_f16(x: np.ndarray) -> np.ndarray:
    """The bits of floats as float16, ties to even, infinite beyond the largest number; NaN is 0x7fff."""
    with np.errstate(over="ignore"):
        bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def widen_f16(bits: np.ndarray) -> np.ndarray:
    """The values of float16."""
    return bits.view(np.float16).astype(np.float32)


# ---- Floats ---------------------------------------------------------------------------------------------------------


def _result(ftz: object, text: str) -> str:
    return f"flush({text})" if ftz else text


@rule(r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    sign = {"add": "+", "sub": "-", "mul": "*"}[m[1]]
    w.set(d, "f32", _result(m[2], f"{w.real(a, m[2])} {sign} {w.real(b, m[2])}"))


@rule(r"fma\.rn(\.ftz)?\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str, c: str) -> None:
    x, y, z = (w.real(r, m[1]) for r in (a, b, c))
    w.set(d, "f32", _result(m[1], f"({x}.astype(float64) * {y} + {z}).astype(float32)"))


@rule(r"fma\.rm(\.ftz)?\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str, c: str) -> None:
    w.set(d, "f32", _result(m[1], f"fma_down({w.real(a, m[1])}, {w.real(b, m[1])}, {w.real(c, m[1])})"))


@rule(r"(add|sub|mul)(?:\.rn)?\.f64")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    sign = {"add": "+", "sub": "-", "mul": "*"}[m[1]]
    w.set(d, "f64", f"{w.get(a, 'f64')} {sign} {w.get(b, 'f64')}")


@rule(r"fma\.rn\.f64")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str, c: str) -> None:
    w.set(d, "f64", f"fma64({w.get(a, 'f64')}, {w.get(b, 'f64')}, {w.get(c, 'f64')})")


@rule(r"cvt(\.ftz)?\.f64\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "f64", f"{w.real(a, m[1])}.astype(float64)")


@rule(r"cvt\.rn(\.ftz)?\.f32\.f64")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "f32", _result(m[1], f"{w.get(a, 'f64')}.astype(float32)"))


@rule(r"cvt\.r([nz])i\.(f64|s32)\.f64")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    whole = f"np.{'rint' if m[1] == 'n' else 'trunc'}({w.get(a, 'f64')})"
    w.set(d, m[2], whole if m[2] == "f64" else f"to_integer({whole})")


@rule(r"(div|rcp|sqrt|ex2)\.(?:rn|approx)(\.ftz)?\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str = "") -> None:
    x = w.real(a, m[2])
    if (m[1] == "div") != bool(b):
        raise UnknownInstruction(m[0])
    text = {
        "div": lambda: f"{x} / {w.real(b, m[2])}",
        "rcp": lambda: f"one / {x}",
        "sqrt": lambda: f"np.sqrt({x})",
        "ex2": lambda: f"np.exp2({x}.astype(float64)).astype(float32)",
    }[m[1]]()
    w.set(d, "f32", _result(m[2], text))


@rule(r"(abs|neg)(\.ftz)?\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "f32", f"np.{'abs' if m[1] == 'abs' else 'negative'}({w.real(a, m[2])})")


@rule(r"(min|max)(\.ftz)?\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, "f32", f"np.f{m[1]}({w.real(a, m[2])}, {w.real(b, m[2])})")  # of a NaN and a number: the number


@rule(r"copysign\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, "f32", f"np.copysign({w.get(b, 'f32')}, {w.get(a, 'f32')})")  # the sign is the first operand's


@rule(r"cvt(\.ftz)?\.sat\.f32\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "f32", f"np.fmin(np.fmax({w.real(a, m[1])}, zero), one)")  # NaN becomes 0


@rule(r"cvt\.rn\.f32\.([su]32)")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "f32", f"{w.get(a, m[1])}.astype(float32)")


@rule(r"cvt\.r([nz])i\.(f32|s32)\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    # To an integer, ties to even or towards zero; NaN becomes the integer 0.
    whole = f"np.{'rint' if m[1] == 'n' else 'trunc'}({w.get(a, 'f32')})"
    w.set(d, m[2], whole if m[2] == "f32" else f"to_integer({whole})")


@rule(r"cvt\.rn\.bf16x2\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, "u32", f"round_bf16({w.get(a, 'f32')}) << np.uint32(16) | round_bf16({w.get(b, 'f32')})")


@rule(r"cvt\.rn\.f16x2\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    high, low = (f"round_f16({w.get(x, 'f32')}).astype(uint32)" for x in (a, b))
    w.set(d, "u32", f"{high} << np.uint32(16) | {low}")


@rule(r"cvt\.rn\.f16\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "u16", f"round_f16({w.get(a, 'f32')})")


@rule(r"cvt\.f32\.f16")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "f32", f"widen_f16({w.get(a, 'u16')})")


# ---- Integers -------------------------------------------------------------------------------------------------------


@rule(r"(add|sub)\.[su](16|32|64)")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    kind = f"u{m[2]}"
    w.set(d, kind, f"{w.get(a, kind)} {'+' if m[1] == 'add' else '-'} {w.get(b, kind)}")


@rule(r"mul\.lo\.[su](32|64)")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, f"u{m[1]}", f"{w.get(a, f'u{m[1]}')} * {w.get(b, f'u{m[1]}')}")


@rule(r"mad\.lo\.[su](32|64)")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str, c: str) -> None:
    x, y, z = (w.get(r, f"u{m[1]}") for r in (a, b, c))
    w.set(d, f"u{m[1]}", f"{x} * {y} + {z}")


@rule(r"mul\.wide\.([su])32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    wide = "int64" if m[1] == "s" else "uint64"
    w.set(d, f"{m[1]}64", f"{w.get(a, m[1] + '32')}.astype({wide}) * {w.get(b, m[1] + '32')}.astype({wide})")


@rule(r"mul\.wide\.u16")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, "u32", f"{w.get(a, 'u16')}.astype(uint32) * {w.get(b, 'u16')}.astype(uint32)")


@rule(r"mul\.hi\.u32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, "u32", f"({w.get(a, 'u32')}.astype(uint64) * {w.get(b, 'u32')} >> uint64(32)).astype(uint32)")


@rule(r"(div|rem)\.([su]32)")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, m[2], f"divide({w.get(a, m[2])}, {w.get(b, m[2])}, {m[1] == 'rem'})")


@rule(r"(min|max)\.([su]32)")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, m[2], f"np.{m[1]}imum({w.get(a, m[2])}, {w.get(b, m[2])})")


@rule(r"(min|max)\.relu\.s32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, "s32", f"np.maximum(np.{m[1]}imum({w.get(a, 's32')}, {w.get(b, 's32')}), int32(0))")


@rule(r"(abs|neg)\.s32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "s32", f"np.{'abs' if m[1] == 'abs' else 'negative'}({w.get(a, 's32')})")


@rule(r"(and|or|xor)\.(pred|b16|b32|b64)")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, m[2], f"{w.get(a, m[2])} { {'and': '&', 'or': '|', 'xor': '^'}[m[1]] } {w.get(b, m[2])}")


@rule(r"not\.(pred|b32)")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, m[1], f"~{w.get(a, m[1])}")


@rule(r"(shl|shr)\.([bus](?:32|64))")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, m[2], f"shift({w.get(a, m[2])}, {w.get(b, 'u32')}, {m[1] == 'shl'})")


@rule(r"brev\.b32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "u32", f"reverse_bits({w.get(a, 'u32')})")


@rule(r"popc\.b32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "u32", f"count_bits({w.get(a, 'u32')})")


@rule(r"bfind\.shiftamt\.u32")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "u32", f"leading_zeros({w.get(a, 'u32')})")


@rule(r"bfi\.b64")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str, at: str, length: str) -> None:
    if (at, length) != ("32", "32"):
        raise UnknownInstruction(f"bfi.b64 at {at} of {length}")
    w.set(d, "u64", f"({w.get(b, 'u64')} & uint64(0xFFFFFFFF)) | {w.get(a, 'u64')} << uint64(32)")


@rule(r"bfi\.b32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str, at: str, length: str) -> None:
    w.set(d, "u32", f"insert_bits({', '.join(w.get(r, 'u32') for r in (a, b, at, length))})")


@rule(r"cvt\.([su](?:16|32|64))\.([su](?:16|32|64))")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(
        d,
        m[1],
        f"{w.get(a, m[2])}.astype({np.dtype({'u': 'u', 's': 'i'}[m[1][0]] + str(int(m[1][1:]) // 8))})",
    )


# ---- Comparison and choice ------------------------------------------------------------------------------------------

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@rule(r"setp\.(eq|ne|lt|le|gt|ge)(u?)(\.ftz)?\.f32")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    x, y = w.real(a, m[3]), w.real(b, m[3])
    text = f"({x} {COMPARE[m[1]]} {y})"
    # With a NaN an ordered comparison is false, an unordered one true; Python's are ordered but for !=.
    w.set(
        d,
        "pred",
        f"{text} | np.isnan({x}) | np.isnan({y})" if m[2] else f"{text} & ({x} == {x}) & ({y} == {y})",
    )


@rule(r"setp\.(eq|ne|lt|le|gt|ge|num)(u?)\.f64")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    x, y = w.get(a, "f64"), w.get(b, "f64")
    either = f"np.isnan({x}) | np.isnan({y})"
    text = f"({x} {COMPARE.get(m[1], '')} {y})"
    w.set(
        d,
        "pred",
        f"~({either})" if m[1] == "num" else f"{text} | {either}" if m[2] else f"{text} & ~({either})",
    )


@rule(r"setp\.(eq|ne|lt|le|gt|ge)\.([bsu](?:16|32|64))")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str) -> None:
    w.set(d, "pred", f"{w.get(a, m[2])} {COMPARE[m[1]]} {w.get(b, m[2])}")


@rule(r"selp\.([bufs](?:16|32|64))")
def _(w: Writer, m: re.Match[str], d: str, a: str, b: str, p: str) -> None:
    w.set(d, m[1], f"np.where({w.get(p, 'pred')}, {w.get(a, m[1])}, {w.get(b, m[1])})")


# ---- Moves and memory -----------------------------------------------------------------------------------------------

SPECIAL = {"%tid", "%ntid", "%ctaid", "%nctaid"}


@rule(r"mov\.(pred|[bufs](?:16|32|64))")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    whole, bits = m[1], int(m[1][-2:]) // 2 if m[1] != "pred" else 0
    if d.startswith("{"):  # a register to its halves
        for at, register in zip((0, bits), registers_of(d), strict=True):
            kind = f"uint{bits}"
            w.set(register, f"u{bits}", f"({w.get(a, whole)} >> uint{2 * bits}({at})).astype({kind})")
    elif a.split(".")[0] in SPECIAL:
        w.set(d, "u32", f"machine.special[{a!r}][{w.i}]")
    elif any(a == name for name, _, _ in w.kernel.shared):
        w.set(d, m[1], f"machine.shared_at[{a!r}].astype({np.dtype(DTYPES[m[1]])})")
    elif a.startswith("{"):
        low, high = (w.get(r, f"u{bits}") for r in registers_of(a))
        w.set(d, whole, f"{low} | {high}.astype(uint{2 * bits}) << uint{2 * bits}({bits})")
    else:
        w.set(d, m[1], w.get(a, m[1]))


@rule(r"cvta\.to\.global\.u64")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    w.set(d, "u64", w.get(a, "u64"))  # generic addresses of global memory are global addresses


@rule(r"ld\.param\.([bufs](?:32|64))")
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    held = w.storage(d)
    text = f"machine.params[{a[1:-1]!r}].view({np.dtype(DTYPES[m[1]])})"
    if held.endswith("64") and m[1].endswith("32"):  # a wider register is filled by the sign, or by zeros
        w.set(d, "s64", f"{text}.astype(int64)")
    else:
        w.set(d, m[1], text)


def _address(w: Writer, text: str) -> str:
    base, _, offset = text[1:-1].partition("+")
    if base.startswith("%"):
        # 32 bits wrap around: a base may lie below its array where the offset brings it back.
        kind = "s32" if w.storage(base).endswith("32") else w.storage(base)
        return f"{w.get(base, kind)}.astype(int64) + {int(offset or 0)}"
    return f"machine.shared_at[{base!r}].astype(int64) + {int(offset or 0)}"


_MEMORY = r"\.(global|shared)(?:\.nc)?(\.v[24])?\.([bufs])(16|32|64)"


@rule("ld" + _MEMORY)
def _(w: Writer, m: re.Match[str], d: str, a: str) -> None:
    registers, bits = registers_of(d), int(m[4])
    w.halves |= bits == 16
    kind, size = "uint16" if bits == 16 else "uint32", bits // 8 * len(registers)
    w.lines.append(
        f"  t = machine.load({m[1]!r}, {_address(w, a)}, {w.i}, {size}, {len(w.places) - 1}, {kind})"
    )
    for n, register in enumerate(registers):
        wide = int(w.storage(register)[1:]) if register != "_" else bits
        if bits < wide:  # filled by the sign, or by zeros
            signed = f".view(int{bits})" * (m[3] == "s")
            w.set(register, f"u{wide}", f"t[:, {n}]{signed}.astype(int{wide}).view(uint{wide})")
        elif bits < 64:
            w.set(register, f"u{bits}", f"t[:, {n}]")
        else:
            w.set(register, "u64", f"t[:, {2 * n}] | t[:, {2 * n + 1}].astype(uint64) << uint64(32)")


@rule("st" + _MEMORY)
def _(w: Writer, m: re.Match[str], a: str, s: str) -> None:
    registers = registers_of(s)
    w.halves |= m[4] == "16"
    narrow = [m[4] == "16" and r.startswith("%") and w.storage(r).endswith("32") for r in registers]
    values = [
        f"{w.get(r, 'u32')}.astype(uint16)" if low else w.get(r, "f32" if r.startswith("0f") else f"u{m[4]}")
        for r, low in zip(registers, narrow, strict=True)
    ]
    w.lines.append(
        f"  machine.store({m[1]!r}, {_address(w, a)}, {w.i}, [{', '.join(values)}], {len(w.places) - 1})"
    )


@rule(r"cp\.async\.(?:ca|cg)\.shared\.global")
def _(w: Writer, m: re.Match[str], to: str, a: str, size: str, given: str) -> None:
    to, a = _address(w, to), _address(w, a)
    w.lines.append(
        f"  machine.copy({to}, {a}, {w.i}, {int(size)}, {w.get(given, 'u32')}, {len(w.places) - 1})"
    )


@rule(r"cp\.async\.commit_group")
def _(w: Writer, m: re.Match[str]) -> None:
    w.lines.append(f"  machine.group[{w.i}] += 1")


@rule(r"cp\.async\.wait_group")
def _(w: Writer, m: re.Match[str], left: str) -> None:
    w.lines.append(f"  machine.arrive({w.i}, {int(left)}, {len(w.places) - 1})")


@rule(r"fence\.proxy\.async\.shared::cta")
def _(w: Writer, m: re.Match[str]) -> None:
    w.lines.append(f"  machine.show({w.i})")


# ---- Whole kernels --------------------------------------------------------------------------------------------------


def write(kernel: Kernel) -> tuple[str, Writer]:
    """The Python text of a kernel: a function `block_<n>(machine, i)` for every block with a body."""
    w = Writer(kernel)
    for n, block in enumerate(kernel.blocks):
        if not block.body:
            continue
        w.lines.append(f"def block_{n}(i):")
        w.kept.clear()
        for instruction in block.body:
            _write_instruction(w, instruction)
    return "\n".join(w.lines), w


def _write_instruction(w: Writer, instruction: Instruction) -> None:
    opcode = instruction.opcode
    if opcode.startswith(("ld.global", "ld.shared", "st.", "cp.async.c", "cp.async.w")):
        w.place(instruction)
    w.i = "i"
    if instruction.guard:
        negate, register = instruction.guard.startswith("!"), instruction.guard.lstrip("!")
        w.lines.append(f"  j = machine.chosen(i, {w.name(register)}, {negate})")
        w.i = "j"
    for pattern, f in RULES:
        if match := pattern.fullmatch(opcode):
            f(w, match, *instruction.args)
            return
    raise UnknownInstruction(f"{w.kernel.name}: {opcode} {', '.join(instruction.args)}")
