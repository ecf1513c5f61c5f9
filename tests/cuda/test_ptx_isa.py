"""The interpreter, one instruction at a time, against the manual.

Source: NVIDIA, "PTX ISA" 9.x, chapter 9.7. Expected values are worked out by hand or by exact arithmetic.
"""

from fractions import Fraction

import numpy as np
import pytest
import sim
from sim.tensor import MMA

HEADER = ".version 9.5\n.target sm_80\n.address_size 64\n"
PREFIX = {"f32": "%f", "b32": "%r", "u32": "%r", "s32": "%r", "b64": "%rd", "u64": "%rd", "s64": "%rd",
          "f64": "%fd"}  # fmt: skip
DTYPES = {
    "f32": np.float32, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f64": np.float64, "pred": np.uint32, "u16": np.uint32, "s16": np.uint32,
}  # fmt: skip
REGISTERS = """
  .reg .pred %p<20>;
  .reg .b16 %rs<20>;
  .reg .f32 %f<20>;
  .reg .f64 %fd<40>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<60>;
"""


def program(body: str, params: int, shared: str = "") -> dict[str, sim.Program]:
    """A module of one kernel `k` with pointers as parameters; %r0 is %tid.x, %rd<n> pointer n."""
    names = ",\n".join(f".param .u64 k_param_{n}" for n in range(params))
    loads = "\n".join(f"ld.param.u64 %rd{n}, [k_param_{n}];" for n in range(params))
    code = f"{REGISTERS}{shared}\nmov.u32 %r0, %tid.x;\n{loads}\n{body}\nret;\n"
    return sim.load(f"{HEADER}\n.visible .entry k(\n{names}\n)\n{{{code}}}\n")


def run_op(opcode: str, result: str, kinds: tuple[str, ...], rows: list[tuple]) -> np.ndarray:
    """Each row's operands through one instruction, a thread a row."""
    lines = []
    operands = []
    for n, kind in enumerate(kinds):
        size = np.dtype(DTYPES[kind]).itemsize
        lines += [f"mul.wide.u32 %rd{20 + n}, %r0, {size};", f"add.s64 %rd{20 + n}, %rd{20 + n}, %rd{n};"]
        if kind == "pred":
            lines += [f"ld.global.u32 %r{20 + n}, [%rd{20 + n}];", f"setp.ne.s32 %p{1 + n}, %r{20 + n}, 0;"]
            operands.append(f"%p{1 + n}")
        elif kind.endswith("16"):
            lines += [f"ld.global.u32 %r{20 + n}, [%rd{20 + n}];", f"cvt.u16.u32 %rs{1 + n}, %r{20 + n};"]
            operands.append(f"%rs{1 + n}")
        else:
            operands.append(f"{PREFIX[kind]}{30 + n}" if kind != "f32" else f"%f{1 + n}")
            letter = "f" if kind in ("f32", "f64") else "u"
            lines.append(f"ld.global.{letter}{8 * size} {operands[-1]}, [%rd{20 + n}];")
    out = len(kinds)
    size = np.dtype(DTYPES[result]).itemsize
    target = {"pred": "%p10", "u16": "%rs10", "f32": "%f10"}.get(result) or f"{PREFIX[result]}19"
    lines += [f"{opcode} {target}, {', '.join(operands)};"]
    if result == "pred":
        lines.append("selp.b32 %r19, 1, 0, %p10;")
    if result == "u16":
        lines.append("cvt.u32.u16 %r19, %rs10;")
    source = "%f10" if result == "f32" else f"{PREFIX[result]}19" if size == 8 else "%r19"
    lines += [f"mul.wide.u32 %rd30, %r0, {size};", f"add.s64 %rd30, %rd30, %rd{out};"]
    lines.append(f"st.global.{'f' if result in ('f32', 'f64') else 'u'}{8 * size} [%rd30], {source};")
    device = sim.Device(program("\n".join(lines), out + 1), 1 << 16)
    columns = [
        device.array(np.array(c, DTYPES[k]), DTYPES[k])
        for c, k in zip(zip(*rows, strict=True), kinds, strict=True)
    ]
    y = device.empty((len(rows),), DTYPES[result])
    device.launch("k", 1, len(rows), *columns, y)
    return device.read(y)


inf, nan = np.inf, np.nan
TINY = 1e-40  # subnormal
ABOVE = float(np.nextafter(np.float32(1), np.float32(2)))  # 1 + 2^-23
BELOW = float(np.nextafter(np.float32(1), np.float32(0)))
f1, f2, f3, d2 = ("f32",), ("f32",) * 2, ("f32",) * 3, ("f64",) * 2
MAX = 2**32 - 1

