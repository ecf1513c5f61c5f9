"""A CUDA device, by CuPy. The only file that imports it.

CuPy gives memory, streams, events and graphs, and calls NVRTC, which compiles the kernels when a program first needs
them; the binaries are kept (:mod:`pyrformer.executors.kernels`). Matrix products are cuBLASLt's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.errors import DeviceError
from pyrformer.executors.cublaslt import WORKSPACE, CublasLt
from pyrformer.executors.device import Bytes, Product
from pyrformer.executors.kernels import Binaries

#: The oldest architecture that the kernels are compiled and tested for: Turing, compute capability 7.5.
OLDEST = (7, 5)
#: The first with bfloat16 in its tensor cores: Ampere.
BF16 = (8, 0)
INSTALL = "pip install pyrformer[cuda13] (CUDA 13 driver, 580 or newer) or pyrformer[cuda12]"


def _import() -> Any:
    """CuPy.

    Raises:
        DeviceError: it is not installed, or does not load.
    """
    try:
        import cupy
    except ImportError as e:
        if getattr(e, "name", None) == "cupy":
            raise DeviceError(f"[cuda] CuPy is not installed; {INSTALL}") from None
        raise DeviceError(f"[cuda] CuPy does not load: {str(e).splitlines()[0]}; {INSTALL}") from None
    return cupy


def describe() -> dict[str, Any]:
    """What is there: CuPy's version, the driver's and the runtime's CUDA version, the device, its architecture, and
    memory in bytes (total and free).

    Raises:
        DeviceError: something is missing, or the device is too old.
    """
    cupy = _import()
    runtime = cupy.cuda.runtime
    try:
        driver, version = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        count = runtime.getDeviceCount() if driver else 0
    except runtime.CUDARuntimeError as e:
        raise DeviceError(
            f"[cuda] the NVIDIA driver does not answer ({_first(e)}); install or update it"
        ) from None
    if not driver or not count:
        raise DeviceError("[cuda] no NVIDIA driver or no GPU was found")
    if driver // 1000 < version // 1000:
        raise DeviceError(
            f"[cuda] the driver is for CUDA {driver // 1000}, CuPy for CUDA {version // 1000}; update the driver, or "
            f"pip install pyrformer[cuda{driver // 1000}]"
        )
    properties = runtime.getDeviceProperties(runtime.getDevice())
    arch = (properties["major"], properties["minor"])
    name = properties["name"].decode()
    if arch < OLDEST:
        need = ".".join(map(str, OLDEST))
        raise DeviceError(
            f"[cuda] {name} has compute capability {arch[0]}.{arch[1]}; {need} or newer is needed"
        )
    free, total = runtime.memGetInfo()
    return {
        "cupy": cupy.__version__,
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        "runtime_cuda": f"{version // 1000}.{version % 1000 // 10}",
        "device": name,
        "arch": f"sm_{arch[0]}{arch[1]}",
        "capability": arch,
        "multiprocessors": int(properties["multiProcessorCount"]),
        "memory_bytes": int(total),
        "free_bytes": int(free),
    }


def require(precision: str) -> dict[str, Any]:
    """What :func:`describe` finds, where that computes in ``precision``.

    Raises:
        DeviceError: CUDA, or this precision, cannot be used here; the message says what is missing.
    """
    found = describe()
    if precision == "bfloat16" and found["capability"] < BF16:
        raise DeviceError(
            f"[cuda] {found['device']} ({found['arch']}) has no bfloat16; use float16 (--fp16), or float32"
        )
    return found


def compiler() -> Any:
    """CuPy's NVRTC.

    Raises:
        DeviceError: it does not load.
    """
    nvrtc = _import().cuda.nvrtc
    try:
        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as e:
        raise DeviceError(
            f"[cuda] NVRTC, which compiles the kernels, does not load ({_first(e)}); {INSTALL}"
        ) from None
    return nvrtc


def compile_kernels(
    name: str, text: str, options: tuple[str, ...], arch: int, only: str = ""
) -> tuple[bytes, str]:
    """Compiles a file of kernels for an architecture, 90 for sm_90, or for one that it runs code of, where the compiler
    is older than the device; ``only``: the target of a file that is for one alone. The binary, and "cubin" or "ptx".

    Raises:
        DeviceError: the compiler is missing, or refuses the text.
    """
    nvrtc = compiler()
    nearest = max((a for a in nvrtc.getSupportedArchs() if a <= arch), default=arch)
    kind, target = ("cubin", only or f"sm_{arch}") if nearest == arch else ("ptx", f"compute_{nearest}")
    program = nvrtc.createProgram(text, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={target}", *options))
        return bytes(nvrtc.getCUBIN(program) if kind == "cubin" else nvrtc.getPTX(program)), kind
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program).strip().splitlines() or ["no reason given"]
        raise DeviceError(f"[cuda] {name}.cu does not compile: {log[0]}") from None
    finally:
        nvrtc.destroyProgram(program)


def files_of(arch: int, *, general: bool = False) -> dict[str, tuple[str, str, str]]:
    """Of each kernel on an architecture, 90 for sm_90: its file's name and text, and the target that the file is for
    alone, or "". With ``general`` none is for one target alone."""
    found: dict[str, tuple[str, str, str]] = {}
    for name, text, kernels, only in _core.cuda_sources():
        if only == "" or (only == f"sm_{arch}a" and not general):
            found |= dict.fromkeys(kernels, (name, text, only))
    return found


def _first(e: Exception) -> str:
    return str(e).splitlines()[0]


class _Memory:
    """Device memory from CuPy's pool."""

    def __init__(self, pointer: Any, size: int):
        self.pointer, self.address, self.size = pointer, int(pointer.ptr), size


