"""Run the steps of deploy/Containerfile without a container engine: in an empty Debian root made by debootstrap, as root.

    python tests/full/container.py [--flavour cuda] [--root FOLDER]

Each instruction is carried out by chroot in that root: RUN by `sh -c` with the ARG and ENV of the file, COPY from the last
commit and only what `.dockerignore` lets through, USER and WORKDIR for what comes after them. Then ENTRYPOINT and CMD are
started as that user in a network of their own (so without internet), HEALTHCHECK must succeed, a recording must be transcribed
through the server, and STOPSIGNAL must end it with status 0. Not tried that way: the base image (Debian's own Python stands for
it), image layers, published ports, a GPU.

--root keeps the bare Debian in FOLDER for the next run. Leaves no process and no mount.
"""

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTAINERFILE = ROOT / "deploy" / "Containerfile"
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
SECONDS = 3_000
READY_SECONDS = 300
CLONE_NEWNET = 0x4000_0000
OF_THIS_MACHINE = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/ssl/certs/ca-certificates.crt")
"""What a container engine, or the build's network, brings into a container; and how this machine reaches its package index."""
INDEX = re.compile(r"(?i)(https?|no)_proxy|(PIP|UV)_\w*(INDEX|CERT)\w*|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE")


def instructions() -> Iterator[tuple[str, str]]:
    """(name, rest) of each instruction, its lines joined."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


class Image:
    """A root folder, and what the instructions have set so far."""

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        self.root, self.arguments = root, arguments
        self.env = {name: value for name, value in os.environ.items() if INDEX.fullmatch(name)}
        self.env |= {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        self.folder, self.user, self.set = "/", "root", dict[str, str]()

    def command(self, *words: str) -> list[str]:
        inner = f'cd {shlex.quote(self.folder)} && exec "$@"'
        return ["chroot", f"--userspec={self.user}", str(self.root), "sh", "-c", inner, "sh", *words]

    def run(self, *words: str) -> None:
        subprocess.run(self.command(*words), env=self.env, check=True, timeout=SECONDS, stdin=subprocess.DEVNULL)

    def do(self, name: str, rest: str) -> None:
        """One instruction. Raises CalledProcessError where its command fails, ValueError for one that is not known here."""
        match name:
            case "FROM":
                # The base image has Python in /usr/local; there Debian's own lets pip install.
                self.run("python3", "-m", "venv", "/usr/local")
            case "ARG":
                key, _, value = rest.partition("=")
                self.env[key] = self.arguments.get(key, value)
            case "ENV":
                key, _, value = rest.partition("=")
                self.env[key] = value
            case "RUN":
                self.run("sh", "-c", rest)
            case "COPY":
                self.copy(rest.split())
            case "WORKDIR":
                self.folder = rest
                self.run_as_root("mkdir", "-p", rest)
            case "USER":
                self.user = rest
            case "VOLUME" | "EXPOSE":
                pass
            case "STOPSIGNAL" | "HEALTHCHECK" | "ENTRYPOINT" | "CMD":
                self.set[name] = rest
            case _:
                raise ValueError(f"{CONTAINERFILE.name} has {name}, which this script does not know")

    def run_as_root(self, *words: str) -> None:
        subprocess.run(["chroot", str(self.root), *words], env=self.env, check=True, timeout=SECONDS)

    def copy(self, words: list[str]) -> None:
        """Files of the last commit, which .dockerignore must let through."""
        *sources, target = words
        ignored = Path(f"{CONTAINERFILE}.dockerignore").read_text().splitlines()
        for source in sources:
            if f"!{source}" not in ignored:
                raise ValueError(f"{source} is copied, but .dockerignore keeps it out")
        packed = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD", *sources], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(packed)) as files:
            files.extractall(self.root / self.folder.lstrip("/"), filter="data")
        if target not in ("./", *sources):
            raise ValueError(f"COPY to {target}: this script knows `./` and a folder to its own name")


def make_root(folder: Path) -> None:
    """A bare Debian with Python."""
    if not (folder / "usr" / "bin" / "python3").exists():
        print(f"==== debootstrap {SUITE} with {PACKAGES}", flush=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(folder)],
            stdout=subprocess.DEVNULL, check=True, timeout=SECONDS,
        )  # fmt: skip


@contextmanager
def working_root(bare: Path, folder: Path) -> Iterator[Path]:
    """A copy of the bare root with /proc and this machine's network settings; debootstrap made its devices."""
    root = folder / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", str(bare), str(root)], check=True)
    for name in OF_THIS_MACHINE:
        if Path("/", name).is_file():
            shutil.copy(Path("/", name), root / name)
    subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", str(root / "proc")], check=True)


def serve(image: Image) -> None:
    """Start the image as `docker run` does, check it, and stop it. Raises what fails."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot make a network of its own")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    command = [*json.loads(image.set["ENTRYPOINT"]), *json.loads(image.set["CMD"])]
    print(f"==== as {image.user}, without internet: {shlex.join(command)}", flush=True)
    server = subprocess.Popen(image.command(*command), env=image.env)
    try:
        image.run("moshi-stt", "status", "--url", "http://127.0.0.1:8080", "--wait", str(READY_SECONDS))
        check = image.set["HEALTHCHECK"].partition(" CMD ")[2]
        print(f"==== HEALTHCHECK: {check}", flush=True)
        image.run("sh", "-c", check)
        image.run("sh", "-c", 'moshi-stt transcribe --url ws://127.0.0.1:8080 "$(moshi-stt sample)"')
        server.send_signal(signal.Signals[image.set["STOPSIGNAL"]])
        status = server.wait(timeout=90)
    finally:
        server.kill()
        server.wait()
    print(f"==== {image.set['STOPSIGNAL']}: the server ended with status {status}")
    if status != 0:
        raise ChildProcessError("expected status 0")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the steps of deploy/Containerfile in a root made by debootstrap.")
    parser.add_argument("--flavour", default="cpu", choices=["cpu", "cuda"], help="the build argument FLAVOUR")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="keep the bare Debian there for the next run")
    args = parser.parse_args()
    if os.getuid() != 0 or shutil.which("debootstrap") is None:
        sys.exit("expected to run as root with debootstrap installed (apt-get install debootstrap)")
    if os.environ.get("IN_NAMESPACE") != "yes":  # mounts and processes end with it, whatever happens
        os.environ["IN_NAMESPACE"] = "yes"
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        os.execvp("unshare", [*unshare, sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory(prefix="container-") as name:
        bare = args.root or Path(name, "bare")
        make_root(bare)
        with working_root(bare, Path(name)) as root:
            image = Image(root, {"FLAVOUR": args.flavour})
            for instruction, rest in instructions():
                print(f"==== {instruction} {rest}", flush=True)
                image.do(instruction, rest)
            size = subprocess.run(["du", "-sxm", str(root)], capture_output=True, text=True, check=True).stdout.split()[0]
            print(f"==== the root has {size} MB", flush=True)
            serve(image)
    print("every step of the Containerfile did what it says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