# opcode: (result type, operand types, [(operands, result)])
CASES: dict[str, tuple[str, tuple[str, ...], list[tuple[tuple, object]]]] = {
    # ---- Floats
    "add.ftz.f32": ("f32", f2, [((1.5, 2.25), 3.75), ((inf, -inf), nan), ((TINY, 0), 0), ((1.2e-38, -1.3e-38), -0.0)]),
    "sub.ftz.f32": ("f32", f2, [((1.5, 2.25), -0.75), ((TINY, -TINY), 0)]),
    "mul.ftz.f32": ("f32", f2, [((1.5, -2), -3), ((1e-20, 1e-20), 0), ((TINY, 1e30), 0), ((0, inf), nan)]),
    "mul.rn.ftz.f32": ("f32", f2, [((1.5, -2), -3), ((1e-20, 1e-20), 0), ((TINY, 1e30), 0), ((0, inf), nan)]),
    "mul.f32": ("f32", f2, [((TINY, 1e30), float(np.float32(TINY)) * 1e30)]),
    "fma.rn.ftz.f32": ("f32", f3, [((ABOVE, ABOVE, -1), 2.0**-22 + 2.0**-46), ((TINY, 1e30, 1), 1), ((2, 3, 4), 10)]),
    "fma.rm.ftz.f32": (
        "f32", f3,
        # Rounded towards −∞: just below a representable number, and one that float64 alone would round up to it.
        [((1, 1, -2.0**-30), BELOW), ((-1, 1, -2.0**-30), -ABOVE), ((2.0**-40, 2.0**-40, 1), 1),
         ((2.0**-40, -(2.0**-40), 1), BELOW), ((2, 3, 4), 10)],
    ),
    "div.rn.ftz.f32": ("f32", f2, [((1, 3), np.float32(1 / 3)), ((1, 0), inf), ((TINY, TINY), nan)]),
    "rcp.rn.ftz.f32": ("f32", f1, [((3,), np.float32(1 / 3)), ((TINY,), inf), ((-inf,), -0.0)]),
    "rcp.approx.ftz.f32": ("f32", f1, [((4,), 0.25), ((-0.0,), -inf)]),
    "sqrt.rn.ftz.f32": ("f32", f1, [((2,), np.float32(2**0.5)), ((-1,), nan), ((TINY,), 0)]),
    "ex2.approx.ftz.f32": ("f32", f1, [((0,), 1), ((-1,), 0.5), ((128,), inf), ((-140,), 0), ((-inf,), 0)]),
    "add.f64": ("f64", d2, [((1.5, 2.25), 3.75), ((inf, -inf), nan), ((1, 2.0**-60), 1), ((1e-310, 0), 1e-310)]),
    "sub.f64": ("f64", d2, [((1.5, 2.25), -0.75), ((1, 2.0**-53), 1 - 2.0**-53)]),
    "mul.f64": ("f64", d2, [((1.5, -2), -3), ((1e-200, 1e-200), 0), ((0, inf), nan)]),
    "fma.rn.f64": (
        "f64", ("f64",) * 3,
        [((1 + 2.0**-30, 1 + 2.0**-30, -1), 2.0**-29 + 2.0**-60), ((2, 3, 4), 10), ((inf, 1, -inf), nan),
         ((-inf, 1, 3), -inf), ((1e-200, 1e-200, 1), 1)],
    ),
    "cvt.ftz.f64.f32": ("f64", f1, [((1.5,), 1.5), ((TINY,), 0), ((-inf,), -inf), ((nan,), nan)]),
    "cvt.f64.f32": ("f64", f1, [((TINY,), float(np.float32(TINY)))]),
    "cvt.rn.ftz.f32.f64": (
        "f32", ("f64",), [((1 + 2.0**-24,), 1), ((1 + 3 * 2.0**-24,), 1 + 2.0**-22), ((1e300,), inf), ((1e-40,), 0)],
    ),
    "cvt.rni.f64.f64": ("f64", ("f64",), [((2.5,), 2), ((-3.5,), -4), ((1e30,), 1e30), ((nan,), nan)]),
    "cvt.rzi.s32.f64": ("s32", ("f64",), [((-3.75,), -3), ((1e30,), 2**31 - 1), ((nan,), 0)]),
    "abs.ftz.f32": ("f32", f1, [((-2.5,), 2.5), ((-inf,), inf), ((-TINY,), 0)]),
    "neg.ftz.f32": ("f32", f1, [((2.5,), -2.5), ((0,), -0.0)]),
    "max.ftz.f32": ("f32", f2, [((1, 2), 2), ((nan, 2), 2), ((-3, nan), -3), ((nan, nan), nan)]),
    "min.ftz.f32": ("f32", f2, [((1, 2), 1), ((nan, 2), 2), ((-3, nan), -3), ((nan, nan), nan)]),
    "copysign.f32": ("f32", f2, [((-1, 3), -3), ((1, -3), 3), ((-0.0, 5), -5)]),
    "cvt.ftz.sat.f32.f32": ("f32", f1, [((0.25,), 0.25), ((-3,), 0), ((7,), 1), ((nan,), 0), ((TINY,), 0)]),
    "cvt.rn.bf16x2.f32": (
        "u32", f2,
        # The first operand is the upper half. Ties go to even; NaN stays NaN, the largest floats become infinite.
        [((1, -2), 0x3F80C000), ((1 + 2.0**-8, 1 + 3 * 2.0**-8), 0x3F803F82), ((nan, inf), 0x7FFF7F80),
         ((3.4e38, TINY), 0x7F800001)],
    ),
    "cvt.rn.f16x2.f32": (
        "u32", f2,
        [((1, -2), 0x3C00C000), ((1 + 2.0**-11, 1 + 3 * 2.0**-11), 0x3C003C02), ((nan, inf), 0x7FFF7C00),
         ((65519, 65520), 0x7BFF7C00), ((2.0**-24, -(2.0**-25)), 0x00018000)],
    ),
    "cvt.rn.f16.f32": (
        "u16", f1, [((-2,), 0xC000), ((1 + 3 * 2.0**-11,), 0x3C02), ((nan,), 0x7FFF), ((65520,), 0x7C00), ((TINY,), 0)],
    ),
    "cvt.f32.f16": (
        "f32", ("u16",), [((0xC000,), -2), ((0x7BFF,), 65504), ((1,), 2.0**-24), ((0x8000,), -0.0), ((0xFC00,), -inf),
                          ((0x7E00,), nan)],
    ),
    "cvt.u32.u16": ("u32", ("u16",), [((65535,), 65535), ((7,), 7)]),
    "cvt.rn.f32.s32": ("f32", ("s32",), [((-5,), -5), ((2**24 + 1,), 2**24)]),
    "cvt.rn.f32.u32": ("f32", ("u32",), [((MAX,), 2.0**32), ((7,), 7)]),
    "cvt.rni.f32.f32": ("f32", f1, [((2.5,), 2), ((-3.5,), -4), ((1e30,), 1e30)]),
    "cvt.rzi.f32.f32": ("f32", f1, [((2.5,), 2), ((-3.75,), -3)]),
    "cvt.rni.s32.f32": ("s32", f1, [((1.5,), 2), ((-2.5,), -2), ((nan,), 0)]),
    "cvt.rzi.s32.f32": ("s32", f1, [((-3.75,), -3), ((1e30,), 2**31 - 1), ((nan,), 0), ((-1e30,), -(2**31))]),
    # ---- Integers
    "add.s32": ("u32", ("u32", "u32"), [((MAX, 2), 1), ((3, 4), 7)]),
    "add.s64": ("u64", ("u64", "u64"), [((2**64 - 1, 2), 1)]),
    "sub.s32": ("u32", ("u32", "u32"), [((1, 2), MAX)]),
    "mul.lo.s32": ("s32", ("s32", "s32"), [((-3, 5), -15), ((65537, 65536), 65536)]),
    "mul.lo.s64": ("s64", ("s64", "s64"), [((-3, 2**40), -3 * 2**40)]),
    "mul.hi.u32": ("u32", ("u32", "u32"), [((MAX, MAX), MAX - 1), ((2**16, 2**16), 1)]),
    "mul.wide.s32": ("s64", ("s32", "s32"), [((-3, 2**30), -3 * 2**30)]),
    "mul.wide.u16": ("u32", ("u16", "u16"), [((65535, 65535), 65535 * 65535), ((3, 5), 15)]),
    "and.b16": ("u16", ("u16", "u16"), [((0xFF0F, 0x0FF0), 0x0F00)]),
    "cvt.u16.u32": ("u16", ("u32",), [((0x12345678,), 0x5678)]),
    "max.u32": ("u32", ("u32", "u32"), [((MAX, 1), MAX), ((2, 3), 3)]),
    "mul.wide.u32": ("u64", ("u32", "u32"), [((MAX, MAX), MAX * MAX)]),
    "mad.lo.s32": ("s32", ("s32",) * 3, [((-3, 5, 7), -8)]),
    "mad.lo.s64": ("s64", ("s64",) * 3, [((-3, 2**40, 7), 7 - 3 * 2**40)]),
    "div.s32": ("s32", ("s32", "s32"), [((7, 2), 3), ((-7, 2), -3), ((7, -2), -3), ((-7, -2), 3)]),
    "div.u32": ("u32", ("u32", "u32"), [((MAX, 2), 2**31 - 1)]),
    "rem.s32": ("s32", ("s32", "s32"), [((7, 2), 1), ((-7, 2), -1), ((7, -2), 1)]),
    "rem.u32": ("u32", ("u32", "u32"), [((MAX, 10), 5)]),
    "min.s32": ("s32", ("s32", "s32"), [((-1, 2), -1)]),
    "min.u32": ("u32", ("u32", "u32"), [((MAX, 1), 1), ((2, 3), 2)]),
    "max.s32": ("s32", ("s32", "s32"), [((-1, 2), 2)]),
    "max.relu.s32": ("s32", ("s32", "s32"), [((-5, 3), 3), ((-5, -7), 0)]),
    "abs.s32": ("s32", ("s32",), [((-5,), 5), ((5,), 5), ((-(2**31),), -(2**31))]),
    "neg.s32": ("s32", ("s32",), [((5,), -5), ((-(2**31),), -(2**31))]),
    "and.b32": ("u32", ("b32", "b32"), [((12, 10), 8)]),
    "and.b64": ("u64", ("b64", "b64"), [((2**40 + 12, 2**40 + 10), 2**40 + 8)]),
    "and.pred": ("pred", ("pred", "pred"), [((1, 1), 1), ((1, 0), 0), ((0, 0), 0)]),
    "or.b32": ("u32", ("b32", "b32"), [((12, 10), 14)]),
    "or.pred": ("pred", ("pred", "pred"), [((1, 1), 1), ((1, 0), 1), ((0, 0), 0)]),
    "xor.pred": ("pred", ("pred", "pred"), [((1, 1), 0), ((1, 0), 1), ((0, 0), 0)]),
    "xor.b16": ("u16", ("u16", "u16"), [((0xFF0F, 0x0FF0), 0xF0FF)]),
    "xor.b32": ("u32", ("b32", "b32"), [((12, 10), 6)]),
    "not.b32": ("u32", ("b32",), [((0,), MAX), ((MAX - 5,), 5)]),
    "not.pred": ("pred", ("pred",), [((1,), 0), ((0,), 1)]),
    "shl.b32": ("u32", ("b32", "u32"), [((5, 1), 10), ((1, 31), 2**31), ((5, 32), 0), ((5, 99), 0)]),
    "shl.b64": ("u64", ("b64", "u32"), [((5, 40), 5 << 40), ((5, 64), 0)]),
    "shr.u32": ("u32", ("u32", "u32"), [((2**31, 31), 1), ((MAX, 32), 0)]),
    "shr.s32": ("s32", ("s32", "u32"), [((-8, 1), -4), ((-8, 40), -1)]),
    "shr.u64": ("u64", ("u64", "u32"), [((2**63, 63), 1), ((2**63, 64), 0)]),
    "popc.b32": ("u32", ("b32",), [((0,), 0), ((MAX,), 32), ((0x8000F00D,), 8)]),
    "brev.b32": ("u32", ("b32",), [((1,), 2**31), ((0x0000F00D,), 0xB00F0000)]),
    "bfind.shiftamt.u32": ("u32", ("u32",), [((1,), 31), ((2**31,), 0), ((0xFFFF,), 16), ((0,), MAX)]),
    "or.b64": ("u64", ("b64", "b64"), [((2**40 + 12, 2**40 + 10), 2**40 + 14)]),
    "bfi.b32": ("u32", ("b32",) * 2 + ("u32",) * 2, [((0xAB, 0, 8, 8), 0xAB00), ((0, MAX, 4, 8), 0xFFFFF00F)]),
    "cvt.s64.s32": ("s64", ("s32",), [((-5,), -5)]),
    "cvt.u64.u32": ("u64", ("u32",), [((MAX,), MAX)]),
    "cvt.u32.u64": ("u32", ("u64",), [((2**40 + 3,), 3)]),
    # ---- Comparison and choice
    "setp.eq.ftz.f32": ("pred", f2, [((1, 1), 1), ((1, 2), 0), ((nan, nan), 0), ((TINY, 0), 1)]),
    "setp.neu.ftz.f32": ("pred", f2, [((1, 1), 0), ((1, 2), 1), ((nan, nan), 1)]),
    "setp.lt.ftz.f32": ("pred", f2, [((1, 2), 1), ((2, 1), 0), ((nan, 1), 0)]),
    "setp.le.ftz.f32": ("pred", f2, [((1, 1), 1), ((2, 1), 0), ((1, nan), 0)]),
    "setp.gt.ftz.f32": ("pred", f2, [((1, 2), 0), ((2, 1), 1), ((nan, 1), 0)]),
    "setp.ge.ftz.f32": ("pred", f2, [((1, 1), 1), ((1, 2), 0), ((nan, 1), 0)]),
    "setp.ltu.ftz.f32": ("pred", f2, [((1, 2), 1), ((2, 1), 0), ((nan, 1), 1)]),
    "setp.leu.ftz.f32": ("pred", f2, [((1, 1), 1), ((2, 1), 0), ((1, nan), 1)]),
    "setp.gtu.ftz.f32": ("pred", f2, [((1, 2), 0), ((2, 1), 1), ((nan, 1), 1)]),
    "setp.ge.f64": ("pred", d2, [((1, 1), 1), ((1, 2), 0), ((nan, 1), 0)]),
    "setp.ltu.f64": ("pred", d2, [((1, 2), 1), ((2, 1), 0), ((nan, 1), 1)]),
    "setp.num.f64": ("pred", d2, [((1, 2), 1), ((nan, 1), 0), ((1, nan), 0)]),
    "setp.ne.ftz.f32": ("pred", f2, [((1, 1), 0), ((1, 2), 1), ((nan, nan), 0)]),
    "setp.geu.ftz.f32": ("pred", f2, [((1, 1), 1), ((1, 2), 0), ((nan, 1), 1)]),
    "setp.eq.s16": ("pred", ("s16", "s16"), [((5, 5), 1), ((5, 6), 0)]),
    "setp.eq.s32": ("pred", ("s32", "s32"), [((-5, -5), 1), ((5, -5), 0)]),
    "setp.eq.b32": ("pred", ("b32", "b32"), [((5, 5), 1), ((5, 6), 0)]),
    "setp.eq.s64": ("pred", ("s64", "s64"), [((2**40, 2**40), 1), ((2**40, 0), 0)]),
    "setp.eq.b64": ("pred", ("b64", "b64"), [((2**40, 2**40), 1), ((2**40, 0), 0)]),
    "setp.ne.s16": ("pred", ("s16", "s16"), [((5, 5), 0), ((5, 6), 1)]),
    "setp.ne.s32": ("pred", ("s32", "s32"), [((-5, -5), 0), ((5, -5), 1)]),
    "setp.ne.u32": ("pred", ("u32", "u32"), [((5, 5), 0), ((MAX, 5), 1)]),
    "setp.ne.b32": ("pred", ("b32", "b32"), [((5, 5), 0), ((5, 6), 1)]),
    "setp.ne.s64": ("pred", ("s64", "s64"), [((2**40, 2**40), 0), ((2**40, 0), 1)]),
    "setp.ne.b64": ("pred", ("b64", "b64"), [((2**40, 2**40), 0), ((2**40, 0), 1)]),
    "setp.lt.s32": ("pred", ("s32", "s32"), [((-1, 0), 1), ((0, -1), 0)]),
    "setp.lt.s64": ("pred", ("s64", "s64"), [((-1, 2**40), 1), ((2**40, -1), 0)]),
    "setp.lt.u32": ("pred", ("u32", "u32"), [((MAX, 0), 0), ((0, MAX), 1)]),
    "setp.le.s32": ("pred", ("s32", "s32"), [((-1, -1), 1), ((0, -1), 0)]),
    "setp.le.u32": ("pred", ("u32", "u32"), [((MAX, 0), 0), ((0, 1), 1), ((MAX, MAX), 1)]),
    "setp.gt.s16": ("pred", ("s16", "s16"), [((6, 5), 1), ((5, 6), 0)]),
    "setp.gt.s32": ("pred", ("s32", "s32"), [((0, -1), 1), ((-1, -1), 0)]),
    "setp.gt.u32": ("pred", ("u32", "u32"), [((MAX, 0), 1), ((0, 0), 0)]),
    "setp.ge.s32": ("pred", ("s32", "s32"), [((-1, -1), 1), ((-2, -1), 0)]),
    "setp.ge.u32": ("pred", ("u32", "u32"), [((MAX, 0), 1), ((0, 1), 0)]),
    "selp.b32": ("u32", ("u32", "u32", "pred"), [((3, 4, 1), 3), ((3, 4, 0), 4)]),
    "selp.u32": ("u32", ("u32", "u32", "pred"), [((MAX, 4, 1), MAX), ((3, 4, 0), 4)]),
    "selp.b64": ("u64", ("u64", "u64", "pred"), [((2**40, 4, 1), 2**40), ((3, 4, 0), 4)]),
    "selp.f32": ("f32", ("f32", "f32", "pred"), [((1.5, 2.5, 1), 1.5), ((1.5, TINY, 0), TINY)]),
    "selp.f64": ("f64", ("f64", "f64", "pred"), [((1.5, 2.5, 1), 1.5), ((1.5, nan, 0), nan)]),
    "selp.u16": ("u16", ("u16", "u16", "pred"), [((3, 65535, 1), 3), ((3, 65535, 0), 65535)]),
    "selp.b16": ("u16", ("u16", "u16", "pred"), [((3, 65535, 1), 3), ((3, 65535, 0), 65535)]),
    # ---- Moves
    "mov.f32": ("f32", f1, [((TINY,), TINY)]),
    "mov.f64": ("f64", ("f64",), [((1e-310,), 1e-310)]),
    "mov.b32": ("u32", f1, [((1,), 0x3F800000)]),
    "mov.u32": ("u32", ("u32",), [((MAX,), MAX)]),
    "mov.b64": ("u64", ("u64",), [((2**40,), 2**40)]),
    "mov.u64": ("u64", ("u64",), [((2**40,), 2**40)]),
    "mov.u16": ("u16", ("u16",), [((65535,), 65535)]),
    "mov.pred": ("pred", ("pred",), [((1,), 1), ((0,), 0)]),
    "cvta.to.global.u64": ("u64", ("u64",), [((2**40,), 2**40)]),
}  # fmt: skip


