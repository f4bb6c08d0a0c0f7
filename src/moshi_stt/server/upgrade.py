"""The WebSocket's opening handshake: what a request must have, and the answer.

Checks, their order and their texts are moshi-server's (contract section 1.3).
"""

import asyncio
import base64
import hashlib
from collections.abc import Sequence
from http import HTTPStatus

from aiohttp import HttpVersion11, hdrs, web

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


def switch_protocols(
    request: web.BaseRequest, transport: asyncio.Transport, subprotocol: str | None, headers: Sequence[tuple[str, str]]
) -> None:
    """Send 101, the last that goes out as HTTP. No extension is negotiated."""
    key = request.headers[hdrs.SEC_WEBSOCKET_KEY].encode("utf-8", "surrogateescape")
    accept = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
    lines = [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-accept", accept), *headers]
    if subprotocol is not None:
        lines.append(("sec-websocket-protocol", subprotocol))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines if not set("\r\n") & set(name + value))
    transport.write(f"HTTP/1.1 101 Switching Protocols\r\n{head}\r\n".encode("latin-1", "replace"))
