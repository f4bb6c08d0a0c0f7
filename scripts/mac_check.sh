#!/usr/bin/env bash
# What a person with a Mac runs once to see that everything here works on its GPU. Each line says PASS or FAIL, and so does the last.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  '' | --anyway | --quick) ;;
  -h | --help)
    say "Usage: scripts/mac_check.sh [--quick] [--anyway]"
    say "  --quick   without the models of full size (about 3 GB of memory)"
    say "  --anyway  on a machine that is no Mac too: MLX on its CPU"
    exit 0
    ;;
  *) usage_error "unknown argument $1" ;;
esac

if [ "$(uname -sm)" != 'Darwin arm64' ] && [ "${1:-}" != --anyway ]; then
  fail "this is no Mac with Apple silicon; these checks are for its GPU." "scripts/mac_check.sh --anyway   # MLX on this machine's CPU"
fi
cd "$root"
need_writable "$root"
mkdir -p "$run_dir"
make_venv "$venv"
if ! "$venv/bin/python" -c 'import mlx.core, moshi_stt' 2>/dev/null; then
  extras='mlx,mic'
  [ "$(uname -s)" = Darwin ] || extras='mlx'
  say "Installing moshi-stt with MLX."
  pip_install "$venv" -e ".[$extras]" || install_failed "scripts/mac_check.sh"
fi
"$venv/bin/python" -c 'import mlx.core' 2>"$run_dir/mlx.log" || fail "MLX is installed and cannot be loaded: $(tail -n 1 "$run_dir/mlx.log")" "rm -rf '$venv', then scripts/mac_check.sh"
exec "$venv/bin/python" scripts/mac_check.py "$@"
