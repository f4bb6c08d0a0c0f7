#!/usr/bin/env bash
# Everything that is measured on a GPU, in one run: benchmarks/gpu.sh FOLDER [PART ...]
#
# Parts: step engine server neighbours step-2.6b; all of them, in this order, unless some are named. Each writes a table to
# stdout and its JSON to FOLDER. PyPI `moshi` 0.2.13 must be installed for the comparison (it is left out where it is not).
# Some ten minutes on an H200.
set -euo pipefail
cd "$(dirname "$0")"
out=${1:?a folder for the JSON files}
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(step engine server neighbours step-2.6b)
mkdir -p "$out"
out=$(cd "$out" && pwd)
checkpoint=${TMPDIR:-/tmp}/moshi-stt-random-1b
for part in "${parts[@]}"; do
  echo "== $part"
  case $part in
    step) python3 bench_step.py --rows 1,8,64,256,512,1024 --kv auto,fp8 --steps 25 --agreement --out "$out/step-1b.json" ;;
    step-2.6b) python3 bench_step.py --shape 2.6b --rows 1,8,64,256,512 --kv auto,fp8 --steps 15 --out "$out/step-2.6b.json" ;;
    engine) python3 bench_engine.py --streams 2048 --kv fp8 --seconds 60 --old --out "$out/engine-2048.json" ;;
    server) python3 bench_server.py --streams 1024 --seconds 60 --checkpoint "$checkpoint" --out "$out/server-1024.json" ;;
    neighbours) python3 bench_neighbours.py "$checkpoint" --device cuda --out "$out/neighbours-1b.json" ;;
    *)
      echo "no part is called $part: step, engine, server, neighbours or step-2.6b" >&2
      exit 2
      ;;
  esac
done
