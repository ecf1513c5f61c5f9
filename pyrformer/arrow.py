"""Arrow: the one place that imports pyarrow, and results as tables. Needs ``pip install pyrformer[arrow]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyrformer.errors import InputError


def import_arrow(what: str) -> Any:
    """pyarrow, with its parquet module.

    Raises:
        InputError: it is not installed; the message says what needs it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise InputError(f"[arrow] {what} needs pyarrow; run: pip install 'pyrformer[arrow]'") from e
    return pyarrow


class Columns:
    """A result with one entry per text, which Arrow readers take as it is: ``pl.DataFrame(model.score(texts))``."""

    def _columns(self) -> Iterator[tuple[str, Any]]:
        """Name and values of each column, one entry per text."""
        raise NotImplementedError

    def to_arrow(self) -> Any:
        """A ``pyarrow.Table`` with a row per text.

        Raises:
            InputError: pyarrow is not installed.
        """
        return import_arrow("a table").table(dict(self._columns()))

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.to_arrow().__arrow_c_stream__(requested_schema)
