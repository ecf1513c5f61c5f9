"""From a traced program to one that runs: Traced → Lowered → Compiled, each stage an object one can look at.

traced = Traced(name, trace)         # print(traced.graph)
lowered = traced.lower()             # print(lowered.graph), lowered.plan.table()
compiled = lowered.compile(store)    # compiled(input_ids=…, …) -> {"loss": …}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core, forks
from pyrformer.errors import DeviceError, InputError
from pyrformer.executors import PRECISIONS, AnyExecutor, AnyRun, AnyStore, Ended
from pyrformer.nn import Trace

Array = npt.NDArray[Any]
#: A tensor's (name, dtype, shape), its least and its greatest finite value, and how many values are not finite.
Values = tuple[tuple[str, str, list[int]], float, float, int]


@dataclass(frozen=True)
class Traced:
    """A program as its model wrote it."""

    name: str
    trace: Trace

    @property
    def graph(self) -> _core.Graph:
        """The graph before any pass; its text form is ``str(graph)``."""
        return self.trace.graph

    def lower(
        self, device: str = "cpu", *, precision: str = "float32", recompute: bool = False, memory: int = 0
    ) -> Lowered:
        """Runs the passes and plans memory for "cpu" or "cuda".

        Args:
            precision: "float32"; or "bfloat16" or "float16", in which are kept, for "cuda", activations, their
                gradients and the weights that products read; for "cpu", in "bfloat16" alone, what the forward pass
                leaves to the backward pass.
            recompute: compute what the layers made again in the backward pass instead of keeping it.
            memory: as ``recompute``, for the fewest layers with which states and work memory together take at most so
                many bytes; 0: no bound.

        Raises:
            InputError: even with all layers recomputed it takes more memory; or "float16" is asked of the CPU.
        """
        graph = self.trace.graph.optimise()
        layers = len(graph.layers())
        if recompute:
            graph = graph.recompute(layers)
        lowered = Lowered.of(self.name, graph, device, precision)
        for count in range(1, layers + 1):
            if not memory or recompute or lowered.bytes <= memory:
                break
            lowered = Lowered.of(self.name, graph.recompute(count), device, precision, count)
        if memory and lowered.bytes > memory:
            raise InputError(
                f"[memory] {self.name} takes {lowered.bytes / 1e6:,.0f} MB with {layers} layers recomputed, more than "
                f"the {memory / 1e6:,.0f} MB allowed; lower batch_size or seq_len"
            )
        return replace(lowered, recomputed=layers) if recompute else lowered


@dataclass(frozen=True)
class Lowered:
    """A program after the passes, and its plan; ``recomputed``: how many layers its backward pass computes again."""

    name: str
    graph: _core.Graph
    plan: _core.Plan
    recomputed: int = 0

    @classmethod
    def of(cls, name: str, graph: _core.Graph, device: str, precision: str, recomputed: int = 0) -> Lowered:
        """The plan of a graph for a device; see :meth:`Traced.lower`."""
        if precision not in PRECISIONS:
            raise InputError(f"[precision] precision must be one of {PRECISIONS}, got {precision!r}")
        if precision == "float16" and device == "cpu":
            raise InputError("[precision] float16 is computed on CUDA only; use device 'cuda', or float32")
        if precision != "float32":
            graph = graph.stash() if device == "cpu" else graph.narrow(precision)
        return cls(name, graph, graph.lower(device), recomputed)

    @property
    def bytes(self) -> int:
        """Bytes of states and work memory together: the predicted peak."""
        return self.plan.state_bytes + self.plan.arena_bytes

    def _repr_html_(self) -> str:
        from pyrformer import display

        return display.plan(self.name, self.plan)

    def compile(
        self, store: AnyStore, threads: int | None = None, *, pack: bool = False, caches_in_8bit: bool = False
    ) -> Compiled:
        """Binds the plan to states, memory and threads (default: ``PYRFORMER_NUM_THREADS``, or all the machine has;
        devices have none to choose).

        Args:
            pack: keep the weights that the plan multiplies by in the order in which the CPU's kernels read them, for
                all programs of the store, as long as none is bound that does more with them: for programs that run
                many times with few rows. No bit of a result changes.
            caches_in_8bit: keep the plan's caches of keys and values in 8 bits, on the CPU.

        Raises:
            DeviceError: the store is on a device that cannot run the plan.
        """
        if isinstance(store, _core.Store):
            with forks.core:
                executor = _core.Executor(self.plan, store, threads)
                if pack:
                    executor.pack_weights()
                if caches_in_8bit:
                    executor.quantise_caches()
                return Compiled(self.name, self.plan, executor)
        return Compiled(self.name, self.plan, store.executor(self.plan))


@dataclass(frozen=True)
class Compiled:
    """A program that runs."""

    name: str
    plan: _core.Plan
    executor: AnyExecutor

    def _repr_html_(self) -> str:
        from pyrformer import display

        return display.plan(self.name, self.plan)

    def __call__(self, **inputs: Any) -> dict[str, Array]:
        """Runs once. Each input is converted to the type that the plan declares; outputs are new arrays by name.

        Raises:
            InputError: an input is missing, unknown, of another shape, or holds an index out of range.
        """
        return self.start(**inputs).result()

    def start(self, **inputs: Any) -> AnyRun:
        """Begins a run, which a device goes on with by itself; on the CPU it is over when this returns. A program of a
        device has at most two runs under way: a third one waits for the first.

        Raises:
            InputError: as for a call.
        """
        typed = self._typed(inputs)
        with forks.core:
            if isinstance(self.executor, _core.Executor):
                return Ended(self.executor.run(typed))
            return self.executor.start(typed)

    def tell(self, tell: Callable[[str, Array], object], **inputs: Any) -> None:
        """Runs once and calls ``tell(name, array)`` with each output; on the CPU as soon as it is computed, while the
        program goes on.

        Raises:
            InputError: as for a call.
        """
        typed = self._typed(inputs)
        with forks.core:
            if isinstance(self.executor, _core.Executor):
                self.executor.run_telling(typed, tell)
                return
            for name, array in self.executor.run(typed).items():
                tell(name, array)

    def profile(self, **inputs: Any) -> list[float]:
        """Runs once and gives the seconds that each step of the plan took."""
        return self.executor.profile(self._typed(inputs))

    def find_nonfinite(self, **inputs: Any) -> tuple[int, list[Values], list[Values]] | None:
        """Runs up to the first step that reads or makes a value that is not finite: its number, what it reads, what it
        makes (nothing where it read such a value and did not run). The −∞ that attention keeps for rows that see
        nothing is no finding.

        Raises:
            DeviceError: the program is not one of the CPU.
        """
        if not isinstance(self.executor, _core.Executor):
            raise DeviceError("[find] values between operations are seen on the CPU only; set device to cpu")
        return self.executor.find_nonfinite(self._typed(inputs))

    def _typed(self, inputs: dict[str, Any]) -> dict[str, Array]:
        types = {name: dtype for name, dtype, _ in self.plan.inputs}
        return {n: np.asarray(value, types.get(n), order="C") for n, value in inputs.items()}
