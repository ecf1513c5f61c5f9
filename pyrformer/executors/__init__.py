"""What runs a plan besides the CPU executor of the core: CUDA devices.

* :mod:`~pyrformer.executors.device` — what a device can do, as a small interface;
* :mod:`~pyrformer.executors.program` — walks a plan's launch records on any such device;
* :mod:`~pyrformer.executors.cublaslt` — matrix products;
* :mod:`~pyrformer.executors.cuda` — a real device, by CuPy; the only file that imports it.

Tests put a simulated device behind the same interface, so that everything but the last file runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy.typing as npt

from pyrformer import _core
from pyrformer.errors import InputError

if TYPE_CHECKING:
    from pyrformer.executors.program import Executor, Pending, Store

Array = npt.NDArray[Any]
DEVICES = ("cpu", "cuda")
#: What activations may be kept in: :attr:`pyrformer.model.Model.precision`.
PRECISIONS = ("float32", "bfloat16", "float16")
#: Where a model's states are: in the core's memory, or on a device.
AnyStore: TypeAlias = Union[_core.Store, "Store"]
AnyExecutor: TypeAlias = Union[_core.Executor, "Executor"]


@dataclass(frozen=True)
class Ended:
    """A run of the CPU's executor, which is over when it returns."""

    outputs: dict[str, Array]
    under_way = False

    def result(self) -> dict[str, Array]:
        """The outputs by name."""
        return self.outputs


#: A run that was begun: whether it is ``under_way``, and its ``result()``, for which it waits.
AnyRun: TypeAlias = Union[Ended, "Pending"]


def begin_get(store: AnyStore, names: Sequence[str]) -> Callable[[], dict[str, Array]]:
    """Begins to copy states as they are behind all runs that were begun so far; calling what it gives waits for the
    copies.

    Raises:
        StateError: there is no such state.
    """
    if isinstance(store, _core.Store):
        copies = {name: store.get(name) for name in names}
        return lambda: copies
    return store.begin_get(names)


def check_device(device: str, precision: str) -> None:
    """Finds at once what keeps a device from being used, before anything else is done for it.

    Raises:
        DeviceError: as :func:`open_store`.
    """
    if device == "cuda":
        from pyrformer.executors import cuda

        cuda.require(precision)


def open_store(device: str, *, precision: str = "float32") -> AnyStore:
    """An empty store on a device; one that computes in ``precision`` (on the CPU it changes nothing).

    Raises:
        InputError: there is no such device.
        DeviceError: CUDA cannot be used here; the message says what is missing.
    """
    if device == "cpu":
        return _core.Store()
    if device == "cuda":
        from pyrformer.executors.cuda import CudaDevice
        from pyrformer.executors.program import Store

        return Store(CudaDevice(precision=precision))
    raise InputError(f"[device] device must be one of {DEVICES}, got {device!r}")
