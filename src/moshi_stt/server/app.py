"""The server: routes, and the process's three phases: start, loop, shutdown."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import hdrs, web
from aiohttp.http import HttpProcessingError

from moshi_stt.config import ServerConfig
from moshi_stt.constants import PUBLIC_KEY
from moshi_stt.engine.engine import Engine
from moshi_stt.errors import ConfigError, EngineFailed, MoshiSttError
from moshi_stt.origins import is_loopback
from moshi_stt.server import framing, info, upload, ws
from moshi_stt.server.addresses import bind, bind_private
from moshi_stt.server.aiohttp_internals import send_continue
from moshi_stt.server.auth import query_pairs
from moshi_stt.server.cors import cors
from moshi_stt.server.devices.pool import DevicePool
from moshi_stt.server.doors import DOORS
from moshi_stt.server.doors.door import AnyDoor, Door, FileDoor, HttpDoor, PageDoor, Refused, Route
from moshi_stt.server.handshake import handshake_of, query_string, refused
from moshi_stt.server.listeners import SocketListeners
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.runtime import raise_file_limit, run, tune_interpreter
from moshi_stt.server.service import Member, Service
from moshi_stt.server.static import StaticFiles
from moshi_stt.server.takeover import Takeover, offer, take

log = logging.getLogger(__name__)
http_log = logging.getLogger("moshi_stt.server.http")
"""aiohttp's own complaints."""

BACKLOG = 1_024
"""Connections that the kernel holds while we are busy."""

KEEPALIVE_SECONDS = 75.0
"""How long an HTTP connection may be idle, its first request included."""

SHUTDOWN_SECONDS = 8.0
"""How long running sessions have for their last message and the close handshake, at shutdown."""

SHUTTING_DOWN = "the server is shutting down: connect again"
"""What clients are told at shutdown."""

CLEANUP_SECONDS = 2.0
"""How long after them whatever else is still being answered has."""

FAILURE_SECONDS = 3.0
"""How long its sessions have after an engine's failure."""

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

HANDED_OVER_SECONDS = 600.0
"""How long the streams of a server whose place another one has taken may go on."""

POLL_SECONDS = 0.25

FREE_MOUNTS = frozenset("{}")
"""Characters that a path must not have: aiohttp would read a pattern there."""

SERVICE = web.AppKey("service", Service)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(
    config: ServerConfig,
    engines: Mapping[str, Engine],
    metrics: Metrics | None = None,
    doors: Sequence[AnyDoor] = DOORS,
    member: Member | None = None,
) -> web.Application:
    """The routes over these engines, by module name. Starting and stopping the engines is the caller's business.

    Raises ConfigError for two modules or doors on one path, and for a path that is none.
    """
    service = Service.build(config, engines, metrics, member)
    app = web.Application(middlewares=[cors(service.gate.origins)])
    app[SERVICE] = service
    routes = app.router
    for path, answer in (
        ("/api/build_info", lambda: info.json_response(info.build_info())),
        ("/api/modules_info", lambda: info.json_response(info.modules_info(service))),
        ("/metrics", lambda: info.metrics(service)),
        ("/health", lambda: info.health(service)),
        ("/ready", lambda: info.ready(service)),
    ):
        routes.add_route("*", path, _fixed(answer))
    taken = {resource.canonical for resource in routes.resources()}
    for path, mount in _mounts(service, doors).items():
        if not path.startswith("/") or FREE_MOUNTS & set(path):
            raise ConfigError(f"{mount.who}: path {path!r} must begin with / and have no braces")
        if path in taken:
            raise ConfigError(f"{mount.who}: path {path!r} is already taken: choose another")
        pattern = path + "{rest:.*}" if mount.is_prefix else path
        routes.add_route("*", pattern, mount.handle, expect_handler=mount.expect)
    routes.add_route("*", "/{path:.*}", StaticFiles(config.static_dir).handle)
    app.cleanup_ctx.append(_run_service)
    return app


async def _run_service(app: web.Application) -> Any:
    """The clocks of the connections run as long as the app does."""
    service = app[SERVICE]
    await asyncio.to_thread(info.build_info)  # asks git, once
    ticking = asyncio.create_task(service.connections.tick())
    yield
    ticking.cancel()
    with suppress(asyncio.CancelledError):
        await ticking
    await service.close_connections(SHUTTING_DOWN, framing.GOING_AWAY, SHUTDOWN_SECONDS)
    service.connections.stop()


