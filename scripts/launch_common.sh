# Read by the launchers: the check before anything starts, where the log is, and the run's own exit code.
set -uo pipefail
python=${PYTHON:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python} # `make install` makes it
[ -x "$(command -v "$python")" ] || python=python3
dry_run=

# refuse MESSAGE: what is wrong, where, what to do; exit code 2.
refuse() {
    echo "error: $1" >&2
    exit 2
}

# option WORD: of those that all launchers have; false for a word that is none.
option() {
    case $1 in
        --dry-run) dry_run=yes ;;
        -h | --help) sed -n '/^source/q; s/^# //p; s/^#$//p' "$0" && exit ;; # the head of the script
        -*) refuse "there is no option '$1'; --help shows those that there are" ;;
        *) return 1 ;;
    esac
}

# given OPTION [VALUE ...]: the option has a value.
given() {
    [ -n "${2:-}" ] || refuse "$1 needs a value; --help shows which"
}

# whole LEAST OPTION [VALUE ...]: it is a whole number from LEAST to 65535, the last port and enough for all the others.
whole() {
    given "${@:2}"
    { [[ $3 =~ ^(0|[1-9][0-9]{0,4})$ ]] && (($1 <= $3 && $3 <= 65535)); } ||
        refuse "$2 '$3' must be a whole number from $1 to 65535"
}

# check PROCESSES key=value ...: all breaches of the configuration in one message and exit code 2, else sets run_dir.
check() {
    local processes=$1 config word
    shift
    for word; do
        [[ $word != -* ]] || refuse "'$word' is no key=value; launcher options stand before key=value"
    done
    config=$(WORLD_SIZE=$processes "$python" -m nsa_train config "$@") || exit $?
    run_dir=$("$python" -c 'import pathlib, sys, yaml; c = yaml.safe_load(sys.stdin)
print(pathlib.Path(c["runs_dir"], c["name"]))' <<< "$config")
    # Else logs would go into the root of the file system.
    [ -n "$run_dir" ] || refuse "$python names no run folder; let PYTHON name an interpreter that has this package"
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
