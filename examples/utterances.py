"""Print what is said, an utterance at a time: where a voice agent would answer.

python examples/utterances.py RECORDING [ws://127.0.0.1:8080]
"""

import sys

from moshi_stt import read_file, stream_utterances
from moshi_stt.errors import MoshiSttError

if len(sys.argv) not in (2, 3):
    sys.exit(__doc__)
path, url = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
try:
    for utterance in stream_utterances(read_file(path), url):
        print(f"{utterance.start:7.2f} to {utterance.end:.2f}  {utterance.text}", flush=True)
except (MoshiSttError, OSError) as error:
    sys.exit(f"Error: {error}")
except KeyboardInterrupt:
    sys.exit(130)
