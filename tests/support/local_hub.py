"""A model hub on 127.0.0.1 as huggingface_hub sees one: HEAD and GET of resolve URLs, ranges, redirects; with faults.

Files live in memory. Small ones are answered directly, as the hub does with files of its git; large ones with a redirect
to storage, the ETag and size of the file in the redirect's headers.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LocalHub:
    """files: (repository, path) → content. Faults can be set at any time."""

    address: str
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    revisions: set[str] = field(default_factory=lambda: {"main", COMMIT})
    token: str | None = None
    """Asked of every request to the hub itself; none to its storage, which must not see it."""
    cut_after: int | None = None
    """Storage closes the connection after so many bytes of an answer."""
    cuts: int = 10**9
    """How many answers are cut."""
    status_after_cuts: int | None = None
    """What `status` becomes with the last cut."""
    wrong: bool = False
    """Storage serves the right length of something else."""
    status: int | None = None
    """Answer everything with this."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header)."""

    def asked(self, method: str, part: str) -> list[str | None]:
        """Range headers of the requests with this method whose path contains `part`."""
        return [ranged for m, path, ranged in self.requests if m == method and part in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        hub = self.server.hub
        path = unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.status is not None:
            return self._refuse(hub.status, "")
        if path.startswith("/storage/"):
            if self.headers.get("Authorization"):
                return self._refuse(400, "TokenLeaked")
            digest = path.removeprefix("/storage/")
            content = next(c for c in hub.files.values() if hashlib.sha256(c).hexdigest() == digest)
            if hub.wrong:
                content = bytes(len(content))
            return self._content(content, digest, send_body=send_body)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return self._refuse(404, "")
        repo, revision, name = match.groups()
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._refuse(401, "RepoNotFound")
        if not any(r == repo for r, _ in hub.files):
            return self._refuse(404, "RepoNotFound")
        if revision not in hub.revisions:
            return self._refuse(404, "RevisionNotFound")
        content = hub.files.get((repo, name))
        if content is None:
            return self._refuse(404, "EntryNotFound")
        commit = revision if revision != "main" else COMMIT
        if len(content) < 1_000:
            return self._content(content, hashlib.sha1(content).hexdigest(), commit, send_body=send_body)
        digest = hashlib.sha256(content).hexdigest()
        self.send_response(302)
        self.send_header("Location", f"{self.server.storage}/storage/{digest}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-ETag", f'"{digest}"')
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _content(self, content: bytes, etag: str, commit: str | None = None, *, send_body: bool) -> None:
        hub, start = self.server.hub, 0
        if ranged := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(ranged[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("ETag", f'"{etag}"')
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not send_body:
            return
        if hub.cut_after is not None and hub.cuts > 0:
            hub.cuts -= 1
            if not hub.cuts and hub.status_after_cuts is not None:
                hub.status = hub.status_after_cuts
            self.wfile.write(body[: hub.cut_after])
            self.close_connection = True
            return
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LocalHub
    storage: str


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A running hub; its storage has another host name, as the real one's has."""
    server = _Server(("127.0.0.1", 0), _Handler)
    port = server.server_address[1]
    server.hub = LocalHub(f"http://127.0.0.1:{port}")
    server.storage = f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
