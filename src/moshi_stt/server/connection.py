"""One client's socket, from its first byte to its last: framing, session and streams, and how it ends.

Everything here is called by the event loop and nothing waits: a connection has no task of its own. What can be full:

* A stream's inbox: what came too much is kept in memory, then on disk (`inputs.py`, `spool.py`), so that pings are read and
  answered. Only when the disk has no room the socket is not read, and the stream ends soon. The monitor (`disconnects.py`)
  then looks for the client's disconnect, which an unread socket does not tell.
* The socket's send buffer: nothing more is taken from the streams until it drains; their own bound follows. A client that
  takes nothing for `stuck_seconds` is closed.

    WAITING   the engine is not there yet; the socket is not read
    LIVE      messages go in, events come out
    DRAINING  input is over (half-close, Finish, or a message that was none); what was fed before still comes out
    CLOSING   our Close is sent; all input but the client's Close is thrown away
    LOST      no socket any more
"""

import asyncio
import enum
import logging
from collections.abc import Callable, Iterable

from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.commands import Audio
from moshi_stt.engine.engine import Engine
from moshi_stt.events import Ack, Error
from moshi_stt.server import framing
from moshi_stt.server.client_socket import ClientSocket
from moshi_stt.server.conversation import Conversation
from moshi_stt.server.doors.door import Opening
from moshi_stt.server.failures import failure_of
from moshi_stt.server.framing import Closed, Framing, Ping, Violation
from moshi_stt.server.inputs import END_OF_INPUT, InputQueue, Item, Request
from moshi_stt.server.resume import Again, ResumeRequest
from moshi_stt.server.spool import Backlog, Spool
from moshi_stt.server.surroundings import Surroundings
from moshi_stt.server.tally import Tally
from moshi_stt.server.timers import TOTAL, ClosingTimer, ConnectionTimers
from moshi_stt.session import Close, Message, Reply, Session

log = logging.getLogger(__name__)


class State(enum.IntEnum):
    WAITING = 0
    LIVE = 1
    DRAINING = 2
    CLOSING = 3
    LOST = 4


