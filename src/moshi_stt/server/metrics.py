"""What the server counts, as Prometheus reads it. Knows engines only by what they report; counts in any thread.

The four `asr_*` families are moshi-server's, to the byte (contract section 7.6): counters without `_total`, whole numbers
without a decimal point. prometheus_client's own text form has neither, hence `render`. Families that begin with
`moshi_stt_` are ours.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from moshi_stt import __version__
from moshi_stt.constants import SAMPLE_RATE
from moshi_stt.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4"

STEP_SECONDS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08)
CONNECTION_STEPS = (2, 25, 125, 250, 500, 750, 1125, 1500, 2250, 3000, 4500)
LAG_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.64, 1.0, 1.28, 2.0, 2.56, 5.12, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


ENGINE_FAMILIES = frozenset(
    f"moshi_stt_{name}" for name in ("info", "queued_seconds", "waiting_files", "used_slots", "total_slots", "ready")
)
"""What the engines know themselves, and is read from them at each scrape."""


class Metrics:
    """The counts of one process. Satisfies `EngineObserver`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.frames_received = 0
        """WebSocket messages read; a plain number, counted on the event loop alone."""
        self.frames_sent = 0
        self.spooled_bytes = 0
        """Bytes that wait in spools."""

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=self.registry)

        def histogram(name: str, help: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, help, buckets=tuple(buckets), registry=self.registry)

        self.connects = counter("asr_connect", "Number of connections to the asr.", "handler").labels("all")
        self.open_channels = Gauge(
            "asr_open_channels", "Number of open channels (users currently connected).", ["handler"], registry=self.registry
        ).labels("all")
        self.step_seconds = histogram("asr_model_step_duration", "ASR model step duration distribution.", STEP_SECONDS)
        self.connection_steps = histogram(
            "asr_connection_num_steps", "ASR model, distribution of number of steps for a connection.", CONNECTION_STEPS
        )
        self.lag_seconds = histogram(
            "moshi_stt_lag_seconds",
            "Seconds from the arrival of the last sample an event depends on to its delivery.",
            LAG_SECONDS,
        )
        self.step_rows = histogram("moshi_stt_step_rows", "Streams that took part in a model step.", ROWS)
        self.refusals = counter("moshi_stt_refused", "Requests turned away, by reason.", "reason")
        self.errors = counter("moshi_stt_errors", "Sessions that ended with an Error, by kind.", "kind")
        self.restarts = counter("moshi_stt_restarts", "Streams whose model had stopped transcribing and was started again.")
        self.foreign_speech = counter(
            "moshi_stt_foreign_speech", "Streams whose speech did not sound like a language of the model."
        )
        self.uploads = counter("moshi_stt_uploads", "Files received by POST, by status of the answer.", "status")
        self.parked = counter("moshi_stt_parked", "Streams that were kept after their socket was lost.")
        self.resumed = counter("moshi_stt_resumed", "Clients that came back to a stream, and whether there was one.", "found")
        self.drained = counter("moshi_stt_drained", "Connections that a shutdown ended, after what they sent was transcribed.")
        self.websockets = Gauge("moshi_stt_websockets", "Open WebSockets, with or without a slot.", registry=self.registry)
        self.ignored_options = counter(
            "moshi_stt_ignored_options", "Options of requests that were taken and did nothing.", "door", "option"
        )
        self.registry.register(_Plain(self))

    def watch(self, engines: Callable[[], Iterable[tuple[str, Engine]]]) -> None:
        """Read queue depth, slots and health of these engines, by module name, at each scrape."""
        self.registry.register(_Engines(engines))

    def ignored(self, door: str, option: str) -> None:
        """A client asked for an option that does nothing here."""
        self.ignored_options.labels(door, option).inc()

    # ---- EngineObserver: any thread ----------------------------------------------------------------------------------

    def stepped(self, seconds: float, rows: int) -> None:
        self.step_seconds.observe(seconds)
        self.step_rows.observe(rows)

    def lagged(self, seconds: float) -> None:
        self.lag_seconds.observe(seconds)

    def opened(self) -> None:
        self.open_channels.inc()

    def closed(self, steps: int) -> None:
        self.open_channels.dec()
        self.connection_steps.observe(steps)

    def refused(self) -> None:
        self.refusals.labels("no_free_slot").inc()

    def failed(self) -> None:
        self.errors.labels("stream").inc()

    def foreign(self) -> None:
        self.foreign_speech.inc()

    def restarted(self) -> None:
        self.restarts.inc()

    def families(self) -> list[Metric]:
        """What this process has counted, less what the engines know themselves. Plain values, which can be pickled."""
        return [family for family in self.registry.collect() if family.name not in ENGINE_FAMILIES]

    def render(self, others: Iterable[Metric] = (), queued_samples: Mapping[str, int] | None = None) -> bytes:
        """The text of a scrape, sorted by name.

        others: families of other processes, added to those of this one; queued_samples: theirs, by module.
        """
        families = {family.name: family for family in self.registry.collect()}
        for family in others:
            add_samples(families[family.name], family)
        for module, samples in (queued_samples or {}).items():
            family = Metric(_Engines.QUEUED, "", "gauge")
            family.add_sample(_Engines.QUEUED, {"module": module}, samples / SAMPLE_RATE)
            add_samples(families[_Engines.QUEUED], family)
        return "".join(line for name in sorted(families) for line in _lines(families[name])).encode()


