"""NCCL's part of training by several processes, against a pretended CuPy: threads in the place of processes, arrays of
the host in the place of device memory. It shows what is called, in which order, of which size; no GPU has seen it."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from pyrformer.errors import DeviceError
from pyrformer.executors import cuda
from pyrformer.training.comm import Alone
from pyrformer.training.sharing import Sharing

SHAPES = {"a": (40, 7), "b": (7,), "c": (9, 9), "d": ()}


class Memory:
    """An array that knows its address, as CuPy's does."""

    known: ClassVar[dict[int, np.ndarray]] = {}

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape
        self.data = SimpleNamespace(ptr=array.ctypes.data)
        if array.size:
            Memory.known[self.data.ptr] = array

    def set(self, values: np.ndarray, stream: Any) -> None:
        self.array[...] = values

    def get(self, out: np.ndarray) -> None:
        out[...] = self.array

    def __getitem__(self, i: int) -> Memory:
        return Memory(self.array[i])

    def __setitem__(self, i: int, other: Memory) -> None:
        self.array[i] = other.array


class Job:
    """What NCCL does between the threads of a job: every two have a line each way."""

    def __init__(self) -> None:
        self.lines: dict[tuple[int, int], queue.Queue[np.ndarray]] = {}
        self.guard, self.groups = threading.Lock(), threading.local()

    def line(self, source: int, to: int) -> queue.Queue[np.ndarray]:
        with self.guard:
            return self.lines.setdefault((source, to), queue.Queue())


class Communicator:
    def __init__(self, size: int, unique: Job, rank: int):
        self.size, self.job, self.rank = size, unique, rank

    def send(self, pointer: int, count: int, kind: int, to: int, stream: int) -> None:
        assert (Memory.known[pointer].size, kind) == (count, 7)
        self.job.line(self.rank, to).put(Memory.known[pointer].copy())

    def recv(self, pointer: int, count: int, kind: int, source: int, stream: int) -> None:
        assert (Memory.known[pointer].size, kind) == (count, 7)
        Memory.known[pointer][...] = self.job.line(source, self.rank).get(timeout=10)

    def bcast(self, pointer: int, count: int, kind: int, root: int, stream: int) -> None:
        if self.rank == root:
            for other in set(range(self.size)) - {root}:
                self.send(pointer, count, kind, other, stream)
        else:
            self.recv(pointer, count, kind, root, stream)


class Stream:
    ptr = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def pretended(available: bool = True) -> Any:
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None, done=True)
    nccl = SimpleNamespace(
        available=available, NCCL_FLOAT32=7, NcclError=ValueError, NcclCommunicator=Communicator,
        get_unique_id=Job, groupStart=lambda: None, groupEnd=lambda: None,
    )  # fmt: skip
    runtime = SimpleNamespace(
        CUDARuntimeError=ArithmeticError, getDeviceCount=lambda: 2, setDevice=lambda n: devices.append(n)
    )
    devices: list[int] = []
    parts = SimpleNamespace(
        nccl=nccl, runtime=runtime, Stream=lambda non_blocking: Stream(), Event=lambda disable_timing: event,
        devices=devices,
    )  # fmt: skip
    return SimpleNamespace(cuda=parts, empty=lambda shape, dtype: Memory(np.full(shape, np.nan, dtype)))


class Threads(Alone):
    """One thread of a job: NCCL's link for arrays, a table for small values."""

    def __init__(self, rank: int, size: int, link: cuda.NcclLink, table: list[Any], wait: threading.Barrier):
        self.rank, self.size, self.link, self.table, self.barrier = rank, size, link, table, wait

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(10)
        found = list(self.table)
        self.barrier.wait(10)
        return found

    def collect(self, values: Any, root: int) -> Any:
        return self.link.collect(values, root)

    def spread(self, values: Any, root: int) -> Any:
        return self.link.spread(values, root)


def together(size: int, work: Callable[[int], Any]) -> list[Any]:
    found: list[Any] = [None] * size
    threads = [
        threading.Thread(target=lambda r=r: found.__setitem__(r, work(r)), daemon=True) for r in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_go_to_their_owners_and_weights_to_all(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    cupy = pretended()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cuda, "describe", dict)
    unique, table, barrier = cuda.nccl_id(), [None] * size, threading.Barrier(size)
    rng = np.random.default_rng(0)
    grads = [{n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(size)]

    def work(rank: int) -> Any:
        comm = Threads(rank, size, cuda.NcclLink(size, rank, unique, rank), table, barrier)
        sharing = Sharing(comm, SHAPES)
        for name in reversed(SHAPES):
            sharing.add(name, grads[rank][name])
        sharing.end_round()
        sums, norm = sharing.take()
        values = {n: np.full(s, rank, np.float32) for n, s in SHAPES.items()}
        sharing.publish(SimpleNamespace(store=SimpleNamespace(get=values.get, set=values.__setitem__)))  # type: ignore[arg-type]
        return sums, norm, values, [b.owner for b in sharing.buckets for _ in b.shapes]

    found = together(size, work)
    assert sorted(cupy.cuda.devices) == sorted(rank % 2 for rank in range(size))
    assert len({norm for _, norm, _, _ in found}) == 1
    sums = {name: total for part, *_ in found for name, total in part.items()}
    for name in SHAPES:
        want = grads[0][name]
        for other in grads[1:]:
            want = want + other[name]
        np.testing.assert_array_equal(sums[name], want)
    for _, _, values, owners in found:
        for name, owner in zip(reversed(SHAPES), owners, strict=True):
            assert (values[name] == owner).all()


def test_a_missing_nccl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", pretended(available=False))
    with pytest.raises(DeviceError, match="NCCL"):
        cuda.nccl_id()
