#!/usr/bin/env bash
# Sets up the project on any machine and starts its commands; ./launch.sh help lists them. It checks its arguments and makes
# the virtual environment. The code of the commands is in cluster/, trainer/, data/ and tests/.
set -euo pipefail

readonly COMMANDS="quickstart, train, sweep, slurm, ray, kubernetes, status, logs, stop, test, ui, help"
# A finished environment with the CPU build of torch takes 2.3 GB, and pip unpacks 0.6 GB of downloads on the way.
readonly NEEDED_GB=4
# What pip prints when it fails for a cause that can be named.
readonly DISK_FULL='No space left on device|Errno 28|[Dd]isk quota exceeded'
readonly NO_NETWORK='Failed to establish a new connection|Failed to resolve|name resolution|Network is unreachable|ProxyError|Cannot connect to proxy|timed out|Connection refused'

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=${DDGAN_VENV:-$root/.venv}
[[ $venv = /* ]] || venv=$PWD/$venv
venv=${venv%/}
venv_python=$venv/bin/python
state=$venv/ddgan-setup # the checkout and the lock that the environment was made for, or "unfinished", or "incomplete"
log=$venv/ddgan-setup.log

say() { printf 'launch.sh: %s\n' "$1" >&2; }

fail() { # MESSAGE [EXIT CODE]
    say "$1"
    exit "${2:-1}"
}

print_help() {
    cat <<EOF
./launch.sh COMMAND [ARGUMENTS]

  quickstart        set up, prepare the embedded digits, train on 2 CPU cores, evaluate the samples
  train ARGUMENTS   set up, then preflight and python -m trainer.run ARGUMENTS, such as: train --config digits --dry-run
                    (train --help lists them; the same command again resumes a run)
  sweep ARGUMENTS   train with each combination of some settings: sweep --config digits --vary training.r1_gamma=0.02,0.1
                    --vary run.seed=0-2 (on the Ray in RAY_ADDRESS, or one of its own; the same command goes on)
  slurm ARGUMENTS   submit a job: slurm --config lsun256 --nodes 2 --gpus-per-node 8 --time 24:00:00
  ray ARGUMENTS     submit a job to a Ray cluster: ray --address http://127.0.0.1:8265 --config lsun256
  kubernetes ARGUMENTS
                    submit a RayJob: kubernetes --config lsun256 --image IMAGE --nodes 2 --gpus-per-node 8
                    (each prints what it submits, with --dry-run nothing more; --help lists its arguments; what follows
                    -- goes to trainer.run; docs/ has a page for each)
  status RUN        show the state of a run, given its directory or the name that its launcher printed
  logs [-f] RUN     show what its driver printed
  stop RUN          have it write a checkpoint and end
  test [ARGUMENTS]  set up, then ruff, pyright and pytest; ARGUMENTS go to pytest, such as: test -m "not slow"
  ui [--port PORT]  set up, then show the MLflow store of runs/ at http://127.0.0.1:PORT (5000 if left out); the pages ask
                    for the user and the password that it prints
  help              this text

Every command works from any current directory and any number of times; paths in ARGUMENTS and in configs start at
$root

Set-up makes a virtual environment once, from requirements.lock, and again only when that file changes. It reads:
  PYTHON       the Python to make it with, 3.11 or later; else python3.13, python3.12, python3.11 or python3
  DDGAN_VENV   where it lies; now $venv
  PIP_*        pip's own settings. On Linux the usual index has torch for CUDA, several GB more than the $NEEDED_GB GB of
               the CPU build; PIP_EXTRA_INDEX_URL, set to PyTorch's index of CPU builds, gets that one

Exit codes: 0 done; 2 wrong arguments or an unfit machine (Python, port, folder); 75 training was stopped after a checkpoint,
the same command resumes; otherwise that of what failed.
EOF
}

main() {
    local command=${1:-}
    [[ $# -gt 0 ]] || fail "no command is given; allowed are $COMMANDS" 2
    shift
    case $command in
        help | -h | --help)
            no_arguments help "$@"
            print_help
            return
            ;;
        quickstart | test | ui)
            case ${1:-} in -h | --help) print_help && return ;; esac
            ;;
        train) [[ $# -gt 0 ]] || fail "train needs arguments, such as: ./launch.sh train --config digits" 2 ;;
        sweep | slurm | ray | kubernetes) [[ $# -gt 0 ]] || fail "$command needs arguments: ./launch.sh $command --help" 2 ;;
        status | logs | stop) [[ $# -gt 0 ]] || fail "$command needs a run, such as: ./launch.sh $command runs/mine" 2 ;;
        -*) fail "unknown option $command; first comes a command: $COMMANDS" 2 ;;
        *) fail "unknown command $command; allowed are $COMMANDS" 2 ;;
    esac
    case $command in
        quickstart) no_arguments quickstart "$@" ;;
        ui) read_port "$@" ;;
    esac
    set_up
    cd "$root"
    export PATH="$venv/bin:$PATH" # Ray and torch start their helpers by name
    case $command in
        quickstart) quickstart ;;
        train | slurm | ray | kubernetes | status | logs | stop) exec "$venv_python" -m cluster.launch "$command" "$@" ;;
        sweep) exec "$venv_python" -m cluster.sweep "$@" ;;
        test) check_and_test "$@" ;;
        ui) exec "$venv_python" -m cluster.store_ui --port "$port" ;;
    esac
}

no_arguments() { # COMMAND ARGUMENTS
    [[ $# -eq 1 ]] || fail "$1 takes no arguments, but $2 is given" 2
}

# ---- commands ----

quickstart() {
    say "preparing the digits in datasets/digits"
    "$venv_python" -m data.prepare digits --out datasets/digits
    say "training on 2 CPU cores; stop it with Ctrl-C, and the same command resumes from the last checkpoint"
    "$venv_python" -m trainer.run --config digits-fast || {
        local code=$?
        [[ $code -ne 75 ]] || say "training was stopped before its end; the same command resumes it"
        exit "$code"
    }
    say "evaluating the samples"
    "$venv_python" -m trainer.evaluate --run runs/digits-fast --reference datasets/digits --picture runs/digits-fast/picture.png
    local store="$root/runs/mlflow.db (to look at it: ./launch.sh ui)"
    [[ -z ${MLFLOW_TRACKING_URI:-} ]] || store="the one that MLFLOW_TRACKING_URI names"
    cat <<EOF

picture       $root/runs/digits-fast/picture.png (real digits, samples, curves)
samples       $root/runs/digits-fast/samples
checkpoints   $root/runs/digits-fast/checkpoints
MLflow store  $store
EOF
}

check_and_test() { # pytest comes last, so that its closing line is the last one; pyright runs next to it
    "$venv_python" -m ruff check .
    "$venv_python" -m ruff format --check .
    local types code=0
    types=$(mktemp)
    "$venv_python" -m pyright --pythonpath "$venv_python" >"$types" 2>&1 &
    local checker=$!
    # Hundreds of processes import the code, and would compile it each time where the environment forbids to keep that.
    # It is kept beside the sources, where pip has put that of the libraries.
    unset PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX
    # Three processes: two wait for clusters while one computes. The last -n counts: test -n 0 takes one.
    "$venv_python" -m pytest -n 3 "$@" || code=$?
    wait "$checker" || {
        code=$?
        cat "$types" >&2
    }
    rm -f "$types"
    return "$code"
}

port=5000
read_port() { # [--port PORT]
    [[ $# -gt 0 ]] || return 0
    case $1 in
        --port)
            [[ $# -gt 1 ]] || fail "--port needs a number from 1024 to 65535" 2
            port=$2
            shift 2
            ;;
        --port=*)
            port=${1#--port=}
            shift
            ;;
    esac
    [[ $# -eq 0 ]] || fail "ui does not know $1; allowed is --port PORT" 2
    if [[ ! $port =~ ^[1-9][0-9]{3,4}$ ]] || ((port < 1024 || port > 65535)); then
        fail "--port is $port; allowed is a number from 1024 to 65535" 2
    fi
}

# ---- set-up ----

set_up() {
    check_existing
    if is_set_up; then return; fi
    local parent
    parent=$(dirname "$venv")
    mkdir -p "$parent" 2>/dev/null || fail "cannot make the folder $parent; name another: DDGAN_VENV=/some/folder/venv" 2
    { : >>"$venv.lock"; } 2>/dev/null ||
        fail "cannot write in $parent (full, or not yours); name another folder: DDGAN_VENV=/some/folder/venv" 2
    ( # a lock of its own process: it ends with the set-up, whatever way that ends
        if command -v flock >/dev/null && ! flock -n 9; then
            say "waiting for another launch.sh that sets up $venv"
            flock 9
        fi
        if is_set_up; then exit 0; fi
        install
    ) 9>>"$venv.lock"
}

is_set_up() {
    [[ -f $state ]] && wanted_state | cmp -s - "$state" && runs "$venv_python"
}

wanted_state() { # the checkout too: the project is installed in place, so an environment belongs to one folder
    printf '%s\n' "$root"
    cat "$root/requirements.lock"
}

runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

check_existing() { # refuse a folder that is none of ours, and a Python other than the one asked for
    [[ -e $venv ]] || return 0
    [[ -d $venv ]] || fail "$venv is a file; move it away, or name a folder: DDGAN_VENV=/some/folder/venv" 2
    if [[ ! -e $venv/pyvenv.cfg && ! -e $state && -n $(ls -A "$venv") ]]; then
        fail "$venv holds something else than a virtual environment; name another folder: DDGAN_VENV=/some/folder/venv" 2
    fi
    local wanted found
    if [[ -n ${PYTHON:-} ]] && runs "$venv_python"; then
        wanted=$(version_of "$PYTHON") || fail "PYTHON is $PYTHON, which does not run as a Python" 2
        found=$(version_of "$venv_python")
        [[ ${wanted%.*} = "${found%.*}" ]] ||
            fail "$venv is made with Python $found, but PYTHON=$PYTHON is $wanted; leave PYTHON out, remove that folder, or name another: DDGAN_VENV=/some/folder/venv" 2
    fi
}

install() {
    if [[ ! -e $venv ]]; then
        make_venv
    elif ! runs "$venv_python" || ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        say "the Python or the pip of $venv does not run; making it again"
        make_venv
    elif [[ -f $state && $(head -n 1 "$state") = unfinished ]]; then
        say "the last set-up of $venv did not end; making it again"
        make_venv
    fi
    say "installing requirements.lock into $venv: some minutes, and several hundred MB to load"
    say "pip's log is $log"
    printf 'unfinished\n' >"$state"
    # The build tools come first and from the lock, so that what has to be built is built with pinned versions.
    run_pip --requirement <(grep -E '^(setuptools|wheel)==' "$root/requirements.lock")
    run_pip --no-build-isolation --requirement "$root/requirements.lock"
    run_pip --no-build-isolation --no-deps --editable "$root"
    wanted_state >"$state.tmp"
    mv "$state.tmp" "$state" # last and at once: without it the next start begins again
    say "set-up is done"
}

make_venv() {
    local free python words
    free=$(free_mb "$venv")
    ((free >= NEEDED_GB * 1024)) ||
        fail "the disk of $venv has $free MB free, set-up needs $NEEDED_GB GB: free some, or name a folder on another disk: DDGAN_VENV=/some/folder/venv" 2
    python=$(find_python)
    say "making the virtual environment $venv with $python ($(version_of "$python"))"
    if ! words=$("$python" -m venv --clear "$venv" 2>&1); then
        [[ ! $words =~ $DISK_FULL ]] || fail "$(disk_full_words)"
        fail "$python -m venv $venv failed: $(tail -n 1 <<<"$words")"
    fi
}

find_python() { # the first Python that is new enough and can make a virtual environment
    local candidates=(python3.13 python3.12 python3.11 python3) candidate version rest found=""
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate") || continue # not there, or a stand-in that runs nothing
        rest=${version#*.}
        if [[ ! $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || ((${version%%.*} * 1000 + ${rest%%.*} < 3011)); then
            found+="; $candidate is Python $version, too old"
        elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            found+="; $candidate ($version) lacks venv or ensurepip, on Debian the package python${version%.*}-venv"
        else
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no usable Python${found:-; none of ${candidates[*]} runs}. 3.11 or later is needed: install one, or name it: PYTHON=/path/to/python3.11 ./launch.sh ..." 2
}

free_mb() { # FOLDER: free space on its disk, also where the folder is still to be made
    local folder=$1
    while [[ ! -e $folder ]]; do folder=$(dirname "$folder"); done
    df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1024) }'
}

run_pip() { # ARGUMENTS of pip install
    local words
    # PIP_USER, which some clusters set, would install outside of the environment.
    if words=$(PIP_USER=0 "$venv_python" -m pip install --no-input --disable-pip-version-check "$@" 2>&1 | sift); then
        return
    fi
    [[ ! $words =~ $DISK_FULL ]] || fail "$(disk_full_words)"
    local last
    last=$(tail -n 1 <<<"${words:-it said nothing}")
    # Without an index pip first complains of the connection and ends with a word about versions.
    if [[ $words =~ $NO_NETWORK && $last =~ $NO_NETWORK|'No matching distribution' ]]; then
        printf 'incomplete\n' >"$state" # pip loads everything before it installs anything: nothing is half done
        fail "pip reached no package index: check the network or pip's settings (PIP_INDEX_URL, proxy), then give the same command again; pip's log is $log"
    fi
    fail "pip failed: $last; pip's log is $log"
}

sift() { # pip's output to the log, its large downloads to the user, its complaints to the caller
    local line
    while IFS= read -r line; do
        # A full disk cuts the log short, which is why nothing is read back from it.
        { printf '%s\n' "$line" >>"$log"; } 2>/dev/null || true
        if [[ $line =~ (Downloading|Using cached)\ .*\([0-9]{2,}(\.[0-9]+)?\ MB\) ]]; then
            printf '  %s\n' "${BASH_REMATCH[0]}" >&2
        elif [[ $line = "Installing collected packages:"* ]]; then
            printf '  %.100s\n' "$line" >&2
        elif [[ $line =~ ERROR|$DISK_FULL|$NO_NETWORK ]]; then
            printf '%s\n' "$line"
        fi
    done
}

disk_full_words() {
    local temporary=${TMPDIR:-/tmp}
    printf '%s' "the disk became full during set-up: $(free_mb "$venv") MB are free for $venv, $(free_mb "$temporary") MB " \
        "for temporary files in $temporary; free some ($NEEDED_GB GB are needed, several more for torch with CUDA), or name " \
        "folders on another disk: DDGAN_VENV=/some/folder/venv TMPDIR=/some/folder; then give the same command again"
}

main "$@"
