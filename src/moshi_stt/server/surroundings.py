"""What a connection has of the server around it."""

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
