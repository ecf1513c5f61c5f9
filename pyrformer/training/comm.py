"""Several processes that train one model: who they are, and what they tell one another.

Started by ``mpiexec -n N pyrformer train …``; MPI comes by mpi4py (``pip install pyrformer[mpi]``), which is imported
only where a launcher's variables say that there are others.

An update's batches are shared out, one to a process in turn, and everything that is summed is summed in the order of
the batches: two processes compute the bits of four. One process alone adds inside its kernels and comes to the same up
to rounding.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pyrformer.errors import Error, InputError

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

#: Where launchers (MPICH and its kin, Open MPI) say how many processes there are, and which one this is.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")
#: Seconds that a process with an error waits for the others to have it, too, before it ends them.
PATIENCE = 5.0


class Comm(Protocol):
    """What processes tell one another. All must call the same methods in the same order.

    Attributes:
        rank, size: which process this is, of how many.
        cores: how many cores are this process's share; 0: all.
    """

    rank: int
    size: int
    cores: int

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in the order of ranks."""

    def add(self, values: Floats, total: Floats) -> None:
        """Adds everyone's ``values [N·P]`` in the order of ranks; ``total [P]`` is this rank's part of the sum."""

    def join(self, part: Floats) -> Floats:
        """Everyone's part ``[P]``, one behind the other in a new array ``[N·P]``."""


class Alone:
    """One process."""

    rank, size, cores = 0, 1, 0

    def gather(self, value: T) -> list[T]:
        return [value]

    def add(self, values: Floats, total: Floats) -> None:
        total += values

    def join(self, part: Floats) -> Floats:
        return np.array(part, np.float32)


class Mpi:
    """The processes of an MPI job."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as e:
            raise InputError(
                "[train] several processes were started, which needs mpi4py and MPI; run: pip install "
                f"'pyrformer[mpi]' ({e})"
            ) from e
        # A communicator of our own each: what a script of the caller sends does not meet ours.
        self._comm, self._end = MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        # Launchers may have given cores to each; those that have the same ones share them.
        mine = (
            sorted(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else [*range(os.cpu_count() or 1)]
        )
        neighbours = self._comm.Split_type(MPI.COMM_TYPE_SHARED).allgather(mine)
        self.cores = max(1, len(mine) // neighbours.count(mine))

    def gather(self, value: T) -> list[T]:
        found: list[T] = self._comm.allgather(value)
        return found

    def add(self, values: Floats, total: Floats) -> None:
        received = np.empty((self.size, len(total)), np.float32)
        self._comm.Alltoall(values, received)
        for part in received:
            total += part

    def join(self, part: Floats) -> Floats:
        whole: Floats = np.empty(self.size * len(part), np.float32)
        self._comm.Allgather(part, whole)
        return whole

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Where all processes fail, each raises its error; where some do, they say so and end the others, which wait
        for them."""
        try:
            yield
        except BaseException as e:
            arrived, began = self._end.Ibarrier(), time.monotonic()
            while not arrived.Test():
                if time.monotonic() - began > PATIENCE:
                    told = str(e) if isinstance(e, Error) else "".join(traceback.format_exception(e))
                    print(f"pyrformer: error: process {self.rank}: {told}", file=sys.__stderr__, flush=True)
                    self._end.Abort(1)
                time.sleep(0.01)
            raise


def launched_rank() -> int:
    """The number that a launcher gave this process; 0 without one."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


def world() -> Alone | Mpi:
    """All processes of this job.

    Raises:
        InputError: there are several, and mpi4py cannot be used.
    """
    sizes = (int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit())
    return Mpi() if next(sizes, 1) > 1 else Alone()


def share(comm: Comm, make: Callable[[], T]) -> T:
    """What the first process makes, for all; its error is everyone's error."""
    made: tuple[Any, Error | None] = (None, None)
    if comm.rank == 0:
        try:
            made = make(), None
        except Error as e:
            made = None, e
    value, error = comm.gather(made)[0]
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


class GradientSum:
    """The sum of the gradients of an update's batches; each process holds a part of it until all are added.

    Args:
        shapes: of the parameters by name.
    """

    def __init__(self, comm: Comm, shapes: dict[str, tuple[int, ...]]):
        self.comm, self.shapes = comm, shapes
        self.sizes = [int(np.prod(shape)) for shape in shapes.values()]
        part = -(-sum(self.sizes) // comm.size)
        self._flat, self._total = np.zeros(part * comm.size, np.float32), np.zeros(part, np.float32)

    def add(self, grads: dict[str, Floats]) -> None:
        """Adds everyone's gradients, in the order of ranks."""
        at = 0
        for name, size in zip(self.shapes, self.sizes, strict=True):
            self._flat[at : at + size] = grads[name].reshape(-1)
            at += size
        self.comm.add(self._flat, self._total)

    def take(self) -> dict[str, Floats]:
        """The sum by name; the next one begins with zero."""
        whole = self.comm.join(self._total)
        self._total[:] = 0
        ends = np.cumsum(self.sizes)
        parts = np.split(whole[: ends[-1]], ends[:-1])
        return {
            name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
