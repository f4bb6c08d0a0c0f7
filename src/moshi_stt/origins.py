"""Which web pages may use the server. Browsers send WebSockets and forms to any address, so the server must look at `Origin`.

A request without `Origin` comes from a program, not from a page, and passes. A page may use the server if it is listed in
`allowed_origins`, if it was loaded from this machine, or if it was loaded from the server itself by an IP address. A page that
was loaded by name is refused unless it is listed: its owner can point that name at any address, this one included.
"""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}


def normal_origin(origin: str) -> str | None:
    """`scheme://host[:port]` in lower case without a default port; None for what is no origin."""
    parts = _split(origin)
    if parts is None:
        return None
    scheme, host, port = parts
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}" if port == DEFAULT_PORTS[scheme] else f"{scheme}://{shown}:{port}"


class Origins:
    """The rule, with the configured list."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._listed = {normal for origin in allowed if (normal := normal_origin(origin)) is not None}

    def allow(self, origin: str | None, host: str | None) -> bool:
        """origin and host: the headers, None where absent."""
        if origin is None or self.is_listed(origin):
            return True
        parts = _split(origin)
        if parts is None:
            return False
        scheme, name, port = parts
        if is_loopback(name):
            return True
        return is_ip(name) and _split(f"{scheme}://{host}") == (scheme, name, port)

    def is_listed(self, origin: str | None) -> bool:
        """Whether the page gets CORS headers: only if the configuration names it."""
        return origin is not None and normal_origin(origin) in self._listed


def is_ip(host: str) -> bool:
    """Whether a host is an IP address, without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by name or address: these names never leave it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return is_ip(host) and ipaddress.ip_address(host).is_loopback


def _split(origin: str) -> tuple[str, str, int] | None:
    try:
        url = urlsplit(origin)
        scheme, host, port = url.scheme.lower(), url.hostname, url.port
    except ValueError:
        return None
    if scheme not in DEFAULT_PORTS or not host or url.path not in ("", "/") or url.query or url.username is not None:
        return None
    return scheme, host, DEFAULT_PORTS[scheme] if port is None else port
