# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with the pinned packages and activates it. A second call takes a second.
RLHF_EXTRAS=${RLHF_EXTRAS:-}

# Run a program that ends with this shell: at a signal, one that a shell only waits for would go on without it.
ends_with_shell() {
    trap 'ended 129' HUP
    trap 'ended 130' INT
    trap 'ended 143' TERM
    set -m # in a process group, since pip has children
    "$@" </dev/null &
    set +m
    local code=0
    wait $! || code=$?
    trap - HUP INT TERM
    return $code
}
ended() {
    trap '' HUP INT TERM
    kill -TERM -- "-$!" || true
    wait $! || true
    kill -KILL -- "-$!" || true
    exit "$1"
} 2>/dev/null

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: expected Python 3.11 or newer, found $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
    exit 2
fi
wanted="$(cat constraints.txt pyproject.toml | cksum) ${RLHF_EXTRAS}"
# A plain environment may carry either stamp: dev includes everything in it.
if ! grep -qsxF -e "$wanted" -e "${wanted}dev" .venv/stamp; then
    echo "setting up .venv (a few minutes, once)"
    # venv writes it last: one that was interrupted is made again.
    [ -f .venv/bin/activate ] || ends_with_shell "$python" -m venv --clear .venv
    target=.
    [ -z "$RLHF_EXTRAS" ] || target=".[$RLHF_EXTRAS]"
    # --no-compile: a module is compiled on its first import, and most never are.
    ends_with_shell .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
        --constraint constraints.txt --editable "$target"
    echo "$wanted" >.venv/stamp
fi
source .venv/bin/activate
# Without cached bytecode every start would compile its imports again, for half a minute.
unset PYTHONDONTWRITEBYTECODE
# On a CPU: keep freed memory for the next step. By default glibc returns it to the system and requests it again.
export MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296
