"""Follow README as a newcomer does: a fresh clone, an empty home, an empty environment, with uv on PATH or without it.

    python tests/full/follow_readme.py [--without-uv] [--port N]

Every command, program and address of this server that README prints is run or opened, from top to bottom, each in a new shell;
the output that README shows must be the output that comes (a line `…` stands for any lines). What cannot run here stands in
README's own comment `<!-- Not run: … -->`, a line each: the command, a colon, the reason.

Python standard library only. Leaves nothing: the server is stopped and the folder removed, whatever happens.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PORT = 8080
"""The port that README prints."""
ANSWERS = ("moshi-stt advise",)
"""Commands whose status 1 is an answer: this machine would not keep up."""

SECONDS = 900
"""For one command: the first one downloads packages."""

PASSED_ON = re.compile(r"(?i)(https?|no|all)_proxy|(PIP|UV)_\w*(INDEX|CERT)\w*|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE")
"""Variables by which a machine reaches its package index: the only ones of this environment that the newcomer has too."""

COMMAND = re.compile(r"moshi-(stt|server) \w|scripts/\w+\.sh|export ")
"""What an inline command begins with; a program's name alone is none."""

RECORDING = "interview.m4a"
"""What README calls the reader's own recording."""


class Step(NamedTuple):
    """One thing to do. kind: `command`, `python` or `address`; shown: the output that README prints after it."""

    line: int
    kind: str
    text: str
    shown: str = ""


class NotAsPrinted(Exception):
    """README says something that did not happen."""


# ---- reading README ------------------------------------------------------------------------------------------------------


def steps(page: str) -> Iterator[Step]:
    """What README has the reader do, from top to bottom."""
    fenced = re.compile(r"^```(?P<language>\w*)\n(?P<block>.*?)^```|(?P<code>`[^`]+`)|(?P<address><http[^>]+>)", re.M | re.S)
    for found in fenced.finditer(re.sub(r"<!--.*?-->", blank, page, flags=re.S)):
        line = page.count("\n", 0, found.start()) + 1
        if found["block"] is not None:
            yield from block_steps(line, found["language"], found["block"])
        elif found["address"]:
            if "127.0.0.1" in found["address"]:
                yield Step(line, "address", found["address"].strip("<>"))
        else:
            code = " ".join(found["code"].strip("`").split())
            if COMMAND.match(code):
                yield Step(line, "command", code)


def blank(found: re.Match[str]) -> str:
    """A comment without its text; line numbers stay right."""
    return "\n" * found[0].count("\n")


def block_steps(line: int, language: str, block: str) -> Iterator[Step]:
    """A program, or commands (all lines of `sh`, those after `$ ` elsewhere) with the output that follows them."""
    if language == "python":
        yield Step(line, "python", block)
    elif language == "sh":
        for number, command in enumerate(block.splitlines(), line + 1):
            yield Step(number, "command", re.sub(r"\s+#\s.*", "", command))
    else:
        for found in re.finditer(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.M):
            number = line + 1 + block.count("\n", 0, found.start())
            yield Step(number, "command", found[1], found[2])


def reasons(page: str) -> dict[str, str]:
    """Command → why it is not run, from README's comment."""
    (comment,) = re.findall(r"<!-- Not run: .*?\n(.*?)-->", page, re.S)
    return dict(re.fullmatch(r"(.+?): (.+)", line).groups() for line in comment.strip().splitlines())  # type: ignore[union-attr]


def as_printed(shown: str, came: str) -> bool:
    """Whether output is what README shows; a line `…` stands for any lines."""
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else re.escape(line) + r"\n" for line in shown.splitlines())
    return re.fullmatch(pattern, came) is not None


# ---- following it --------------------------------------------------------------------------------------------------------


