"""What a model is written with: modules that hold parameters, functions that record operations."""

from pyrformer.nn import functional
from pyrformer.nn.layers import Conv1D, Embedding, LayerNorm, Linear, Lora, RMSNorm
from pyrformer.nn.module import ONES, ZEROS, Constant, Init, Module, Normal, Parameter, Table
from pyrformer.nn.trace import Tensor, Trace

__all__ = [
    "ONES",
    "ZEROS",
    "Constant",
    "Conv1D",
    "Embedding",
    "Init",
    "LayerNorm",
    "Linear",
    "Lora",
    "Module",
    "Normal",
    "Parameter",
    "RMSNorm",
    "Table",
    "Tensor",
    "Trace",
    "functional",
]
