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

# shellcheck disable=SC2034
python=.venv-test/bin/python

# installed_into_test_venv ARGUMENTS…: by the script's own way, uv or pip
into_test_venv() {
  bash -euc '. scripts/common.sh; pip_install "$root/.venv-test" "$@"' _ "$@" || { tail -n 20 run/install.log; return 1; }
}