@pytest.mark.parametrize("opcode", CASES)
def test_arithmetic(opcode):
    result, kinds, rows = CASES[opcode]
    got = run_op(opcode, result, kinds, [operands for operands, _ in rows])
    with np.errstate(all="ignore"):
        want = np.array([y for _, y in rows], DTYPES[result])
    np.testing.assert_array_equal(got, want)
    if result == "f32":
        np.testing.assert_array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0]))


def test_rounding_down_is_exact(rng):
    """fma.rm of random operands against rational arithmetic."""
    a, b = rng.normal(size=(2, 64)).astype(np.float32)
    c = (rng.normal(size=64) * 10.0 ** rng.integers(-12, 12, size=64)).astype(np.float32)
    got = run_op("fma.rm.ftz.f32", "f32", f3, list(zip(a, b, c, strict=True)))
    for x, y, z, r in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert Fraction(float(r)) <= exact < Fraction(float(np.nextafter(r, np.float32(inf))))


# ---- Immediates, memory, control: what needs more than one instruction ---------------------------------------------

SPECIAL = {
    "bar.red.or.pred",
    "bar.sync", "bra", "bra.uni", "ld.global.b32", "ld.global.f32", "ld.global.nc.b32", "ld.global.nc.f32",
    "ld.global.nc.u32", "ld.global.nc.v2.u32", "ld.global.nc.v4.b32", "ld.global.nc.v4.f32", "ld.global.u32",
    "ld.global.v4.b32",
    "ld.global.v4.f32", "ld.param.b32", "ld.param.b64", "ld.param.f32", "ld.param.s32", "ld.param.u32", "ld.param.u64",
    "ld.shared.b32", "ld.shared.f32", "ld.shared.v4.b32", "ld.shared.v4.f32", "ret", "shfl.sync.bfly.b32",
    "st.global.b32", "st.global.f32", "st.global.u32", "st.global.v2.b64", "st.global.v4.b32", "st.global.v4.f32",
    "st.shared.b32", "st.shared.f32", "st.shared.v4.b32", "st.shared.v4.f32", "vote.sync.ballot.b32",
    # Tested by name below.
    "fence.proxy.async.shared::cta", "wgmma.commit_group.sync.aligned", "wgmma.fence.sync.aligned",
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16",
    "wgmma.wait_group.sync.aligned",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    *MMA, "st.global.v2.f32", "st.shared.v2.u32",
    "ld.global.nc.v2.b32", "st.global.v2.b32", "st.global.v2.u32", "st.shared.v2.b32",
    "bfi.b64", "ld.shared.b64", "ld.shared.f64", "st.shared.b64", "st.shared.f64",
    "ld.shared.u32", "st.shared.u32",
    "ld.shared.v2.f32", "ld.shared.v2.b32",
    "ld.global.nc.v4.u32", "ld.shared.v4.u32", "st.global.v4.u32", "st.shared.v4.u32", "bar.warp.sync",
    "ld.shared.s32", "ld.shared.v2.u32",
    "cp.async.ca.shared.global", "cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group",
    "ld.global.v4.u32",
    *(f"{load}.{kind}" for load in ("ld.global", "ld.global.nc") for kind in ("u64", "b64", "v2.u32", "v2.b32")),
    *(f"{load}.{v}{kind}" for load in ("ld.global", "ld.global.nc", "st.global", "ld.shared", "st.shared")
      for v in ("", "v2.", "v4.") for kind in ("b16", "u16")),
}  # fmt: skip


