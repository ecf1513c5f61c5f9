"""Modules: named parameters in a tree, and nothing else.

The names, joined by dots from the root, are Hugging Face's parameter names, so files need no table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core


@dataclass(frozen=True)
class Normal:
    """Independent draws from N(0, std²). Each tensor has a stream of its own, so that its values depend on (seed, its
    number in the model) and on nothing drawn before."""

    std: float

    def values(self, shape: tuple[int, ...], seed: int, index: int) -> npt.NDArray[np.float32]:
        values = _core.normal(seed, index, int(np.prod(shape))).reshape(shape)
        values *= np.float32(self.std)
        return values


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float

    def values(self, shape: tuple[int, ...], seed: int, index: int) -> npt.NDArray[np.float32]:
        return np.full(shape, self.value, np.float32)


@dataclass(frozen=True)
class Table:
    """Given values."""

    array: npt.NDArray[np.float32]

    def values(self, shape: tuple[int, ...], seed: int, index: int) -> npt.NDArray[np.float32]:
        return self.array.reshape(shape)


Init = Normal | Constant | Table
ZEROS, ONES = Constant(0.0), Constant(1.0)


@dataclass(eq=False)
class Parameter:
    """A tensor that a model owns.

    Attributes:
        shape: extents.
        init: how it begins.
        trainable: whether training changes it.
        name: its full name, given by the root module.
    """

    shape: tuple[int, ...]
    init: Init
    trainable: bool = True
    name: str = field(default="", init=False)


class Module:
    """A part of a model: attributes that are parameters, modules or lists of modules form a tree."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """All parameters below this module with their names, in the order they were assigned. A parameter that is
        reached twice (a tied one) comes under its first name only."""
        seen: set[int] = set()
        for name, parameter in self._walk(prefix):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """All modules below this one with their names."""
        for name, child in vars(self).items():
            children = enumerate(child) if isinstance(child, list) else [(None, child)]
            for i, item in children:
                if isinstance(item, Module):
                    full = f"{prefix}{name}" if i is None else f"{prefix}{name}.{i}"
                    yield full, item
                    yield from item.named_modules(f"{full}.")

    def tied_names(self) -> dict[str, str]:
        """Further names of parameters that are reached twice → their first name."""
        first: dict[int, str] = {}
        tied = {}
        for name, parameter in self._walk(""):
            if id(parameter) in first:
                tied[name] = first[id(parameter)]
            else:
                first[id(parameter)] = name
        return tied

    def name_parameters(self) -> None:
        """Gives each parameter its full name; called once, on the root."""
        for name, parameter in self.named_parameters():
            parameter.name = name

    def _walk(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        for name, child in vars(self).items():
            yield from _below(f"{prefix}{name}", child)


def _below(name: str, child: Any) -> Iterator[tuple[str, Parameter]]:
    if isinstance(child, Parameter):
        yield name, child
    elif isinstance(child, Module):
        yield from child._walk(f"{name}.")
    elif isinstance(child, list):
        for i, item in enumerate(child):
            yield from _below(f"{name}.{i}", item)