class Newcomer:
    """Somebody at a clean machine who has README and nothing else."""

    def __init__(self, folder: Path, uv: bool, port: int) -> None:
        self.checkout, self.home, self.port = folder / "moshi-stt", folder / "home", port
        self.home.mkdir()
        self.seconds = 0.0
        self.env = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        self.env |= {"HOME": str(self.home), "PATH": self.path(folder / "bin", uv), "LANG": "C.UTF-8"}
        self.env["TMPDIR"] = str(folder)

    @staticmethod
    def path(binaries: Path, uv: bool) -> str:
        """The system's own folders, with this Python, and uv only where it is wanted."""
        binaries.mkdir()
        (binaries / f"python3.{sys.version_info.minor}").symlink_to(Path(sys._base_executable).resolve())  # type: ignore[attr-defined]
        if uv:
            (binaries / "uv").symlink_to(uv_program())
        system = [folder for folder in ("/usr/local/bin", "/usr/bin", "/bin") if not Path(folder, "uv").exists()]
        return os.pathsep.join([str(binaries), *system])

    def type(self, command: str) -> str:
        """Run a command in a new shell of the checkout and return its standard output. Raises NotAsPrinted where it fails."""
        begun, own = time.monotonic(), command.replace(str(PORT), str(self.port))
        if own.startswith("scripts/install.sh") and self.port != PORT:
            own += f" --port {self.port}"
        # A login shell without /etc/profile, which would set PATH.
        script = f"[ ! -f ~/.profile ] || . ~/.profile\n{own}"
        done = subprocess.run(
            ["bash", "-uc", script], cwd=self.checkout, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        if done.returncode > (command in ANSWERS) or "Traceback" in done.stderr:
            raise NotAsPrinted(f"status {done.returncode}\n{done.stdout}{done.stderr}")
        self.seconds = time.monotonic() - begun
        return done.stdout.replace(str(self.port), str(PORT))

    def obey(self, output: str) -> None:
        """Type what the last lines of the installation say to type."""
        if told := re.search(r"^To call moshi-stt by its name.*:\n  (export .+)$", output, re.M):
            print(f"    it says to type: {told[1]}")
            self.type(told[1])

    def run(self, program: str) -> str:
        """Run a program by the checkout's Python, or, where it names a package to install, by an environment with that."""
        python = self.checkout / ".venv" / "bin" / "python"
        if wanted := re.match(r"# pip install (.+)", program):
            python = self.home / "program" / "bin" / "python"
            self.type(f"python3.{sys.version_info.minor} -m venv ~/program && ~/program/bin/pip install -q {wanted[1]}")
        path = self.checkout / "program.py"
        path.write_text(program.replace(str(PORT), str(self.port)))
        return self.type(f"{python} {path.name}")

    def open(self, address: str) -> None:
        with urllib.request.urlopen(address.replace(str(PORT), str(self.port)), timeout=30) as answer:
            if b"<html" not in answer.read():
                raise NotAsPrinted("that is no page")


def uv_program() -> Path:
    """uv itself, not a shim that needs an environment."""
    try:
        from uv import find_uv_bin

        return Path(find_uv_bin())
    except ImportError:
        found = shutil.which("uv")
    if found is None:
        sys.exit("uv is not installed: pip install uv, or --without-uv")
    return Path(found)


def follow(newcomer: Newcomer, page: str) -> int:
    """Do everything that README says, and return how many things did not come as printed."""
    not_run, wrong = reasons(page), 0
    shutil.copy(newcomer.checkout / "src" / "moshi_stt" / "data" / "speech" / "beckett.wav", newcomer.checkout / RECORDING)
    used = set()
    for step in steps(page):
        name = step.text if step.kind != "python" else f"{len(step.text.splitlines())} lines of Python"
        print(f"README.md:{step.line}: {name}", flush=True)
        if step.text in not_run:
            used.add(step.text)
            print(f"    not run: {not_run[step.text]}")
            continue
        try:
            came = do(newcomer, step)
        except (NotAsPrinted, OSError, subprocess.TimeoutExpired) as error:
            wrong += 1
            print(f"    FAILED: {error}")
            continue
        print("".join(f"    {line}\n" for line in came.splitlines()[-12:]), end="")
        if newcomer.seconds >= 10:
            print(f"    ({newcomer.seconds:.0f} s)")
        if step.shown and not as_printed(step.shown, came):
            wrong += 1
            print(f"    NOT AS PRINTED. README shows:\n{step.shown}")
    if unused := set(not_run) - used:
        wrong += 1
        print(f"FAILED: README explains what it does not print: {', '.join(sorted(unused))}")
    return wrong


def do(newcomer: Newcomer, step: Step) -> str:
    if step.kind == "python":
        return newcomer.run(step.text)
    if step.kind == "address":
        newcomer.open(step.text)
        return ""
    came = newcomer.type(step.text)
    newcomer.obey(came)
    return came


@contextmanager
def newcomer_with(uv: bool, port: int) -> Iterator[Newcomer]:
    """A clone of the last commit in a new folder. Afterwards its server is stopped and the folder removed."""
    with tempfile.TemporaryDirectory(prefix="readme-") as name:
        newcomer = Newcomer(Path(name), uv, port)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(newcomer.checkout)], check=True)
        try:
            yield newcomer
        finally:
            newcomer.type("scripts/stop.sh")


def main() -> int:
    parser = argparse.ArgumentParser(description="Follow README in a fresh clone with an empty home.")
    parser.add_argument("--without-uv", action="store_true", help="leave uv off PATH; the scripts then use pip")
    parser.add_argument("--port", type=int, default=PORT, help=f"where {PORT} is taken: use this port in its place")
    args = parser.parse_args()
    with newcomer_with(not args.without_uv, args.port) as newcomer:
        commit = newcomer.type("git log -1 --format=%h").strip()
        print(f"commit {commit}, {'without' if args.without_uv else 'with'} uv, HOME empty, PATH {newcomer.env['PATH']}")
        wrong = follow(newcomer, (newcomer.checkout / "README.md").read_text(encoding="utf-8"))
        left = sorted(path.name for path in newcomer.home.iterdir())
    print(f"\nhome has afterwards: {', '.join(left)}")
    print("README is as it says" if wrong == 0 else f"{wrong} of README's lines did not come as printed")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
