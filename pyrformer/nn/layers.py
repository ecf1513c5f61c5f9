"""Layers: a few parameters each, and the operation they take part in."""

from __future__ import annotations

from pyrformer.nn import functional as F
from pyrformer.nn.module import ONES, ZEROS, Init, Module, Normal, Parameter
from pyrformer.nn.trace import Tensor


class Lora(Module):
    """A change of low rank beside a linear layer (Hu et al. 2021, section 4.1): ``scale · B·A·x``, A ``[r, C]`` and
    B ``[N, r]``, scale α/r. B begins with zeros, so nothing changes at first."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropout: float):
        self.lora_A = Linear(inputs, rank, Normal((3 * inputs) ** -0.5), bias=False)
        self.lora_B = Linear(rank, outputs, ZEROS, bias=False)
        self.scale = alpha / rank
        self._dropout = dropout

    def __call__(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(F.dropout(x, self._dropout))) * self.scale


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
        self.lora: Lora | None = None

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else x.trace.parameter(self.bias)
        y = F.linear(x, x.trace.parameter(self.weight), bias)
        return y if self.lora is None else y + self.lora(x)


class Conv1D(Module):
    """``x·W + b`` with ``weight [C, N]``: a linear layer stored as GPT-2 stores it."""

    def __init__(self, inputs: int, outputs: int, init: Init, *, bias: bool = True):
        self.weight = Parameter((inputs, outputs), init)
        self.bias = Parameter((outputs,), ZEROS) if bias else None
        self.lora: Lora | None = None

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else x.trace.parameter(self.bias)
        y = F.linear(x, x.trace.parameter(self.weight), bias, transposed=True)
        return y if self.lora is None else y + self.lora(x)


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