def _fixed(answer: Callable[[], web.Response | Awaitable[web.Response]]) -> Handler:
    """A route that takes GET and HEAD, and no query."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            return web.Response(status=405, headers={hdrs.ALLOW: "GET,HEAD"})
        pairs = len(query_pairs(query_string(request)))
        if pairs:
            text = f"Failed to deserialize query string: invalid length {pairs}, expected 0 elements in map"
            return web.Response(status=400, text=text)
        response = answer()
        return response if isinstance(response, web.Response) else await response

    return handle


class _Mount:
    """What is served on one path: at most one door of each kind."""

    def __init__(self, service: Service, path: str) -> None:
        self._service = service
        self._path = path
        self._by_method: dict[str, tuple[HttpDoor, Route]] = {}
        self.is_prefix = False

    @property
    def who(self) -> str:
        """For error messages."""
        door, route = next(iter(self._by_method.values()))
        return f"module {route.module}" if route.module is not None else f"door {door.name}"

    def add(self, door: HttpDoor, route: Route) -> None:
        """Raises ConfigError where the path has such a door already."""
        if isinstance(door, FileDoor):
            methods: tuple[str, ...] = (hdrs.METH_POST,)
        else:
            methods = door.methods if isinstance(door, PageDoor) else (hdrs.METH_GET, hdrs.METH_HEAD)
        for method in methods:
            if method in self._by_method:
                other, there = self._by_method[method]
                ours = route.module if route.module is not None else door.name
                raise ConfigError(
                    f"{ours}: path {self._path!r} is already taken by {there.module or other.name}: choose another"
                )
            self._by_method[method] = door, route
        self.is_prefix |= isinstance(door, PageDoor) and door.prefixes

    async def handle(self, request: web.Request) -> web.StreamResponse:
        found = self._by_method.get(request.method)
        if found is None:
            allowed = sorted(self._by_method, key=lambda method: method != hdrs.METH_POST)
            return web.Response(status=405, headers={hdrs.ALLOW: ",".join(allowed)})
        door, route = found
        if isinstance(door, Door):
            return await ws.handle(request, self._service, door, route)
        if isinstance(door, FileDoor):
            return await upload.handle(request, self._service, door, route)
        assert isinstance(door, PageDoor)
        return await _page(request, self._service, door)

    async def expect(self, request: web.Request) -> web.StreamResponse | None:
        """Answer `Expect: 100-continue` only to those who may send: the others get their 401 without sending a body."""
        found = self._by_method.get(request.method)
        if found is None or request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
            return None
        try:
            key = found[0].key(handshake_of(request, self._service))
        except Refused:
            return None
        if self._service.gate.allows(found[0], key):
            await send_continue(request)
        return None


def _mounts(service: Service, doors: Sequence[AnyDoor]) -> dict[str, _Mount]:
    """By path."""
    mounts: dict[str, _Mount] = {}
    for door in doors:
        if isinstance(door, HttpDoor):
            for route in door.routes(service.config):
                mounts.setdefault(route.path, _Mount(service, route.path)).add(door, route)
    return mounts


async def _page(request: web.Request, service: Service, door: PageDoor) -> web.Response:
    try:
        handshake = handshake_of(request, service)
        await service.admit(door, handshake)
        answer = door.answer(handshake)
    except Refused as refusal:
        return refused(refusal)
    headers = {hdrs.CONTENT_TYPE: answer.content_type, **dict(answer.headers)}
    return web.Response(status=answer.status, body=answer.body, headers=headers)


class Server:
    """One process's server. `start`, `wait`, `stop`, each once; `port` is known after `start`."""

    def __init__(
        self,
        config: ServerConfig,
        engines: Mapping[str, Engine],
        host: str,
        port: int,
        metrics: Metrics | None = None,
        doors: Sequence[AnyDoor] = DOORS,
        takeover: Takeover | None = None,
        member: Member | None = None,
        devices: DevicePool | None = None,
    ) -> None:
        """doors: the protocols that it speaks. takeover: how it replaces another server, and is replaced.

        member: it is a model process of another server, and has no port. devices: its model processes, with their `engines`.
        """
        self._takeover = takeover
        self._member = member
        self._host, self._port = host, port
        self._engines = {module.name: engines[module.name] for module in config.modules}
        self._app = create_app(config, engines, metrics, doors, member)
        self.service = self._app[SERVICE]
        self.service.devices = devices
        if devices is not None:
            devices.attach(self.service)
        self.service.gate.is_private = is_loopback(host) and config.authorized_ids <= {PUBLIC_KEY}
        self.listeners = SocketListeners(self.service, doors, bind)
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            logger=http_log,
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE_SECONDS,
            handle_signals=False,
            auto_decompress=False,  # compressed bodies are refused, and must not be unpacked before that
            shutdown_timeout=CLEANUP_SECONDS,
        )
        http_log.addFilter(_not_their_fault)
        self._listener: socket.socket | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._failed = asyncio.Event()

    @property
    def port(self) -> int:
        """The port listened on, known from the start on; the one asked for may have been 0."""
        return self._port

    async def start(self) -> None:
        """Bind, listen, then start the engines: health can be asked while the model loads.

        One that replaces another server starts and checks its engines first, and takes that server's socket then.

        Raises ConfigError where the address cannot be had, and what an engine's start raises; the server is stopped then.
        """
        replaces = self._takeover is not None and self._takeover.take
        listener = None if replaces else self._bind()
        try:
            await self._runner.setup()
            if listener is not None:
                await self._listen(listener)
                await self.listeners.start()
            for name, engine in self._engines.items():
                await engine.start()
                self._watchers.append(asyncio.create_task(self._watch(name, engine)))
            await self.service.start_processes()
            if replaces:
                await self._replace()
        except BaseException as error:
            self.service.fail(f"the server could not start: {error}")
            await self.stop()
            raise
        self.service.started.set()

    def _bind(self) -> socket.socket:
        return bind(self._host, self._port) if self._member is None else bind_private(self._member.http)

    async def _listen(self, listener: socket.socket) -> None:
        self._listener = listener
        if self._member is None:
            self._port = listener.getsockname()[1]
        await web.SockSite(self._runner, listener, backlog=BACKLOG).start()

    async def _replace(self) -> None:
        """Take the place of the running server, if the check allows it."""
        assert self._takeover is not None
        if self._takeover.check is not None:
            await self._takeover.check()
        taken = await take(self._takeover.path)
        await self._listen(taken.listener)
        await asyncio.to_thread(taken.confirm)
        await self.listeners.start()
        log.info("took over port %d", self._port)

    async def hand_over(self) -> None:
        """Wait until another server has taken the socket and the streams here have ended, HANDED_OVER_SECONDS at most.

        Raises OSError where the socket cannot be offered.
        """
        assert self._takeover is not None
        assert self._listener is not None
        await offer(self._takeover.path, self._listener, self._listen_no_more)
        log.info("another server has taken port %d: ending when the streams here have ended", self._port)
        for _ in range(round(HANDED_OVER_SECONDS / POLL_SECONDS)):
            if not any(engine.used_slots for engine in self._engines.values()):
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _listen_no_more(self) -> None:
        for site in list(self._runner.sites):
            await site.stop()
        self.listeners.stop()

    async def wait(self, stop: asyncio.Event) -> int:
        """Serve until `stop` is set (returns 0) or an engine has failed (returns 1)."""
        waits = [asyncio.create_task(stop.wait()), asyncio.create_task(self._failed.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return 1 if self._failed.is_set() else 0

    async def drain(self, drain_seconds: float) -> None:
        """Turn `/ready` red and take no new streams; let the live ones go on for up to so long, then let what they sent be
        transcribed and given, and close them with an Error and 1001. Health can be asked meanwhile.
        """
        self.service.stopping = True
        await asyncio.gather(
            self.service.finish_uploads(drain_seconds, SHUTDOWN_SECONDS),
            self.service.drain_connections(SHUTTING_DOWN, framing.GOING_AWAY, drain_seconds, SHUTDOWN_SECONDS),
        )

    async def stop(self) -> None:
        """Take nothing new; end what runs with an Error and 1001, in bounded time; stop the engines. Idempotent."""
        service = self.service
        service.stopping = True
        self.listeners.stop()
        for site in list(self._runner.sites):
            await site.stop()
        if self._listener is not None:
            self._listener.close()
        await asyncio.gather(
            service.finish_uploads(0.0, SHUTDOWN_SECONDS),
            service.close_connections(SHUTTING_DOWN, framing.GOING_AWAY, SHUTDOWN_SECONDS),
        )
        await self._runner.cleanup()
        for watcher in self._watchers:
            watcher.cancel()
        for pool in service.pools:
            await pool.stop()
        await service.decoders.stop()
        for name, engine in self._engines.items():
            try:
                await engine.stop()
            except Exception:
                log.exception("module %s: the engine did not stop cleanly", name)

    async def _watch(self, name: str, engine: Engine) -> None:
        """When the engine fails: turn red, tell its clients, and ask for the process to end."""
        failure: EngineFailed = await engine.wait_failed()
        log.critical("module %s failed: %s", name, failure)
        service = self.service
        service.fail(f"module {name} failed: {failure}")
        await service.close_connections(f"the model failed: {failure}", framing.INTERNAL, FAILURE_SECONDS)
        self._failed.set()


def _not_their_fault(record: logging.LogRecord) -> bool:
    """Keep out of the log what is no HTTP: scanners would fill it, and a broken request line may hold a key."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))


def serve(
    config: ServerConfig,
    engines: Mapping[str, Engine],
    host: str,
    port: int,
    takeover: Takeover | None = None,
    pid_file: Path | None = None,
    devices: DevicePool | None = None,
) -> int:
    """Serve until a signal (0), a failure (1), or another server has taken over (0). SIGTERM and SIGHUP let live streams go on
    for `drain_seconds`, SIGINT does not; a second signal ends the process at once.

    pid_file: gets this process's id once it accepts connections. devices: see `Server`.

    Raises ConfigError, CheckpointError or EngineError where the server cannot start.
    """
    raise_file_limit()
    tune_interpreter()
    server = partial(Server, config, engines, host, port, takeover=takeover, devices=devices)
    return run(_serve(config, server, host, takeover is not None, pid_file))


async def _serve(
    config: ServerConfig, make: Callable[[], Server], host: str, offers_its_place: bool, pid_file: Path | None
) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    drain_seconds = 0.0
    signals = [each for each in SIGNALS if each.name != "SIGHUP" or signal.getsignal(each) is not signal.SIG_IGN]  # nohup

    def on_signal(name: str) -> None:
        nonlocal drain_seconds
        drain_seconds = 0.0 if name == "SIGINT" else config.limits.drain_seconds
        log.info("%s: shutting down; again to end at once", name)
        stop.set()
        for each in signals:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)

    server = make()
    for each in signals:
        with suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(each, on_signal, each.name)
    starting = asyncio.create_task(server.start())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not starting.done():
        starting.cancel()
        with suppress(asyncio.CancelledError, MoshiSttError):
            await starting
        return 0
    await starting
    gc.collect()
    gc.freeze()  # models and modules stay: full collections, which stop everything, need not walk them again
    for line in info.start_lines(server.service, host, server.port):
        log.info("%s", line)
    if pid_file is not None:
        write_pid(pid_file)
    handing = asyncio.create_task(_hand_over(server, stop)) if offers_its_place else None
    try:
        status = await server.wait(stop)
        if not status:
            await server.drain(drain_seconds)
        return status
    finally:
        if handing is not None:
            handing.cancel()
            with suppress(asyncio.CancelledError):
                await handing
        await server.stop()


def write_pid(path: Path) -> None:
    """Write this process's id. Raises ConfigError where that cannot be done."""
    try:
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_text(f"{os.getpid()}\n", encoding="ascii")
        scratch.replace(path)
    except OSError as error:
        raise ConfigError(f"--pid-file {path}: {error.strerror or error}") from None


async def _hand_over(server: Server, stop: asyncio.Event) -> None:
    """Ask for the end once another server has taken over."""
    try:
        await server.hand_over()
    except OSError as error:
        log.warning("no other server can take over from this one: %s", error)
        return
    stop.set()
