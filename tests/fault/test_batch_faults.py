"""A model that fails, hangs or cannot be loaded: every stream hears of it, nothing waits for ever."""

import asyncio
from functools import partial

import pytest
from tests.support.batch import DEADLINE, engine, noise, rest, steps_of, transcribe, until
from tests.support.scripted_backend import PseudoModel, Scripted

from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish, Mark, Reset
from moshi_stt.engine.engine import EngineInfo, SilentObserver
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.errors import CheckpointError, EngineError, EngineFailed
from moshi_stt.events import Error
from moshi_stt.text.words import WordAssembler


async def test_a_step_that_raises_ends_every_stream() -> None:
    """Flaw F5: there the model thread ends with a log line and connections are accepted and never served."""

    class Observer(SilentObserver):
        errors = 0

        def failed(self) -> None:
            self.errors += 1

    observer = Observer()
    async with engine(observer=observer) as started:
        idle, busy = started.open(), started.open()
        await busy.send(Audio(noise(3)))
        await until(busy, lambda e: steps_of(e) == 3)
        started.fake.raise_next = True
        await busy.send(Audio(noise(3)))
        async with asyncio.timeout(DEADLINE):
            failure = await started.wait_failed()
        assert "RuntimeError: device-side assert triggered" in str(failure)
        for stream in (idle, busy):
            last = (await rest(stream))[-1]
            assert last == Error(str(failure), 1011)
        await busy.send(Audio(noise(3)))  # returns without effect
        assert not started.ready
        assert observer.errors == 2
        with pytest.raises(EngineFailed, match="device-side assert"):
            started.open()
        with pytest.raises(EngineFailed):
            await started.open_when_free(5)
        idle.close()
        busy.close()
        assert started.used_slots == 0
    assert started.fake.closed


async def test_a_failure_is_told_to_who_waits_for_a_slot() -> None:
    """A file in the queue hears of it at once, and not when its patience ends."""
    async with engine(streams=1) as started:
        stream = started.open()
        waiting = asyncio.create_task(started.open_when_free(1_000))
        await asyncio.sleep(0)
        started.fake.raise_next = True
        await stream.send(Audio(noise(3)))
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(EngineFailed, match="device-side assert"):
                await waiting
        stream.close()


async def test_a_step_that_hangs_is_noticed() -> None:
    async with engine(hang=1.0) as started:
        stream = started.open()
        started.fake.hang_next = True
        await stream.send(Audio(noise(3)))
        async with asyncio.timeout(DEADLINE):
            failure = await started.wait_failed()
        assert "has not come back for 1 s" in str(failure)
        assert started.fake.is_hanging, "not just slow"
        assert (await rest(stream))[-1] == Error(str(failure), 1011)
        stream.close()
        assert not started.ready


@pytest.mark.parametrize("output", ["rows", "shape"])
async def test_a_backend_that_answers_wrongly_fails_the_engine(output: str) -> None:
    class Wrong(PseudoModel):
        wrong = False

        def step(self, *args: object) -> object:
            out = super().step(*args)  # type: ignore[arg-type]
            if not self.wrong:
                return out
            return out._replace(text_token=out.text_token[:-1]) if output == "rows" else None

    async with engine(Wrong) as started:
        stream = started.open()
        started.fake.wrong = True  # type: ignore[attr-defined]
        await stream.send(Audio(noise(1)))
        assert (await rest(stream))[-1].close_code == 1011
        stream.close()


async def test_a_model_that_cannot_be_loaded() -> None:
    def missing() -> LoadedModel:
        raise CheckpointError("model.safetensors: tensor text_emb.weight is missing")

    failing = BatchEngine(missing)
    with pytest.raises(CheckpointError, match="text_emb"):
        await failing.start()
    assert not failing.ready
    await failing.stop()


async def test_a_model_that_does_not_fit_the_device() -> None:
    def too_big() -> LoadedModel:
        raise MemoryError("CUDA out of memory")

    failing = BatchEngine(too_big)
    with pytest.raises(EngineError, match=r"could not be started: MemoryError: CUDA out of memory"):
        await failing.start()
    await failing.stop()


async def test_a_backend_without_a_spare_slot() -> None:
    backend = Scripted(4, [])
    info = EngineInfo("batched_asr", "x", "", (), "none", "f32", 4)
    failing = BatchEngine(lambda: LoadedModel(backend, partial(WordAssembler, str, 6), info, 4, 6))
    with pytest.raises(EngineError, match="1 more are needed"):
        await failing.start()
    await failing.stop()
    assert backend.closed


async def test_a_model_that_fails_while_it_warms_up_is_freed() -> None:
    class Cold(PseudoModel):
        def warm_up(self) -> None:
            super().warm_up()
            raise RuntimeError("no kernel image is available")

    backend = Cold(5)
    info = EngineInfo("batched_asr", "x", "", (), "none", "f32", 4)
    failing = BatchEngine(lambda: LoadedModel(backend, partial(WordAssembler, str, 6), info, 4, 6))
    with pytest.raises(EngineError, match="no kernel image"):
        await failing.start()
    await failing.stop()
    assert backend.closed


async def test_stop_ends_every_stream_and_frees_the_model() -> None:
    async with engine() as started:
        stream = started.open()
        await stream.send(Audio(noise(3)))
    assert (await rest(stream))[-1] == Error("the server is shutting down", 1001)
    stream.close()
    assert started.fake.closed
    await started.stop()
    with pytest.raises(EngineError, match="shutting down"):
        started.open()


async def test_closing_at_any_moment() -> None:
    """Streams that leave while they are stepped, forked, full or finished: the engine goes on, every slot comes back."""
    async with engine(streams=3, marker_wait=0.001) as started:
        started.fake.step_seconds = 0.002
        plain = await transcribe(started, noise(9))

        async def leave(after: float, kind: int) -> None:
            stream = await started.open_when_free(20)
            await stream.send(Audio(noise(9)))
            if kind == 1:
                await stream.send(Mark(1))
            elif kind == 2:
                await stream.send(Finish())
            elif kind == 3:
                await stream.send(Reset())
            await asyncio.sleep(after)
            stream.close()

        await asyncio.gather(*(leave(ms / 1000, ms % 4) for ms in range(60)))
        assert started.used_slots == 0
        again = await transcribe(started, noise(9))
        assert len(again) == len(plain)
        assert started.failure is None


async def test_a_writer_that_waits_is_woken_by_the_failure() -> None:
    async with engine() as started:
        stream = started.open()
        started.fake.raise_next = True
        async with asyncio.timeout(DEADLINE):
            await stream.send(Audio(noise(2_000)))
        assert (await rest(stream))[-1].close_code == 1011
        stream.close()
