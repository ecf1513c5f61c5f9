"""Binaries of the kernels: compiled once, found again by content, compiled anew where anything differs."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernels import nvrtc

from pyrformer import _core
from pyrformer.errors import DeviceError
from pyrformer.executors.kernels import Binaries, cache_folder


class Compiler:
    """Writes what it was given, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, name: str, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        if "#error" in text:
            raise DeviceError(f"[cuda] {name}.cu does not compile: #error")
        self.calls.append(name)
        return f"{text} {options}".encode(), "cubin"


def test_a_text_is_compiled_once_and_found_by_another_process(tmp_path: Path) -> None:
    compiler = Compiler()
    texts = [("a", "text of a"), ("b", "text of b")]
    first = Binaries("sm_90", "13", compiler, tmp_path).get(texts)
    assert sorted(compiler.calls) == ["a", "b"]
    assert [path.read_bytes().split()[:3] for path in first] == [
        [b"text", b"of", b"a"],
        [b"text", b"of", b"b"],
    ]
    assert Binaries("sm_90", "13", compiler, tmp_path).get(texts) == first
    assert Binaries("sm_90", "13", compiler, tmp_path).get([]) == []
    assert len(compiler.calls) == 2


@pytest.mark.parametrize("what", ["text", "arch", "version", "damage", "cut"])
def test_what_differs_is_compiled_anew(tmp_path: Path, what: str) -> None:
    compiler = Compiler()
    (path,) = Binaries("sm_90", "13", compiler, tmp_path).get([("a", "text")])
    if what == "damage":
        path.write_bytes(b"x" + path.read_bytes()[1:])
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    again = Binaries(
        "sm_80" if what == "arch" else "sm_90", "14" if what == "version" else "13", compiler, tmp_path
    )
    (found,) = again.get([("a", "text, edited" if what == "text" else "text")])
    assert compiler.calls == ["a", "a"]
    assert found.read_bytes().startswith(b"text")
    assert (found == path) == (what in ("damage", "cut"))


def test_a_folder_that_cannot_be_written_costs_the_next_process_the_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler = Compiler()
    for times in (1, 2):
        binaries = Binaries("sm_90", "13", compiler, tmp_path / "file" / "folder")
        (path,) = binaries.get([("a", "text")])
        assert path.read_bytes().startswith(b"text")
        assert len(compiler.calls) == times


def test_what_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"a\.cu does not compile"):
        Binaries("sm_90", "13", Compiler(), tmp_path).get([("a", "#error")])
    assert list(tmp_path.iterdir()) == []


def test_the_kernels_themselves(tmp_path: Path) -> None:
    """NVRTC's binaries of two files, kept and found."""
    compiled: list[str] = []

    def compiler(name: str, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        compiled.append(name)
        return nvrtc.build(text, name, ("-arch=sm_90", *options))[0], "cubin"

    texts = [(name, text) for name, text, *_ in _core.cuda_sources() if name in ("rows", "reduce")]
    for _ in range(2):
        paths = Binaries("sm_90", "13", compiler, tmp_path).get(texts)
        assert all(path.read_bytes().startswith(b"\x7fELF") for path in paths)
    assert sorted(compiled) == ["reduce", "rows"]


def test_where_binaries_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRFORMER_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/pyrformer/kernels")
    monkeypatch.setenv("PYRFORMER_CACHE_DIR", "/mine")
    assert cache_folder() == Path("/mine/kernels")
