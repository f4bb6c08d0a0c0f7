"""An engine over a backend that goes on warming up while it serves."""

import threading

import pytest
from tests.support.batch import DEADLINE, engine, noise, steps_of, transcribe, without_timing
from tests.support.scripted_backend import PseudoModel


class InParts(PseudoModel):
    """So many parts are left after the first; `parts` counts those done, and `done` is set behind the last."""

    LEFT = 5

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.begun = False
        self.parts = 0
        self.done = threading.Event()

    def warm_up(self) -> None:
        raise AssertionError("it warms up in parts")

    def begin_warm_up(self) -> None:
        self._check_thread()
        self.begun = True

    def go_on_warming_up(self) -> bool:
        self._check_thread()
        assert not self.done.is_set(), "it was asked again when nothing was left"
        self.parts += 1
        if self.parts == self.LEFT:
            self.done.set()
        return self.parts < self.LEFT


@pytest.mark.parametrize("busy", [False, True])
async def test_the_rest_is_done_while_streams_are_served_and_while_none_are(busy: bool) -> None:
    async with engine(InParts, 4) as started, engine(PseudoModel, 4) as plain:
        backend = started.fake
        assert isinstance(backend, InParts)
        assert backend.begun
        if busy:
            heard, expected = [await transcribe(one, noise(100)) for one in (started, plain)]
            assert without_timing(heard) == without_timing(expected)
            assert steps_of(heard) == 100
        assert await_in_thread(backend.done)
        assert backend.parts == InParts.LEFT


def await_in_thread(event: threading.Event) -> bool:
    """Wait for the model thread, which needs no event loop for this."""
    return event.wait(DEADLINE)
