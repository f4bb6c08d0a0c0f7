"""The self-test passes a model that works and fails one that does not, and says which part."""

import argparse
import asyncio

import numpy as np
import pytest
from tests.support.scripted_engine import ScriptedEngine

from moshi_stt.audio.decode import read_file
from moshi_stt.cli import main
from moshi_stt.cli.selftest import add_parser, publishes_words
from moshi_stt.config import KyutaiModule
from moshi_stt.config_load import load_config
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.data import data_file
from moshi_stt.selftest import RECORDINGS, Check, check_engine, letters, passed
from moshi_stt.text.word_errors import word_errors


def test_the_embedded_model_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert "PASS  English: 14 of 14 words right" in out
    assert "-     French: this model does not know the language" in out
    block = out.partition("----- to paste into a report -----\n")[2]
    assert block.startswith("moshi-stt ")
    assert "Python" in block
    assert "\nPASS\n----- end -----\n" in block


def test_a_model_that_says_something_else_fails() -> None:
    """The scripted engine answers with words of its own."""

    async def check(judge: bool) -> list[Check]:
        engine = ScriptedEngine()
        await engine.start()
        try:
            return await check_engine(engine, judge)
        finally:
            await engine.stop()

    judged = asyncio.run(check(True))
    assert not passed(judged)
    failed = [check for check in judged if check.passed is False]
    assert all("words right; heard: " in check.text and "expected: " in check.text for check in failed)
    assert passed(asyncio.run(check(False)))


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording.language)
def test_the_recordings_hold_what_their_times_say(recording: object) -> None:
    """Speech lies between the first word's start and the last one's end, and next to none before and after."""
    (found,) = [each for each in RECORDINGS if each is recording]
    pcm = read_file(data_file(found.file))
    assert 3 < len(pcm) / SAMPLE_RATE < 8
    inside = pcm[int(found.first * SAMPLE_RATE) : int(found.last * SAMPLE_RATE)]
    outside = np.concatenate([pcm[: int(found.first * SAMPLE_RATE)], pcm[int(found.last * SAMPLE_RATE) :]])
    assert np.square(inside).mean() > 10 * np.square(outside).mean()


def test_words_are_compared_without_case_accents_and_punctuation() -> None:
    assert letters("Où l'Été, cold-hearted!") == ["ou", "l", "ete", "cold", "hearted"]
    assert word_errors(["a", "b", "c"], ["a", "b", "c"]) == 0
    assert word_errors(["a", "b", "c"], ["a", "x", "c", "d"]) == 2
    assert word_errors(["a", "b"], []) == 2


def test_only_published_weights_are_known_to_understand() -> None:
    (published,) = load_config("stt-1b-en_fr").config.modules
    assert publishes_words(published)
    import msgspec

    assert isinstance(published, KyutaiModule)
    assert not publishes_words(msgspec.structs.replace(published, lm_model_file="hf://somebody/a-model/model.safetensors"))
    assert not publishes_words(msgspec.structs.replace(published, lm_model_file="/models/mine.safetensors"))


def test_model_and_config_mean_the_same() -> None:
    parser = add_parser(argparse.ArgumentParser().add_subparsers())
    assert parser.parse_args(["--model", "x"]).config == parser.parse_args(["--config", "x"]).config == "x"
