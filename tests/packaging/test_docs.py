"""Documents say only what is there: links between files, the tree in the README, the checksums of the example."""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path

import pytest

import pyrformer

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
#: Pages that the site makes when it is built.
MADE = {"frames.md", "reference/commands.md"}
LINK = re.compile(r"\[[^\]]+\]\((?!https?://|#)([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(document: Path) -> None:
    links = LINK.findall(document.read_text(encoding="utf-8"))
    assert [link for link in links if link not in MADE and not (document.parent / link).exists()] == []


def test_the_reference_has_every_public_name() -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    shown = {name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M)}
    public = {f"pyrformer.{name}" for name in pyrformer.__all__ if name not in ("Error", "__version__")}
    assert public <= shown
    assert "pyrformer.errors" in shown
    for name in shown:
        parts = name.split(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(".".join(parts[:-1])), parts[-1]), name


def test_file_tree_of_the_readme_exists() -> None:
    (tree,) = re.findall(
        r"## Where things are\n.*?```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S
    )
    stack: list[str] = []
    missing = []
    for line in tree.splitlines():
        entry = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        stack[depth:] = [entry.rstrip("/")]
        if not ROOT.joinpath(*stack).exists():
            missing.append("/".join(stack))
    assert missing == []
    assert len(tree.splitlines()) > 20


def test_example_text_is_the_one_described() -> None:
    folder = ROOT / "examples" / "shakespeare"
    rows = re.findall(
        r"\| `(\w+\.txt)` \| ([\d,]+) \| `([0-9a-f]{64})` \|", (folder / "README.md").read_text("utf-8")
    )
    assert len(rows) == 2
    for name, size, digest in rows:
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (int(size.replace(",", "")), digest)
