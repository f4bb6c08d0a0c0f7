"""The routes that are not the module's: health, readiness, metrics, static files, and how the server starts and stops."""

import asyncio
import json
import socket
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.raw_ws import RawClient
from tests.support.scripted_engine import ScriptedEngine, counting
from tests.support.serving import Answer, raw_request, server_config, serving, until

from moshi_stt.config import EmbeddedModule, ServerConfig
from moshi_stt.errors import CheckpointError, ConfigError
from moshi_stt.server.addresses import bind
from moshi_stt.server.app import Server, create_app
from moshi_stt.server.metrics import Metrics


async def get(port: int, target: str, method: str = "GET", *headers: str) -> Answer:
    lines = "".join(f"{header}\r\n" for header in headers)
    return await raw_request(port, f"{method} {target} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())


# ---- health and readiness ------------------------------------------------------------------------------------------------


async def test_ready_turns_red_when_no_slot_is_free() -> None:
    async with serving(ScriptedEngine(slots=1)) as running:
        answer = await get(running.port, "/ready")
        assert (answer.status, json.loads(answer.body)["modules"]["asr"]) == (200, {"used_slots": 0, "total_slots": 1})
        async with await RawClient.connect(running.port) as client:
            await client.receive_event()
            answer = await get(running.port, "/ready")
            assert (answer.status, json.loads(answer.body)["reason"]) == (503, "module asr: no free channels")
            assert (await get(running.port, "/health")).status == 200
        await until(lambda: running.connections() == 0)
        assert (await get(running.port, "/ready")).status == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/api/build_info", "/api/modules_info"])
async def test_fixed_routes_take_get_and_head_and_no_query(path: str) -> None:
    async with serving(ScriptedEngine()) as running:
        assert (await get(running.port, path)).status == 200
        assert (await get(running.port, path, "HEAD")).body == b""
        assert (await get(running.port, path + "?")).status == 200
        answer = await get(running.port, path + "?a=1&b=2")
        assert answer.body == b"Failed to deserialize query string: invalid length 2, expected 0 elements in map"
        assert (answer.status, answer.headers["content-type"]) == (400, "text/plain; charset=utf-8")
        answer = await get(running.port, path, "DELETE")
        assert (answer.status, answer.headers["allow"], answer.body) == (405, "GET,HEAD", b"")


async def test_build_info_has_the_keys_in_order() -> None:
    """All strings, none empty."""
    async with serving(ScriptedEngine()) as running:
        info = json.loads((await get(running.port, "/api/build_info")).body)
    assert list(info) == [
        *("build_timestamp", "build_date", "git_branch", "git_timestamp", "git_date", "git_hash", "git_describe"),
        *("rustc_host_triple", "rustc_version", "cargo_target_triple"),
    ]
    assert all(isinstance(value, str) and value for value in info.values())


# ---- metrics -------------------------------------------------------------------------------------------------------------


async def test_metrics_have_the_contracts_families_to_the_letter() -> None:
    """Names, help, labels and buckets of contract section 7.6; whole numbers without a decimal point."""
    async with serving(ScriptedEngine(counting(1))) as running:
        async with await RawClient.connect(running.port) as client:
            client.silence(30 * 1920)
            client.marker(1)
            await client.events_until("Marker")
            client.close()
            await client.rest()
        await until(lambda: running.connections() == 0)
        answer = await get(running.port, "/metrics")
    text = answer.body.decode()
    assert answer.headers["content-type"] == "text/plain; version=0.0.4"
    assert (
        '# HELP asr_connect Number of connections to the asr.\n# TYPE asr_connect counter\nasr_connect{handler="all"} 1\n'
        in text
    )
    assert (
        "# HELP asr_open_channels Number of open channels (users currently connected).\n# TYPE asr_open_channels gauge\n"
        'asr_open_channels{handler="all"} 0\n'
    ) in text
    steps = ("2", "25", "125", "250", "500", "750", "1125", "1500", "2250", "3000", "4500", "+Inf")
    buckets = "".join(f'asr_connection_num_steps_bucket{{le="{le}"}} {int(i >= 2)}\n' for i, le in enumerate(steps))
    assert "# TYPE asr_connection_num_steps histogram\n" + buckets + "asr_connection_num_steps_count 1\n" in text
    assert "asr_connection_num_steps_sum 30\n" in text
    for le in ("0.02", "0.03", "0.04", "0.05", "0.06", "0.07", "0.08", "+Inf"):
        assert f'asr_model_step_duration_bucket{{le="{le}"}} ' in text
    assert "asr_model_step_duration_count 30\n" in text
    families = [family.name for family in text_string_to_metric_families(text)]
    assert families == sorted(families)
    assert {
        "moshi_stt_queued_seconds",
        "moshi_stt_lag_seconds",
        "moshi_stt_refused",
        "moshi_stt_errors",
        "moshi_stt_messages_received",
        "moshi_stt_messages_sent",
        "moshi_stt_used_slots",
        "moshi_stt_total_slots",
        "moshi_stt_websockets",
        "moshi_stt_ready",
        "moshi_stt_step_rows",
        "moshi_stt_info",
    } <= set(families)
    assert "_created" not in text
    assert "moshi_stt_messages_received 2\n" in text


async def test_refusals_and_malformed_messages_are_counted() -> None:
    async with serving(ScriptedEngine(slots=1)) as running:
        async with await RawClient.connect(running.port) as first, await RawClient.connect(running.port) as second:
            await second.rest()
            first.send(b"\xc1")
            await first.rest()
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA"
        assert (await get(running.port, "/api/asr-streaming?auth_id=wrong", "GET", upgrade)).status == 401
        text = (await get(running.port, "/metrics")).body.decode()
    assert 'moshi_stt_refused{reason="no_free_slot"} 1\n' in text
    assert 'moshi_stt_refused{reason="key"} 1\n' in text
    assert 'moshi_stt_errors{kind="malformed"} 1\n' in text


def test_metric_values_are_escaped() -> None:
    """A label's value can hold anything."""
    metrics = Metrics()
    metrics.refusals.labels('a"b\\c\nd').inc(2.5)
    assert 'moshi_stt_refused{reason="a\\"b\\\\c\\nd"} 2.5\n' in metrics.render().decode()


# ---- static files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    root = tmp_path / "site"
    (root / "sub dir").mkdir(parents=True)
    (root / "index.html").write_text("<p>root")
    (root / "sub dir" / "index.html").write_text("<p>sub")
    (root / "app.js").write_text("let x;")
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret.txt")
    return root


@pytest.mark.parametrize(
    ("target", "status", "body"),
    [
        ("/", 200, b"<p>root"),
        ("/index.html", 200, b"<p>root"),
        ("/?a=1", 200, b"<p>root"),
        ("/app.js", 200, b"let x;"),
        ("/sub%20dir/", 200, b"<p>sub"),
        ("/sub%20dir", 307, b""),
        ("/missing", 404, b""),
        ("/sub%20dir/missing", 404, b""),
        ("/../secret.txt", 404, b""),
        ("/%2e%2e/secret.txt", 404, b""),
        ("/..%2fsecret.txt", 404, b""),
        ("/sub%20dir/..%2f..%2fsecret.txt", 404, b""),
        ("/..%5csecret.txt", 404, b""),
        ("/link", 404, b""),
        ("/%00", 404, b""),
        ("//etc/passwd", 404, b""),
    ],
)
async def test_static_files(target: str, status: int, body: bytes, site: Path) -> None:
    """Nothing outside the folder, by no spelling and no link; empty bodies where moshi-server has empty ones."""
    async with serving(ScriptedEngine(), server_config(static_dir=str(site))) as running:
        answer = await get(running.port, target)
        head = await get(running.port, target, "HEAD")
    assert (answer.status, answer.body) == (status, body)
    assert (head.status, head.body) == (status, b"")
    if status == 307:
        assert answer.headers["location"] == "/sub%20dir/"


async def test_static_redirect_stays_on_this_server(site: Path) -> None:
    """`//host` must not become a redirect to another host."""
    (site / "evil.example").mkdir()
    async with serving(ScriptedEngine(), server_config(static_dir=str(site))) as running:
        answer = await get(running.port, "//evil.example")
    assert (answer.status, answer.headers["location"]) == (307, "/evil.example/")


async def test_static_conditions_ranges_and_types(site: Path) -> None:
    async with serving(ScriptedEngine(), server_config(static_dir=str(site))) as running:
        whole = await get(running.port, "/app.js")
        assert "javascript" in whole.headers["content-type"]
        again = await get(running.port, "/app.js", "GET", f"If-Modified-Since: {whole.headers['last-modified']}")
        assert (again.status, again.body) == (304, b"")
        part = await get(running.port, "/app.js", "GET", "Range: bytes=4-")
        assert (part.status, part.body) == (206, b"x;")
        answer = await get(running.port, "/app.js", "PUT")
        assert (answer.status, answer.headers["allow"], answer.body) == (405, "GET,HEAD", b"")


async def test_missing_static_folder_is_an_empty_404(tmp_path: Path) -> None:
    async with serving(ScriptedEngine(), server_config(static_dir=str(tmp_path / "nothing"))) as running:
        answer = await get(running.port, "/")
    assert (answer.status, answer.body) == (404, b"")


async def test_page_of_the_package_is_served_by_default() -> None:
    async with serving(ScriptedEngine()) as running:
        answer = await get(running.port, "/")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html")
    assert b"asr-streaming" in answer.body


# ---- start and stop ------------------------------------------------------------------------------------------------------


def test_port_in_use_is_said_with_the_next_command() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port {port + 1}"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "said"), [("192.0.2.1", 0, "no address of this machine"), ("127.0.0.1", 99_999, "cannot listen")]
)
def test_address_that_cannot_be_had_is_said(host: str, port: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bind(host, port)


async def test_engine_that_does_not_start_stops_the_server() -> None:
    """Its own error comes out, and the port is free again."""

    class Broken(ScriptedEngine):
        async def start(self) -> None:
            raise CheckpointError("no such weights")

    server = Server(server_config(), {"asr": Broken()}, "127.0.0.1", 0)
    with pytest.raises(CheckpointError, match="no such weights"):
        await server.start()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)


