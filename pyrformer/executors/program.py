"""Runs plans on a device: states, one arena, launch records, and the whole program captured as one graph.

A program's first run walks its records, which puts every kernel on the device; the second is captured, and replayed
from then on. Addresses are frozen in a graph, so states and arena are allocated before; a larger program's larger arena
makes the smaller ones walk and capture once more.

A run uploads its inputs through pinned memory on a second stream while the run before may still compute, and copies its
outputs into pinned memory without waiting: :meth:`Executor.start` returns at once. Two sets of such memory (slots) take
turns; a slot is used again when its run has ended.

A state has one type, and perhaps copies beside it, 16-bit floats of float32 or the other way round, which programs read
that have it in that type. A copy is made again in front of the first such program after the state has changed. The type
is float32 or int32 but where programs write the state in 16 bits: caches of keys and values, and weights that an
optimizer rounds by chance to bfloat16. Such a weight becomes bfloat16 when the first program is made that updates it.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core, bfloat16
from pyrformer.errors import DeviceError, InputError, StateError
from pyrformer.executors.device import Bytes, Device, Matrix, Memory, Product

Array = npt.NDArray[Any]
DTYPES = {"f32": np.dtype(np.float32), "i32": np.dtype(np.int32)}
SIZES = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}
#: What NumPy has in the place of a type that it lacks.
HELD = {"bfloat16": "uint16"}
#: Offsets of inputs and outputs in pinned memory are multiples of this.
ALIGNMENT = 256
#: Device memory is given in pieces of so many bytes.
PIECE = 512
#: Bytes of a word and of an address, and what the places of tables in memory are multiples of.
WORD, ADDRESS, TABLE = 4, 8, 16
THREADS = 256
#: How names of kernels for a type of floats end, and behind an @ those of states whose copy in such a type is meant.
KINDS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
ENDS = tuple(f"@{kind}" for kind in KINDS.values())
SLOTS = 2


def copy_name(name: str, dtype: str) -> str:
    """The name of a state's copy in a type of floats."""
    return f"{name}@{KINDS[dtype]}"


def _state_of(name: str) -> str:
    """The name of the state that is meant, whether itself or as a copy."""
    return next((name.removesuffix(end) for end in ENDS if name.endswith(end)), name)


def _cast(held: str, dtype: str) -> str:
    """The kernel that makes a copy in a type; empty where there is none."""
    if held == "float32" and dtype in KINDS:
        return f"narrow_forward_{KINDS[dtype]}"
    return f"widen_forward_{KINDS[held]}" if dtype == "float32" and held in KINDS else ""


