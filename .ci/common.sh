# shellcheck shell=bash
# Shared by .ci/run and .ci/full: where things are, and what a part is. Sourced, never run.
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
started=$SECONDS
part() { printf '\n==== %s (%d s)\n' "$*" "$((SECONDS - started))"; }

work=$(mktemp -d)
finish() {
  local pid
  for pid in $(jobs -p); do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || :; done
  rm -rf "$work"
}
trap finish EXIT

# together FUNCTION…: run them at the same time, print what each said in this order, and fail where one did.
together() {
  local name pid at status=0
  local -a pids=()
  for name in "$@"; do
    (at=$SECONDS; set -e; "$name"; printf -- '---- %s took %d s\n' "$name" "$((SECONDS - at))") >"$work/$name.log" 2>&1 &
    pids+=($!)
  done
  for name in "$@"; do
    pid=${pids[0]} pids=("${pids[@]:1}")
    if ! wait "$pid"; then
      status=1
      printf -- '---- %s failed\n' "$name"
    fi
    cat "$work/$name.log"
  done
  return "$status"
}

# shellcheck disable=SC2034
python=.venv-test/bin/python

# into_test_venv ARGUMENTS…: install into the environment of the tests, by the script's own way, uv or pip
into_test_venv() { into .venv-test "$@"; }

# into ENVIRONMENT ARGUMENTS…: the same for another one, which is made where it is not there. Several may be at work at once.
into() {
  bash -euc '. scripts/common.sh; run_dir=$2; mkdir -p "$run_dir"; [ -d "$root/$1" ] || make_venv "$root/$1"; pip_install "$root/$1" "${@:3}"' \
    _ "$1" "$work/$1" "${@:2}" || { tail -n 20 "$work/$1/install.log"; return 1; }
}
