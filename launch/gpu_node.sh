#!/usr/bin/env bash
# A run on one machine with NVIDIA GPUs: one process, all GPUs.
#
#   launch/gpu_node.sh [options] -- --config=configs/vixml.py:VARIANT --workdir=DIR [overrides]
#
#   --venv DIR        where to install (.venv-gpu in the checkout)
#   --extras NAMES    cuda12 or cuda13; from the driver if not given. More with commas: cuda12,vision
#   --no-install      run with what is in --venv
#   --deterministic   adds --xla_gpu_deterministic_ops=true to XLA_FLAGS: bit-identical resumption, slower
#   --secrets FILE    KEY=VALUE lines (HF_TOKEN=...) for the run's environment; mode 600
#   --restarts N      after crashes, at most (3)
#   --backoff SECONDS before the first restart, doubled for each further one (10)
#   --timeout SECONDS that nvidia-smi may take (60)
#   --dry-run         print every command, do nothing
#
# Exit codes: the run's own. Not restarted: 0, 2 (usage) and runs told to stop (SIGTERM, Ctrl-C), which
# save and exit with 143; the same command goes on. 3: no usable GPU or driver.
# No XLA flag is set unless asked for; XLA_FLAGS and XLA_PYTHON_CLIENT_MEM_FRACTION pass through.
set -euo pipefail

program=gpu_node.sh
launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname -- "$launch")
dry_run=
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$launch/common.sh"

venv=$root/.venv-gpu extras='' install=1 deterministic='' secrets='' restarts=3 backoff=10 timeout=60
while (($#)); do
    if [[ $1 == --?*=* ]]; then
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
    fi
    case $1 in
        --venv) need "$1" $# && venv=$(absolute "$2") && shift ;;
        --extras) need "$1" $# && extras=$2 && shift ;;
        --no-install) install= ;;
        --deterministic) deterministic=1 ;;
        --secrets) need "$1" $# && secrets=$(absolute "$2") && shift ;;
        --restarts) need "$1" $# && number "$1" "$2" && restarts=$2 && shift ;;
        --backoff) need "$1" $# && number "$1" "$2" && backoff=$2 && shift ;;
        --timeout) need "$1" $# && number "$1" "$2" && timeout=$2 && shift ;;
        --dry-run) dry_run=1 ;;
        --help | -h) help "${BASH_SOURCE[0]}" && exit ;;
        --) shift && break ;;
        *) die "$usage" "$(quoted "$1"): no such option; the run's own come after --" ;;
    esac
    shift
done
(($#)) || die "$usage" "expected the run's arguments after --, e.g. -- --config=configs/vixml.py --workdir=runs/a"
check_arguments "$@"
[[ ! $secrets ]] || check_secrets "$secrets"

# A line per GPU: "0, NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15, 9.0".
query=(timeout --kill-after=5 "$timeout" nvidia-smi "--format=csv,noheader"
    "--query-gpu=index,name,memory.total,driver_version,compute_cap")
if [[ $dry_run ]]; then quoted "${query[@]}"; fi
if gpus=$("${query[@]}" 2>&1) && [[ $gpus =~ ^[0-9]+, ]]; then
    while IFS= read -r line; do
        note "GPU $line"
        say "GPU $line"
    done <<<"$gpus"
elif [[ $dry_run ]]; then
    note "nvidia-smi does not answer here; cuda12 is assumed"
    extras=${extras:-cuda12}
else
    die "$refused" "nvidia-smi: expected a line per GPU, got ${gpus:-no answer within $timeout s}"
fi

if [[ ! $extras ]]; then
    # jax[cuda13] needs driver 580 and compute capability 7.5, jax[cuda12] driver 525.
    driver=$(head -n 1 <<<"$gpus" | awk -F', *' '{print $(NF - 1)}')
    oldest=$(awk -F', *' '{print $NF}' <<<"$gpus" | sort -V | head -n 1)
    [[ $driver =~ ^[0-9]+(\.[0-9]+)*$ ]] || die "$refused" "nvidia-smi: expected a driver's version, got $driver"
    if ((${driver%%.*} >= 580)) && [[ $(printf '%s\n' 7.5 "$oldest" | sort -V | head -n 1) == 7.5 ]]; then
        extras=cuda13
    elif ((${driver%%.*} >= 525)); then
        extras=cuda12
    else
        die "$refused" "driver $driver: expected 525 or later for cuda12, 580 or later for cuda13"
    fi
    say "driver $driver: $extras"
fi

if [[ $install ]]; then
    run bash "$launch/install.sh" "$venv" "$extras"
elif [[ ! $dry_run && ! -x $venv/bin/python ]]; then
    die "$usage" "--no-install: no $venv/bin/python"
fi

command=(bash "$launch/with_secrets.sh" "$secrets" "$venv/bin/python" -m xmc_jax.main --distributed=off "$@")
run cd "$root"
if [[ $deterministic ]]; then
    run export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_gpu_deterministic_ops=true"
fi
if [[ $dry_run ]]; then
    quoted "${command[@]}"
    note "again after a crash, at most $restarts times"
    exit 0
fi

child='' stopped=''
# Python gets SIGTERM for Ctrl-C too: background processes of a script ignore SIGINT.
stop() {
    stopped=1
    if [[ $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop TERM INT HUP

for ((attempt = 0; ; attempt++)); do
    "${command[@]}" &
    child=$!
    code=0
    wait_for "$child" || code=$?
    child=
    case $code in
        0) exit 0 ;;
        2) die 2 "usage error; see above" ;;
        130 | 143) say "told to stop; the same command goes on" && exit "$code" ;;
    esac
    [[ ! $stopped ]] || exit "$code"
    ((attempt < restarts)) || die "$code" "exit code $code; gave up after $restarts restarts"
    say "exit code $code; restart $((attempt + 1)) of $restarts in $backoff s"
    sleep "$backoff" &
    wait $! || true
    [[ ! $stopped ]] || exit 143
    backoff=$((backoff * 2))
done
