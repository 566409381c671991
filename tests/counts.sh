# shellcheck shell=bash
# How tests/run counts: results out of logs, second tries in the emulated host, and what is told at the end. Sourced
# with $work, a directory, set; tests/counts tests it.

passed=0 failed=0
# What went wrong, a line or two each; told at the end.
failures=()
# What the command in hand prints.
log=$work/log
# Files that may need a second try in one run: what fails now and then in more of them is no mood of a busy host.
SECOND_TRIES_MAX=2

# Prints the failures in the log of $1: each test by name, with the first line of what it said; $2 where
# none is named.
what_failed() {
    local found
    found=$(awk '
        { sub(/^[12]\| /, "") }
        /^test .* FAILED$/ || /^ *(FAIL|TIMEOUT|SIG[A-Z]+|ABORT) \[/ { if (!($0 in seen)) print; seen[$0] }
        panicked { print "    " substr($0, 1, 300); panicked = 0 }
        / panicked at / { panicked = 1 }' "$log" | head -n 12)
    echo "$1: ${found:-$2: $(tail -n 3 "$log" | cut -c 1-300)}"
}

# Adds what the log of a libtest run says to the counts. $1: its name, $2: its exit status, $3: must
# if it is a failure to have run no test.
count_libtest() {
    local ok bad ignored
    # With two hosts, the first one's lines are counted; the second ran the same tests.
    read -r ok bad ignored < <(grep -v '^2| ' "$log" | sed -n \
        's/^\(1| \)\{0,1\}test result: .* \([0-9]*\) passed; \([0-9]*\) failed; \([0-9]*\) ignored.*/\2 \3 \4/p' |
        awk '{ a += $1; b += $2; c += $3; n++ } END { print a + 0, b + 0, c + 0 }')
    if [ "$ignored" -gt 0 ] && [ "$3" = must ]; then
        say "$1: $ignored tests are marked #[ignore], and nothing runs those"
        bad=$((bad + ignored))
    fi
    if [ "$2" -ne 0 ] && [ "$bad" -eq 0 ]; then
        say "$1 ended with status $2"
        bad=1
    elif [ "$((ok + bad))" -eq 0 ] && [ "$3" = must ] && [ -z "${VMM_TEST_FILTER:-}" ]; then
        say "$1 ran no test"
        bad=1
    fi
    passed=$((passed + ok)) failed=$((failed + bad))
    [ "$bad" -eq 0 ] || failures+=("$(what_failed "$1" "$bad failed, status $2")")
}

# Runs a command whose output is also kept in the log; gives its status.
logged() {
    "$@" 2>&1 | tee "$log"
    return "${PIPESTATUS[0]}"
}

# Counts a nextest run whose status was $1.
count_nextest() {
    local ok bad
    ok=$(sed -n 's/^ *Summary .* \([0-9]*\) passed.*/\1/p' "$log" | tail -n 1)
    # Failed, timed out and crashed ones are told apart there; all are failures.
    bad=$(sed -n 's/^ *Summary //p' "$log" | tail -n 1 |
        awk -v RS=, '/[0-9]+ (failed|timed out|exec failed)/ { n += $1 } END { print n + 0 }')
    if [ "$1" -ne 0 ] && [ "$bad" -eq 0 ]; then
        say "cargo nextest ended with status $1"
        bad=1
    fi
    passed=$((passed + ${ok:-0})) failed=$((failed + bad))
    [ "$bad" -eq 0 ] || failures+=("$(what_failed nextest "status $1")")
}

# Runs the rest of the arguments, a file called $1 in the emulated host, and once more if that fails; gives the last
# status. Such a host on shared cores stalls for seconds at times, or dies of its emulator (and is then started again by
# tests/host/run). What failed at first is kept, to be told and counted at the end.
twice() {
    local name=$1 first=$work/$1/first status=0
    shift
    mkdir -p "$work/$name"
    logged "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        say "$name failed in the emulated host: once more"
        what_failed "$name" "status $status" >"$first"
        status=0
        logged "$@" || status=$?
    fi
    if [ ! -e "$first" ] && grep -q 'starting it once more$' "$log"; then
        echo "$name: $(sed -n 's/^.*\(emulated host [12] died by itself on the .* try\).*/\1/p' "$log" | head -n 1)" >"$first"
    fi
    return "$status"
}

# Tells what failed, what needed a second try, and the counts; gives whether all is well.
tell_counts() {
    local first=("$work"/*/first)
    [ -e "${first[0]}" ] || first=()
    if [ ${#first[@]} -gt "$SECOND_TRIES_MAX" ]; then
        failures+=("second tries: ${#first[@]} files needed one, more than $SECOND_TRIES_MAX")
        failed=$((failed + 1))
    fi
    if [ ${#first[@]} -gt 0 ]; then
        echo "Tried a second time (${#first[@]}, at most $SECOND_TRIES_MAX), for what failed at first:"
        cat "${first[@]}"
    fi
    [ ${#failures[@]} -eq 0 ] || printf '%s\n' "What failed:" "${failures[@]}"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}
