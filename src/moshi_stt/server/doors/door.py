"""What a protocol gives to the server: where it is served, who may use it, and a `Session` for each connection.

A `Door` is a protocol over WebSockets, a `SocketDoor` one over plain TCP, a `FileDoor` takes whole files by POST, a `PageDoor`
answers small HTTP requests. Each is an object without state. An instance goes to the processes that carry sockets by
pickle, and `session` is called there as it is in the main process. This module and those of the doors import no HTTP server.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moshi_stt.audio.live import PcmFormat
from moshi_stt.audio.selection import MIXED, Selection
from moshi_stt.config import ServerConfig
from moshi_stt.engine.engine import NO_EXTRAS, EngineInfo, StreamOptions
from moshi_stt.events import EndWord, Interim, Word
from moshi_stt.server.resume import ResumeRequest
from moshi_stt.session import Session

if TYPE_CHECKING:
    from moshi_stt.server.framing import Framing

RefusalKind = Literal[
    "unauthorized",
    "origin",
    "full",
    "busy",
    "stopping",
    "failed",
    "loading",
    "too_large",
    "timeout",
    "bad_audio",
    "bad_request",
    "internal",
]
"""Why a request is turned away:

unauthorized  no key, or a wrong one             too_large    the body is larger than this server takes
origin        a page of another site             timeout      nothing came of the body for too long
full          all streams are in use             bad_audio    a file that cannot be decoded
busy          this client has too much open      bad_request  the request is malformed
stopping      the server shuts down              internal     our own fault
failed        the model failed
loading       the model is still loading
"""

STATUS: Mapping[RefusalKind, int] = {
    "unauthorized": 401,
    "origin": 403,
    "full": 503,
    "busy": 429,
    "stopping": 503,
    "failed": 503,
    "loading": 503,
    "too_large": 413,
    "timeout": 408,
    "bad_audio": 400,
    "bad_request": 400,
    "internal": 500,
}
"""The usual HTTP status of each."""


class Route(NamedTuple):
    """A path, exact, and the module that it is served by. None: the first one, unless `Opening.module` names another."""

    path: str
    module: str | None = None


@dataclass(frozen=True)
class Handshake:
    """A request, as far as a door needs it.

    query: decoded, in order. headers: lower-case names; several of one name are joined by `, `.
    subprotocols: what a WebSocket client offers. peer: address and path for the log. address: the client's, for limits.
    modules: what each loaded module says of itself.
    ignore_unsupported: take options that are otherwise refused, and do nothing for them.
    """

    path: str
    query: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    subprotocols: tuple[str, ...] = ()
    peer: str = ""
    address: str = ""
    modules: Mapping[str, EngineInfo] = field(default_factory=dict)
    ignore_unsupported: bool = False

    def parameter(self, name: str) -> str | None:
        """The first value of a query parameter, None without one."""
        return next((value for key, value in self.query if key == name), None)

    def parameters(self, name: str) -> list[str]:
        """Every value of a query parameter, in order."""
        return [value for key, value in self.query if key == name]


@dataclass(frozen=True)
class Opening:
    """What a door makes of a handshake. Plain values that can be pickled.

    options: the door's own, for `session`. module: by name; None is the route's. channels: streams of the connection.
    subprotocol and headers: what the upgrade is answered with. stream: extra events that the session wants.
    on_demand: take no slot until the first command, and give it back when the stream has ended after `Finish`; the connection
    stays. Such connections are carried by the main process. resume: the client may come back, or does, after a lost connection.
    """

    options: Any = None
    module: str | None = None
    channels: int = 1
    subprotocol: str | None = None
    stream: StreamOptions = NO_EXTRAS
    headers: tuple[tuple[str, str], ...] = ()
    on_demand: bool = False
    resume: ResumeRequest | None = None


@dataclass(frozen=True)
class NewClient:
    """A client whose handshake is done, and whose connection is still to be made, perhaps by another process.

    peer: for the log. early: what the client sent after its handshake.
    """

    door: "Door | SocketDoor"
    opening: Opening
    peer: str
    early: bytes


class Refused(Exception):
    """The request is answered with this status instead."""

    def __init__(
        self,
        status: int,
        body: str | bytes = "",
        content_type: str = "text/plain",
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(f"{status}: {body!r}")
        self.status = status
        self.body = body.encode() if isinstance(body, str) else body
        self.content_type = content_type
        self.headers = tuple(headers)


class AnyDoor(ABC):
    """What all doors have."""

    name: str
    """For logs and metrics."""

    def refusal(self, kind: RefusalKind, sentence: str) -> Refused:
        """The answer to a request that is turned away, in the protocol's own shape. sentence: for people, may be empty."""
        return Refused(STATUS[kind], sentence)


