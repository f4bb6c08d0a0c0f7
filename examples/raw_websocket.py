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


async def main(path: str, url: str = "ws://127.0.0.1:8080") -> None:
    with wave.open(path) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32_768
    headers = {"kyutai-api-key": "public_token"}
    async with websockets.connect(f"{url}/api/asr-streaming", additional_headers=headers) as socket:
        for start in range(0, len(pcm), 1_920):
            message = {"type": "Audio", "pcm": pcm[start : start + 1_920].tolist()}
            await socket.send(msgpack.packb(message, use_single_float=True))
        await socket.send(msgpack.packb({"type": "Marker", "id": 0}))
        async for data in socket:
            event = msgpack.unpackb(data)
            if event["type"] == "Word":
                print(f"{event['start_time']:7.2f}  {event['text']}")
            elif event["type"] == "Marker":
                break


asyncio.run(main(*sys.argv[1:]))
