"""The arrows of docs/internals/architecture.md: who may import whom, read from the source, also inside functions."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moshi_stt

PACKAGE = Path(__file__).parents[2] / "src" / "moshi_stt"

FRAMEWORKS = {"torch", "triton", "mlx", "aiohttp", "uvloop", "ray", "fastapi", "starlette", "transformers"}

LEAVES = {
    "config",
    "config_table",
    "data",
    "devices",
    "install",
    "constants",
    "cores",
    "errors",
    "events",
    "origins",
    "packed",
    "sample",
    "signatures",
    "unacknowledged",
}
"""Modules at the top of the package that import only each other."""

ALLOWED = {
    # folder or module: (what of the package it may import besides the leaves, which frameworks)
    "__init__": ({"audio", "client", "serving", "sync"}, set()),
    "__main__": ({"cli"}, set()),
    "config_load": ({"config_load", "models"}, set()),
    "protocol": ({"engine"}, set()),
    "text": ({"text"}, set()),
    "audio": ({"audio"}, set()),
    "engine": ({"engine", "audio", "text"}, set()),
    "session": ({"session", "engine", "audio"}, set()),
    "client": ({"client", "protocol", "audio", "text"}, {"aiohttp"}),
    "sync": ({"client", "text"}, set()),
    "models": ({"models", "engine", "text", "audio"}, {"torch", "triton", "mlx"}),
    "server": ({"server", "session", "protocol", "engine", "audio", "text"}, {"aiohttp", "uvloop"}),
    "cluster": ({"cluster", "server", "client", "engine", "audio", "text"}, {"ray", "aiohttp"}),
    "engines": ({"engines", "models", "engine", "text"}, {"torch"}),
    "selftest": ({"engine", "audio", "text"}, set()),
    "serving": ({"serving", "config_load", "server", "engines"}, set()),
    "cli": (
        {
            "cli",
            "config_load",
            "engines",
            "selftest",
            "server",
            "client",
            "cluster",
            "models",
            "engine",
            "session",
            "audio",
            "text",
        },
        {"torch", "mlx", "uvloop", "aiohttp"},
    ),
}

TORCH_FREE_MODELS = {
    "spec",
    "spec_tables",
    "weights",
    "report",
    "tensors",
    "affine",
    "hub",
    "embedded",
    "alignment",
    "cross_attention",
    "pronounce",
}
"""Files of models/ that are of no framework."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Full name of every module that a file imports."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the package imports by full names"
            assert node.module is not None
            if node.module in ("moshi_stt", "moshi_stt.models", "moshi_stt.server", "moshi_stt.engine"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def part(name: str) -> str:
    """`moshi_stt.engine.stream` → `engine`."""
    return name.split(".")[1] if "." in name else "__init__"


def top_level_name(name: str) -> str:
    """A name imported from the package itself, such as `__version__`, counts as the package."""
    found = part(name)
    return found if (PACKAGE / found).is_dir() or (PACKAGE / f"{found}.py").is_file() else "__init__"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    here = relative.parts[0].removesuffix(".py")
    if here in LEAVES:
        ours, frameworks = set[str](), set[str]()
    else:
        assert here in ALLOWED, f"{relative}: say in this test what it may import"
        ours, frameworks = ALLOWED[here]
    if here == "models" and path.stem in TORCH_FREE_MODELS:
        frameworks = set()
    for name in imports(path):
        root = name.split(".")[0]
        if root == "moshi_stt":
            assert top_level_name(name) in LEAVES | {"__init__"} | ours, f"{relative} imports {name}"
        elif root in FRAMEWORKS:
            assert root in frameworks, f"{relative} imports {name}"


def test_only_its_own_folder_imports_a_framework_of_models() -> None:
    for path in sources():
        folder = path.relative_to(PACKAGE).parts
        for name in imports(path):
            if name.split(".")[0] in ("torch", "triton") and folder[0] == "models":
                assert folder[1] == "torch_impl", f"{path} imports {name}"
            if name.split(".")[0] == "mlx" and folder[0] == "models":
                assert folder[1] == "mlx_impl", f"{path} imports {name}"


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that are loaded after a statement in a new process."""
    code = f"import sys; {statement}; print(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_else() -> None:
    assert not loaded_by("import moshi_stt") & (FRAMEWORKS | {"numpy", "msgspec", "onnxruntime", "av"})


def test_the_package_exports_what_programs_need() -> None:
    code = "from moshi_stt import Client, Server, read_file, transcribe"
    assert {"numpy", "av", "aiohttp"} <= loaded_by(code)
    assert {"Client", "Server", "read_file", "transcribe"} <= set(dir(moshi_stt))
    with pytest.raises(AttributeError, match="no attribute 'Sever'"):
        moshi_stt.Sever  # noqa: B018


def test_help_loads_nothing_heavy() -> None:
    code = """
import contextlib, io, moshi_stt.cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    moshi_stt.cli.main(["--help"])
"""
    assert not loaded_by(f"exec({code!r})") & (FRAMEWORKS | {"numpy", "msgspec", "onnxruntime", "av"})


def test_the_middle_runs_without_frameworks() -> None:
    modules = ("protocol", "session", "config_load", "engine.engine")
    assert not loaded_by("import " + ", ".join(f"moshi_stt.{module}" for module in modules)) & FRAMEWORKS
