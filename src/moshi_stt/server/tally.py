"""What one stream came to, for the single line that the log has of it. Neither audio nor words are in it."""

from dataclasses import dataclass

from moshi_stt.constants import SAMPLE_RATE


@dataclass
class Tally:
    """Counts of one connection. started: time of its clock."""

    door: str
    started: float
    samples: int = 0
    words: int = 0
    markers: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    most_waiting_samples: int = 0
    code: int | None = None
    """Status that it was closed with; None where the socket was lost without a Close."""
    reason: str = ""

    def line(self, now: float) -> str:
        """`key=value` pairs."""
        pairs = {
            "door": self.door,
            "seconds": f"{now - self.started:.1f}",
            "audio_seconds": f"{self.samples / SAMPLE_RATE:.1f}",
            "words": self.words,
            "markers": self.markers,
            "lag_seconds": f"{self.most_waiting_samples / SAMPLE_RATE:.2f}",
            "received_bytes": self.received_bytes,
            "sent_bytes": self.sent_bytes,
            "code": "lost" if self.code is None else self.code,
            "reason": f'"{self.reason}"',
        }
        return " ".join(f"{key}={value}" for key, value in pairs.items())
