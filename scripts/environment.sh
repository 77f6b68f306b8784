# shellcheck shell=bash
# Makes and fills the virtual environment .venv; sourced by the other scripts.
#
#   prepare_environment EXTRAS   e.g. "" or "data,test"
#
# Idempotent: a stamp holds a hash of what was installed. An installation that
# was interrupted is thrown away and made again. PYTHON=... chooses the
# interpreter.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
UNFINISHED="$ROOT/.venv.unfinished"  # there while .venv is being changed

fail() {
  echo "error: $*" >&2
  exit 2
}

supported() {  # PYTHON
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
    2>/dev/null
}

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    supported "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13 found; install one, or set PYTHON=/path/to/python3"
}

make_venv() {
  local python="$1"
  echo "Making .venv with $("$python" --version)" >&2
  "$python" -m venv --clear "$VENV" >&2 ||
    fail "$python cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)"
}

install_packages() {  # EXTRAS
  local target="$ROOT${1:+[$1]}" constraints="$ROOT/constraints.txt"
  local python="$VENV/bin/python"
  if "$python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" uv; then
    "$python" -m uv --quiet pip install --python "$python" \
      --constraint "$constraints" --editable "$target" && return
    echo "uv could not install; trying pip" >&2
  fi
  "$python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable "$target"
}

fingerprint() {  # EXTRAS
  "$VENV/bin/python" - "$ROOT" "$1" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
state = [sys.version, *sys.argv[1:]]
state += [(root / name).read_text() for name in ('setup.py', 'constraints.txt')]
print(hashlib.sha256('\0'.join(state).encode()).hexdigest())
PYTHON
}

prepare_environment() {  # EXTRAS
  local extras="$1" stamp="$VENV/.installed-${1//,/-}" python=""
  if [[ -n "${PYTHON:-}" || -e "$UNFINISHED" ]] ||
    ! supported "$VENV/bin/python"; then
    python="$(find_python)" || exit
  fi
  if [[ -e "$UNFINISHED" ]] || ! supported "$VENV/bin/python" ||
    [[ -n "$python" && "$("$VENV/bin/python" -V)" != "$("$python" -V)" ]]; then
    touch "$UNFINISHED"
    make_venv "$python"
  elif [[ "$(cat "$stamp" 2>/dev/null)" == "$(fingerprint "$extras")" ]]; then
    return
  fi
  echo "Installing st_moe${extras:+[$extras]} into .venv (once; minutes)" >&2
  touch "$UNFINISHED"
  install_packages "$extras" >&2 ||
    fail "the packages could not be installed (see above); is the network reachable?"
  fingerprint "$extras" >"$stamp"
  rm "$UNFINISHED"
}
