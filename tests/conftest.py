"""Fixtures that tests of several folders use."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.checkpoints import Checkpoint, save, shared_checkpoint, small_spec, small_tensors

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background: programs that tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup: likewise
    signal.signal(signal.SIGHUP, lambda *_: None)  # a handler, unlike SIG_IGN, ends with exec, and still keeps pytest alive

SHARED = Path(os.environ.get("MOSHI_STT_SHARED") or Path(__file__).parents[2] / "shared")
"""Recordings, audio and the contract, which are not part of the repository."""


SLOW = {
    "test_advise.py", "test_cores.py", "test_embedded.py", "test_opus.py", "test_scripts.py", "test_segment_engine.py",
    "test_selftest.py", "test_stream_threads.py", "test_transcribe.py", "test_decode_pool.py", "test_archive.py", "test_cli.py",
    "test_mic.py", "test_chunking.py", "test_doors_agree.py", "test_drain.py", "test_engines.py", "test_engines_served.py",
    "test_http_upload.py", "test_install_model.py", "test_live_clients.py", "test_page.py", "test_processes.py",
    "test_protocol_fuzz.py", "test_resume.py", "test_serve_process.py", "test_takeover.py", "test_worker.py",
    "test_devices_served.py", "test_devices_load.py",
    "test_ws_flows.py", "test_ws_processes.py", "test_platforms.py", "test_commands_in_docs.py",
    "test_examples.py", "test_clients_doc.py", "test_protocol_doc.py", "test_ahead.py",
}  # fmt: skip
"""Files that start processes, load a model, or take more than some seconds: the second half of CI's default tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow files, so that `-m "not slow"` is the quick half."""
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def level_of_logging() -> Iterator[None]:
    """Commands that run in the test's own process set the root's level and add filters: the next test gets all as it was."""
    root = logging.getLogger()
    level = root.level
    filters = {name: list(each.filters) for name, each in _loggers()}
    yield
    root.setLevel(level)
    for name, each in _loggers():
        each.filters[:] = filters.get(name, [])


def _loggers() -> list[tuple[str, logging.Logger]]:
    named = list(logging.root.manager.loggerDict.items())
    return [(name, each) for name, each in named if isinstance(each, logging.Logger)]


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
