"""POST requests on their way to a model process, and its answers on their way back, piece by piece."""

import asyncio
import logging
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web
from yarl import URL

from moshi_stt.server.doors.door import Handshake
from moshi_stt.server.faults import Fault

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""How long a model process has to take the request. What follows is bounded by its own limits and by its pings."""

DIED = "the process that ran the model has ended: send the file again"

_HOP = frozenset({"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"})
"""Headers of one connection."""

_OURS = frozenset({"origin", "x-real-ip", "x-request-id", "content-encoding"})
"""Headers of a request that were dealt with here. Content-Encoding: a body that has one was refused."""


class Forwarded(web.StreamResponse):
    """The answer of a model process, which has counted it."""


async def forward(request: web.Request, handshake: Handshake, session: aiohttp.ClientSession) -> web.StreamResponse:
    """Let a model process answer. session: to its Unix socket.

    Raises Fault where the process dies before it answers. Where it dies later, the connection is cut amid the body.
    """
    known_as = handshake.peer.rpartition(" ")[2]
    headers = [("X-Real-IP", handshake.address), ("X-Request-ID", known_as)]
    headers += [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP | _OURS]
    body = _Body(request)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    url = URL(f"http://localhost{request.raw_path}", encoded=True)
    response: Forwarded | None = None
    try:
        async with session.post(
            url, headers=headers, data=body.pieces(), allow_redirects=False, timeout=timeout
        ) as answer:  # leaving the block closes the connection, and the process drops the request
            response = Forwarded(status=answer.status, reason=answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP and name != "X-Request-ID":
                    response.headers.add(name, value)
            if request.headers.get("X-Request-ID", "") == known_as:
                response.headers["X-Request-ID"] = known_as
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
    except (aiohttp.ClientError, TimeoutError) as error:
        if body.broken is not None:
            reason = " ".join(str(getattr(body.broken.__cause__, "message", body.broken)).split())
            raise Fault("bad_request", f"Failed to buffer the request body: {reason}") from None
        log.error("POST %s: the model process did not answer: %s", handshake.peer, error)
        if response is None or not response.prepared:
            raise Fault("internal", DIED, 503) from None
        response.force_close()
        if request.transport is not None:
            request.transport.abort()
    return response


class _Body:
    """A request's body. broken: why it could not be read."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.broken: Exception | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            while piece := await self._request.content.readany():
                yield piece
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.broken = error
            raise
