"""The checks of mac_check.sh: MLX on the GPU against MLX on the CPU, speed and memory at full size, server and microphone.

Weights are random and made here, so nothing is fetched. Exit status 1 where a line says FAIL.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_mlx_step  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from tests.support.checkpoints import Checkpoint, module, save, small_spec, small_tensors  # noqa: E402
from tests.support.stepping import drive, noise, step_rows  # noqa: E402

from moshi_stt.cli.quantize import quantize_file  # noqa: E402
from moshi_stt.models.affine import Scheme  # noqa: E402
from moshi_stt.models.mlx_impl.build import load_backend  # noqa: E402
from moshi_stt.models.mlx_impl.device import choose_device, device_name, is_gpu  # noqa: E402
from moshi_stt.models.spec import MimiSpec, ModelSpec  # noqa: E402

FRAMES = 60
"""Past both windows of the small model."""

FRAME_MS = 80.0

failures: list[str] = []


def check(what: str, function: Callable[[], str]) -> None:
    """Run one check and print its line. It fails by an AssertionError, or by any other error, which is named."""
    begun = time.monotonic()
    try:
        text, mark = function(), "PASS"
    except Exception as error:
        text, mark = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "FAIL"
        failures.append(what)
    print(f"{mark}  {what}: {text} ({time.monotonic() - begun:.1f} s)", flush=True)


def machine() -> str:
    assert (platform.system(), platform.machine()) == ("Darwin", "arm64"), "this is no Mac with Apple silicon (see --anyway)"
    return f"macOS {platform.mac_ver()[0]}, Python {platform.python_version()}"


def metal() -> str:
    device, notes = choose_device("mlx")
    assert is_gpu(device), "; ".join(notes)
    return f"{device_name(device)}, MLX {mx.__version__}"


class Small:
    """A small random model on both devices."""

    def __init__(self, folder: Path) -> None:
        spec = small_spec(dim=64)
        self.checkpoint: Checkpoint = save(folder, spec, *small_tensors(spec, hidden=64))
        self.pcm = noise(FRAMES, seed=1)

    def load(self, device: str, lm_file: Path | None = None, **settings: object) -> Any:
        files = lm_file or self.checkpoint.lm_file, self.checkpoint.mimi_file
        return load_backend(module(engine_device=device, **settings), *files, self.checkpoint.spec, 8)

    def same(self, scheme: Scheme | None = None) -> str:
        """GPU and CPU say the same."""
        file = self.checkpoint.lm_file
        if scheme:
            file = self.checkpoint.folder / f"{scheme}.safetensors"
            quantize_file(self.checkpoint.lm_file, file, scheme)
        exact = {"dtype_override": "f32", "engine_mimi_dtype": "f32"}
        ours, theirs = (drive(self.load(device, file, **exact), self.pcm) for device in ("mlx", "cpu"))
        codes, tokens = (ours.codes != theirs.codes).sum(), (ours.tokens != theirs.tokens).sum()
        assert codes == 0, f"{codes} of {ours.codes.size} codes differ"
        assert tokens == 0, f"{tokens} of {len(ours.tokens)} tokens differ"
        off = float(np.abs(ours.logits - theirs.logits).max())
        assert off < 1e-2, f"logits differ by {off:.1e}"
        return f"{ours.codes.size} codes and {len(ours.tokens)} tokens equal, logits within {off:.0e}"

    def usual(self, **settings: object) -> str:
        """The precision that is usual on the GPU, against float32 on the CPU: finite, same codes, first logits near."""
        ours = drive(self.load("mlx", **settings), self.pcm)
        exact = drive(self.load("cpu", **settings | {"dtype_override": "f32"}), self.pcm)
        assert np.isfinite(ours.logits).all()
        codes = (ours.codes != exact.codes).mean()
        assert codes < 0.02, f"{codes:.1%} of the codes differ"
        off = float(np.abs(ours.logits[0] - exact.logits[0]).max() / np.abs(exact.logits[0]).max())
        assert off < 0.1, f"logits differ by {off:.1%}"
        return f"{codes:.2%} of codes differ, first logits by {off:.1%}"

    def neighbours(self) -> str:
        """With `fixed_shapes` a stream's output is the same to the last bit, alone and beside others."""
        backend = self.load("mlx", engine_fixed_shapes=True)
        audio = [noise(FRAMES, seed).reshape(FRAMES, -1) for seed in range(5)]
        alone = [drive(backend, stream.reshape(-1)) for stream in audio]
        for n in range(FRAMES):
            said = step_rows(backend, [stream[n] for stream in audio], [6, 0, 3, 7, 2], [n == 0] * 5)
            for row, expected in enumerate(alone):
                assert said.text_token[row] == expected.tokens[n], f"frame {n} of stream {row}: another token"
                assert said.logprob[row] == expected.logprob[n], f"frame {n} of stream {row}: another probability"
        return f"5 streams of {FRAMES} frames, bit for bit, in rows of {backend.fixed_rows or 'any number'}"

    def copies(self) -> str:
        """A copied slot goes on by itself."""
        backend = self.load("mlx", engine_fixed_shapes=True)
        frames, half = self.pcm.reshape(FRAMES, -1), FRAMES // 2
        expected = drive(backend, self.pcm).tokens
        for n in range(half):
            step_rows(backend, [frames[n]], [4], [n == 0])
        backend.copy(4, 5)
        for n in range(half, FRAMES):
            said = step_rows(backend, [frames[n], frames[0]], [5, 4], [False, False])
            assert said.text_token[0] == expected[n], f"frame {n}: another token"
        return "equal to the stream it was copied from"


