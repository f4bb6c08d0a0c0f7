"""The front of a cluster, on the host of its address: keeps HAProxy running and answers for the whole fleet.

    python -m moshi_stt.cluster.front FOLDER

A process of its own, without Ray: when Ray dies, the address goes on. The controller tells it by `PUT /fleet` on a Unix socket
what there is. What it was told last is in a file, so that it can be started again without a controller.
"""

import asyncio
import fcntl
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from moshi_stt.cluster import own_ray, process
from moshi_stt.cluster.balancer import Balancer, Running
from moshi_stt.cluster.spec import Fleet, Paths, write_json
from moshi_stt.cluster.view import View
from moshi_stt.errors import MoshiSttError

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
ANSWER_SECONDS = 15.0
"""How long the front has to answer its socket: at its first start it first starts HAProxy."""

RAY_SECONDS = 1.0
"""How often the front looks whether a Ray of our own runs."""

RECOVERY_SECONDS = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Before Ray is started again, in seconds; doubles each time."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What the front answers on its socket."""

    fleet: Fleet | None
    haproxy_pid: int
    haproxy_restarts: int
    why: str
    """Why HAProxy does not run; empty when it does."""
    controller_seconds: float
    """Since the controller's last word."""


class Front:
    """Used on one event loop."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._balancer = Balancer(paths)
        self._fleet: Fleet | None = None
        self._told = 0.0
        self._changed = asyncio.Event()
        self._done = asyncio.Event()
        self._pause = FIRST_PAUSE

    async def run(self) -> None:
        """Until a signal, which leaves HAProxy running, or `DELETE /fleet`, which does not."""
        with suppress(OSError, msgspec.MsgspecError):
            self._fleet = msgspec.json.decode(self._paths.fleet.read_bytes(), type=Fleet)
        self._balancer.adopt()
        runners = [
            await _serve(self._admin(), self._paths.front_socket),
            await _serve(View(lambda: self._fleet, self._own_metrics).app(), self._paths.view_socket),
        ]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._done.set)
        tasks = [asyncio.create_task(self._keep()), asyncio.create_task(self._keep_ray())]
        await self._done.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for runner in runners:
            await runner.cleanup()

    async def _keep(self) -> None:
        while True:
            if self._fleet is not None:
                try:
                    await self._balancer.keep(self._fleet)
                except Exception:  # the next try may succeed, and nobody else keeps the address alive
                    log.exception("HAProxy could not be looked after")
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._changed.wait()
            self._changed.clear()

    async def _keep_ray(self) -> None:
        """Start a Ray of our own again when it has died, and the controller with it. Another one is other people's business."""
        while True:
            await asyncio.sleep(RAY_SECONDS)
            own = own_ray.find(self._paths)
            if own is None or not own.processes or own_ray.is_running(own) or self._fleet is None:
                continue
            log.error("Ray is gone: it is started again")
            try:
                await self._recover()
                self._pause = FIRST_PAUSE
            except (OSError, MoshiSttError) as error:
                log.error("Ray: %s", error)
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, LONGEST_PAUSE)

    async def _recover(self) -> None:
        """Raises MoshiSttError."""
        command = (sys.executable, "-m", "moshi_stt.cluster.recover", str(self._paths.folder))
        running = await asyncio.create_subprocess_exec(*command)
        try:
            async with asyncio.timeout(RECOVERY_SECONDS):
                status = await running.wait()
        except TimeoutError:
            status = None
        finally:
            if running.returncode is None:
                running.kill()
                await running.wait()
        if status != 0:
            raise MoshiSttError(f"it could not be started again: {process.tail(self._paths.log('front'))}")

    def _own_metrics(self) -> str:
        fleet = self._fleet
        ready = sum(report.phase == "ready" for report in fleet.reports) if fleet is not None else 0
        rows = (
            ("target", "Replicas that there should be.", fleet.target if fleet is not None else 0),
            ("replicas", "Replicas that are ready.", ready),
            ("haproxy_restarts", "Times HAProxy had to be started again.", self._balancer.restarts),
        )
        return "".join(
            f"# HELP moshi_stt_cluster_{name} {text}\n# TYPE moshi_stt_cluster_{name} gauge\nmoshi_stt_cluster_{name} {value}\n"
            for name, text, value in rows
        )

    # ---- the socket --------------------------------------------------------------------------------------------------

    def _admin(self) -> web.Application:
        app = web.Application(client_max_size=4 << 20)
        app.router.add_put("/fleet", self._put)
        app.router.add_get("/fleet", self._get)
        app.router.add_delete("/fleet", self._delete)
        return app

    async def _put(self, request: web.Request) -> web.Response:
        try:
            fleet = msgspec.json.decode(await request.read(), type=Fleet)
        except msgspec.MsgspecError as error:
            return web.Response(status=400, text=str(error))
        self._told = asyncio.get_running_loop().time()
        if fleet != self._fleet:
            self._fleet = fleet
            write_json(self._paths.fleet, fleet)
            self._changed.set()
        return self._state()

    async def _get(self, request: web.Request) -> web.Response:
        return self._state()

    async def _delete(self, request: web.Request) -> web.Response:
        self._fleet = None
        self._paths.fleet.unlink(missing_ok=True)
        await self._balancer.stop()
        self._done.set()
        return self._state()

    def _state(self) -> web.Response:
        state = State(
            fleet=self._fleet,
            haproxy_pid=self._balancer.pid,
            haproxy_restarts=self._balancer.restarts,
            why=self._balancer.why,
            controller_seconds=asyncio.get_running_loop().time() - self._told if self._told else -1.0,
        )
        return web.Response(body=msgspec.json.encode(state), content_type="application/json")


async def _serve(app: web.Application, path: Path) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    await asyncio.to_thread(path.unlink, missing_ok=True)
    await web.UnixSite(runner, str(path)).start()
    await asyncio.to_thread(path.chmod, 0o600)
    return runner


# ---- for the others ----------------------------------------------------------------------------------------------------


def start(paths: Paths) -> Running:
    """Start a front, which outlives this process. Raises MoshiSttError."""
    command = [sys.executable, "-m", "moshi_stt.cluster.front", str(paths.folder)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    pid = process.start_detached(command, paths.log("front"), env, paths.folder)
    started = process.started_at(pid)
    if started is None:
        raise MoshiSttError(f"the front ended at once: {process.tail(paths.log('front'))}")
    return Running(pid, started)


async def tell(paths: Paths, method: str, fleet: Fleet | None = None) -> State:
    """Ask the front, or tell it what there is. Raises MoshiSttError where it does not answer."""
    body = msgspec.json.encode(fleet) if fleet is not None else None
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    connector = aiohttp.UnixConnector(str(paths.front_socket))
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.request(method, "http://front/fleet", data=body) as answer,
        ):
            answer.raise_for_status()
            return msgspec.json.decode(await answer.read(), type=State)
    except (TimeoutError, OSError, aiohttp.ClientError, msgspec.MsgspecError) as error:
        raise MoshiSttError(
            f"the front of the cluster does not answer at {paths.front_socket}: {error or 'too late'}"
        ) from None


def main() -> int:
    """The process."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
    paths = Paths(Path(sys.argv[1]))
    with paths.front_lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.info("another front runs already")
            return 0
        started = process.started_at(os.getpid())
        write_json(paths.front, Running(os.getpid(), started or ""))
        asyncio.run(Front(paths).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
