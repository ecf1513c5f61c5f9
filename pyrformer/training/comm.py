"""Several processes that train one model: who they are, and what they tell one another.

Started by ``mpiexec -n N pyrformer train …``; MPI comes by mpi4py (``pip install pyrformer[mpi]``), which is imported
only where a launcher's variables say that there are others.

What processes do with it is in :mod:`pyrformer.training.sharing`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

    def collect(self, values: Floats, root: int) -> Pending:
        """Begins to bring everyone's ``values [P]`` to one process, which waits for ``[N, P]`` in the order of ranks;
        the others keep their values as they are until they have waited."""

    def spread(self, values: Floats, root: int) -> Pending:
        """Begins to copy one process's ``values [P]`` over those of all others."""

    def move(self, values: Floats, source: int, root: int) -> None:
        """Copies one process's values over those of another; only these two call it."""


class Pending(Protocol):
    """A transfer under way."""

    def done(self) -> bool:
        """Whether it is over; asking keeps it going."""

    def wait(self) -> Floats:
        """Waits for its end; gives what came."""


class Alone:
    """One process."""

    rank, size, cores = 0, 1, 0

    def gather(self, value: T) -> list[T]:
        return [value]

    def collect(self, values: Floats, root: int) -> Pending:
        return _There(values[None])

    def spread(self, values: Floats, root: int) -> Pending:
        return _There(values)

    def move(self, values: Floats, source: int, root: int) -> None:
        pass


@dataclass(frozen=True)
class _There:
    """A transfer that is over."""

    values: Floats

    def done(self) -> bool:
        return True

    def wait(self) -> Floats:
        return self.values


@dataclass(frozen=True)
class _Request:
    """A transfer of MPI; keeps what it reads alive."""

    request: Any
    values: Floats
    sent: Floats

    def done(self) -> bool:
        return bool(self.request.Test())

    def wait(self) -> Floats:
        self.request.Wait()
        return self.values


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
        machine = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        #: The number of this process among those of its machine.
        self.place = machine.rank
        neighbours = machine.allgather(mine)
        self.cores = max(1, len(mine) // neighbours.count(mine))

    def gather(self, value: T) -> list[T]:
        found: list[T] = self._comm.allgather(value)
        return found

    def collect(self, values: Floats, root: int) -> Pending:
        rows = self.size if self.rank == root else 0
        received = np.empty((rows, len(values)), np.float32)
        return _Request(self._comm.Igather(values, received, root), received, values)

    def spread(self, values: Floats, root: int) -> Pending:
        return _Request(self._comm.Ibcast(values, root), values, values)

    def move(self, values: Floats, source: int, root: int) -> None:
        if self.rank == source:
            self._comm.Send(values, root)
        else:
            self._comm.Recv(values, source)

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


class Nccl(Mpi):
    """The processes of an MPI job with a GPU each: gradients and weights go by NCCL, all else by MPI."""

    def __init__(self) -> None:
        super().__init__()
        from pyrformer.executors.cuda import NcclLink, nccl_id

        unique = share(self, nccl_id)
        self.link = NcclLink(self.size, self.rank, unique, self.place)

    def collect(self, values: Floats, root: int) -> Pending:
        return self.link.collect(values, root)

    def spread(self, values: Floats, root: int) -> Pending:
        return self.link.spread(values, root)


def launched_rank() -> int:
    """The number that a launcher gave this process; 0 without one."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


def world(device: str = "cpu") -> Alone | Mpi:
    """All processes of this job; on device "cuda", those of one machine take its GPUs in turn.

    Raises:
        InputError: there are several, and mpi4py cannot be used.
        DeviceError: CUDA or NCCL cannot be used.
    """
    sizes = (int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit())
    if next(sizes, 1) == 1:
        return Alone()
    return Nccl() if device == "cuda" else Mpi()


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