class HttpDoor(AnyDoor):
    """What the doors on the HTTP port have."""

    keyless_on_loopback = False
    """Whether any key or none will do where the server listens on a loopback address and has no key but the public one."""

    @abstractmethod
    def routes(self, config: ServerConfig) -> Sequence[Route]:
        """Where it is served; empty where the configuration does not want it."""

    @abstractmethod
    def key(self, request: Handshake) -> str | None:
        """The API key that the request carries, None for no key. Raises Refused where that cannot be told."""


class Door(HttpDoor):
    """A protocol over WebSockets."""

    refuses_when_full = False
    """Whether a client that finds no free slot is refused before the upgrade; otherwise it is told by `Session.send(Error)`."""

    def accept(self, request: Handshake) -> Opening:
        """What to open for a client whose key was accepted. Raises Refused."""
        return Opening()

    @abstractmethod
    def session(self, opening: Opening) -> Session:
        """A new session."""


class SocketDoor(AnyDoor):
    """A protocol over plain TCP, on ports of its own. It has no keys: whoever reaches the port may use it."""

    @abstractmethod
    def addresses(self, config: ServerConfig) -> Sequence[tuple[str, int]]:
        """Host and port of each listener; empty where the configuration does not want it. Port 0 takes any free one."""

    def accept(self, peer: str, config: ServerConfig, modules: Mapping[str, EngineInfo]) -> Opening:
        """What to open for a new connection."""
        return Opening()

    @abstractmethod
    def session(self, opening: Opening) -> Session:
        """A new session."""

    @abstractmethod
    def framing(self, max_message_bytes: int) -> "Framing":
        """How messages lie in the bytes of a connection."""


# ---- whole files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRequest:
    """A request with a file.

    fields: of a form, the file's own excepted. file_name: None where the body is the file, or a form has none. sha256: reads
    the whole recording and returns its digest in hexadecimal.
    """

    handshake: Handshake
    fields: tuple[tuple[str, str], ...] = ()
    file_name: str | None = None
    content_type: str = ""
    sha256: Callable[[], str] = lambda: hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class FileOptions:
    """What a door makes of it. options: the door's own. module: by name; None is the route's.

    selection: track and channels; where it splits them, each is recognised by itself (`Transcript.channels`). whole: run it as
    one stream, however long it is. raw: the body is samples without a header, of this format.
    """

    options: Any = None
    module: str | None = None
    stream: StreamOptions = NO_EXTRAS
    selection: Selection = MIXED
    whole: bool = False
    raw: PcmFormat | None = None


class Answer(NamedTuple):
    """An HTTP answer."""

    body: bytes
    content_type: str
    headers: tuple[tuple[str, str], ...] = ()
    status: int = 200


class Transcript(NamedTuple):
    """What a file says. events: in order. duration_seconds: of the audio.

    channels: the events of each channel, in order, where they were kept apart; `events` is then empty.
    """

    events: "list[Word | EndWord]"
    duration_seconds: float
    channels: "tuple[list[Word | EndWord], ...]" = ()


class FileAnswer(ABC):
    """An answer that is written while the file is transcribed."""

    content_type: str
    headers: tuple[tuple[str, str], ...] = ()

    @abstractmethod
    def event(self, event: "Word | EndWord | Interim") -> bytes:
        """What an event adds to the body; may be empty."""

    @abstractmethod
    def end(self, transcript: Transcript) -> bytes:
        """The end of the body."""

    @abstractmethod
    def error(self, kind: RefusalKind, sentence: str) -> bytes:
        """The end of the body where the rest cannot be transcribed."""


class FileDoor(HttpDoor):
    """POST: a whole file in, text out."""

    form: str | None = None
    """Name of the file's part where the body must be a form (multipart/form-data). None: the body is the file, or a form in
    which it is called `file`."""

    def check(self, request: Handshake) -> None:
        """Look at the request before its body is read. Raises Refused."""

    def parse(self, request: FileRequest) -> FileOptions:
        """What is asked for, once the whole body is there. Raises Refused."""
        return FileOptions()

    @abstractmethod
    def answer(self, transcript: Transcript, options: FileOptions) -> Answer:
        """The whole answer. Runs in a thread."""

    def stream(self, options: FileOptions) -> FileAnswer | None:
        """An answer that begins before the file is transcribed; None where the client did not ask for that."""
        return None


# ---- small requests ------------------------------------------------------------------------------------------------------


class PageDoor(HttpDoor):
    """Requests without audio that belong to a protocol: a list of models, a route that is not offered."""

    methods: tuple[str, ...] = ("GET", "HEAD")
    """Which of its routes it takes."""

    prefixes: bool = False
    """Whether a route ends with `/` and stands for every path below."""

    @abstractmethod
    def answer(self, request: Handshake) -> Answer:
        """The answer. Raises Refused."""
