"""How long a training step would take on a GPU, on paper: a roofline of each launch record.

The records are those that the CUDA executor walks, made for the plan of the step; `work` says what each moves and
computes, `gpus` what a GPU can do. A record's bound is the longest of four times: distinct bytes over memory's
bandwidth, sectors over the bandwidth of the first-level caches, FLOPs over the float32 peak, rows of shared memory over
one a clock. The last three stretch where blocks leave multiprocessors idle.

The prediction divides by the share of a bound that such kernels usually reach, and adds the gap between the nodes of a
graph. These few constants are guesses until a device has been measured.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from pyrformer import _core, programs
from pyrformer.bench import work
from pyrformer.bench.gpus import GPUS, Gpu
from pyrformer.bench.train_step import MASKED, Shape
from pyrformer.errors import InputError
from pyrformer.models import build
from pyrformer.optimizers import AdamW

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Shares of the bound that are usually reached. Guesses.
REACHED = {"memory": 0.85, "cache": 0.6, "arithmetic": 0.6, "shared": 0.6}
REACHED_BY_PRODUCTS = 0.8
#: Seconds from one node of a graph to the next, and the least that a kernel takes. Guesses.
GAP, LEAST = 1e-6, 2e-6
PRODUCTS = "matrix products"


@dataclass(frozen=True)
class Kernel:
    """The records of one kernel, or of all matrix products, together.

    ``unique_mb``, ``moved_mb``: distinct bytes, and those that warps ask of the cache; ``tensor_share``: of the FLOPs;
    ``occupancy``: warps that a multiprocessor holds over those that it could (products: none, cuBLASLt's own);
    ``limit``: what bounds most of its time; ``ms``: predicted, gaps included.
    """

    name: str
    count: int
    unique_mb: float
    moved_mb: float
    sectors: int
    gflop: float
    tensor_share: float
    registers: int | None
    occupancy: float | None
    limit: str
    bound_ms: float
    ms: float


@dataclass(frozen=True)
class Estimate:
    """A step's records by kernel, the slowest first."""

    shape: Shape
    gpu: str
    arch: str
    launches: int
    gflop_per_step: float
    unique_mb: float
    bound_ms: float
    ms_per_step: float
    tokens_per_s: float
    utilisation: float
    arena_bytes: int
    state_bytes: int
    memory_bytes: float
    kernels: list[Kernel]

    @property
    def fits(self) -> bool:
        """Whether the GPU's memory holds the step."""
        return self.arena_bytes + self.state_bytes < self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {**asdict(self), "fits": self.fits}


def bars() -> dict[str, dict[str, Any]]:
    """Registers by architecture and shared memory of each kernel, as compiled, and under the name of a target those of
    the kernels that it has of its own: ``cuda/bars.toml``."""
    found: dict[str, dict[str, Any]] = tomllib.loads(_core.cuda_bars())
    return found


def times(w: work.Work, gpu: Gpu) -> dict[str, float]:
    """Seconds that each resource needs for a record. A multiprocessor works through its share of the blocks; the one
    with the most decides, and where blocks are few others idle."""
    fullest = -(-w.blocks // gpu.multiprocessors)
    busy = w.blocks / (fullest * gpu.multiprocessors)
    cache = gpu.l1 * gpu.multiprocessors * gpu.clock * busy
    return {
        "memory": w.unique / gpu.bandwidth,
        "cache": w.moved / cache,
        "arithmetic": ((w.flops - w.tensor) / gpu.flops + w.tensor / gpu.tensor) / busy,
        "shared": w.passes * 128 / cache,
    }


@dataclass(frozen=True)
class Costed:
    """One record on paper: ``seconds`` of each resource, and ``taken`` as predicted, without the gap behind it."""

    name: str
    work: work.Work
    seconds: dict[str, float]
    taken: float
    registers: int | None = None
    occupancy: float | None = None


def cost(record: dict[str, Any], gpu: Gpu, compiled: dict[str, dict[str, Any]]) -> Costed:
    """A launch record of ``_core.cuda_program`` on a GPU, given :func:`bars`."""
    w = work.work(record, gpu.own)
    seconds = times(w, gpu)
    if "product" in record:
        return Costed(PRODUCTS, w, seconds, max(LEAST, max(seconds.values()) / REACHED_BY_PRODUCTS))
    name = record["launch"]["kernel"]
    x, y, z = record["launch"]["block"]
    own = compiled.get(gpu.own, {})
    bar, target = (own[name], gpu.own) if name in own else (compiled[name], gpu.arch)
    registers = bar["registers"][target]
    shared = bar["shared_bytes"] + bar.get("dynamic_bytes", 0)
    held = gpu.occupancy(x * y * z, registers, shared)
    taken = max(LEAST, *(seconds[r] / REACHED[r] for r in seconds))
    return Costed(name, w, seconds, taken, registers, held * -(-x * y * z // 32) / gpu.warps)


def plan_of(shape: Shape, *, precision: str = "float32") -> _core.Plan:
    """The plan of a training step for a device, in a model's ``precision``. Nothing is allocated.

    Raises:
        InputError: a size makes no sense.
    """
    family = build(shape.config())
    masked = round(MASKED * shape.batch * shape.seq) if family.objective != "ar" else 0
    sizes = programs.Sizes(shape.batch, shape.seq, masked)
    return (
        programs.train_step(family, sizes, AdamW(), scaled=precision == "float16")
        .lower("cuda", precision=precision)
        .plan
    )


def estimate(shape: Shape, gpu: Gpu, *, precision: str = "float32") -> Estimate:
    """A training step of ``shape`` on a GPU, in "bfloat16" or "float16" on its tensor cores. Nothing is allocated and
    nothing runs.

    Raises:
        InputError: a size makes no sense, or the GPU has no bfloat16.
        DeviceError: an operation has no kernel.
    """
    if precision not in gpu.precisions:
        raise InputError(f"[bench] {gpu.name} has no bfloat16; use --fp16")
    plan = plan_of(shape, precision=precision)
    compiled = bars()
    groups: dict[str, list[Costed]] = {}
    for _, record in json.loads(_core.cuda_program(plan))["records"]:
        costed = cost(record, gpu, compiled)
        groups.setdefault(costed.name, []).append(costed)
    kernels = sorted((_kernel(name, found) for name, found in groups.items()), key=lambda k: -k.ms)
    ms = sum(k.ms for k in kernels)
    gflop = sum(k.gflop for k in kernels)
    return Estimate(
        shape=shape,
        gpu=gpu.name,
        arch=gpu.arch,
        launches=sum(k.count for k in kernels),
        gflop_per_step=gflop,
        unique_mb=sum(k.unique_mb for k in kernels),
        bound_ms=sum(k.bound_ms for k in kernels),
        ms_per_step=ms,
        tokens_per_s=shape.batch * shape.seq / ms * 1e3,
        utilisation=gflop * 1e9 / (ms / 1e3) / gpu.flops,
        arena_bytes=plan.arena_bytes,
        state_bytes=plan.state_bytes,
        memory_bytes=gpu.memory,
        kernels=kernels,
    )


def _kernel(name: str, found: list[Costed]) -> Kernel:
    flops = sum(c.work.flops for c in found)
    totals = {r: sum(c.seconds[r] for c in found) for r in REACHED}
    return Kernel(
        name=name,
        count=len(found),
        unique_mb=sum(c.work.unique for c in found) / 1e6,
        moved_mb=sum(c.work.moved for c in found) / 1e6,
        sectors=sum(c.work.sectors for c in found),
        gflop=flops / 1e9,
        tensor_share=sum(c.work.tensor for c in found) / flops if flops else 0.0,
        registers=found[0].registers,
        occupancy=found[0].occupancy,
        limit=max(totals, key=lambda r: totals[r]),
        bound_ms=1e3 * sum(max(c.seconds.values()) for c in found),
        ms=1e3 * sum(c.taken + GAP for c in found),
    )


__all__ = ["GPUS", "Estimate", "Kernel", "estimate"]
