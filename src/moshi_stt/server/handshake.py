"""Between HTTP requests and doors: what a request says, and the answer where it is refused."""

import re
import secrets

from aiohttp import hdrs, web

from moshi_stt.server.auth import query_pairs
from moshi_stt.server.doors.door import Handshake, Refused
from moshi_stt.server.gate import client_address
from moshi_stt.server.service import Service

GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def handshake_of(request: web.BaseRequest, service: Service) -> Handshake:
    """What a door needs of a request."""
    given = request_id(request)
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        headers.setdefault(name.lower(), value)
    offered = ",".join(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()))
    return Handshake(
        request.path,
        tuple(query_pairs(query_string(request))),
        headers,
        tuple(name.strip() for name in offered.split(",") if name.strip()),
        peer_name(request, given),
        client_address(request.remote, request.headers.get("X-Real-IP"), service.config.limits.trusted_proxies),
        {each.module.name: each.engine.info for each in service if each.engine.ready},
        service.config.limits.ignore_unsupported,
    )


def refused(refusal: Refused) -> web.Response:
    """The answer."""
    response = web.Response(status=refusal.status, body=refusal.body, content_type=refusal.content_type)
    if refusal.content_type.startswith("text/"):
        response.charset = "utf-8"
    for name, value in refusal.headers:
        response.headers.add(name, value)
    return response


def query_string(request: web.BaseRequest) -> str:
    """The query as it came, still percent-encoded."""
    return request.raw_path.partition("?")[2].partition("#")[0]


def peer_name(request: web.BaseRequest, id: str) -> str:
    """For the log: address, the proxy's word on it, the path, never the query, and the request's id."""
    host = request.headers.get("X-Real-IP") or request.remote or "?"
    return f"{host[:64]!s} {request.path} {id}"


def request_id(request: web.BaseRequest) -> str:
    """The id that the client or a proxy gave (X-Request-ID), else one of our own. Every log line of the request has it."""
    given = request.headers.get("X-Request-ID", "")
    return given if GIVEN_ID.fullmatch(given) else secrets.token_hex(4)
