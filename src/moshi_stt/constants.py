"""Numbers that everything else hangs on, each derived once and with its unit. Knows nothing of the rest of the package."""

from typing import Final

SAMPLE_RATE: Final = 24_000
"""Samples a second of every PCM array inside the program (mono float32)."""

FRAME_SAMPLES: Final = 1_920
"""Samples in one model frame."""

FRAME_RATE: Final = SAMPLE_RATE / FRAME_SAMPLES
"""Model frames a second: 12.5."""

FRAME_SECONDS: Final = FRAME_SAMPLES / SAMPLE_RATE
"""Seconds in one model frame: 0.08."""

DEFAULT_PATH: Final = "/api/asr-streaming"
"""Route that existing clients connect to."""

DEFAULT_PORT: Final = 8080

API_KEY_HEADER: Final = "kyutai-api-key"
API_KEY_QUERY: Final = "auth_id"
PUBLIC_KEY: Final = "public_token"
"""The key in Kyutai's published configurations, known to everybody."""

DEFAULT_URL: Final = f"ws://127.0.0.1:{DEFAULT_PORT}"
URL_VARIABLE: Final = "MOSHI_STT_URL"
KEY_VARIABLE: Final = "MOSHI_STT_KEY"
"""Where clients find the server and its key when they are given none."""
