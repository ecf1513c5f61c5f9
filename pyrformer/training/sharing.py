"""One update by several processes: who computes what, who sums it, who remembers it.

An update's batches go round the processes: batch i is that of process i modulo N. Parameters are cut into buckets, in
the order in which a backward pass comes to their gradients, and each bucket has an owner. As soon as a process has all
gradients of a bucket it sends them to the owner, while those of the layers before are still computed; the owner adds
them in the order of the batches. So the sum is the one that a single process makes, to the bit. The owner alone has the
optimizer's states of its parameters and updates them (ZeRO-1: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations
Toward Training Trillion Parameter Models", section 5.1; whole parameters, because some optimizers read whole matrices),
then all get the new values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pyrformer import _core
from pyrformer.compile import Array
from pyrformer.model import Model
from pyrformer.optimizers import AVERAGES, STATES
from pyrformer.training.comm import Comm, Floats, Pending

#: Elements of a bucket at most, unless one parameter has more; and buckets for each process at least, where there are
#: enough parameters.
BUCKET, EACH = 1 << 20, 4


@dataclass
class Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        owner: the rank that sums and updates them.
        places: where each begins in ``values``, by name.
        values: their gradients of a batch, or new values, one behind the other.
        total: the sum of the gradients; the owner's only.
    """

    owner: int
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, int] = field(default_factory=dict)
    values: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    total: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    missing: int = 0

    def view(self, name: str, values: Floats) -> Floats:
        """A parameter's part of an array like ``values``."""
        at, shape = self.places[name], self.shapes[name]
        return values[at : at + math.prod(shape)].reshape(shape)


def buckets(shapes: Mapping[str, tuple[int, ...]], size: int) -> list[Bucket]:
    """Cuts parameters, given from the first layer to the last, into buckets from the last to the first. The largest
    bucket is given away first, each to the one of ``size`` ranks that has least."""
    cut: list[dict[str, tuple[int, ...]]] = [{}]
    most = min(BUCKET, _elements(shapes) // (EACH * size))
    for name in reversed(list(shapes)):
        if cut[-1] and _elements(cut[-1]) + math.prod(shapes[name]) > most:
            cut.append({})
        cut[-1][name] = tuple(shapes[name])
    owned, owners = [0] * size, [0] * len(cut)
    for i in sorted(range(len(cut)), key=lambda i: -_elements(cut[i])):
        owners[i] = owned.index(min(owned))
        owned[owners[i]] += _elements(cut[i])
    return [Bucket(owner, part) for owner, part in zip(owners, cut, strict=True)]


def _elements(part: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, part.values()))


class Sharing:
    """The share of this process in all updates.

    Attributes:
        owned: the parameters that it sums and updates.
    """

    def __init__(self, comm: Comm, shapes: Mapping[str, tuple[int, ...]]):
        """
        Args:
            shapes: of the trained parameters by name, from the first layer to the last.
        """
        self.comm, self.order = comm, {name: i for i, name in enumerate(shapes)}
        self.buckets = buckets(shapes, comm.size)
        for bucket in self.buckets:
            ends = np.cumsum([math.prod(shape) for shape in bucket.shapes.values()])
            bucket.places = dict(zip(bucket.shapes, [0, *ends[:-1].tolist()], strict=True))
            bucket.values = np.zeros(ends[-1], np.float32)
            if bucket.owner == comm.rank:
                bucket.total = np.zeros(ends[-1], np.float32)
        self._of = {name: bucket for bucket in self.buckets for name in bucket.shapes}
        self.owned = frozenset(n for n, bucket in self._of.items() if bucket.owner == comm.rank)
        self._under_way: list[tuple[Bucket, Pending]] = []
        self._begin()

    def _begin(self) -> None:
        for bucket in self.buckets:
            bucket.missing = len(bucket.shapes)
        self._ready, self._under_way = 0, []

    def add(self, name: str, gradient: Floats) -> None:
        """Takes the gradient of a parameter, and sends what is complete. All processes send in one order."""
        bucket = self._of[name]
        bucket.view(name, bucket.values)[...] = gradient
        bucket.missing -= 1
        while self._ready < len(self.buckets) and self.buckets[self._ready].missing == 0:
            complete = self.buckets[self._ready]
            self._under_way.append((complete, self.comm.collect(complete.values, complete.owner)))
            self._ready += 1
        for _, pending in self._under_way:
            pending.done()

    def end_round(self) -> None:
        """Waits for everyone's gradients of a batch and adds them to the sums."""
        for bucket, pending in self._under_way:
            for row in pending.wait():
                bucket.total += row
        self._begin()

    def take(self) -> tuple[dict[str, Floats], float]:
        """The sums of the owned parameters, and the norm of all; the next sums begin with zero.

        The norm is that of ``global_norm`` over all parameters, to the bit: partial sums of squares, added in their
        order.
        """
        sums = {n: self._of[n].view(n, self._of[n].total).copy() for n in self.order if n in self.owned}
        mine = {name: _core.norm_parts(np.ascontiguousarray(total)) for name, total in sums.items()}
        parts = {name: part for found in self.comm.gather(mine) for name, part in found.items()}
        # A running sum: the order of additions is that of the core.
        squares = np.cumsum(np.concatenate([parts[name] for name in self.order]))
        for bucket in self.buckets:
            bucket.total[:] = 0
        return sums, float(np.float32(np.sqrt(squares[-1])))

    def publish(self, model: Model) -> None:
        """Gives all processes the owners' values of the parameters."""
        for bucket in self.buckets:
            if bucket.owner == self.comm.rank:
                for name in bucket.shapes:
                    bucket.view(name, bucket.values)[...] = model.store.get(name)
        pending = [self.comm.spread(bucket.values, bucket.owner) for bucket in self.buckets]
        for bucket, one in zip(self.buckets, pending, strict=True):
            one.wait()
            if bucket.owner != self.comm.rank:
                for name in bucket.shapes:
                    model.store.set(name, bucket.view(name, bucket.values))

    def mine(self, state: str) -> bool:
        """Whether this process keeps an optimizer's state, or a running average."""
        return (
            state.removeprefix(AVERAGES) in self.owned
            or state.removeprefix(STATES).partition(".")[2] in self.owned
        )

    def states(self, model: Model) -> dict[str, Array]:
        """All optimizers' states and running averages, in the first process; the others give theirs."""
        shapes = {name: tuple(shape) for name, _, shape in model.store.types()}
        there = [(name, shapes[name]) for name in moments(model)]
        found: dict[str, Array] = {}
        for owner, listed in enumerate(self.comm.gather(there)):
            for name, shape in listed:
                if self.comm.rank == owner:
                    values = np.ascontiguousarray(model.store.get(name))
                elif self.comm.rank == 0:
                    values = np.empty(shape, np.float32)
                else:
                    continue
                if owner:
                    self.comm.move(values.reshape(-1), owner, 0)
                found[name] = values
        return found if self.comm.rank == 0 else {}


def moments(model: Model) -> list[str]:
    """The optimizer's states and running averages that a model's store has."""
    return [name for name, _, _ in model.store.types() if name.startswith((STATES, AVERAGES))]
