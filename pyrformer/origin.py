"""Where a model was opened: what makes it a handle that other processes can take.

A pickled model is the path it came from, its options, and the marks (size, time of the last change) of the files that
were read; weights are never sent. Workers map them from the files, so all of them together hold them once. Unpickling
opens the path again, once per process: pickles of one handle give one model, so a pool of workers that gets a function
with each task opens its model with the first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from pyrformer.errors import FileError

if TYPE_CHECKING:
    from pyrformer.model import Model

#: What decides a model, in its folder.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "vocab.txt",
    "merges.txt",
    "*.safetensors",
)
#: How many models opened from pickles a process keeps.
KEPT = 2

_opened: OrderedDict[Origin, Model] = OrderedDict()
_lock = Lock()


@dataclass(frozen=True)
class Origin:
    """A model on disk, as it was when it was opened.

    Attributes:
        path: its folder or file, absolute.
        options: of :func:`pyrformer.load`, as pairs.
        marks: name, size in bytes and time of the last change in nanoseconds of each file.
    """

    path: Path
    options: tuple[tuple[str, Any], ...]
    marks: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, path: Path, **options: Any) -> Origin:
        """What is at ``path`` at this moment."""
        path = path.absolute()
        files = [path] if path.is_file() else [f for pattern in PATTERNS for f in sorted(path.glob(pattern))]
        marks = ((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
        return cls(path, tuple(options.items()), tuple(marks))

    def open(self) -> Model:
        """Opens the model anew, its weights mapped from the files: processes share their memory.

        Raises:
            FileError: the path is gone, or its files are others than they were.
        """
        from pyrformer.checkpoint import load

        model = load(self.path, **dict(self.options), mmap=True)
        if model.origin != self:
            raise FileError(f"[load] {self.path} was changed after this model was opened; open it again")
        return model


def reopen(origin: Origin) -> Model:
    """The process's model of this origin; opened unless it is among the last :data:`KEPT`.

    Raises:
        FileError: as :meth:`Origin.open`.
    """
    with _lock:
        model = _opened.pop(origin, None)
        # Somebody may have trained it since.
        if model is None or model.origin != origin:
            model = origin.open()
        _opened[origin] = model
        while len(_opened) > KEPT:
            _opened.popitem(last=False)
    return model