class Connection(asyncio.Protocol):
    """A client, from the upgrade of its socket on. `start` takes the transport over."""

    def __init__(
        self,
        engine: Engine,
        opening: Opening,
        session: Session,
        server: Surroundings,
        peer: str,
        token: str | None = None,
        door: str = "",
    ) -> None:
        """peer and door: for the log. token: names the stream for a client that may come back to it."""
        self.peer = peer
        self.tally = Tally(door, asyncio.get_running_loop().time())
        self._told_tally = False
        self._talk = Conversation(engine, opening, session, token, self.tally)
        self._parked_at: float | None = None
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None]
        """Done when the latest socket is gone."""
        self.has_clock = type(session).tick is not Session.tick
        """Whether `tick_session` is to be called."""
        self._server = server
        spool = Spool(server.spool, self._schedule_resume, self._input_failed) if server.spool.total else None
        backlog: Backlog[Item] = Backlog(server.limits.ahead_bytes, spool)
        self._queue = InputQueue(session, self._act, self._schedule_resume, self._input_failed, backlog)
        self._opened_at = self._loop.time()
        self._timers = ConnectionTimers(server.limits, self._opened_at, may_idle=session.may_idle)
        self._closing = ClosingTimer()
        self._socket: ClientSocket | None = None
        self._state = State.WAITING
        self._final: Error | None = None
        """What a drained connection ends with."""
        self._early = b""
        self._flush_due = False
        self._heard = True
        """Whether anything came since the last tick."""
        self._sent_at = self._loop.time()
        """When the client sent a message last."""

    # ---- opening -----------------------------------------------------------------------------------------------------

    def start(
        self,
        transport: asyncio.Transport,
        early: bytes,
        framing: Framing,
        lost: Callable[[Exception | None], None] | None,
    ) -> None:
        """Take the socket over. early: what the client sent after its request. lost: told when it is gone. Then wait for
        `open`.
        """
        self._take_over(transport, framing, lost)
        self._early = early
        self._pause_reading()

    def _take_over(
        self, transport: asyncio.Transport, framing: Framing, lost: Callable[[Exception | None], None] | None
    ) -> None:
        self._socket = ClientSocket(transport, framing, self.tally, lost)
        self.lost = self._socket.lost
        transport.set_protocol(self)

    def open(self) -> None:
        """Take the slots, or say why not and close."""
        if self._state is not State.WAITING:
            return
        self._state = State.LIVE
        if not self._talk.on_demand:
            self._guarded(self._open_streams)
        if self._state is State.LIVE:
            self._input(self._talk.session.opened())
        self._feed_early()

    def _open_streams(self) -> None:
        self._talk.streams.open(self._schedule_flush, self._schedule_resume)
        self._schedule_flush()

    def _feed_early(self) -> None:
        early, self._early = self._early, b""
        if early:
            self.data_received(early)

    # ---- the socket's side, called by the event loop -----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self.tally.received_bytes += len(data)
        if self._socket is None:
            return
        for frame in self._socket.framing.feed(data):
            if type(frame) is bytes or isinstance(frame, str | Violation):
                if self._state is State.LIVE:
                    self._input(frame)
            elif isinstance(frame, Ping):
                if self._state < State.CLOSING:
                    self._socket.pong(frame.payload)
            elif isinstance(frame, Closed):
                self._client_closed(frame)
                return

    def finish(self, error: Error) -> None:
        """Take no more of the client: what it sent is transcribed and given, then come the error and Close."""
        if self._state is State.WAITING or self.is_parked:
            self.end(error)
        elif self._state is State.LIVE:
            self._final = error
            self._input(END_OF_INPUT)
        elif self._state is State.DRAINING and self._final is None:
            self._final = error

    def is_still(self, now: float, seconds: float) -> bool:
        """Whether the client has sent nothing for so long, and everything that it sent is transcribed."""
        if self.is_parked or self._state in (State.WAITING, State.CLOSING, State.LOST):
            return True
        return now - self._sent_at >= seconds and not self._queue.blocked and self._talk.streams.pending_samples < FRAME_SAMPLES

    def eof_received(self) -> bool:
        """The client shut its sending half: the rest of its transcript still goes out. True keeps our half open."""
        if self._talk.resumption is not None and self._state is State.LIVE:
            return False  # no Close came before it: the connection broke
        if self._socket is not None:
            self._socket.half_closed = True
        if self._state is State.CLOSING:
            return False
        if self._state is State.LIVE:
            self._input(END_OF_INPUT)
        self._ping()  # a client that is gone altogether answers with a reset
        self._server.watch(self)
        return True

    def pause_writing(self) -> None:
        if self._socket is not None:
            self._socket.is_full = True

    def resume_writing(self) -> None:
        if self._socket is not None:
            self._socket.drained(may_answer=self._state < State.CLOSING)
        self._schedule_flush()
        self._schedule_resume()

    def connection_lost(self, exc: Exception | None) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.gone(exc)
        resumption = self._talk.resumption
        if resumption is not None and self._state in (State.LIVE, State.DRAINING) and self._server.may_park(self):
            self._parked_at = self._loop.time()
            log.info("%s: the socket is lost; the stream waits for its client", self.peer)
            return
        self._over()

    def _over(self) -> None:
        self._state = State.LOST
        self._parked_at = None
        self._release()
        self._server.lost(self)

    # ---- coming back -------------------------------------------------------------------------------------------------

    @property
    def token(self) -> str | None:
        """Names the stream for a client that may come back to it."""
        return None if self._talk.resumption is None else self._talk.resumption.token

    @property
    def is_parked(self) -> bool:
        """Whether it waits for its client to come back."""
        return self._parked_at is not None

    def attach(
        self,
        transport: asyncio.Transport,
        early: bytes,
        framing: Framing,
        request: ResumeRequest,
        lost: Callable[[Exception | None], None] | None,
    ) -> bool:
        """Go on over another socket; False, and nothing is changed, where the client cannot get all that it has missed.

        early: what the client sent after its request. lost: told when the socket is gone.
        """
        missed = self._talk.missed(request.events)
        if missed is None or self._state not in (State.LIVE, State.DRAINING):
            return False
        if self._socket is not None:  # the old one, which we did not know to be dead
            self._socket.abandon()
        self._parked_at = None
        self._heard = True
        may_idle, opened = self._talk.session.may_idle, self._opened_at
        self._timers = ConnectionTimers(self._server.limits, self._loop.time(), may_idle=may_idle, opened=opened)
        self._take_over(transport, framing, lost)
        self._send(missed)
        if self._state is State.LIVE:
            self._input([Again(request.samples)])
        self._early = early
        self._feed_early()
        self._schedule_flush()
        return True

    # ---- input -------------------------------------------------------------------------------------------------------

    def _input(self, item: Item) -> None:
        if type(item) is bytes or type(item) is str:
            self._server.metrics.frames_received += 1
            self._sent_at = self._loop.time()
        try:
            self._queue.put(item)
        except Exception as error:
            self._input_failed(error)
            return
        self._settle()

    def _schedule_resume(self) -> None:
        self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        """There may be room again: work on what was kept, then read on."""
        if self._state is State.LIVE and self._queue.blocked:
            self._guarded(self._queue.resume)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        """Do some of the client's input; whatever it raises ends the input or the connection, and nothing else."""
        try:
            work(*arguments)
        except Exception as error:
            self._input_failed(error)
            return
        self._settle()

    def _settle(self) -> None:
        """After some input: drain where it has ended, and read where it has not to wait."""
        if self._state is not State.LIVE:
            return
        queue = self._queue
        if queue.ended or (self._talk.streams.finishing and not self._talk.on_demand):
            self._drain()
        elif queue.wants_pause:
            self._pause_reading()
        elif self._socket is not None:
            self._socket.resume_reading()

    def _input_failed(self, error: BaseException) -> None:
        if self._state is not State.LIVE:
            return
        failure = failure_of(error, self.peer)
        if failure.kind is not None:
            self._server.metrics.errors.labels(failure.kind).inc()
        if failure.drains:
            self._final = failure.error
            self._drain()
        else:
            self.end(failure.error)

    def _act(self, action: Request) -> Request | None:
        """Carry out what the session asks for; returns what there is no room for."""
        if type(action) is Audio:  # nearly always
            return self._talk.carry_out(action, self._open_streams)
        if isinstance(action, Reply):
            if self._socket is not None and self._socket.is_full:
                return action
            self._send([action.message])
            return None
        if isinstance(action, Close):
            self._close(action)
            return None
        return self._talk.carry_out(action, self._open_streams)

    def _drain(self) -> None:
        """No more input: let what was fed come out, then close as `_final` says."""
        self._state = State.DRAINING
        self._queue.clear()
        self._talk.streams.finish()
        if self._socket is not None:
            self._socket.resume_reading()
        self._schedule_flush()

    # ---- output ------------------------------------------------------------------------------------------------------

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send every event that is there, in one write."""
        self._flush_due = False
        socket = self._socket
        if socket is None or socket.is_full or self._state not in (State.LIVE, State.DRAINING):
            return
        try:
            messages, failure, over = self._talk.listen(last_words=self._final is None)
        except Exception as error:
            self._state = State.LIVE
            self._input_failed(error)
            return
        if messages:
            self._send(messages)
        if failure is not None:
            self.end(failure)
        elif over:
            self._streams_ended()

    def _streams_ended(self) -> None:
        if self._state is State.DRAINING or not self._talk.on_demand:
            self.end(self._final)
        elif self._talk.streams.is_open:
            self._talk.streams.close()
            self._schedule_resume()

    def _send(self, messages: Iterable[Message]) -> None:
        self._queue.was_active = True
        if self._socket is not None:
            self._server.metrics.frames_sent += self._socket.send(messages)

    def _ping(self) -> None:
        self._timers.pinged(self._loop.time())
        if self._socket is not None and self._state < State.CLOSING:
            self._socket.ping()

    # ---- the end -----------------------------------------------------------------------------------------------------

    def end(self, error: Error | None) -> None:
        """Send the error, if any, and Close; free the slots; give the client time to answer."""
        if self.is_parked:
            self._over()
            return
        if self._state >= State.CLOSING or self._socket is None:
            return
        session = self._talk.session
        try:
            messages: Iterable[Message] = () if error is None else session.send(error)
            close = session.close(error)
        except Exception:
            log.exception("%s: the session failed", self.peer)
            messages, close = (), Close(framing.INTERNAL)
        if messages:
            self._send(messages)
        self._close(close)

    def _close(self, close: Close) -> None:
        socket = self._socket
        if self._state >= State.CLOSING or socket is None:
            return
        self._state = State.CLOSING
        socket.send_close(close.code, close.reason)
        self.tally.code, self.tally.reason = close.code, close.reason
        self._release()
        self._begin_closing()
        if not socket.finish_closing():
            self._feed_early()

    def _client_closed(self, closed: Closed) -> None:
        """The client's Close: answer it, unless it is itself the answer, and close the socket."""
        socket = self._socket
        if socket is None:
            return
        if self._state < State.CLOSING:
            self.tally.code, self.tally.reason = closed.code, "closed by the client"
            socket.send_close(framing.NORMAL if closed.code == framing.NO_STATUS else closed.code)
            self._state = State.CLOSING
            self._begin_closing()
        self._release()
        socket.close()

    def _begin_closing(self) -> None:
        self._heard = False
        self._closing.start(self._loop.time())

    def abort(self) -> None:
        """Cut the socket now."""
        if self.is_parked:
            self._over()
            return
        if self._state < State.CLOSING:
            self._state = State.CLOSING  # nobody is to come back to it
        if self._socket is not None:
            self._socket.abort()

    def _release(self) -> None:
        """Give the slots back, and drop what was not fed."""
        if self._talk.streams.is_open:
            self._log_warnings()
            self._talk.streams.close()
        self._queue.clear()
        if not self._told_tally:
            self._told_tally = True
            log.info("%s: ended: %s", self.peer, self.tally.line(self._loop.time()))

    def _log_warnings(self) -> None:
        for warning in self._talk.session.warnings(self._talk.streams.pending_samples):
            log.warning("%s: %s", self.peer, warning)

    # ---- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Look at the timers."""
        if self._parked_at is not None:
            if now - self._parked_at >= self._server.limits.resume_seconds:
                log.info("%s: the client did not come back in time", self.peer)
                self._over()
            return
        if self._state >= State.CLOSING:
            if self._closing.expired(now, heard=self._heard):
                self.abort()
            self._heard = False
            return
        if not self._queue.in_thread:
            self._log_warnings()
        self.tally.most_waiting_samples = max(self.tally.most_waiting_samples, self._talk.streams.pending_samples)
        if self._timers.ping_due(now):
            self._ping()
        self._acknowledge()
        socket = self._socket
        unread = socket is not None and not socket.is_read
        self._timers.note(
            now,
            heard=self._heard or unread,
            active=self._queue.was_active or self._queue.blocked or unread or self._busy(),
            unsent=socket.unsent_bytes if socket is not None and socket.is_full else None,
            ahead=self._queue.spooled_bytes if self._queue.is_full else None,
        )
        self._heard = self._queue.was_active = False
        finishing = self._final is not None or self._state is State.DRAINING
        verdict = self._timers.judge(now, half_closed=socket is not None and socket.half_closed, finishing=finishing)
        if verdict is not None:
            log.info("%s: closed: %s", self.peer, verdict.sentence)
            self._server.metrics.errors.labels(verdict.kind).inc()
            end = self.finish if verdict.kind == TOTAL and not finishing else self.end
            end(Error(verdict.sentence, verdict.code))

    def _acknowledge(self) -> None:
        resumption, socket = self._talk.resumption, self._socket
        samples = resumption.acknowledgement() if resumption is not None else None
        if samples is not None and socket is not None and not socket.is_full:
            self._send(self._talk.session.send(Ack(samples)))

    def tick_session(self, now: float) -> None:
        """Let the session look at its clock."""
        if self._state is State.LIVE and not self._queue.blocked:
            self._guarded(self._put_ticks, now)

    def _put_ticks(self, now: float) -> None:
        was_active = self._queue.was_active
        self._queue.put(self._talk.session.tick(now))
        self._queue.was_active = was_active  # the client did nothing

    def _busy(self) -> bool:
        """Whether the client may rightly be waiting for us."""
        return self._state is State.WAITING or self._talk.streams.pending_samples >= FRAME_SAMPLES

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def unheard(self) -> bool:
        """Whether the socket is not read now, or has no more to say: only a look at it tells whether the client is there."""
        socket = self._socket
        return socket is not None and self._state < State.CLOSING and (not socket.is_read or socket.half_closed)

    @property
    def held_bytes(self) -> int:
        """Bytes held for this connection on both sides of its streams: read and not fed, written and not sent."""
        socket = self._socket
        return self._queue.waiting_bytes + (0 if socket is None else socket.framing.pending_bytes + socket.unsent_bytes)

    def fileno(self) -> int:
        """The socket's descriptor, -1 when there is none."""
        return -1 if self._socket is None else self._socket.fileno()

    def probe(self) -> None:
        """Make a client that has gone away altogether betray itself."""
        self._ping()

    def _pause_reading(self) -> None:
        if self._socket is not None and self._socket.pause_reading():
            self._server.watch(self)
