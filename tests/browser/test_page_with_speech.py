"""The page on the real server with the embedded model: real speech by a fake microphone, a cut connection, a long file."""

import asyncio
import contextlib
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from tests.browser.conftest import Browsers
from tests.browser.test_page_in_chromium import text_of, wait_for
from tests.support.worker_process import embedded_worker

from moshi_stt.sample import sample_path

pytestmark = pytest.mark.timeout(900)


class Cuttable:
    """A TCP relay whose connections a test can break."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, back}

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while data := await source.read(1 << 16):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))
        self._writers -= {writer, back}

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


def spoken(times: int, folder: Path) -> Path:
    """The sample so often in a row, as a WAV file."""
    with wave.open(str(sample_path())) as file:
        parameters, frames = file.getparams(), file.readframes(file.getnframes())
    path = folder / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams(parameters)
        file.writeframes(frames * times)
    return path


def normal(text: str) -> list[str]:
    return re.findall(r"[a-z']+", re.sub(r"\d+:\d\d", " ", text).lower())


async def test_speech_turns_from_grey_to_black_and_a_cut_connection_costs_no_word(browsers: Browsers, tmp_path: Path) -> None:
    speech = spoken(2, tmp_path)
    async with embedded_worker() as (port, _):
        relay = Cuttable(port)
        server = await asyncio.start_server(relay.relay, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        page = await browsers.page(microphone=speech)
        await page.goto(address)
        await wait_for(page, "document.getElementById('languages').textContent.includes('English only')")
        await page.click("#record")
        await wait_for(page, "Boolean(document.querySelector('.interim')?.textContent)")
        await wait_for(page, "document.getElementById('transcript').textContent.includes('matter')")
        assert re.fullmatch(r"\d+\.\d s behind", await text_of(page, "#lag"))
        relay.cut()
        await wait_for(page, "(document.getElementById('transcript').textContent.match(/better/g) || []).length === 2")
        await page.click("#record")
        await wait_for(page, "document.getElementById('state').textContent === 'Done.'")
        said = normal(await text_of(page, "#transcript"))
        once = ["ever", "tried", "ever", "failed", "no", "matter", "try", "again", "fail", "again", "fail", "better"]
        assert said == once * 2
        server.close()
    assert [problem for problem in browsers.problems if "WebSocket" not in problem and "ERR_" not in problem] == []


async def test_a_ten_minute_file_is_uploaded_with_progress(browsers: Browsers, tmp_path: Path) -> None:
    with wave.open(str(sample_path())) as file:
        seconds = file.getnframes() / file.getframerate()
    times = int(np.ceil(600 / seconds))
    speech = spoken(times, tmp_path)
    async with embedded_worker() as (port, _):
        page = await browsers.page()
        await page.goto(f"http://127.0.0.1:{port}/")
        await page.set_input_files("#file", str(speech))
        seen: set[str] = set()
        async with asyncio.timeout(600):
            for _ in range(100_000):
                shown = await page.evaluate("document.querySelector('#files li .quiet')?.textContent ?? ''")
                seen.add(re.sub(r"[\d.:]+", "N", shown))
                if await page.evaluate("document.getElementById('state').textContent === 'Done.'"):
                    break
                await asyncio.sleep(0.05)
        assert "transcribing, N" in seen
        said = normal(await text_of(page, "#transcript"))
        assert said.count("better") >= times - 2
        assert await text_of(page, "#error") == ""
