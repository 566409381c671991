# shellcheck shell=bash
# What the tests written in shell share; their results look as libtest's do. Sourced, never run.
. "$(dirname "${BASH_SOURCE[0]}")/../resources/lib.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

# check NAME FUNCTION: runs it, its output shown only if it fails.
check() {
    local verdict=ok
    if ("$2") >"$work/log" 2>&1; then
        passed=$((passed + 1))
    else
        verdict=FAILED
        failed=$((failed + 1))
    fi
    echo "test $1 ... $verdict"
    [ $verdict = ok ] || sed 's/^/    /' "$work/log"
}

# The subshell of a check has no errexit (it is a condition), so each step says what it expects.
expect() {
    "$@" && return
    echo "not so: $*"
    exit 1
}

# Tells the result, as the status too.
finish() {
    local word=ok
    [ "$failed" -eq 0 ] || word=FAILED
    echo "test result: $word. $passed passed; $failed failed; 0 ignored"
    [ "$failed" -eq 0 ]
}
