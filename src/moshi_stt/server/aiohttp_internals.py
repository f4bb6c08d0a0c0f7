"""All that the server uses of aiohttp beyond its public interface, each with a test.

aiohttp has no public way to give up a socket after an upgrade. So pyproject.toml bounds the minor version; a newer one is let
in when `tests/unit/test_aiohttp_internals.py` passes on it.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter


class _Early:
    """Stands where aiohttp wants a parser for an upgraded socket; keeps what came after the request."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """The socket is lost; whoever took it over is told by the transport."""


class TakenOver(web.StreamResponse):
    """What a handler returns when the socket has been somebody else's: nothing is left to send."""

    def __init__(self) -> None:
        super().__init__(status=HTTPStatus.SWITCHING_PROTOCOLS)
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """There is no body."""


def take_over(request: web.BaseRequest) -> tuple[asyncio.Transport, bytes, Callable[[Exception | None], None]]:
    """Take a request's socket away from HTTP.

    Returns its transport, what the client has already sent after its request, and whom to tell when the socket is lost: aiohttp
    must forget the connection then. The handler returns `TakenOver()` in the end.
    Raises ConnectionResetError where the client is gone.
    """
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client went away before the upgrade")
    early = _Early()
    request.protocol.keep_alive(False)
    request.protocol.set_parser(early)  # type: ignore[arg-type]  # it needs these two methods only
    return transport, early.data, request.protocol.connection_lost


async def send_continue(request: web.BaseRequest) -> None:
    """Answer `Expect: 100-continue`; the answer itself has not begun."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0
