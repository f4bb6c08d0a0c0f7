"""G.711 (telephone audio, ITU-T G.711): bytes of μ-law and A-law to samples, by tables of 256 entries."""

import numpy as np
from numpy.typing import NDArray

_FULL_SCALE = np.float32(32_768)


def _mulaw_table() -> NDArray[np.float32]:
    code = ~np.arange(256, dtype=np.int32) & 0xFF
    exponent, mantissa = (code >> 4) & 7, code & 15
    magnitude = (((mantissa << 3) + 0x84) << exponent) - 0x84
    return (np.where(code & 0x80, -magnitude, magnitude) / _FULL_SCALE).astype(np.float32)


def _alaw_table() -> NDArray[np.float32]:
    code = np.arange(256, dtype=np.int32) ^ 0x55
    exponent, mantissa = (code >> 4) & 7, code & 15
    magnitude = np.where(exponent == 0, (mantissa << 4) + 8, ((mantissa << 4) + 0x108) << np.maximum(exponent - 1, 0))
    return (np.where(code & 0x80, magnitude, -magnitude) / _FULL_SCALE).astype(np.float32)


MULAW = _mulaw_table()
"""float32 (256,): the sample of each μ-law byte, in [-1, 1]."""
ALAW = _alaw_table()
"""float32 (256,): the sample of each A-law byte, in [-1, 1]."""


def decode(data: bytes, table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bytes to float32 (S,), by `MULAW` or `ALAW`."""
    samples: NDArray[np.float32] = table[np.frombuffer(data, np.uint8)]
    return samples
