#!/bin/sh
# Usage: venv.sh DIRECTORY — make a virtual environment with pip, without root, on whatever Python this machine has.
# Debian and Ubuntu ship Python without ensurepip; where `python -m venv` fails, virtualenv or an existing pip can help out.
set -eu
target=$1

python=
for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 &&
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "TandemDisk needs Python 3.11 or newer, and there is none here." >&2
    echo "Install one (apt-get install python3 on Debian 12+, Ubuntu 24.04+), or name it: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi

rm -rf "$target"
if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
    "$python" -m venv "$target"
elif "$python" -m virtualenv --version >/dev/null 2>&1; then
    "$python" -m virtualenv --quiet "$target"
elif command -v virtualenv >/dev/null 2>&1; then
    virtualenv --quiet --python "$python" "$target"
elif command -v uv >/dev/null 2>&1; then
    uv venv --quiet --seed --python "$python" "$target"
elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --without-pip "$target"
    "$python" -m pip --quiet --disable-pip-version-check --python "$target/bin/python" install pip
else
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "Python $version here cannot make virtual environments: Debian and Ubuntu package that part by itself." >&2
    echo "Run once: sudo apt-get install python$version-venv    (or, without root, put virtualenv or uv on your PATH)" >&2
    exit 1
fi
