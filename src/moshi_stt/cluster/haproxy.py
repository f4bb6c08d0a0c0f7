"""HAProxy's configuration file, and the commands that change a running HAProxy without touching a connection. No I/O.

Each replica has a server in three backends, under the same name:

* `streams` takes new WebSockets, as many at once as the replica has slots. A replica whose `/ready` is red gets none.
* `files` takes POST. It follows the health of `streams`, but the replica itself lets files wait for a slot.
* `replicas` takes the rest: pages, clients that come back to their stream (their token names the replica), and WebSockets for
  which no slot is free, so that the replica refuses them in the protocol's own words. Health is `/health`.

The places r0 to r63 are all in the file of a cluster, those without a replica disabled: a replica that comes or goes is then a
few commands on the socket.
"""

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from moshi_stt.cluster.spec import MOST_REPLICAS, Server

BACKENDS = ("streams", "files", "replicas")
WYOMING = "wyoming"

VIEW_PATHS = "/metrics /api/modules_info /health /ready"
"""Answered for the whole fleet."""

TOKEN = r"^r[0-9]+[.-]"
"""Begin of a resume token that names its replica."""

NOWHERE = ("127.0.0.1", 9)
"""Address of a place without a replica."""


class Place(NamedTuple):
    """What HAProxy knows of one server of one backend."""

    host: str
    port: int
    most: int
    """Connections at once; 0: no limit."""
    state: str
    """ready, drain or maint."""


EMPTY = Place(*NOWHERE, 0, "maint")


def render(
    servers: Iterable[Server],
    *,
    bind: tuple[str, int],
    wyoming: tuple[str, int] | None = None,
    stats_socket: str | None = None,
    view_socket: str | None = None,
    places: int = 0,
) -> str:
    """The file.

    bind: address and port of the clients. wyoming: the same of Home Assistant's protocol. stats_socket: where commands are
    taken. view_socket: Unix socket of whoever answers for the fleet; None: any replica answers for itself. places: servers
    there are at least, named from r0 on.
    """
    by_name = {server.name: server for server in servers}
    names = list(dict.fromkeys([*(f"r{number}" for number in range(places)), *by_name]))
    names_of_hosts = any(_is_name(server.host) for server in by_name.values())
    lines = [*_global(stats_socket), *(_RESOLVERS if names_of_hosts else []), *_frontend(bind, view_socket is not None)]
    for backend in BACKENDS:
        lines += ["", f"backend {backend}", *_BACKEND[backend]]
        lines += [_server_line(backend, name, place_of(backend, by_name.get(name))) for name in names]
    if view_socket is not None:
        lines += ["", "backend view", f"    server view unix@{view_socket}"]
    if wyoming is not None:
        lines += ["", f"listen {WYOMING}", *_WYOMING, f"    bind {_address(*wyoming)}"]
        lines += [_server_line(WYOMING, name, place_of(WYOMING, by_name.get(name))) for name in names]
    return "\n".join(lines) + "\n"


def _global(stats_socket: str | None) -> list[str]:
    socket = [] if stats_socket is None else [f"    stats socket {stats_socket} mode 600 level admin", "    stats timeout 30s"]
    return ["global", *socket, "", "defaults", *_DEFAULTS]


_DEFAULTS = [
    "    mode http",
    "    balance leastconn",
    "    option redispatch 1",
    "    option clitcpka",
    "    option srvtcpka",
    "    retries 3",
    "    timeout connect 5s",
    "    timeout http-request 20s",
    "    timeout http-keep-alive 75s",
    "    timeout client 75s",
    "    timeout server 75s",
    "    timeout queue 5s",
    "    timeout check 5s",
    "    # a WebSocket; the server's pings pass every ten seconds",
    "    timeout tunnel 1h",
]

_RESOLVERS = [
    "",
    "# a name may be unknown now and known later, and get another address, as those of pods do",
    "resolvers system",
    "    parse-resolv-conf",
]

