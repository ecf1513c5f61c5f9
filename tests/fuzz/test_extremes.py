"""No number that a user gives ends the process, takes all memory, hangs or shows a traceback.

The short form puts five numbers into every option but those of configurations, and two into these; ``make torture`` all
of them into all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).resolve().parent / "extremes.py"
LONG = int(os.environ.get("PYRFORMER_TORTURE", "1")) > 1
#: Parts of the table, and the numbers of the short form.
PARTS = {
    "^config (gpt2|bert|xlnet|llama)": [-1, 1 << 63],
    "^config (?!gpt2|bert|xlnet|llama)": [1 << 64],
    "^(train|find)": [-1, (1 << 63) - 1],
    "^cli": [1 << 64],
    "^(?!config|train|find|cli)": [-1, 1 << 31, (1 << 63) - 1, 1 << 64, float("nan")],
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and signals of Linux")


@pytest.mark.parametrize("part", PARTS)
def test_any_number_is_taken_or_refused(tmp_path: Path, part: str) -> None:
    values = [] if LONG else [json.dumps(PARTS[part])]
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(tmp_path), part, *values],
        env={**os.environ, "PYRFORMER_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    print(part, {name: n for name, n in outcomes.items() if name != "findings"})  # noqa: T201 (shown with -s)
    assert outcomes["findings"] == []
    assert outcomes["refused"] > outcomes["calls"] // 4
