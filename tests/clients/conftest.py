"""A server with the embedded model, and real speech, for the clients that other people wrote."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from moshi_stt.audio.decode import read_file
from moshi_stt.config import WyomingConfig
from moshi_stt.config_load import embedded_config
from moshi_stt.engines import build_engines
from moshi_stt.sample import sample_path
from moshi_stt.server.app import Server

DEADLINE = 120.0
"""Seconds that a client may take; a busy machine is slow, a hanging client is not let hang."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What other people's packages warn of is not for us to mend."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """On 127.0.0.1, any free ports, with the embedded model and the public key."""
    config = msgspec.structs.replace(embedded_config(), wyoming=WyomingConfig(uri="tcp://127.0.0.1:0"))
    running = Server(config, build_engines(config), "127.0.0.1", 0)
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


@pytest.fixture
def http(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture
def ws(server: Server) -> str:
    return f"ws://127.0.0.1:{server.port}"


@pytest.fixture(scope="session")
def speech_file() -> Path:
    """About ten seconds of English with a pause between the sentences, from the embedded model's package."""
    return sample_path()


@pytest.fixture(scope="session")
def recording(speech_file: Path) -> bytes:
    """The file's bytes."""
    return speech_file.read_bytes()


@pytest.fixture(scope="session")
def pcm24(speech_file: Path) -> NDArray[np.int16]:
    """The same at 24 kHz, int16 (S,)."""
    return (read_file(speech_file) * 32_767).astype(np.int16)


SAID = "ever tried ever failed no matter try again fail again fail better"


def bare(text: str) -> str:
    """Lower case, no punctuation."""
    return " ".join("".join(letter for letter in text.casefold() if letter.isalnum() or letter.isspace()).split())
