"""`moshi-stt configs`: the shipped configurations, with what each is for."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moshi_stt.config import EmbeddedModule, Module
from moshi_stt.constants import FRAME_SECONDS


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "configs",
        help="list the shipped configurations, or print one",
        description="Print a shipped configuration, or list all with languages, delay, size and needs.",
        epilog="A configuration of your own: moshi-stt configs NAME > my.toml, edit my.toml, moshi-stt worker --config my.toml",
    )
    parser.add_argument("which", nargs="?", metavar="NAME", help="print this one; without it, list them")
    return parser


def run(args: argparse.Namespace) -> int:
    from moshi_stt.config_load import shipped_names, shipped_text

    if args.which is not None:
        print(shipped_text(args.which), end="")
        return 0
    print("\n".join(table([("NAME", "LANGUAGES", "DELAY", "TO DOWNLOAD", "NEEDS"), *map(row, shipped_names())])))
    return 0


def row(name: str) -> tuple[str, ...]:
    """What a user wants to know of a shipped configuration."""
    from moshi_stt.config_load import load_config

    (module,) = load_config(name).config.modules
    return (name, *facts(module))


def facts(module: Module) -> tuple[str, str, str, str]:
    """Languages, delay, size of the download, needs."""
    if isinstance(module, EmbeddedModule):
        return "English", "about 1 s", "nothing", "any CPU"
    from moshi_stt.engines import languages_of
    from moshi_stt.models.hub import parse_reference

    delay = f"{module.asr_delay_in_tokens * FRAME_SECONDS:.1f} s"
    if Path(module.lm_model_file).is_relative_to(Path(__file__).parents[1]):
        return "some phrases, for tests", delay, "nothing", "any CPU, and PyTorch or MLX"
    names = {"en": "English", "fr": "French"}
    languages = ", ".join(names.get(code, code) for code in languages_of(module.lm_model_file))
    names_of_files = (module.lm_model_file, module.text_tokenizer_file, module.audio_tokenizer_file)
    files = [file for name in names_of_files if (file := parse_reference(name)) is not None]
    sizes = [file.expected_bytes for file in files]
    about = "" if all(file.known for file in files) else "about "
    size = "not stated" if None in sizes else f"{about}{sum(size for size in sizes if size) / 1e9:.1f} GB"
    needs = "GPU, Apple silicon or a fast CPU" if "1b" in module.lm_model_file else "GPU or Apple silicon"
    return languages, delay, size, needs


def table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
