"""Sockets to listen on: a TCP port, or a Unix socket for this server's own processes."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from moshi_stt.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises ConfigError in plain words, with the next command to run."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use. To see by what: `lsof -i :{port}`. If it is this server: `scripts/stop.sh`. "
                f"To take another port: `moshi-stt worker --port {port + 1}`"
            ) from None
        if number in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"port {port} on {host} may not be bound by this user: take one above 1023: `moshi-stt worker --port 8080`"
            ) from None
        if number == errno.EADDRNOTAVAIL:
            raise ConfigError(f"{host} is no address of this machine: `moshi-stt worker --addr 127.0.0.1`") from None
        raise ConfigError(f"cannot listen on {host} port {port}: {error}") from None
    return listener


def bind_private(path: Path) -> socket.socket:
    """A bound Unix socket that only this user may open, in place of what was there. Raises OSError."""
    with suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener
