#!/usr/bin/env bash
# Makes or refreshes .venv: the pinned torch first (a bare `torch` may bring gigabytes of CUDA packages on its own
# terms), then the project with its pins. A stamp of the files that decide the result makes the second call quick.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=.venv
usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12)))' >/dev/null 2>&1; }

python=""
for candidate in ${PYTHON:-} python3 python3.11 python3.12; do
    if usable "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "startup.sh: Python 3.11 or 3.12 with venv is needed; none found on PATH. Install one or set PYTHON=/path/to/python3.11." >&2
    exit 2
fi

stamp=$({ "$python" --version; cat pyproject.toml constraints.txt startup.sh; } | sha256sum | cut -d' ' -f1)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

echo "startup.sh: preparing $venv with $("$python" --version) (a few minutes the first time)"
usable "$venv/bin/python" || { rm -rf "$venv"; "$python" -m venv "$venv"; }
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet)
torch=$(grep -E '^torch==' constraints.txt)
"${pip[@]}" install "$torch"
"${pip[@]}" install -c constraints.txt -e ".[dev]"
echo "$stamp" > "$venv/.stamp"
