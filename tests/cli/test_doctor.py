"""``pyrformer doctor`` and ``--device cuda`` where there is no GPU, and where parts of CUDA are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.errors import DeviceError
from pyrformer.executors import cublaslt, cuda


def run(*args: str) -> subprocess.CompletedProcess[str]:
    code = "from pyrformer.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


def fake_cupy(monkeypatch: pytest.MonkeyPatch, **facts: int) -> None:
    """A CuPy of CUDA 13 that knows one device."""
    given = {"driver": 13000, "count": 1, "major": 9, "minor": 0, "nvrtc": 1, **facts}

    class CUDARuntimeError(RuntimeError):
        pass

    def count() -> int:
        if given["count"] < 0:
            raise CUDARuntimeError("cudaErrorInsufficientDriver: too old\nmore")
        return given["count"]

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        driverGetVersion=lambda: given["driver"],
        runtimeGetVersion=lambda: 13000,
        getDeviceCount=count,
        getDevice=lambda: 0,
        getDeviceProperties=lambda _: {
            "name": b"Card", "major": given["major"], "minor": given["minor"], "multiProcessorCount": 10,
        },
        memGetInfo=lambda: (2**30, 2**31),
    )  # fmt: skip

    def nvrtc() -> tuple[int, int]:
        if not given["nvrtc"]:
            raise RuntimeError("Failure finding libnvrtc.so.13\nmore")
        return 13, 0

    module = ModuleType("cupy")
    cuda = SimpleNamespace(runtime=runtime, nvrtc=SimpleNamespace(getVersion=nvrtc))
    module.__dict__.update(cuda=cuda, __version__="14.2.0")
    monkeypatch.setitem(sys.modules, "cupy", module)


def test_the_report_has_one_line_each() -> None:
    lines = run("doctor").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["pyrformer", "python", "cpu", "cuda"]
    found = json.loads(run("doctor", "--json").stdout)
    assert found["cpu"]["ok"]
    assert found["pyrformer"]["text"] == pf.__version__


def test_without_cupy_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"pip install pyrformer\[cuda13\]"):
        cuda.describe()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"driver": 0}, "no NVIDIA driver or no GPU"),
        ({"count": 0}, "no NVIDIA driver or no GPU"),
        ({"count": -1}, r"driver does not answer \(cudaErrorInsufficientDriver: too old\)"),
        ({"driver": 12040}, r"driver is for CUDA 12, CuPy for CUDA 13; .*pyrformer\[cuda12\]"),
        ({"major": 6, "minor": 1}, "Card has compute capability 6.1; 7.5 or newer"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, int], message: str
) -> None:
    fake_cupy(monkeypatch, **facts)
    with pytest.raises(DeviceError, match=message):
        cuda.describe()


def test_cublaslt_is_loaded_and_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy(monkeypatch)
    monkeypatch.setattr(cublaslt.ctypes, "CDLL", missing)
    line = CliRunner().invoke(main, ["doctor"]).output.splitlines()[-1]
    assert line == (
        "cuda       not available: libcublasLt is missing; pip install pyrformer[cuda13] (or [cuda12])"
    )


def test_a_compiler_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy(monkeypatch, nvrtc=0)
    line = CliRunner().invoke(main, ["doctor"]).output.splitlines()[-1]
    assert line.startswith(
        "cuda       not available: NVRTC, which compiles the kernels, does not load (Failure finding libnvrtc.so.13); "
        "pip install pyrformer[cuda13]"
    )


class NVRTCError(RuntimeError):
    pass


def fake_nvrtc() -> SimpleNamespace:
    """A compiler that knows sm_80 and sm_90, and refuses texts with an error; it keeps texts and the last options."""
    programs: list[str] = []
    nvrtc = SimpleNamespace(programs=programs, given=())

    def compile_(program: int, options: tuple[str, ...]) -> None:
        nvrtc.given = options
        if "#error" in programs[program]:
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def create(text: str, *_: object) -> int:
        programs.append(text)
        return len(programs) - 1

    calls = {
        "NVRTCError": NVRTCError,
        "getVersion": lambda: (13, 0),
        "getSupportedArchs": lambda: (80, 90),
        "createProgram": create,
        "compileProgram": compile_,
        "getProgramLog": lambda _: "a.cu(3): error: #error\nmore\n",
        "getCUBIN": lambda _: b"cubin",
        "getPTX": lambda _: b"ptx",
        "destroyProgram": lambda program: programs.__setitem__(program, ""),
    }
    nvrtc.__dict__.update(calls)
    return nvrtc


def test_kernels_are_compiled_for_the_device_or_the_newest_that_the_compiler_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cupy(monkeypatch)
    nvrtc = fake_nvrtc()
    sys.modules["cupy"].cuda.nvrtc = nvrtc
    assert cuda.compile_kernels("a", "text", ("-x",), 90) == (b"cubin", "cubin")
    assert nvrtc.given == ("-arch=sm_90", "-x")
    assert cuda.compile_kernels("a", "text", ("-x",), 100) == (b"ptx", "ptx")
    assert nvrtc.given == ("-arch=compute_90", "-x")
    assert cuda.compile_kernels("a", "text", ("-x",), 90, "sm_90a") == (b"cubin", "cubin")
    assert nvrtc.given == ("-arch=sm_90a", "-x")
    with pytest.raises(DeviceError, match=r"^\[cuda\] a\.cu does not compile: a\.cu\(3\): error: #error$"):
        cuda.compile_kernels("a", "#error", (), 90)
    assert nvrtc.programs == [""] * 4


def test_an_architecture_takes_kernels_of_its_own() -> None:
    own, other = cuda.files_of(90), cuda.files_of(100)
    assert own.keys() == other.keys()
    taken = {kernel for kernel in own if own[kernel] != other[kernel]}
    assert "attention64_forward_bf16" in taken
    assert {own[kernel][::2] for kernel in taken} == {("attention_wgmma_bf16", "sm_90a")}
    assert {other[kernel][::2] for kernel in taken} == {("attention_mma_bf16", "")}
    assert cuda.files_of(90, general=True) == other


def missing(name: str) -> None:
    raise OSError(name)


def test_a_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy(monkeypatch)
    monkeypatch.setattr(cublaslt.ctypes, "CDLL", lambda name: name)
    line = CliRunner().invoke(main, ["doctor"]).output.splitlines()[-1]
    about = (
        "Card (sm_90, 10 multiprocessors, bfloat16 and float16), 1.0 of 2.0 GiB free, driver for CUDA 13.0"
    )
    assert about in line


def test_bfloat16_is_refused_where_float16_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy(monkeypatch, major=7, minor=5)
    monkeypatch.setattr(cublaslt.ctypes, "CDLL", lambda name: name)
    assert "float16, no bfloat16" in CliRunner().invoke(main, ["doctor"]).output
    with pytest.raises(
        DeviceError, match=r"Card \(sm_75\) has no bfloat16; use float16 \(--fp16\), or float32$"
    ):
        cuda.CudaDevice(precision="bfloat16")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "memory",
            r"out of memory: 12 bytes; end what else uses it, or take a smaller model, batches or sequences$",
        ),
        ("runtime", "the device failed: cudaErrorLaunchFailure; this process has lost it, start again$"),
        ("driver", "the device failed: CUDA_ERROR_UNKNOWN; this process has lost it, start again$"),
    ],
)
def test_what_cuda_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    class OutOfMemoryError(Exception):
        pass

    class CUDADriverError(Exception):
        pass

    fake_cupy(monkeypatch)
    device = object.__new__(cuda.CudaDevice)
    device.cupy = sys.modules["cupy"]
    device.runtime = device.cupy.cuda.runtime
    device.cupy.cuda.memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    device.cupy.cuda.driver = SimpleNamespace(CUDADriverError=CUDADriverError)
    raised = {
        "memory": OutOfMemoryError("12 bytes\nmore"),
        "runtime": device.runtime.CUDARuntimeError("cudaErrorLaunchFailure\nmore"),
        "driver": CUDADriverError("CUDA_ERROR_UNKNOWN"),
    }[error]
    with pytest.raises(DeviceError, match=message), device._calls():
        raise raised


def test_asking_for_a_missing_device_is_one_line(tmp_path: Path) -> None:
    if json.loads(run("doctor", "--json").stdout)["cuda"]["ok"]:
        pytest.skip("there is a CUDA device")
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 9}
    model = pf.Model.from_config(config)
    model.save(tmp_path / "m")
    done = run("sample", str(tmp_path / "m"), "a", "--device", "cuda")
    assert done.returncode == 2
    assert done.stderr.startswith("pyrformer: error: [cuda] ")
    assert len(done.stderr.splitlines()) == 1
    (tmp_path / "t.txt").write_text("one or two words, over and over. " * 20)
    done = run("train", str(tmp_path / "t.txt"), "--out", str(tmp_path / "r"), "--device", "cuda")
    assert done.returncode == 2
    assert done.stderr.startswith("pyrformer: error: [cuda] ")  # and before the text was read
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match="device must be one of"):
        pf.load(tmp_path / "m", device="tpu")
    assert np.isfinite(pf.load(tmp_path / "m")(np.array([[1]])).logits).all()
