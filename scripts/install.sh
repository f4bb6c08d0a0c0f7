#!/usr/bin/env bash
# Install into .venv, start the server, transcribe a recording of real speech through its WebSocket, leave it running.
# Safe to run again: what is there is kept or brought up to date.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/install.sh [--model NAME] [--yes] [--with EXTRAS] [--port N] [--addr IP]

  --model NAME   also fetch and serve this model of Kyutai's: stt-1b-en_fr (English and French), stt-2.6b-en, or your own TOML file
  --yes          fetch and serve stt-1b-en_fr where this machine would keep up with it, without asking
  --with EXTRAS  also install: torch, mlx, mic, ray, dev; several with commas
  --port N       at first 8080
  --addr IP      at first 127.0.0.1, this machine alone

Without --model the server runs the English model that comes with moshi-stt, and on a terminal the script asks whether to fetch the
larger one. It is fetched while the first one serves, tested, and then takes its place on the same port.
MOSHI_STT_PYTHON names the Python to use; MOSHI_STT_UV=0 leaves uv aside.
TEXT
}

again=$(typed "$0" "$@")
other_port=() # the same flags, without --port
server_settings
model='' yes='' extras='' address=() port=${server_port:-8080} addr=${server_addr:-127.0.0.1}
while [ $# -gt 0 ]; do
  case $1 in
    --model | --config) need_value "$1" $#; model=$2 other_port+=("$1" "$2"); shift 2 ;;
    --yes | -y) yes=yes other_port+=("$1"); shift ;;
    --with) need_value "$1" $#; extras=$2 other_port+=("$1" "$2"); shift 2 ;;
    --port) need_value "$1" $#; need_port_number "$2"; port=$2 address+=(--port "$2"); shift 2 ;;
    --addr) need_value "$1" $#; addr=$2 address+=(--addr "$2") other_port+=("$1" "$2"); shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) usage_error "unknown argument $1" ;;
  esac
done
for extra in ${extras//,/ }; do
  case $extra in
    torch | mlx | mic | ray | dev) ;;
    *) usage_error "--with $extra: expected torch, mlx, mic, ray or dev, several with commas" ;;
  esac
done
[ "$model" != embedded ] || model=''
if [ -f "$model" ]; then model=$(cd "$(dirname "$model")" && pwd)/$(basename "$model"); fi

cd "$root"
if [ -n "$model" ] && [ ! -f "$model" ] && [ ! -f "src/moshi_stt/configs/$model.toml" ]; then
  fail "there is no model or file named $model." "scripts/install.sh --model stt-1b-en_fr   # or stt-2.6b-en, or your own TOML file"
fi
need_supported_machine
need_writable "$root"
mkdir -p "$run_dir"

# ---- packages ----------------------------------------------------------------------------------------------------------

wanted=$(cksum <pyproject.toml)/$(cksum <constraints.txt)
is_installed() { [ -x "$venv/bin/moshi-server" ] && [ "$(cat "$run_dir/installed" 2>/dev/null)" = "$wanted" ]; }

if ! is_installed; then
  # A server of ours is stopped before its packages change under it.
  if server_pid; then
    say "Stopping the running server (pid $pid) for the time of the installation."
    "$root/scripts/stop.sh" >/dev/null
  fi
  make_venv "$venv"
  need_free_port "$venv/bin/python" "$addr" "$port" "$(typed scripts/install.sh --port "$((port + 1))" ${other_port[@]+"${other_port[@]}"})"
  say "Installing moshi-stt and its packages (about 130 MB to download)."
  pip_install "$venv" -e . || install_failed "$again"
  printf '%s\n' "$wanted" >"$run_dir/installed"
fi
say "Installed: $("$venv/bin/moshi-stt" --version)."
if [ -n "$extras" ]; then
  say "Installing what is needed for ${extras//,/ and }."
  pip_install "$venv" -e ".[$extras]" || install_failed "$again"
fi
link_commands

# ---- the server --------------------------------------------------------------------------------------------------------

if server_pid && [ "${#address[@]}" -eq 0 ]; then
  say "The server is running already (pid $pid)."
