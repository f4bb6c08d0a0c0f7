# shellcheck shell=bash disable=SC2034
# Shared by the scripts in this folder: where things are, what is said, which Python. Sourced, never run.
# Written for bash 3.2, which macOS has.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
run_dir=$root/run
pid_file=$run_dir/server.pid
settings_file=$run_dir/server.settings
server_log=$run_dir/server.log
handover=$run_dir/server.sock

say() { printf '%s\n' "$*"; }

# fail SENTENCE [NEXT_COMMAND]
fail() {
  printf 'Error: %s\n' "$1" >&2
  if [ $# -gt 1 ]; then printf '  Next: %s\n' "$2" >&2; fi
  exit 1
}

# typed WORDS…: as one would type them, for the next command in a message.
typed() {
  local word all=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word=$(printf '%q' "$word") ;;
    esac
    all="$all $word"
  done
  printf '%s' "${all# }"
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

# ---- the machine -------------------------------------------------------------------------------------------------------

# need_supported_machine: refuse in one sentence, before anything is installed, what cannot work.
need_supported_machine() {
  local version libc
  case "$(uname -s) $(uname -m)" in
    'Darwin x86_64')
      if [ "$(sysctl -n sysctl.proc_translated 2>/dev/null || :)" = 1 ]; then
        fail "this terminal runs under Rosetta, and moshi-stt needs a native one." "arch -arm64 /bin/bash $0"
      fi
      fail "Intel Macs are not supported: onnxruntime and PyTorch no longer publish packages for them." \
        "use a Mac with Apple silicon, or Linux"
      ;;
    'Darwin arm64')
      version=$(sw_vers -productVersion 2>/dev/null || echo 13)
      [ "${version%%.*}" -ge 13 ] || fail "macOS $version is too old: onnxruntime and PyAV need macOS 13 or newer." "update macOS"
      ;;
    'Linux x86_64' | 'Linux aarch64')
      libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || :)
      case $libc in
        'glibc 2.'*)
          [ "${libc##*.}" -ge 28 ] || fail "$libc is too old: onnxruntime and PyAV need glibc 2.28 (2018) or newer." "update the system"
          ;;
        *) fail "this Linux has no glibc (musl, as in Alpine?): onnxruntime has no packages for it." "use a Debian, Ubuntu or Fedora image" ;;
      esac
      ;;
    *) fail "$(uname -sm) is not supported: onnxruntime and PyAV have no packages for it." "use Linux on x86-64 or ARM, or a Mac with Apple silicon" ;;
  esac
}

# The versions of Python that will do, best first: 3.11 and 3.13 have every package; on 3.12 and 3.14 there is no pocketsphinx, and the
# recogniser's own decoder gives the times of words. macOS 13 has no onnxruntime for 3.14.
good_pythons='3.13 3.11'
python_versions() {
  case "$(uname -s) $(sw_vers -productVersion 2>/dev/null || :)" in
    'Darwin 13'*) printf '3.13 3.11 3.12' ;;
    *) printf '3.13 3.11 3.12 3.14' ;;
  esac
}

have_uv() { [ "${MOSHI_STT_UV:-1}" != 0 ] && command -v uv >/dev/null 2>&1; }

# version_of PATH: prints MAJOR.MINOR of a working interpreter that is no pre-release of something else.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Sets `python` to an interpreter of one of the versions $1, the first of them that the machine has. False where it has none.
find_python() {
  local version name path
  for version in $1; do
    for name in "python$version" python3 python; do
      path=$(command -v "$name" 2>/dev/null) || continue
      if [ "$(version_of "$path")" = "$version" ]; then
        python=$path
        return 0
      fi
    done
  done
  return 1
}

# What the machine calls python3, for messages.
python_seen() {
  local name path
  for name in python3 python; do
    path=$(command -v "$name" 2>/dev/null) || continue
    printf '%s at %s' "$("$path" --version 2>&1 | head -n 1)" "$path"
    return
  done
  printf 'none'
}

# uv_python FOLDER VERSION: make an environment with a Python that uv has or fetches.
uv_python() { uv venv --quiet --no-project --python "$2" "$1" >"$run_dir/venv.log" 2>&1; }

