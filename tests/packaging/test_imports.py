"""Imports go one way: cli → pyrformer → _core. This test reads the sources; it imports nothing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THIRD_PARTY = {"pyrformer": {"numpy", "tomli"}, "cli": {"click", "rich", "numpy", "tomli"}}


#: Optional packages, each with the one module that imports it, late.
OPTIONAL = {
    ("torch", "pyrformer.bench.torch_peer"),
    ("pyarrow", "pyrformer.arrow"),
    ("jinja2", "pyrformer.serve.template"),
    ("starlette", "pyrformer.serve.app"),
    ("uvicorn", "pyrformer.serve.server"),
    ("llguidance", "pyrformer.generation.grammar"),
    ("mpi4py", "pyrformer.training.comm"),
    ("ray", "pyrformer.data.cluster"),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package under the name that users see, with its file."""
    for folder, name in ((ROOT / "pyrformer", "pyrformer"), (ROOT / "cli", "pyrformer.cli")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((name, *parts)), path


def imported(source: str, module: str) -> set[str]:
    """Absolute names of all that a module imports, anywhere in it; `from a import b` gives `a.b`.

    ``module`` ends in `.__init__` for a package.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def broken_rules(source: str, module: str) -> list[str]:
    """The rules that a module breaks, one sentence each."""
    cli = inside(module, "pyrformer.cli")
    allowed = THIRD_PARTY["cli" if cli else "pyrformer"]
    broken = []
    for name in sorted(imported(source, module)):
        top = name.split(".")[0]
        if inside(name, "pyrformer.cli") and not cli:
            broken.append(f"{module} imports {name}: nothing imports the command line")
        elif inside(name, "pyrformer._core") and cli:
            broken.append(f"{module} imports {name}: the command line uses public names")
        elif top == "cupy":
            if module != "pyrformer.executors.cuda":
                broken.append(f"{module} imports {name}: only pyrformer.executors.cuda talks to CuPy")
        elif (top, module) in OPTIONAL:
            continue
        elif top != "pyrformer" and top not in sys.stdlib_module_names and top not in allowed:
            broken.append(f"{module} imports {name}: not a dependency of {'cli' if cli else 'pyrformer'}")
    return broken


def test_every_module_keeps_the_rules() -> None:
    found = [
        rule for module, path in modules() for rule in broken_rules(path.read_text(encoding="utf-8"), module)
    ]
    assert not found, "\n".join(found)


def test_the_walk_sees_the_package_and_the_command_line() -> None:
    names = {module for module, _ in modules()}
    assert {"pyrformer.__init__", "pyrformer.errors", "pyrformer.cli.__init__"} <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyrformer.train", "import torch"),
        ("pyrformer.train", "def f():\n    from transformers import AutoModel"),
        ("pyrformer.train", "import cupy as cp"),
        ("pyrformer.train", "import click"),
        ("pyrformer.train", "import cli"),
        ("pyrformer.train", "import tests.helpers"),
        ("pyrformer.train", "from pyrformer import cli"),
        ("pyrformer.train", "from . import cli"),
        ("pyrformer.nn.__init__", "from ..cli import main"),
        ("pyrformer.cli.train", "from pyrformer import _core"),
        ("pyrformer.cli.train", "import cupy"),
        ("pyrformer.cli.train", "import cli"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(broken_rules(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyrformer.train", "import os.path, numpy as np\nfrom pyrformer import _core"),
        ("pyrformer.nn.__init__", "from .layers import Linear\nfrom ..errors import Error"),
        ("pyrformer.executors.cuda", "import cupy"),
        ("pyrformer.cli.train", "import click\nfrom rich.table import Table\nfrom ._options import config"),
        ("pyrformer.cli.__init__", "import pyrformer as pf\nfrom . import train"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert broken_rules(source, module) == []
