"""The sessions of other protocols, driven without a server: order of messages, no word twice, errors in their own shape."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.door_driver import Driver, Said, pcm16, speech

from moshi_stt.audio.live import PcmFormat
from moshi_stt.engine.engine import EngineInfo
from moshi_stt.events import Error
from moshi_stt.server.doors.deepgram_flux import FluxOptions, FluxSession
from moshi_stt.server.doors.deepgram_live import DeepgramSession
from moshi_stt.server.doors.deepgram_options import DeepgramOptions, parse
from moshi_stt.server.doors.door import Handshake, Refused
from moshi_stt.server.doors.gradium_session import GradiumSession
from moshi_stt.server.doors.openai_realtime import RealtimeSession
from moshi_stt.server.doors.prefix import PrefixedSession
from moshi_stt.server.doors.wyoming_session import WyomingOptions, WyomingSession
from moshi_stt.text.word_lists import NO_LISTS, WordLists

MODULES = {"asr": EngineInfo("embedded", "tiny", "", ("en",), "cpu", "f32", 4)}
TWO_TURNS = speech("Hello there, friend.", "How are you?")
TEXT = "Hello there, friend. How are you?"


# ---- OpenAI Realtime -----------------------------------------------------------------------------------------------------


def realtime(words: list[Said] = TWO_TURNS, *, vad: object = None, **options: object) -> Driver:
    driver = Driver(RealtimeSession("whisper-1", MODULES, **options), words)  # type: ignore[arg-type]
    given_format = {"type": "audio/pcm", "rate": 16_000}
    driver.text(
        type="session.update",
        session={"type": "transcription", "audio": {"input": {"format": given_format, "turn_detection": vad}}},
    )
    return driver


def append(driver: Driver, seconds: float, rate: int = 16_000) -> None:
    driver.text(type="input_audio_buffer.append", audio=base64.b64encode(pcm16(seconds, rate)).decode())


DELTA = "conversation.item.input_audio_transcription.delta"
COMPLETED = "conversation.item.input_audio_transcription.completed"


def test_realtime_manual_commit_in_order() -> None:
    driver = realtime()
    append(driver, 6.0)
    driver.text(type="input_audio_buffer.commit")
    kinds = [message["type"] for message in driver.messages if message["type"] != DELTA]
    assert kinds == [
        "session.created", "session.updated", "input_audio_buffer.committed", "conversation.item.added",
        "conversation.item.done", COMPLETED,
    ]  # fmt: skip
    assert driver.of(COMPLETED)[0]["transcript"] == TEXT == "".join(delta["delta"] for delta in driver.of(DELTA))
    assert len({message["event_id"] for message in driver.messages}) == len(driver.messages)
    assert {m["item_id"] for m in driver.of(DELTA)} == {driver.of(COMPLETED)[0]["item_id"]}


def test_realtime_server_vad_makes_a_turn_of_each_group() -> None:
    driver = realtime(vad={"type": "server_vad", "silence_duration_ms": 500})
    for _ in range(60):
        append(driver, 0.1)
    assert [message["transcript"] for message in driver.of(COMPLETED)] == ["Hello there, friend.", "How are you?"]
    started, stopped = driver.of("input_audio_buffer.speech_started"), driver.of("input_audio_buffer.speech_stopped")
    assert [message["audio_start_ms"] for message in started] == [100, 2180]  # 0.4 s and 2.48 s, less 300 ms
    assert len(stopped) == 2
    ids = [message["item_id"] for message in driver.of(COMPLETED)]
    assert [message["item_id"] for message in started] == ids
    assert [message["previous_item_id"] for message in driver.of("input_audio_buffer.committed")] == [None, ids[0]]


def test_realtime_commit_of_nothing_names_the_clients_event() -> None:
    driver = realtime()
    driver.text(type="input_audio_buffer.commit", event_id="mine")
    (error,) = driver.of("error")
    assert error["error"]["code"] == "input_audio_buffer_commit_empty"
    assert error["error"]["event_id"] == "mine"
    append(driver, 6.0)
    driver.text(type="input_audio_buffer.commit")
    assert driver.of(COMPLETED)[0]["transcript"] == TEXT


def test_realtime_clear_drops_what_was_not_committed_and_nothing_else() -> None:
    driver = realtime()
    append(driver, 1.8)  # the first group
    driver.text(type="input_audio_buffer.commit")
    append(driver, 0.3)
    driver.text(type="input_audio_buffer.clear")
    append(driver, 4.0)
    driver.text(type="input_audio_buffer.commit")
    assert [message["transcript"] for message in driver.of(COMPLETED)] == ["Hello there, friend.", "How are you?"]
    assert len(driver.of("input_audio_buffer.cleared")) == 1


def test_realtime_silent_commit_completes_with_no_text() -> None:
    driver = realtime([])
    append(driver, 1.0)
    driver.text(type="input_audio_buffer.commit")
    assert driver.of(COMPLETED)[0]["transcript"] == ""
    assert driver.of(COMPLETED)[0]["usage"]["type"] == "duration"


def test_realtime_asks_for_the_text_of_a_turn_when_audio_stops_coming() -> None:
    driver = realtime(speech("Hello there, friend."), vad={"type": "server_vad", "silence_duration_ms": 200})
    append(driver, 1.7)  # the turn has ended, the words of it are 0.48 s late
    assert not driver.of(COMPLETED)
    for _ in range(5):
        driver.tick(0.1)
    assert driver.of(COMPLETED)[0]["transcript"] == "Hello there, friend."


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("{", "invalid_json"),
        ("[]", "invalid_event"),
        (b"\x00", "invalid_event"),
        ('{"type":"response.create"}', "unsupported_event"),
        ('{"type":"nonsense"}', "invalid_value"),
        ('{"type":"input_audio_buffer.append","audio":"%%%"}', "invalid_value"),
        ('{"type":"session.update","session":{"audio":{"input":{"format":{"type":"audio/mp3"}}}}}', "invalid_value"),
        ('{"type":"session.update","session":{"audio":{"input":{"transcription":{"model":"nope"}}}}}', "model_not_found"),
        ('{"type":"session.update","session":{"audio":{"input":{"transcription":{"language":"de"}}}}}', "invalid_value"),
        ('{"type":"session.update","session":{"audio":{"input":{"turn_detection":{"type":"x"}}}}}', "invalid_value"),
        (
            '{"type":"session.update","session":{"audio":{"input":{"turn_detection":{"silence_duration_ms":"x"}}}}}',
            "invalid_value",
        ),
    ],
)
def test_realtime_errors_leave_the_connection_open(message: str | bytes, code: str) -> None:
    driver = realtime()
    driver.raw(message)
    assert [each["error"]["code"] for each in driver.of("error")] == [code]
    append(driver, 6.0)
    driver.text(type="input_audio_buffer.commit")
    assert driver.of(COMPLETED)[0]["transcript"] == TEXT


def test_realtime_fault_of_the_engine_fails_the_committed_items() -> None:
    driver = realtime(vad={"type": "server_vad", "silence_duration_ms": 200})
    append(driver, 1.7)
    driver.fail(Error("the model failed", 1011))
    assert (
        len(driver.of("conversation.item.input_audio_transcription.failed"))
        == len(driver.of("input_audio_buffer.committed"))
        == 1
    )
    assert driver.messages[-1]["type"] == "error"
    assert driver.closed is not None
    assert driver.closed.code == 1011


def test_realtime_beta_shape() -> None:
    driver = Driver(RealtimeSession("whisper-1", MODULES, beta=True, transcription_created=True), TWO_TURNS)
    assert driver.messages[0]["type"] == "transcription_session.created"
    driver.text(type="transcription_session.update", session={"input_audio_format": "pcm16", "turn_detection": None})
    assert driver.messages[1]["type"] == "transcription_session.updated"
    assert driver.messages[1]["session"]["input_audio_format"] == "pcm16"
    append(driver, 6.0, 24_000)
    driver.text(type="input_audio_buffer.commit")
    assert driver.of("conversation.item.created")
    assert driver.of(COMPLETED)[0]["transcript"] == TEXT


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_realtime_whatever_the_chunks_pauses_and_commits(data: st.DataObject) -> None:
    """Joined deltas are the final text; one `completed` per item, in order; every word that was not cleared comes once."""
    groups = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    names = iter(range(1_000))
    pauses = data.draw(st.sampled_from([0.16, 0.4, 0.9, 2.5]))
    words = speech(*(" ".join(f"w{next(names)}" for _ in range(count)) for count in groups), pause=pauses)
    vad = data.draw(st.sampled_from([None, {"type": "server_vad", "silence_duration_ms": 300}, {"type": "semantic_vad"}]))
    driver = realtime(words, vad=vad, lists=WordLists.parse(replace=data.draw(st.sampled_from([(), ("w1 w2:both",)]))))
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["append", "append", "append", "commit", "tick"]))
        if action == "append":
            append(driver, data.draw(st.floats(0.001, 1.5)))
        elif action == "commit":
            driver.text(type="input_audio_buffer.commit")
        else:
            driver.tick(0.4)
    append(driver, words[-1].end + 3.0)
    driver.text(type="input_audio_buffer.commit")
    completed, committed = driver.of(COMPLETED), driver.of("input_audio_buffer.committed")
    assert [message["item_id"] for message in completed] == [message["item_id"] for message in committed]
    for message in completed:
        mine = [
            each for each in driver.messages if each.get("item_id") == message["item_id"] and each["type"] in (DELTA, COMPLETED)
        ]
        assert "".join(each["delta"] for each in mine[:-1]) == message["transcript"]
        assert mine[-1] is message
    said = " ".join(message["transcript"] for message in completed if message["transcript"]).replace("both", "w1 w2")
    assert said.split() == [word.text for word in words]


# ---- Deepgram ------------------------------------------------------------------------------------------------------------

LINEAR = PcmFormat("linear16", 16_000)


def deepgram(words: list[Said] = TWO_TURNS, **options: object) -> Driver:
    options.setdefault("format", LINEAR)
    asked = DeepgramOptions("11111111-2222-4333-8444-555555555555", **options)  # type: ignore[arg-type]
    return Driver(DeepgramSession(asked), words, channels=asked.streams)


def send(driver: Driver, seconds: float, frame_bytes: int = 2) -> None:
    step = 0.05
    while seconds > 1e-9:
        driver.raw(bytes(frame_bytes * round(min(step, seconds) * 16_000)))
        seconds -= step


def finals(driver: Driver) -> list[dict[str, object]]:
    return [message for message in driver.of("Results") if message["is_final"]]


def joined(messages: list[dict[str, object]]) -> str:
    return " ".join(filter(None, (m["channel"]["alternatives"][0]["transcript"] for m in messages)))  # type: ignore[index]


def test_deepgram_finals_interims_and_ends() -> None:
    driver = deepgram(interim=True, vad_events=True, formatted=True, utterance_end=1.0)
    send(driver, 6.0)
    driver.text(type="CloseStream")
    assert joined(finals(driver)) == TEXT
    assert [m["speech_final"] for m in finals(driver)].count(True) == 2
    assert len(driver.of("SpeechStarted")) == 2
    assert [m["last_word_end"] for m in driver.of("UtteranceEnd")] == [1.28, 3.36]
    assert driver.messages[-1]["type"] == "Metadata"
    assert driver.messages[-1]["duration"] == pytest.approx(6.0, abs=0.01)
    assert driver.closed is not None
    assert driver.closed.code == 1000
    start = 0.0
    for message in finals(driver):
        assert message["start"] == pytest.approx(start, abs=0.002)
        start = message["start"] + message["duration"]  # type: ignore[operator]
    word = finals(driver)[0]["channel"]["alternatives"][0]["words"][1]  # type: ignore[index]
    assert word == {"word": "there", "start": 0.72, "end": 0.96, "confidence": 0.5, "punctuated_word": "there,"}


def test_deepgram_unformatted_text_has_no_case_and_no_punctuation() -> None:
    driver = deepgram()
    send(driver, 6.0)
    driver.text(type="CloseStream")
    assert joined(finals(driver)) == "hello there friend how are you"


def test_deepgram_finalize_is_always_answered_and_repeats_nothing() -> None:
    driver = deepgram(formatted=True)
    driver.text(type="Finalize")
    send(driver, 1.0)
    driver.text(type="Finalize")
    driver.text(type="Finalize")
    send(driver, 5.0)
    driver.text(type="Finalize")
    driver.text(type="CloseStream")
    assert sum(bool(m["from_finalize"]) for m in finals(driver)) == 4
    assert joined(finals(driver)) == TEXT


def test_deepgram_multichannel_labels_each_channel() -> None:
    driver = deepgram(format=PcmFormat("linear16", 16_000, 2), channels=2, multichannel=True, formatted=True)
    driver.streams[1].words = speech("Other side.")
    send(driver, 6.0, frame_bytes=4)
    driver.text(type="CloseStream")
    by_channel = [[m for m in finals(driver) if m["channel_index"] == [index, 2]] for index in (0, 1)]
    assert joined(by_channel[0]) == TEXT
    assert joined(by_channel[1]) == "Other side."


def test_deepgram_replaces_masks_and_searches() -> None:
    lists = WordLists.parse(profanity=True, replace=["friend:pal", "how are:who is"], search=["there"])
    driver = deepgram(speech("Hello there, friend.", "shit how are you?"), formatted=True, lists=lists)
    send(driver, 6.0)
    driver.text(type="CloseStream")
    assert joined(finals(driver)) == "Hello there, pal. s*** who is you?"
    hits = finals(driver)[0]["channel"]["search"]  # type: ignore[index]
    assert hits[0]["query"] == "there"
    assert hits[0]["hits"][0]["start"] == 0.72


def test_deepgram_unknown_text_is_an_error_and_the_connection_stays() -> None:
    driver = deepgram(formatted=True)
    driver.raw("{")
    driver.text(type="nonsense")
    driver.text(type="KeepAlive")
    driver.text(type="Configure", keyterms=["a"])
    assert len(driver.of("Error")) == 2
    assert driver.of("ConfigureFailure")[0]["code"] == "CONFIGURE_KEYTERMS_NOT_SUPPORTED"
    send(driver, 6.0)
    driver.raw(b"")
    assert joined(finals(driver)) == TEXT


def test_deepgram_closes_without_audio_or_keepalive_for_ten_seconds() -> None:
    driver = deepgram()
    driver.tick(0.1)
    driver.tick(9.0)
    driver.text(type="KeepAlive")
    driver.tick(0.5)
    driver.tick(9.9)
    assert driver.closed is None
    driver.tick(0.2)
    assert driver.closed is not None
    assert driver.closed.code == 1011
    assert driver.closed.reason.startswith("NET-0001")


def test_deepgram_audio_that_is_no_container_is_refused() -> None:
    driver = deepgram(format=None)
    driver.raw(b"nonsense that is no audio")
    assert driver.of("Error")
    assert driver.closed is not None
    assert driver.closed.code == 1008
    assert "DATA-0000" in driver.closed.reason


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=20),
    st.sampled_from([0.16, 0.5, 1.5]),
    st.booleans(),
    st.sampled_from([None, 0.08, 0.5]),
)
def test_deepgram_says_each_word_in_one_final(
    chunks: list[float], pause: float, finalize: bool, endpointing: float | None
) -> None:
    words = speech("w0 w1 w2", "w3", "w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23", pause=pause)
    driver = deepgram(words, interim=True, endpointing=endpointing, utterance_end=1.0)
    for chunk in chunks:
        driver.raw(pcm16(chunk))
        if finalize:
            driver.text(type="Finalize")
    send(driver, words[-1].end + 1.0)
    driver.text(type="CloseStream")
    assert joined(finals(driver)).split() == [word.text for word in words]
    assert sum(bool(m["from_finalize"]) for m in finals(driver)) == (len(chunks) if finalize else 0)


@pytest.mark.parametrize(
    "query",
    ["redact=pci", "callback=http://x", "encoding=linear16", "encoding=g729&sample_rate=8000", "sample_rate=7", "language=de",
     "utterance_end_ms=1000", "utterance_end_ms=10&interim_results=true",
     "endpointing=x", "channels=99", "smart_format=perhaps"],
)  # fmt: skip
def test_deepgram_refuses_what_it_cannot_do(query: str) -> None:
    pairs = tuple(tuple(pair.split("=")) for pair in query.split("&"))
    with pytest.raises(Refused) as refused:
        parse(Handshake("/v1/listen", pairs, modules=MODULES), live=True)  # type: ignore[arg-type]
    assert refused.value.status == 400
    assert set(json.loads(refused.value.body)) == {"err_code", "err_msg", "request_id"}


def test_deepgram_names_what_it_ignores() -> None:
    query = (("diarize", "true"), ("keyterm", "a"), ("numerals", "false"), ("no_delay", "true"))
    options = parse(Handshake("/v1/listen", query, modules=MODULES), live=True)
    assert options.ignored == ("diarize", "keyterm")
    driver = deepgram(ignored=options.ignored)
    driver.text(type="CloseStream")
    assert driver.messages[-1]["ignored_options"] == ["diarize", "keyterm"]


# ---- Deepgram, with turns ------------------------------------------------------------------------------------------------


def flux(words: list[Said] = TWO_TURNS, **options: object) -> Driver:
    return Driver(FluxSession(FluxOptions("11111111-2222-4333-8444-555555555555", LINEAR, **options)), words)  # type: ignore[arg-type]


def test_flux_turns() -> None:
    driver = flux()
    send(driver, 6.0)
    driver.text(type="CloseStream")
    info = driver.of("TurnInfo")
    assert driver.messages[0]["type"] == "Connected"
    assert [m["sequence_id"] for m in driver.messages] == list(range(len(driver.messages)))
    assert [(m["turn_index"], m["transcript"]) for m in info if m["event"] == "EndOfTurn"] == [
        (0, "Hello there, friend."), (1, "How are you?")]  # fmt: skip
    assert next(m["event"] for m in info if m["turn_index"] == 0) == "StartOfTurn"
    assert all(m["words"] for m in info)
    assert all(m["end_of_turn_confidence"] >= 0.7 for m in info if m["event"] == "EndOfTurn")


def test_flux_eager_end_and_its_retraction() -> None:
    driver = flux(speech("Well", "I think so.", pause=0.75), eager=0.3, eot=0.9)
    send(driver, 6.0)
    events = [m["event"] for m in driver.of("TurnInfo") if m["event"] != "Update"]
    assert events == ["StartOfTurn", "EagerEndOfTurn", "TurnResumed", "EagerEndOfTurn", "EndOfTurn"]
    assert driver.of("TurnInfo")[-1]["transcript"] == "Well I think so."


def test_flux_configure_and_force() -> None:
    driver = flux()
    driver.text(type="Configure", thresholds={"eot_threshold": 0.8})
    assert driver.messages[-1]["thresholds"] == {"eot_threshold": 0.8, "eot_timeout_ms": 5000}
    driver.text(type="Configure", thresholds={"eot_threshold": 7})
    assert driver.messages[-1]["type"] == "ConfigureFailure"
    send(driver, 1.5)
    driver.text(type="ForceEndTurn")
    assert driver.messages[-1]["event"] == "EndOfTurn"
    driver.text(type="nonsense")
    assert driver.messages[-1]["type"] == "Error"
    assert driver.closed is not None
    assert driver.closed.code == 1008


# ---- Gradium -------------------------------------------------------------------------------------------------------------


def gradium(words: list[Said] = TWO_TURNS) -> Driver:
    return Driver(GradiumSession(MODULES, delay_frames=6, lists=NO_LISTS), words)


def say_pcm(driver: Driver, seconds: float, rate: int = 24_000) -> None:
    for start in np.arange(0, seconds, 0.08):
        driver.text(type="audio", audio=base64.b64encode(pcm16(min(0.08, seconds - start), rate)).decode())


def test_gradium_steps_words_flush_and_end() -> None:
    driver = gradium()
    driver.text(type="setup", input_format="pcm", json_config="{}")
    assert driver.messages[0]["type"] == "ready"
    say_pcm(driver, 4.0)
    driver.text(type="flush", flush_id="1")
    driver.text(type="flush", flush_id=2)
    driver.text(type="end_of_stream")
    assert " ".join(m["text"] for m in driver.of("text")) == TEXT
    assert [m["flush_id"] for m in driver.of("flushed")] == ["1", 2]
    assert [m["step_idx"] for m in driver.of("step")] == list(range(50))
    assert [v["horizon_s"] for v in driver.of("step")[0]["vad"]] == [0.5, 1.0, 2.0, 3.0]
    assert driver.of("step")[0]["vad"][2]["inactivity_prob"] == 1.0  # nobody has spoken yet
    assert driver.messages[-1] == {"type": "end_of_stream"}
    assert driver.closed is not None
    assert driver.closed.code == 1000
    latest = 0.0
    for message in driver.messages:  # a step at T waits for the words that start before T - 6 frames
        if message["type"] == "step":
            latest = message["total_duration_s"]
        elif message["type"] == "text":
            assert message["start_s"] >= latest - 6 * 0.08 - 0.081


def test_gradium_stays_open_for_another_request() -> None:
    driver = gradium()
    for _ in range(2):
        driver.text(type="setup", input_format="pcm_16000", close_ws_on_eos=False, client_req_id="a")
        say_pcm(driver, 5.0, 16_000)
        driver.text(type="end_of_stream", client_req_id="a")
    assert [m["type"] for m in driver.messages].count("end_of_stream") == 2
    assert " ".join(m["text"] for m in driver.of("text")) == f"{TEXT} {TEXT}"
    assert {m["client_req_id"] for m in driver.messages} == {"a"}
    assert driver.of("text")[6]["start_s"] == driver.of("text")[0]["start_s"]
    driver.text(type="end_of_stream")
    assert driver.closed is not None
    assert driver.closed.code == 1000


@pytest.mark.parametrize(
    "messages",
    [
        ['{"type":"audio","audio":""}'],
        ['{"type":"nonsense"}'],
        ["{"],
        [b"\x00"],
        ['{"type":"setup","input_format":"mp3"}'],
        ['{"type":"setup","json_config":{"language":"de"}}'],
        ['{"type":"setup","json_config":"{"}'],
        ['{"type":"setup","input_format":"pcm"}', '{"type":"audio","audio":"%"}'],
        ['{"type":"setup","input_format":"wav"}', '{"type":"audio","audio":"aGVsbG8gdGhlcmU="}'],
        ['{"type":"setup"}', '{"type":"setup"}'],
    ],
)
def test_gradium_errors_are_terminal(messages: list[str | bytes]) -> None:
    driver = gradium()
    for message in messages:
        driver.raw(message)
    assert driver.messages[-1]["type"] == "error"
    assert driver.messages[-1]["code"] == 1008
    assert driver.closed is not None
    assert driver.closed.code == 1008


# ---- silence in front ----------------------------------------------------------------------------------------------------


def test_the_silence_that_a_model_needs_is_not_in_the_times() -> None:
    moved = [Said(word.text, word.start + 1.0, word.end + 1.0) for word in TWO_TURNS]
    asked = DeepgramOptions("11111111-2222-4333-8444-555555555555", format=LINEAR, formatted=True)
    with_silence = Driver(PrefixedSession(DeepgramSession(asked), 1.0), moved)
    send(with_silence, 6.0)
    with_silence.text(type="CloseStream")
    usual = deepgram(formatted=True)
    send(usual, 6.0)
    usual.text(type="CloseStream")
    assert [m["channel"] for m in with_silence.of("Results")] == [m["channel"] for m in usual.of("Results")]
    assert with_silence.messages[-1]["duration"] == usual.messages[-1]["duration"]


# ---- Wyoming -------------------------------------------------------------------------------------------------------------


def event(kind: str, payload: bytes = b"", **data: object) -> bytes:
    return json.dumps({"type": kind, "data": data}).encode() + b"\n" + payload


def wyoming(words: list[Said] = TWO_TURNS, *, endpointing: bool = False) -> Driver:
    return Driver(WyomingSession(WyomingOptions(MODULES, NO_LISTS, endpointing)), words)


def test_wyoming_describe_ping_and_an_utterance() -> None:
    driver = wyoming()
    driver.raw(event("describe"))
    (program,) = driver.of("info")[0]["data"]["asr"]
    assert program["models"][0]["languages"] == ["en"]
    assert program["requires_external_vad"] is True
    driver.raw(event("ping", text="x"))
    assert driver.of("pong")[0]["data"] == {"text": "x"}
    driver.raw(event("transcribe", language="en-GB", context={"a": 1}))
    driver.raw(event("audio-start", rate=16_000, width=2, channels=1))
    for _ in range(60):
        driver.raw(event("audio-chunk", pcm16(0.1), rate=16_000, width=2, channels=1))
    driver.raw(event("what-is-this"))
    driver.raw(event("audio-stop"))
    assert "".join(m["data"]["text"] for m in driver.of("transcript-chunk")) == TEXT
    assert [m["type"] for m in driver.messages][-2:] == ["transcript", "transcript-stop"]
    assert driver.of("transcript")[0]["data"] == {"text": TEXT, "language": "en", "context": {"a": 1}}


def test_wyoming_ends_the_command_itself_where_configured() -> None:
    driver = wyoming(endpointing=True)
    driver.raw(event("audio-start", rate=16_000, width=2, channels=1))
    for _ in range(40):
        driver.raw(event("audio-chunk", pcm16(0.1), rate=16_000, width=2, channels=1))
        driver.tick(0.1)
        if driver.closed is not None:
            break
    assert driver.of("transcript")[0]["data"]["text"] == "Hello there, friend."


def test_wyoming_bad_audio_is_an_error() -> None:
    driver = wyoming()
    driver.raw(event("audio-chunk", b"abc", rate=16_000, width=3, channels=1))
    assert driver.of("error")[0]["data"]["text"].startswith("width 3")
    assert driver.closed is not None