class Store:
    """Named tensors on a device that programs share, their arena, and the stream that all of them run on."""

    def __init__(self, device: Device):
        self.device = device
        self.compute, self.copies = device.stream(), device.stream()
        self.idle = device.event()
        self.arena = device.memory(0)
        #: Set by a global norm that is not finite. As long as it is, no program writes a state behind its global norm:
        #: what was begun after a run that failed does nothing either.
        self.halt, self.running = device.memory(WORD, zero=True), device.pinned(WORD)
        self.running[:] = 0
        #: Counts what has moved, an arena or a state: a graph made before must not run.
        self.generation = 0
        self.lock = threading.RLock()
        self._states: dict[str, tuple[str, tuple[int, ...], Memory]] = {}
        #: Copies in other types by their names, and those that a state has changed behind.
        self._copies: dict[str, Memory] = {}
        self._stale: set[str] = set()

    def executor(self, plan: _core.Plan) -> Executor:
        """A plan bound to this store; states that the store lacks are made, zero.

        Raises:
            DeviceError: the device cannot run the plan, or has too little memory for it.
            StateError: a state has another type.
        """
        return Executor(plan, self)

    def types(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and shape of each state."""
        return [(name, dtype, list(shape)) for name, (dtype, shape, _) in self._states.items()]

    def state(self, name: str, dtype: str, shape: tuple[int, ...], *, written: bool = False) -> Memory:
        """The memory of a state, or of its copy in a type, made if there is none. What is ``written`` is the state
        itself, which becomes bfloat16 where that is the type."""
        of = _state_of(name)
        if of not in self._states:
            held = dtype if of == name else "float32"
            self._states[of] = (held, shape, self.device.memory(SIZES[held] * math.prod(shape), zero=True))
        has = self._states[of]
        if has[:2] == (dtype, shape):
            return has[2]
        cast, itself = _cast(has[0], dtype), written and of == name
        if has[1] != shape or not cast or (itself and dtype != "bfloat16"):
            raise StateError(
                f"[state] {name!r} is {has[0]}{list(has[1])} on the device, not {dtype}{list(shape)}"
            )
        copy = copy_name(of, dtype)
        if copy not in self._copies:
            self.device.prepare({cast})
            self._copies[copy] = self.device.memory(SIZES[dtype] * math.prod(shape))
            self._stale.add(copy)
        memory = self._copies[copy]
        if itself:
            self.refresh([copy])
            self.wait()
            self.remove(name)
            self._states[name] = (dtype, shape, memory)
            self.generation += 1
        return memory

    def read_as(self, name: str, dtype: str) -> str:
        """The name of the copy that a program reads of a state in this type; empty where it reads the state itself."""
        of = _state_of(name)
        return "" if self._states[of][0] == dtype else copy_name(of, dtype)

    def set(self, name: str, value: Array) -> None:
        """Copies an array to the device, rounded to the nearest where the state is bfloat16."""
        value = np.ascontiguousarray(value)
        with self.lock:
            has = self._states.get(name)
            if has and (has[0], value.dtype.name, value.shape) == ("bfloat16", "float32", has[1]):
                self.write(has[2], bfloat16.narrowed(value))
            else:
                self.write(self.state(name, value.dtype.name, value.shape, written=True), value)
            self.changed([name])

    def changed(self, names: Iterable[str]) -> None:
        """States have other values from here on the computing stream on."""
        self._stale.update(copy for name in names for copy in self._copies_of(name))

    def _copies_of(self, name: str) -> list[str]:
        return [copy for dtype in KINDS if (copy := copy_name(name, dtype)) in self._copies]

    def refresh(self, names: Iterable[str]) -> None:
        """Makes copies again, given by their names, whose states have changed."""
        for name in self._stale.intersection(names):
            held, shape, memory = self._states[_state_of(name)]
            elements = math.prod(shape)
            ints = (np.int32(n) for n in (1, elements, elements, elements))
            args = (np.uint64(memory.address), np.uint64(self._copies[name].address), *ints)
            cast = _cast(held, next(dtype for dtype, kind in KINDS.items() if name.endswith(f"@{kind}")))
            # A thread has eight elements of one row.
            grid = [-(-elements // (8 * THREADS)), 1, 1]
            self.device.launch(self.compute, cast, grid, [THREADS, 1, 1], args)
            self._stale.remove(name)

    def write(self, memory: Memory, value: Array) -> None:
        """Fills device memory with an array's bytes, and waits."""
        host = self.device.pinned(memory.size)
        host[:] = value.reshape(-1).view(np.uint8)
        self.device.upload(self.compute, memory.address, host)
        self.wait()

    def get(self, name: str) -> Array:
        """A copy of a state, once all runs so far have ended."""
        return self.begin_get([name])()[name]

    def begin_get(self, names: Sequence[str]) -> Callable[[], dict[str, Array]]:
        """Begins to copy states behind all runs so far; calling what it gives waits for the copies, and for no run that
        was begun later. What is in 16 bits comes as float32.

        Raises:
            StateError: there is no such state.
        """
        copies: dict[str, Array] = {}
        with self.lock:
            for name in names:
                if name not in self._states:
                    raise StateError(f"[state] there is no state {name!r}")
                dtype, shape, memory = self._states[name]
                host = self.device.pinned(memory.size)
                self.device.download(self.compute, host, memory.address)
                copies[name] = host.view(HELD.get(dtype, dtype)).reshape(shape)
            copied = self.device.event()
            self.device.record(copied, self.compute)

        def wait() -> dict[str, Array]:
            with self.lock:
                self.device.synchronize(copied)
            return {name: _read(copy) for name, copy in copies.items()}

        return wait

    def rows(self, name: str, rows: Sequence[int]) -> Array:
        """A copy of some rows ``[n, C]`` of a state ``[R, C]``, once all runs so far have ended.

        Raises:
            StateError: there is no such state.
        """
        with self.lock:
            if name not in self._states:
                raise StateError(f"[state] there is no state {name!r}")
            dtype, shape, memory = self._states[name]
            size = memory.size // shape[0]
            host = self.device.pinned(size * len(rows))
            for i, row in enumerate(rows):
                self.device.download(
                    self.compute, host[i * size : (i + 1) * size], memory.address + row * size
                )
            self.wait()
        return np.array(host.view(dtype).reshape(len(rows), *shape[1:]))

    def remove(self, name: str) -> None:
        """Drops a state; programs that use it must be dropped too."""
        self._states.pop(name, None)
        for copy in self._copies_of(name):
            del self._copies[copy]
            self._stale.discard(copy)

    def go_on(self) -> None:
        """Lets runs that begin from here on write states again."""
        self.device.upload(self.compute, self.halt.address, self.running)

    def wait(self) -> None:
        """Waits until all work on the computing stream is done."""
        self.device.record(self.idle, self.compute)
        self.device.synchronize(self.idle)

    def _missing(self, name: str, dtype: str, elements: int) -> int:
        """Bytes that a state of a plan takes beside what is there; below 0, those that it frees."""
        of, size = _state_of(name), _pieces(SIZES[dtype] * elements)
        held = self._states.get(of, ("",))[0]
        if held == dtype or (dtype in KINDS and copy_name(of, dtype) in self._copies):
            size = 0
        # It becomes bfloat16.
        frees = of == name and (held, dtype) == ("float32", "bfloat16")
        return size - (_pieces(SIZES[held] * elements) if frees else 0)

    def reserve(self, plan: _core.Plan, own: int) -> None:
        """Checks that states and arena of a plan fit, and its executor's ``own`` bytes, then makes the arena at least
        as large as the plan's.

        Raises:
            DeviceError: they do not fit.
        """
        missing = sum(self._missing(name, dtype, math.prod(shape)) for name, dtype, shape in plan.states)
        grow = plan.arena_bytes if plan.arena_bytes > self.arena.size else 0
        work = grow + own
        # A larger arena takes the place of the old one, once that has no graph left.
        free = self.device.free_bytes() + (self.arena.size if grow else 0)
        if missing + work > free:
            raise DeviceError(
                f"[cuda] the program needs {_size(missing + work)} of device memory ({_size(missing)} for states, "
                f"{_size(work)} for intermediate values), {_size(free)} are free; use smaller batches or sequences; "
                "training may also recompute layers (recompute, memory)"
            )
        if grow:
            self.wait()
            self.arena = self.device.memory(0)  # lets go of the old one first
            self.arena = self.device.memory(grow)
            self.generation += 1


def _table_bytes(records: list[tuple[int, dict[str, Any]]]) -> int:
    """What the tables among the arguments of launches take in memory."""
    arguments = (arg for _, record in records if "launch" in record for arg in record["launch"]["args"])
    tables = (arg["table"] for arg in arguments if "table" in arg)
    sizes = (sum(ADDRESS if "pointer" in cell else WORD for cell in table) for table in tables)
    return sum(-(-size // TABLE) * TABLE for size in sizes)


def _read(copy: Array) -> Array:
    """A copy of an array; of 16-bit floats, or the bits of bfloat16, their values as float32."""
    if copy.dtype == np.uint16:
        return bfloat16.widened(copy)
    return copy.astype(np.float32) if copy.dtype == np.float16 else np.array(copy)


def _pieces(size: int) -> int:
    """Of the bytes of a request, those that it takes."""
    return -(-size // PIECE) * PIECE


def _size(n: int) -> str:
    units = (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 0))
    name, unit, digits = next((u for u in units if n >= u[1] / 4), units[-1])
    return f"{n / unit:.{digits}f} {name}"


@dataclass(frozen=True)
class Port:
    """An input or output: its type, where it lies in the arena or a state, and where in a slot's memory."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    place: dict[str, Any]
    row_stride: int
    at: int

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last, gaps between rows included."""
        rows, cols = int(np.prod(self.shape[:-1])), self.shape[-1] if self.shape else 1
        return ((rows - 1) * self.row_stride + cols) * self.dtype.itemsize if rows * cols else 0

    def array(self, host: Bytes) -> Array:
        """A copy of the value, from a slot's memory."""
        rows, cols = int(np.prod(self.shape[:-1])), self.shape[-1] if self.shape else 1
        flat = host[self.at : self.at + self.span].view(self.dtype)
        steps = (self.row_stride * self.dtype.itemsize, self.dtype.itemsize)
        return np.array(np.lib.stride_tricks.as_strided(flat, (rows, cols), steps)).reshape(self.shape)


def _ports(raw: list[dict[str, Any]]) -> tuple[list[Port], int]:
    """The ports, packed one after the other, and the bytes they take."""
    ports: list[Port] = []
    at = 0
    for port in raw:
        o = port["operand"]
        dtype, shape = DTYPES[o["ty"]["dtype"]], tuple(o["ty"]["shape"])
        place = {"space": o["space"], "offset": o["offset"]}
        ports.append(Port(port["name"], dtype, shape, place, o["row_stride"], at))
        at = -(-(at + ports[-1].span) // ALIGNMENT) * ALIGNMENT
    return ports, at


@dataclass(eq=False)
class Slot:
    """What one run under way has for itself: pinned memory, a place on the device for inputs, and events."""

    inputs: Bytes
    staging: Memory
    outputs: Bytes
    #: The store's word as the run left it; empty for programs without a global norm.
    halted: Bytes
    uploaded: Any
    done: Any
    run: Pending | None = None


@dataclass(eq=False)
class Pending:
    """A run under way."""

    executor: Executor
    slot: Slot
    _results: dict[str, Array] | None = field(default=None, repr=False)

    @property
    def under_way(self) -> bool:
        """Whether nobody has waited for it yet."""
        return self._results is None

    def result(self) -> dict[str, Array]:
        """The outputs as new arrays, once the run has ended. After one whose global norm is not finite, runs that had
        begun by now have changed nothing; later ones do again."""
        with self.executor.store.lock:
            if self._results is None:
                self.executor.store.device.synchronize(self.slot.done)
                if self.slot.halted.any():
                    self.executor.store.go_on()
                self._results = {p.name: p.array(self.slot.outputs) for p in self.executor.outputs}
                self.slot.run = None
        return self._results


class Executor:
    """A plan bound to a store, run on its device."""

    def __init__(self, plan: _core.Plan, store: Store):
        program = json.loads(_core.cuda_program(plan))
        self.store = store
        self.records: list[tuple[int, dict[str, Any]]] = program["records"]
        self.limits: list[dict[str, Any]] = program["limits"]
        self.inputs, input_bytes = _ports(program["inputs"])
        self.outputs, output_bytes = _ports(program["outputs"])
        #: The states, whether it writes each, and those whose copies a run leaves behind.
        written = [plan.states[i][0] for i in program["written"]]
        self.types: list[tuple[str, str, tuple[int, ...], bool]] = [
            (name, dtype, tuple(shape), name in written) for name, dtype, shape in plan.states
        ]
        beside = {_state_of(name) for name in written if _state_of(name) != name}
        self.written = [name for name in written if name not in beside and _state_of(name) == name]
        with store.lock:
            constants = np.array(program["constants"], np.uint32)
            kernels = {r["launch"]["kernel"] for _, r in self.records if "launch" in r}
            store.device.prepare(kernels)
            table_bytes = _table_bytes(self.records)
            own_bytes = SLOTS * (input_bytes + PIECE) + constants.nbytes + PIECE + table_bytes + PIECE
            store.reserve(plan, own_bytes)
            self._find_states()
            d = store.device
            self.constants = d.memory(constants.nbytes)
            store.write(self.constants, constants)
            #: What launches for many tensors read of them; where it is put together, and how much of it is.
            self.tables, self.table_host, self.filled = d.memory(table_bytes), d.pinned(table_bytes), 0
            halted = WORD if program["halts"] else 0
            self.slots = [
                Slot(
                    d.pinned(input_bytes), d.memory(input_bytes), d.pinned(output_bytes), d.pinned(halted),
                    d.event(), d.event(),
                )
                for _ in range(SLOTS)
            ]  # fmt: skip
        self.turn = 0
        #: When the calls' addresses were true, by the store's count of what has moved.
        self.generation = -1
        self.calls: list[tuple[Any, ...]] = []
        self.graph: Any = None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Runs the plan once and waits: a dict of arrays in, a dict of new arrays out.

        Raises:
            InputError: an input is missing, unknown, of another type, or holds an index out of range.
            DeviceError: the device failed.
        """
        return self.start(inputs).result()

    def profile(self, inputs: dict[str, Array]) -> list[float]:
        """Runs the plan once and gives the seconds of each step, launch and waiting included; those of steps that share
        a launch are the first one's. Raises as :meth:`run`."""
        seconds = [0.0] * (1 + max((step for step, _ in self.records), default=-1))
        self.start(inputs, seconds).result()
        return seconds

    def start(self, inputs: dict[str, Array], seconds: list[float] | None = None) -> Pending:
        """Runs the plan once without waiting for it; with ``seconds``, waits after each step to add its time. Raises as
        :meth:`run`."""
        self._check(inputs)
        store, d = self.store, self.store.device
        with store.lock:
            slot = self.slots[self.turn]
            self.turn = (self.turn + 1) % SLOTS
            if slot.run is not None:
                slot.run.result()
            for port in self.inputs:
                value = np.ascontiguousarray(inputs[port.name]).reshape(-1).view(np.uint8)
                slot.inputs[port.at : port.at + port.span] = value
            d.upload(store.copies, slot.staging.address, slot.inputs)
            d.record(slot.uploaded, store.copies)
            d.wait(store.compute, slot.uploaded)
            first = self._resolve()
            store.refresh(self.copied)
            for port in self.inputs:
                d.copy(store.compute, self._address(port.place), slot.staging.address + port.at, port.span)
            if seconds is not None:
                self._timed(seconds)
            elif first:
                self._walk()
            else:
                if self.graph is None:
                    d.begin_capture(store.compute)
                    self._walk()
                    self.graph = d.end_capture(store.compute)
                d.replay(store.compute, self.graph)
            store.changed(self.written)
            for port in self.outputs:
                host = slot.outputs[port.at : port.at + port.span]
                d.download(store.compute, host, self._address(port.place))
            if slot.halted.size:
                d.download(store.compute, slot.halted, store.halt.address)
            d.record(slot.done, store.compute)
            slot.run = Pending(self, slot)
            return slot.run

    def _check(self, inputs: dict[str, Array]) -> None:
        known = {port.name: port for port in self.inputs}
        for name, value in inputs.items():
            if name not in known:
                raise InputError(f"[run] there is no input {name!r}; the inputs are {', '.join(known)}")
            port = known[name]
            if value.dtype != port.dtype or value.shape != port.shape:
                wanted, got = f"{port.dtype}{list(port.shape)}", f"{value.dtype}{list(value.shape)}"
                raise InputError(f"[run] input {name!r} must be {wanted}, got {got}")
        for name in known:
            if name not in inputs:
                raise InputError(f"[run] input {name!r} is missing")
        for limit in self.limits:
            value, least = inputs[limit["input"]], limit["least"]
            if value.size and (value.max() >= limit["below"] or (least is not None and value.min() < least)):
                outside = (value >= limit["below"]) | (value < (-np.inf if least is None else least))
                at = int(np.flatnonzero(outside)[0])
                raise InputError(
                    f"[{limit['op']}] {limit['input']} {int(value.reshape(-1)[at])} at place {at} is outside "
                    f"{least or 0}..{limit['below']}"
                )

    # -- Records with addresses -------------------------------------------------------------------------------------

    def _resolve(self) -> bool:
        """Puts addresses into the records if something has moved; tells whether it has."""
        if self.generation == self.store.generation:
            return False
        self._find_states()
        self.generation, self.graph = self.store.generation, None
        self.filled = 0
        self.calls = [self._call(record) for _, record in self.records]
        if self.filled:
            self.store.device.upload(self.store.compute, self.tables.address, self.table_host)
            self.store.wait()
        return True

    def _find_states(self) -> None:
        """Finds the states' memories, those first that change their type: what they leave is free for others then."""
        order = sorted(self.types, key=lambda state: not (state[3] and state[1] == "bfloat16"))
        found = {n: self.store.state(n, dtype, shape, written=written) for n, dtype, shape, written in order}
        self.states = [found[name] for name, *_ in self.types]
        #: The copies that it reads.
        self.copied = [copy for name, dtype, *_ in self.types if (copy := self.store.read_as(name, dtype))]

    def _address(self, place: dict[str, Any]) -> int:
        space = place["space"]
        named = {"arena": self.store.arena, "constants": self.constants, "halt": self.store.halt}
        memory = named[space] if isinstance(space, str) else self.states[space["state"]]
        return memory.address + int(place["offset"])

    def _call(self, record: dict[str, Any]) -> tuple[Any, ...]:
        if "product" in record:
            p = record["product"]
            matrices = {k: self._matrix(p[k]) for k in "abcy"}
            bias = p["bias"] and self._address(p["bias"])
            return (Product(ta=p["ta"], tb=p["tb"], bias=bias, **matrices),)
        launch = record["launch"]
        args = tuple(self._arg(arg) for arg in launch["args"])
        return launch["kernel"], launch["grid"], launch["block"], args

    def _matrix(self, raw: dict[str, Any] | None) -> Any:
        return raw and Matrix(self._address(raw["place"]), raw["rows"], raw["cols"], raw["ld"], raw["dtype"])

    def _arg(self, arg: dict[str, Any]) -> Any:
        ((kind, value),) = arg.items()
        if kind == "pointer":
            return np.uint64(self._address(value) if value else 0)
        if kind == "table":
            at = self.filled
            cells = b"".join(self._arg(cell).tobytes() for cell in value)
            cells += bytes(-len(cells) % TABLE)
            self.filled += len(cells)
            self.table_host[at : self.filled] = np.frombuffer(cells, np.uint8)
            return np.uint64(self.tables.address + at)
        if kind == "f32":
            return np.uint32(value).view(np.float32)
        return np.int32(value) if kind == "i32" else np.uint32(value)

    def _walk(self) -> None:
        for call in self.calls:
            self._start(call)

    def _start(self, call: tuple[Any, ...]) -> None:
        d, stream = self.store.device, self.store.compute
        if len(call) == 1:
            d.product(stream, call[0])
        else:
            d.launch(stream, *call)

    def _timed(self, seconds: list[float]) -> None:
        """Walks, waiting after each call, and adds its time to that of its step."""
        self.store.wait()
        for (step, _), call in zip(self.records, self.calls, strict=True):
            start = time.perf_counter()
            self._start(call)
            self.store.wait()
            seconds[step] += time.perf_counter() - start
