#!/usr/bin/env bash
# Show the running server: process, memory, uptime, model, streams. Exit status 0 when it is ready, 1 when not.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  '') ;;
  -h | --help) say "Usage: scripts/status.sh"; exit 0 ;;
  *) usage_error "unknown argument $1" ;;
esac
if ! server_pid; then
  say "No server is running. Start one: scripts/start.sh"
  exit 1
fi
server_settings
exec "$venv/bin/moshi-stt" status --url "$server_url" --pid "$pid"