# borrowed_uv: where there is no uv, put one into run/uv by any Python 3 that can, and use it. False where that fails.
borrowed_uv() {
  local path
  [ "${MOSHI_STT_UV:-1}" != 0 ] || return 1
  [ -x "$run_dir/uv/bin/uv" ] || {
    path=$(command -v python3 2>/dev/null) || return 1
    "$path" -m venv "$run_dir/uv" >"$run_dir/venv.log" 2>&1 || return 1
    "$run_dir/uv/bin/python" -m pip install --disable-pip-version-check --quiet uv >"$run_dir/venv.log" 2>&1 || return 1
  }
  PATH=$run_dir/uv/bin:$PATH
}

# make_venv FOLDER: a virtual environment there, kept when it works. MOSHI_STT_PYTHON names the interpreter to use.
make_venv() {
  local wanted version shown=${1#"$root"/}
  wanted=$(python_versions)
  if [ -x "$1/bin/python" ]; then
    version=$(version_of "$1/bin/python" || :)
    case " $wanted " in
      *" $version "*)
        say "Using the environment in $shown ($("$1/bin/python" --version))."
        return 0
        ;;
    esac
  fi
  rm -rf "$1"
  if [ -n "${MOSHI_STT_PYTHON:-}" ]; then
    python=$(command -v "$MOSHI_STT_PYTHON") || fail "MOSHI_STT_PYTHON=$MOSHI_STT_PYTHON: there is no such program." "unset MOSHI_STT_PYTHON"
    case " $wanted " in
      *" $(version_of "$python") "*) ;;
      *) fail "MOSHI_STT_PYTHON=$MOSHI_STT_PYTHON is $("$python" --version 2>&1 | head -n 1), expected one of $wanted." "unset MOSHI_STT_PYTHON" ;;
    esac
    from_python "$1" && return
    fail "$python cannot make a virtual environment: $(venv_trouble)" "unset MOSHI_STT_PYTHON"
  fi
  if find_python "$good_pythons" && from_python "$1"; then return; fi
  if have_uv || borrowed_uv; then
    for version in $good_pythons; do
      if uv_python "$1" "$version"; then
        say "Made an environment in $shown with $("$1/bin/python" --version), by uv."
        return 0
      fi
    done
  fi
  if find_python "$wanted" && from_python "$1"; then return; fi
  if find_python "$wanted"; then
    fail "$python cannot make a virtual environment: $(venv_trouble)" \
      "sudo apt-get install python3-venv   # Debian and Ubuntu keep it apart"
  fi
  local how='sudo apt-get install python3.11 python3.11-venv   # or: pip install uv, which brings a Python of its own'
  [ "$(uname -s)" != Darwin ] || how='brew install python@3.13   # or: brew install uv, which brings a Python of its own'
  fail "Python 3.11, 3.12, 3.13 or 3.14 is needed; found $(python_seen), and uv could not bring one." "$how"
}

venv_trouble() { grep -v '^$' "$run_dir/venv.log" 2>/dev/null | tail -n 1; }

# from_python FOLDER: an environment by `python`, with uv or with its own venv. False, and the folder gone, where that fails.
from_python() {
  say "Making an environment in ${1#"$root"/} with $("$python" --version) at $python."
  if have_uv && uv_python "$1" "$python"; then return 0; fi
  "$python" -m venv "$1" >"$run_dir/venv.log" 2>&1 && return 0
  rm -rf "$1"
  return 1
}

# ---- packages ----------------------------------------------------------------------------------------------------------

wheels_only='--only-binary pocketsphinx --only-binary sphn --only-binary onnxruntime --only-binary av'

# pip_install FOLDER ARGUMENTS…: install into the environment, by uv where it is there, and by pip where uv cannot reach the index
# (it has certificates and proxies of its own). The log is run/install.log; downloads are shown.
pip_install() {
  local target=$1
  shift
  # shellcheck disable=SC2086  # a list of flags
  if have_uv; then
    logged uv pip install --python "$target/bin/python" -c "$root/constraints.txt" $wheels_only "$@" && return
    no_network || return
    say "uv cannot reach the package index; trying pip."
    "$target/bin/python" -m pip --version >/dev/null 2>&1 || "$target/bin/python" -m ensurepip >/dev/null 2>&1 || return
  fi
  # shellcheck disable=SC2086
  logged "$target/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c "$root/constraints.txt" $wheels_only "$@"
}

