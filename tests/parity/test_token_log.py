"""Token logs of real models, against those of moshi-server itself for the same sound: `tokens.npz`."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tests.support.checkpoints import Checkpoint
from tests.support.frameworks import FRAMEWORKS, loader

from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import parse_config
from moshi_stt.constants import FRAME_SAMPLES
from moshi_stt.engine.batch import BatchEngine
from moshi_stt.engine.commands import Audio, Finish
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.engine.loaded import LoadedModel
from moshi_stt.engine.slots import spare_slots
from moshi_stt.models.spec_tables import spec_from_module
from moshi_stt.models.token_log import TokenLog
from moshi_stt.text.words import WordAssembler

STREAMS = 4


class Recorder:
    """Keeps the last step."""

    def start(self) -> None: ...

    def record(
        self, slots: NDArray[np.int64], fresh: NDArray[np.bool_], text: NDArray[np.int64], codes: NDArray[np.int64]
    ) -> None:
        self.last = slots.copy(), fresh.copy(), text.copy(), codes.copy()

    def stop(self) -> None: ...


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_recorder_hears_what_the_state_is(framework: str, fixed_shapes: bool, small: Checkpoint) -> None:
    """Each row's own token and codes, whatever rows a step is padded or split to; and recording changes nothing."""
    settings: dict[str, object] = {"engine_fixed_shapes": fixed_shapes}
    backend, plain = (loader(framework)(small.lm_file, small.mimi_file, small.spec, 4, settings=settings) for _ in range(2))
    recorder = Recorder()
    backend.record_to(recorder)
    backend.warm_up()
    rng = np.random.default_rng(0)
    for n in range(12):
        slots = rng.permutation(4)[: 1 + n % 4]
        pcm = rng.standard_normal((len(slots), FRAME_SAMPLES)).astype(np.float32) * 0.3
        fresh = np.full(len(slots), n < 4)
        output = backend.step(pcm, slots, fresh)
        for ours, theirs in zip(output, plain.step(pcm, slots, fresh), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for ours, given in zip(recorder.last, (slots, fresh, output.text_token), strict=False):
            np.testing.assert_array_equal(ours, given)
        np.testing.assert_array_equal(recorder.last[3], np.asarray(backend.state.codes)[slots])
    backend.close()
    plain.close()


async def test_the_log_is_moshi_servers(tiny: Path, shared: Path, speech: NDArray[np.float32], tmp_path: Path) -> None:
    """Every token and code of 200 steps, through the engine, on moshi-server's own start of the downsampling (F13)."""
    with np.load(shared / "goldens/recorded/tokens.npz") as recorded:
        audio, text = recorded["tiny_batched_audio_in"], recorded["tiny_batched_text_in"]
    configured = parse_config((tiny / "moshi-server.toml").read_text(), "tiny").config.modules[0]
    assert isinstance(configured, KyutaiModule)
    spec = spec_from_module(configured)
    log = TokenLog(tmp_path / "golden-asr-1-2", spec.lm, STREAMS, 3_600.0)

    def load() -> LoadedModel:
        from moshi_stt.models.torch_impl.build import load_backend

        files = Path(configured.lm_model_file), Path(configured.audio_tokenizer_file)
        backend = load_backend(configured, *files, spec, STREAMS + spare_slots(STREAMS), device="cpu", zero_start=True)
        backend.record_to(log)
        info = EngineInfo("batched_asr", "tiny", "", (), "cpu", "f32", STREAMS)
        return LoadedModel(backend, partial(WordAssembler, str, 6), info, STREAMS, 6, recorder=log)

    engine = BatchEngine(load)
    await engine.start()
    stream = engine.open(live=False)
    await stream.send(Audio(np.concatenate([speech, np.zeros(len(text) * FRAME_SAMPLES - len(speech), np.float32)])))
    await stream.send(Finish())
    async for _ in stream:
        pass
    stream.close()
    await engine.stop()
    file = load_file(tmp_path / "golden-asr-1-2.0.safetensors")
    assert file["text"].shape[0] == file["audio"].shape[0] == STREAMS
    slot = file["audio"].any(axis=(1, 2)).argmax()
    np.testing.assert_array_equal(file["text"][slot, : len(text)], text)
    np.testing.assert_array_equal(file["audio"][slot, :, : len(text)].T, audio)
    others = np.delete(file["audio"], slot, axis=0)
    assert not others.any()