_BACKEND = {
    "streams": [
        "    option httpchk GET /ready",
        "    http-check expect status 200",
        "    default-server inter 1s fall 2 rise 1",
        "    # a replica that is just ending, or that has just become full, refuses with 503: ask the next one",
        "    retry-on conn-failure empty-response 503",
    ],
    "files": ["    # the answer comes when the recording is transcribed", "    timeout server 6h"],
    "replicas": f"""\
    option httpchk GET /health
    http-check expect status 200
    default-server inter 1s fall 2 rise 1
    option persist
    use-server %[url_param(resume),word(1,.-)] if {{ url_param(resume) -m reg {TOKEN} }}""".split("\n"),
}

_WYOMING = ["    mode tcp", "    timeout client 1h", "    timeout server 1h"]


def _frontend(bind: tuple[str, int], has_view: bool) -> list[str]:
    view = [f"    use_backend view if {{ path {VIEW_PATHS} }}"] if has_view else []
    return [
        "",
        "frontend address",
        f"    bind {_address(*bind)}",
        "    # the client's address, for the limits of each address; a proxy on this machine may have given it",
        "    http-request set-header X-Real-IP %[src] unless { src 127.0.0.0/8 ::1 } { req.hdr(X-Real-IP) -m found }",
        "    acl is_websocket req.hdr(Upgrade) -i websocket",
        f"    acl comes_back url_param(resume) -m reg {TOKEN}",
        "    acl is_full be_conn_free(streams) le 0",
        "    acl is_full nbsrv(streams) eq 0",
        *view,
        "    use_backend replicas if is_websocket comes_back or is_full",
        "    use_backend streams if is_websocket",
        "    use_backend files if METH_POST",
        "    default_backend replicas",
    ]


def place_of(backend: str, server: Server | None) -> Place:
    """What a backend shall know of a replica."""
    if server is None:
        return EMPTY
    port = server.port
    if backend == WYOMING:
        if server.wyoming_port is None:
            return EMPTY
        port = server.wyoming_port
    most = max(1, server.slots) if backend == "streams" else 0
    return Place(server.host, port, most, "drain" if server.draining else "ready")


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _server_line(backend: str, name: str, place: Place) -> str:
    health = f"track streams/{name}" if backend in ("files", WYOMING) else "check"
    words = ["server", name, _address(place.host, place.port), health]
    if _is_name(place.host):
        words.append("resolvers system init-addr last,libc,none")
    if place.most:
        words.append(f"maxconn {place.most}")
    if place.state == "maint":
        words.append("disabled")
    if place.state == "drain":
        words.append("weight 0")
    return "    " + " ".join(words)


def places(servers: Iterable[Server], with_wyoming: bool) -> dict[tuple[str, str], Place]:
    """What HAProxy shall know, by backend and name, of every place."""
    by_name = {server.name: server for server in servers}
    backends = (*BACKENDS, WYOMING) if with_wyoming else BACKENDS
    return {
        (backend, f"r{number}"): place_of(backend, by_name.get(f"r{number}"))
        for backend in backends
        for number in range(MOST_REPLICAS)
    }


def commands(known: Mapping[tuple[str, str], Place], wanted: Mapping[tuple[str, str], Place]) -> Iterator[str]:
    """What to say on the stats socket so that HAProxy knows what is wanted. Places missing in `known` are told whole."""
    for (backend, name), place in wanted.items():
        now = known.get((backend, name))
        server = f"{backend}/{name}"
        moved = now is None or now[:2] != place[:2]
        if moved and place.state != "maint":
            if now is None or now.state != "maint":
                yield f"set server {server} state maint"
            yield f"set server {server} addr {place.host} port {place.port}"
        if place.most and (now is None or now.most != place.most):
            yield f"set maxconn server {server} {place.most}"
        if place.state == "maint":
            if now is None or now.state != "maint":
                yield f"set server {server} state maint"
        elif moved or now is None or now.state != place.state:
            yield f"set server {server} state {place.state}"
