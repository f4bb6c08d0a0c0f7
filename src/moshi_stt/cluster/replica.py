"""One replica: keeps an ordinary `moshi-stt worker` running on this host. Without Ray, which only places it (`actors.py`).

The worker is a process of a session of its own and outlives this one. Its process id and port are in a state file, so that
whoever supervises the replica next finds it again.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec

from moshi_stt.cluster import process, readings
from moshi_stt.cluster.spec import ClusterSpec, Paths, Phase, Report, WorkerRecord, write_json
from moshi_stt.errors import MoshiSttError
from moshi_stt.server.resume import REPLICA_VARIABLE

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
ANSWER_SECONDS = 5.0
"""How long the worker has to answer one request."""

HANG_SECONDS = 30.0
"""A worker that has not answered for so long is killed."""

RED_SECONDS = 20.0
"""A worker whose `/health` is red ends by itself; one that does not in this time is killed."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Before a worker that died is started again, in seconds; doubles each time."""

SOUND_SECONDS = 60.0
"""After so long without fault the pause is the first one again."""

GRACE_SECONDS = 30.0
"""Beyond `drain_seconds`, for a worker to end."""


class Replica:
    """Used on one event loop. `run` until `stop`; `report` at any time."""

    def __init__(self, name: str, spec: ClusterSpec, paths: Paths, node: str) -> None:
        self.name, self.spec, self._paths, self._node = name, spec, paths, node
        self._worker: WorkerRecord | None = None
        self._phase: Phase = "starting"
        self._why = ""
        self._restarts = 0
        self._pause = FIRST_PAUSE
        self._since = self._answered = time.monotonic()
        self._red_since: float | None = None
        self._was_ready = False
        self._readings = readings.Readings(False, 0, 0, {})
        self._earlier: list[tuple[float, dict[float, float]]] = []
        self._port = 0
        self._stopped = asyncio.Event()

    def report(self) -> Report:
        worker = self._worker
        now = time.monotonic()
        past = next((buckets for at, buckets in self._earlier if now - at <= 5.0), self._readings.buckets)
        return Report(
            name=self.name,
            revision=worker.revision if worker is not None else self.spec.revision,
            phase=self._phase,
            node=self._node,
            host=worker.host if worker is not None else "",
            port=worker.port if worker is not None else 0,
            wyoming_port=worker.wyoming_port if worker is not None else None,
            pid=worker.pid if worker is not None else 0,
            actor_pid=os.getpid(),
            used=self._readings.used,
            total=self._readings.total,
            lag_seconds=readings.lag(past, self._readings.buckets),
            restarts=self._restarts,
            why=self._why,
        )

    async def run(self) -> None:
        """Keep the worker running. Ends after `stop`."""
        self._paths.make()
        self._adopt()
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while not self._stopped.is_set():
                try:
                    await self._tick(session)
                except MoshiSttError as error:
                    self._fail(str(error))
                    await self._back_off()
                await asyncio.sleep(TICK_SECONDS)

    async def stop(self, drain_seconds: float) -> None:
        """End the worker: it takes no new streams and lets its own go on for so long. The phase is `gone` then. Idempotent."""
        self._stopped.set()
        if self._phase in ("stopping", "gone"):
            return
        self._phase = "stopping"
        if self._worker is not None:
            number = signal.SIGTERM if drain_seconds > 0 else signal.SIGINT
            await process.end(self._worker.pid, self._worker.started, drain_seconds + GRACE_SECONDS, number)
        self._worker = None
        self._paths.record(self.name).unlink(missing_ok=True)
        self._phase = "gone"

    # ---- the worker --------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over the worker that a predecessor left running."""
        try:
            record = msgspec.json.decode(self._paths.record(self.name).read_bytes(), type=WorkerRecord)
        except (OSError, msgspec.MsgspecError):
            return
        self._port = record.port
        if not process.is_alive(record.pid, record.started):
            return
        if record.devices != os.environ.get("CUDA_VISIBLE_DEVICES"):
            log.warning("%s: the worker that runs has other GPUs than Ray gives now: it is ended", self.name)
            process.send(record.pid, record.started, signal.SIGKILL)
            return
        log.info("%s: goes on with worker %d on port %d", self.name, record.pid, record.port)
        self._worker = record

    def _start(self) -> None:
        spec = self.spec
        host = "127.0.0.1" if self._is_next_to_haproxy else self._node
        port = self._port if self._port and _is_free(host, self._port) else _free_port(host)
        wyoming_port = _free_port(host) if spec.wyoming is not None else None
        folder = Path(spec.folder) if Path(spec.folder).is_dir() else self._paths.folder
        pid = process.start_detached(
            self._command(host, port, wyoming_port), self._paths.log(self.name), self._environment(), folder
        )
        started = process.started_at(pid)
        if started is None:
            raise MoshiSttError(f"the worker ended at once: {process.tail(self._paths.log(self.name))}")
        self._port = port
        self._worker = WorkerRecord(
            pid=pid,
            started=started,
            host=host,
            port=port,
            wyoming_port=wyoming_port,
            revision=spec.revision,
            devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )
        write_json(self._paths.record(self.name), self._worker)
        self._phase, self._was_ready, self._red_since = "starting", False, None
        self._since = self._answered = time.monotonic()
        self._readings, self._earlier = readings.Readings(False, 0, 0, {}), []

    @property
    def _is_next_to_haproxy(self) -> bool:
        """Whether nobody but HAProxy on this host connects to the worker."""
        return self.spec.is_local and self._node == self.spec.proxy

    def _command(self, host: str, port: int, wyoming_port: int | None) -> list[str]:
        spec = self.spec
        config = spec.config
        if spec.config_text is not None:
            path = self._paths.config(spec.revision)
            path.write_text(spec.config_text, encoding="utf-8")
            config = str(path)
        command = [sys.executable, "-m", "moshi_stt", "worker", "--config", config, "--addr", host, "--port", str(port)]
        if wyoming_port is not None:
            command += ["--wyoming", f"tcp://{f'[{host}]' if ':' in host else host}:{wyoming_port}"]
        if not self._is_next_to_haproxy:
            command += ["--trusted-proxy", spec.proxy]
        if spec.gpus > 1 and "--devices" not in spec.worker_flags:
            command += ["--devices", "all"]
        return [*command, *spec.worker_flags]

    def _environment(self) -> dict[str, str]:
        """This process's, without what Ray put there for its own."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        if self.spec.cpus < 1:
            env.pop("OMP_NUM_THREADS", None)  # Ray sets 1 where an actor has no whole core
        return env | {REPLICA_VARIABLE: self.name.removeprefix("r")}

    # ---- watching ----------------------------------------------------------------------------------------------------

    async def _tick(self, session: aiohttp.ClientSession) -> None:
        worker = self._worker
        if worker is None:
            await asyncio.to_thread(self._start)
            return
        if not process.is_alive(worker.pid, worker.started):
            if self._phase != "failing":  # else it was killed, and why is said
                self._fail(f"the worker ended: {process.tail(self._paths.log(self.name))}")
            await self._back_off()
            return
        now = time.monotonic()
        try:
            await self._ask(session, worker)
            self._answered = now
        except (TimeoutError, aiohttp.ClientError) as error:
            self._why = f"no answer: {error or 'too late'}"
        if self._was_ready and now - self._answered > HANG_SECONDS:
            self._kill(worker, f"the worker did not answer for {HANG_SECONDS:.0f} s")
        elif self._red_since is not None and now - self._red_since > RED_SECONDS:
            self._kill(worker, f"the worker did not end after its failure ({self._why})")
        elif not self._was_ready and now - self._since > self.spec.start_seconds:
            self._kill(worker, f"the worker was not ready within {self.spec.start_seconds:.0f} s")
        elif self._was_ready and now - self._since > SOUND_SECONDS:
            self._pause = FIRST_PAUSE

    async def _ask(self, session: aiohttp.ClientSession, worker: WorkerRecord) -> None:
        url = f"http://{f'[{worker.host}]' if ':' in worker.host else worker.host}:{worker.port}"
        async with session.get(f"{url}/health") as answer:
            body = await answer.text()
            if answer.status != 200:
                self._why = body[:200]
                self._red_since = self._red_since or time.monotonic()
                return
        self._red_since = None
        async with session.get(f"{url}/metrics") as answer:
            self._readings = readings.parse(await answer.text())
        now = time.monotonic()
        self._earlier = [(at, buckets) for at, buckets in self._earlier if now - at <= 5.0]
        self._earlier.append((now, self._readings.buckets))
        if self._readings.is_ready:
            if not self._was_ready:
                self._since = now
            self._was_ready, self._phase, self._why = True, "ready", ""

    def _kill(self, worker: WorkerRecord, why: str) -> None:
        process.send(worker.pid, worker.started, signal.SIGKILL)
        self._fail(why)

    def _fail(self, why: str) -> None:
        log.error("%s: %s", self.name, why)
        self._phase, self._why = "failing", why
        self._red_since = None

    async def _back_off(self) -> None:
        """Wait, longer each time, and let the next tick start a worker."""
        self._worker = None
        self._paths.record(self.name).unlink(missing_ok=True)
        self._restarts += 1
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stopped.wait()


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried, suppress(OSError):
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind((host, port))
        return True
    return False


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
        return port
