"""Matrix products by cuBLASLt, called directly.

CuPy refuses its own cuBLAS calls while a stream is captured, and cuBLAS allocates its workspace then. cuBLASLt does
neither: it is given a workspace, an algorithm and a stream. Names, numbers and layouts are those of NVIDIA's
``cublasLt.h`` (CUDA 12 and 13), https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api.

cuBLASLt counts by columns: a row-major matrix is its transpose there, so y = a·b is computed as yᵀ = bᵀ·aᵀ.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

from pyrformer.errors import DeviceError
from pyrformer.executors.device import Matrix, Product

WORKSPACE = 32 << 20
#: cudaDataType: CUDA_R_32F, CUDA_R_16BF and CUDA_R_16F, by the element types of matrices.
_TYPES = {"f32": 0, "bf16": 14, "f16": 2}
_F32 = _TYPES["f32"]
_SIZES = {"f32": 4, "bf16": 2, "f16": 2}
#: Sums in float32, of factors of every type; 16-bit floats are multiplied on tensor cores.
_COMPUTE_32F = 68
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8
_EPILOGUE_BIAS = 4
_PREFERENCE_WORKSPACE = 1
#: Attributes for the alignments of a, b, c and d in bytes.
_PREFERENCE_ALIGNMENTS = (5, 6, 7, 8)
_PACKAGES = ("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cublas-cu13")

Handle = ctypes.c_void_p


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t: opaque."""

    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@dataclass(frozen=True)
class _Ready:
    """A product with everything decided: what a call needs, and what must stay alive for it."""

    call: tuple[Any, ...]
    algorithm: _Algorithm
    kept: list[Any]


def find_library() -> str:
    """The path of libcublasLt in an installed NVIDIA wheel, or its plain name for the system's loader."""
    for package in _PACKAGES:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if re.fullmatch(r"libcublasLt\.so\.\d+", file.name):
                return str(file.locate())
    return "libcublasLt.so.13"


def load_library() -> tuple[ctypes.CDLL, str]:
    """libcublasLt, and the name that it was loaded by.

    Raises:
        DeviceError: it is missing or does not load.
    """
    for name in (find_library(), "libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            return ctypes.CDLL(name), name
        except OSError:
            continue
    raise DeviceError("[cuda] libcublasLt is missing; pip install pyrformer[cuda13] (or [cuda12])")


class CublasLt:
    """A handle, a workspace, and an algorithm for each product seen so far."""

    def __init__(self, workspace: int):
        """``workspace``: the address of ``WORKSPACE`` bytes of device memory.

        Raises:
            DeviceError: the library is missing or does not start.
        """
        self.lib, _ = load_library()
        self.workspace = workspace
        self.handle = Handle()
        self._check("cublasLtCreate", ctypes.byref(self.handle))
        self._ready: dict[Product, _Ready] = {}

    def _check(self, function: str, *args: Any) -> None:
        status = getattr(self.lib, function)(*args)
        if status != 0:
            raise DeviceError(f"[cuda] {function} failed with status {status}")

    def __call__(self, product: Product, stream: int) -> None:
        """Starts a product on a stream, given as its address."""
        ready = self._ready.get(product) or self._prepare(product)
        self._check("cublasLtMatmul", *ready.call, Handle(stream))

    # -- Decisions --------------------------------------------------------------------------------------------------

    def _prepare(self, p: Product) -> _Ready:
        m, n, _ = p.sizes
        description = self._made("cublasLtMatmulDescCreate", _COMPUTE_32F, _F32)
        self._set("MatmulDesc", description, _TRANSA, ctypes.c_int32(p.tb))
        self._set("MatmulDesc", description, _TRANSB, ctypes.c_int32(p.ta))
        if p.bias is not None:
            self._set("MatmulDesc", description, _EPILOGUE, ctypes.c_int32(_EPILOGUE_BIAS))
            self._set("MatmulDesc", description, _BIAS_POINTER, Handle(p.bias))
        c = p.c or p.y
        matrices = (p.b, p.a, c, p.y)
        layouts = [self._layout(x) for x in matrices]
        preference = self._made("cublasLtMatmulPreferenceCreate")
        self._set("MatmulPreference", preference, _PREFERENCE_WORKSPACE, ctypes.c_size_t(WORKSPACE))
        for attribute, x in zip(_PREFERENCE_ALIGNMENTS, matrices, strict=True):
            self._set("MatmulPreference", preference, attribute, ctypes.c_uint32(_alignment(x)))
        found, count = _Heuristic(), ctypes.c_int()
        arguments = (
            self.handle,
            description,
            *layouts,
            preference,
            1,
            ctypes.byref(found),
            ctypes.byref(count),
        )
        self._check("cublasLtMatmulAlgoGetHeuristic", *arguments)
        if count.value == 0 or found.state != 0:
            raise DeviceError(f"[cuda] cuBLASLt has no algorithm for a product of {m} x {n} x {p.sizes[2]}")
        one, beta = ctypes.c_float(1), ctypes.c_float(1 if p.c else 0)
        call = (
            self.handle, description, ctypes.byref(one), Handle(p.b.address), layouts[0],
            Handle(p.a.address), layouts[1], ctypes.byref(beta), Handle(c.address), layouts[2],
            Handle(p.y.address), layouts[3], ctypes.byref(found.algorithm), Handle(self.workspace),
            ctypes.c_size_t(WORKSPACE),
        )  # fmt: skip
        self._check("cublasLtMatmulPreferenceDestroy", preference)
        self._ready[p] = _Ready(call, found.algorithm, [found, one, beta])
        return self._ready[p]

    def _made(self, function: str, *args: Any) -> Handle:
        handle = Handle()
        self._check(function, ctypes.byref(handle), *args)
        return handle

    def _set(self, what: str, handle: Handle, attribute: int, value: Any) -> None:
        self._check(
            f"cublasLt{what}SetAttribute", handle, attribute, ctypes.byref(value), ctypes.sizeof(value)
        )

    def _layout(self, x: Matrix) -> Handle:
        # By columns: `cols` rows of it, `rows` columns.
        sizes = ctypes.c_uint64(x.cols), ctypes.c_uint64(x.rows), ctypes.c_int64(x.ld)
        return self._made("cublasLtMatrixLayoutCreate", _TYPES[x.dtype], *sizes)


def _alignment(x: Matrix) -> int:
    """The largest power of two, up to 256, that the matrix's rows all start at."""
    bits = x.address | (_SIZES[x.dtype] * x.ld) | 256
    return bits & -bits
