#!/bin/sh
# Writes the lock files from pyproject.toml:  scripts/lock.sh [--upgrade]
# Universal: one file for every platform, Python 3.11 and newer. Versions stay as they are locked, unless pyproject.toml
# forbids them or --upgrade is given. torch is left out, and why is said in scripts/lock.toml.
set -eu
cd "$(dirname "$0")/.."
uv=${VENV:-.venv}/bin/uv
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() {
    "$uv" pip compile --quiet --config-file scripts/lock.toml --universal --python-version 3.11 --generate-hashes \
        --no-annotate --custom-compile-command "make lock" --no-emit-package torch "$@"
}

# Runtime and tests are resolved together, so that they agree, and then written apart: `make run` needs the first only.
cat requirements.lock requirements-test.lock >"$work/all.lock" 2>/dev/null || true
compile pyproject.toml --group build --extra test --output-file "$work/all.lock" "$@"
compile pyproject.toml --group build --extra region --constraints "$work/all.lock" --output-file requirements.lock "$@"
compile pyproject.toml --extra test --constraints "$work/all.lock" --output-file requirements-test.lock "$@" \
    $(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements.lock)

# The previous major of openai on its own; what it depends on must be what is locked already.
echo 'openai>=2,<3' >"$work/previous.in"
sed '/^openai==/,/[^\\]$/d' requirements.lock requirements-test.lock >"$work/others.lock"
compile "$work/previous.in" --constraints "$work/others.lock" --output-file "$work/previous.lock" "$@"
compile "$work/previous.in" --no-deps --constraints "$work/previous.lock" \
    --output-file requirements-openai-previous.lock "$@"
