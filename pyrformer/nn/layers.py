"""Layers: a few parameters each, and the operation they take part in."""

from __future__ import annotations

from pyrformer.nn import functional as F
from pyrformer.nn.module import ONES, ZEROS, Init, Module, Parameter
from pyrformer.nn.trace import Tensor


class Embedding(Module):
    """A row of ``weight [V, C]`` per id."""

    def __init__(self, rows: int, width: int, init: Init, *, trainable: bool = True):
        self.weight = Parameter((rows, width), init, trainable)

    def __call__(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, ids.trace.parameter(self.weight))


class Linear(Module):
    """``x·Wᵀ + b``, ``weight [N, C]``."""

    def __init__(self, inputs: int, outputs: int, init: Init, *, bias: bool = True):
        self.weight = Parameter((outputs, inputs), init)
        self.bias = Parameter((outputs,), ZEROS) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else x.trace.parameter(self.bias)
        return F.linear(x, x.trace.parameter(self.weight), bias)


class Conv1D(Module):
    """``x·W + b`` with ``weight [C, N]``: a linear layer stored as GPT-2 stores it."""

    def __init__(self, inputs: int, outputs: int, init: Init, *, bias: bool = True):
        self.weight = Parameter((inputs, outputs), init)
        self.bias = Parameter((outputs,), ZEROS) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else x.trace.parameter(self.bias)
        return F.linear(x, x.trace.parameter(self.weight), bias, transposed=True)


class LayerNorm(Module):
    """Layer normalisation over the last axis; without ``affine`` it has no parameters."""

    def __init__(self, width: int, eps: float, *, bias: bool = True, affine: bool = True):
        self.weight = Parameter((width,), ONES) if affine else None
        self.bias = Parameter((width,), ZEROS) if affine and bias else None
        self._width, self._eps = width, eps

    def __call__(self, x: Tensor) -> Tensor:
        trace = x.trace
        weight = trace.fill(1.0, (self._width,)) if self.weight is None else trace.parameter(self.weight)
        bias = None if self.bias is None else trace.parameter(self.bias)
        return F.layer_norm(x, weight, bias, self._eps)


class RMSNorm(Module):
    """Root-mean-square normalisation over the last axis."""

    def __init__(self, width: int, eps: float):
        self.weight = Parameter((width,), ONES)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.trace.parameter(self.weight), self._eps)
