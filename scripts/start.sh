#!/usr/bin/env bash
# Start the server in the background and wait until it is ready. What is not said is as it was the last time.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/start.sh [--model NAME] [--port N] [--addr IP] [--wait SECONDS] [--take-over] [-- FLAGS OF moshi-stt worker]

  --model NAME    a shipped configuration (embedded, stt-1b-en_fr, stt-2.6b-en), or a TOML file
  --port N        at first 8080
  --addr IP       at first 127.0.0.1, this machine alone; 0.0.0.0 for every interface
  --wait SECONDS  how long loading may take; default 600
  --take-over     where a server runs: load the new model next to it, test it, then take its place on its port; its streams may end

Model, port, address and the flags after -- are remembered: the next start without them takes the same.
TEXT
}

server_settings
model=${server_model:-embedded} port=${server_port:-8080} addr=${server_addr:-127.0.0.1} wait_seconds=600 take_over=''
worker_flags=()
other_port=() # the flags of this call, without --port
while IFS= read -r flag; do
  if [ -n "$flag" ]; then worker_flags+=("$flag"); fi
done <<<"$server_flags"
while [ $# -gt 0 ]; do
  case $1 in
    --model | --config)
      need_value "$1" $#
      [ "$model" = "$2" ] || worker_flags=()
      model=$2 other_port+=("$1" "$2")
      shift 2
      ;;
    --port) need_value "$1" $#; port=$2; shift 2 ;;
    --addr) need_value "$1" $#; addr=$2 other_port+=("$1" "$2"); shift 2 ;;
    --wait) need_value "$1" $#; wait_seconds=$2 other_port+=("$1" "$2"); shift 2 ;;
    --take-over) take_over=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    --) other_port+=("$@"); shift; worker_flags=("$@"); break ;;
    *) usage_error "unknown argument $1" ;;
  esac
done
need_port_number "$port"
case $model in
  */* | *.toml) if [ -f "$model" ]; then model=$(cd "$(dirname "$model")" && pwd)/$(basename "$model"); fi ;;
esac
url=$(url_of "$addr" "$port")

[ -x "$venv/bin/moshi-server" ] || fail "nothing is installed in ${venv#"$root"/} yet." "scripts/install.sh"
old=''
if server_pid; then
  if [ -n "$take_over" ]; then
    [ "$server_url" = "$url" ] || fail "the running server (pid $pid) is at $server_url, not at $url." "scripts/stop.sh, then this command again"
    old=$pid
  elif [ "$server_url" = "$url" ] && [ "$server_model" = "$model" ]; then
    say "Already running (pid $pid) at $url."
    exit 0
  else
    fail "a server is running already (pid $pid, model $server_model, at $server_url)." "scripts/stop.sh, then this command again"
  fi
fi
need_writable "$root"
mkdir -p "$run_dir"
[ -n "$old" ] || need_free_port "$venv/bin/python" "$addr" "$port" "$(typed scripts/start.sh --port "$((port + 1))" ${other_port[@]+"${other_port[@]}"})"

log=$server_log
if [ -n "$old" ]; then log=$run_dir/server.next.log; fi
# An old log is kept once, so that a restart does not hide why the last server ended.
if [ -f "$log" ]; then mv -f "$log" "$log.1"; fi
set -- --addr "$addr" --port "$port" --handover "$handover" --pid-file "$pid_file"
[ "$model" = embedded ] || set -- "$@" --config "$model"
[ -z "$old" ] || set -- "$@" --take-over
nohup "$venv/bin/moshi-server" worker "$@" ${worker_flags[@]+"${worker_flags[@]}"} </dev/null >"$log" 2>&1 &
pid=$!
say "Starting the $model model (pid $pid, log in run/$(basename "$log"))."

remember() {
  {
    printf 'url=%s\nmodel=%s\nport=%s\naddr=%s\n' "$url" "$model" "$port" "$addr"
    if [ "${#worker_flags[@]}" -gt 0 ]; then printf 'flag=%s\n' "${worker_flags[@]}"; fi
  } >"$settings_file"
}

# is_ready: whether the new process takes connections within the time.
is_ready() {
  if [ -z "$old" ]; then
    printf '%s\n' "$pid" >"$pid_file"
    if [ -f "$settings_file" ]; then cp -f "$settings_file" "$settings_file.1"; fi
    remember
    "$venv/bin/moshi-stt" status --url "$url" --pid "$pid" --wait "$wait_seconds" --quiet
    return
  fi
  local tenths=0
  while [ "$(cat "$pid_file" 2>/dev/null)" != "$pid" ]; do
    kill -0 "$pid" 2>/dev/null || return 1
    [ "$tenths" -lt $((wait_seconds * 10)) ] || return 1
    sleep 0.1
    tenths=$((tenths + 1))
  done
  remember
  mv -f "$server_log" "$server_log.1"
  mv -f "$log" "$server_log"
}

if ! is_ready; then
  if kill -0 "$pid" 2>/dev/null; then
    kill "$pid"
    why="it was not ready within $wait_seconds s"
  else
    why=$(sed -n 's/^Error: //p' "$log" | tail -n 1)
  fi
  if [ -z "$old" ]; then
    rm -f "$pid_file"
    if [ -f "$settings_file.1" ]; then mv -f "$settings_file.1" "$settings_file"; else rm -f "$settings_file"; fi
  fi
  tail -n 12 "$log" | cut -c 1-300 >&2
  fail "the server did not start: ${why:-see run/$(basename "$log")}" "tail -n 50 '$log'"
fi
if [ -n "$old" ]; then say "It has taken over from pid $old, which ends when its streams have ended, in 10 minutes at most."; fi
say "Ready at $url (WebSocket: ws${url#http}/api/asr-streaming, key public_token unless configured otherwise)."