class CudaDevice:
    """The current CUDA device behind :class:`pyrformer.executors.device.Device`."""

    def __init__(self, *, precision: str = "float32", general: bool = False) -> None:
        """With ``general``, without the kernels that are for this device's architecture alone.

        Raises:
            DeviceError: as :func:`require`.
        """
        found = require(precision)
        self.cupy = _import()
        self.runtime = self.cupy.cuda.runtime
        self.pool = self.cupy.cuda.MemoryPool()
        self.kernels: dict[str, Any] = {}
        arch = 10 * found["capability"][0] + found["capability"][1]
        self.files = files_of(arch, general=general)
        only = {name: target for name, _, target in self.files.values()}
        self.binaries = Binaries(
            found["arch"],
            f"CuPy {found['cupy']} for CUDA {found['runtime_cuda']}",
            lambda name, text, options: compile_kernels(name, text, options, arch, only[name]),
        )
        self.modules: dict[str, Any] = {}
        self.workspace = self.memory(WORKSPACE)
        self.products = CublasLt(self.workspace.address)

    @contextmanager
    def _calls(self) -> Iterator[None]:
        """Turns CUDA's errors into ours. After one the device is lost to this process."""
        try:
            yield
        except self.cupy.cuda.memory.OutOfMemoryError as e:
            raise DeviceError(
                f"[cuda] the device is out of memory: {_first(e)}; end what else uses it, or take a smaller model, "
                "batches or sequences"
            ) from None
        except (self.runtime.CUDARuntimeError, self.cupy.cuda.driver.CUDADriverError) as e:
            raise DeviceError(
                f"[cuda] the device failed: {_first(e)}; this process has lost it, start again"
            ) from None

    def memory(self, size: int, *, zero: bool = False) -> _Memory:
        with self._calls():
            memory = _Memory(self.pool.malloc(size), size)
            if zero and size:
                self.runtime.memset(memory.address, 0, size)
                self.runtime.deviceSynchronize()
        return memory

    def free_bytes(self) -> int:
        with self._calls():
            self.pool.free_all_blocks()
            return int(self.runtime.memGetInfo()[0])

    def pinned(self, size: int) -> Bytes:
        with self._calls():
            # An empty allocation has no buffer.
            memory = self.cupy.cuda.alloc_pinned_memory(max(size, 1))
        return np.frombuffer(memory, np.uint8, size)

    def stream(self) -> Any:
        with self._calls():
            return self.cupy.cuda.Stream(non_blocking=True)

    def event(self) -> Any:
        with self._calls():
            return self.cupy.cuda.Event(disable_timing=True)

    def upload(self, stream: Any, to: int, host: Bytes) -> None:
        self._copy(stream, to, host.ctypes.data, host.size, self.runtime.memcpyHostToDevice)

    def download(self, stream: Any, host: Bytes, start: int) -> None:
        self._copy(stream, host.ctypes.data, start, host.size, self.runtime.memcpyDeviceToHost)

    def copy(self, stream: Any, to: int, start: int, size: int) -> None:
        self._copy(stream, to, start, size, self.runtime.memcpyDeviceToDevice)

    def _copy(self, stream: Any, to: int, start: int, size: int, kind: int) -> None:
        if size:
            with self._calls():
                self.runtime.memcpyAsync(to, start, size, kind, stream.ptr)

    def prepare(self, kernels: Iterable[str]) -> None:
        files = sorted({self.files[kernel] for kernel in kernels})
        new = [file for file in files if file[0] not in self.modules]
        with self._calls():
            paths = self.binaries.get([file[:2] for file in new])
            for (name, *_), path in zip(new, paths, strict=True):
                self.modules[name] = self.cupy.RawModule(path=str(path))

    def launch(
        self, stream: Any, kernel: str, grid: list[int], block: list[int], args: tuple[np.generic, ...]
    ) -> None:
        with self._calls(), stream:
            function, shared = self._kernel(kernel)
            function(tuple(grid), tuple(block), args, shared_mem=shared)

    def _kernel(self, name: str) -> Any:
        if name not in self.kernels:
            self.prepare([name])
            function = self.modules[self.files[name][0]].get_function(name)
            shared = _core.cuda_dynamic_bytes(name, self.files[name][2])
            if shared:
                function.max_dynamic_shared_size_bytes = shared  # beyond 48 KB it must be asked for
            self.kernels[name] = function, shared
        return self.kernels[name]

    def product(self, stream: Any, product: Product) -> None:
        self.products(product, stream.ptr)

    def record(self, event: Any, stream: Any) -> None:
        with self._calls():
            event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        with self._calls():
            stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        with self._calls():
            event.synchronize()

    def begin_capture(self, stream: Any) -> None:
        with self._calls():
            stream.begin_capture()

    def end_capture(self, stream: Any) -> Any:
        with self._calls():
            return stream.end_capture()

    def replay(self, stream: Any, graph: Any) -> None:
        with self._calls():
            graph.launch(stream)


