"""Who is let in: the origin of web pages, API keys, and how much one key or address may have open."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Container

from moshi_stt.config import LimitsConfig
from moshi_stt.origins import Origins, is_loopback, normal_origin
from moshi_stt.server.auth import Keys
from moshi_stt.server.descriptors import nearly_exhausted
from moshi_stt.server.doors.door import Handshake, HttpDoor
from moshi_stt.server.metrics import Metrics

log = logging.getLogger(__name__)

WRONG_KEY_SECONDS = 1.0
"""How long the answer to a wrong key takes."""

WRONG_KEYS_AT_ONCE = 16
"""Requests with a wrong key of one address that may wait for their answer; while so many wait, it gets no other answer."""

LOG_SECONDS = 60.0
"""How often wrong keys, and the pages of one origin, are logged."""

MOST_REMEMBERED = 10_000
"""Addresses and origins that are remembered for the log."""


EXHAUSTED = "the server has too many files and sockets open: try again later"
"""What clients are told then."""


class Gate:
    """The checks that every request to a door passes first, whatever the protocol. Used on the event loop alone."""

    def __init__(self, keys: Keys, limits: LimitsConfig, metrics: Metrics, now: Callable[[], float]) -> None:
        """now: seconds of a clock that never goes back."""
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._now = now
        self._pause: Callable[[float], Awaitable[None]] = asyncio.sleep
        self.is_private = False
        """Whether only this machine can connect, and nobody has configured a key of their own."""
        self.is_open = False
        """Whether every request has been let in already, by the process that passed it on."""
        self.origins = Origins(limits.allowed_origins)
        self._waiting: Counter[str] = Counter()
        self._wrong: Counter[str] = Counter()
        self._logged: dict[str, float] = {}
        """When what was logged last."""
        self._by_key: Counter[str] = Counter()
        self._by_address: Counter[str] = Counter()

    async def admit(self, door: HttpDoor, request: Handshake) -> None:
        """Check origin and key, and that there are descriptors. Raises Refused in the door's own shape; for a wrong key after a
        while.
        """
        if self._is_exhausted():
            raise door.refusal("full", EXHAUSTED)
        if self.is_open:
            return
        self._check_origin(door, request)
        address = request.address
        if self._waiting[address] >= WRONG_KEYS_AT_ONCE:
            self._metrics.refusals.labels("key_attempts").inc()
            raise door.refusal("busy", "too many requests with a wrong key came from this address: wait a second")
        if self.allows(door, door.key(request)):
            return
        self._metrics.refusals.labels("key").inc()
        self._note_wrong(address)
        self._waiting[address] += 1
        try:
            await self._pause(WRONG_KEY_SECONDS)
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]
        raise door.refusal("unauthorized", "the API key is missing or wrong")

    def allows(self, door: HttpDoor, key: str | None) -> bool:
        """Whether a request with this key, or with none, is let in. At the native door a key is always needed."""
        return self.is_open or (self.is_private and door.keyless_on_loopback) or self._keys.allow(key)

    def enter(self, door: HttpDoor, request: Handshake) -> "Entry":
        """Count a connection for its key and address. Raises Refused beyond their limits; close the entry at its end."""
        key, address = self._keys.digest(door.key(request)), request.address
        sentence = self._address_problem(address)
        if sentence is not None:
            raise door.refusal("busy", sentence)
        if self._by_key[key] >= self._limits.streams_per_key > 0:
            self._metrics.refusals.labels("key_limit").inc()
            sentence = f"{self._limits.streams_per_key} streams with this key are open (streams_per_key)"
            raise door.refusal("busy", sentence)
        return Entry(self, key, address)

    def enter_port(self, address: str) -> "Entry | str":
        """Count a connection of a protocol that has no requests and no keys; or why it is not served."""
        sentence = EXHAUSTED if self._is_exhausted() else self._address_problem(address)
        return Entry(self, "", address) if sentence is None else sentence

    def _is_exhausted(self) -> bool:
        """Whether nearly all descriptors are in use; it is counted and logged then."""
        if not nearly_exhausted():
            return False
        self._metrics.refusals.labels("descriptors").inc()
        if self._log_is_due("descriptors"):
            log.error("file descriptors are used up: new clients are refused. Raise the limit of open files (ulimit -n)")
        return True

    def _address_problem(self, address: str) -> str | None:
        """Why this address may not have another connection; it is counted then."""
        if not 0 < self._limits.connections_per_address <= self._by_address[address]:
            return None
        self._metrics.refusals.labels("address_limit").inc()
        return f"{self._limits.connections_per_address} connections of this address are open (connections_per_address)"

    def _check_origin(self, door: HttpDoor, request: Handshake) -> None:
        origin = request.headers.get("origin")
        if self.origins.allow(origin, request.headers.get("host")):
            return
        self._metrics.refusals.labels("origin").inc()
        shown = normal_origin(origin or "") or "null"
        if self._log_is_due(f"origin {shown}"):
            setting = f'[moshi_stt] allowed_origins = ["{shown}"]'
            log.warning("%s: a web page at %s was refused. To allow it, configure %s", request.peer, shown, setting)
        raise door.refusal("origin", f"web pages at {shown} may not use this server: see allowed_origins")

    def _note_wrong(self, address: str) -> None:
        if len(self._wrong) < MOST_REMEMBERED:
            self._wrong[address] += 1
        if self._log_is_due("keys"):
            most, count = self._wrong.most_common(1)[0]
            log.warning(
                "%d requests with a wrong or missing API key since the last such line, from %d addresses; most from %s (%d)",
                self._wrong.total(),
                len(self._wrong),
                most,
                count,
            )
            self._wrong.clear()

    def _log_is_due(self, what: str) -> bool:
        """Whether this was not logged for LOG_SECONDS; then it counts as logged now."""
        now = self._now()
        if now - self._logged.get(what, float("-inf")) < LOG_SECONDS:
            return False
        if len(self._logged) >= MOST_REMEMBERED:
            self._logged.clear()
        self._logged[what] = now
        return True

    def _left(self, key: str, address: str) -> None:
        for counter, name in ((self._by_key, key), (self._by_address, address)):
            counter[name] -= 1
            if counter[name] <= 0:
                del counter[name]


class Entry:
    """A place of one key and address, until `close`."""

    def __init__(self, gate: Gate, key: str, address: str) -> None:
        self._gate: Gate | None = gate
        self._key, self._address = key, address
        gate._by_key[key] += 1
        gate._by_address[address] += 1

    def close(self) -> None:
        """Idempotent."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate._left(self._key, self._address)


def client_address(remote: str | None, forwarded: str | None, proxies: Container[str] = ()) -> str:
    """The client's address: a proxy's word (X-Real-IP) counts only where the proxy is on this machine, or one of `proxies`."""
    if remote is None:
        return forwarded or "?"
    return forwarded if forwarded and (is_loopback(remote) or remote in proxies) else remote
