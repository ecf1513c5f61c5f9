"""Where the reference results are, and how tests that need them say that they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

#: The checkout: tests run from elsewhere, against the installed wheel.
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of reference results, beside the checkout or where PYRFORMER_FIXTURES says."""
    folder = Path(os.environ.get("PYRFORMER_FIXTURES", ROOT.parent / "shared" / "fixtures"))
    if not folder.is_dir():
        pytest.skip(f"no reference results at {folder}")
    return folder
