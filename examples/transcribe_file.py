"""Transcribe a recording on a running server and print each word with its time as soon as it comes.

python examples/transcribe_file.py RECORDING [ws://127.0.0.1:8080]
"""

import sys

from moshi_stt import read_file, stream_words
from moshi_stt.errors import MoshiSttError

if len(sys.argv) not in (2, 3):
    sys.exit(__doc__)
path, url = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
try:
    for word in stream_words(read_file(path), url):  # any format; float32, mono, 24 kHz
        print(f"{word.start:7.2f}  {word.text}", flush=True)
except (MoshiSttError, OSError) as error:
    sys.exit(f"Error: {error}")
except KeyboardInterrupt:
    sys.exit(130)