def run(body: str, threads: int, inputs: list, out: tuple, shared: str = "", blocks: int = 1) -> np.ndarray:
    """Runs a body whose pointers %rd0 .. are the inputs and whose next pointer is the output."""
    device = sim.Device(program(body, len(inputs) + 1, shared), 1 << 16)
    buffers = [device.array(x, np.asarray(x).dtype) for x in inputs]
    y = device.empty(*out)
    device.launch("k", blocks, threads, *buffers, y)
    return device.read(y)


def test_immediates():
    body = """
    st.global.u32 [%rd0], -1;
    st.global.f32 [%rd0+4], 0f3FC00000;
    mov.b32 %r1, 0x10;
    st.global.u32 [%rd0+8], %r1;
    mov.f32 %f1, 0fBF800000;
    st.global.f32 [%rd0+12], %f1;
    mov.pred %p1, -1;
    selp.b32 %r2, 5, 6, %p1;
    st.global.u32 [%rd0+16], %r2;
    mov.b32 %r3, 0f3F800000;
    st.global.u32 [%rd0+20], %r3;
    """
    got = run(body, 1, [], ((6,), np.uint32))
    assert got.tolist() == [MAX, 0x3FC00000, 16, 0xBF800000, 5, 0x3F800000]


def test_halves_of_64_bits():
    body = """
    ld.global.u64 %rd20, [%rd0];
    mov.b64 {%r1, %r2}, %rd20;
    mov.b64 {_, %r3}, %rd20;
    mov.b64 %rd21, {%r2, %r1};
    st.global.v2.b64 [%rd1], {%rd21, %rd20};
    st.global.u32 [%rd1+16], %r3;
    st.global.u32 [%rd1+20], %r3;
    """
    got = run(body, 1, [np.array([0x1122334455667788], np.uint64)], ((3,), np.uint64))
    assert got.tolist() == [0x5566778811223344, 0x1122334455667788, 0x1122334411223344]


@pytest.mark.parametrize("load", ["ld.global", "ld.global.nc"])
@pytest.mark.parametrize("kind", ["u", "b"])
def test_pointers_and_sizes_out_of_a_table(load, kind):
    body = f"""
    {load}.{kind}64 %rd20, [%rd0+8];
    {load}.v2.{kind}32 {{%r1, %r2}}, [%rd0];
    st.global.v2.b64 [%rd1], {{%rd20, %rd20}};
    st.global.v2.u32 [%rd1+16], {{%r2, %r1}};
    """
    got = run(body, 1, [np.array([7 << 32 | 5, 0x1122334455667788], np.uint64)], ((3,), np.uint64))
    assert got.tolist() == [0x1122334455667788, 0x1122334455667788, 5 << 32 | 7]


def test_halves_of_32_bits():
    body = """
    ld.global.u32 %r1, [%rd0];
    mov.b32 {%rs1, %rs2}, %r1;
    mov.b32 %r2, {%rs2, %rs1};
    st.global.u32 [%rd1], %r2;
    """
    got = run(body, 1, [np.array([0x11228384], np.uint32)], ((1,), np.uint32))
    assert got.tolist() == [0x83841122]


