"""What the server says of itself: build, modules, health, readiness, metrics.

The first two have moshi-server's keys, all values strings (contract section 1.5); the values are ours.
"""

import datetime
import platform
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import msgspec
from aiohttp import web

from moshi_stt import __version__
from moshi_stt.server.metrics import CONTENT_TYPE
from moshi_stt.server.service import Service

PACKAGE = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"


@cache
def build_info() -> dict[str, str]:
    """When and from what this was built. Outside a git checkout the git values are "unknown", the description the version."""
    built = datetime.datetime.fromtimestamp((PACKAGE / "__init__.py").stat().st_mtime, datetime.UTC)
    committed = _git("log", "-1", "--format=%cI")
    dirty = _git("describe", "--always", "--dirty", "--tags")
    return {
        "build_timestamp": built.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "build_date": built.date().isoformat(),
        "git_branch": _git("rev-parse", "--abbrev-ref", "HEAD") or UNKNOWN,
        "git_timestamp": committed or UNKNOWN,
        "git_date": (committed or UNKNOWN)[:10],
        "git_hash": _git("rev-parse", "HEAD") or UNKNOWN,
        "git_describe": f"moshi-stt {__version__}" + (f" ({dirty})" if dirty else ""),
        "rustc_host_triple": sysconfig.get_platform(),
        "rustc_version": f"none: {platform.python_implementation()} {platform.python_version()}",
        "cargo_target_triple": sysconfig.get_platform(),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this package lies in; None without one."""
    root = PACKAGE.parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    try:
        done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def start_lines(service: Service, host: str, port: int) -> list[str]:
    """What the log says when everything is ready: what runs on what, how fast, and where it is to be reached."""
    lines = []
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    for served in service:
        name, about = served.module.name, served.engine.info
        lines.append(
            f"{name}: {about.model} on {about.device}, {about.dtype}, {about.total_slots} slot{'s'[: about.total_slots != 1]}"
        )
        lines += [f"{name}: {key}: {value}" for key, value in about.details.items()]
        if about.languages and not any(key.startswith("language") for key in about.details):
            lines.append(f"{name}: languages: {', '.join(about.languages)}")
        lines.append(f"{name}: ready at ws://{shown}:{port}{served.module.path}")
    if service.workers is not None:
        lines.append(f"WebSockets are carried by {len(service.workers)} processes next to this one")
    why_off = service.connections.spool.why_off
    if why_off is not None:
        lines.append(f"audio that comes ahead of recognition is held in memory only: {why_off}")
    everywhere = " (and this machine's other addresses)" if host in ("0.0.0.0", "::") else ""
    lines.append(f"page, metrics and health at http://{shown}:{port}/{everywhere}")
    return lines


def modules_info(service: Service) -> list[dict[str, str]]:
    """One object a module; counters are strings too. Nothing of a module whose model is still loading but its path."""
    modules = []
    for served in service:
        engine = served.engine
        info = {"path": served.module.path}
        if engine.ready or service.is_started:
            about = engine.info
            info = {
                "type": about.kind,
                "path": served.module.path,
                "lm": about.model,
                "audio_tokenizer": about.audio_tokenizer,
                "used_slots": str(engine.used_slots),
                "total_slots": str(engine.total_slots),
                "device": about.device,
                "dtype": about.dtype,
                "languages": ",".join(about.languages),
            }
        modules.append(info)
    return modules


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", status=status)


def health(service: Service) -> web.Response:
    """200 while the process serves or is about to; 503 with the reason after a failure."""
    if service.failure is not None:
        return json_response({"status": "failed", "reason": service.failure}, 503)
    return json_response({"status": "ok"})


def ready(service: Service) -> web.Response:
    """200 when every module's model is warm and has a free slot; else 503 with the reason."""
    reason = service.unready()
    if reason is not None:
        return json_response({"status": "not ready", "reason": reason}, 503)
    slots = {
        served.module.name: {"used_slots": served.engine.used_slots, "total_slots": served.engine.total_slots}
        for served in service
    }
    return json_response({"status": "ready", "modules": slots})


async def metrics(service: Service) -> web.Response:
    """The counts of all processes."""
    if service.devices is not None:
        text = await service.devices.metrics(service.metrics.render().decode())
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})
    others, queued = await service.workers.count() if service.workers is not None else ([], {})
    return web.Response(body=service.metrics.render(others, queued), headers={"Content-Type": CONTENT_TYPE})
