"""deploy/: the dashboard and the alerts name the server's metrics, and the container files what is in the checkout."""

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moshi_stt.cli.cluster import add_parser as add_cluster_parser
from moshi_stt.cli.worker import add_parser
from moshi_stt.engine.engine import Engine
from moshi_stt.server.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
NAME = r"\b(?:asr|moshi_stt)_[a-z_]+"
LABEL = r"[{,(] *([a-z_]+) *(?:=~|!=|=)"
PROMETHEUS_LABELS = {"instance", "job", "le"}


def metrics() -> dict[str, set[str]]:
    """Every sample's name as Prometheus stores it, with its labels."""
    scraped = Metrics()
    for counter, labels in (
        (scraped.refusals, ["x"]),
        (scraped.errors, ["x"]),
        (scraped.uploads, ["x"]),
        (scraped.resumed, ["x"]),
        (scraped.ignored_options, ["x", "y"]),
    ):
        counter.labels(*labels)
    scraped.watch(lambda: [("asr", ReadyEngine())])  # type: ignore[arg-type]
    found: dict[str, set[str]] = {}
    for line in scraped.render().decode().splitlines():
        if not line.startswith("#"):
            name, labels_text = re.match(r"([a-z_0-9]+)(?:\{(.*)\})? ", line).groups()  # type: ignore[union-attr]
            found.setdefault(name, set()).update(re.findall(r'([a-z_]+)="', labels_text or ""))
    return found


class ReadyEngine:
    """What the metrics read of an engine."""

    ready, waiting, used_slots, total_slots, queued_samples = True, 0, 0, 1, 0


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the PromQL."""
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"grafana: {panel['title']}", target["expr"]
    for rule in rules():
        yield f"alert: {rule['alert']}", rule["expr"]


def rules() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def test_every_expression_names_metrics_and_labels_that_there_are() -> None:
    known = metrics()
    assert {"moshi_stt_lag_seconds_bucket", "asr_connect", "moshi_stt_refused", "moshi_stt_ready"} <= set(known)
    seen = 0
    for place, expression in expressions():
        names = re.findall(NAME, expression)
        assert names, f"{place} names no metric"
        for name in names:
            assert name in known, f"{place}: the server has no metric {name}"
        labels = {label for name in names for label in known[name]} | PROMETHEUS_LABELS
        grouped = [label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")]
        for label in [*grouped, *re.findall(LABEL, expression)]:
            assert label in labels, f"{place}: {', '.join(names)} has no label {label}"
        seen += 1
    assert seen >= 20


def test_the_engine_stub_has_what_engines_have() -> None:
    for name in ("ready", "used_slots", "total_slots", "queued_samples"):
        assert hasattr(Engine, name)


def test_what_the_image_copies_is_there_and_let_through() -> None:
    let_through = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    copied = [source for line in re.findall(r"^COPY (.+)$", CONTAINERFILE, re.MULTILINE) for source in line.split()[:-1]]
    assert len(copied) >= 5
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in let_through, source


def test_the_image_starts_the_worker_with_flags_that_it_has() -> None:
    (entry,) = re.findall(r"^ENTRYPOINT (\[.+\])$", CONTAINERFILE, re.MULTILINE)
    command = json.loads(re.findall(r"^CMD (\[.+\])$", CONTAINERFILE, re.MULTILINE)[-1])
    assert json.loads(entry) == ["moshi-stt"]
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(command)
    assert (args.addr, args.port) == ("0.0.0.0", 8080)
    (check,) = re.findall(r"^HEALTHCHECK .* CMD (.+)$", CONTAINERFILE, re.MULTILINE)
    assert f":{args.port}/health" in shlex.split(check)[-1]


def test_the_compose_file_builds_this_image() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["moshi-stt"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Containerfile"
    assert service["ports"] == ["127.0.0.1:8080:8080"]
    assert f"VOLUME {service['volumes'][0].partition(':')[2]}\n" in CONTAINERFILE


def test_the_kuberay_manifest_runs_commands_that_there_are() -> None:
    """Its schema is KubeRay's own; that of our part is checked here."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    ray_cluster, service = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    pod = ray_cluster["spec"]["headGroupSpec"]["template"]["spec"]
    (head,) = pod["containers"]
    script = head["lifecycle"]["postStart"]["exec"]["command"][-1]
    (up,) = re.findall(r"moshi-stt (cluster up [^)]+)\)", script)
    parser = argparse.ArgumentParser()
    add_cluster_parser(parser.add_subparsers())
    started = parser.parse_args(shlex.split(up))
    ended = parser.parse_args(head["lifecycle"]["preStop"]["exec"]["command"][1:])
    assert started.address == ended.address
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert (started.addr, started.port) == ("0.0.0.0", ports[service["spec"]["ports"][0]["targetPort"]])
    (worker,) = ray_cluster["spec"]["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == started.gpus_per_replica
    assert worker["maxReplicas"] == started.max
    mounted = {mount["mountPath"] for each in (head, container) for mount in each["volumeMounts"]}
    assert mounted == {str(Path(started.config).parent)}
    assert service["spec"]["selector"] == {"ray.io/cluster": ray_cluster["metadata"]["name"], "ray.io/node-type": "head"}
