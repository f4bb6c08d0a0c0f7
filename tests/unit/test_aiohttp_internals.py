"""What the server uses of aiohttp's inside still works in this version of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from tests.support.serving import until

from moshi_stt.server.aiohttp_internals import TakenOver, send_continue, take_over

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@asynccontextmanager
async def connected(
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]],
    expect: Callable[[web.Request], Awaitable[None]] | None = None,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, web.AppRunner]]:
    """A client's bare socket to a server with this one handler."""
    app = web.Application()
    app.router.add_route("*", "/", handle, expect_handler=expect)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with asyncio.timeout(120):
            reader, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
            yield reader, writer, runner
            writer.close()
    finally:
        await runner.cleanup()


class Taker(asyncio.Protocol):
    """Whoever has the socket afterwards: says in capitals what it hears."""

    def __init__(self, transport: asyncio.Transport, lost: Callable[[Exception | None], None]) -> None:
        self.transport, self._lost = transport, lost
        self.gone = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(exc)
        self.gone.set()


async def test_a_taken_socket_carries_what_came_with_the_request_and_after_it() -> None:
    """Its bytes go to the new owner, not to HTTP; nothing is sent at the end; aiohttp forgets it when told that it is lost."""

    async def handle(request: web.Request) -> web.StreamResponse:
        transport, early, lost = take_over(request)
        taker = Taker(transport, lost)
        transport.set_protocol(taker)
        transport.write(b"hi " + early.upper())
        await taker.gone.wait()
        return TakenOver()

    async with connected(handle) as (reader, writer, runner):
        writer.write(REQUEST + b"early")
        assert await reader.readexactly(8) == b"hi EARLY"
        assert runner.server is not None
        assert len(runner.server.connections) == 1
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await reader.readexactly(18) == b"GET / HTTP/1.1\r\n\r\n"
        writer.write_eof()
        assert await reader.read() == b""
        await until(lambda: runner.server is not None and not runner.server.connections, "aiohttp has forgotten it")


async def test_a_client_that_is_gone_cannot_be_taken() -> None:
    outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        try:
            take_over(request)
        except ConnectionResetError as error:
            outcome.set_result(str(error))
        return TakenOver()

    async with connected(handle) as (_, writer, _):
        writer.write(REQUEST)
        assert "went away" in await outcome


async def test_continue_comes_before_the_answer_and_is_no_part_of_it() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read())

    async with connected(handle, send_continue) as (reader, writer, _):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"body")
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nbody")
