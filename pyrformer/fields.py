"""Checks of what files and callers give: JSON that parses, fields that hold what their annotations say."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pyrformer.errors import ConfigError

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


def _is(value: Any, kind: str) -> bool:
    types, _ = _KINDS[kind]
    if isinstance(value, bool):
        return kind == "bool"
    if isinstance(value, (list, tuple)) and kind.startswith("list["):
        item = kind.removeprefix("list[").removesuffix("]")
        return all(_is(x, item) for x in value)
    return isinstance(value, types)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` whose every failure is a ValueError.

    Raises:
        ValueError: it is no JSON, no UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