else
  "$root/scripts/start.sh" ${address[@]+"${address[@]}"} || exit 1
fi
server_settings
url=$server_url

if [ "$server_model" = embedded ]; then
  sample=$("$venv/bin/moshi-stt" sample)
  say "Transcribing $(basename "$sample") through the WebSocket:"
  "$venv/bin/moshi-stt" transcribe --url "ws${url#http}/api/asr-streaming" "$sample" ||
    fail "the server is running, but the recording was not transcribed." "tail -n 50 '$server_log'"
fi

# ---- Kyutai's model ----------------------------------------------------------------------------------------------------

larger=stt-1b-en_fr
advice=''

# would_keep_up: measure whether the larger model would, and keep the advice.
would_keep_up() {
  advice=$("$venv/bin/moshi-stt" advise) || return 1
}

if [ -z "$model" ] && [ "$server_model" = embedded ]; then
  if [ -n "$yes" ]; then
    if would_keep_up; then model=$larger; else say "The embedded model stays: ${advice:-nothing could be measured}."; fi
  elif [ -t 0 ] && [ -t 1 ]; then
    if [ ! -f "$run_dir/asked" ] && would_keep_up; then
      say "$advice. It is 2.4 GB to download, and what runs it besides; English and French."
      printf 'Fetch it now, while the embedded model serves? [Y/n] '
      read -r answer || answer=n
      date >"$run_dir/asked"
      case $answer in [nN]*) ;; *) model=$larger ;; esac
    fi
  else
    say "For English and French, a larger model: scripts/install.sh --model $larger (2.4 GB; moshi-stt advise says whether it keeps up here)."
  fi
fi

# keep_serving SENTENCE: what runs goes on.
keep_serving() {
  if server_pid; then say "The $server_model model keeps serving at $url." >&2; fi
  fail "$1" "$again   # it goes on where it stopped"
}

# need WHAT REQUIREMENT…
need() {
  local what=$1 why='the log is run/install.log'
  shift
  pip_install "$venv" "$@" && return
  if no_network; then why='the package index cannot be reached'; fi
  keep_serving "$what could not be installed: $why."
}

if [ -n "$model" ] && [ "$server_model" = "$model" ]; then
  say "$model is being served already."
elif [ -n "$model" ]; then
  # The small part first, so that a hub out of reach costs no gigabytes.
  need huggingface_hub huggingface_hub
  "$venv/bin/moshi-stt" download --dry-run "$model" || keep_serving "the weights of $model cannot be downloaded now (see above)."
  "$venv/bin/moshi-stt" download "$model" || keep_serving "the weights of $model could not be downloaded (see above)."
  if [ "$(uname -sm)" = 'Darwin arm64' ] && [ "$(sw_vers -productVersion | cut -d . -f 1)" -ge 14 ]; then
    say "Installing MLX and what else $model needs."
    need MLX -e '.[mlx]'
  else
    say "Installing PyTorch and what else $model needs (on Linux with CUDA about 3 GB)."
    need PyTorch -e '.[torch]'
  fi
  quantize=()
  if [ "$model" = "$larger" ]; then
    chosen=$("$venv/bin/moshi-stt" advise --plain) || say "Note: $("$venv/bin/moshi-stt" advise || :)."
    [ "$chosen" != no ] || chosen=int4
    say "Weights: $chosen (${advice:-$("$venv/bin/moshi-stt" advise || :)})."
    quantize=(-- --quantize "$chosen")
  fi
  say "Testing $model, while the $server_model model serves."
  "$root/scripts/start.sh" --model "$model" --take-over ${quantize[@]+"${quantize[@]}"} || keep_serving "$model did not start (see above)."
  sed -n 's/^.*self-test of [^:]*: /  /p' "$server_log"
fi

server_settings
me=$(command_name)
say "The server is running at $server_url ($server_model). Next:"
say "  $me transcribe YOUR_RECORDING        write down what is said in a file"
say "  open $server_url in a browser        live captions of your microphone"
say "  $root/scripts/status.sh, stop.sh, start.sh        see it, stop it, start it again as it is"
say_path
