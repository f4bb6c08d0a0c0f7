"""The WebSocket route: checks in moshi-server's order, then a `Connection` on the taken-over socket. Knows no messages."""

import asyncio
import logging
from functools import partial

from aiohttp import web

from moshi_stt.events import Error
from moshi_stt.server import frames
from moshi_stt.server.auth import DuplicateKey, websocket_key
from moshi_stt.server.connection import Connection
from moshi_stt.server.service import Served, Service
from moshi_stt.server.upgrade import TakenOver, switch_protocols, upgrade_problem
from moshi_stt.session import Session

log = logging.getLogger(__name__)


async def handle(request: web.Request, service: Service, served: Served) -> web.StreamResponse:
    """Serve one WebSocket until its socket is gone."""
    problem = upgrade_problem(request)
    if problem is not None:
        return problem
    try:
        key = websocket_key(request)
    except DuplicateKey as error:
        return web.Response(status=400, text=str(error))
    if not service.keys.allow(key):
        service.metrics.refusals.labels("key").inc()
        return web.Response(status=401)
    refusal = service.refusal()
    if refusal is not None:
        service.metrics.refusals.labels("not_serving").inc()
        return web.Response(status=503, text=refusal)
    return await _converse(request, service, served)


async def _converse(request: web.Request, service: Service, served: Served) -> web.StreamResponse:
    transport, early = switch_protocols(request)
    service.metrics.connects.inc()
    peer = peer_name(request, served.module.path)
    others = service.processes if service.is_started else None
    if others is not None and others.hand_over(served.module.name, transport, early, peer):
        return TakenOver()
    connection = Connection(
        served.engine,
        Session(),
        service.config.limits,
        service.metrics,
        peer=peer,
        on_lost=partial(_lost, service, request.protocol),
        on_blocked=service.watch.add,
    )
    service.connected(connection)
    try:
        connection.start(transport, early)
        log.debug("%s: connected", connection.peer)
        if not service.is_started:
            await _wait_started(service, connection)
        connection.open()
        await connection.lost
    finally:
        connection.abort()  # without effect on a socket that is gone
    return TakenOver()


async def _wait_started(service: Service, connection: Connection) -> None:
    """A WebSocket opened while the model loads waits for its Ready, as with moshi-server."""
    started = asyncio.ensure_future(service.started.wait())
    try:
        await asyncio.wait(
            (started, connection.lost), timeout=service.config.limits.slot_wait_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if not started.done():
            connection.end(Error("the model is still loading: connect again later"), frames.TRY_AGAIN)
    finally:
        started.cancel()


def _lost(service: Service, http: web.RequestHandler, connection: Connection, exc: Exception | None) -> None:
    service.disconnected(connection)
    log.debug("%s: disconnected", connection.peer)
    http.connection_lost(exc)


def peer_name(request: web.BaseRequest, path: str) -> str:
    """For the log: address, the proxy's word on it, and the route, never the query."""
    host = request.headers.get("X-Real-IP") or request.remote or "?"
    return f"{host[:64]!s} {path}"
