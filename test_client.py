# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.11",
#     "av>=14",
#     "msgpack>=1.1",
#     "numpy>=1.26",
# ]
# ///
"""Send a recording to a speech-to-text server and print what comes back: `uv run test_client.py FILE`.

Stands alone: it imports nothing of moshi-stt, so that it is also an example of the protocol. It does what Kyutai's own
client does: a second of silence, the recording in messages of 80 ms, some silence, a marker, more silence; and it reads
until the marker comes back. Works with moshi-stt and with moshi-server.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

import aiohttp
import av
import msgpack
import numpy as np

SAMPLE_RATE = 24_000
CHUNK_SAMPLES = 1_920  # 80 ms, one step of the model
PING_SECONDS = 5.0  # moshi-server closes clients from which nothing came for 20 s
LATE_SILENCE_SECONDS = 5.0  # and those that sent no audio for 120 s


class ClientError(Exception):
    """What is printed behind `Error:`."""


def load_audio(path: str) -> np.ndarray:
    """Any audio file to float32 samples, mono, 24 kHz."""
    resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE)
    pieces = []
    try:
        with av.open(path) as container:
            if not container.streams.audio:
                raise ClientError(f"{path} has no audio track")
            for frame in container.decode(audio=0):
                pieces += [converted.to_ndarray()[0] for converted in resampler.resample(frame)]
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClientError(f"{path} cannot be read: {reason}") from None
    pieces += [converted.to_ndarray()[0] for converted in resampler.resample(None)]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def pack_audio(pcm: np.ndarray) -> bytes:
    return msgpack.packb({"type": "Audio", "pcm": pcm.tolist()}, use_single_float=True)


async def receive_messages(socket: aiohttp.ClientWebSocketResponse, transcript: list[dict], steps: bool) -> bool:
    """Print what comes until the marker. Returns whether it came."""
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.BINARY:
            continue
        data = msgpack.unpackb(message.data, raw=False)
        kind = data["type"]
        if kind == "Step" and not steps:
            continue
        print("received:", data, flush=True)
        if kind == "Word":
            start = data["start_time"]
            transcript.append({"speaker": "SPEAKER_00", "text": data["text"], "timestamp": [start, start]})
        elif kind == "EndWord" and transcript:
            transcript[-1]["timestamp"][1] = data["stop_time"]
        elif kind == "Marker":
            print("Received marker, stopping stream.", flush=True)
            return True
        elif kind == "Error":
            raise ClientError(f"the server says: {data['message']}")
    print("Connection closed while receiving messages.", flush=True)
    return False


async def send_messages(socket: aiohttp.ClientWebSocketResponse, audio: np.ndarray, rtf: float) -> None:
    """Silence, the recording at rtf times its pace, silence, marker, silence; then now and then silence until cancelled."""
    await socket.send_bytes(pack_audio(np.zeros(SAMPLE_RATE)))
    start = time.monotonic()
    for first in range(0, len(audio), CHUNK_SAMPLES):
        await socket.send_bytes(pack_audio(audio[first : first + CHUNK_SAMPLES]))
        ahead = start + first / SAMPLE_RATE / rtf - time.monotonic()
        await asyncio.sleep(max(ahead, 0))
    await socket.send_bytes(pack_audio(np.zeros(CHUNK_SAMPLES * 5)))
    await socket.send_bytes(msgpack.packb({"type": "Marker", "id": 0}))
    for _ in range(35):
        await socket.send_bytes(pack_audio(np.zeros(CHUNK_SAMPLES)))
    while True:
        await asyncio.sleep(LATE_SILENCE_SECONDS)
        await socket.send_bytes(pack_audio(np.zeros(CHUNK_SAMPLES)))


async def send_pings(socket: aiohttp.ClientWebSocketResponse) -> None:
    while True:
        await asyncio.sleep(PING_SECONDS)
        await socket.ping()


async def stream_audio(url: str, api_key: str, audio: np.ndarray, rtf: float, steps: bool) -> list[dict]:
    """Returns the words with their times. Raises ClientError."""
    transcript: list[dict] = []
    async with aiohttp.ClientSession() as session:
        try:
            # max_msg_size and no heartbeat: neither a long answer nor a server that is busy may end the connection.
            socket = await session.ws_connect(url, headers={"kyutai-api-key": api_key}, max_msg_size=0)
        except aiohttp.WSServerHandshakeError as error:
            hint = " (wrong --api-key?)" if error.status == 401 else ""
            raise ClientError(f"{url} answered {error.status}{hint}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ClientError(f"{url} cannot be reached: {error}. Is the server running? Start it: scripts/start.sh") from None
        async with socket:
            sending = [asyncio.create_task(send_messages(socket, audio, rtf)), asyncio.create_task(send_pings(socket))]
            try:
                done = await receive_messages(socket, transcript, steps)
            finally:
                for task in sending:
                    task.cancel()
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await asyncio.gather(*sending, return_exceptions=True)
            if not done:
                raise ClientError(f"the server closed the connection (code {socket.close_code}) before the marker came back")
    return transcript


def sample_path() -> str:
    """What to send where no file is named: the Mac installer's recording, or the one that the server's install brings."""
    here = Path(__file__).parent
    places = [here / "data" / "bonjour.wav", Path("data") / "bonjour.wav"]
    places.append(here / "src" / "moshi_stt" / "data" / "speech" / "beckett.wav")
    for path in places:
        if path.is_file():
            return str(path)
    raise ClientError("no FILE named and no sample found: name a recording, for instance `uv run test_client.py speech.wav`")


def positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description="Send a recording to a speech-to-text server and print what comes back.")
    parser.add_argument("file", nargs="?", metavar="FILE", help="audio file of any common format (default: a sample)")
    parser.add_argument("--url", default="ws://127.0.0.1:8080", help="server (default %(default)s)")
    parser.add_argument("--api-key", default="public_token", help="default %(default)s")
    parser.add_argument("--rtf", type=positive, default=1000.0, help="times real time to send at (default %(default)g)")
    parser.add_argument("--steps", action="store_true", help="print Step messages too")
    parser.add_argument("--json", metavar="PATH", help="write the words with their times there")
    args = parser.parse_args()
    url = args.url.rstrip("/")
    if "/" not in url.split("://", 1)[-1]:
        url += "/api/asr-streaming"
    try:
        audio = load_audio(args.file or sample_path())
        transcript = asyncio.run(stream_audio(url, args.api_key, audio, args.rtf, args.steps))
    except ClientError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("exiting")
    print("Transcription:", " ".join(word["text"] for word in transcript))
    if args.json:
        Path(args.json).write_text(json.dumps(transcript, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
