"""Fixtures that tests of several folders use."""

import os
import signal
from pathlib import Path

import pytest
from tests.support.checkpoints import Checkpoint, save, shared_checkpoint, small_spec, small_tensors

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background: programs that tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(os.environ.get("MOSHI_STT_SHARED") or Path(__file__).parents[2] / "shared")
"""Recordings, audio and the contract, which are not part of the repository."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens and audio; a test that asks for it is skipped where there is none."""
    if not (SHARED / "goldens").is_dir():
        pytest.skip(f"no goldens: {SHARED} is not there (set MOSHI_STT_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small random model."""
    spec = small_spec()
    return save(tmp_path_factory.mktemp("small"), spec, *small_tensors(spec))


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Path:
    """Folder of the checkpoint `tiny` that the recorded sessions were made on."""
    return shared_checkpoint("tiny", shared)
