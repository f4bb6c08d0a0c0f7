"""What a connection makes of an exception: what its client is told, how it is counted, and what the log says."""

import logging
from typing import NamedTuple

from moshi_stt.errors import EngineError, NoFreeSlot, ProtocolError, SpoolError
from moshi_stt.events import Error
from moshi_stt.server import framing

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """error: what the client is told. kind: label of the error count, None for what is not counted.

    drains: what was good before it is still transcribed and given.
    """

    error: Error
    kind: str | None
    drains: bool = False


def failure_of(error: BaseException, peer: str) -> Failure:
    """Log what has to be logged. peer: whose connection it was."""
    if isinstance(error, ProtocolError):
        log.info("%s: %s", peer, error)
        return Failure(Error(str(error), error.close_code), "malformed", drains=True)
    if isinstance(error, NoFreeSlot):
        return Failure(Error(str(error), framing.TRY_AGAIN), None)
    if isinstance(error, SpoolError):
        log.error("%s: %s", peer, error)
        return Failure(Error(str(error), framing.INTERNAL), "spool")
    if isinstance(error, EngineError):
        return Failure(Error(str(error), framing.INTERNAL), "engine")
    log.error("%s: the connection failed", peer, exc_info=error)
    return Failure(Error("the server failed on this connection; its log says why", framing.INTERNAL), "internal")
