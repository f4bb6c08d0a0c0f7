# shellcheck shell=bash disable=SC2034
# Shared by the scripts beside this file: where things are, what is said, which Python. Sourced, never run.
# Written for bash 3.2, which macOS has.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
run_dir=$root/run
pid_file=$run_dir/server.pid
settings_file=$run_dir/server.settings
server_log=$run_dir/server.log

say() { printf '%s\n' "$*"; }

# fail SENTENCE [NEXT_COMMAND]
fail() {
  printf 'Error: %s\n' "$1" >&2
  if [ $# -gt 1 ]; then printf '  Next: %s\n' "$2" >&2; fi
  exit 1
}

# usage_error SENTENCE
usage_error() {
  printf '%s: %s (see --help)\n' "${0##*/}" "$1" >&2
  exit 2
}

# need_value FLAG ARGUMENTS_LEFT
need_value() { [ "$2" -ge 2 ] || usage_error "$1 needs a value"; }

need_writable() {
  [ -w "$1" ] || fail "this user may not write to $1." "sudo chown -R \"\$(id -un)\" '$1'   # or clone into a folder of your own"
}

need_port_number() {
  case $1 in
    '' | *[!0-9]*) usage_error "--port $1: expected a number" ;;
  esac
  [ "$1" -ge 1 ] && [ "$1" -le 65535 ] || usage_error "--port $1: expected 1 to 65535"
}

# Sets `python` to an interpreter of 3.11 or newer. The order: those first for which every package has ready-made wheels.
find_python() {
  local name path seen=''
  for name in ${MOSHI_STT_PYTHON:-} python3.11 python3.13 python3.12 python3 python; do
    path=$(command -v "$name" 2>/dev/null) || continue
    if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      python=$path
      return 0
    fi
    case $name in python3 | python) seen="$("$path" --version 2>&1 | head -n 1) at $path" ;; esac
  done
  local how='sudo apt-get install python3.11 python3.11-venv   # or: pip install uv, which brings a Python of its own'
  [ "$(uname -s)" != Darwin ] || how='brew install python@3.13   # or: brew install uv, which brings a Python of its own'
  fail "Python 3.11 or newer is needed; found ${seen:-none}." "$how"
}

have_uv() { [ "${MOSHI_STT_UV:-1}" != 0 ] && command -v uv >/dev/null 2>&1; }

# make_venv FOLDER: a virtual environment there, kept when it works.
make_venv() {
  if [ -x "$1/bin/python" ] && "$1/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "Using the environment in ${1#"$root"/} ($("$1/bin/python" --version))."
    return 0
  fi
  rm -rf "$1"
  if have_uv; then
    say "Making an environment in ${1#"$root"/} with uv."
    uv venv --quiet --python 3.11 "$1" 2>/dev/null || uv venv --quiet --python '>=3.11,<3.14' "$1" ||
      fail "uv could not make an environment (see above)." "MOSHI_STT_UV=0 $0"
  else
    find_python
    say "Making an environment in ${1#"$root"/} with $("$python" --version) at $python."
    "$python" -m venv "$1" >"$run_dir/venv.log" 2>&1 || {
      rm -rf "$1"
      fail "$python cannot make a virtual environment: $(grep -v '^$' "$run_dir/venv.log" | tail -n 1)" \
        "sudo apt-get install python3-venv   # Debian and Ubuntu keep it apart"
    }
  fi
}

# pip_install FOLDER ARGUMENTS…: install into the environment, the log into run/install.log, downloads onto the screen.
pip_install() {
  local target=$1 status=0
  shift
  if have_uv; then
    set -- uv pip install --python "$target/bin/python" -c "$root/constraints.txt" "$@"
  else
    set -- "$target/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c "$root/constraints.txt" "$@"
  fi
  "$@" >"$run_dir/install.log" 2>&1 &
  local pid=$! shown=0 total
  while :; do
    local alive=0
    kill -0 "$pid" 2>/dev/null && alive=1
    total=$(($(wc -l <"$run_dir/install.log"))) # macOS pads the number
    if [ "$total" -gt "$shown" ]; then
      sed -n "$((shown + 1)),${total}p" "$run_dir/install.log" | sed -nE \
        -e 's/^ *Downloading ([A-Za-z0-9_.]+-[0-9][^-]*)-.*\(([0-9.]+ [MG]B)\).*/  \1 (\2)/p' \
        -e 's/^ *Downloading ([A-Za-z0-9_.-]+) (\([0-9.]+[MG]iB\)).*/  \1 \2/p'
      shown=$total
    fi
    [ "$alive" = 1 ] || break
    sleep 1
  done
  wait "$pid" || status=$?
  return "$status"
}

# Whether the last pip_install failed for want of a network.
no_network() {
  grep -qiE 'name resolution|could not resolve|dns error|failed to lookup|network is unreachable|connection refused|error sending request|failed to establish a new connection|no route to host|timed out|tunnel connection failed|failed to fetch' \
    "$run_dir/install.log"
}

# The package for which this platform has no wheel, as far as the last pip_install says. Empty where that was not the trouble.
missing_wheel() {
  sed -nE \
    -e 's/.*No matching distribution found for ([A-Za-z0-9_.-]+).*/\1/p' \
    -e 's/.*The user requested \(constraint\) ([A-Za-z0-9_.-]+)==.*/\1/p' \
    -e 's/.*Failed (building wheel for|to build):? [`'\'']?([A-Za-z0-9_.-]+).*/\2/p' \
    -e 's/.*[Bb]ecause ([A-Za-z0-9_.-]+)[ =<>0-9.]* has no (usable )?wheels.*/\1/p' \
    -e 's/.*[Bb]ecause ([A-Za-z0-9_.-]+)[ =<>0-9.]* .*no wheels with a matching.*/\1/p' \
    "$run_dir/install.log" | tail -n 1 | sed -E 's/[=<>~!].*//'
}

# install_failed NEXT_COMMAND: say why the last pip_install failed, and end.
install_failed() {
  if no_network; then
    fail "the package index cannot be reached ($(grep -iE 'error|fail' "$run_dir/install.log" | tail -n 1 | cut -c 1-160))." \
      "check the network (behind a proxy: export HTTPS_PROXY=…), then: $1"
  fi
  tail -n 15 "$run_dir/install.log" >&2
  fail "installing failed; the whole log is in run/install.log." "$1"
}

# Sets `pid` to the running server's process id. False where none of ours runs.
server_pid() {
  pid=''
  [ -f "$pid_file" ] || return 1
  pid=$(cat "$pid_file")
  case $pid in '' | *[!0-9]*) return 1 ;; esac
  ps -p "$pid" -o command= 2>/dev/null | grep -q 'moshi-stt worker' || return 1
}

# Sets `server_url` and `server_model` of the server that was last started.
server_settings() {
  server_url=$(sed -n 's/^url=//p' "$settings_file" 2>/dev/null || :)
  server_model=$(sed -n 's/^model=//p' "$settings_file" 2>/dev/null || :)
}

# need_free_port PYTHON ADDR PORT NEXT_COMMAND
need_free_port() {
  "$1" - "$2" "$3" <<'PY' || fail "port $3 on $2 is in use by another program$(port_owner "$3")." "$4"
import errno, socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET) as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind((sys.argv[1], int(sys.argv[2])))
    except OSError as e:
        sys.exit(e.errno == errno.EADDRINUSE)
PY
}

port_owner() {
  command -v lsof >/dev/null 2>&1 || return 0
  lsof -nP -iTCP:"$1" -sTCP:LISTEN 2>/dev/null | awk 'NR == 2 { printf " (%s, pid %s)", $1, $2 }'
}
