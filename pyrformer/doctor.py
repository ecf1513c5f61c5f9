"""What works on this machine: versions, vector instructions, threads, CUDA."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pyrformer import _core
from pyrformer.errors import Error


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        ok: whether it works; a machine without CUDA works, slower.
        text: what was found, or what is missing and how to get it.
    """

    name: str
    ok: bool
    text: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def examine(devices: Sequence[str] = ("cpu", "cuda")) -> list[Finding]:
    """Looks at everything that computing on devices depends on. Raises nothing: what fails is a finding."""
    looks = {"cpu": _cpu, "cuda": _cuda}
    return [
        Finding("pyrformer", True, _core.__version__),
        Finding("python", True, f"{platform.python_version()}, NumPy {np.__version__}"),
        *(_found(device, looks[device]) for device in devices),
    ]


def environment(device: str) -> dict[str, str]:
    """What a run on a device depends on beside its options, by name; CUDA is looked at where it is used."""
    found = examine(("cpu",) if device == "cpu" else ("cpu", device))
    return {"system": platform.platform(), **{f.name: f.text for f in found}}


def _found(name: str, look: Any) -> Finding:
    try:
        return Finding(name, True, look())
    except Error as e:
        return Finding(name, False, str(e).removeprefix(f"[{name}] "))


def _cpu() -> str:
    has, used = _core.simd_levels()
    lowered = "" if has == used else f", lowered to {used}"
    threads = os.environ.get("PYRFORMER_NUM_THREADS", "")
    limited = f", PYRFORMER_NUM_THREADS={threads}" if threads else ""
    return f"{platform.machine()} with {has}{lowered}, {os.cpu_count()} threads{limited}"


def _cuda() -> str:
    from pyrformer.executors.cublaslt import load_library
    from pyrformer.executors.cuda import BF16, compiler, describe

    d = describe()
    compiler()
    halves = "bfloat16 and float16" if d["capability"] >= BF16 else "float16, no bfloat16"
    return (
        f"{d['device']} ({d['arch']}, {d['multiprocessors']} multiprocessors, {halves}), "
        f"{d['free_bytes'] / 2**30:.1f} of "
        f"{d['memory_bytes'] / 2**30:.1f} GiB free, driver for CUDA {d['driver_cuda']}, CuPy {d['cupy']}, "
        f"{load_library()[1].rsplit('/', 1)[-1]}"
    )
