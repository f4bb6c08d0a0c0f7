"""The one tree of errors. Knows nothing of the rest of the package.

MoshiSttError
├── ConfigError        a configuration file or a command line that cannot be used
├── CheckpointError    weights or a tokenizer that cannot be used
│   └── DownloadError  weights that cannot be had
├── AudioError         bytes that are no audio this program can decode
├── ProtocolError      a message that is not of the protocol (carries the WebSocket close code)
├── EngineError        the engine cannot serve
│   ├── NoFreeSlot     every slot is taken
│   └── EngineFailed   a model step failed; nothing more comes from this engine
├── SpoolError         audio that came ahead of recognition cannot be kept
└── ServerError        a client-side view: the server refused or ended the session

A message says what came, what was expected and what to do.
"""


class MoshiSttError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MoshiSttError):
    """A configuration file or a command line that cannot be used."""


class CheckpointError(MoshiSttError):
    """Weights or a tokenizer that cannot be used."""


class DownloadError(CheckpointError):
    """Weights that cannot be had."""


class AudioError(MoshiSttError):
    """Bytes that are no audio this program can decode."""


class ProtocolError(MoshiSttError):
    """A message that is not of the protocol.

    `close_code` is the WebSocket status to close with (RFC 6455 section 7.4.1).
    """

    def __init__(self, message: str, close_code: int = 1007) -> None:
        super().__init__(message)
        self.close_code = close_code


class EngineError(MoshiSttError):
    """The engine cannot serve."""


class NoFreeSlot(EngineError):
    """Every slot is taken. The text is the one that existing clients know."""

    def __init__(self, message: str = "no free channels") -> None:
        super().__init__(message)


class EngineFailed(EngineError):
    """A model step failed; nothing more comes from this engine."""


class SpoolError(MoshiSttError):
    """Audio that came ahead of recognition cannot be kept."""


class ServerError(MoshiSttError):
    """The server refused or ended the session (client side)."""

    def __init__(self, message: str, close_code: int | None = None) -> None:
        super().__init__(message)
        self.close_code = close_code
