#!/bin/sh
# Sets up the virtual environment $VENV (default .venv) from Python 3.11+ and nothing else, or brings it up to date.
#
#   scripts/bootstrap.sh         what `nearfield` needs to run
#   scripts/bootstrap.sh test    that, and what the tests and checks need
#
# A step leaves a stamp that names all it depends on, and is left out while that stays the same. Everything but torch
# is installed from hash-checked lock files (`make lock` writes them), wheels only.
set -eu
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
PURPOSE=${1:-run}
export PIP_DISABLE_PIP_VERSION_CHECK=1
quiet=-q
[ ! -t 2 ] || quiet= # on a terminal pip and uv show their progress bars

say() { printf '==> %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$1" >&2
    printf '  fix: %s\n' "$2" >&2
    exit 1
}
sum() { cat "$@" | cksum | tr ' ' '-'; }
pip() { "$VENV/bin/python" -m pip "$@"; }

# step NAME KEY DESCRIPTION COMMAND...: run the command, unless it was run under this same key.
step() {
    name=$1 key=$2 description=$3
    shift 3
    stamp=$VENV/.nearfield-setup/$name
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then return; fi
    say "$description"
    started=$(date +%s)
    "$@"
    mkdir -p "$VENV/.nearfield-setup"
    printf '%s' "$key" >"$stamp"
    say "done in $(($(date +%s) - started)) s"
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer was found (looked for: ${PYTHON:-python3, python3.14 to python3.11})" \
        "install one (Debian, Ubuntu: sudo apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3"
}

create_venv() {
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make a virtual environment with pip" "sudo apt install python3-venv (Debian, Ubuntu), then run this again"
    if [ -d "$VENV/.nearfield-setup" ]; then rm -rf "$VENV"; fi # made here, then moved or left without its python
    "$python" -m venv "$VENV"
}

# install_locked LOCK [OPTION...]: uv is ten times faster, but reads none of pip's settings; pip is the way behind a
# mirror that only pip knows. Both check every hash.
install_locked() {
    lock=$1
    shift
    set -- --require-hashes --no-deps --only-binary :all: "$@" -r "$lock"
    "$VENV/bin/uv" pip install $quiet --python "$VENV/bin/python" "$@" || {
        say "uv could not: once more with pip, which takes a minute or two"
        pip install $quiet --no-compile "$@"
    }
}

install_uv() {
    mkdir -p "$VENV/.nearfield-setup"
    sed -n '/^uv==/,/[^\\]$/p' requirements.lock >"$VENV/.nearfield-setup/uv.lock"
    pip install $quiet --require-hashes --no-deps --only-binary :all: -r "$VENV/.nearfield-setup/uv.lock"
}

# Without an NVIDIA GPU the CPU build saves some gigabytes: from an index that this machine is set up with, else from
# PyTorch's own. Last, and everywhere else, the general build; it brings its CUDA libraries along.
install_torch() {
    if [ "$accelerator" = cpu ]; then
        set -- install $quiet --no-compile --no-deps "torch==$torch+cpu"
        pip "$@" --retries 0 2>/dev/null && return
        pip "$@" --retries 1 --timeout 30 --extra-index-url https://download.pytorch.org/whl/cpu && return
        say "no CPU build of torch $torch is to be had: taking the general one"
    fi
    pip uninstall -qy torch 2>/dev/null || true # a CPU build would pass for this version
    pip install $quiet --no-compile "torch==$torch"
}

install_previous_openai() {
    rm -rf "$VENV/openai-previous"
    install_locked requirements-openai-previous.lock --target "$VENV/openai-previous"
}

accelerator=cpu
if [ "$(uname -s)" != Linux ] || [ -e /dev/nvidiactl ] || [ -e /usr/lib/wsl/lib/libcuda.so.1 ]; then
    accelerator=general
fi
torch=$(sed -n 's/^version = "\(.*\)"/\1/p' scripts/lock.toml)

[ -x "$VENV/bin/python" ] || rm -f "$VENV/.nearfield-setup/venv" # its interpreter is gone
step venv "$VENV" "Creating $VENV" create_venv
step uv "$(sum requirements.lock)" "Installing uv" install_uv
step packages "$(sum requirements.lock)" "Installing what nearfield runs on (about 500 MB)" install_locked requirements.lock
step torch "$torch-$accelerator" "Installing torch $torch ($accelerator build)" install_torch
step nearfield "$PWD-$(sum pyproject.toml)" "Installing nearfield itself, editable" \
    pip install $quiet --no-deps --no-build-isolation -e .
if [ "$PURPOSE" = test ]; then
    step test-packages "$(sum requirements-test.lock)" "Installing what the tests use (about 250 MB)" \
        install_locked requirements-test.lock
    step openai-previous "$(sum requirements-openai-previous.lock)" "Installing openai's previous major beside it" \
        install_previous_openai
fi
