"""The kernels as binaries: each file compiled once for an architecture, and kept by its content.

A binary is found again by the digest of all that it was made of, and taken only if it is what was written, so that an
edited kernel, another compiler or a damaged file is compiled anew. Where all are there, no compiler is loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pyrformer import _core

#: What the compiler is told beside the architecture: what CuPy 14 tells it, for which the kernels are tested.
OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")
#: Compiles a text: its name, the text, the options. Gives the binary, and the suffix of its kind, "cubin" or "ptx".
Compiler = Callable[[str, str, tuple[str, ...]], tuple[bytes, str]]


def cache_folder() -> Path:
    """Where binaries are kept: ``PYRFORMER_CACHE_DIR``, or ``pyrformer`` in the user's cache."""
    own = os.environ.get("PYRFORMER_CACHE_DIR")
    if own:
        return Path(own) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyrformer" / "kernels"


class Binaries:
    """The binaries for one architecture."""

    def __init__(self, arch: str, version: str, compiler: Compiler, folder: Path | None = None):
        """
        Args:
            arch: as in "sm_90".
            version: of the compiler.
            folder: where binaries are kept; one that goes with the process where that cannot be written.
        """
        self.arch, self.version, self.compiler = arch, version, compiler
        self.folder = folder or cache_folder()

    def get(self, texts: Sequence[tuple[str, str]]) -> list[Path]:
        """The files of some texts, given by name; those that are missing are compiled, one after the other, as NVRTC
        does it in any case.

        Raises:
            DeviceError: the compiler's.
        """
        return [self._get(name, text) for name, text in texts]

    def _get(self, name: str, text: str) -> Path:
        made_of = "\0".join((text, self.arch, self.version, *OPTIONS))
        stem = f"{name}-{self.arch}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
        with suppress(OSError):
            for path in self.folder.glob(f"{stem}-*"):
                if path.stem == f"{stem}-{_digest(path.read_bytes())}":
                    return path
        binary, kind = self.compiler(name, text, OPTIONS)
        file = f"{stem}-{_digest(binary)}.{kind}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _core.write_file(self.folder / file, binary)
            return self.folder / file
        except OSError:
            own = Path(tempfile.mkdtemp(prefix="pyrformer-kernels-"))
            weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
            (own / file).write_bytes(binary)
            return own / file


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
