"""`moshi-stt validate`: are these files good, and is what they name on this machine? Fetches nothing and loads no model."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from moshi_stt.config import KyutaiModule, Module
from moshi_stt.errors import CheckpointError


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "validate",
        help="check configuration files and the weights they name",
        description="Check configuration files, and that the weights they name are on this machine and fit. Fetches nothing. "
        "Exit status 1 at the first file that is not good.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="TOML file, or the name of a shipped one")
    return parser


def run(args: argparse.Namespace) -> int:
    from moshi_stt.config_load import load_config

    for name in args.files:
        loaded = load_config(name)
        for warning in loaded.warnings:
            print(f"Warning: {warning}", file=sys.stderr)
        for module in loaded.config.modules:
            place = f"{loaded.source}: [modules.{module.name}]"
            checks = check_module(module)
            raise_absent(place, name, [check for check in checks if check.path is None])
            checked = ", ".join(check.key for check in checks) or "comes with the package"
            streams = "as many streams as keep up" if module.batch_size == "auto" else f"{module.batch_size} streams"
            print(f"{place} {module.path}, {streams}: {checked}")
        print(f"{loaded.source}: loaded successfully")
    return 0


def raise_absent(place: str, config: str, absent: "list[FileCheck]") -> None:
    """Raise CheckpointError that names each file that is not here, and how to have it. Nothing where none is absent."""
    if absent:
        lines = "".join(f"\n  {check.key} = {check.name}" for check in absent)
        on_hub = any(check.name.startswith("hf://") for check in absent)
        remedy = f"Fetch them: moshi-stt download {config}" if on_hub else "Check the paths."
        raise CheckpointError(f"{place} not on this machine:{lines}\n  {remedy}")


class FileCheck(NamedTuple):
    """One file that a module names. path: where it is on this machine, None where it is not."""

    key: str
    name: str
    path: Path | None


def check_module(module: Module) -> list[FileCheck]:
    """Each file of a module, and that the weights fit its shape as far as their headers tell.

    Raises ConfigError or CheckpointError for what does not fit.
    """
    if not isinstance(module, KyutaiModule):
        return []
    checks = find_files(module)
    found = {check.key: check.path for check in checks if check.path is not None}
    check_fit(module, found)
    return checks


def find_files(module: KyutaiModule) -> list[FileCheck]:
    """Where each file of a module is on this machine; nothing is fetched. Raises CheckpointError for a name that is none."""
    from moshi_stt.models.hub import find_cached, parse_reference

    checks = []
    for key in ("lm_model_file", "audio_tokenizer_file", "text_tokenizer_file", "config_file"):
        name = getattr(module, key)
        if name is not None:
            file = parse_reference(name)
            path = find_cached(file) if file is not None else Path(name) if Path(name).is_file() else None
            checks.append(FileCheck(key, name, path))
    return checks


def check_fit(module: KyutaiModule, found: dict[str, Path]) -> None:
    """Check the files that are there against the module's shape: names and shapes of tensors, size of the vocabulary."""
    from moshi_stt.engines import read_json
    from moshi_stt.models.spec_tables import spec_from_module
    from moshi_stt.models.weights import plan_lm, plan_mimi

    if module.config_file is not None and "config_file" not in found:
        return
    spec = spec_from_module(module, read_json(found["config_file"]) if module.config_file is not None else None)
    if "lm_model_file" in found:
        plan_lm(found["lm_model_file"], spec.lm)
    if "audio_tokenizer_file" in found:
        plan_mimi(found["audio_tokenizer_file"], spec.mimi)
    if "text_tokenizer_file" in found:
        check_tokenizer(found["text_tokenizer_file"], spec.lm.text_card)


def check_tokenizer(path: Path, text_card: int) -> None:
    """Needs sentencepiece, which comes with the model extras; without it the check is left out, as nothing could run anyway."""
    from moshi_stt.engines import missing_packages

    if not missing_packages(("sentencepiece",)):
        from moshi_stt.text.tokenizer import TextTokenizer

        TextTokenizer(path).check(text_card)