@pytest.mark.parametrize("load", ["ld.global", "ld.global.nc"])
@pytest.mark.parametrize("kind", ["f32", "b32", "u32"])
def test_vectors(load, kind):
    registers = [f"%{kind[0] if kind == 'f32' else 'r'}{n}" for n in range(1, 5)]
    turned = ", ".join(registers[::-1])
    body = f"""
    {load}.v4.{kind} {{{", ".join(registers)}}}, [%rd0+16];
    mov.u32 %r10, buffer;
    st.shared.v4.{kind} [%r10], {{{turned}}};
    ld.shared.v4.{kind} {{{", ".join(registers)}}}, [buffer];
    ld.shared.{kind} {registers[0]}, [buffer+8];
    st.shared.{kind} [buffer+4], {registers[0]};
    ld.shared.{kind} {registers[1]}, [%r10+4];
    st.global.v4.{kind} [%rd1], {{{", ".join(registers)}}};
    """
    shared = ".shared .align 16 .b8 buffer[16];"
    got = run(body, 1, [np.arange(8, dtype=np.float32)], ((4,), np.float32), shared)
    assert got.tolist() == [5, 5, 5, 4]


def test_pairs():
    body = """
    ld.global.nc.v2.u32 {%r1, %r2}, [%rd0+8];
    st.global.u32 [%rd1], %r2;
    st.global.u32 [%rd1+4], %r1;
    """
    assert run(body, 1, [np.arange(4, dtype=np.uint32)], ((2,), np.uint32)).tolist() == [3, 2]


@pytest.mark.parametrize("kind", ["b16", "u16"])
@pytest.mark.parametrize("load", ["ld.global", "ld.global.nc"])
def test_halves_of_words(load, kind):
    """Of global and shared memory, one at a time and four; a word is read as its halves were written."""
    body = f"""
    {load}.{kind} %rs1, [%rd0+2];
    {load}.v4.{kind} {{%rs2, %rs3, %rs4, %rs5}}, [%rd0+8];
    st.shared.{kind} [buffer+2], %rs1;
    st.shared.{kind} [buffer], %rs5;
    ld.shared.{kind} %rs6, [buffer+2];
    ld.shared.b32 %r1, [buffer];
    st.global.b32 [%rd1], %r1;
    st.global.v2.{kind} [%rd1+4], {{%rs6, %rs2}};
    st.global.{kind} [%rd1+10], %rs3;
    st.global.{kind} [%rd1+8], %rs4;
    """
    given = np.array([10, 65535, 12, 13, 14, 15, 16, 17], np.uint16)
    got = run(body, 1, [given], ((6,), np.uint16), ".shared .align 8 .b8 buffer[8];")
    assert got.tolist() == [17, 65535, 65535, 14, 16, 15]


def test_a_base_below_its_array():
    body = """
    mov.u32 %r1, buffer;
    add.s32 %r2, %r1, -65536;
    st.shared.u32 [%r2+65536], %r1;
    ld.shared.u32 %r3, [buffer];
    sub.s32 %r4, %r3, %r1;
    st.global.u32 [%rd0], %r4;
    """
    assert run(body, 1, [], ((1,), np.uint32), ".shared .align 4 .b8 buffer[4];").tolist() == [0]


@pytest.mark.parametrize(("kind", "want"), [("s32", -2), ("u32", 2**32 - 2), ("b32", 2**32 - 2)])
def test_words_in_wider_registers(kind, want):
    body = f"""
    ld.global.u32 %r1, [%rd0];
    st.shared.u32 [buffer], %r1;
    ld.shared.{kind} %rd20, [buffer];
    st.global.v2.b64 [%rd1], {{%rd20, %rd20}};
    """
    got = run(body, 1, [np.array([-2], np.int32)], ((2,), np.int64), ".shared .align 4 .b8 buffer[4];")
    assert got.tolist() == [want, want]


def test_halves_in_wider_registers():
    body = """
    ld.global.u16 %r1, [%rd0];
    ld.global.s16 %r2, [%rd0];
    ld.global.s16 %r3, [%rd0+2];
    st.global.v2.b32 [%rd1], {%r1, %r2};
    st.global.b32 [%rd1+8], %r3;
    st.global.u16 [%rd1+12], %r2;
    st.global.u16 [%rd1+14], %r3;
    """
    got = run(body, 1, [np.array([65535, 3], np.uint16)], ((4,), np.uint32))
    assert got.tolist() == [65535, 2**32 - 1, 3, 65535 | 3 << 16]


@pytest.mark.parametrize("kind", ["u32", "b32"])
def test_pairs_through_shared_memory(kind):
    body = f"""
    ld.global.nc.v2.{kind} {{%r1, %r2}}, [%rd0];
    st.shared.v2.{kind} [buffer], {{%r2, %r1}};
    ld.shared.b32 %r3, [buffer+4];
    ld.shared.b32 %r4, [buffer];
    mov.b32 %f1, %r3;
    mov.b32 %f2, %r4;
    st.global.v2.f32 [%rd1], {{%f1, %f2}};
    st.global.v2.{kind} [%rd1+8], {{%r3, %r3}};
    """
    given = np.array([1.5, -2], np.float32).view(np.uint32)
    got = run(body, 1, [given], ((4,), np.float32), ".shared .align 8 .b8 buffer[8];")
    assert got.tolist() == [1.5, -2, 1.5, 1.5]


def test_parameters_and_special_registers():
    text = f"""{HEADER}
.visible .entry k(
.param .u64 .ptr .align 1 k_param_0,
.param .u32 k_param_1,
.param .f32 k_param_2,
.param .b32 k_param_3
)
{{{REGISTERS}
ld.param.b64 %rd1, [k_param_0];
ld.param.s32 %rd2, [k_param_1];
ld.param.u32 %r1, [k_param_1];
ld.param.f32 %f1, [k_param_2];
ld.param.b32 %r2, [k_param_3];
mov.u32 %r3, %tid.x;
mov.u32 %r4, %tid.y;
mov.u32 %r5, %ctaid.z;
mov.u32 %r6, %ntid.y;
mov.u32 %r7, %nctaid.z;
mad.lo.s32 %r8, %r5, %r6, %r4;
mov.u32 %r9, %ntid.x;
mad.lo.s32 %r8, %r8, %r9, %r3;
mul.wide.u32 %rd3, %r8, 24;
add.s64 %rd3, %rd3, %rd1;
st.global.u64 [%rd3], %rd2;
st.global.u32 [%rd3+8], %r1;
st.global.f32 [%rd3+12], %f1;
st.global.u32 [%rd3+16], %r2;
st.global.u32 [%rd3+20], %r7;
ret;
}}
"""
    device = sim.Device(sim.load(text), 1 << 16)
    y = device.empty((12, 6), np.uint32)
    device.launch("k", (1, 1, 2), (3, 2), y, np.int32(-2), np.float32(1.5), np.float32(2))
    row = [MAX - 1, MAX, MAX - 1, 0x3FC00000, 0x40000000, 2]
    assert device.read(y).tolist() == [row] * 12
    for wrong in (1.5, np.float64(1.5), np.int32(1)):
        with pytest.raises(TypeError):
            device.launch("k", 1, 1, y, np.int32(1), wrong, np.float32(2))


def test_loops_branches_and_exits():
    """Thread t sums 0 .. t - 1; threads 4 and 5 leave early; a guarded store skips thread 2."""
    body = """
    setp.gt.s32 %p1, %r0, 3;
    @%p1 bra $L_out;
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
$L_loop:
    setp.ge.s32 %p2, %r1, %r0;
    @%p2 bra $L_done;
    add.s32 %r2, %r2, %r1;
    add.s32 %r1, %r1, 1;
    bra.uni $L_loop;
$L_done:
    mul.wide.u32 %rd20, %r0, 4;
    add.s64 %rd20, %rd20, %rd0;
    setp.eq.s32 %p3, %r0, 2;
    @!%p3 st.global.u32 [%rd20], %r2;
    @%p3 st.global.u32 [%rd20], 99;
    ret;
$L_out:
    """
    assert run(body, 6, [], ((6,), np.uint32)).tolist() == [0, 0, 99, 3, MAX, MAX]


