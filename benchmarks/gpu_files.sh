#!/usr/bin/env bash
# Archives on a GPU: benchmarks/gpu_files.sh FOLDER. Some three minutes on an H200; JSON files to FOLDER.
#
# 40 hours of compressed audio, made here from the recordings of the package, through `transcribe -r` with random weights of the 1B
# shape and 1,024 slots; some of the recordings one by one; and PyPI `moshi` at batch 64 where it is installed. HOURS, SLOTS and
# CHECKPOINT change these. PyAV (the `av` wheel) has to be installed: the sound is decoded by it.
set -uo pipefail
cd "$(dirname "$0")" || exit
out=${1:?a folder for the JSON files}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python3 -c 'import av' || {
  echo "the av package is missing: pip install av"
  exit 1
}
common=(--shape 1b --slots "${SLOTS:-1024}" --checkpoint "${CHECKPOINT:-${TMPDIR:-/tmp}/moshi-stt-random-1b}")
failed=0
timeout 540 python3 bench_files.py "${common[@]}" --hours "${HOURS:-40}" --reference --out "$out/files-1b.json" || failed=1
exit $failed
