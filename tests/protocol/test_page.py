"""The parts of the browser page that can be run without a browser, by Node where there is one."""

import asyncio
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import serving

from moshi_stt import Client, protocol
from moshi_stt.engine.commands import Audio, Mark
from moshi_stt.events import EndWord, Error, Marker, Ready, Step, Word
from moshi_stt.server.static import PACKAGED
from moshi_stt.text import subtitles
from moshi_stt.text.subtitles import TimedWord

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


def support(name: str) -> str:
    return json.dumps((Path(__file__).parents[1] / "support" / name).as_uri())


def test_page_encodes_what_the_server_decodes() -> None:
    """Audio of every value that a microphone gives, and a marker."""
    audio, empty, marker = run(f"""
        import {{ encodeAudio, encodeMarker }} from {module("messagepack.js")};
        const hex = (buffer) => Buffer.from(buffer).toString("hex");
        const audio = (...samples) => hex(encodeAudio(Float32Array.from(samples)));
        console.log(JSON.stringify([audio(0, 0.5, -0.25, 1e-9), audio(), hex(encodeMarker(7))]));
    """)
    decoded = protocol.decode(bytes.fromhex(audio))
    assert isinstance(decoded, Audio)
    np.testing.assert_array_equal(decoded.samples, np.float32([0, 0.5, -0.25, 1e-9]))
    silence = protocol.decode(bytes.fromhex(empty))
    assert isinstance(silence, Audio)
    assert len(silence.samples) == 0
    assert protocol.decode(bytes.fromhex(marker)) == Mark(7)


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


def spoken(seed: int) -> list[TimedWord]:
    """Words as models give them: sentences, clauses, pauses, quotes, long and odd words, times that touch."""
    rng = random.Random(seed)
    ends = ["", "", "", "", ",", ".", "?", ';"', ".”", "…"]
    bodies = ["a", "the", "<b>", "of", "times", "incredulity", "naïve", "-->", "x" * 50, "R&D", "😀", "two  words", " "]
    at, words = 0.0, []
    for _ in range(rng.randrange(0, 120)):
        at += rng.choice([0.0, 0.01, 0.1, 0.3, 0.9, 2.5])
        end = at + rng.choice([0.0, 0.08, 0.25, 0.6, 3.0])
        words.append(TimedWord(rng.choice(bodies) + rng.choice(ends), round(at, 3), round(end, 3)))
        at = end
    return words


def test_page_saves_the_same_files_as_the_command() -> None:
    """Text, SRT and WebVTT equal to the byte, JSON to the value, over 200 seeded transcripts."""
    transcripts = [spoken(seed) for seed in range(200)]
    given = [[{"text": word.text, "start": word.start, "end": word.end} for word in words] for words in transcripts]
    saved = run(f"""
        import {{ FORMATS }} from {module("subtitles.js")};
        const all = {json.dumps(given)};
        const kinds = ["txt", "srt", "vtt", "json"];
        console.log(JSON.stringify(all.map((words) => kinds.map((kind) => FORMATS[kind].format(words)))));
    """)
    for words, (text, srt, vtt, document) in zip(transcripts, saved, strict=True):
        assert text == subtitles.format_text(words)
        assert srt == subtitles.format_srt(words)
        assert vtt == subtitles.format_vtt(words)
        assert json.loads(document) == json.loads(subtitles.format_json(words))


def test_page_keeps_cues_in_order_over_several_recordings_and_speakers() -> None:
    """A second recording begins after the first; two speakers at once each keep their cues."""
    words, srt = run(f"""
        import {{ Transcript }} from {module("transcript.js")};
        import {{ formatSrt }} from {module("subtitles.js")};
        const transcript = new Transcript();
        const first = transcript.begin();
        first.add({{ text: "One", start: 1, end: 1.5 }});
        first.add({{ text: "two.", start: 5, end: 5.68 }});
        first.lasted(7);
        const offset = transcript.end;
        const you = transcript.begin({{ speaker: "You", offset }});
        const tab = transcript.begin({{ speaker: "Tab", offset }});
        tab.add({{ text: "Hello", start: 1, end: 1.4 }});
        you.add({{ text: "Three", start: 0.2, end: null }});
        tab.add({{ text: "there.", start: 1.5, end: 2 }});
        console.log(JSON.stringify([transcript.words.map((word) => [word.text, word.start]), formatSrt(transcript.words)]));
    """)
    assert words == [["One", 1], ["two.", 5], ["Three", 7.2], ["Hello", 8], ["there.", 8.5]]
    assert "Tab: Hello there." in srt
    assert "You: Three" in srt
    stamps = re.findall(r"(\S+) --> (\S+)", srt)
    flat = [stamp for pair in stamps for stamp in pair]
    assert flat == sorted(flat)


