"""How many cores count: the affinity, or what a container's quota leaves of it, in either version of control groups."""

from pathlib import Path
from typing import Any

import pytest

from moshi_stt import cores
from moshi_stt.config import EmbeddedModule, LimitsConfig
from moshi_stt.cores import usable_cores


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores, all of which this process may run on."""
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}
V1 = {
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/docker/abc\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}
NO_QUOTA_V1 = V1 | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}
OUTER_V2 = {
    "proc/self/cgroup": "0::/user.slice/app.scope\n",
    "sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000\n",
    "sys/fs/cgroup/user.slice/cpu.max": "350000 100000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (V2, 2),
        (V1, 2),
        ({}, 64),
        (NO_QUOTA_V1, 64),
        (OUTER_V2, 3),
        (V2 | {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        (V2 | {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (V2 | {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        (V2 | {"sys/fs/cgroup/cpu.max": "12800000 100000\n"}, 64),
        (V2 | {"sys/fs/cgroup/cpu.max": "nonsense\n"}, 64),
        (V2 | {"sys/fs/cgroup/cpu.max": "100000 0\n"}, 64),
        ({"proc/self/cgroup": "nonsense\n"}, 64),
    ],
)
def test_the_quota_of_a_container(
    host: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(cores, "ROOT", tree(tmp_path, files))
    assert usable_cores() == expected


def test_an_affinity_below_the_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {7}, raising=False)
    monkeypatch.setattr(cores, "ROOT", tree(tmp_path, V2))
    assert usable_cores() == 1


def test_without_affinity_the_machines_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows."""
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    monkeypatch.setattr(cores, "ROOT", tmp_path)
    assert usable_cores() == 10


@pytest.mark.parametrize("files", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize(("setting", "expected"), [(0, 2), (1, 1), (3, 3)])
async def test_the_embedded_model_has_a_decoder_for_each_thread(
    host: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], setting: int, expected: int
) -> None:
    """64 cores and a quota of two: two threads and two decoders, not 64, unless the configuration says another number."""
    pytest.importorskip("pocketsphinx", reason="pocketsphinx has no wheel for this version of Python")
    from moshi_stt import engines
    from moshi_stt.models import alignment

    monkeypatch.setattr(cores, "ROOT", tree(tmp_path, files))
    decoders: list[Any] = []
    make = alignment._Decoder

    def counted() -> Any:
        decoders.append(make())
        return decoders[-1]

    monkeypatch.setattr(alignment, "_Decoder", counted)
    engine = engines.build_engine(EmbeddedModule(name="asr", path="/x", threads=setting), LimitsConfig())
    await engine.start()
    try:
        assert len(decoders) == expected
        assert len(engine._workers) == expected  # type: ignore[attr-defined]
    finally:
        await engine.stop()
