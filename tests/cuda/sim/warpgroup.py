"""Products of warpgroups, which go on by themselves (`wgmma`): what they compute, and what must wait for them.

Source: NVIDIA, "PTX ISA" 9.x, chapter 9.7, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"; what
a descriptor says: CUTLASS, include/cute/atom/mma_traits_sm90_gmma.hpp. The only layout here is that of 128-byte
swizzle.

A product is computed when it is issued. Until its group is waited for, its registers are `flying`, and what it reads of
shared memory is `busy`: who touches either is found out. What it reads must have been written, shown to the
asynchronous proxy by a fence of the thread that wrote it, and then passed a barrier.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import tensor
from .memory import THREAD_SHIFT, Fault, unordered
from .ptx import Instruction, Kernel, UnknownInstruction, registers_of

if TYPE_CHECKING:
    from .machine import Machine

GROUP, WARPS = 128, 4
ROWS, DEPTH = 64, 16
MULTIPLY = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16")
SWIZZLED_128 = 1
LOWEST = 1 << 10  # a swizzled pattern begins at multiples of it


@dataclass
class Reads:
    """What one product of G warpgroups reads of shared memory: cells [G, n]; and which warps have not yet waited."""

    lanes: np.ndarray  # [G, 4], the first of each warp
    number: np.ndarray  # [G, 4], the group that it belongs to
    waiting: np.ndarray  # [G, 4]
    cells: np.ndarray


def watched(kernel: Kernel) -> set[str]:
    """The registers that products of a kernel keep sums and factors in."""
    found: set[str] = set()
    for block in kernel.blocks:
        if block.end and MULTIPLY.fullmatch(block.end.opcode):
            for text in block.end.args[:2]:
                found.update(registers_of(text) if text.startswith("{") else ())
    return found


def mentioned(instruction: Instruction) -> set[str]:
    """All registers of an instruction."""
    return set(re.findall(r"%\w+", " ".join([instruction.guard, *instruction.args])))


def chunks(descriptor: np.ndarray, rows: int, turned: bool) -> np.ndarray:
    """Where the groups of eight elements lie that a factor of `rows` rows and 16 columns is made of, for each of its
    descriptors [G]: [G, rows, 2], or turned, where a group has one column of eight rows, [G, rows / 8, 16]."""
    kind = descriptor >> np.uint64(62)
    if (kind != SWIZZLED_128).any() or (descriptor >> np.uint64(49) & np.uint64(7)).any():
        raise UnknownInstruction("a descriptor of another layout than that of 128-byte swizzle")
    fields = (descriptor[:, None] >> np.array([0, 16, 32], np.uint64) & np.uint64(0x3FFF)) << np.uint64(4)
    start, leading, stride = (field[:, None, None] for field in fields.astype(np.int64).T)
    if turned:
        part, column = np.arange(rows // 8)[:, None], np.arange(DEPTH)
        at = start + part // 8 * leading + part % 8 * 16 + column // 8 * stride + column % 8 * 128
    else:
        row, part = np.arange(rows)[:, None], np.arange(2)
        at = start + row // 8 * stride + row % 8 * 128 + part * 16
    return at ^ (at >> 7 & 7) << 4


class Warpgroups:
    """The products of a machine's threads."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        kernel, lanes = machine.kernel, machine.lanes
        found = watched(kernel)
        #: Of each block of code: the watched registers that its body touches, and those of what ends it.
        self.body = [sorted(found & set().union(*map(mentioned, b.body))) for b in kernel.blocks]
        self.ends = [
            sorted(found & mentioned(b.end)) if b.end and not MULTIPLY.fullmatch(b.end.opcode) else []
            for b in kernel.blocks
        ]
        #: Of each register, by thread: the group that uses it, negative where none does; and in which part it does so.
        self.flying = {register: np.full(lanes, -1) for register in found}
        self.part: dict[str, tuple[str, int]] = {}
        #: Of each thread: the group that its next product joins; whether a fence has passed since it touched registers
        #: of products; how much of shared memory had been written, and when, as it last showed what it wrote.
        self.group = np.zeros(lanes, np.int64)
        self.fenced = np.zeros(lanes, bool)
        self.shown = np.zeros(lanes, np.int64)
        self.shown_at = np.full(lanes, -1, np.int64)
        self.reads: list[Reads] = []
        shared = machine.memories["shared"]
        shared.watch()
        self.busy = np.zeros(len(shared.cells), np.int32)

    # ---- What others do ------------------------------------------------------------------------------------------

    def touch(self, registers: list[str], i: np.ndarray, where: str) -> None:
        """Threads use registers."""
        if not registers:
            return
        self.fenced[i] = False
        for register in registers if self.reads else ():
            caught = self.flying[register][i] >= 0
            if caught.any():
                raise Fault(
                    f"{self.machine._who(i[caught][0])} touches {register}, which a product in flight uses, at {where}"
                )

    def write(self, address: np.ndarray, size: int) -> None:
        """Something else writes shared memory."""
        if not self.reads:
            return
        shared = self.machine.memories["shared"]
        cells = (address // shared.cell)[:, None] + np.arange(size // shared.cell)
        inside = (cells >= 0) & (cells < len(self.busy))
        caught = np.flatnonzero((self.busy[np.where(inside, cells, 0)] > 0).any(1))
        if caught.size:
            raise Fault("race: write to shared memory that a product in flight reads", int(caught[0]))

    def show(self, i: np.ndarray) -> None:
        """`fence.proxy.async`."""
        self.shown[i] = self.machine.memories["shared"].clock
        self.shown_at[i] = self.machine.stamps[i]

    # ---- Their own instructions ----------------------------------------------------------------------------------

    def run(self, end: Instruction, i: np.ndarray) -> None:
        """An instruction of whole warps, or whole warpgroups; `i` in order."""
        if end.opcode == "wgmma.fence.sync.aligned":
            self.fenced[i] = True
        elif end.opcode == "wgmma.commit_group.sync.aligned":
            self.group[i] += 1
        elif end.opcode == "wgmma.wait_group.sync.aligned":
            self._wait(i, int(end.args[0]))
        elif match := MULTIPLY.fullmatch(end.opcode):
            try:
                self._multiply(end, int(match[1]), i)
            except Fault as fault:
                raise Fault(f"{fault.args[0]}; at {end.where} [{end.opcode}]") from None
        else:
            raise UnknownInstruction(end.opcode)

    def _wait(self, i: np.ndarray, left: int) -> None:
        before = self.group[i] - left
        for flying in self.flying.values():
            flying[i] = np.where(flying[i] < before, -1, flying[i])
        limit = np.full(self.machine.lanes, -1, np.int64)
        limit[i] = before
        shared = self.machine.memories["shared"]
        for reads in self.reads:
            done = reads.waiting & (reads.number < limit[reads.lanes])
            for warp in range(WARPS):
                of = done[:, warp]
                if of.any():
                    shared._note_readers(reads.cells[of], self.machine.stamps[reads.lanes[of, warp]][:, None])
            over = done.any(1) & ~(reads.waiting & ~done).any(1)
            np.subtract.at(self.busy, reads.cells[over].reshape(-1), 1)
            reads.waiting &= ~done
        self.reads = [reads for reads in self.reads if reads.waiting.any()]

    def _multiply(self, end: Instruction, columns: int, i: np.ndarray) -> None:
        machine, lanes = self.machine, i.reshape(-1, GROUP)
        in_registers = end.args[1].startswith("{")
        sums, factor, second, adds, *more = end.args
        if len(more) != (3 if in_registers else 4) or more[:2] != ["1", "1"]:
            raise UnknownInstruction(f"{end.opcode} {', '.join(end.args[1:])}")
        turned = [flag == "1" for flag in more[2:]]
        if not self.fenced[i].all():
            raise Fault(f"{machine._who(i[~self.fenced[i]][0])} has touched registers since wgmma.fence")
        own = dict.fromkeys(registers_of(sums), ("sum", columns))
        own |= dict.fromkeys(registers_of(factor) if in_registers else (), ("factor", 0))
        if len(own) != columns // 2 + 4 * in_registers:
            raise UnknownInstruction(f"{end.opcode} with {len(own)} registers")
        for register, part in own.items():
            if (self.flying[register][i] >= 0).any() and self.part[register] != part:
                raise Fault(f"{register} is used by a product in flight of another kind")
            self.part[register] = part
            self.flying[register][i] = self.group[i]
        if in_registers:
            words = machine._operands(factor, i, "u32")
            left = tensor.first_factor(words, f16=False).reshape(-1, ROWS, DEPTH)
        else:
            left = self._factor(factor, lanes, ROWS, turned[0])
        right = self._factor(second, lanes, columns, turned[-1])
        product = left @ right.transpose(0, 2, 1)
        row = ROWS // WARPS * (np.arange(GROUP) // 32) + tensor.G[np.arange(GROUP) % 32]
        col = 2 * tensor.T[np.arange(GROUP) % 32]
        added = machine._value(adds, i, "pred")
        for n, register in enumerate(registers_of(sums)):
            held = machine.registers[machine.program.name(register)]
            value = product[:, row + n // 2 % 2 * 8, col + n // 4 * 8 + n % 2].reshape(-1)
            held[i] = np.where(added, held[i] + value, value).astype(np.float32)
        if machine.counter:
            machine.counter.tensor += 2 * ROWS * columns * DEPTH * len(lanes)

    def _factor(self, operand: str, lanes: np.ndarray, rows: int, turned: bool) -> np.ndarray:
        """A factor in shared memory, [G, rows, 16] as float64."""
        machine, shared = self.machine, self.machine.memories["shared"]
        descriptor = machine._value(operand, lanes.reshape(-1), "u64").reshape(lanes.shape)
        if (descriptor != descriptor[:, :1]).any():
            raise Fault("the threads of a warpgroup give different descriptors")
        places = chunks(descriptor[:, 0], rows, turned).reshape(len(lanes), -1)
        if ((descriptor[:, 0] & np.uint64(LOWEST // 16 - 1)) >= 8).any():
            raise Fault("a swizzled pattern does not begin at a multiple of 1024 bytes")
        owner = np.repeat(lanes[:, 0], places.shape[1])
        at = machine._address("shared", places.reshape(-1), owner)
        cells = shared._words(at, 16, 16, "read by a product")
        if (shared._written[cells] != shared.all_set).any():
            raise Fault("a product reads uninitialised shared memory")
        cells = cells.reshape(len(lanes), -1)
        warps = lanes[:, :: GROUP // WARPS]
        writer = shared.writer[cells]
        thread = machine.block_of[lanes[:, :1]] * machine.threads + (writer >> THREAD_SHIFT & 1023)
        if (shared.age[cells] > self.shown[thread]).any():
            raise Fault("a product reads what was written without a fence.proxy.async behind it")
        for warp in range(WARPS):
            now = machine.stamps[warps[:, warp]][:, None]
            shared._clash(shared.writer, cells, now, "read by a product")
            if unordered(self.shown_at[thread], now).any():
                raise Fault("no barrier lies between a fence.proxy.async and the product that relies on it")
        if machine.counter:  # eight rows of 16 bytes are read together
            machine.counter.access(
                shared, at, 16, np.arange(at.size) // 8 if turned else self._eights(places.shape, rows)
            )
        np.add.at(self.busy, cells.reshape(-1), 1)
        number = self.group[warps]
        self.reads.append(Reads(warps, number, np.ones(warps.shape, bool), cells))
        elements = shared.cells[cells].reshape(-1).view(np.uint16).reshape(len(lanes), -1, 8)
        values = (elements.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        if turned:  # [G, rows / 8, 16, 8]
            return (
                values.reshape(len(lanes), rows // 8, DEPTH, 8).transpose(0, 1, 3, 2).reshape(-1, rows, DEPTH)
            )
        return values.reshape(-1, rows, DEPTH)

    @staticmethod
    def _eights(shape: tuple[int, int], rows: int) -> np.ndarray:
        """The number of the eight rows of 16 bytes that each chunk [G, rows, 2] belongs to."""
        row, part = np.arange(rows)[:, None], np.arange(2)
        of = (row // 8 * 2 + part).reshape(-1)
        return (np.arange(shape[0])[:, None] * rows // 4 + of).reshape(-1)