# logged COMMAND…: run it with its output in run/install.log, and show which files it fetches.
logged() {
  local status=0
  : >"$run_dir/install.log" # it is read before the command may have opened it
  "$@" >"$run_dir/install.log" 2>&1 &
  local pid=$! shown=0 total
  # A script's background processes do not hear Ctrl-C.
  # shellcheck disable=SC2064  # this pid
  trap "kill $pid 2>/dev/null || :; wait $pid 2>/dev/null || :; exit 130" INT TERM
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
  trap - INT TERM
  return "$status"
}

# Whether the last pip_install failed for want of a network.
no_network() {
  grep -qiE 'name resolution|could not resolve|invalid peer certificate|certificate verify failed|unknownissuer|dns error|failed to lookup|network is unreachable|connection refused|error sending request|failed to establish a new connection|no route to host|timed out|tunnel connection failed|failed to fetch' \
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
  local package
  if no_network; then
    fail "the package index cannot be reached ($(grep -iE 'error|fail' "$run_dir/install.log" | tail -n 1 | cut -c 1-160))." \
      "check the network (behind a proxy: export HTTPS_PROXY=…), then: $1"
  fi
  package=$(missing_wheel)
  if [ -n "$package" ]; then
    fail "there is no ready-made package of $package for this machine ($(uname -sm), $("$venv/bin/python" --version))." \
      "rm -rf '$venv' && MOSHI_STT_PYTHON=python3.11 $1   # another Python may have it"
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
  ps -ww -p "$pid" -o command= 2>/dev/null | grep -qE 'moshi-(stt|server) worker' || return 1
}

# Sets `server_url`, `server_model`, `server_port`, `server_addr` and `server_flags` (one a line) of the server that was last started.
server_settings() {
  server_url=$(setting url)
  server_model=$(setting model)
  server_port=$(setting port)
  server_addr=$(setting addr)
  server_flags=$(setting flag)
}

setting() { sed -n "s/^$1=//p" "$settings_file" 2>/dev/null || :; }

# url_of ADDR PORT: where this machine reaches a server that listens on ADDR.
url_of() {
  case $1 in
    0.0.0.0) printf 'http://127.0.0.1:%s' "$2" ;;
    ::) printf 'http://[::1]:%s' "$2" ;;
    *:*) printf 'http://[%s]:%s' "$1" "$2" ;;
    *) printf 'http://%s:%s' "$1" "$2" ;;
  esac
}

# ---- the commands on PATH ------------------------------------------------------------------------------------------------

links=$HOME/.local/bin

# link_commands: moshi-stt and moshi-server into ~/.local/bin. What is there and not ours stays.
link_commands() {
  local name
  mkdir -p "$links" 2>/dev/null || return 0
  for name in moshi-stt moshi-server; do
    if is_ours "$links/$name"; then
      ln -sf "$venv/bin/$name" "$links/$name"
    elif [ -e "$links/$name" ] || [ -L "$links/$name" ]; then
      say "$links/$name is not from this checkout and stays as it is; use $venv/bin/$name."
    else
      ln -s "$venv/bin/$name" "$links/$name"
    fi
  done
}

# is_ours LINK: whether it leads to this checkout's environment, or to a checkout's that is gone.
is_ours() {
  [ -L "$1" ] || return 1
  case $(readlink "$1") in
    "$venv/bin/"*) return 0 ;;
    */.venv/bin/moshi-*) [ ! -e "$1" ] ;;
    *) return 1 ;;
  esac
}

# command_name: how to call moshi-stt in this shell.
command_name() {
  if is_ours "$links/moshi-stt" && [ "$(command -v moshi-stt 2>/dev/null)" = "$links/moshi-stt" ]; then
    printf moshi-stt
  else
    printf '%s' "$venv/bin/moshi-stt"
  fi
}

# say_path: what to type where ~/.local/bin is not on PATH.
say_path() {
  case ":$PATH:" in *":$links:"*) return ;; esac
  is_ours "$links/moshi-stt" || return 0
  local profile=.profile
  [ "$(uname -s)" != Darwin ] || profile=.zprofile
  say "To call moshi-stt by its name, here and in new shells:"
  say "  export PATH=\"\$HOME/.local/bin:\$PATH\"; echo 'export PATH=\"\$HOME/.local/bin:\$PATH\"' >> ~/$profile"
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
