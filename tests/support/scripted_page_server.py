"""The page over a WebSocket that says what a test tells it to, as fast as the test likes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgpack
from aiohttp import web

from moshi_stt.server.static import StaticFiles

Talk = Callable[["Talker"], Awaitable[None]]


class Talker:
    """One WebSocket of the page."""

    def __init__(self, request: web.Request, socket: web.WebSocketResponse) -> None:
        self.query = dict(request.query)
        self._socket = socket
        self.samples = 0

    async def say(self, type: str, **fields: Any) -> None:
        await self._socket.send_bytes(msgpack.packb({"type": type, **fields}))

    async def hear(self) -> dict[str, Any] | None:
        """The next message of the page; None at the end."""
        message = await self._socket.receive()
        if message.type is not web.WSMsgType.BINARY:
            return None
        document: dict[str, Any] = msgpack.unpackb(message.data)
        self.samples += len(document.get("pcm", ()))
        return document

    async def answer_markers(self) -> None:
        """Take audio until the page closes, answering its markers."""
        while (document := await self.hear()) is not None:
            if document["type"] == "Marker":
                await self.say("Marker", id=document["id"])

    def cut(self) -> None:
        """Break the connection without a Close frame."""
        transport = self._socket._req.transport if self._socket._req is not None else None
        if transport is not None:
            transport.abort()


@contextlib.asynccontextmanager
async def page_server(talk: Talk, **about: Any) -> AsyncIterator[str]:
    """Serve the page on a free port; `talk` speaks on each WebSocket after its Ready. Yields the address."""
    module = {
        "path": "/api/asr-streaming",
        "lm": "scripted",
        "device": "cpu",
        "languages": "en",
        "used_slots": "0",
        "total_slots": "4",
    } | about

    async def socket(request: web.Request) -> web.StreamResponse:
        answer = web.WebSocketResponse(max_msg_size=0)
        await answer.prepare(request)
        talker = Talker(request, answer)
        with contextlib.suppress(ConnectionError):
            await talk(talker)
        return answer

    async def modules(_: web.Request) -> web.Response:
        return web.json_response([module])

    app = web.Application()
    app.router.add_get("/api/modules_info", modules)
    app.router.add_get("/api/asr-streaming", socket)
    app.router.add_get("/{path:.*}", StaticFiles(None).handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await asyncio.wait_for(runner.cleanup(), 20)
