"""`moshi-stt download` against the hub on this machine."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.support.local_hub import COMMIT, LocalHub, local_hub

from moshi_stt.cli import download, main
from moshi_stt.models import hub as hub_module
from moshi_stt.models.hub import Known, Published

pytest.importorskip("huggingface_hub", reason="huggingface_hub comes with the model extras")

REPO = "kyutai/stt-1b-en_fr-candle"
NAMES = ("model.safetensors", "tokenizer_en_fr_audio_8000.model", "mimi-pytorch-e351c8d8@125.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with files of the names that the shipped 1B configuration has."""
    import hashlib

    contents = {name: np.random.default_rng(i).bytes(50_000) for i, name in enumerate(NAMES)}
    known = {name: Known(len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}
    monkeypatch.setitem(hub_module.PUBLISHED, REPO, Published(COMMIT, known))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when the library was imported
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with local_hub() as running:
        running.files = {(REPO, name): content for name, content in contents.items()}
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        yield running


def test_the_shipped_configuration(hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    """All of its files; a second run finds them without a request."""
    assert main(["download", "stt-1b-en_fr"]) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        path = next(Path(line.strip()) for line in printed.splitlines() if line.startswith("  ") and line.endswith(name))
        assert path.read_bytes() == hub.files[(REPO, name)]
    hub.requests.clear()
    assert main(["download"]) == 0
    assert "to fetch: 0.00 GB into" in printed
    assert all(f"{name} (0.1 MB)" in printed for name in NAMES)
    assert capsys.readouterr().out == printed[printed.index("hf://", printed.rindex(" MB)")) :]
    assert not hub.requests


def test_a_dry_run_asks_and_fetches_nothing(hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--dry-run", "stt-1b-en_fr"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} (0.1 MB)" in printed for name in NAMES)
    assert {method for method, _, _ in hub.requests} == {"HEAD"}
    hub.status = 503
    assert main(["download", "--dry-run", "stt-1b-en_fr"]) == 1


def test_without_the_package_every_file_is_named_and_nothing_said_to_be_tried(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["download", "stt-1b-en_fr"]) == 1
    said = capsys.readouterr().err
    assert all(f"{hub.address}/{REPO}/resolve/{COMMIT}/{name}" in said for name in NAMES)
    assert "nothing was tried" in said
    assert "tried:" not in said
    assert not hub.requests


@pytest.mark.parametrize("flag", [[], ["--config"], ["--model"]])
def test_all_that_would_be_fetched_is_listed_before_the_hub_is_asked(
    hub: LocalHub, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    """F9: a hub that does not answer used to leave the user with the name of the first file."""
    hub.status = 503
    assert main(["download", "--dry-run", *flag, "stt-1b-en_fr"]) == 1
    shown = capsys.readouterr()
    assert all(f"hf://{REPO}/{name} (0.1 MB)" in shown.out for name in NAMES)
    assert "the hub answered 503" in shown.err


def test_the_size_of_weights_that_are_published_under_another_name(hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    """The 2.6B's candle repository: its weights are those of the PyTorch one, whose size is written down."""
    hub.status = 503
    assert main(["download", "--dry-run", "stt-2.6b-en"]) == 1
    printed = capsys.readouterr().out
    assert "to fetch: about 5.62 GB into" in printed
    assert "stt-2.6b-en-candle/model.safetensors (about 5,234.3 MB)" in printed
    assert main(["configs"]) == 0
    assert "about 5.6 GB" in capsys.readouterr().out


def test_what_cannot_be_had(hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    del hub.files[(REPO, NAMES[2])]
    assert main(["download", "stt-1b-en_fr"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "Error: hf://kyutai/stt-1b-en_fr-candle/mimi-pytorch-e351c8d8@125.safetensors could not be downloaded"
    )
    assert f"{hub.address}/{REPO}/resolve/{COMMIT}/{NAMES[2]}" in said


def test_a_full_disk(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is fetched."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    assert main(["download", "stt-1b-en_fr"]) == 1
    said = capsys.readouterr().err
    assert "0.00 GB are to be fetched" in said
    assert "HF_HOME" in said
    assert not hub.asked("GET", "")


def test_a_configuration_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "embedded"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "stt-1b-en"]) == 1
    assert "stt-1b-en_fr" in capsys.readouterr().err


def test_local_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moshi_stt.config_load import shipped_text

    path = tmp_path / "own.toml"
    path.write_text(shipped_text("stt-1b-en_fr").replace(f"hf://{REPO}", str(tmp_path)))
    assert main(["download", str(path)]) == 1
    assert "is not there; expected a file" in capsys.readouterr().err


def test_space_is_asked_of_the_nearest_folder(tmp_path: Path) -> None:
    download.check_space(1, tmp_path / "not" / "yet" / "there")
