"""The parts of the browser page that can be run without a browser, by Node where there is one."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.raw_ws import RawClient
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import KEY, Running, serving, until

from moshi_stt import protocol
from moshi_stt.events import EndWord, Error, Marker, Ready, Step, Word
from moshi_stt.server.static import PACKAGED

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node: the page's scripts are not run")


def run(script: str) -> Any:
    """What the script prints, as JSON."""
    assert NODE is not None
    done = subprocess.run(
        [NODE, "--input-type=module", "-"], input=script, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def module(name: str) -> str:
    return json.dumps((PACKAGED / name).as_uri())


def test_page_encodes_what_the_server_decodes() -> None:
    """Audio of every value that a microphone gives, and a marker."""
    audio, empty, marker = run(f"""
        import {{ encodeAudio, encodeMarker }} from {module("messagepack.js")};
        const hex = (buffer) => Buffer.from(buffer).toString("hex");
        const audio = (...samples) => hex(encodeAudio(Float32Array.from(samples)));
        console.log(JSON.stringify([audio(0, 0.5, -0.25, 1e-9), audio(), hex(encodeMarker(7))]));
    """)
    decoded = protocol.decode(bytes.fromhex(audio))
    assert isinstance(decoded, protocol.Audio)
    np.testing.assert_array_equal(decoded.pcm, np.float32([0, 0.5, -0.25, 1e-9]))
    silence = protocol.decode(bytes.fromhex(empty))
    assert isinstance(silence, protocol.Audio)
    assert len(silence.pcm) == 0
    assert protocol.decode(bytes.fromhex(marker)) == protocol.MarkerRequest(7)


def test_page_decodes_every_message_of_the_server() -> None:
    events = [
        Ready(),
        Step(70_000, (0.5, 0.25, 0.125, 1.0), 480_000),
        Word("hé" * 40, 1.04),
        EndWord(2.0),
        Marker(-33),
        Marker(1 << 40),
        Error("x" * 300),
    ]
    messages = [protocol.encode(event).hex() for event in events]
    decoded = run(f"""
        import {{ decode }} from {module("messagepack.js")};
        const messages = {json.dumps(messages)};
        console.log(JSON.stringify(messages.map((hex) => decode(Uint8Array.from(Buffer.from(hex, "hex")).buffer))));
    """)
    assert decoded == [
        {"type": "Ready"},
        {"type": "Step", "step_idx": 70_000, "prs": [0.5, 0.25, 0.125, 1.0], "buffered_pcm": 480_000},
        {"type": "Word", "text": "hé" * 40, "start_time": 1.04},
        {"type": "EndWord", "stop_time": 2.0},
        {"type": "Marker", "id": -33},
        {"type": "Marker", "id": 1 << 40},
        {"type": "Error", "message": "x" * 300},
    ]


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000, 96_000])
def test_page_resamples_any_rate(rate: int) -> None:
    """A tone keeps its place and height, one that 24 kHz cannot carry is gone, and the cut of the input does not matter."""
    tone, alias, cut = run(f"""
        import {{ Resampler }} from {module("capture.js")};
        const sound = (hz) => Float32Array.from({{ length: {rate} / 4 }}, (_, i) => Math.sin(2 * Math.PI * hz * i / {rate}));
        const whole = (pcm, piece) => {{
          const out = [], resampler = new Resampler({rate}), add = (sample) => out.push(sample);
          for (let at = 0; at < pcm.length; at += piece) resampler.feed(pcm.subarray(at, at + piece), add);
          return out;
        }};
        console.log(JSON.stringify([whole(sound(1000), 1e9), whole(sound(15000), 1e9), whole(sound(1000), 128)]));
    """)
    expected = np.sin(2 * np.pi * 1000 * np.arange(len(tone)) / 24_000)
    assert len(tone) > 5_800
    assert np.abs(np.array(tone) - expected)[50:].max() < 0.01
    if rate > 30_000:
        assert np.abs(np.array(alias))[50:].max() < 0.02
    np.testing.assert_allclose(cut, tone, atol=1e-9)


async def browse(running: Running, key: str, seconds: float, source: str = "file") -> dict[str, Any]:
    """What the page shows after a file was dropped on it, or the microphone was used, in a stand-in for a browser."""
    script = Path(__file__).parents[1] / "support" / "fake_browser.mjs"
    assert NODE is not None
    process = await asyncio.create_subprocess_exec(
        *(
            NODE,
            "--no-warnings",
            "--experimental-websocket",
            str(script),
            str(PACKAGED),
            running.http,
            key,
            str(seconds),
            source,
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, errors.decode()
    shown: dict[str, Any] = json.loads(output)
    return shown


def has_websocket() -> bool:
    """Node has a WebSocket of its own from 20.10 on."""
    if NODE is None:
        return False
    arguments = [NODE, "--no-warnings", "--experimental-websocket", "-p", "typeof WebSocket"]
    return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout.strip() == "function"


@pytest.mark.skipif(not has_websocket(), reason="no node with a WebSocket")
@pytest.mark.parametrize("source", ["file", "microphone"])
async def test_page_shows_the_words(source: str) -> None:
    """Its own session against the real server, to the last word; what was said before the server was ready is not lost."""
    engine = ScriptedEngine(counting(20), delay_frames=6)
    async with serving(engine) as running:
        shown = await browse(running, KEY, 4.0, source)
    assert shown["error"] == ""
    assert (shown["state"], shown["microphones"]) == ("Done.", 0)
    assert shown["words"] == [f"w{i}" for i in range(20)]
    assert shown["server"] == "scripted on cpu, language: en; 0 of 4 places taken"
    assert engine.samples == [4 * 24_000]


@pytest.mark.skipif(not has_websocket(), reason="no node with a WebSocket")
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("wrong key", "The server refused the connection. Is the key right?"),
        ("full", "Every place on the server is taken."),
        ("failing", "The model failed: the device is gone."),
    ],
)
async def test_page_says_in_plain_words_what_is_wrong(case: str, said: str) -> None:
    engine = ScriptedEngine(slots=1)
    async with serving(engine) as running:
        if case == "full":
            async with await RawClient.connect(running.port) as client:
                await client.receive_event()
                shown = await browse(running, KEY, 1.0)
        elif case == "failing":
            engine.hold()
            browsing = asyncio.create_task(browse(running, KEY, 1.0))
            await until(lambda: engine.used_slots == 1)
            engine.release_failing("the device is gone")
            shown = await browsing
        else:
            shown = await browse(running, "wrong", 1.0)
    assert shown["error"].startswith(said)