def test_barrier_shuffle_and_vote():
    """Neighbours exchange by shuffle, warps by shared memory."""
    body = """
    shfl.sync.bfly.b32 %r1|%p1, %r0, 1, 31, -1;
    setp.lt.s32 %p2, %r0, 3;
    vote.sync.ballot.b32 %r2, %p2, -1;
    shl.b32 %r3, %r0, 2;
    mov.u32 %r4, buffer;
    add.s32 %r4, %r4, %r3;
    st.shared.u32 [%r4], %r1;
    bar.sync 0;
    xor.b32 %r5, %r3, 128;
    mov.u32 %r6, buffer;
    add.s32 %r6, %r6, %r5;
    ld.shared.u32 %r7, [%r6];
    mul.wide.u32 %rd20, %r0, 8;
    add.s64 %rd20, %rd20, %rd0;
    st.global.u32 [%rd20], %r7;
    st.global.u32 [%rd20+4], %r2;
    """
    got = run(body, 64, [], ((64, 2), np.uint32), ".shared .align 4 .b8 buffer[256];")
    assert got[:, 0].tolist() == [(t ^ 32) ^ 1 for t in range(64)]
    assert got[:, 1].tolist() == [7] * 32 + [0] * 32


def test_a_barrier_that_votes_and_names_of_an_inner_scope():
    """Blocks of 64 threads ask whether any thread has x != 0; %p1 of the scope is not %p1 outside."""
    body = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 64, %r0;
    mul.wide.u32 %rd20, %r2, 4;
    add.s64 %rd21, %rd20, %rd0;
    add.s64 %rd22, %rd20, %rd1;
    ld.global.u32 %r3, [%rd21];
    setp.eq.s32 %p1, %r0, 7;
\t{
    .reg .pred %p1;
    .reg .pred %p2;
    setp.ne.u32 %p1, %r3, 0;
    bar.red.or.pred %p2, 0, %p1;
    selp.u32 %r4, 1, 0, %p2;
\t}
    selp.u32 %r4, 5, %r4, %p1;
    st.global.u32 [%rd22], %r4;
    """
    x = np.zeros((2, 64), np.uint32)
    x[1, 40] = 3
    got = run(body, 64, [x], ((2, 64), np.uint32), blocks=2)
    want = np.array([[0] * 64, [1] * 64])
    want[:, 7] = 5
    np.testing.assert_array_equal(got, want)


def test_a_shuffle_beyond_its_segment_gives_the_own_value():
    body = """
    shfl.sync.bfly.b32 %r1|%p1, %r0, 16, 6175, -1;
    selp.b32 %r2, 100, 0, %p1;
    add.s32 %r1, %r1, %r2;
    mul.wide.u32 %rd20, %r0, 4;
    add.s64 %rd20, %rd20, %rd0;
    st.global.u32 [%rd20], %r1;
    """
    # c = 0x181f: segments of eight lanes, which a step of 16 leaves downwards (allowed) or upwards (not).
    got = run(body, 32, [], ((32,), np.uint32))
    assert got.tolist() == [t if t < 16 else t - 16 + 100 for t in range(32)]


# CuTe's layouts of the same instruction, an independent statement of who holds what: (extents of lane and value,
# strides into the matrix, columns first). Source: CUTLASS, include/cute/atom/mma_traits_sm80.hpp, SM80_16x8x16, and
# mma_traits_sm75.hpp, SM75_16x8x8.
LAYOUTS = {
    ("a", 16): (((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
    ("b", 16): (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    ("a", 8): (((4, 8), (2, 2)), ((32, 1), (16, 8))),
    ("b", 8): (((4, 8), (2,)), ((16, 1), (8,))),
    "c": (((4, 8), (2, 2)), ((32, 1), (16, 8))),
    # Of `wgmma`: a result of 64 rows, and a first factor in registers, which lies like a result of 16 columns. Source:
    # mma_traits_sm90_gmma.hpp, CLayout_64xN, ALayout_64x16.
    **{("w", n): (((4, 8, 4), (2, 2, n // 8)), ((128, 1, 16), (64, 8, 512))) for n in (16, 32, 64, 128)},
}


def held(which: str | tuple[str, int]) -> np.ndarray:
    """Places in the matrix, stored by columns, of each lane's values: [32, values]."""
    parts = []
    for extents, strides in zip(*LAYOUTS[which], strict=True):
        places = np.zeros(1, int)
        for extent, stride in zip(extents, strides, strict=True):  # the first coordinate runs fastest
            places = (np.arange(extent)[:, None] * stride + places).reshape(-1)
        parts.append(places)
    return parts[0][:, None] + parts[1]


