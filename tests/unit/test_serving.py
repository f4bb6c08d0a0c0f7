"""A server inside a program: it serves while its block runs, by a configuration, a name or nothing."""

import asyncio
import json
import urllib.request

import pytest
from tests.support.written import Reader

import moshi_stt
from moshi_stt import serving
from moshi_stt.config import ServerConfig
from moshi_stt.config_load import embedded_config, load_config
from moshi_stt.errors import ConfigError


@pytest.mark.parametrize("config", [None, "embedded", embedded_config()], ids=["none", "name", "loaded"])
async def test_it_serves_while_the_block_runs(config: ServerConfig | str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[ServerConfig, bool]] = []

    def build(config: ServerConfig, *, force_cpu: bool = False) -> dict[str, Reader]:
        asked.append((config, force_cpu))
        return {module.name: Reader() for module in config.modules}

    monkeypatch.setattr(serving, "build_engines", build)

    def health(port: int) -> object:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=20) as answer:
            return json.load(answer)["status"]

    async with moshi_stt.Server(config, port=0, force_cpu=True) as server:
        assert await asyncio.to_thread(health, server.port) == "ready"
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)
    assert asked == [(load_config("embedded").config, True)]


def test_a_name_that_is_none_is_said() -> None:
    with pytest.raises(ConfigError, match="no shipped configuration of that name"):
        moshi_stt.Server("stt-9b")
