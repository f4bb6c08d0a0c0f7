"""The whole fleet at one address: `/metrics`, `/api/modules_info`, `/health` and `/ready` of all replicas together."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import aiohttp
import msgspec
from aiohttp import web

from moshi_stt.cluster.spec import Fleet, Server
from moshi_stt.server.fleet import merge_metrics, merge_modules
from moshi_stt.server.metrics import CONTENT_TYPE

log = logging.getLogger(__name__)

ANSWER_SECONDS = 3.0
"""How long a replica has to answer; without its answer it is left out."""


class View:
    """Used on one event loop. fleet: what there is now; own: further families of `/metrics`, as text."""

    def __init__(self, fleet: Callable[[], Fleet | None], own: Callable[[], str]) -> None:
        self._fleet, self._own = fleet, own
        self._session: aiohttp.ClientSession | None = None

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/api/modules_info", self._modules)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.on_startup.append(self._open)
        app.on_cleanup.append(self._close)
        return app

    async def _open(self, app: web.Application) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS))

    async def _close(self, app: web.Application) -> None:
        if self._session is not None:
            await self._session.close()

    def _servers(self) -> Sequence[Server]:
        fleet = self._fleet()
        return fleet.servers if fleet is not None else ()

    async def _metrics(self, request: web.Request) -> web.Response:
        texts = await self._of_all("/metrics")
        members = {server.name: text for server, status, text in texts if status == 200}
        try:
            text = merge_metrics(members, "replica", self._own())
        except ValueError as error:
            log.error("metrics: %s", error)
            return web.Response(status=502, text=f"{error}\n")
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _modules(self, request: web.Request) -> web.Response:
        texts = await self._of_all("/api/modules_info")
        documents = [msgspec.json.decode(text, type=list[dict[str, str]]) for _, status, text in texts if status == 200]
        return _json(merge_modules(documents))

    async def _health(self, request: web.Request) -> web.Response:
        """Green as long as one replica is."""
        texts = await self._of_all("/health")
        if any(status == 200 for _, status, _ in texts):
            return _json({"status": "ok"})
        return _json({"status": "failed", "reason": "no replica is in health"}, 503)

    async def _ready(self, request: web.Request) -> web.Response:
        """Green as long as one replica is."""
        texts = await self._of_all("/ready")
        ready = sum(status == 200 and not server.draining for server, status, _ in texts)
        if ready:
            return _json({"status": "ready", "replicas": ready})
        return _json({"status": "not ready", "reason": "no replica has a free slot"}, 503)

    async def _of_all(self, path: str) -> list[tuple[Server, int, str]]:
        servers = self._servers()
        return list(await asyncio.gather(*(self._of(server, path) for server in servers)))

    async def _of(self, server: Server, path: str) -> tuple[Server, int, str]:
        """Status and body; status 0 where there is no answer."""
        assert self._session is not None
        host = f"[{server.host}]" if ":" in server.host else server.host
        try:
            async with self._session.get(f"http://{host}:{server.port}{path}") as answer:
                return server, answer.status, await answer.text()
        except (TimeoutError, aiohttp.ClientError):
            return server, 0, ""


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", status=status)