def nccl_id() -> Any:
    """What the processes of a job know each other by: made by one of them, given to all.

    Raises:
        DeviceError: CuPy or NCCL is missing.
    """
    return _nccl().get_unique_id()


def _nccl() -> Any:
    cupy = _import()
    if not cupy.cuda.nccl.available:
        raise DeviceError(
            "[cuda] several processes on GPUs need NCCL; pip install nvidia-nccl-cu13 or nvidia-nccl-cu12"
        )
    return cupy.cuda.nccl


class NcclLink:
    """This process among those of a job, each with a GPU: arrays of float32 from GPU to GPU."""

    def __init__(self, size: int, rank: int, unique: Any, place: int):
        """
        Args:
            unique: of :func:`nccl_id`.
            place: the process's number on its machine, which takes the GPU of that number.

        Raises:
            DeviceError: CUDA or NCCL cannot be used.
        """
        self.nccl, self.cupy = _nccl(), _import()
        runtime = self.cupy.cuda.runtime
        runtime.setDevice(place % runtime.getDeviceCount())
        describe()
        self.size, self.rank = size, rank
        with self._calls():
            self.link = self.nccl.NcclCommunicator(size, unique, rank)
            self.stream = self.cupy.cuda.Stream(non_blocking=True)

    @contextmanager
    def _calls(self) -> Iterator[None]:
        try:
            yield
        except (self.nccl.NcclError, self.cupy.cuda.runtime.CUDARuntimeError) as e:
            raise DeviceError(f"[cuda] the processes' GPUs lost each other: {_first(e)}") from None

    def collect(self, values: npt.NDArray[np.float32], root: int) -> NcclTransfer:
        """Begins to bring everyone's ``values [P]`` to one process: ``[N, P]`` there, in the order of ranks."""
        count, kind = values.size, self.nccl.NCCL_FLOAT32
        with self._calls(), self.stream:
            mine = self.cupy.empty(values.shape, np.float32)
            mine.set(values, stream=self.stream)
            there = self.cupy.empty((self.size if self.rank == root else 0, count), np.float32)
            if self.rank == root:
                there[root] = mine
            self.nccl.groupStart()
            if self.rank != root:
                self.link.send(mine.data.ptr, count, kind, root, self.stream.ptr)
            else:
                for other in range(self.size):
                    if other != root:
                        self.link.recv(there[other].data.ptr, count, kind, other, self.stream.ptr)
            self.nccl.groupEnd()
            return NcclTransfer(self, there, np.empty(there.shape, np.float32), mine)

    def spread(self, values: npt.NDArray[np.float32], root: int) -> NcclTransfer:
        """Begins to copy one process's ``values [P]`` over those of all others."""
        with self._calls(), self.stream:
            there = self.cupy.empty(values.shape, np.float32)
            if self.rank == root:
                there.set(values, stream=self.stream)
            self.link.bcast(there.data.ptr, values.size, self.nccl.NCCL_FLOAT32, root, self.stream.ptr)
            return NcclTransfer(self, there, values)


class NcclTransfer:
    """A transfer under way; it keeps the memory that it uses."""

    def __init__(self, link: NcclLink, there: Any, host: npt.NDArray[np.float32], *kept: Any):
        self.link, self.there, self.host, self.kept = link, there, host, kept
        self.event = link.cupy.cuda.Event(disable_timing=True)
        self.event.record(link.stream)

    def done(self) -> bool:
        """Whether it is over."""
        with self.link._calls():
            return bool(self.event.done)

    def wait(self) -> npt.NDArray[np.float32]:
        """Waits for its end; gives what came."""
        with self.link._calls():
            self.event.synchronize()
            if self.host.size:
                self.there.get(out=self.host)
        return self.host
