"""Send a recording at the speed of speech and print each word as soon as the server has it.

python examples/live_words.py RECORDING [ws://127.0.0.1:8080]
"""

import asyncio
import sys

import numpy as np
from numpy.typing import NDArray

from moshi_stt import Client, read_file
from moshi_stt.errors import MoshiSttError
from moshi_stt.events import Marker, Word

CHUNK = 1_920  # 80 ms at 24 kHz


async def send(client: Client, pcm: NDArray[np.float32]) -> None:
    """As a microphone would: a chunk each 80 ms, then a marker."""
    for start in range(0, len(pcm), CHUNK):
        await client.send_audio(pcm[start : start + CHUNK])
        await asyncio.sleep(CHUNK / 24_000)
    await client.mark(0)


async def main(path: str, url: str | None = None) -> None:
    async with Client(url) as client:
        sending = asyncio.create_task(send(client, read_file(path)))
        async for event in client:
            if isinstance(event, Word):
                print(event.text, end=" ", flush=True)
            elif isinstance(event, Marker):  # everything sent before it has been transcribed
                print()
                break
        await sending


if len(sys.argv) not in (2, 3):
    sys.exit(__doc__)
try:
    asyncio.run(main(*sys.argv[1:]))
except (MoshiSttError, OSError) as error:
    sys.exit(f"Error: {error}")
except KeyboardInterrupt:
    sys.exit(130)
