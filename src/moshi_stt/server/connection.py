"""One WebSocket: its socket on one side, its stream on the other, and how it ends. Knows no HTTP and no model.

Everything here is called by the event loop and nothing waits: a connection has no task of its own. What can be full:

* The stream's inbox: what came too much is kept (at most one read of the socket), and the socket is not read until there is
  room. The watch (`hangup.py`) then looks for the client's going away, which an unread socket does not tell.
* The socket's send buffer: nothing more is taken from the stream until it drains; the stream's own bound follows. A client
  that takes nothing for `stuck_seconds` is closed.

    WAITING   the engine is not there yet; the socket is not read
    LIVE      messages go in, events come out
    DRAINING  input is over (half-close, or a message that was none); what was fed before still comes out
    CLOSING   our Close frame is sent; all input but the client's Close is thrown away
    LOST      no socket any more
"""

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from moshi_stt.config import LimitsConfig
from moshi_stt.constants import FRAME_SAMPLES, SAMPLE_RATE
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.engine import Engine
from moshi_stt.engine.stream import Stream
from moshi_stt.errors import EngineError, NoFreeSlot, ProtocolError
from moshi_stt.events import Error
from moshi_stt.server import frames
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.patience import Patience
from moshi_stt.session import Action, Protocol

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long the client has to answer our Close frame; anew with whatever else still comes of it before."""

LONGEST_CLOSE_SECONDS = 30.0
"""How long at most."""

ASIDE_BYTES = 256 << 10
"""Messages beyond this are decoded in a thread, so that the other connections do not wait."""

TURN_SAMPLES = 4 * SAMPLE_RATE
"""Audio that one message may yield before the other connections have a turn."""


class State(enum.IntEnum):
    WAITING = 0
    LIVE = 1
    DRAINING = 2
    CLOSING = 3
    LOST = 4


class Connection(asyncio.Protocol):
    """A WebSocket from its upgrade on. `start` takes the transport over."""

    def __init__(
        self,
        engine: Engine,
        session: Protocol[bytes],
        limits: LimitsConfig,
        metrics: Metrics,
        *,
        peer: str,
        on_lost: Callable[["Connection", Exception | None], None],
        on_blocked: Callable[["Connection"], None],
    ) -> None:
        """peer: for the log. on_lost: the socket is gone. on_blocked: watch the socket for a hang-up while `unheard`."""
        self.engine = engine
        self.peer = peer
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the socket is gone."""
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._metrics = metrics
        self._on_lost = on_lost
        self._on_blocked = on_blocked
        self._transport: asyncio.Transport | None = None
        self._parser = frames.FrameParser(limits.max_message_bytes)
        self._session = session
        self._stream: Stream | None = None
        self._state = State.WAITING
        self._final: tuple[Error | None, int] = (None, frames.NORMAL)
        """How a drained connection ends."""
        self._early = b""
        self._messages: deque[frames.Message] = deque()
        """Read and not looked at, while `_blocked`."""
        self._action: Action | None = None
        self._actions: Iterator[Action] = iter(())
        """What is left to do of the latest message, while `_blocked`: an action that found no room, and those behind it."""
        self._blocked = False
        self._aside = False
        self._input_ended = False
        self._reading = True
        self._eof = False
        self._flush_due = False
        self._write_paused = False
        self._owed_pong: bytes | None = None
        self._heard = True
        self._was_active = True
        self._patience = Patience(limits, self._loop.time())
        self._deadline = self._last_deadline = float("inf")
        """When a closing connection is cut."""

    # ---- opening -----------------------------------------------------------------------------------------------------

    def start(self, transport: asyncio.Transport, early: bytes) -> None:
        """Take the socket over from HTTP. early: what the client sent behind its request. Wait for `open`."""
        self._transport = transport
        transport.set_protocol(self)
        self._early = early
        self._pause_reading()
        self._on_blocked(self)

    def open(self) -> None:
        """Take a slot, or say why not and close."""
        if self._state is not State.WAITING:
            return
        try:
            self._stream = self.engine.open(live=True)
        except NoFreeSlot as error:
            self.end(Error(str(error)), frames.TRY_AGAIN)
            return
        except EngineError as error:
            self._metrics.errors.labels("engine").inc()
            self.end(Error(str(error)), frames.INTERNAL)
            return
        self._state = State.LIVE
        self._stream.listen(self._schedule_flush, self._schedule_catch_up)
        self._schedule_flush()
        self._resume_reading()
        early, self._early = self._early, b""
        if early:
            self.data_received(early)

    # ---- the socket's side, called by the event loop -----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard = True
        for message in self._parser.feed(data):
            opcode = message[0]
            if opcode == frames.BINARY or opcode == frames.VIOLATION:
                if self._state is State.LIVE:
                    if self._blocked:
                        self._messages.append(message)
                    else:
                        self._receive(message)
            elif opcode == frames.PING:
                self._pong(message.payload)
            elif opcode == frames.CLOSE:
                self._client_closed(message)
                return

    def eof_received(self) -> bool:
        """The client shut its sending half: the rest of its transcript still goes out. True keeps our half open."""
        self._eof = True
        if self._state is State.CLOSING:
            return False
        if self._state is State.LIVE and not self._blocked:
            self._end_input()
        self._ping()  # a client that is gone altogether answers with a reset
        self._on_blocked(self)
        return True

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._owed_pong is not None:
            owed, self._owed_pong = self._owed_pong, None
            self._pong(owed)
        self._schedule_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = State.LOST
        self._release()
        self._forget_input()
        self._transport = None
        if not self.lost.done():
            self.lost.set_result(None)
        self._on_lost(self, exc)

    # ---- input -------------------------------------------------------------------------------------------------------

    def _receive(self, message: frames.Message) -> None:
        opcode, payload, code = message
        if opcode == frames.VIOLATION:
            self._refuse_input(payload.decode(), code)
            return
        self._was_active = True
        self._metrics.frames_received += 1
        if len(payload) > ASIDE_BYTES:
            self._block()
            self._aside = True
            self._loop.run_in_executor(None, self._session.receive, payload).add_done_callback(self._received_aside)
            return
        try:
            actions = self._session.receive(payload)
        except ProtocolError as error:
            self._refuse_input(str(error), error.close_code)
            return
        except Exception as error:
            self._fail(error)
            return
        stream = self._stream
        if type(actions) is tuple and len(actions) == 1 and type(actions[0]) is Audio and stream is not None:  # nearly always
            rest = stream.offer(actions[0])
            if rest is not None:
                self._action = rest
                self._block()
            return
        self._apply(actions)

    def _received_aside(self, work: "asyncio.Future[Iterable[Action]]") -> None:
        self._aside = False
        if work.cancelled():
            return
        error = work.exception()
        if self._state is not State.LIVE:
            return
        if isinstance(error, ProtocolError):
            self._refuse_input(str(error), error.close_code)
        elif error is not None:
            self._fail(error)
        else:
            self._actions = iter(work.result())
            self._catch_up()

    def _apply(self, actions: Iterable[Action]) -> None:
        self._actions = iter(actions)
        self._continue()

    def _continue(self) -> None:
        """Give the actions that are due to the stream. What it has no room for is kept, and reading stops."""
        stream = self._stream
        assert stream is not None
        action, self._action = self._action, None
        fed = 0
        try:
            while action is not None or (action := next(self._actions, None)) is not None:
                if isinstance(action, Audio):
                    fed += len(action.samples)
                rest = stream.offer(action)
                if rest is not None:
                    self._action = rest
                    self._block()
                    return
                action = None
                if fed > TURN_SAMPLES:
                    self._block()
                    self._schedule_catch_up()
                    return
        except ProtocolError as error:
            self._refuse_input(str(error), error.close_code)
        except EngineError as error:
            self.end(Error(str(error)), frames.INTERNAL)
        except Exception as error:
            self._fail(error)

    def _block(self) -> None:
        self._blocked = True
        self._pause_reading()
        self._on_blocked(self)

    def _schedule_catch_up(self) -> None:
        self._loop.call_soon(self._catch_up)

    def _catch_up(self) -> None:
        """There may be room again: feed what was kept, then read on."""
        if self._state is not State.LIVE or not self._blocked or self._aside:
            return
        self._blocked = False
        self._continue()
        while self._messages and not self._blocked and self._state is State.LIVE:
            self._receive(self._messages.popleft())
        if self._blocked or self._state is not State.LIVE:
            return
        self._resume_reading()
        if self._eof:
            self._end_input()

    def _end_input(self) -> None:
        """The client has said all: what its protocol still holds goes in, then the stream is finished."""
        if not self._input_ended:
            self._input_ended = True
            self._apply(self._session.end_of_input())
        if not self._blocked and self._state is State.LIVE:
            self._drain()

    def _drain(self) -> None:
        """No more input: let what was fed come out, then close as `_final` says."""
        self._state = State.DRAINING
        self._forget_input()
        assert self._stream is not None
        self._stream.offer(Finish())
        self._resume_reading()
        self._schedule_flush()

    def _refuse_input(self, sentence: str, code: int) -> None:
        """The client broke the protocol: nothing more of it is taken, and what was good still comes out before the error."""
        log.info("%s: %s", self.peer, sentence)
        self._metrics.errors.labels("malformed").inc()
        self._final = (Error(sentence), code)
        self._drain()

    def _fail(self, error: BaseException) -> None:
        """Our own fault."""
        log.error("%s: the connection failed", self.peer, exc_info=error)
        self._metrics.errors.labels("internal").inc()
        self.end(Error("the server failed on this connection; its log says why"), frames.INTERNAL)

    def _forget_input(self) -> None:
        self._messages.clear()
        self._action, self._actions = None, iter(())

    # ---- output ------------------------------------------------------------------------------------------------------

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send every event that is there, in one write."""
        self._flush_due = False
        stream = self._stream
        if stream is None or self._write_paused or self._state not in (State.LIVE, State.DRAINING):
            return
        events = stream.take()
        failure: Error | None = None
        parts: list[bytes] = []
        for event in events:
            if type(event) is Error:
                failure = event
                break
            for payload in self._session.send(event):
                parts.append(frames.header(frames.BINARY, len(payload)))
                parts.append(payload)
        if parts:
            self._was_active = True
            self._metrics.frames_sent += len(parts) >> 1
            self._write(parts[0] + parts[1] if len(parts) == 2 else b"".join(parts))
        if failure is not None:
            self.end(failure, failure.close_code or frames.INTERNAL)
        elif stream.ended:
            self.end(*self._final)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _ping(self) -> None:
        self._patience.pinged(self._loop.time())
        if self._state < State.CLOSING:
            self._write(frames.frame(frames.PING, b""))

    def _pong(self, payload: bytes) -> None:
        if self._state >= State.CLOSING:
            return
        if self._write_paused:
            self._owed_pong = payload  # the latest one is enough (RFC 6455 section 5.5.3)
        else:
            self._write(frames.frame(frames.PONG, payload))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def end(self, error: Error | None, code: int) -> None:
        """Send the error, if any, and Close; free the slot; give the client CLOSE_SECONDS to answer."""
        if self._state >= State.CLOSING or self._transport is None:
            return
        self._state = State.CLOSING
        last_words = self._session.send(error) if error else ()
        parts = [frames.frame(frames.BINARY, payload) for payload in last_words]
        self._write(b"".join(parts) + frames.close_frame(code, error.message if error else ""))
        self._release()
        self._forget_input()
        self._set_deadline()
        if self._eof:
            self._transport.close()
            return
        self._resume_reading()
        early, self._early = self._early, b""
        if early:
            self.data_received(early)

    def _client_closed(self, message: frames.Message) -> None:
        """The client's Close frame: answer it, unless it is itself the answer, and close the socket."""
        transport = self._transport
        if transport is None:
            return
        if self._state < State.CLOSING:
            self._write(frames.close_frame(frames.NORMAL if message.code == frames.NO_STATUS else message.code))
            self._state = State.CLOSING
            self._set_deadline()
        self._release()
        transport.close()

    def _set_deadline(self) -> None:
        now = self._loop.time()
        self._heard = False
        self._deadline = now + CLOSE_SECONDS
        self._last_deadline = now + LONGEST_CLOSE_SECONDS

    def abort(self) -> None:
        """Cut the socket now."""
        if self._transport is not None:
            self._transport.abort()

    def _release(self) -> None:
        stream = self._stream
        if stream is not None:
            self._tell_warnings()
            self._stream = None
            stream.close()

    def _tell_warnings(self) -> None:
        waiting_samples = self._stream.pending_samples if self._stream is not None else 0
        for warning in self._session.warnings(waiting_samples):
            log.warning("%s: %s", self.peer, warning)

    # ---- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Look at the clocks; called every `tick_seconds`."""
        if self._state >= State.CLOSING:
            if self._heard:
                self._heard = False
                self._deadline = min(now + CLOSE_SECONDS, self._last_deadline)
            if now >= self._deadline:
                self.abort()
            return
        if not self._aside:
            self._tell_warnings()
        if self._patience.ping_due(now):
            self._ping()
        unread = not self._reading
        self._patience.note(
            now,
            heard=self._heard or unread,
            active=self._was_active or unread or self._busy(),
            unsent=self._transport.get_write_buffer_size() if self._write_paused and self._transport else None,
        )
        self._heard = self._was_active = False
        verdict = self._patience.judge(now, half_closed=self._eof)
        if verdict is not None:
            log.info("%s: closed: %s", self.peer, verdict.sentence)
            self._metrics.errors.labels(verdict.kind).inc()
            self.end(Error(verdict.sentence), verdict.code)

    def _busy(self) -> bool:
        """Whether the client may rightly be waiting for us."""
        stream = self._stream
        return stream is None or stream.pending_samples >= FRAME_SAMPLES

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def unheard(self) -> bool:
        """Whether the socket is not read now, or has no more to say: only a look at it tells whether the client is there."""
        return self._state < State.CLOSING and (not self._reading or self._eof)

    @property
    def held_bytes(self) -> int:
        """Bytes held for this connection on both sides of its stream: read and not fed, written and not sent."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        rest = self._action.samples.nbytes if isinstance(self._action, Audio) else 0
        return self._parser.pending_bytes + sum(len(message.payload) for message in self._messages) + rest + unsent

    def fileno(self) -> int:
        """The socket's descriptor, -1 when there is none."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        return sock.fileno() if sock is not None else -1

    def probe(self) -> None:
        """Make a client that has gone away altogether betray itself."""
        self._ping()

    def _pause_reading(self) -> None:
        if self._reading and not self._eof and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self._reading and self._transport is not None:
            self._reading = True
            if not self._transport.is_closing():
                self._transport.resume_reading()
