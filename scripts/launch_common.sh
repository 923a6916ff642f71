# Read by the launchers: the check before anything starts, where the log is, and the run's own exit code.
set -uo pipefail
python=${PYTHON:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python} # `make install` makes it
[ -x "$(command -v "$python")" ] || python=python3
dry_run=

# check PROCESSES key=value ...: all breaches of the configuration in one message and exit code 2, else sets run_dir.
check() {
    local processes=$1 config
    shift
    config=$(WORLD_SIZE=$processes "$python" -m nsa_train config "$@") || exit $?
    run_dir=$("$python" -c 'import sys, yaml; c = yaml.safe_load(sys.stdin); print(c["runs_dir"] + "/" + c["name"])' <<< "$config")
}

# announce LOG COMMAND ...: say what is started and where its output goes; a dry run ends here.
announce() {
    local log=$1
    shift
    printf 'log: %s\nstarting:' "$log"
    printf ' %q' "$@"
    echo
    [ -z "$dry_run" ] || exit 0
    mkdir -p "$run_dir/logs"
    started=$(mktemp)
}

# real_code CODE: what the run itself ended with. Launchers turn every code but 0 into 1; summary.json has it.
real_code() {
    local code=$1
    # Not -nt: what is written within one tick of the file system's clock has one time.
    if [ "$code" != 0 ] && [ ! "$run_dir/summary.json" -ot "$started" ]; then
        code=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["exit_code"] or sys.argv[2])' \
            "$run_dir/summary.json" "$code")
    fi
    rm -f "$started"
    echo "$code"
}

# run COMMAND ...: start it with its output also in this node's log, pass signals on, exit with the run's code.
run() {
    local log child code
    log=$run_dir/logs/$(hostname).log
    announce "$log" "$@"
    set -m # else Ctrl-C is ignored by what runs in the background
    "$@" > >(tee -ia "$log") 2>&1 &
    child=$!
    trap 'kill -INT "$child"' INT
    trap 'kill -TERM "$child"' TERM
    wait "$child"
    code=$?
    while kill -0 "$child" 2> /dev/null; do # a signal ends `wait`, not the run
        wait "$child"
        code=$?
    done
    exit "$(real_code "$code")"
}
