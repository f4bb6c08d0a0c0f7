"""docs/protocol.md: its client runs as printed, and the bytes it shows are the ones we send."""

import asyncio
import re
import sys
from pathlib import Path

from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import DEADLINE, serving

from moshi_stt.events import AnyEvent, EndWord, Error, Marker, Ready, Step, Word
from moshi_stt.protocol import encode, encode_audio

DOC = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


async def test_printed_client_transcribes() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    async with serving(ScriptedEngine(counting(5), delay_frames=6)) as running:
        code, count = re.subn(r"ws://127\.0\.0\.1:8080/\S+(?=\")", running.ws, code)
        assert count == 1
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        async with asyncio.timeout(DEADLINE):
            output, _ = await process.communicate()
    assert (process.returncode, output.decode().split()) == (0, ["w0", "w1", "w2", "w3", "w4"])


def test_printed_bytes_are_sent() -> None:
    printed = {bytes.fromhex(row) for row in re.findall(r"\| `([0-9a-f]{2} a474797065 [0-9a-f ]+)` \|", DOC)}
    events: list[AnyEvent] = [Ready(), Step(3, (0.5, 0.25, 1e-5, 1.0), 22_080), Word("hé", 1.04), EndWord(2.0), Marker(128)]
    assert printed == {*map(encode, events), encode(Error("no free channels")), encode_audio([0.5, -0.25])}
