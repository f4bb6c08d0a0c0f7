"""`moshi-stt doctor`: what this machine has and lacks. Looks, and changes nothing.

Each line says OK, or what is missing and the command that mends it. What only some people need (GPU, Kyutai's models,
microphone) is told but does not make the exit status 1.
"""

import argparse
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from moshi_stt.cli.arguments import port_number
from moshi_stt.constants import DEFAULT_PORT
from moshi_stt.errors import MoshiSttError
from moshi_stt.install import install_command, requirements


class Finding(NamedTuple):
    """state: `ok`, `missing` (the server cannot do its work), or `note` (only some people need it)."""

    state: Literal["ok", "missing", "note"]
    what: str
    text: str
    remedy: str = ""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="name what is missing on this machine",
        description="Name what is missing on this machine. Exit status 1 where the server could not do its work.",
    )
    parser.add_argument("-p", "--port", type=port_number, default=DEFAULT_PORT, help="port to look at (default %(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    missing = False
    for check in (python, packages, embedded_model, frameworks, gpu, weights, microphone, lambda: port(args.port)):
        for finding in check():
            mark = {"ok": "OK     ", "missing": "MISSING", "note": "-      "}[finding.state]
            print(f"{mark} {finding.what}: {finding.text}")
            if finding.remedy:
                print(f"        {finding.remedy}")
            missing = missing or finding.state == "missing"
    return 1 if missing else 0


def python() -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")


def distributions(extra: str) -> Iterator[str]:
    """Names of the packages that the base install (""), or one extra, needs. Those of some platforms only are left out."""
    for text in requirements(extra):
        name = re.match(r"[A-Za-z0-9_.-]+", text)
        assert name is not None
        yield name[0]


def absent(names: Iterator[str]) -> list[str]:
    found = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
    return found


def packages() -> Iterator[Finding]:
    from moshi_stt.engines import EMBEDDED_PACKAGES

    names = absent(distributions(""))
    needed = [name for name in names if name not in EMBEDDED_PACKAGES]
    if needed:
        yield Finding("missing", "packages", f"not installed: {', '.join(needed)}", install_command("", needed))
    else:
        yield Finding("ok", "packages", "everything the server needs is installed")


def embedded_model() -> Iterator[Finding]:
    from moshi_stt.engines import EMBEDDED_PACKAGES, missing_packages

    names = missing_packages(EMBEDDED_PACKAGES)
    if names:
        yield Finding(
            "missing",
            "embedded English model",
            f"not installed: {', '.join(names)}",
            f"{install_command('', names)}   # where there is no wheel for this machine, serve Kyutai's model instead",
        )
        return
    from moshi_stt.sample import sample_path

    try:
        yield Finding("ok", "embedded English model", f"in {sample_path().parent}")
    except MoshiSttError as e:
        yield Finding("missing", "embedded English model", str(e))


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def frameworks() -> Iterator[Finding]:
    for extra, package in (("torch", "torch"), ("mlx", "mlx")):
        if extra == "mlx" and not (sys.platform == "darwin" and platform.machine() == "arm64"):
            continue
        version = version_of(package)
        names = absent(distributions(extra))
        if names:
            what = f"{package} {version} is there, but not {', '.join(names)}" if version else "not installed"
            yield Finding("note", f"Kyutai's models on {package}", what, install_command(extra))
        else:
            yield Finding("ok", f"Kyutai's models on {package}", f"{package} {version}")


def gpu() -> Iterator[Finding]:
    if sys.platform == "darwin":
        if platform.machine() == "arm64":
            yield Finding("ok", "GPU", "Apple silicon")
        else:
            yield Finding("note", "GPU", "none that the models run on (Intel Mac); they run on the CPU")
        return
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield Finding("note", "GPU", "no NVIDIA driver here; the models run on the CPU")
        return
    command = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[:200]
        yield Finding("note", "GPU", f"nvidia-smi fails: {said}", "install the NVIDIA driver again")
        return
    names = "; ".join(done.stdout.strip().splitlines())
    if version_of("torch") is None:
        yield Finding("note", "GPU", f"{names}; PyTorch, which would use it, is not installed", install_command("torch"))
        return
    import torch

    cuda = torch.version.cuda
    if torch.cuda.is_available():
        yield Finding("ok", "GPU", f"{names}; PyTorch uses it (CUDA {cuda})")
        yield from kernels()
    elif cuda:
        yield Finding("note", "GPU", f"{names}; PyTorch is built for CUDA {cuda} and cannot use it", "update the driver")
    else:
        yield Finding("note", "GPU", f"{names}; this PyTorch is built without CUDA", "pip install --force-reinstall torch")


def kernels() -> Iterator[Finding]:
    """What Triton needs to build the kernels of Kyutai's models."""
    from moshi_stt.models.torch_impl.cuda.toolchain import NO_COMPILER, c_compiler

    compiler = c_compiler()
    if version_of("triton") is None:
        yield Finding("note", "GPU kernels", "Triton is not installed: several times slower without", "pip install triton")
    elif compiler is None:
        how = "sudo apt-get install gcc   # or your system's way; or name a compiler in CC"
        yield Finding("note", "GPU kernels", f"{NO_COMPILER}: PyTorch's own kernels serve, several times slower", how)
    else:
        yield Finding("ok", "GPU kernels", f"Triton builds them with {compiler}")


def weights() -> Iterator[Finding]:
    from moshi_stt.cli.validate import find_files
    from moshi_stt.config import KyutaiModule
    from moshi_stt.config_load import load_config, shipped_names

    for name in shipped_names():
        modules = [m for m in load_config(name).config.modules if isinstance(m, KyutaiModule)]
        if modules:
            missing = [check for module in modules for check in find_files(module) if check.path is None]
            if missing:
                text = f"{len(missing)} of its files are not on this machine"
                yield Finding("note", f"weights of {name}", text, f"moshi-stt download {name}")
            else:
                yield Finding("ok", f"weights of {name}", "on this machine")


def microphone() -> Iterator[Finding]:
    if version_of("sounddevice") is None:
        yield Finding("note", "microphone", "sounddevice is not installed", install_command("mic"))
        return
    try:
        import sounddevice
    except OSError:
        how = "brew install portaudio" if sys.platform == "darwin" else "sudo apt-get install libportaudio2"
        yield Finding("note", "microphone", "the system has no PortAudio library", how)
        return
    try:
        device = sounddevice.query_devices(kind="input")
    except (sounddevice.PortAudioError, ValueError) as e:
        yield Finding("note", "microphone", f"none found ({' '.join(str(e).split())})", "plug one in, or allow access to it")
        return
    yield Finding("ok", "microphone", str(device["name"]))


def port(number: int) -> Iterator[Finding]:
    from moshi_stt.server.addresses import bind

    try:
        bind("127.0.0.1", number).close()
    except MoshiSttError as e:
        yield Finding("note", f"port {number}", str(e))
        return
    yield Finding("ok", f"port {number}", "free")
