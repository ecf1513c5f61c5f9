"""Tracing: running a model's Python once on symbolic tensors to record its operations.

Letters: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyrformer import _core
from pyrformer.errors import ShapeError

if TYPE_CHECKING:
    from pyrformer.nn.module import Parameter

_HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value of a graph that is being traced: no numbers, only a type.

    Attributes:
        trace: the trace that it belongs to.
        value: its number in the graph.
        dtype: "float32", "float64" or "int32".
        shape: extents, outermost first.
    """

    trace: Trace
    value: int
    dtype: str
    shape: tuple[int, ...]

    def __add__(self, other: Tensor) -> Tensor:
        return self.trace.binary("add", self, other)

    def __sub__(self, other: Tensor) -> Tensor:
        return self.trace.binary("sub", self, other)

    def __mul__(self, other: Tensor | float) -> Tensor:
        if isinstance(other, Tensor):
            return self.trace.binary("mul", self, other)
        return self.trace.apply({"unary": {"scale": float(other)}}, self)[0]

    def __truediv__(self, other: Tensor) -> Tensor:
        return self.trace.binary("div", self, other)

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}{list(self.shape)})"


@dataclass(eq=False)
class Trace:
    """A graph under construction.

    Attributes:
        dtype: the floating-point type of parameters, "float32" or "float64".
        training: whether dropout is traced.
        updated: names of the states that a run changes.
        embedded: what was looked up in tables of embeddings: the ids, and their rows.
    """

    dtype: str = "float32"
    training: bool = False
    graph: _core.Graph = field(default_factory=_core.Graph)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)
    embedded: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _scope: list[str] = field(default_factory=list)
    _streams: int = 0

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """Declares a value that each run is given; the same name again is the same input."""
        if name not in self.inputs:
            self.inputs[name] = self._tensor(self.graph.input(name, dtype, list(shape)))
        return self.inputs[name]

    def state(self, name: str, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        """Declares a value that is kept between runs; the same name again is the same state."""
        if name not in self.states:
            self.states[name] = self._tensor(self.graph.state(name, dtype or self.dtype, list(shape)))
        return self.states[name]

    def parameter(self, parameter: Parameter) -> Tensor:
        """The state of a model's parameter."""
        return self.state(parameter.name, parameter.shape)

    def rng(self) -> Tensor:
        """The input int32[4] that dropout is keyed by: seed (low, high), step (low, high)."""
        return self.input("rng", "int32", (4,))

    def next_stream(self) -> int:
        """A number for the next dropout site, so that sites draw independently."""
        self._streams += 1
        return self._streams

    def fill(self, value: float, shape: Sequence[int] = ()) -> Tensor:
        """A constant tensor of the trace's floating-point type."""
        return self.apply({"fill": {"value": value}}, declared=(self.dtype, list(shape)))[0]

    def binary(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        """``a ∘ b``; b's shape is a's or its last axes."""
        return self.apply({"binary": op}, a, b)[0]

    def apply(
        self, op: str | dict[str, Any], *inputs: Tensor, declared: tuple[str, list[int]] | None = None
    ) -> list[Tensor]:
        """Adds an operation by its name and attributes (``rust/graph/src/op.rs``) and gives its results.

        Raises:
            ShapeError: the operands do not fit; the message ends with the line of the model that asked.
        """
        try:
            values = self.graph.add(json.dumps(op), [x.value for x in inputs], declared)
        except ShapeError as e:
            raise ShapeError(f"{e} ({self._place()})") from None
        return [self._tensor(v) for v in values]

    def gradients(self, loss: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
        """Adds the gradients of a scalar to the graph."""
        return [self._tensor(v) for v in self.graph.gradients(loss.value, [x.value for x in wrt])]

    def output(self, name: str, tensor: Tensor) -> None:
        """Makes a tensor a named result."""
        self.graph.output(name, tensor.value)

    def update(self, state: Tensor, tensor: Tensor) -> None:
        """Makes a tensor what a state holds after the run."""
        self.graph.update(state.value, tensor.value)
        self.updated |= {name for name, other in self.states.items() if other.value == state.value}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Marks the operations inside as part of ``name``, below the scopes around it."""
        self._scope.append(name)
        before = self.graph.set_scope(".".join(self._scope))
        try:
            yield
        finally:
            self._scope.pop()
            self.graph.set_scope(before)

    def _tensor(self, value: int) -> Tensor:
        dtype, shape = self.graph.type(value)
        return Tensor(self, value, dtype, tuple(shape))

    def _place(self) -> str:
        frame = sys._getframe(2)
        while (
            frame.f_back is not None and os.path.dirname(os.path.abspath(frame.f_code.co_filename)) == _HERE
        ):
            frame = frame.f_back
        where = f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"
        return f"in {'.'.join(self._scope) or 'the model'}, at {where}"
