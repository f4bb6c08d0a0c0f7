"""The 40 requests that were recorded of moshi-server, over a live socket: what a client reads must be the same.

Where we differ on purpose, the case is listed here with what we answer and why.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import SHARED
from tests.support.scripted_engine import ScriptedEngine
from tests.support.serving import Answer, raw_request, server_config, serving

RECORDED = SHARED / "goldens" / "recorded" / "http.json"
CASES: list[dict[str, Any]] = json.loads(RECORDED.read_text()) if RECORDED.exists() else []
PAGE = "<!doctype html><title>golden</title>ok\n"


def request_of(case: dict[str, Any]) -> bytes:
    """The bytes of a recorded request. The one long body was cut in the recording and is made again."""
    text: str = case["request"]
    if "... (" in text:
        head, _, _ = text.partition("\r\n\r\n")
        size = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
        return head.encode() + b"\r\n\r\n" + b"z" * size
    return text.encode("utf-8")


def bad_audio(answer: Answer) -> None:
    """moshi-server calls a file that it cannot decode its own failure (500); here it is the client's, in plain words."""
    assert answer.status == 400
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert "Traceback" not in answer.body.decode()
    assert len(answer.body) > 20


def bad_large_audio(answer: Answer) -> None:
    """moshi-server stops at 2 MiB (413); here size is no reason, and this body is refused for being no audio."""
    bad_audio(answer)


def our_build(answer: Answer) -> None:
    """The same keys in the same order, all strings; the values are those of this build."""
    assert answer.status == 200
    info = json.loads(answer.body)
    assert list(info) == [
        *("build_timestamp", "build_date", "git_branch", "git_timestamp", "git_date", "git_hash", "git_describe"),
        *("rustc_host_triple", "rustc_version", "cargo_target_triple"),
    ]
    assert all(isinstance(value, str) and value for value in info.values())


def our_modules(answer: Answer) -> None:
    """moshi-server's keys with our values, all strings."""
    assert answer.status == 200
    (module,) = json.loads(answer.body)
    assert {"type", "path", "lm", "audio_tokenizer", "used_slots", "total_slots"} <= set(module)
    assert all(isinstance(value, str) for value in module.values())
    assert (module["used_slots"], module["total_slots"]) == ("0", "4")


def our_metrics(answer: Answer) -> None:
    """moshi-server shows a family from its first use on; here all of them are there from the start."""
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4"
    assert b'asr_connect{handler="all"} 0\n' in answer.body


ON_PURPOSE = {
    "post empty": bad_audio,
    "post garbage": bad_audio,
    "post 2 MiB + 1": bad_large_audio,
    "build_info": our_build,
    "modules_info": our_modules,
    "metrics empty query": our_metrics,
}


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "index.html").write_text(PAGE)
    (tmp_path / "moshi-server.toml").write_text("secret")
    return str(tmp_path / "static")


@pytest.mark.skipif(not CASES, reason=f"no recording: {RECORDED} is not there")
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
async def test_request_is_answered_as_recorded(case: dict[str, Any], page: str) -> None:
    """Status always; body wherever a client reads one; and the headers that were recorded."""
    async with serving(ScriptedEngine(), server_config(static_dir=page)) as running:
        answer = await raw_request(running.port, request_of(case))
    if case["name"] in ON_PURPOSE:
        ON_PURPOSE[case["name"]](answer)
        return
    _, status, _ = case["status"].split(" ", 2)
    assert answer.status == int(status)
    assert answer.body.decode() == case["body"]
    for header in case["headers"]:
        name, _, value = header.partition(": ")
        assert answer.headers.get(name, "").lower() == value.lower(), name


@pytest.mark.skipif(not CASES, reason=f"no recording: {RECORDED} is not there")
def test_every_exception_is_a_recorded_case() -> None:
    """A name in the list that no recording has would never be checked."""
    assert set(ON_PURPOSE) <= {case["name"] for case in CASES} | {"build_info"}
    assert len(CASES) == 40
