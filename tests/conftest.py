"""Fixtures that tests of several folders use."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("MOSHI_STT_SHARED") or Path(__file__).parents[2] / "shared")
"""Recordings, audio and the contract, which are not part of the repository."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens and audio; a test that asks for it is skipped where there is none."""
    if not (SHARED / "goldens").is_dir():
        pytest.skip(f"no goldens: {SHARED} is not there (set MOSHI_STT_SHARED)")
    return SHARED