def in_16_bits(x: np.ndarray, opcode: str) -> np.ndarray:
    """Small integers as float16 or bfloat16, which hold them exactly."""
    if ".f16." in opcode:
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("opcode", MMA)
def test_mma(rng, opcode):
    k = 8 if "k8" in opcode else 16
    a, b, c = (rng.integers(-9, 10, size) for size in ((16, k), (8, k), (16, 8)))
    lanes = [
        in_16_bits(x.T.reshape(-1)[held((n, k))], opcode).view(np.uint32) for n, x in (("a", a), ("b", b))
    ]
    sums = c.astype(np.float32).T.reshape(-1)[held("c")]
    words = [["%r1", "%r2", "%r3", "%r4"][: k // 4], ["%r5", "%r6"][: k // 8]]
    loads = "\n".join(
        f"ld.global.u32 {r}, [%rd{n}+{4 * i}];" for n in range(2) for i, r in enumerate(words[n])
    )
    body = f"""
    mul.wide.u32 %rd20, %r0, {k};
    mul.wide.u32 %rd21, %r0, {k // 2};
    mul.wide.u32 %rd22, %r0, 16;
    add.s64 %rd0, %rd0, %rd20;
    add.s64 %rd1, %rd1, %rd21;
    add.s64 %rd2, %rd2, %rd22;
    add.s64 %rd3, %rd3, %rd22;
    {loads}
    ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd2];
    {opcode} {{SUM}}, {{{", ".join(words[0])}}}, {{{", ".join(words[1])}}}, {{%f1, %f2, %f3, %f4}};
    st.global.v4.f32 [%rd3], {{SUM}};
    """.replace("SUM", "%f5, %f6, %f7, %f8")
    got = run(body, 32, [*lanes, sums], ((32, 4), np.float32))
    np.testing.assert_array_equal(got, (a @ b.T + c).T.reshape(-1)[held("c")])


@pytest.mark.parametrize("turned", ["", ".trans"])
def test_ldmatrix(turned):
    """Lane l gives row l % 8 of tile l / 8; the tiles lie in memory one behind the other."""
    body = f"""
    mul.wide.u32 %rd20, %r0, 16;
    add.s64 %rd0, %rd0, %rd20;
    add.s64 %rd1, %rd1, %rd20;
    ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd0];
    shl.b32 %r5, %r0, 4;
    mov.u32 %r6, buffer;
    add.s32 %r6, %r6, %r5;
    st.shared.v4.u32 [%r6], {{%r1, %r2, %r3, %r4}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r6];
    st.global.v4.u32 [%rd1], {{%r1, %r2, %r3, %r4}};
    """
    tiles = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    got = run(body, 32, [tiles.view(np.uint32)], ((32, 4), np.uint32), ".shared .align 16 .b8 buffer[512];")
    for lane, tile, half in np.ndindex(32, 4, 2):
        row, col = lane // 4, 2 * (lane % 4) + half
        want = tiles[tile, col, row] if turned else tiles[tile, row, col]
        assert got[lane, tile] >> 16 * half & 0xFFFF == want


@pytest.mark.parametrize("kind", ["b64", "f64"])
def test_words_of_64_bits_in_shared_memory(kind):
    register = "%rd" if kind == "b64" else "%fd"
    body = f"""
    mul.wide.u32 %rd10, %r0, 8;
    add.s64 %rd11, %rd0, %rd10;
    add.s64 %rd12, %rd1, %rd10;
    ld.global.{"f64" if kind == "f64" else "u64"} {register}13, [%rd11];
    mov.u32 %r6, buffer;
    shl.b32 %r5, %r0, 3;
    add.s32 %r7, %r6, %r5;
    st.shared.{kind} [%r7], {register}13;
    xor.b32 %r5, %r5, 8;
    add.s32 %r7, %r6, %r5;
    bar.sync 0;
    ld.shared.{kind} {register}14, [%r7];
    st.global.{"f64" if kind == "f64" else "u64"} [%rd12], {register}14;
    """
    dtype = np.float64 if kind == "f64" else np.uint64
    given = np.array([1.25, 3e300]).view(dtype)
    got = run(body, 2, [given], ((2,), dtype), ".shared .align 8 .b8 buffer[16];")
    np.testing.assert_array_equal(got, given[::-1])


def test_unsigned_words_in_shared_memory():
    body = """
    mul.wide.u32 %rd10, %r0, 4;
    add.s64 %rd11, %rd0, %rd10;
    mov.u32 %r6, buffer;
    shl.b32 %r5, %r0, 2;
    add.s32 %r7, %r6, %r5;
    st.shared.u32 [%r7], %r0;
    ld.shared.u32 %r8, [%r7];
    st.global.u32 [%rd11], %r8;
    """
    got = run(body, 2, [], ((2,), np.uint32), ".shared .align 8 .b8 buffer[8];")
    np.testing.assert_array_equal(got, [0, 1])


def test_the_upper_half_of_a_word_is_replaced():
    body = """
    mov.u64 %rd10, 0x1111111122222222;
    mov.u64 %rd11, 0x3333333344444444;
    bfi.b64 %rd12, %rd10, %rd11, 32, 32;
    st.global.u64 [%rd0], %rd12;
    """
    assert run(body, 1, [], ((1,), np.uint64))[0] == 0x2222222244444444


def test_an_unsynchronised_ldmatrix_is_a_race():
    body = """
    shl.b32 %r5, %r0, 4;
    mov.u32 %r6, buffer;
    add.s32 %r7, %r6, %r5;
    st.shared.v4.u32 [%r7], {%r0, %r0, %r0, %r0};
    xor.b32 %r5, %r5, 16;
    add.s32 %r7, %r6, %r5;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r7];
    """
    with pytest.raises(sim.Fault, match="race: read unsynchronised"):
        run(body, 32, [], ((1,), np.uint32), ".shared .align 16 .b8 buffer[512];")


@pytest.mark.parametrize("barrier", [True, False])
def test_a_barrier_of_a_warp_orders_its_threads(barrier):
    body = f"""
    shl.b32 %r5, %r0, 2;
    mov.u32 %r6, buffer;
    add.s32 %r7, %r6, %r5;
    st.shared.u32 [%r7], %r0;
    {"bar.warp.sync -1;" if barrier else ""}
    xor.b32 %r5, %r5, 4;
    add.s32 %r7, %r6, %r5;
    ld.shared.u32 %r1, [%r7];
    mul.wide.u32 %rd20, %r0, 4;
    add.s64 %rd21, %rd0, %rd20;
    st.global.u32 [%rd21], %r1;
    """
    arguments = body, 32, [], ((32,), np.uint32), ".shared .align 4 .b8 buffer[128];"
    if barrier:
        np.testing.assert_array_equal(run(*arguments), np.arange(32) ^ 1)
        return
    with pytest.raises(sim.Fault, match="race: read unsynchronised"):
        run(*arguments)


# Threads copy 16 bytes each, the last of them zeros, and read what their neighbours copied.
COPIES = """
    shl.b32 %r5, %r0, 4;
    mov.u32 %r6, buffer;
    add.s32 %r7, %r6, %r5;
    mul.wide.u32 %rd20, %r0, 16;
    add.s64 %rd21, %rd0, %rd20;
    setp.lt.u32 %p1, %r0, 3;
    selp.b32 %r8, 16, 0, %p1;
    cp.async.cg.shared.global [%r7], [%rd21], 16, %r8;
    {commit}
    {between}
    {wait}
    {barrier}
    xor.b32 %r9, %r5, 16;
    add.s32 %r10, %r6, %r9;
    ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r10];
    add.s64 %rd22, %rd1, %rd20;
    st.global.v4.u32 [%rd22], {{%r1, %r2, %r3, %r4}};
"""
COPY_PARTS = {
    "commit": "cp.async.commit_group;", "between": "", "wait": "cp.async.wait_group 0;", "barrier": "bar.sync 0;",
}  # fmt: skip


def copied(**changed):
    given = np.arange(1, 17, dtype=np.uint32)
    shared = ".shared .align 16 .b8 buffer[80];"
    got = run(COPIES.format(**COPY_PARTS | changed), 4, [given], ((16,), np.uint32), shared)
    return got.reshape(4, 4), given.reshape(4, 4)


def test_copies_arrive_and_are_filled_with_zeros():
    got, given = copied()
    np.testing.assert_array_equal(got, [given[1], given[0], np.zeros(4), given[2]])


def test_copies_of_a_word_and_groups_that_may_still_be_on_their_way():
    later = """
    add.s32 %r11, %r6, 64;
    setp.eq.u32 %p2, %r0, 0;
    @%p2 cp.async.ca.shared.global [%r11], [%rd0], 4, 4;
    cp.async.commit_group;
    """
    both = "bar.sync 0;\ncp.async.wait_group 0;"
    got, given = copied(between=later, wait="cp.async.wait_group 1;", barrier=both)
    np.testing.assert_array_equal(got, [given[1], given[0], np.zeros(4), given[2]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"wait": ""}, "uninitialised"),
        ({"commit": ""}, "uninitialised"),
        ({"wait": "cp.async.wait_group 1;"}, "uninitialised"),
        ({"barrier": ""}, "race: read unsynchronised"),
        ({"between": "cp.async.ca.shared.global [%r7], [%rd1], 4, 4;"}, "uninitialised global"),
        ({"between": "cp.async.cg.shared.global [%r7+72], [%rd0], 16, 16;"}, "misaligned"),
        ({"between": "bar.sync 0;\ncp.async.cg.shared.global [buffer], [%rd0], 16, 16;"}, "race"),
    ],
)
def test_copies_that_nothing_waits_for_are_found(changed, message):
    with pytest.raises(sim.Fault, match=message):
        copied(**changed)


def test_a_thread_that_leaves_copies_behind_is_found():
    body = "cp.async.ca.shared.global [buffer], [%rd0], 4, 4;\ncp.async.commit_group;"
    with pytest.raises(sim.Fault, match="exits with copies"):
        run(body, 1, [np.zeros(1, np.uint32)], ((1,), np.uint32), ".shared .align 4 .b8 buffer[4];")


# ---- Products of warpgroups -----------------------------------------------------------------------------------------


