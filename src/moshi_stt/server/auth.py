"""API keys, which are never logged."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from urllib.parse import unquote_plus


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

    def digest(self, key: str | None) -> str:
        """Stands for a key where it is counted; empty for no key."""
        return "" if key is None else self._digest(key).hex()

    def _digest(self, key: str) -> bytes:
        return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), key=self._salt, digest_size=32).digest()


def query_pairs(query: str) -> list[tuple[str, str]]:
    """The pairs of a query as HTML forms encode them; empty pieces are none."""
    pieces = (piece.partition("=") for piece in query.split("&") if piece)
    return [(unquote_plus(key), unquote_plus(value)) for key, _, value in pieces]