class _Plain(Collector):
    """The numbers that are counted without a lock."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for name, text, value in (
            ("moshi_stt_messages_received", "WebSocket messages received.", self._metrics.frames_received),
            ("moshi_stt_messages_sent", "WebSocket messages sent.", self._metrics.frames_sent),
        ):
            family = Metric(name, text, "counter")
            family.add_sample(name + "_total", {}, value)
            yield family
        spooled = "moshi_stt_spooled_bytes"
        yield GaugeMetricFamily(spooled, "Bytes on disk that came ahead of recognition.", self._metrics.spooled_bytes)


def add_samples(family: Metric, other: Metric) -> None:
    """Add another process's samples to those of the same name and labels."""
    values = {(sample.name, tuple(sorted(sample.labels.items()))): i for i, sample in enumerate(family.samples)}
    for sample in other.samples:
        place = values.get((sample.name, tuple(sorted(sample.labels.items()))))
        if place is None:
            family.samples.append(sample)
        else:
            mine = family.samples[place]
            family.samples[place] = mine._replace(value=mine.value + sample.value)


class _Engines(Collector):
    """What the engines know themselves."""

    QUEUED = "moshi_stt_queued_seconds"

    def __init__(self, engines: Callable[[], Iterable[tuple[str, Engine]]]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("moshi_stt_info", "Always 1; the labels say what runs.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        readings: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
            (
                self.QUEUED,
                "Seconds of audio received and not yet stepped.",
                lambda e: e.queued_samples / SAMPLE_RATE,
            ),
            ("moshi_stt_waiting_files", "Files that wait for a slot.", lambda e: e.waiting),
            ("moshi_stt_used_slots", "Slots that have a stream.", lambda e: e.used_slots),
            ("moshi_stt_total_slots", "Slots there are.", lambda e: e.total_slots),
            ("moshi_stt_ready", "Whether the model is warm and not failed.", lambda e: float(e.ready)),
        )
        for name, text, read in readings:
            family = GaugeMetricFamily(name, text, labels=["module"])
            for module, engine in self._engines():
                if engine.ready or name == "moshi_stt_ready":
                    family.add_metric([module], read(engine))
            yield family


def _lines(family: Metric) -> Iterator[str]:
    text = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {family.name} {text}\n# TYPE {family.name} {family.type}\n"
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            name = sample.name.removesuffix("_total") if family.type == "counter" else sample.name
            yield f"{name}{_labels(sample)} {_number(sample.value)}\n"


def _labels(sample: Sample) -> str:
    if not sample.labels:
        return ""
    pairs = []
    for name, value in sample.labels.items():
        text = _number(float(value)) if name == "le" else value
        escaped = text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        pairs.append(f'{name}="{escaped}"')
    return "{" + ",".join(pairs) + "}"


def _number(value: float) -> str:
    """As Rust prints a float: whole numbers without a decimal point."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) else repr(value)
