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

# With uv, which takes a quarter of pip's time; with pip where uv is not to be had or fails, so that pip's words are seen.
# Arguments: as both know them.
install_packages() {
    local pip=(.venv/bin/python -m pip --disable-pip-version-check) settings word value
    settings=$("${pip[@]}" config list)
    local uv=(.venv/bin/uv pip install --python .venv/bin/python --index-strategy unsafe-best-match) # pip's own strategy
    # What pip is set to, in uv's words.
    for word in index-url=--default-index extra-index-url=--index find-links=--find-links constraint=--constraint; do
        for value in $(sed -n "s/^[^=]*\.${word%=*}='\(.*\)'$/\1/p" <<<"$settings" | head -n 1 | sed 's/\\n/ /g'); do
            uv+=("${word#*=}" "$value")
        done
    done
    if ! grep -qE '\.(no-index|no-binary|only-binary|require-hashes|trusted-host|proxy|client-cert|pre)=' <<<"$settings" &&
        ends_with_shell "${pip[@]}" install --quiet --retries 1 --constraint constraints.txt uv >/dev/null 2>&1 &&
        ends_with_shell "${uv[@]}" "$@" >/dev/null 2>&1; then
        return
    fi
    # --no-compile: a module is compiled on its first import, and most never are.
    ends_with_shell "${pip[@]}" install --no-compile "$@"
}

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
    install_packages --quiet --constraint constraints.txt --editable "$target"
    echo "$wanted" >.venv/stamp
fi
source .venv/bin/activate
# Without cached bytecode every start would compile its imports again, for half a minute.
unset PYTHONDONTWRITEBYTECODE
# On a CPU: keep freed memory for the next step. By default glibc returns it to the system and requests it again.
export MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296