@pytest.mark.parametrize("resumes", [True, False])
def test_page_loses_no_word_and_says_none_twice_when_connections_break(resumes: bool) -> None:
    """Connections break at any moment, connecting fails at times, and the server forgets its streams: 30 seeded sessions."""
    outcomes = run(f"""
        import {{ sessions }} from {support("page_sessions.mjs")};
        console.log(JSON.stringify(await sessions({module("")}, {json.dumps(resumes)}, 30)));
    """)
    for outcome in outcomes:
        assert outcome["words"] == [f"w{i}" for i in range(200 * 1920 // 12_000)]
        np.testing.assert_allclose(outcome["starts"], [i * 0.5 for i in range(32)], atol=1e-6)
        assert (outcome["ended"], outcome["problem"]) == (1, None)
    assert max(outcome["connects"] for outcome in outcomes) > 10


def test_page_gives_up_where_trying_again_cannot_help() -> None:
    """Before the first Ready, and after a violation of the protocol, the reason is told at once."""
    endings = run(f"""
        import {{ endings }} from {support("page_sessions.mjs")};
        console.log(JSON.stringify(await endings({module("")})));
        process.exit(0);
    """)
    assert endings == {
        "refused": 1006,
        "full": 1013,
        "violation": 1008,
        "lost": "tries again",
        "shutting down": "tries again",
    }


async def test_page_says_why_a_connection_was_refused() -> None:
    """A wrong path used to be answered with a question about the key. The same for a wrong key, a full server, and none."""

    async def reason(port: int, path: str, key: str) -> Any:
        return await asyncio.to_thread(
            run,
            f"""
            globalThis.document = {{ baseURI: "http://127.0.0.1:{port}/" }};
            const {{ whyRefused }} = await import({module("server.js")});
            console.log(JSON.stringify(await whyRefused({json.dumps(path)}, {json.dumps(key)})));
            """,
        )

    async with serving(ScriptedEngine(counting(1), slots=1)) as running:
        wrong_path = await reason(running.port, "/api/asr-steaming", "public_token")
        assert wrong_path == (
            "The server has no path /api/asr-steaming. It serves /api/asr-streaming: choose one in the settings."
        )
        assert "does not accept this key" in await reason(running.port, "/api/asr-streaming", "wrong")
        async with Client(running.ws) as client:
            assert isinstance(await anext(aiter(client)), Ready)
            assert "All streams of the server are in use" in await reason(running.port, "/api/asr-streaming", "public_token")
        port = running.port
    assert await reason(port, "/api/asr-streaming", "public_token") == "The server does not answer. Is it running?"


def test_page_warns_of_sound_that_is_too_quiet_or_too_loud() -> None:
    verdicts = run(f"""
        import {{ Level }} from {module("sound.js")};
        const after = (amplitude, frames) => {{
          const level = new Level();
          let last;
          for (let i = 0; i < frames; i++) last = level.feed(new Float32Array(1920).fill(amplitude));
          return last.verdict;
        }};
        console.log(JSON.stringify([after(0.1, 200), after(0.0001, 200), after(0.0001, 20), after(1, 40)]));
    """)
    assert verdicts == ["", "too quiet", "", "too loud"]


def test_page_has_no_inline_script_or_style_and_no_other_host() -> None:
    """So that the strict Content-Security-Policy holds, and the page works without the internet."""
    page = (PACKAGED / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", page) == []
    for file in PACKAGED.iterdir():
        if file.suffix in (".js", ".css", ".html"):
            assert re.findall(r"https?://(?!www\.w3\.org|localhost)[a-z]", file.read_text()) == [], file.name
