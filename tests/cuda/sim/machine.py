"""Runs a kernel's grid: which threads go next, barriers, warp operations, and the device's memory around it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ops, tensor
from .counter import Counter
from .memory import BARRIER_SHIFT, BLOCK_SHIFT, HALF, POISON, THREAD_SHIFT, WORD, Fault, Memory
from .ptx import DTYPES, Instruction, Kernel, UnknownInstruction, constant, parse, registers_of
from .warpgroup import GROUP, MULTIPLY, Warpgroups, watched

WARP = 32
THREADS_AT_ONCE = (
    4096  # blocks run side by side up to this: enough to outweigh Python, little enough for caches
)
GLOBAL_BASE = 0x7F0000000000
REDZONE = 256  # bytes between neighbours that belong to nobody
ALL = slice(None)

Dim = tuple[int, int, int]
HELPERS = {
    **{n: getattr(ops, n) for n in
       ("flush", "fma_down", "fma64", "divide", "reverse_bits", "count_bits", "leading_zeros", "insert_bits", "shift",
        "to_integer", "round_bf16", "round_f16", "widen_f16")},
    **{n: getattr(np, n) for n in ("float32", "float64", "int16", "int32", "int64", "uint16", "uint32", "uint64")},
    "np": np, "one": np.ones(1, np.float32), "zero": np.zeros(1, np.float32),
}  # fmt: skip


class Program:
    """A kernel with the Python compiled from it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        text, writer = ops.write(kernel)
        self.code = compile(text, f"<{kernel.name}>", "exec")
        self.constants = writer.constants
        self.places = writer.places
        self.name = writer.name
        #: Bytes of the cells of memory that its accesses are made of.
        self.cell = HALF if writer.halves else WORD


