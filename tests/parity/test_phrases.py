"""The small model that ships recognises speech, through the whole server, exactly as moshi-server does with the same weights.

`tests/data/phrases`: two recordings of synthetic voices that training never heard, and what moshi-server answered to them
(`training.compare`).
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.frameworks import need
from tests.support.serving import serving
from training.servers import Session, send

from moshi_stt.audio.decode import read_file
from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import load_config
from moshi_stt.engine.engine import Engine
from moshi_stt.engines import build_engine
from moshi_stt.text.word_errors import word_errors

FOLDER = Path(__file__).parents[1] / "data" / "phrases"
GOLDENS: dict[str, dict[str, Any]] = json.loads((FOLDER / "moshi_server.json").read_text(encoding="utf-8"))
SAID = {
    "english.flac": "a glass of water please turn on the music what is the weather tomorrow five three two zero five",
    "french.flac": "ajoute du pain à la liste appelle ma mère la musique est trop forte encore une fois tourne à gauche",
}


def engine(framework: str) -> Engine:
    need(framework)
    config = load_config("phrases").config
    (module,) = config.modules
    assert isinstance(module, KyutaiModule)
    settings = msgspec.structs.replace(module.engine, device="mlx" if framework == "mlx" else "cpu")
    return build_engine(msgspec.structs.replace(module, batch_size=6, engine=settings), config.limits)


def sound(name: str) -> NDArray[np.float32]:
    return read_file(FOLDER / name)


async def heard(engine: Engine, recordings: list[tuple[str, int]]) -> list[Session]:
    """The sessions of recordings sent at the same time, each in messages of its own number of samples."""
    async with serving(engine) as running:
        return await asyncio.gather(*(send(running.ws, sound(name), chunk=chunk) for name, chunk in recordings))


@pytest.mark.parametrize("framework", ["torch", "mlx"])
async def test_words_times_and_pauses_are_those_of_moshi_server(framework: str) -> None:
    sessions = await heard(engine(framework), [(name, 1_920) for name in SAID])
    for name, session in zip(SAID, sessions, strict=True):
        golden = GOLDENS[name]
        assert [list(word) for word in session.words] == golden["words"]
        steps = min(len(session.pauses), len(golden["pauses"]))
        assert steps > 120
        np.testing.assert_allclose(session.pauses[:steps], golden["pauses"][:steps], atol=0.02 if framework == "mlx" else 2e-3)


def test_most_of_it_was_said() -> None:
    said = [word for text in SAID.values() for word in text.split()]
    words = [text for golden in GOLDENS.values() for text, _, _ in golden["words"]]
    assert word_errors(said, words) <= 0.05 * len(said)


async def test_a_long_stream_is_heard_to_its_end() -> None:
    """Two minutes without a reset, the last half of which is beyond everything that any layer can see of the first words."""
    sounds = {name: sound(name) for name in SAID}
    names = list(SAID) * 5
    async with serving(engine("torch")) as running:
        session = await send(running.ws, np.concatenate([sounds[name] for name in names]))
    ends = np.cumsum([len(sounds[name]) / 24_000 for name in names])
    assert ends[-1] > 100
    for first, last in ((0, len(names) // 2), (len(names) // 2, len(names))):
        said = [word for name in names[first:last] for word in SAID[name].split()]
        begin = ends[first - 1] if first else 0.0
        words = [text for text, start, _ in session.words if begin <= start < ends[last - 1]]
        assert word_errors(said, words) <= 0.15 * len(said), words


@pytest.mark.parametrize("framework", ["torch", "mlx"])
async def test_chunks_slots_and_neighbours_do_not_matter(framework: str) -> None:
    """Both recordings in messages of 20 ms, 80 ms and 0.4 s, all at once, each in another slot: the same to the last bit."""
    chunks = (480, 1_920, 9_600)
    sessions = await heard(engine(framework), [(name, chunk) for name in SAID for chunk in chunks])
    for first, *others in (sessions[: len(chunks)], sessions[len(chunks) :]):
        for other in others:
            assert other.words == first.words
            if framework == "torch":
                assert other.pauses == first.pauses
            else:  # products of MLX may round a row otherwise next to others
                np.testing.assert_allclose(other.pauses, first.pauses, atol=2e-3)
