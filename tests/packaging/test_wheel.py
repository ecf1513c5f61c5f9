"""What is in the wheel and in the source archive, and how the installed package behaves.

Run by ``make test`` and ``make wheel-check``, which build the wheel into ``dist/`` and install it first.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

import pyrformer

ROOT = Path(__file__).resolve().parents[2]
MAX_WHEEL_BYTES = 8_000_000

ORIGIN = json.loads(importlib.metadata.distribution("pyrformer").read_text("direct_url.json") or "{}")
EDITABLE = ORIGIN.get("dir_info", {}).get("editable", False)
installed_wheel = pytest.mark.skipif(EDITABLE, reason="an editable install: `make build` installs the wheel")


def contents(wheel: Path) -> set[str]:
    """The files of a wheel without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = list((ROOT / "dist").glob("pyrformer-*.whl"))
    if len(found) != 1:
        pytest.skip("dist/ does not hold one wheel: `make build` makes it")
    return found[0]


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    assert {name.split("/")[0] for name in files} == {"pyrformer"}
    package = ROOT / "pyrformer"
    sources = {p.relative_to(ROOT).as_posix() for p in package.rglob("*.py")}
    sources |= {
        f"pyrformer/cli/{p.relative_to(ROOT / 'cli').as_posix()}" for p in (ROOT / "cli").rglob("*.py")
    }
    sources |= {f"pyrformer/{page}/page.{kind}" for page in ("explain", "report") for kind in ("css", "js")}
    rest = {"pyrformer/_core.abi3.so", "pyrformer/_core.pyi", "pyrformer/py.typed"}
    assert files == sources | rest
    assert "pyrformer/cli/__init__.py" in files


def test_wheel_is_small_and_serves_all_python_versions(wheel: Path) -> None:
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES
    assert "-cp310-abi3-" in wheel.name


def test_versions_agree(wheel: Path) -> None:
    version = importlib.metadata.version("pyrformer")
    assert version == pyrformer.__version__
    assert wheel.name.split("-")[1] == version


def test_dependency_group_repeats_the_dependencies() -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["dependency-groups"]["runtime"] == project["project"]["dependencies"]


@installed_wheel
def test_the_installed_package_is_the_one_tested() -> None:
    home = importlib.metadata.distribution("pyrformer").locate_file("pyrformer")
    assert Path(pyrformer.__file__).parent == Path(str(home))
    assert not Path(pyrformer.__file__).is_relative_to(ROOT / "pyrformer")


@installed_wheel
def test_no_other_top_level_name_is_installed(tmp_path: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('cli', 'cuda', 'tests') if u.find_spec(n)])"
    assert python(["-c", code], tmp_path).stdout == "[]\n"


def test_command_runs_from_another_directory(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("pyrformer")
    ran = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == f"pyrformer {pyrformer.__version__}\n"


@pytest.mark.parametrize("code", ["import pyrformer", "from pyrformer import *"])
def test_import_loads_no_command_line_and_no_peer(code: str, tmp_path: Path) -> None:
    """Start-up is paid by every script: what only some need is imported where it is needed."""
    ran = python(["-X", "importtime", "-c", code], tmp_path)
    lines = [line for line in ran.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "pyrformer._core" in modules
    assert "pyrformer.cli" not in modules
    unwanted = {
        "asyncio",
        "click",
        "cupy",
        "http",
        "rich",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    }
    assert not unwanted & {name.split(".")[0] for name in modules}


@pytest.mark.slow
def test_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    maturin = [sys.executable, "-m", "maturin"]
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([*maturin, "sdist", "--out", str(tmp_path)], cwd=ROOT, **run)
    (archive,) = tmp_path.glob("pyrformer-*.tar.gz")
    with tarfile.open(archive) as tar:
        # The archive's own times are years old; cargo would take what it compiled before for up to date.
        tar.extractall(
            tmp_path, filter=lambda m, path: tarfile.data_filter(m, path).replace(mtime=time.time())
        )
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    # The profile of the tests: its dependencies are compiled already.
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    build = [*maturin, "build", "--profile", "dev-fast", "--target-dir", target, "--out", str(tmp_path)]
    subprocess.run(build, cwd=source, **run)
    (rebuilt,) = tmp_path.glob("*.whl")
    assert contents(rebuilt) == contents(wheel)


def python(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter elsewhere."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
