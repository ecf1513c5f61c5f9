"""Whatever happens to a run, it goes on to the bits of one that nothing happened to.

``PYRFORMER_TORTURE`` multiplies the number of cases (``make torture``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import OBJECTIVES

HERE = Path(__file__).resolve().parent
MUCH = int(os.environ.get("PYRFORMER_TORTURE", "1"))
#: Of each objective.
CASES = {"kills": 3, "faults": 8, "damage": 2}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc of Linux")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``faults.c``, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", out, HERE / "faults.c", "-ldl"], check=True)
    return out


@pytest.mark.parametrize("kind", CASES)
def test_torture(library: Path, tmp_path: Path, kind: str) -> None:
    cases = CASES[kind] * MUCH
    seed = os.environ.get("PYRFORMER_TORTURE_SEED", "1")
    done = subprocess.run(
        [sys.executable, HERE / "torture.py", tmp_path, kind, str(cases), seed],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    print(kind, outcomes)  # noqa: T201 (the figures of docs/reliability.md, with -s)
    # A run has so many file operations, each of which fails in four ways.
    places = outcomes.pop("places that can fail", len(OBJECTIVES) * cases)
    assert sum(outcomes.values()) >= min(places, len(OBJECTIVES) * cases)
