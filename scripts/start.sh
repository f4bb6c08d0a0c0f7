#!/usr/bin/env bash
# Start the server in the background and wait until it is ready.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: scripts/start.sh [--model NAME] [--port N] [--addr IP] [--wait SECONDS] [-- FLAGS OF moshi-stt worker]

  --model NAME    a shipped configuration (stt-1b-en_fr, stt-2.6b-en), or a TOML file; default: the embedded English model
  --port N        default 8080
  --addr IP       default 127.0.0.1, this machine alone; 0.0.0.0 for every interface
  --wait SECONDS  how long loading may take; default 600
TEXT
}

model='' port=8080 addr=127.0.0.1 wait_seconds=600
while [ $# -gt 0 ]; do
  case $1 in
    --model) need_value "$1" $#; model=$2; shift 2 ;;
    --port) need_value "$1" $#; port=$2; shift 2 ;;
    --addr) need_value "$1" $#; addr=$2; shift 2 ;;
    --wait) need_value "$1" $#; wait_seconds=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) usage_error "unknown argument $1" ;;
  esac
done
need_port_number "$port"
[ "$model" != embedded ] || model=''

case $addr in
  0.0.0.0) host=127.0.0.1 ;;
  ::) host='[::1]' ;;
  *:*) host="[$addr]" ;;
  *) host=$addr ;;
esac
url=http://$host:$port

[ -x "$venv/bin/moshi-stt" ] || fail "nothing is installed in ${venv#"$root"/} yet." "scripts/install.sh"
if server_pid; then
  server_settings
  if [ "$server_url" = "$url" ] && [ "$server_model" = "${model:-embedded}" ]; then
    say "Already running (pid $pid) at $url."
    exit 0
  fi
  fail "a server is running already (pid $pid, model $server_model, at $server_url)." "scripts/stop.sh, then this command again"
fi
need_writable "$root"
mkdir -p "$run_dir"
need_free_port "$venv/bin/python" "$addr" "$port" "scripts/start.sh${model:+ --model $model} --port $((port + 1))"

# An old log is kept once, so that a restart does not hide why the last server ended.
if [ -f "$server_log" ]; then mv -f "$server_log" "$server_log.1"; fi
nohup "$venv/bin/moshi-stt" worker --addr "$addr" --port "$port" ${model:+--config "$model"} "$@" \
  </dev/null >"$server_log" 2>&1 &
pid=$!
printf '%s\n' "$pid" >"$pid_file"
printf 'url=%s\nmodel=%s\n' "$url" "${model:-embedded}" >"$settings_file"
say "Starting the ${model:-embedded} model (pid $pid, log in run/server.log)."
if ! "$venv/bin/moshi-stt" status --url "$url" --pid "$pid" --wait "$wait_seconds" --quiet; then
  if kill -0 "$pid" 2>/dev/null; then
    kill "$pid"
    why="it was not ready within $wait_seconds s"
  else
    why=$(sed -n 's/^Error: //p' "$server_log" | tail -n 1)
  fi
  rm -f "$pid_file"
  tail -n 12 "$server_log" | cut -c 1-300 >&2
  fail "the server did not start: ${why:-see run/server.log}" "tail -n 50 '$server_log'"
fi
say "Ready at $url (WebSocket: ws${url#http}/api/asr-streaming, key public_token unless configured otherwise)."
