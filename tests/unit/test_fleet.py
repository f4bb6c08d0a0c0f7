"""Several members' metrics and modules as one document, and the places that tokens name."""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.scripted_engine import ScriptedEngine

from moshi_stt.errors import ConfigError
from moshi_stt.server.fleet import merge_metrics, merge_modules
from moshi_stt.server.metrics import Metrics
from moshi_stt.server.resume import Place, new_token, place_of, replica_name

FIRST = """\
# HELP asr_connect Number of connections.
# TYPE asr_connect counter
asr_connect{handler="all"} 3
# HELP steps Seconds of a step.
# TYPE steps histogram
steps_bucket{le="0.02"} 1
steps_bucket{le="+Inf"} 2
steps_sum 0.5
steps_count 2
"""


def test_every_series_gets_the_label_and_families_stay_together() -> None:
    second = FIRST.replace(" 3\n", " 4\n") + '# TYPE odd gauge\nodd{text="a \\"} b=\\"c"} 1 1700000000\n'
    merged = merge_metrics({"cuda:0": FIRST, "cuda:1": second}, "device", own="# TYPE refused counter\nrefused 1\n")
    assert merged == (
        "# HELP asr_connect Number of connections.\n"
        "# TYPE asr_connect counter\n"
        'asr_connect{device="cuda:0",handler="all"} 3\n'
        'asr_connect{device="cuda:1",handler="all"} 4\n'
        '# TYPE odd gauge\nodd{device="cuda:1",text="a \\"} b=\\"c"} 1 1700000000\n'
        "# TYPE refused counter\nrefused 1\n"
        "# HELP steps Seconds of a step.\n"
        "# TYPE steps histogram\n"
        + "".join(
            f'steps_bucket{{device="{name}",le="0.02"}} 1\nsteps_bucket{{device="{name}",le="+Inf"}} 2\n'
            f'steps_sum{{device="{name}"}} 0.5\nsteps_count{{device="{name}"}} 2\n'
            for name in ("cuda:0", "cuda:1")
        )
    )


def test_labels_nest_and_values_are_escaped() -> None:
    inner = merge_metrics({"cuda:0": FIRST}, "device")
    outer = merge_metrics({'a"b\\': inner}, "replica")
    assert 'asr_connect{replica="a\\"b\\\\",device="cuda:0",handler="all"} 3' in outer
    assert merge_metrics({"x": outer}, "replica") == outer  # it says already whose it is


def test_own_families_that_members_answer_for_are_left_out() -> None:
    merged = merge_metrics({"r1": FIRST}, "replica", own=FIRST, leave_out=["steps"])
    assert 'asr_connect{handler="all"} 3' in merged
    assert 'steps_sum{replica="r1"} 0.5' in merged
    assert "\nsteps_sum 0.5" not in merged


def test_what_a_real_server_says_is_read_by_prometheus() -> None:
    """The values of all members are there, once each."""
    texts = {}
    for i in range(3):
        metrics = Metrics()
        engine = ScriptedEngine(slots=4, observer=metrics)
        metrics.watch(lambda engine=engine: [("asr", engine)])  # type: ignore[misc]
        for _ in range(i + 1):
            metrics.stepped(0.05, 7)
            metrics.refused()
        texts[f"r{i}"] = metrics.render().decode()
    families = {each.name: each for each in text_string_to_metric_families(merge_metrics(texts, "replica"))}
    counts = {s.labels["replica"]: s.value for s in families["moshi_stt_step_rows"].samples if s.name.endswith("_count")}
    assert counts == {"r0": 1, "r1": 2, "r2": 3}
    refused = {(s.labels["replica"], s.labels["reason"]): s.value for s in families["moshi_stt_refused"].samples}
    assert refused == {("r0", "no_free_slot"): 1, ("r1", "no_free_slot"): 2, ("r2", "no_free_slot"): 3}
    assert families["asr_model_step_duration"].type == "histogram"


def test_what_is_no_exposition_is_named() -> None:
    with pytest.raises(ValueError, match="r1 sent what is no line of a Prometheus exposition: '<html>'"):
        merge_metrics({"r0": FIRST, "r1": "<html>"}, "replica")


def test_modules_of_the_same_path_are_one() -> None:
    first = {"type": "batched_asr", "path": "/api/a", "lm": "m", "used_slots": "1", "total_slots": "8", "device": "cuda:0"}
    second = {**first, "used_slots": "3", "device": "cuda:1"}
    alone = {**first, "path": "/api/b"}
    assert merge_modules([[first, alone], [second]]) == [
        {**first, "used_slots": "4", "total_slots": "16", "device": "cuda:0,cuda:1"},
        alone,
    ]


def test_a_module_that_loads_adds_nothing() -> None:
    loaded = {"type": "embedded", "path": "/api/a", "used_slots": "1", "total_slots": "8"}
    for documents in ([{"path": "/api/a"}], [loaded]), ([loaded], [{"path": "/api/a"}]):
        assert merge_modules(documents) == [loaded]
    assert merge_modules([[{"path": "/api/a"}], [{"path": "/api/a"}]]) == [{"path": "/api/a"}]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place(), "0"),
        (Place(process=12), "12"),
        (Place(device=1), "d1.0"),
        (Place("2", 1, 3), "r2.d1.3"),
        (Place("eu_west"), "reu_west.0"),
        (Place("d1"), "rd1.0"),
    ],
)
def test_a_token_names_its_place(place: Place, text: str) -> None:
    token = new_token(place)
    assert token.startswith(f"{text}-")
    assert place_of(token) == place


@pytest.mark.parametrize("text", ["", "0", "x-y", "r.0-s", "d.0-s", "d1-s", "d1.r2.0-s", "r2.d1-s", "-s", "999999-s", "0.1-s"])
def test_what_is_no_token_names_none(text: str) -> None:
    assert place_of(text) is None


def test_the_replica_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOSHI_STT_REPLICA", raising=False)
    assert replica_name() is None
    monkeypatch.setenv("MOSHI_STT_REPLICA", "gpu_7")
    assert replica_name() == "gpu_7"
    monkeypatch.setenv("MOSHI_STT_REPLICA", "gpu.7")
    with pytest.raises(ConfigError, match=r"MOSHI_STT_REPLICA='gpu\.7': expected .* letters, digits or underscores"):
        replica_name()
