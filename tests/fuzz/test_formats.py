"""Files with something wrong are refused in one sentence: no panic, no other exception, no hang, no huge allocation.

``PYRFORMER_TORTURE`` multiplies the number of cases (``make torture``), ``PYRFORMER_FUZZ_FILES`` sets it (``make
fuzz``); ``PYRFORMER_TORTURE_SEED`` gives others.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).resolve().parent / "fuzz.py"
TARGETS = re.findall(
    r'^    "(\w+)": \w+(?:\(.*\))?,$', RUNNER.read_text("utf-8").partition("TARGETS:")[2], re.MULTILINE
)
CASES = int(os.environ.get("PYRFORMER_FUZZ_FILES", 120 * int(os.environ.get("PYRFORMER_TORTURE", "1"))))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and signals of Linux")


def test_the_targets_are_found() -> None:
    assert len(TARGETS) == 20


@pytest.mark.parametrize("target", TARGETS)
def test_changed_files(tmp_path: Path, target: str) -> None:
    if target == "parquet":
        pytest.importorskip("pyarrow")
    seed = os.environ.get("PYRFORMER_TORTURE_SEED", "1")
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(tmp_path), target, str(CASES), seed],
        env={**os.environ, "PYRFORMER_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    at = (tmp_path / "seed").read_text("ascii") if (tmp_path / "seed").exists() else "none"
    assert done.returncode == 0, f"seed and case {at}: {done.stderr[-3000:]}"
    outcomes = json.loads(done.stdout.splitlines()[-1])
    print(target, outcomes)  # noqa: T201 (the figures of docs/reliability.md, with -s)
    assert outcomes["read"] + outcomes["refused"] >= CASES
    assert outcomes["refused"] > 0
