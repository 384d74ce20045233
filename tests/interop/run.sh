#!/usr/bin/env bash
# Makes or refreshes .venv-interop (an environment of its own: those libraries pin what ours does not) and runs the tests
# beside this file in it. Where the libraries can't be installed the tests are skipped: a message, and exit code 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=.venv-interop
peer=dictionary-learning==0.1.0  # its import name is ours, so it goes to a folder of its own, without what it depends on
skip() { echo "test-interop: skipped, $1."; exit 0; }
usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12)))' >/dev/null 2>&1; }

python=""
for candidate in ${PYTHON:-} python3 python3.11 python3.12; do
    if usable "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || skip "because no Python 3.11 or 3.12 with venv is on PATH"

stamp=$({ "$python" --version; cat constraints.txt tests/interop/requirements.txt tests/interop/run.sh; } | sha256sum | cut -d' ' -f1)
if ! { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ]; }; then
    echo "test-interop: preparing $venv (a few minutes the first time)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || skip "because $venv can't be made"
    torch=$(grep -E '^torch==' constraints.txt)
    log=$venv/install.log
    "$venv/bin/python" -m pip --disable-pip-version-check install "$torch" >"$log" 2>&1 &&
        "$venv/bin/python" -m pip --disable-pip-version-check install "$torch" -r tests/interop/requirements.txt >>"$log" 2>&1 &&
        "$venv/bin/python" -m pip --disable-pip-version-check install --no-deps --target "$venv/peer" "$peer" >>"$log" 2>&1 ||
        skip "because sae-lens and eai-sparsify can't be installed here (the end of $log: $(grep -v '^WARNING' "$log" | tail -n 1))"
    "$venv/bin/python" -c 'import sae_lens, sparsify' >>"$log" 2>&1 ||
        skip "because sae_lens and sparsify can't be imported here (the end of $log: $(tail -n 1 "$log"))"
    peer=$(grep -oE 'dictionary-learning==[0-9.]+' tests/interop/requirements.txt)
    "$venv/bin/python" -m pip --disable-pip-version-check install --no-deps --target "$venv/peer" "$peer" >>"$log" 2>&1 ||
        echo "test-interop: $peer can't be installed here, its tests are skipped (the end of $log: $(tail -n 1 "$log"))"
    echo "$stamp" > "$venv/.stamp"
fi
"$venv/bin/python" -m pytest tests/interop -s
