"""The time of one training step, as a share of what this machine's matrix products reach.

One step is one plan: forward, loss, backward, clipping, AdamW, on random tokens of a freshly made model. The peak is
the best NumPy float32 matrix product of the same run, the bandwidth the best copy; medians over steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pyrformer import programs
from pyrformer.compile import Compiled
from pyrformer.errors import InputError
from pyrformer.model import Model
from pyrformer.models.base import MOST_SIZE
from pyrformer.optimizers import AdamW

FAMILIES = ("gpt2", "llama", "bert")
#: The share of tokens that a masked model predicts.
MASKED = 0.15


@dataclass(frozen=True)
class Shape:
    """What is trained: a family's sizes, B × T tokens a step."""

    family: str = "gpt2"
    layers: int = 4
    width: int = 128
    heads: int = 4
    vocab: int = 65
    batch: int = 12
    seq: int = 64

    def __post_init__(self) -> None:
        if self.batch * self.seq > MOST_SIZE:
            raise InputError(
                f"[bench] {self.batch} × {self.seq} tokens a step are more than {MOST_SIZE}; lower one"
            )

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``, without dropout, with the family's usual MLP width: 4 C, or 8/3 C to the next
        multiple of 64 where it is gated.

        Raises:
            InputError: the family is not one of ``FAMILIES``.
        """
        if self.family == "gpt2":
            drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads}
            return {"model_type": "gpt2", "vocab_size": self.vocab, "n_positions": self.seq, **sizes, **drop}
        if self.family not in FAMILIES:
            raise InputError(f"[bench] family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        shared = {
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.seq,
            "tie_word_embeddings": True,
        }
        if self.family == "llama":
            return {**shared, "intermediate_size": -(-8 * self.width // 3 // 64) * 64}
        drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return {**shared, "intermediate_size": 4 * self.width, **drop}

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Random ids ``[B, T]`` and their labels."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, self.vocab, (self.batch, self.seq))
        return ids, np.where(rng.random(ids.shape) < MASKED, ids, -100) if self.family == "bert" else ids


@dataclass(frozen=True)
class Operation:
    """The steps of one kind in a plan, together: seconds, FLOPs, bytes moved, and the roofline's share, the time that
    peak and bandwidth allow over the time it took."""

    name: str
    count: int
    ms: float
    gflop: float
    mb: float
    roofline: float


@dataclass(frozen=True)
class Result:
    """What was measured. Utilisation is FLOPs of the step / time / ``peak_gflops``."""

    shape: Shape
    threads: int
    parameters: int
    steps: int
    ms_per_step: float
    ms_min: float
    ms_max: float
    tokens_per_s: float
    gflop_per_step: float
    peak_gflops: float
    gb_per_s: float
    utilisation: float
    arena_bytes: int
    state_bytes: int
    peak_bytes: int
    compile_ms: float
    operations: list[Operation] = field(default_factory=list)
    peer: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def times(run: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, after one that is not counted."""
    run()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def sgemm_peak() -> float:
    """The best FLOP/s of NumPy's float32 matrix product of 1536 × 1536, on all threads that its library takes."""
    a, b = np.ones((2, 1536, 1536), np.float32)
    return 2 * 1536**3 / min(times(lambda: a @ b, 10))


def bandwidth() -> float:
    """The best bytes/s of a copy of 128 MB, reads and writes counted."""
    a = np.ones(2**25, np.float32)
    b = np.empty_like(a)
    return 2 * a.nbytes / min(times(lambda: np.copyto(b, a), 5))


