"""What the kernel tests share. They need numpy and the NVRTC wheel of requirements.txt, and no GPU.

Under tools/gpu_day.py the tests of kernels run on the device of this machine instead, and need no wheel.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside the tests; see --import-mode

import sim
from kernels import nvrtc
from kernels.hardware import ON_HARDWARE, SLACK, Hardware


def _capability() -> tuple[int, int]:
    """That of the device of this machine."""
    from pyrformer.executors.cuda import describe

    found: tuple[int, int] = describe()["capability"]
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without NVRTC nothing here can run; say why."""
    why = None if ON_HARDWARE else nvrtc.library()
    old = ON_HARDWARE and _capability() < (8, 0)
    for item in items:
        if old and "bf16" in getattr(getattr(item, "callspec", None), "params", {}).values():
            item.add_marker(pytest.mark.skip(reason="the device has no bfloat16"))
        if isinstance(why, str) and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=why))


@functools.cache
def _compiled(arch: int) -> dict[str, sim.Program]:
    found: dict[str, sim.Program] = {}
    for name in nvrtc.files():
        found.update(sim.load(nvrtc.ptx(nvrtc.unit(name), name, arch)))
    return found


# compute_80 and compute_100 come from two different compilers inside NVRTC, with different dialects of PTX.
@pytest.fixture(scope="session", params=[80, 100] if nvrtc.LONG else [80], ids=lambda arch: f"compute_{arch}")
def programs(request: pytest.FixtureRequest) -> dict[str, sim.Program]:
    """All kernels, compiled to PTX and read."""
    if ON_HARDWARE:
        return {}
    return _compiled(request.param)


@pytest.fixture(scope="session")
def programs_80() -> dict[str, sim.Program]:
    """The same for compute_80 alone."""
    return _compiled(80)


@pytest.fixture(scope="session")
def programs_75() -> dict[str, sim.Program]:
    """The same for compute_75: Turing. Where time is short, of attention in float16 alone."""
    if nvrtc.LONG:
        return _compiled(75)
    return sim.load(nvrtc.ptx(nvrtc.unit("attention_mma_f16"), "attention_mma_f16", 75))


@functools.cache
def _hopper() -> dict[str, sim.Program]:
    return sim.load(nvrtc.ptx(nvrtc.unit(nvrtc.HOPPER), nvrtc.HOPPER, "90a"))


@pytest.fixture(scope="session")
def programs_90a() -> dict[str, sim.Program]:
    """The kernels that compute capability 9.0 has of its own."""
    return _hopper()


@functools.cache
def _hardware(*, general: bool = False) -> Hardware:
    from pyrformer.executors.cuda import CudaDevice

    return Hardware(CudaDevice(general=general))


@pytest.fixture
def device(programs: dict[str, sim.Program]) -> sim.Device | Hardware:
    """An empty device with all kernels."""
    return _hardware().fresh() if ON_HARDWARE else sim.Device(programs)


@pytest.fixture
def tensor_device(request: pytest.FixtureRequest, programs: dict[str, sim.Program]) -> sim.Device | Hardware:
    """The same, of attention on tensor cores with the kernels for every architecture ("mma"), or for 9.0 ("wgmma")."""
    own = request.param == "wgmma"
    if not ON_HARDWARE:
        return sim.Device(programs | _hopper() if own else programs)
    from pyrformer.executors.cuda import describe

    if own and describe()["arch"] != "sm_90":
        pytest.skip("for compute capability 9.0")
    return _hardware(general=not own).fresh()


@pytest.fixture
def rng() -> np.random.Generator:
    """The same draws in every test."""
    return np.random.default_rng(20)


@pytest.fixture
def close() -> Callable[..., None]:
    """Compares with the reference: |got - want| <= tolerance · (1 + |want|), infinities and NaN exactly.

    float32 rounds to 6e-8; the default leaves room for some tens of roundings. Tolerances are never bit-exact, because
    hardware's approximate functions differ by some units in the last place from the exact ones used here.
    """

    def check(got: np.ndarray, want: np.ndarray, tolerance: float = 3e-6) -> None:
        want = np.asarray(want, float)
        tolerance *= SLACK if ON_HARDWARE else 1
        assert got.shape == want.shape
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        error = np.abs(got[finite] - want[finite]) / (1 + np.abs(want[finite]))
        assert not error.size or error.max() <= tolerance, (
            f"relative error {error.max():.2g}, allowed {tolerance:.2g}"
        )

    return check
