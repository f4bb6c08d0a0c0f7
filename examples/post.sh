#!/bin/sh
# Transcribe a recording of any format with curl: post.sh RECORDING [http://127.0.0.1:8080]
[ $# -ge 1 ] || { sed -n 's/^# //p' "$0" >&2; exit 2; }
exec curl --fail-with-body -sS -H "kyutai-api-key: ${MOSHI_STT_KEY:-public_token}" --data-binary "@$1" "${2:-http://127.0.0.1:8080}/api/asr-streaming"
