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
from moshi_stt.engine.engine import Engine
from moshi_stt.errors import EngineError, NoFreeSlot, ProtocolError, SpoolError
from moshi_stt.events import Ack, Error
from moshi_stt.server import framing
from moshi_stt.server.conversation import Conversation
from moshi_stt.server.doors.door import Opening
from moshi_stt.server.framing import Closed, Framing, Ping, Violation
from moshi_stt.server.inputs import END_OF_INPUT, InputQueue, Item, Request
from moshi_stt.server.resume import Again, ResumeRequest
from moshi_stt.server.spool import Backlog, Spool
from moshi_stt.server.surroundings import AbandonedSocket, Surroundings, nobody
from moshi_stt.server.tally import Tally
from moshi_stt.server.timers import TOTAL, ClosingTimer, ConnectionTimers
from moshi_stt.session import Close, Message, Reply, Session

log = logging.getLogger(__name__)


FULL_SECONDS = 10.0
"""How long the spool may be full before the stream ends: less than clients wait for an answer to their pings."""


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
        frames: Framing,
        server: Surroundings,
        peer: str,
        token: str | None = None,
        door: str = "",
    ) -> None:
        """peer and door: for the log. token: names the stream for a client that may come back to it."""
        self.peer = peer
        self.tally = Tally(door, asyncio.get_running_loop().time())
        self._told_tally = False
        talk = Conversation(engine, opening, session, token, self.tally)
        self._talk, self._streams, self._session, self._resumption = talk, talk.streams, session, talk.resumption
        self._parked_at: float | None = None
        self._told_lost: Callable[[Exception | None], None] = nobody
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        """Done when the socket is gone."""
        self.has_clock = type(session).tick is not Session.tick
        """Whether `tick_session` is to be called."""
        self._server = server
        self._framing = frames
        self._on_demand = opening.on_demand
        spool = Spool(server.spool, self._schedule_resume, self._input_failed) if server.spool.total else None
        backlog: Backlog[Item] = Backlog(server.limits.ahead_bytes, spool)
        self._queue = InputQueue(session, self._act, self._schedule_resume, self._input_failed, backlog)
        self._full_since: float | None = None
        """Since when the spool has had no room."""
        self._opened_at = self._loop.time()
        self._timers = ConnectionTimers(server.limits, self._opened_at, may_idle=session.may_idle)
        self._closing = ClosingTimer()
        self._transport: asyncio.Transport | None = None
        self._state = State.WAITING
        self._final: Error | None = None
        """What a drained connection ends with."""
        self._early = b""
        self._reading = True
        self._eof = False
        self._flush_due = False
        self._write_paused = False
        self._owed_pong: bytes | None = None
        self._heard = True
        self._sent_at = self._loop.time()
        """When the client sent a message last."""

    # ---- opening -----------------------------------------------------------------------------------------------------

    def start(self, transport: asyncio.Transport, early: bytes, lost: Callable[[Exception | None], None] | None) -> None:
        """Take the socket over. early: what the client sent after its request. lost: told when it is gone. Then wait for
        `open`.
        """
        self._told_lost = lost or nobody
        self._transport = transport
        transport.set_protocol(self)
        self._early = early
        self._pause_reading()

    def open(self) -> None:
        """Take the slots, or say why not and close."""
        if self._state is not State.WAITING:
            return
        self._state = State.LIVE
        if not self._on_demand:
            self._guarded(self._open_streams)
        if self._state is State.LIVE:
            self._input(self._session.opened())
        self._feed_early()

    def _open_streams(self) -> None:
        self._streams.open(self._schedule_flush, self._schedule_resume)
        self._schedule_flush()

    def _feed_early(self) -> None:
        early, self._early = self._early, b""
        if early:
            self.data_received(early)

    # ---- the socket's side, called by the event loop -----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self.tally.received_bytes += len(data)
        for frame in self._framing.feed(data):
            if type(frame) is bytes or isinstance(frame, str | Violation):
                if self._state is State.LIVE:
                    self._input(frame)
            elif isinstance(frame, Ping):
                self._pong(frame.payload)
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
        return now - self._sent_at >= seconds and not self._queue.blocked and self._streams.pending_samples < FRAME_SAMPLES

    def eof_received(self) -> bool:
        """The client shut its sending half: the rest of its transcript still goes out. True keeps our half open."""
        if self._resumption is not None and self._state is State.LIVE:
            return False  # no Close came before it: the connection broke
        self._eof = True
        if self._state is State.CLOSING:
            return False
        if self._state is State.LIVE:
            self._input(END_OF_INPUT)
        self._ping()  # a client that is gone altogether answers with a reset
        self._server.watch(self)
        return True

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._owed_pong is not None:
            owed, self._owed_pong = self._owed_pong, None
            self._pong(owed)
        self._schedule_flush()
        self._schedule_resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.lost.done():
            self.lost.set_result(None)
        told, self._told_lost = self._told_lost, nobody
        told(exc)
        if self._resumption is not None and self._state in (State.LIVE, State.DRAINING) and self._server.may_park(self):
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
        return None if self._resumption is None else self._resumption.token

    @property
    def is_parked(self) -> bool:
        """Whether it waits for its client to come back."""
        return self._parked_at is not None

    def attach(
        self,
        transport: asyncio.Transport,
        early: bytes,
        frames: Framing,
        request: ResumeRequest,
        lost: Callable[[Exception | None], None] | None,
    ) -> bool:
        """Go on over another socket; False, and nothing is changed, where the client cannot get all that it has missed.

        early: what the client sent after its request. lost: told when the socket is gone.
        """
        missed = self._talk.missed(request.events)
        if missed is None or self._state not in (State.LIVE, State.DRAINING):
            return False
        if self._transport is not None:  # the old socket, which we did not know to be dead
            self._transport.set_protocol(AbandonedSocket(self.lost, self._told_lost))
            self._transport.abort()
        self.lost = self._loop.create_future()
        self._told_lost = lost or nobody
        self._transport, self._framing = transport, frames
        self._parked_at = None
        self._reading, self._eof, self._write_paused, self._owed_pong = True, False, False, None
        self._heard = True
        may_idle, opened = self._session.may_idle, self._opened_at
        self._timers = ConnectionTimers(self._server.limits, self._loop.time(), may_idle=may_idle, opened=opened)
        transport.set_protocol(self)
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
        if queue.ended or (self._streams.finishing and not self._on_demand):
            self._drain()
        elif queue.wants_pause:
            self._pause_reading()
        elif not self._reading:
            self._resume_reading()

    def _input_failed(self, error: BaseException) -> None:
        if self._state is not State.LIVE:
            return
        errors = self._server.metrics.errors
        if isinstance(error, ProtocolError):  # nothing more is taken, and what was good still comes out before the error
            log.info("%s: %s", self.peer, error)
            errors.labels("malformed").inc()
            self._final = Error(str(error), error.close_code)
            self._drain()
        elif isinstance(error, NoFreeSlot):
            self.end(Error(str(error), framing.TRY_AGAIN))
        elif isinstance(error, SpoolError):
            log.error("%s: %s", self.peer, error)
            errors.labels("spool").inc()
            self.end(Error(str(error), framing.INTERNAL))
        elif isinstance(error, EngineError):
            errors.labels("engine").inc()
            self.end(Error(str(error), framing.INTERNAL))
        else:
            log.error("%s: the connection failed", self.peer, exc_info=error)
            errors.labels("internal").inc()
            self.end(Error("the server failed on this connection; its log says why", framing.INTERNAL))

    def _act(self, action: Request) -> Request | None:
        """Carry out what the session asks for; returns what there is no room for."""
        if isinstance(action, Reply):
            if self._write_paused:
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
        self._streams.finish()
        self._resume_reading()
        self._schedule_flush()

    # ---- output ------------------------------------------------------------------------------------------------------

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send every event that is there, in one write."""
        self._flush_due = False
        if self._write_paused or self._transport is None or self._state not in (State.LIVE, State.DRAINING):
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
        if self._state is State.DRAINING or not self._on_demand:
            self.end(self._final)
        elif self._streams.is_open:
            self._streams.close()
            self._schedule_resume()

    def _send(self, messages: Iterable[Message]) -> None:
        encode = self._framing.encode
        parts = [encode(message) for message in messages]
        self._queue.was_active = True
        self._server.metrics.frames_sent += len(parts)
        self._write(parts[0] if len(parts) == 1 else b"".join(parts))

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None and not self._transport.is_closing():
            self.tally.sent_bytes += len(data)
            self._transport.write(data)

    def _ping(self) -> None:
        self._timers.pinged(self._loop.time())
        if self._state < State.CLOSING:
            self._write(self._framing.ping())

    def _pong(self, payload: bytes) -> None:
        if self._state >= State.CLOSING:
            return
        if self._write_paused:
            self._owed_pong = payload  # the latest one is enough (RFC 6455 section 5.5.3)
        else:
            self._write(self._framing.pong(payload))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def end(self, error: Error | None) -> None:
        """Send the error, if any, and Close; free the slots; give the client time to answer."""
        if self.is_parked:
            self._over()
            return
        if self._state >= State.CLOSING or self._transport is None:
            return
        try:
            messages: Iterable[Message] = () if error is None else self._session.send(error)
            close = self._session.close(error)
        except Exception:
            log.exception("%s: the session failed", self.peer)
            messages, close = (), Close(framing.INTERNAL)
        if messages:
            self._send(messages)
        self._close(close)

    def _close(self, close: Close) -> None:
        transport = self._transport
        if self._state >= State.CLOSING or transport is None:
            return
        self._state = State.CLOSING
        self._write(self._framing.close(close.code, close.reason))
        self.tally.code, self.tally.reason = close.code, close.reason
        self._release()
        self._begin_closing()
        if self._eof or not self._framing.handshakes:
            transport.close()
            return
        if self._framing.broken and transport.can_write_eof():  # its Close cannot be read any more: it sees the end of ours
            transport.write_eof()
        self._resume_reading()
        self._feed_early()

    def _client_closed(self, closed: Closed) -> None:
        """The client's Close: answer it, unless it is itself the answer, and close the socket."""
        transport = self._transport
        if transport is None:
            return
        if self._state < State.CLOSING:
            self.tally.code, self.tally.reason = closed.code, "closed by the client"
            self._write(self._framing.close(framing.NORMAL if closed.code == framing.NO_STATUS else closed.code))
            self._state = State.CLOSING
            self._begin_closing()
        self._release()
        transport.close()

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
        if self._transport is not None:
            self._transport.abort()

    def _release(self) -> None:
        """Give the slots back, and drop what was not fed."""
        if self._streams.is_open:
            self._log_warnings()
            self._streams.close()
        self._queue.clear()
        if not self._told_tally:
            self._told_tally = True
            log.info("%s: ended: %s", self.peer, self.tally.line(self._loop.time()))

    def _log_warnings(self) -> None:
        for warning in self._session.warnings(self._streams.pending_samples):
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
        self.tally.most_waiting_samples = max(self.tally.most_waiting_samples, self._streams.pending_samples)
        if self._timers.ping_due(now):
            self._ping()
        if self._too_far_ahead(now):
            return
        self._acknowledge()
        unread = not self._reading
        self._timers.note(
            now,
            heard=self._heard or unread,
            active=self._queue.was_active or self._queue.blocked or unread or self._busy(),
            unsent=self._transport.get_write_buffer_size() if self._write_paused and self._transport else None,
        )
        self._heard = self._queue.was_active = False
        finishing = self._final is not None or self._state is State.DRAINING
        verdict = self._timers.judge(now, half_closed=self._eof, finishing=finishing)
        if verdict is not None:
            log.info("%s: closed: %s", self.peer, verdict.sentence)
            self._server.metrics.errors.labels(verdict.kind).inc()
            end = self.finish if verdict.kind == TOTAL and not finishing else self.end
            end(Error(verdict.sentence, verdict.code))

    def _acknowledge(self) -> None:
        samples = self._resumption.acknowledgement() if self._resumption is not None else None
        if samples is not None and not self._write_paused:
            self._send(self._session.send(Ack(samples)))

    def _too_far_ahead(self, now: float) -> bool:
        """End the connection of a client whose audio has had no room for a while, before its own keepalive cuts it."""
        if not self._queue.is_full:
            self._full_since = None
            return False
        if self._full_since is None:
            self._full_since = now
        if now - self._full_since < FULL_SECONDS:
            return False
        self._server.metrics.errors.labels("ahead").inc()
        held = self._queue.spooled_bytes
        log.info("%s: closed: %d bytes ahead of recognition", self.peer, held)
        sentence = f"{held} bytes of audio wait for recognition, which is all that spool_bytes and spool_total_bytes allow"
        self.end(Error(f"{sentence}: send more slowly", framing.POLICY))
        return True

    def tick_session(self, now: float) -> None:
        """Let the session look at its clock."""
        if self._state is State.LIVE and not self._queue.blocked:
            self._guarded(self._put_ticks, now)

    def _put_ticks(self, now: float) -> None:
        was_active = self._queue.was_active
        self._queue.put(self._session.tick(now))
        self._queue.was_active = was_active  # the client did nothing

    def _busy(self) -> bool:
        """Whether the client may rightly be waiting for us."""
        return self._state is State.WAITING or self._streams.pending_samples >= FRAME_SAMPLES

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def unheard(self) -> bool:
        """Whether the socket is not read now, or has no more to say: only a look at it tells whether the client is there."""
        return self._state < State.CLOSING and (not self._reading or self._eof)

    @property
    def held_bytes(self) -> int:
        """Bytes held for this connection on both sides of its streams: read and not fed, written and not sent."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._framing.pending_bytes + self._queue.waiting_bytes + unsent

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
            self._server.watch(self)

    def _resume_reading(self) -> None:
        if not self._reading and self._transport is not None:
            self._reading = True
            if not self._transport.is_closing():
                self._transport.resume_reading()