def two_modules(first: str, second: str) -> ServerConfig:
    return ServerConfig(
        static_dir=None,
        log_dir=None,
        instance_name="test",
        authorized_ids=frozenset(),
        modules=(EmbeddedModule(name="a", path=first), EmbeddedModule(name="b", path=second)),
    )


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("/x", "/x", "already taken"),
        ("/x", "/metrics", "already taken"),
        ("x", "/y", "must begin with /"),
        ("/{x}", "/y", "braces"),
    ],
)
async def test_paths_that_cannot_be_routed_are_refused_at_start(first: str, second: str, said: str) -> None:
    """moshi-server crashes on the first two and hangs on the third."""
    engines = {"a": ScriptedEngine(), "b": ScriptedEngine()}
    with pytest.raises(ConfigError, match=said):
        create_app(two_modules(first, second), engines)


async def test_two_modules_are_served_side_by_side() -> None:
    config = two_modules("/a", "/b")
    engines = {"a": ScriptedEngine(slots=1), "b": ScriptedEngine(slots=2)}
    async with serving(engines, config) as running:
        modules = json.loads((await get(running.port, "/api/modules_info")).body)
    assert [(module["path"], module["total_slots"]) for module in modules] == [("/a", "1"), ("/b", "2")]


async def test_keys_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Right or wrong, in the header or in the query, at any level."""
    import logging

    caplog.set_level(logging.DEBUG)
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA"
    async with serving(ScriptedEngine()) as running:
        for query in ("?auth_id=hunter2", "?auth_id=public_token&auth_id=hunter2", "?auth_id=public_token"):
            await get(running.port, "/api/asr-streaming" + query, "GET", upgrade)
        await get(running.port, "/api/asr-streaming", "POST", "kyutai-api-key: hunter2", "Content-Length: 0")
        await get(running.port, "/api/asr-streaming", "POST", "kyutai-api-key: public_token", "Content-Length: 0")
        await until(lambda: running.connections() == 0)
    assert caplog.records
    assert "hunter2" not in caplog.text
    assert "public_token" not in caplog.text
