"""Checks of what files and callers give: JSON that parses, fields and arguments that are as annotated."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from pyrformer.errors import ConfigError, InputError, ResourceError

F = TypeVar("F", bound=Callable[..., Any])
#: The greatest whole number of an option, and of a token id.
MOST, MOST_ID = (1 << 63) - 1, (1 << 31) - 1

#: Annotation → (accepted types, how to say it). A bool is no number here.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a string"),
    "list[str]": ((list, tuple), "a list of strings"),
    "list[int]": ((list, tuple), "a list of whole numbers"),
    "list[float]": ((list, tuple), "a list of numbers"),
    "dict[str, Any]": ((dict,), "a table"),
    "None": ((type(None),), "null"),
}


def check_types(config: Any, where: str) -> None:
    """Raises ConfigError naming the first field of a dataclass whose value is not of its annotated type."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        kinds = [kind.strip() for kind in str(f.type).split("|")]
        if not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(_KINDS[kind][1] for kind in kinds if kind != "None")
            raise ConfigError(f"[{where}] {f.name} must be {wanted}, got {value!r}")
        if isinstance(value, int) and not -MOST <= value <= MOST:
            raise ConfigError(f"[{where}] {f.name} must be below 2^63, got {value}")


def _is(value: Any, kind: str) -> bool:
    types, _ = _KINDS[kind]
    if isinstance(value, bool):
        return kind == "bool"
    if isinstance(value, (list, tuple)) and kind.startswith("list["):
        item = kind.removeprefix("list[").removesuffix("]")
        return all(_is(x, item) for x in value)
    return isinstance(value, types)


def checked(where: str, **least: int) -> Callable[[F], F]:
    """Makes a function of the interface check those of its arguments that are annotated as numbers: "int" is a whole
    number from ``least[name]`` (0 unless given) to 2^63 - 1, of Python or numpy, "float" a number; a bool is neither.

    Raises (the function):
        InputError: an argument is none.
        ResourceError: there is no memory for what was asked for.
    """

    def decorate(function: F) -> F:
        parameters = list(inspect.signature(function).parameters.values())
        kinds = {p.name: {k.strip() for k in str(p.annotation).split("|")} for p in parameters}
        kinds = {
            name: kind for name, kind in kinds.items() if kind & {"int", "float"} and not kind - set(_KINDS)
        }
        names = [p.name for p in parameters]

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **given}
            for name in kinds.keys() & given.keys():
                given[name] = _argument(where, name, given[name], kinds[name], least.get(name, 0))
            args = (*(given.pop(n) for n in names[: len(args)]), *args[len(names) :])
            if inspect.isgeneratorfunction(function):
                return _pieces(where, function(*args, **given))
            with memory_told(where):
                return function(*args, **given)

        return call  # type: ignore[return-value]

    return decorate


@contextmanager
def memory_told(where: str) -> Iterator[None]:
    """Makes a MemoryError of the block one of the package's.

    Raises:
        ResourceError: there is no memory for what was asked for.
    """
    try:
        yield
    except MemoryError as e:
        if isinstance(e, ResourceError):
            raise
        raise out_of_memory(where, e) from None


def out_of_memory(where: str, e: MemoryError) -> ResourceError:
    """The package's error for one of Python's or numpy's."""
    reason = str(e) or "more was asked for than there is"
    return ResourceError(f"[{where}] out of memory: {reason}; ask for less at once")


def _pieces(where: str, pieces: Iterator[Any]) -> Iterator[Any]:
    with memory_told(where):
        yield from pieces


def whole(where: str, name: str, value: Any, least: int, most: int = MOST) -> int:
    """A whole number from ``least`` to ``most``, of Python or numpy.

    Raises:
        InputError: it is none.
    """
    if not isinstance(value, bool):
        with suppress(TypeError):
            if least <= (found := operator.index(value)) <= most:
                return found
    said = "2^63 - 1" if most == MOST else most
    raise InputError(f"[{where}] {name} must be a whole number from {least} to {said}, got {value!r}")


def _argument(where: str, name: str, value: Any, kind: set[str], least: int) -> Any:
    """An argument of one of the annotated types."""
    if value is None and "None" in kind:
        return None
    if "float" not in kind:
        return whole(where, name, value, least)
    if not isinstance(value, (bool, str)):
        with suppress(TypeError, ValueError, OverflowError):
            return float(value)
    raise InputError(f"[{where}] {name} must be a number, got {value!r}")


def token_ids(where: str, values: Iterable[Any]) -> list[int]:
    """Token ids as ints.

    Raises:
        InputError: one is no whole number from 0 to 2^31 - 1.
    """
    ids: list[int] = []
    try:
        given = iter(values)
    except TypeError:
        raise InputError(f"[{where}] token ids must be whole numbers in a list, got {values!r}") from None
    for value in given:
        try:
            ids.append(operator.index(value))
        except TypeError:
            raise InputError(f"[{where}] token ids must be whole numbers, got {value!r}") from None
        if not 0 <= ids[-1] <= MOST_ID:
            raise InputError(f"[{where}] token ids must be from 0 to 2^31 - 1, got {ids[-1]}")
    return ids


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` whose every failure is a ValueError.

    Raises:
        ValueError: it is no JSON, no UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
