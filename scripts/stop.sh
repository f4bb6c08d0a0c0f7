#!/usr/bin/env bash
# Stop the server that scripts/start.sh or scripts/install.sh started: it ends its streams and frees its port.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

signal=TERM # live streams may go on for drain_seconds
seconds=60
case ${1:-} in
  '') ;;
  --now)
    signal=INT # they end, with the words of what was sent
    seconds=3
    ;;
  status) exec "$root/scripts/status.sh" ;;
  -h | --help)
    say "Usage: scripts/stop.sh [--now | status]"
    say "  --now   do not let live streams go on for drain_seconds; end the server by force after 3 s"
    exit 0
    ;;
  *) usage_error "unknown argument $1" ;;
esac

if ! server_pid; then
  rm -f "$pid_file"
  say "No server is running."
  exit 0
fi
kill "-$signal" "$pid"
tenths=0
while kill -0 "$pid" 2>/dev/null; do
  if [ "$tenths" -ge $((seconds * 10)) ]; then
    say "The server did not end within $seconds s; ending it by force."
    kill -KILL "$pid" 2>/dev/null || :
    break
  fi
  sleep 0.1
  tenths=$((tenths + 1))
done
rm -f "$pid_file"
say "Stopped (pid $pid)."
