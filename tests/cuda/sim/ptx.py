"""Reads PTX and compiles each basic block of a kernel to a Python function over all threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

DTYPES = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32,
    "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f64": np.float64,
}  # fmt: skip


class UnknownInstruction(Exception):
    """PTX that this interpreter has no rule for; skipping it would make every later result meaningless."""


@dataclass
class Instruction:
    """`@guard opcode args`, and the source line it comes from."""

    opcode: str
    args: list[str]
    guard: str  # "", "%p1" or "!%p1"
    where: str


@dataclass
class Block:
    """Straight-line code: a function of the machine's registers, then one instruction that ends it (or none)."""

    run: Callable[[object], None] | None = None
    body: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None


@dataclass
class Kernel:
    """One entry of a PTX module."""

    name: str
    params: list[tuple[str, str]]  # (name, type)
    shared: list[tuple[str, int, int]]  # (name, bytes, alignment)
    registers: dict[str, str]  # name -> declared type
    blocks: list[Block]
    labels: dict[str, int]


# Instructions that threads cannot run each for itself, and jumps.
ENDS = ("bra", "ret", "bar.", "shfl.", "vote.", "mma.", "ldmatrix.", "wgmma.")

_LOC = re.compile(r"\.loc\s+(\d+) (\d+) \d+(?:, function_name [^,]+, inlined_at (\d+) (\d+) \d+)?")
_SHARED = re.compile(r"\.shared \.align (\d+) \.[a-z](\d+) ([\w$]+)(?:\[(\d+)\])?;")
# Shared memory whose size the launch says, and the word beside the kernel in which it is written.
_DYNAMIC = re.compile(r"\.extern \.shared \.align (\d+) \.b8 ([\w$]+)\[\];")
_BYTES = re.compile(r"\.global \.align 4 \.u32 (\w+)_shared = (\d+);")
_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)[^{]*\{(.*?)\n\}", re.DOTALL)


def split_args(text: str) -> list[str]:
    """Operands at the top level: `{a, b}` and `[x+4]` stay whole."""
    return [a.strip() for a in re.findall(r"\s*(\{[^}]*\}|\[[^]]*\]|[^,]+)\s*(?:,|$)", text)] if text else []


def registers_of(text: str) -> list[str]:
    """The registers of an operand that may be a braced list."""
    return [r.strip() for r in text[1:-1].split(",")] if text.startswith("{") else [text]


def parse(text: str) -> dict[str, Kernel]:
    """All kernels of a module, by name."""
    names = {n: path.rsplit("/", 1)[-1] for n, path in re.findall(r'\.file\s+(\d+) "([^"]+)"', text)}
    head = _ENTRY.sub("", text)
    sizes = {name: int(size) for name, size in _BYTES.findall(head)}
    kernels = {}
    for name, params, body in _ENTRY.findall(text):
        if ".local" in body:
            raise UnknownInstruction(f"{name} uses local memory")
        found = re.findall(r"\.param \.(\w+)(?: \.ptr)?(?: \.align \d+)? (\w+)", params)
        shared = [
            (n, int(bits) // 8 * int(count or 1), int(align))
            for align, bits, n, count in _SHARED.findall(head + body)
            if n in body
        ]
        if name in sizes:
            shared += [(n, sizes[name], int(align)) for align, n in _DYNAMIC.findall(head)]
        kernels[name] = _kernel(name, [(n, t) for t, n in found], shared, body, names)
    return kernels


def _kernel(name: str, params: list, shared: list, body: str, files: dict[str, str]) -> Kernel:
    registers: dict[str, str] = {}
    for kind, prefix, count in re.findall(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>;", body):
        registers.update({f"{prefix}{i}": kind for i in range(int(count))})
    blocks = [Block()]
    labels: dict[str, int] = {}
    where = "?"
    local: dict[str, str] = {}  # registers of a `{ }` inside the body, which may have the names of outer ones
    scopes = 0
    for raw in body.splitlines():
        line = raw.split("//")[0].strip()
        if line in ("{", "}"):
            local, scopes = {}, scopes + 1
            continue
        if declared := re.fullmatch(r"\.reg \.(\w+)\s+(%\w+);", line):
            local[declared[2]] = f"{declared[2]}_{scopes}"
            registers[local[declared[2]]] = declared[1]
            continue
        if local:
            line = re.sub(r"%\w+", lambda m, names=local: names.get(m[0], m[0]), line)
        if loc := _LOC.match(line):
            where = f"{files.get(loc[1], '?')}:{loc[2]}"
            if loc[3]:
                where += f" (inlined at {files.get(loc[3], '?')}:{loc[4]})"
        elif label := re.fullmatch(r"([\w$]+):", line):
            if blocks[-1].body or blocks[-1].end:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif line and not line.startswith("."):
            match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*);", line)
            if match is None:
                raise UnknownInstruction(f"{name}: {line}")
            instruction = Instruction(match[2], split_args(match[3]), match[1] or "", where)
            if blocks[-1].end:
                blocks.append(Block())
            if instruction.opcode.startswith(ENDS):
                blocks[-1].end = instruction
            else:
                blocks[-1].body.append(instruction)
    return Kernel(name, params, shared, registers, blocks, labels)


def constant(text: str, kind: str) -> np.ndarray:
    """An immediate operand as an array of one element, so that it takes part in NumPy's promotion as arrays do."""
    dtype = DTYPES[kind]
    if text.startswith("0f"):
        bits = np.array([int(text[2:], 16)], np.uint32)
        return bits if dtype == np.uint32 else bits.view(dtype)
    if text.startswith("0d"):
        return np.array([int(text[2:], 16)], np.uint64).view(dtype)
    value = int(text.rstrip("U"), 0)
    if kind in ("f32", "f64"):
        raise UnknownInstruction(f"integer {text} as a float")
    if kind == "pred":
        return np.array([value != 0])
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([value % (1 << bits)], f"u{bits // 8}").view(dtype)


class Writer:
    """Writes the Python text of one kernel's blocks. Threads that run are `i`: a slice of all, or their numbers."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.lines: list[str] = []
        self.constants: dict[str, np.ndarray] = {}
        self.places: list[str] = []
        self.i = "i"
        self.flushed = _flushed(kernel)
        self.halves = False  # whether an access of memory is of 16 bits
        self.kept: set[str] = set()  # registers whose flushed value is at hand in this block

    def storage(self, register: str) -> str:
        """The dtype name a register is stored as."""
        return self.kernel.registers[register]

    def name(self, register: str) -> str:
        """A register's Python name."""
        return "R_" + register[1:]

    def constant(self, value: np.ndarray) -> str:
        """A Python name for a constant array."""
        name = f"C_{value.dtype}_{value.tobytes().hex()}"
        self.constants[name] = value
        return name

    def get(self, operand: str, kind: str) -> str:
        """The text that reads an operand as `kind`."""
        if not operand.startswith("%"):
            return self.constant(constant(operand, kind))
        held = self.storage(operand)
        text = f"{self.name(operand)}[{self.i}]"
        if DTYPES[held] == DTYPES[kind]:
            return text
        if np.dtype(DTYPES[held]).itemsize != np.dtype(DTYPES[kind]).itemsize:
            raise UnknownInstruction(f"{operand} of {held} read as {kind}")
        return f"{text}.view({np.dtype(DTYPES[kind])})"

    def real(self, operand: str, ftz: object) -> str:
        """The text that reads a float operand, subnormals flushed if the instruction says .ftz."""
        text = self.get(operand, "f32")
        if not ftz or operand in self.flushed or not operand.startswith("%"):
            return text
        if self.i != "i":
            return f"flush({text})"
        flushed = f"F_{operand[1:]}"
        if operand not in self.kept:  # flushed once a block, however often it is read
            self.kept.add(operand)
            self.lines.append(f"  {flushed} = flush({text})")
        return flushed

    def set(self, register: str, kind: str, text: str) -> None:
        """Writes a value of `kind` to a register."""
        if register == "_":
            return
        self.kept.discard(register)
        held = self.storage(register)
        if DTYPES[held] != DTYPES[kind]:
            if np.dtype(DTYPES[held]).itemsize != np.dtype(DTYPES[kind]).itemsize:
                raise UnknownInstruction(f"{kind} written to {register} of {held}")
            text = f"({text}).view({np.dtype(DTYPES[held])})"
        self.lines.append(f"  {self.name(register)}[{self.i}] = {text}")

    def place(self, instruction: Instruction) -> int:
        """The number by which the machine finds an instruction's source line again."""
        self.places.append(f"{instruction.where} [{instruction.opcode} {', '.join(instruction.args)}]")
        return len(self.places) - 1


def _flushed(kernel: Kernel) -> set[str]:
    """Registers that never hold a subnormal float: all their definitions flush, or copy from such."""
    sources: dict[str, list[str]] = {}
    for block in kernel.blocks:
        for ins in block.body + ([block.end] if block.end and block.end.opcode.startswith("shfl") else []):
            if not ins.args:
                continue
            for dst in re.findall(r"%\w+", ins.args[0]):
                if ".ftz" in ins.opcode or ins.opcode.startswith("cvt.rn.f32."):
                    origin = []
                elif ins.opcode in ("mov.f32", "mov.b32", "selp.f32") and not ins.args[1].startswith("{"):
                    origin = [a for a in ins.args[1:3] if a.startswith("%")]
                else:
                    origin = [""]
                sources.setdefault(dst, []).extend(origin)
    good = set(sources)
    while bad := {r for r in good if any(s not in good for s in sources[r])}:
        good -= bad
    return good
