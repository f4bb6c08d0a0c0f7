"""Transcribe a recording on a running server and print each word with its time.

python examples/transcribe_file.py RECORDING [ws://127.0.0.1:8080]
"""

import sys

from moshi_stt.audio.decode import read_file
from moshi_stt.client import transcribe

path, url = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "ws://127.0.0.1:8080"
for word in transcribe(url, read_file(path)):  # any format; float32, mono, 24 kHz
    print(f"{word.start:7.2f}  {word.text}")