class Machine:
    """Some blocks of one launch, run to their end."""

    def __init__(
        self,
        program: Program,
        grid: Dim,
        block: Dim,
        blocks: range,
        params: dict[str, np.ndarray],
        memory: Memory,
        counter: Counter | None = None,
    ) -> None:
        self.program = program
        self.counter = counter
        self.kernel = program.kernel
        self.threads = block[0] * block[1] * block[2]
        self.lanes = self.threads * len(blocks)
        self.params = params
        self.all = np.arange(self.lanes)
        self.block_of = self.all // self.threads
        thread = self.all % self.threads
        self.lane_in_warp = thread % WARP
        warps = -(-self.threads // WARP)
        self.warp_of = self.block_of * warps + thread // WARP
        number = self.block_of + blocks.start
        self.special: dict[str, np.ndarray] = {}
        for index, extents, name in ((thread, block, "tid"), (number, grid, "ctaid")):
            parts = (index % extents[0], index // extents[0] % extents[1], index // (extents[0] * extents[1]))
            for axis, part, extent in zip("xyz", parts, extents, strict=True):
                self.special[f"%{name}.{axis}"] = part.astype(np.uint32)
                self.special[f"%n{name}.{axis}"] = np.full(self.lanes, extent, np.uint32)
        self.stamps = number.astype(np.int64) << BLOCK_SHIFT | thread.astype(np.int64) << THREAD_SHIFT
        self.exited = np.zeros(len(blocks), np.int64)
        #: Of each thread, the group that its next asynchronous copy joins; what is on its way, with its groups.
        self.group = np.zeros(self.lanes, np.int64)
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.memories = {"global": memory, "shared": self._shared(len(blocks))}
        self.registers = self._registers()
        self.warpgroups = Warpgroups(self) if watched(self.kernel) else None

    def _shared(self, blocks: int) -> Memory:
        """One window a block. Arrays lie on odd multiples of their alignment: code that needs more is found out."""
        self.shared_at: dict[str, np.ndarray] = {}
        end = REDZONE
        spans = []
        for name, size, align in self.kernel.shared:
            at = -(-end // (2 * align)) * 2 * align + align
            self.shared_at[name] = np.array([at])
            spans.append((at, size))
            end = at + size + REDZONE
        self.window = -(-end // REDZONE) * REDZONE
        memory = Memory("shared", blocks * self.window // WORD, 0, self.program.cell)
        per_block = memory.allocated.reshape(blocks, -1)
        for at, size in spans:
            per_block[:, at // HALF : (at + size) // HALF] = True
        return memory

    def _registers(self) -> dict[str, Any]:
        space: dict[str, Any] = {**HELPERS, **self.program.constants, "machine": self}
        for register, kind in self.kernel.registers.items():
            space[self.program.name(register)] = np.zeros(self.lanes, DTYPES[kind])
        exec(self.program.code, space)
        return space

    # ---- What the written code calls ---------------------------------------------------------------------------

    def chosen(self, i: Any, predicate: np.ndarray, negate: bool) -> np.ndarray:
        """The threads of `i` whose predicate holds."""
        lanes = self.all if i is ALL else i
        return lanes[predicate[lanes] != negate]

    def _address(self, space: str, address: np.ndarray, i: Any) -> np.ndarray:
        lanes = self.block_of[i]
        address = np.broadcast_to(address, lanes.shape)
        if space == "shared":  # offset 0 of a window is redzone
            return np.where((address >= 0) & (address < self.window), address, 0) + lanes * self.window
        return address

    def load(self, space: str, address: np.ndarray, i: Any, size: int, place: int, kind: Any) -> np.ndarray:
        """`size` bytes for each thread of `i`, as numbers of a kind: uint16 or uint32."""
        stamps = self.stamps[i]
        if not stamps.size:
            return np.zeros((0, size // np.dtype(kind).itemsize), kind)
        at = self._address(space, address, i)
        if self.counter:
            self.counter.access(self.memories[space], at, size, self.warp_of[i])
        try:
            return self.memories[space].load(at, stamps, size, size).view(kind)
        except Fault as fault:
            raise self._located(fault, i, place) from None

    def store(self, space: str, address: np.ndarray, i: Any, values: list, place: int) -> None:
        """Values from each thread of `i`."""
        stamps = self.stamps[i]
        if not stamps.size:
            return
        columns = [np.broadcast_to(v, stamps.shape) for v in values]
        data = np.ascontiguousarray(np.stack(columns, axis=1))
        size, at = data.shape[1] * data.itemsize, self._address(space, address, i)
        if self.counter:
            self.counter.access(self.memories[space], at, size, self.warp_of[i], write=True)
        try:
            if self.warpgroups and space == "shared":
                self.warpgroups.write(at, size)
            self.memories[space].store(at, stamps, data, size)
        except Fault as fault:
            raise self._located(fault, i, place) from None

    def copy(
        self, to: np.ndarray, start: np.ndarray, i: Any, size: int, given: np.ndarray, place: int
    ) -> None:
        """Begins to copy `size` bytes from global to shared memory, of which `given` bytes exist and the others are 0.
        Until the thread waits for it, what was there is gone and what comes is not there."""
        lanes = np.atleast_1d(self.all[i])
        if not lanes.size:
            return
        given = np.broadcast_to(given, lanes.shape)
        if not np.isin(given, (0, size)).all():
            raise UnknownInstruction("an asynchronous copy of a part")
        data, some = np.zeros((lanes.size, size // WORD), np.uint32), given > 0
        start = np.broadcast_to(start, lanes.shape)
        data[some] = self.load("global", start[some], lanes[some], size, place, np.uint32)
        at, shared = self._address("shared", to, i), self.memories["shared"]
        if self.counter:
            self.counter.access(shared, at, size, self.warp_of[i])
        try:
            if self.warpgroups:
                self.warpgroups.write(at, size)
            shared.store(at, self.stamps[i], np.full_like(data, POISON), size)
        except Fault as fault:
            raise self._located(fault, i, place) from None
        shared.written[(at // HALF)[:, None] + np.arange(size // HALF)] = False
        self.copies.append((lanes, self.group[lanes], at, data))

    def arrive(self, i: Any, left: int, place: int) -> None:
        """Ends all copies of the threads `i` but those of their last `left` groups."""
        here = np.zeros(self.lanes, bool)
        here[i] = True
        moving = []
        for lanes, group, at, data in self.copies:
            done = here[lanes] & (group < self.group[lanes] - left)
            if done.any():
                try:
                    self.memories["shared"].store(at[done], self.stamps[lanes[done]], data[done], WORD)
                except Fault as fault:
                    raise self._located(fault, lanes[done], place) from None
            if not done.all():
                moving.append((lanes[~done], group[~done], at[~done], data[~done]))
        self.copies = moving

    def show(self, i: Any) -> None:
        """What the threads `i` have written to shared memory may now be read by products of warpgroups."""
        if self.warpgroups:
            self.warpgroups.show(self.all[i])

    def _located(self, fault: Fault, i: Any, place: int) -> Fault:
        lane = np.atleast_1d(self.all[i])[fault.args[1] if len(fault.args) > 1 else 0]
        return Fault(f"{fault.args[0]}; by {self._who(lane)} at {self.program.places[place]}")

    def _who(self, lane: int) -> str:
        return f"block {self.stamps[lane] >> BLOCK_SHIFT} thread {lane % self.threads}"

    # ---- Scheduling ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs all threads to their end. The threads that lag behind in the text go first, so that they meet again."""
        ready: dict[int, np.ndarray] = {0: self.all}
        parked: dict[int, np.ndarray] = {}
        while ready or parked:
            if not ready:
                self._deadlock(parked)
            n = min(ready)
            i = ready.pop(n)
            block = self.kernel.blocks[n]
            if block.body:
                if self.counter:
                    self.counter.arithmetic(block.body, i.size)
                if self.warpgroups:
                    self.warpgroups.touch(self.warpgroups.body[n], i, block.body[0].where)
                self.registers[f"block_{n}"](ALL if i.size == self.lanes else i)
            for target, lanes in self._end(n, block.end, i, parked):
                if lanes.size:
                    ready[target] = np.concatenate((ready[target], lanes)) if target in ready else lanes
        if self.copies:
            raise Fault(f"{self._who(self.copies[0][0][0])} exits with copies on their way")
        if self.warpgroups and self.warpgroups.reads:
            raise Fault(f"{self._who(self.warpgroups.reads[0].lanes[0, 0])} exits with products in flight")

    def _end(
        self, n: int, end: Instruction | None, i: np.ndarray, parked: dict[int, np.ndarray]
    ) -> list[tuple[int, np.ndarray]]:
        """Where the threads `i` go after block `n`."""
        if end is None:
            return [(n + 1, i)]
        if self.warpgroups:
            self.warpgroups.touch(self.warpgroups.ends[n], i, end.where)
        if end.opcode in ("bra", "bra.uni", "ret"):
            taken, rest = i, i[:0]
            if end.guard:
                holds = self.registers[self.program.name(end.guard.lstrip("!"))][i] != end.guard.startswith(
                    "!"
                )
                taken, rest = i[holds], i[~holds]
            if end.opcode == "ret":
                np.add.at(self.exited, self.block_of[taken], 1)
                return [(n + 1, rest)]
            return [(self.kernel.labels[end.args[0]], taken), (n + 1, rest)]
        if end.guard:
            raise UnknownInstruction(f"a guarded {end.opcode}")
        if n in parked:
            i = np.concatenate((parked.pop(n), i))
        at_block = end.opcode in ("bar.sync", "bar.red.or.pred")
        if end.opcode.startswith("wgmma."):
            complete = self._warpgroup_operation(end, i)
        else:
            complete = self._block_barrier(end, i) if at_block else self._warp_operation(end, i)
        if not complete.all():
            parked[n] = i[~complete]
        return [(n + 1, i[complete])]

    def _deadlock(self, parked: dict[int, np.ndarray]) -> None:
        n, i = next(iter(parked.items()))
        end = self.kernel.blocks[n].end
        raise Fault(f"deadlock: {self._who(i[0])} waits for ever at {end.where} [{end.opcode}]")

    def _block_barrier(self, end: Instruction, i: np.ndarray) -> np.ndarray:
        """Which threads of `i` may go on: those of blocks that are all here."""
        vote = end.opcode != "bar.sync"
        if end.args[vote : vote + 1] != ["0"] or len(end.args) != 1 + 2 * vote:
            raise UnknownInstruction(f"{end.opcode} {', '.join(end.args)}")
        blocks = self.block_of[i]
        left = self.exited[blocks] > 0
        if left.any():
            raise Fault(f"{self._who(i[left][0])} waits at {end.where} for threads that have exited")
        complete = np.bincount(blocks, minlength=len(self.exited))[blocks] == self.threads
        self.stamps[i[complete]] += 1 << BARRIER_SHIFT
        if vote and complete.any():
            found = np.bincount(blocks[complete], self._value(end.args[2], i[complete], "pred")) > 0
            self.registers[self.program.name(end.args[0])][i[complete]] = found[blocks[complete]]
        return complete

    def _warp_operation(self, end: Instruction, i: np.ndarray) -> np.ndarray:
        """A shuffle, a vote, a warp barrier or a matrix operation, for the warps whose members are all here."""
        matrix = end.opcode.startswith(("mma.", "ldmatrix."))
        mask = np.full(i.shape, 0xFFFFFFFF, np.uint32) if matrix else self._value(end.args[-1], i)
        members = np.array([int(m).bit_count() for m in np.unique(mask)])[
            np.unique(mask, return_inverse=True)[1].reshape(-1)
        ]
        warps = self.warp_of[i]
        if not ((mask >> self.lane_in_warp[i].astype(np.uint32)) & 1).all():
            raise Fault(f"{end.opcode} at {end.where} by a thread that its mask leaves out")
        complete = np.bincount(warps, minlength=warps.max() + 1)[warps] == members
        i, mask = i[complete], mask[complete]
        if i.size and end.opcode == "vote.sync.ballot.b32":
            self._ballot(end, i)
        elif i.size and end.opcode == "shfl.sync.bfly.b32":
            self._butterfly(end, i, mask)
        elif i.size and end.opcode in tensor.MMA:
            self._multiply(end, np.sort(i))
        elif i.size and end.opcode in tensor.LDMATRIX:
            self._load_tiles(end, np.sort(i))
        elif i.size and end.opcode == "bar.warp.sync":
            self.stamps[i] += 1
        elif i.size:
            raise UnknownInstruction(end.opcode)
        return complete

    def _warpgroup_operation(self, end: Instruction, i: np.ndarray) -> np.ndarray:
        """Of `wgmma`: for the warps, or warpgroups, that are all here."""
        size = GROUP if MULTIPLY.fullmatch(end.opcode) else WARP
        team = self.all[i] // size
        complete = np.bincount(team)[team] == size
        if complete.any() and self.warpgroups:
            self.warpgroups.run(end, np.sort(i[complete]))
        return complete

    def _value(self, operand: str, i: np.ndarray, kind: str = "b32") -> np.ndarray:
        if operand.startswith("%"):
            return self.registers[self.program.name(operand)][i].view(DTYPES[kind])
        return np.broadcast_to(constant(operand, kind), i.shape)

    def _operands(self, text: str, i: np.ndarray, kind: str) -> np.ndarray:
        """The registers of a braced list, [registers, warps, 32]; `i` are whole warps in order."""
        return np.stack([self._value(r, i, kind).reshape(-1, WARP) for r in registers_of(text)])

    def _set(self, text: str, i: np.ndarray, values: np.ndarray) -> None:
        for register, value in zip(registers_of(text), values, strict=True):
            held = self.registers[self.program.name(register)]
            held[i] = np.ascontiguousarray(value).reshape(-1).view(held.dtype)

    def _multiply(self, end: Instruction, i: np.ndarray) -> None:
        a, b = (self._operands(end.args[n], i, "u32") for n in (1, 2))
        if self.counter:
            self.counter.tensor += 2 * 16 * 8 * 8 * len(b) * (i.size // WARP)
        c = self._operands(end.args[3], i, "f32")
        self._set(end.args[0], i, tensor.multiply(a, b, c, end.opcode))

    def _load_tiles(self, end: Instruction, i: np.ndarray) -> None:
        base, _, offset = end.args[1][1:-1].partition("+")
        at = self._address("shared", self._value(base, i, "u32").astype(np.int64) + int(offset or 0), i)
        if self.counter:
            self.counter.access(self.memories["shared"], at, 16, self.warp_of[i])
        try:
            rows = self.memories["shared"].load(at, self.stamps[i], 16, 16).view(np.uint32)
        except Fault as fault:
            lane = i[fault.args[1] if len(fault.args) > 1 else 0]
            raise Fault(f"{fault.args[0]}; by {self._who(lane)} at {end.where} [{end.opcode}]") from None
        self._set(end.args[0], i, tensor.distribute(rows.reshape(-1, 4, 8, 4), ".trans" in end.opcode))

    def _ballot(self, end: Instruction, i: np.ndarray) -> None:
        bits = np.zeros(self.warp_of.max() + 1, np.uint32)
        votes = self._value(end.args[1], i, "pred").astype(np.uint32) << self.lane_in_warp[i].astype(
            np.uint32
        )
        np.bitwise_or.at(bits, self.warp_of[i], votes)
        self.registers[self.program.name(end.args[0])][i] = bits[self.warp_of[i]]

    def _butterfly(self, end: Instruction, i: np.ndarray, mask: np.ndarray) -> None:
        target, *found = end.args[0].split("|")
        source, step, clamp = end.args[1], self._value(end.args[2], i), self._value(end.args[3], i)
        lane = self.lane_in_warp[i].astype(np.uint32)
        segment = (clamp >> 8) & 31
        last = (lane & segment) | (clamp & 31 & ~segment)
        other = lane ^ (step & 31)
        inside = other <= last
        other = np.where(inside, other, lane)
        if not ((mask >> other) & 1).all():
            raise Fault(f"shfl at {end.where} reads a lane that its mask leaves out")
        from_lane = i.astype(np.int64) - lane + other
        register = self.registers[self.program.name(target)]
        register[i] = self._value(source, from_lane).view(register.dtype)
        if found:
            self.registers[self.program.name(found[0])][i] = inside


@dataclass(frozen=True)
class Buffer:
    """An array in device memory."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def cut(self, lengths: list[int]) -> list[Buffer]:
        """Consecutive parts of so many elements."""
        size, at = self.dtype.itemsize, self.address
        parts = []
        for n in lengths:
            parts.append(Buffer(at, (n,), self.dtype))
            at += n * size
        return parts


def load(module: str) -> dict[str, Program]:
    """The kernels of a PTX module, by name."""
    return {name: Program(kernel) for name, kernel in parse(module).items()}


class Device:
    """A pretended GPU: memory, and launches of kernels in order."""

    def __init__(self, programs: Mapping[str, Program], words: int = 1 << 19) -> None:
        self.programs = programs
        self.memory = Memory("global", words, GLOBAL_BASE)
        self.end = REDZONE
        #: Counts what launches move and compute, where there is one.
        self.counter: Counter | None = None

    def _place(self, elements: int, dtype: Any, skew: int) -> int:
        at = self.end + skew * np.dtype(dtype).itemsize
        self.end = -(-(at + elements * np.dtype(dtype).itemsize + REDZONE) // 256) * 256
        if self.end // WORD > len(self.memory.data):
            raise MemoryError("the pretended device is full")
        return GLOBAL_BASE + at

    def _own(self, address: int, shape: tuple[int, ...], dtype: Any) -> Buffer:
        buffer = Buffer(address, tuple(shape), np.dtype(dtype))
        self.memory.allocated[self._span(buffer)] = True
        return buffer

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32, skew: int = 0) -> Buffer:
        """Unwritten memory, `skew` elements past a multiple of 256 bytes."""
        return self._own(self._place(int(np.prod(shape)), dtype, skew), shape, dtype)

    def strided(self, rows: int, cols: int, stride: int, dtype: Any, skew: int = 0) -> list[Buffer]:
        """Unwritten rows `stride` elements apart; what lies between them is out of bounds."""
        at = self._place(rows * stride, dtype, skew)
        return [self._own(at + r * stride * np.dtype(dtype).itemsize, (cols,), dtype) for r in range(rows)]

    def _span(self, buffer: Buffer) -> slice:
        """Its halves of words."""
        first = (buffer.address - GLOBAL_BASE) // HALF
        return slice(first, first + int(np.prod(buffer.shape)) * buffer.dtype.itemsize // HALF)

    def write(self, buffer: Buffer, values: Any) -> None:
        """Copies `values` to the device."""
        values = np.ascontiguousarray(values, buffer.dtype)
        self.memory.data.view(np.uint16)[self._span(buffer)] = values.reshape(-1).view(np.uint16)
        self.memory.written[self._span(buffer)] = True

    def array(self, values: Any, dtype: Any = np.float32, skew: int = 0) -> Buffer:
        """A copy of `values` in new memory."""
        buffer = self.empty(np.shape(values), dtype, skew)
        self.write(buffer, values)
        return buffer

    def read(self, buffer: Buffer) -> np.ndarray:
        """A copy of a buffer; unwritten parts are NaN."""
        halves = self.memory.data.view(np.uint16)[self._span(buffer)].copy()
        return halves.view(buffer.dtype).reshape(buffer.shape)

    def launch(self, kernel: str, grid: Any, block: Any, *args: Any) -> None:
        """Runs a kernel. Arguments: buffers, None for a null pointer, NumPy scalars of the parameter's width."""
        program = self.programs[kernel]
        grid, block = _dim(grid), _dim(block)
        params = {}
        if len(args) != len(program.kernel.params):
            raise TypeError(f"{kernel} takes {len(program.kernel.params)} arguments, got {len(args)}")
        for n, ((name, kind), value) in enumerate(zip(program.kernel.params, args, strict=True)):
            params[name] = _param(f"{kernel}, argument {n}", kind, value)
        self.memory.forget(program.cell)
        count = grid[0] * grid[1] * grid[2]
        per = max(1, THREADS_AT_ONCE // (block[0] * block[1] * block[2]))
        with np.errstate(all="ignore"):
            for first in range(0, count, per):
                blocks = range(first, min(first + per, count))
                Machine(program, grid, block, blocks, params, self.memory, self.counter).run()


def _dim(extents: Any) -> Dim:
    extents = tuple(extents) if isinstance(extents, tuple) else (extents,)
    return (*extents, 1, 1)[:3]


def _param(what: str, kind: str, value: Any) -> np.ndarray:
    if value is None:
        value = np.uint64(0)
    elif isinstance(value, Buffer):
        value = np.uint64(value.address)
    if not isinstance(value, np.generic):
        raise TypeError(f"{what}: a bare {type(value).__name__} has no width; pass a NumPy scalar")
    width = int(re.sub(r"\D", "", kind)) // 8
    if value.dtype.itemsize != width or (kind == "f32") > (value.dtype == np.float32):
        raise TypeError(f"{what} is {kind}, got {value.dtype}")
    return np.array([value])
