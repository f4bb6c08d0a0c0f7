"""A WebSocket's way in: the checks in moshi-server's order, then a connection on the socket that HTTP gives up."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web

from moshi_stt.events import Error
from moshi_stt.server import framing
from moshi_stt.server.aiohttp_internals import TakenOver, take_over
from moshi_stt.server.connection import Connection
from moshi_stt.server.doors.door import Door, NewClient, Opening, Refused, Route
from moshi_stt.server.gate import Entry
from moshi_stt.server.handshake import handshake_of, refused
from moshi_stt.server.resume import Place, place_of
from moshi_stt.server.service import Served, Service
from moshi_stt.server.upgrade import switch_protocols, upgrade_problem

log = logging.getLogger(__name__)

LOADING = "the model is still loading: connect again later"


async def handle(request: web.Request, service: Service, door: Door, route: Route) -> web.StreamResponse:
    """Serve one WebSocket until its socket is gone."""
    problem = upgrade_problem(request)
    if problem is not None:
        return problem
    handshake = handshake_of(request, service)
    try:
        await service.admit(door, handshake)
        opening = door.accept(handshake)
        served = service.find(opening.module or route.module)
        if door.refuses_when_full and served.engine.used_slots + opening.channels > served.engine.total_slots:
            service.metrics.refusals.labels("full").inc()
            raise door.refusal("full", "all streams are in use: try again later")
        entry = service.gate.enter(door, handshake)
    except Refused as refusal:
        return refused(refusal)
    try:
        return await _converse(request, service, door, opening, served, entry, handshake.peer)
    except BaseException:
        entry.close()
        raise


async def _converse(
    request: web.Request, service: Service, door: Door, opening: Opening, served: Served, entry: Entry, peer: str
) -> web.StreamResponse:
    transport, early, lost = take_over(request)
    switch_protocols(request, transport, opening.subprotocol, opening.headers)
    service.metrics.connects.inc()
    if service.devices is not None and not service.is_started:
        transport.pause_reading()  # what comes meanwhile is for the device to read
        with suppress(TimeoutError):
            await asyncio.wait_for(service.started.wait(), service.config.limits.slot_wait_seconds)
    client = NewClient(door, opening, peer, early)
    if opening.resume is not None and opening.resume.token is not None:
        entry.close()  # the stream has its place
        return await _resume(service, client, place_of(opening.resume.token), transport, lost)
    if service.hand_over(served, client, transport, entry.close):
        return TakenOver()
    connection = service.connections.take(transport, client, served.engine, lost)
    gone = connection.lost  # of this socket: the stream may go on over another
    try:
        if not service.is_started and service.devices is not None:
            connection.end(Error(LOADING, framing.TRY_AGAIN))
        elif not service.is_started:
            await _wait_started(service, connection)
        connection.open()
        await gone
    finally:
        entry.close()
        if not gone.done():
            connection.abort()
    return TakenOver()


async def _resume(
    service: Service,
    client: NewClient,
    place: Place | None,
    transport: asyncio.Transport,
    lost: Callable[[Exception | None], None],
) -> web.StreamResponse:
    """Take a client back to its stream, which another process may have."""
    if place is not None and any(pool.hand_back(place, client, transport) for pool in service.pools):
        return TakenOver()
    connection = service.connections.resume(transport, client, lost)
    if connection is not None:
        await connection.lost
    return TakenOver()


async def _wait_started(service: Service, connection: Connection) -> None:
    """A WebSocket opened while the model loads waits for its slot, as with moshi-server."""
    started = asyncio.ensure_future(service.started.wait())
    try:
        await asyncio.wait(
            (started, connection.lost), timeout=service.config.limits.slot_wait_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if not started.done():
            connection.end(Error(LOADING, framing.TRY_AGAIN))
    finally:
        started.cancel()
