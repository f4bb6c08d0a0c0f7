#!/usr/bin/env bash
# Stop the server that scripts/start.sh or scripts/install.sh started: it ends its streams and frees its port.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  '') ;;
  status) exec "$root/scripts/status.sh" ;;
  -h | --help) say "Usage: scripts/stop.sh [status]"; exit 0 ;;
  *) usage_error "unknown argument $1" ;;
esac

if ! server_pid; then
  rm -f "$pid_file"
  say "No server is running."
  exit 0
fi
kill -TERM "$pid"
tenths=0
while kill -0 "$pid" 2>/dev/null; do
  if [ "$tenths" -ge 300 ]; then
    say "The server did not end within 30 s; ending it by force."
    kill -KILL "$pid" 2>/dev/null || :
    break
  fi
  sleep 0.1
  tenths=$((tenths + 1))
done
rm -f "$pid_file"
say "Stopped (pid $pid)."
