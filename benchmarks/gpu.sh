#!/usr/bin/env bash
# Everything that is measured on a GPU, in one run: benchmarks/gpu.sh FOLDER [PART ...]
#
# Parts, in this order unless some are named:
#   tests       the kernels and the backend against their plain twins
#   neighbours  100,000 frames at 1 to 1,024 rows with joins and leaves: what differs
#   step        a step at each number of rows, beside PyPI `moshi` 0.2.13 where it is installed
#   step-old    the same of another checkout, whose folder is in OLD: for a table of before and after in one run
#   pretend     the server with the limits of a card of 24 GB and compute capability 8.9, and its step table
#   trial-fp8   one trial of the search for the most streams: 2,200 streams, 120 s, 8-bit keys and values
#   trial-bf16  the same with 1,200 streams and 16-bit ones
#   start       from `worker` to `/ready`, cold and warm, by phases
#   stall       1,024 streams for eight minutes: the longest turn and its reason
#   trial-20ms  1,100 streams that send packets of 20 ms
#   agreement   tokens and codes against float32
#   step-2.6b   the larger model's step
#   tiles       every product at the tiles it could have
#   large-step  what 1,024 rows are made of, and what could make them shorter (bench_large_step.py, with parts of its own)
# Each has its own time limit and writes a table to stdout and its JSON to FOLDER; one that fails does not keep the others from
# running, and the status says so at the end. Some half an hour on an H200. SPEECH may name a long recording (WAV, 24 kHz, mono).
set -uo pipefail
cd "$(dirname "$0")" || exit
out=${1:?a folder for the JSON files}
shift
all=(tests neighbours step step-old pretend trial-fp8 trial-bf16 start stall trial-20ms agreement step-2.6b tiles large-step)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
mkdir -p "$out"
out=$(cd "$out" && pwd)
checkpoint=${CHECKPOINT:-${TMPDIR:-/tmp}/moshi-stt-random-1b}
rows=${ROWS:-1,2,4,8,16,32,64,128,256,512,1024}
failed=()

# trial NAME STREAMS SECONDS MORE...: one trial of the search, kept in NAME.json
trial() {
  local name=$1 streams=$2 seconds=$3
  shift 3
  timeout $((seconds + 120)) python3 bench_server.py --find-most --state "$out/$name.json" --start "$streams" \
    --trial "$streams,$seconds" --checkpoint "$checkpoint" ${SPEECH:+--speech "$SPEECH"} "$@"
}

for part in "${parts[@]}"; do
  echo "== $part ($SECONDS s)"
  case $part in
    tests) (cd .. && timeout 240 python3 -m pytest -q -p no:cacheprovider tests/parity/test_cuda_{kernels,backend,fallbacks}.py) ;;
    neighbours)
      timeout 240 python3 bench_neighbours.py --shape 1b --rows 1024 --kv auto,fp8 --device cuda --out "$out/neighbours-1b.json"
      ;;
    step) timeout 300 python3 bench_step.py --rows "$rows" --kv auto,fp8 --steps 25 --out "$out/step-1b.json" ;;
    step-old)
      if [ -z "${OLD:-}" ]; then
        echo "OLD names no other checkout"
      else
        (cd "$OLD/benchmarks" && PYTHONPATH="$OLD/src:${PYTHONPATH:-}" timeout 300 python3 bench_step.py --no-reference \
          --rows "$rows" --steps 25 --out "$out/step-1b-old.json")
      fi
      ;;
    pretend)
      export MOSHI_STT_PRETEND_GPU=8.9:24
      timeout 120 python3 bench_step.py --no-reference --rows 1,8,16,64,128 --kv auto,fp8 --steps 15 --out "$out/step-1b-24gb.json" &&
        timeout 180 python3 bench_server.py --streams 160 --slots 512 --seconds 20 --checkpoint "$checkpoint" --out "$out/server-24gb.json"
      ;;
    trial-fp8) trial trial-fp8-2200 2200 120 --kv fp8 ;;
    trial-bf16) trial trial-bf16-1200 1200 120 --kv bf16 ;;
    trial-20ms) trial trial-20ms 1100 60 --kv bf16 --packet-ms 20 ;;
    stall) trial stall-1024 1024 480 --kv bf16 ;;
    start) timeout 240 python3 bench_start.py --checkpoint "$checkpoint" --out "$out/start-1b.json" ;;
    agreement) timeout 300 python3 bench_step.py --no-times --no-reference --agreement --out "$out/agreement-1b.json" ;;
    step-2.6b)
      timeout 300 python3 bench_step.py --shape 2.6b --rows 1,8,64,256,512 --kv auto,fp8 --steps 15 --out "$out/step-2.6b.json"
      ;;
    large-step) timeout 300 python3 bench_large_step.py "$out/large-step" ;;
    tiles) timeout 240 python3 bench_tiles.py --out "$out/tiles.json" ;;
    *)
      echo "no part is called $part; there are ${all[*]}" >&2
      exit 2
      ;;
  esac || failed+=("$part")
  unset MOSHI_STT_PRETEND_GPU
done
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}"
exit $((${#failed[@]} > 0))
