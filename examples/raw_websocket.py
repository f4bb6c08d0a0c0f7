"""The wire without our client: WebSocket and MessagePack, as any language can speak it. Reads 16-bit mono WAV at 24 kHz.

pip install websockets msgpack numpy
python examples/raw_websocket.py RECORDING.wav [ws://127.0.0.1:8080]
"""

import asyncio
import sys
import wave

import msgpack
import numpy as np
import websockets

CHUNK = 1_920  # 80 ms at 24 kHz


async def send(socket: websockets.ClientConnection, pcm: np.ndarray) -> None:
    """The recording, then a marker."""
    for start in range(0, len(pcm), CHUNK):
        message = {"type": "Audio", "pcm": pcm[start : start + CHUNK].tolist()}
        await socket.send(msgpack.packb(message, use_single_float=True))
    await socket.send(msgpack.packb({"type": "Marker", "id": 0}))


async def main(path: str, url: str = "ws://127.0.0.1:8080") -> None:
    with wave.open(path) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (24_000, 1, 2):
            sys.exit(f"{path} is not 16-bit mono at 24 kHz")
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32_768
    headers = {"kyutai-api-key": "public_token"}
    # A server that is still busy with earlier audio answers pings late: do not give up on it (ping_timeout).
    async with websockets.connect(f"{url}/api/asr-streaming", additional_headers=headers, ping_timeout=None) as socket:
        sending = asyncio.create_task(send(socket, pcm))  # read while you write, or both sides may wait for each other
        async for data in socket:
            event = msgpack.unpackb(data)
            if event["type"] == "Word":
                print(f"{event['start_time']:7.2f}  {event['text']}", flush=True)
            elif event["type"] == "Error":
                sys.exit(f"Error: {event['message']}")
            elif event["type"] == "Marker":
                break
        await sending


if len(sys.argv) not in (2, 3):
    sys.exit(__doc__)
try:
    asyncio.run(main(*sys.argv[1:]))
except (OSError, EOFError, wave.Error, websockets.WebSocketException) as error:
    sys.exit(f"Error: {error or type(error).__name__}")
except KeyboardInterrupt:
    sys.exit(130)