# Where, in elements, the canonical layouts put element (row, k) of a factor; then Swizzle<3, 4, 3>, on bytes. Source:
# the same file, "make_gmma_desc": K-major ((8, m), (T, 2)) : ((8 T, SBO), (1, T)), and MN-major
# ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO)), T = 8.
def placed(x: np.ndarray, by_rows: bool, leading: int, stride: int, start: int) -> np.ndarray:
    """An image in shared memory, 16 KB, of a factor x [rows, 16] whose element (0, 0) is `start` bytes in."""
    image = np.full(8192, 0x7FC0, np.uint16)  # NaN where nothing lies
    for row, k in np.ndindex(x.shape):
        if by_rows:
            at = row % 8 * 64 + row // 8 * stride // 2 + k
        else:
            at = row % 8 + row // 8 % 8 * 8 + row // 64 * leading // 2 + k % 8 * 64 + k // 8 * stride // 2
        byte = 2 * at + start
        image[(byte ^ (byte >> 3 & 0x70)) // 2] = in_16_bits(x[row, k], "bf16")
    return image


def described(at: int, leading: int, stride: int) -> int:
    """A descriptor of 128-byte swizzle."""
    return at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 62


# Two images go to shared memory, 128 threads copying 128 bytes of each; then what a case says is done.
WGMMA = """
    .reg .f32 %s<128>;
    .reg .b32 %a<8>;
    .reg .b64 %d<4>;
    .shared .align 1024 .b8 buffer[32768];
"""
WGMMA_PARTS = {
    "show": "fence.proxy.async.shared::cta;", "barrier": "bar.sync 0;", "before": "",
    "fence": "wgmma.fence.sync.aligned;", "between": "", "commit": "wgmma.commit_group.sync.aligned;",
    "wait": "wgmma.wait_group.sync.aligned 0;", "after": "",
}  # fmt: skip


def warpgroup_product(
    rng, columns=64, a_from="rows", b_by_rows=True, adds=1, leading=(8192, 8192), start=(0, 0), **changed
):
    """What one product gives, and what it should give."""
    part = WGMMA_PARTS | changed
    a, b = rng.integers(-9, 10, size=(64, 16)), rng.integers(-9, 10, size=(columns, 16))
    c = rng.integers(-9, 10, size=(64, columns)).astype(np.float32)
    images = [
        placed(a, a_from != "columns", leading[0], 1024, start[0]),
        placed(b, b_by_rows, leading[1], 1024, start[1]),
    ]
    if "stride" in changed:
        images[1] = placed(b, b_by_rows, leading[1], 2048, start[1])
    words = in_16_bits(a.T.reshape(-1)[held(("w", 16))], "bf16").view(np.uint32)
    held_by = held(("w", columns))
    count = columns // 2
    lines = [
        "mul.wide.u32 %rd20, %r0, 128;",
        "shl.b32 %r5, %r0, 7;",
        "mov.u32 %r6, buffer;",
        "add.s32 %r7, %r6, %r5;",
    ]
    for image in range(2):
        lines.append(f"add.s64 %rd21, %rd{image}, %rd20;")
        for n in range(8):
            lines.append(f"ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd21+{16 * n}];")
            lines.append(f"st.shared.v4.u32 [%r7+{16384 * image + 16 * n}], {{%r1, %r2, %r3, %r4}};")
    lines += ["mul.wide.u32 %rd22, %r0, 16;", "add.s64 %rd23, %rd2, %rd22;"]
    lines.append("ld.global.v4.u32 {%a1, %a2, %a3, %a4}, [%rd23];")
    lines += [
        f"mul.wide.u32 %rd24, %r0, {4 * count};",
        "add.s64 %rd25, %rd3, %rd24;",
        "add.s64 %rd26, %rd4, %rd24;",
    ]
    lines += [f"ld.global.f32 %s{n}, [%rd25+{4 * n}];" for n in range(count)]
    for image in range(2):  # the lower word of a descriptor holds the address
        fields = described(
            16384 * image + start[image], leading[image], 2048 if image and "stride" in changed else 1024
        )
        lines += ["shr.u32 %r8, %r6, 4;", "cvt.u64.u32 %rd27, %r8;", f"add.s64 %d{image}, %rd27, {fields};"]
    sums = ", ".join(f"%s{n}" for n in range(count))
    first = "{%a1, %a2, %a3, %a4}" if a_from == "registers" else "%d0"
    turned = ([str(int(a_from == "columns"))] if a_from != "registers" else []) + [str(int(not b_by_rows))]
    opcode = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16"
    product = f"{opcode} {{{sums}}}, {first}, %d1, {adds}, 1, 1, {', '.join(turned)};"
    lines += [
        part["show"],
        part["barrier"],
        part["before"],
        part["fence"],
        product,
        part["between"],
        part["commit"],
    ]
    lines += [part["wait"], part["after"]]
    lines += [f"st.global.f32 [%rd26+{4 * n}], %s{n};" for n in range(count)]
    values = c.T.reshape(-1)[held_by]
    got = run("\n".join(lines), 128, [*images, words, values], ((128, count), np.float32), WGMMA)
    return got, (a @ b.T + adds * c).T.reshape(-1)[held_by]


@pytest.mark.parametrize("b_by_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("a_from", ["rows", "columns", "registers"])
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_wgmma(rng, columns, a_from, b_by_rows):
    np.testing.assert_array_equal(*warpgroup_product(rng, columns, a_from, b_by_rows))


def test_wgmma_begins_sums_and_begins_within_a_pattern(rng):
    np.testing.assert_array_equal(*warpgroup_product(rng, adds=0, start=(32, 96)))
    np.testing.assert_array_equal(*warpgroup_product(rng, stride=2048))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"show": ""}, "without a fence.proxy.async"),
        ({"barrier": ""}, "race: read by a product"),
        ({"show": "", "before": "fence.proxy.async.shared::cta;"}, "no barrier lies between"),
        ({"fence": ""}, "since wgmma.fence"),
        ({"before": "wgmma.fence.sync.aligned;\nmov.f32 %s3, 0f00000000;", "fence": ""}, "since wgmma.fence"),
        ({"commit": ""}, "touches %s"),
        ({"wait": ""}, "touches %s"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "touches %s"),
        ({"between": "mov.f32 %s3, 0f00000000;"}, "touches %s3"),
        ({"between": "mov.b32 %a2, 0;", "a_from": "registers"}, "touches %a2"),
        ({"between": "st.shared.u32 [%r7+16384], %r1;"}, "write to shared memory that a product"),
        ({"between": "cp.async.ca.shared.global [%r7+16384], [%rd0], 4, 4;"}, "write to shared memory that a product"),
        ({"after": "xor.b32 %r5, %r5, 4096;\nadd.s32 %r7, %r6, %r5;\nst.shared.u32 [%r7+16384], %r1;"}, "after a read"),
        ({"before": "add.s64 %d1, %d1, 8;"}, "does not begin at a multiple of 1024"),
        ({"before": "add.s64 %d1, %d1, 1024;"}, "out of bounds"),
        ({"before": "cvt.u64.u32 %rd28, %r0;\nadd.s64 %d1, %d1, %rd28;"}, "different descriptors"),
    ],
)  # fmt: skip
def test_products_that_nothing_waits_for_are_found(rng, changed, message):
    with pytest.raises(sim.Fault, match=message):
        warpgroup_product(rng, **changed)


def test_a_warpgroup_that_leaves_products_behind_is_found(rng):
    with pytest.raises(sim.Fault, match="exits with products in flight"):
        warpgroup_product(rng, wait="ret;")


def test_only_swizzled_factors_are_known(rng):
    with pytest.raises(sim.UnknownInstruction, match="another layout"):
        warpgroup_product(rng, before="mov.u64 %rd28, 4611686018427387904;\nadd.s64 %d1, %d1, %rd28;")


@pytest.mark.parametrize(
    "line", ["lop3.b32 %r1, %r0, %r0, %r0, 5;", "atom.global.add.u32 %r1, [%rd0], 1;", "@%p1 bar.sync 0;"]
)
def test_what_is_unknown_raises(line):
    with pytest.raises(sim.UnknownInstruction):
        run(line, 1, [], ((1,), np.uint32))


def test_local_memory_raises():
    with pytest.raises(sim.UnknownInstruction):
        run("", 1, [], ((1,), np.uint32), ".local .align 4 .b8 depot[16];")


def test_every_opcode_of_the_kernels_has_a_test(programs, programs_90a):
    used = set()
    for p in [*programs.values(), *programs_90a.values()]:
        for block in p.kernel.blocks:
            used |= {i.opcode for i in [*block.body, *([block.end] if block.end else [])]}
    missing = used - set(CASES) - SPECIAL
    assert not missing
