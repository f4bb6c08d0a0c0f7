"""Why a POST request cannot be answered as asked."""

from moshi_stt.server.doors.door import RefusalKind


class Fault(Exception):
    """status: where it is not the usual one of the kind. The door writes the answer."""

    def __init__(self, kind: RefusalKind, sentence: str, status: int | None = None) -> None:
        super().__init__(sentence)
        self.kind = kind
        self.sentence = sentence
        self.status = status