def measure(
    shape: Shape,
    *,
    steps: int = 20,
    threads: int | None = None,
    profile: bool = False,
    peer: bool = False,
    precision: str = "float32",
) -> Result:
    """Runs ``steps`` training steps and one that is not counted.

    Args:
        profile: also times each operation, on as many further steps.
        peer: also times the same step in PyTorch, in float32, turn by turn in the same run.
        precision: what the forward pass leaves to the backward pass is kept in.

    Raises:
        InputError: a size makes no sense, or the peer is not installed.
    """
    model = Model.from_config(shape.config(), threads=threads)
    ids, labels = shape.tokens()
    batch = model.batch(ids, labels=labels)
    start = time.perf_counter()
    traced = programs.train_step(model.family, batch.sizes, AdamW())
    compiled = traced.lower(precision=precision).compile(model.store, threads)
    compile_ms = 1e3 * (time.perf_counter() - start)
    inputs = {**batch.arrays, **batch.scales, "lr": 1e-4, "step": 1}
    peak, copies = sgemm_peak(), bandwidth()
    seconds, theirs = _seconds(shape, lambda: compiled(**inputs), steps, threads, peer)
    middle = float(np.median(seconds))
    plan = compiled.plan
    operations = _operations(compiled, inputs, steps, peak, copies) if profile else []
    return Result(
        shape=shape,
        threads=threads or _threads(),
        parameters=model.parameter_count,
        steps=steps,
        ms_per_step=1e3 * middle,
        ms_min=1e3 * min(seconds),
        ms_max=1e3 * max(seconds),
        tokens_per_s=shape.batch * shape.seq / middle,
        gflop_per_step=plan.flops / 1e9,
        peak_gflops=peak / 1e9,
        gb_per_s=copies / 1e9,
        utilisation=plan.flops / middle / peak,
        arena_bytes=plan.arena_bytes,
        state_bytes=plan.state_bytes,
        peak_bytes=plan.arena_bytes + plan.state_bytes,
        compile_ms=compile_ms,
        operations=operations,
        peer=theirs,
    )


def _threads() -> int:
    import os

    return int(os.environ.get("PYRFORMER_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _seconds(
    shape: Shape, ours: Callable[[], object], steps: int, threads: int | None, peer: bool
) -> tuple[list[float], dict[str, float] | None]:
    """Seconds of our steps and, turn by turn with them, figures of the peer's."""
    if not peer:
        return times(ours, steps), None
    try:
        from pyrformer.bench.torch_peer import training_step
    except ImportError:
        raise InputError("[bench] the peer 'torch' is not installed here") from None
    theirs = training_step(shape, threads or _threads())
    turns = max(1, steps // 5)
    seconds: list[float] = []
    other: list[float] = []
    for _ in range(turns):
        seconds += times(ours, -(-steps // turns))
        other += times(theirs, -(-steps // turns))
    middle = 1e3 * float(np.median(other))
    return seconds, {
        "ms_per_step": middle,
        "ms_min": 1e3 * min(other),
        "ms_max": 1e3 * max(other),
        "speedup": middle / (1e3 * float(np.median(seconds))),
    }


def _operations(
    compiled: Compiled, inputs: dict[str, Any], steps: int, peak: float, copies: float
) -> list[Operation]:
    """The plan's steps by operation, the slowest first; the median of each step's time over ``steps`` runs."""
    compiled.profile(**inputs)
    seconds = np.median([compiled.profile(**inputs) for _ in range(steps)], axis=0)
    groups: dict[str, list[float]] = {}
    for (_, name, _, _, _, moved, flops, _), s in zip(compiled.plan.table(), seconds, strict=True):
        kind = name.split("{")[0]
        ideal = max(float(flops) / peak, float(moved) / copies)
        total = groups.setdefault(kind, [0, 0.0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, float(s), float(flops), float(moved), ideal)):
            total[i] += value
    found = [
        Operation(kind, int(n), 1e3 * s, flops / 1e9, moved / 1e6, ideal / s if s else 0.0)
        for kind, (n, s, flops, moved, ideal) in groups.items()
    ]
    return sorted(found, key=lambda o: -o.ms)


__all__ = ["FAMILIES", "Operation", "Result", "Shape", "measure"]
