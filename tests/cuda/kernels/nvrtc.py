"""Compiles the kernels with NVRTC, as the executor does, without a GPU, a driver or a CUDA toolkit.

The library comes from the wheel that requirements.txt pins; ctypes is all that is needed to call it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
from pathlib import Path

from pyrformer import _core
from pyrformer.executors.kernels import OPTIONS

#: Whether to test all: both of NVRTC's compilers, every planted bug, every architecture.
LONG = bool(os.environ.get("PYRFORMER_TEST_LONG"))

HERE = Path(__file__).resolve().parents[1]
KERNELS = HERE.parents[1] / "cuda"
REQUIREMENTS = HERE / "requirements.txt"


def unit(name: str) -> str:
    """A translation unit as rust/cuda/src/sources.rs assembles it: of `cuda/<name>.cu`, or with _bf16 or _f16 behind
    the name, of that file for tensors of such a type."""
    file, head = name, ""
    if not (KERNELS / f"{name}.cu").exists():
        file, half = name.rsplit("_", 1)
        text = (KERNELS / f"{file}.cu").read_text()
        kernels = set(re.findall(r"^(\w+_f32)\(", text, re.MULTILINE))
        for made in re.findall(r"^(?:UNARY|BINARY)\((\w+),", text, re.MULTILINE):
            kernels |= {f"{made}_forward_f32", f"{made}_backward_f32"}
        head = f"#define {half.upper()}\n"
        head += "".join(f"#define {k} {k.removesuffix('f32')}{half}\n" for k in sorted(kernels))
    heads = ["common.cuh"]
    if file.startswith(("attention", "relative")):
        heads.append("attention.cuh")
    if file.startswith("attention_"):
        heads.append("tensor.cuh")
    if file in ("attention", "relative"):
        heads.append("tiles.cuh")
    texts = (f'#line 1 "{part}"\n{(KERNELS / part).read_text()}' for part in (*heads, f"{file}.cu"))
    return head + "".join(texts)


#: The unit for compute capability 9.0 alone, where its kernels take the place of those of the same names.
HOPPER = "attention_wgmma_bf16"


def files() -> list[str]:
    """The names of all translation units that are for every target."""
    return sorted(name for name, _, _, only in _core.cuda_sources() if not only)


@functools.cache
def library() -> ctypes.CDLL | str:
    """NVRTC, or why it is not there."""
    pinned = re.search(r"^nvidia-cuda-nvrtc==([\d.]+)", REQUIREMENTS.read_text(), re.MULTILINE)
    if pinned is None:
        return "tests/cuda/requirements.txt pins no nvidia-cuda-nvrtc"
    try:
        wheel = importlib.metadata.distribution("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return "the nvidia-cuda-nvrtc wheel is missing: pip install -r tests/cuda/requirements.txt"
    if wheel.version != pinned[1]:
        return f"nvidia-cuda-nvrtc {wheel.version} is installed, the tests are for {pinned[1]}"
    found = [f for f in wheel.files or [] if re.fullmatch(r"libnvrtc\.so\.\d+", f.name)]
    if not found:
        return "the nvidia-cuda-nvrtc wheel has no libnvrtc.so"
    try:
        return ctypes.CDLL(str(wheel.locate_file(found[0])))
    except OSError as error:
        return f"libnvrtc does not load: {error}"


class CompileError(Exception):
    """NVRTC refused a source; the message is its log."""


def _text(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw[: size.value].rstrip(b"\0") if what != "CUBIN" else buffer.raw


def build(source: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Compiles to what `-arch` in `options` asks for: a CUBIN for sm_XX, PTX for compute_XX. Gives it and the log."""
    lib = library()
    if isinstance(lib, str):
        raise RuntimeError(lib)
    program = ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
    try:
        array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        status = lib.nvrtcCompileProgram(program, len(options), array)
        log = _text(lib, program, "ProgramLog").decode()
        if status != 0:
            raise CompileError(log)
        what = "CUBIN" if any(o.startswith("-arch=sm_") for o in options) else "PTX"
        return _text(lib, program, what), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def ptx(source: str, name: str, arch: int | str) -> str:
    """PTX for compute_<arch>, 80 or "90a", with the lines it comes from."""
    code, _ = build(source, name, (f"-arch=compute_{arch}", "-lineinfo", *OPTIONS))
    return code.decode()


def cubin(source: str, name: str, arch: int | str) -> str:
    """Compiles a text for sm_<arch>; gives ptxas's report on each kernel."""
    _, log = build(source, name, (f"-arch=sm_{arch}", "--ptxas-options=-v", *OPTIONS))
    return log
