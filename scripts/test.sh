#!/usr/bin/env bash
# Lint, types and the default tests, in an environment of their own (.venv-test). Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  -h | --help)
    say "Usage: scripts/test.sh [ARGUMENTS OF pytest]"
    say "  Lint, types and the default tests, in an environment of its own: .venv-test."
    exit 0
    ;;
esac
cd "$root"
need_supported_machine
need_writable "$root"
mkdir -p "$run_dir"
test_venv=$root/.venv-test
make_venv "$test_venv"
say "Installing the package and the tools for its tests (about 230 MB)."
pip_install "$test_venv" -e '.[dev]' || install_failed "scripts/test.sh"

say "== ruff"
"$test_venv/bin/ruff" check .
"$test_venv/bin/ruff" format --check .
say "== mypy"
"$test_venv/bin/mypy"
say "== pytest"
"$test_venv/bin/python" -m pytest "$@"
