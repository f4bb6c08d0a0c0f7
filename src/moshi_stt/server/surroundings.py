"""What a connection has of the server around it, and what its sockets are told when it has left them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moshi_stt.config import LimitsConfig
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.spool import SpoolBudget

if TYPE_CHECKING:
    from moshi_stt.server.connection import Connection


@dataclass(frozen=True)
class Surroundings:
    """What a connection has of the server.

    lost: it is over. may_park: may it wait for its client to come back? watch: look for a disconnect while it is `unheard`.
    """

    limits: LimitsConfig
    metrics: Metrics
    spool: SpoolBudget
    may_park: Callable[["Connection"], bool]
    lost: Callable[["Connection"], None]
    watch: Callable[["Connection"], None]


def nobody(exc: Exception | None) -> None:
    """Is told, and does nothing."""


class AbandonedSocket(asyncio.Protocol):
    """The protocol of a socket that its connection has left for another."""

    def __init__(self, lost: "asyncio.Future[None]", told: Callable[[Exception | None], None]) -> None:
        self._lost = lost
        self._told = told

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_result(None)
        self._told(exc)
