"""The WebSocket's opening: what a request must have, and the answer that takes its socket over from HTTP.

Checks, their order and their texts are moshi-server's (contract section 1.3).
"""

import asyncio
import base64
import hashlib
from collections.abc import Sequence
from http import HTTPStatus

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def upgrade_problem(request: web.BaseRequest) -> web.Response | None:
    """The refusal of a request that cannot become a WebSocket, or None."""
    headers = request.headers
    status = HTTPStatus.BAD_REQUEST
    text = None
    if request.method != hdrs.METH_GET:
        status, text = HTTPStatus.METHOD_NOT_ALLOWED, "Request method must be `GET`"
    elif "upgrade" not in headers.get(hdrs.CONNECTION, "").lower():
        text = "Connection header did not include 'upgrade'"
    elif headers.get(hdrs.UPGRADE, "").lower() != "websocket":
        text = "`Upgrade` header did not include 'websocket'"
    elif hdrs.SEC_WEBSOCKET_KEY not in headers:
        text = "`Sec-WebSocket-Key` header missing"
    elif headers.get(hdrs.SEC_WEBSOCKET_VERSION) != "13":
        text = "`Sec-WebSocket-Version` header did not include '13'"
    elif request.version < HttpVersion11:
        status, text = HTTPStatus.UPGRADE_REQUIRED, "WebSocket request couldn't be upgraded since no upgrade state was present"
    return None if text is None else web.Response(status=status, text=text)


class _Early:
    """Stands where aiohttp wants a parser for an upgraded socket; keeps what came behind the request."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """The socket is lost; whoever took it over is told by the transport."""


class TakenOver(web.StreamResponse):
    """What aiohttp is given back when the socket has been somebody else's: nothing is left to send."""

    def __init__(self) -> None:
        super().__init__(status=HTTPStatus.SWITCHING_PROTOCOLS)
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """There is no body."""


def switch_protocols(
    request: web.BaseRequest, subprotocol: str | None = None, headers: Sequence[tuple[str, str]] = ()
) -> tuple[asyncio.Transport, bytes]:
    """Send 101 and leave HTTP. Returns the socket's transport and what the client has already sent after its request.

    No extension is negotiated. Raises ConnectionResetError where the client is gone.
    """
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client went away before the upgrade")
    key = request.headers[hdrs.SEC_WEBSOCKET_KEY].encode("utf-8", "surrogateescape")
    accept = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
    early = _Early()
    request.protocol.keep_alive(False)
    request.protocol.set_parser(early)  # type: ignore[arg-type]  # it needs these two methods only
    lines = [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-accept", accept), *headers]
    if subprotocol is not None:
        lines.append(("sec-websocket-protocol", subprotocol))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines if not set("\r\n") & set(name + value))
    transport.write(f"HTTP/1.1 101 Switching Protocols\r\n{head}\r\n".encode("latin-1", "replace"))
    return transport, early.data
