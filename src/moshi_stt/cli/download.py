"""`moshi-stt download`: the weights that configurations name, fetched into the hub's cache."""

import argparse
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moshi_stt.models.hub import HubFile

DEFAULT = "stt-1b-en_fr"
HEADROOM = 1.02
"""Free space asked for, over the size of what is to come."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "download",
        help="fetch the weights of a configuration",
        description="Fetch the files that configurations name into the Hugging Face cache. Run again, it goes on from there.",
        epilog="Environment: HF_HOME (where the cache is), HF_TOKEN, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, HTTPS_PROXY.",
    )
    parser.add_argument(
        "configs",
        nargs="*",
        metavar="CONFIG",
        help=f"name of a shipped configuration (see `moshi-stt configs`), or a TOML file (default {DEFAULT})",
    )
    parser.add_argument("--config", "--model", dest="named", action="append", default=[], metavar="CONFIG", help="the same")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be fetched, ask the hub for it, and fetch nothing"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Fetch, and print where each file is. Raises ConfigError, CheckpointError or DownloadError."""
    from moshi_stt.models.hub import cache_folder, find_cached, parse_reference, remote_size, resolve

    configs = [*args.configs, *args.named] or [DEFAULT]
    references = list(dict.fromkeys(name for config in configs for name in named_files(config)))
    if not references:
        print("nothing to fetch: the model of this configuration comes with moshi-stt")
        return 0
    missing = [file for name in references if (file := parse_reference(name)) is not None and find_cached(file) is None]
    if missing:
        require_hub_package(missing)
        print(f"to fetch: {total(missing)} into {cache_folder()}")
        print("\n".join(f"  {file} ({size(file)})" for file in missing), flush=True)
        asked = [file for file in missing if args.dry_run or file.known is None]
        sizes = {file: remote_size(file) if file in asked else file.known.bytes if file.known else 0 for file in missing}
        check_space(sum(sizes.values()), cache_folder())
    if args.dry_run:
        if missing:
            print(f"the hub has them: {sum(sizes.values()) / 1e9:.2f} GB; nothing was fetched")
        else:
            print("nothing to fetch: every file is on this machine")
        return 0
    for reference in references:
        print(f"{reference}\n  {resolve(reference)}", flush=True)
    return 0


def size(file: "HubFile") -> str:
    """A file's size, as far as it is known before the hub is asked."""
    if file.expected_bytes is None:
        return "size unknown"
    return f"{'' if file.known else 'about '}{file.expected_bytes / 1e6:,.1f} MB"


def total(files: "Sequence[HubFile]") -> str:
    """The size of all of them."""
    known = [file.expected_bytes for file in files if file.expected_bytes is not None]
    if not known:
        return f"{len(files)} files of unknown size"
    exact = all(file.known for file in files)
    return f"{'' if exact else 'about '}{sum(known) / 1e9:.2f} GB" + (" and more" if len(known) < len(files) else "")


def require_hub_package(missing: "Sequence[HubFile]") -> None:
    """Raise DownloadError, which lists every missing file with its address, where the package that fetches them is absent."""
    from moshi_stt.errors import DownloadError
    from moshi_stt.install import install_command
    from moshi_stt.models.hub import address, cache_folder

    if importlib.util.find_spec("huggingface_hub") is not None:
        return
    addresses = "".join(f"\n  {address(file)} ({size(file)})" for file in missing)
    raise DownloadError(
        "the huggingface_hub package is not installed, so nothing was tried. "
        f"{len(missing)} files are missing, {total(missing)}:{addresses}\n"
        f"  cache:   {cache_folder()}\n"
        f"  to do:   {install_command('torch', ['huggingface_hub'])}\n"
        "  by hand: fetch these on a machine that can, and write their paths into a configuration of your own in place of "
        "hf://… (moshi-stt configs NAME > my.toml)"
    )


def named_files(config: str) -> Iterator[str]:
    """The files that a configuration's modules name. Raises ConfigError."""
    from moshi_stt.config import KyutaiModule
    from moshi_stt.config_load import load_config

    for module in load_config(config).config.modules:
        if isinstance(module, KyutaiModule):
            names = (module.config_file, module.lm_model_file, module.text_tokenizer_file, module.audio_tokenizer_file)
            yield from (name for name in names if name)


def check_space(needed_bytes: int, folder: Path) -> None:
    """Raise DownloadError where the disk of `folder`, which need not be there yet, has no room for so many bytes."""
    from moshi_stt.errors import DownloadError

    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes * HEADROOM:
        raise DownloadError(
            f"{needed_bytes / 1e9:.2f} GB are to be fetched and {there} has {free / 1e9:.2f} GB free. "
            "Free some space, or set HF_HOME to a folder on another disk."
        )