def full_size(scheme: str) -> str:
    """One stream of the 1B at its full context must step within a frame."""
    device, _ = choose_device("mlx")
    lm, hidden = bench_mlx_step.SHAPES["1b"]
    spec = ModelSpec(lm, MimiSpec(codebooks=lm.codebooks), 6)
    result = bench_mlx_step.measure(spec, hidden, scheme, device, [4], 20)
    one, of_64, four = result["slots_ms"]["1"], result["slots_ms"]["64"], result["rows_ms"]["4"]
    text = f"{one:.1f} ms a step alone, {of_64:.1f} as one of 64 slots, {four:.1f} for 4 streams; "
    text += f"{result['rest_mb']} MB at rest, {result['full_stream_mb']} MB with one stream"
    assert max(one, of_64) < FRAME_MS, f"slower than real time: {text}"
    return text


def command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "moshi_stt", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stderr or done.stdout)[-300:]
    return done.stdout


def embedded() -> str:
    words = command("transcribe", "--quiet", command("sample").strip()).split()
    assert words, "nothing was transcribed"
    return f"{len(words)} words: {' '.join(words[:8])} …"


def microphone() -> str:
    lines = [line for line in command("doctor").splitlines() if "microphone:" in line]
    assert lines, "moshi-stt doctor says nothing of it"
    assert lines[0].startswith("OK"), f"{lines[0]} (scripts/install.sh --with mic; see docs/mac.md)"
    return lines[0].partition("microphone: ")[2]


def process_name() -> str:
    """`top -pid $(pgrep moshi-server)` shows a server, as users of moshi-server's guide type it."""
    program = Path(sys.executable).with_name("moshi-server")
    server = subprocess.Popen([program, "worker", "--addr", "127.0.0.1", "--port", "0", "--silent"])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.poll() is None:
            found = subprocess.run(["pgrep", "moshi-server"], capture_output=True, text=True, check=False).stdout.split()
            if str(server.pid) in found:
                mac = sys.platform == "darwin"
                show = ["top", "-l", "1", "-stats", "pid,command,cpu,mem", "-pid"] if mac else ["top", "-b", "-n", "1", "-p"]
                shown = subprocess.run([*show, str(server.pid)], capture_output=True, text=True, check=False, timeout=60)
                lines = [line for line in shown.stdout.splitlines() if line.split()[:1] == [str(server.pid)]]
                assert lines, f"pgrep finds it, but `{' '.join(show)}` does not show it: {shown.stderr or shown.stdout}"
                return f"pgrep finds it, and top shows: {' '.join(lines[0].split())}"
            time.sleep(0.5)
        raise AssertionError("pgrep moshi-server does not find it; use pgrep -f 'moshi-server worker'")
    finally:
        server.terminate()
        server.wait(60)


def small_checks() -> Iterator[tuple[str, Callable[[], str]]]:
    with tempfile.TemporaryDirectory() as folder:
        small = Small(Path(folder))
        yield "float32 on the GPU and the CPU", small.same
        yield "8 bits on the GPU and the CPU", lambda: small.same("int8")
        yield "4 bits on the GPU and the CPU", lambda: small.same("int4")
        yield "bf16", lambda: small.usual(dtype_override="bf16")
        yield "4 bits in bf16", lambda: small.usual(dtype_override="bf16", engine_quantize="int4")
        yield "a stream and its neighbours", small.neighbours
        yield "a copied stream", small.copies


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--anyway", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if not args.anyway:
        check("machine", machine)
        check("Metal", metal)
    for what, function in small_checks():
        check(what, function)
    if not args.quick:
        for scheme in ("bf16", "int8", "int4"):
            check(f"the 1B at full size, {scheme}", lambda scheme=scheme: full_size(scheme))  # type: ignore[misc]
    check("the embedded model", embedded)
    check("the server's process name", process_name)
    if not args.anyway:
        check("microphone", microphone)
    print(f"FAIL: {', '.join(failures)}" if failures else "PASS: everything")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
