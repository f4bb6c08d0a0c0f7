"""Files named in a configuration: paths, the cache, and a hub that behaves well, badly, or not at all."""

import hashlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.support.local_hub import COMMIT, LocalHub, local_hub

from moshi_stt.errors import CheckpointError, DownloadError
from moshi_stt.models import hub as hub_module
from moshi_stt.models.hub import HubFile, Known, Published, find_cached, parse_reference, resolve

pytest.importorskip("huggingface_hub", reason="huggingface_hub comes with the model extras")

LARGE = np.random.default_rng(1).bytes(300_000)
SMALL = b'{"card": 2048}'
WEIGHTS = "hf://someone/some-model/weights/model.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[LocalHub]:
    with local_hub() as running:
        yield running


@pytest.fixture
def hub(server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """The hub without faults, its two files, and an empty cache."""
    server.files = {("someone/some-model", "weights/model.safetensors"): LARGE, ("someone/some-model", "config.json"): SMALL}
    server.revisions = {"main", COMMIT}
    server.token = server.cut_after = server.status = None
    server.wrong, server.cuts = False, 10**9
    server.requests.clear()
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when the library was imported
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 20_000)  # what is kept of an interrupted transfer
    return server


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("hf://a/b/c.model", HubFile("a/b", "c.model")),
        ("hf://a/b/c/d.json", HubFile("a/b", "c/d.json")),
        ("hf://a/b/m@125.safetensors", HubFile("a/b", "m@125.safetensors")),
        ("hf://a/b/m@125.safetensors@main", HubFile("a/b", "m@125.safetensors", "main")),
        ("hf://a/b/c.model@v1.0", HubFile("a/b", "c.model", "v1.0")),
        ("/some/path@x.model", None),
    ],
)
def test_names(text: str, file: HubFile | None) -> None:
    assert parse_reference(text) == file
    if file is not None:
        assert str(file) == text


