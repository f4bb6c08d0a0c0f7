"""Who may come in: the keys, and where a request carries its own. Knows nothing of modules; never logs a key."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from moshi_stt.constants import API_KEY_HEADER, API_KEY_QUERY

if TYPE_CHECKING:  # the socket processes, which import this, have no HTTP, and aiohttp takes longer than all else they need
    from aiohttp import web


class DuplicateKey(ValueError):
    """The query names `auth_id` twice. The text is moshi-server's."""

    def __init__(self) -> None:
        super().__init__(f"Failed to deserialize query string: duplicate field `{API_KEY_QUERY}`")


class Keys:
    """The accepted keys, kept as salted digests: comparing takes the same time however near a key is to one of them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._salt = secrets.token_bytes(32)
        self._digests = [self._digest(key) for key in keys]

    def allow(self, key: str | None) -> bool:
        """Whether this is one of the keys. None, for no key, is not."""
        if key is None:
            return False
        digest = self._digest(key)
        allowed = False
        for known in self._digests:
            allowed |= hmac.compare_digest(known, digest)
        return allowed

    def _digest(self, key: str) -> bytes:
        return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), key=self._salt, digest_size=32).digest()


def header_key(request: "web.BaseRequest") -> str | None:
    """The key in the header; None without one, and where it has anything but visible ASCII (contract section 1.3)."""
    key = request.headers.get(API_KEY_HEADER)
    if key is None or not all(" " <= char <= "~" or char == "\t" for char in key):
        return None
    return key


def websocket_key(request: "web.BaseRequest") -> str | None:
    """The key of a WebSocket request: the header's if there is that header at all, else the query's.

    Raises DuplicateKey, whether or not the header would have counted.
    """
    in_query = query_values(query_string(request), API_KEY_QUERY)
    if len(in_query) > 1:
        raise DuplicateKey
    if API_KEY_HEADER in request.headers:
        return header_key(request)
    return in_query[0] if in_query else None


def query_string(request: "web.BaseRequest") -> str:
    """The query as it came, still percent-encoded."""
    return request.raw_path.partition("?")[2].partition("#")[0]


def query_values(query: str, name: str) -> list[str]:
    """Every value of one parameter, in order, decoded."""
    return [value for key, value in query_pairs(query) if key == name]


def query_pairs(query: str) -> list[tuple[str, str]]:
    """The pairs of a query as HTML forms encode them; empty pieces are none."""
    pieces = (piece.partition("=") for piece in query.split("&") if piece)
    return [(unquote_plus(key), unquote_plus(value)) for key, _, value in pieces]
