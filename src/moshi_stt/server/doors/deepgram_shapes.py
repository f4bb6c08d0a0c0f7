"""Deepgram's JSON objects from our words."""

import datetime
import uuid
from collections.abc import Sequence
from typing import Any, Final

from moshi_stt import __version__
from moshi_stt.server.doors.deepgram_options import DeepgramOptions
from moshi_stt.server.doors.heard import confidence, mean_confidence
from moshi_stt.text.subtitles import TimedWord, join_words
from moshi_stt.text.word_lists import plain

MODEL_ID: Final = str(uuid.uuid5(uuid.NAMESPACE_URL, f"moshi-stt/{__version__}"))


def seconds(value: float) -> float:
    return round(value, 3)


def word_object(word: TimedWord, formatted: bool) -> dict[str, Any]:
    start = seconds(word.start)
    shown: dict[str, Any] = {
        "word": plain(word.text) or word.text,
        "start": start,
        "end": seconds(max(word.end, start + 0.001)),
        "confidence": round(confidence(word), 4),
    }
    if formatted:
        shown["punctuated_word"] = word.text
    return shown


def transcript_of(words: Sequence[TimedWord], formatted: bool) -> str:
    return join_words(words) if formatted else " ".join(plain(word.text) or word.text for word in words)


def alternative(words: Sequence[TimedWord], options: DeepgramOptions) -> dict[str, Any]:
    return {
        "transcript": transcript_of(words, options.formatted),
        "confidence": mean_confidence(list(words)),
        "words": [word_object(word, options.formatted) for word in words],
    }


def channel_object(words: Sequence[TimedWord], options: DeepgramOptions) -> dict[str, Any]:
    """The words, with the places of searched terms."""
    channel: dict[str, Any] = {"alternatives": [alternative(words, options)]}
    if options.lists.search:
        channel["search"] = [
            {
                "query": term,
                "hits": [
                    {"confidence": 1.0, "start": seconds(hit.start), "end": seconds(hit.end), "snippet": hit.snippet}
                    for hit in hits
                ],
            }
            for term, hits in options.lists.find(words)
        ]
    return channel


def model_info(options: DeepgramOptions) -> dict[str, str]:
    return {"name": options.model, "version": __version__, "arch": "moshi-stt"}


def metadata(options: DeepgramOptions, sha256: str, duration: float) -> dict[str, Any]:
    """What is said once of a whole request. `ignored_options` is ours: options that were taken and did nothing."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    shown: dict[str, Any] = {
        "transaction_key": "deprecated",
        "request_id": options.request_id,
        "sha256": sha256,
        "created": now,
        "duration": seconds(duration),
        "channels": options.channels,
        "models": [MODEL_ID],
        "model_info": {MODEL_ID: model_info(options)},
    }
    if options.ignored:
        shown["ignored_options"] = list(options.ignored)
    return shown


def utterances(words: Sequence[TimedWord], options: DeepgramOptions, channel: int = 0) -> list[dict[str, Any]]:
    """The words cut where nobody speaks for `utt_split`."""
    groups: list[list[TimedWord]] = []
    for word in words:
        if not groups or word.start - groups[-1][-1].end >= options.utt_split:
            groups.append([])
        groups[-1].append(word)
    return [
        {
            "start": seconds(group[0].start),
            "end": seconds(group[-1].end),
            "confidence": mean_confidence(group),
            "channel": channel,
            "transcript": transcript_of(group, options.formatted),
            "words": [word_object(word, options.formatted) for word in group],
            "id": str(uuid.uuid4()),
        }
        for group in groups
    ]