@pytest.mark.parametrize("text", ["hf://", "hf://a/b", "hf://a//c", "hf://a/b/", "hf://a/b/../../c"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(CheckpointError, match="OWNER/REPOSITORY/FILE"):
        resolve(text)


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="is not there; expected a file"):
        resolve(str(path))
    with pytest.raises(CheckpointError, match="is a directory; expected a file"):
        resolve(str(tmp_path))
    path.write_bytes(b"x")
    assert resolve(str(path)) == path


def test_published_files_have_their_revision_and_hash() -> None:
    file = parse_reference("hf://kyutai/stt-1b-en_fr-candle/model.safetensors")
    assert file is not None
    assert file.wanted == "095e38f6242006a93c2541149b181988397f5c7c"
    assert file.known is not None
    assert file.known.bytes == 1_978_522_200
    other = parse_reference("hf://kyutai/stt-1b-en_fr-candle/model.safetensors@main")
    assert other is not None
    assert (other.wanted, other.known) == ("main", None)


# ---- fetching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [("weights/model.safetensors", LARGE), ("config.json", SMALL)])
def test_fetched_once(hub: LocalHub, name: str, content: bytes) -> None:
    """Then it comes from the cache, without a request."""
    path = resolve(f"hf://someone/some-model/{name}")
    assert path.read_bytes() == content
    assert f"snapshots/{COMMIT}" in str(path)
    count = len(hub.requests)
    assert resolve(f"hf://someone/some-model/{name}") == path
    assert len(hub.requests) == count
    assert not list(path.parents[3].rglob("*.part"))


def test_a_revision_is_asked_for(hub: LocalHub) -> None:
    resolve(f"{WEIGHTS}@{COMMIT}")
    assert all(COMMIT in path or "/storage/" in path for _, path, _ in hub.requests)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve(WEIGHTS).read_bytes() == LARGE


@pytest.mark.parametrize(
    ("behind", "is_sent"), [("/file", True), ("0/file", False), (".example/file", False), ("@x.example/f", False)]
)
def test_an_address_that_only_begins_like_the_hubs_gets_no_token(
    behind: str, is_sent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test:80")
    sent: list[dict[str, str]] = []
    library = SimpleNamespace(
        utils=SimpleNamespace(build_hf_headers=lambda library_name: {"authorization": "Bearer hf_secret"}),
        file_download=SimpleNamespace(http_get=lambda *_, headers, **__: sent.append(headers)),
    )
    hub_module._transfer(library, SimpleNamespace(location=f"http://hub.test:80{behind}", size=9), tmp_path / "part")
    assert ["authorization" in headers for headers in sent] == [is_sent]


def test_an_interrupted_transfer_goes_on(hub: LocalHub) -> None:
    """The connection breaks twice on the way; each time the rest is asked for, not the whole."""
    hub.cut_after, hub.cuts = 100_000, 2
    assert resolve(WEIGHTS).read_bytes() == LARGE
    assert hub.asked("GET", "/storage/") == [None, "bytes=100000-", "bytes=200000-"]


@pytest.mark.slow
def test_a_transfer_that_ended_goes_on_in_the_next_call(hub: LocalHub) -> None:
    """So too after the process was ended: what had come is kept beside the blobs."""
    hub.cut_after, hub.cuts = 120_000, 1
    code = "from moshi_stt.models.hub import resolve; import huggingface_hub.file_download as f, sys\n"
    code += f"f.time.sleep = lambda _: sys.exit(9)\nf.constants.DOWNLOAD_CHUNK_SIZE = 20_000\nresolve({WEIGHTS!r})"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60).returncode == 9
    hub.requests.clear()
    assert resolve(WEIGHTS).read_bytes() == LARGE
    assert hub.asked("GET", "/storage/") == ["bytes=120000-"]


def test_a_transfer_that_never_ends_well(hub: LocalHub) -> None:
    hub.cut_after = 0
    with pytest.raises(DownloadError, match="no answer from the hub") as caught:
        resolve(WEIGHTS)
    for part in (
        f"{hub.address}/someone/some-model/resolve/main/weights/model.safetensors",
        "models--someone--some-model",
        "by hand",
    ):
        assert part in str(caught.value)


def test_a_wrong_hash(hub: LocalHub) -> None:
    """What came is thrown away; the next call fetches it whole."""
    hub.wrong = True
    with pytest.raises(DownloadError, match="has the SHA-256") as caught:
        resolve(WEIGHTS)
    assert digest(LARGE) in str(caught.value)
    hub.wrong = False
    hub.requests.clear()
    assert resolve(WEIGHTS).read_bytes() == LARGE
    assert hub.asked("GET", "/storage/") == [None]


def test_another_file_under_a_published_name(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(COMMIT, {"weights/model.safetensors": Known(len(LARGE), digest(b"the real one"))})
    monkeypatch.setitem(hub_module.PUBLISHED, "someone/some-model", published)
    with pytest.raises(DownloadError, match=digest(b"the real one")):
        resolve(WEIGHTS)


@pytest.mark.parametrize(
    ("reference", "token", "status", "words"),
    [
        (WEIGHTS, "hf_secret", None, ["401", "set HF_TOKEN"]),
        ("hf://someone/some-model/other.model", None, None, ["does not have this file (404)", "check the name"]),
        ("hf://someone/nothing/other.model", None, None, ["404", "check the name"]),
        (f"{WEIGHTS}@v9", None, None, ["does not have this revision", "@main"]),
        (WEIGHTS, None, 403, ["403", "HF_TOKEN"]),
        (WEIGHTS, None, 418, ["the hub answered 418"]),
    ],
)
def test_refusals(hub: LocalHub, reference: str, token: str | None, status: int | None, words: list[str]) -> None:
    hub.token, hub.status = token, status
    with pytest.raises(DownloadError) as caught:
        resolve(reference)
    for word in [*words, hub.address, "by hand"]:
        assert word in str(caught.value)


def test_no_hub_at_all(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(DownloadError, match="no answer from the hub") as caught:
        resolve(WEIGHTS)
    assert "http://127.0.0.1:9/someone/some-model/resolve/main/weights/model.safetensors" in str(caught.value)
    assert "HF_ENDPOINT" in str(caught.value)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_offline(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        resolve(WEIGHTS)
    assert not hub.requests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = resolve(WEIGHTS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(WEIGHTS) == path


def test_a_copy_that_moshi_server_left(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is under `main`; a published file of the right size is used, whatever commit it came with."""
    path = resolve(f"{WEIGHTS}@main")
    published = Published("f" * 40, {"weights/model.safetensors": Known(len(LARGE), digest(LARGE))})
    monkeypatch.setitem(hub_module.PUBLISHED, "someone/some-model", published)
    hub.requests.clear()
    assert resolve(WEIGHTS) == path
    assert not hub.requests


def test_a_copy_cut_short_is_fetched_again(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published = Published(COMMIT, {"weights/model.safetensors": Known(len(LARGE), digest(LARGE))})
    monkeypatch.setitem(hub_module.PUBLISHED, "someone/some-model", published)
    path = resolve(WEIGHTS)
    path.resolve().write_bytes(LARGE[:1000])
    with caplog.at_level(logging.WARNING):
        assert resolve(WEIGHTS).read_bytes() == LARGE
    assert "1,000 bytes instead of 300,000" in caplog.text


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub_module.cache_folder() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub_module.cache_folder() == tmp_path / "huggingface/hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub_module.cache_folder() == tmp_path / "home/hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert hub_module.cache_folder() == tmp_path / "cache"


def test_without_the_library(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"so nothing was tried[\s\S]*scripts/install\.sh --with torch"):
        resolve(WEIGHTS)
    assert find_cached(HubFile("someone/some-model", "config.json")) is None


def test_an_unwritable_cache(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("HF_HOME", str(blocked))
    with pytest.raises(DownloadError, match="could not be downloaded"):
        resolve(WEIGHTS)
