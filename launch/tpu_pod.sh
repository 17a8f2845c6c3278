#!/usr/bin/env bash
# A run on a Cloud TPU slice of any size, by queued resources.
#
#   launch/tpu_pod.sh up --name NAME --zone ZONE --type TYPE [options] -- \
#       --config=configs/vixml.py:VARIANT --workdir=gs://BUCKET/RUN [overrides]
#   launch/tpu_pod.sh status | logs | stop | delete --name NAME --zone ZONE [options]
#   launch/tpu_pod.sh fetch --from gs://BUCKET/RUN --to DIR
#
#   up      creates the slice or takes the one there is, installs this checkout on every worker, starts the run and
#           follows it; after a preemption deletes, creates and starts again; at the end fetches what the workdir
#           holds, checkpoints apart. Ctrl-C leaves slice and run alone; the same command follows them again.
#   status  state of the slice, and of the run on each worker
#   logs    the end of each worker's log
#   stop    the run saves and exits; the slice stays, and costs
#   fetch   the workdir to DIR, checkpoints apart
#   delete  the slice; what is not on gs:// is lost
#
#   --name NAME             of the slice and its request         --zone ZONE    e.g. us-west4-a
#   --type TYPE             e.g. v5litepod-16, v4-32, v5p-16, v6e-16
#   --project PROJECT       gcloud's own if not given
#   --runtime VERSION       of the image; from TYPE if not given
#   --spot                  cheaper, preemptible
#   --service-account MAIL  who the workers are to gs://; no keys
#   --create-flag FLAG      passed to `queued-resources create`; may be repeated (--create-flag=--reserved)
#   --ssh-flag FLAG         passed to `tpu-vm ssh` and `scp` (--ssh-flag=--internal-ip)
#   --commit COMMIT         what to install (HEAD)               --extras NAMES   of setup.py (tpu)
#   --data gs://URL         copied to data/ on every worker, where raw files and dataset folders are looked for
#   --secrets FILE          KEY=VALUE lines (HF_TOKEN=...) for the run's environment; mode 600
#   --to DIR                where results go (runs/NAME)
#   --delete                deletes the slice once the run has ended, well or not
#   --restarts N            after preemptions, at most (20)
#   --dry-run               prints every command, does nothing
# Times in seconds:
#   --timeout (300) of a gcloud call, which is then killed; --install-timeout (1800); --tries (5) of a failing call;
#   --backoff (5) before the second try, doubled for each further one; --poll (30) between looks at the run;
#   --grace (120) that a preemption may take to be reported after workers fail; --queue-timeout (86400) in the queue
#
# Exit codes: 0 the run ended well. 2 usage, of this script or of the run. 3 refused by the cloud (quota, permission),
# not retried. 4 gave up after retries. 130 Ctrl-C. Others are the run's: 1 failed, 143 stopped after saving.
set -euo pipefail

program=tpu_pod.sh
launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname -- "$launch")
dry_run=
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$launch/common.sh"

action=${1-}
case $action in
    up | status | logs | stop | fetch | delete) shift ;;
    --help | -h) help "${BASH_SOURCE[0]}" && exit ;;
    *) die "$usage" "expected up, status, logs, stop, fetch or delete, got $(quoted "$action")" ;;
esac

name='' zone='' type='' project='' runtime='' account='' commit=HEAD extras=tpu data='' secrets='' from='' to=''
spot='' delete='' create_flags=() ssh_flags=()
restarts=20 timeout=300 install_timeout=1800 tries=5 backoff=5 poll=30 grace=120 queue_timeout=86400
while (($#)); do
    if [[ $1 == --?*=* ]]; then
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
    fi
    case $1 in
        --spot) spot=1 && shift && continue ;;
        --delete) delete=1 && shift && continue ;;
        --dry-run) dry_run=1 && shift && continue ;;
        --) shift && break ;;
        --?*) need "$1" $# ;;
    esac
    case $1 in
        --name) name=$2 ;;
        --zone) zone=$2 ;;
        --type) type=$2 ;;
        --project) project=$2 ;;
        --runtime) runtime=$2 ;;
        --service-account) account=$2 ;;
        --create-flag) create_flags+=("$2") ;;
        --ssh-flag) ssh_flags+=("$2") ;;
        --commit) commit=$2 ;;
        --extras) extras=$2 ;;
        --data) data=$2 ;;
        --secrets) secrets=$(absolute "$2") ;;
        --from) from=$2 ;;
        --to) to=$2 ;;
        --restarts) number "$1" "$2" && restarts=$2 ;;
        --timeout) number "$1" "$2" && timeout=$2 ;;
        --install-timeout) number "$1" "$2" && install_timeout=$2 ;;
        --tries) number "$1" "$2" && tries=$2 ;;
        --backoff) number "$1" "$2" && backoff=$2 ;;
        --poll) number "$1" "$2" && poll=$2 ;;
        --grace) number "$1" "$2" && grace=$2 ;;
        --queue-timeout) number "$1" "$2" && queue_timeout=$2 ;;
        *) die "$usage" "$(quoted "$1"): no such option; the run's own come after --" ;;
    esac
    shift 2
done

bucket='^gs://[A-Za-z0-9._/-]+$'
if [[ $action == fetch ]]; then
    matches --from "$from" "$bucket" "gs://BUCKET/RUN"
    [[ $to ]] || die "$usage" "fetch: expected --to DIR"
else
    matches --name "$name" '^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$' "lower-case letters, digits and hyphens"
    matches --zone "$zone" '^[a-z]+-[a-z0-9]+-[a-z]$' "a zone, e.g. us-west4-a"
fi
[[ ! $project ]] || matches --project "$project" '^[a-z0-9.:-]+$' "a project's id"
where=(--zone="$zone")
[[ ! $project ]] || where+=(--project="$project")

stage=${XDG_CACHE_HOME:-${HOME:?}/.cache}/xmc_jax/${name:-fetch}
err='' out='' code=0 job=''

interrupted() {
    [[ ! $job ]] || kill -TERM "$job" 2>/dev/null || true
    if [[ $action == up ]]; then
        say "left alone: the slice, which costs, and the run. The same command follows them again; see also stop, delete"
    fi
    exit 130
}

# Traps wait for what is in the foreground; so nothing is.
pause() {
    if [[ $dry_run || $1 == 0 ]]; then return 0; fi
    sleep "$1" &
    job=$!
    wait "$job" || true
    job=
}

# call LIMIT WORDS...: gcloud, killed after LIMIT seconds. Sets out, err (one line) and code.
call() {
    local limit=$1
    shift
    local command=(timeout --kill-after=10 "$limit" gcloud "$@")
    out='' err='' code=0
    if [[ $dry_run ]]; then
        quoted "${command[@]}"
        return 0
    fi
    "${command[@]}" </dev/null >"$stage/stdout" 2>"$stage/stderr" &
    job=$!
    wait "$job" || code=$?
    job=
    out=$(<"$stage/stdout")
    if ((code == 124 || code == 137)); then
        err="gcloud ${*:1:4}: no answer within $limit s, killed"
    elif ((code)); then
        err=$(grep -m 1 '^ERROR' "$stage/stderr" || tail -n 1 "$stage/stderr") || true
        err=${err:-gcloud ${*:1:4}: exit code $code}
    fi
    return "$code"
}

hopeless='quota|permission|unauthenticated|invalid|unrecognized|credential|active account|reauthentication|not enabled|billing'

# attempt LIMIT WORDS...: the same, several times. Returns 1 where something is not there, 4 when out of tries;
# what trying cannot change ends the script.
attempt() {
    local wait=$backoff try
    for ((try = 1; ; try++)); do
        if call "$@"; then return 0; fi
        if [[ $3 != tpus || $5 != @(ssh|scp) ]]; then # those say what the worker said
            if [[ $err == *NOT_FOUND* || $err == *"was not found"* ]]; then return 1; fi
            if ((code == 2)) || [[ ${err,,} =~ $hopeless ]]; then die "$refused" "$err"; fi
        fi
        if [[ $err == *ALREADY_EXISTS* || $err == *"already exists"* ]]; then return 0; fi # by a killed try
        say "$err"
        if ((try >= tries)); then return 4; fi
        pause "$wait"
        wait=$((wait * 2))
    done
}

insist() { attempt "$@" || die "$gave_up" "$err (${tries} tries); the same command goes on"; }

tpus() { # tpus VERB... after `gcloud compute tpus`; with LIMIT first
    local limit=$1
    shift
    attempt "$limit" compute tpus "$@"
}

# Sets state, as that of queued resources or ABSENT, initiator and reason.
look() {
    local fields='value[separator="|"](state.state,state.stateInitiator,state.failedData.error.message)' result=0
    tpus "$timeout" queued-resources describe "$name" "${where[@]}" --format="$fields" || result=$?
    case $result in
        0) IFS='|' read -r state initiator reason <<<"${out//$'\n'/ }" ;;
        1) state=ABSENT initiator='' reason='' ;;
        *) die "$gave_up" "$err ($tries tries); the same command goes on" ;;
    esac
    if [[ $dry_run ]]; then state=ACTIVE; fi
}

# The slice is gone, or going: queued resources may be ACTIVE for some time after their machines.
gone() {
    look
    if [[ $state != ACTIVE ]]; then return 0; fi
    local result=0
    tpus "$timeout" tpu-vm describe "$name" "${where[@]}" --format='value(state)' || result=$?
    case $result in
        0) node=$out ;;
        1) node=ABSENT ;;
        *) die "$gave_up" "$err ($tries tries); the same command goes on" ;;
    esac
    case $node in
        READY | CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | UNKNOWN) return 1 ;;
    esac
    state=$node
}

create() {
    local words=(queued-resources create "$name" "${where[@]}" --node-id="$name" --accelerator-type="$type"
        --runtime-version="$runtime" --async --quiet)
    [[ ! $spot ]] || words+=(--spot)
    if [[ $account ]]; then
        words+=(--service-account="$account" --scopes=https://www.googleapis.com/auth/cloud-platform)
    fi
    local result=0
    tpus "$timeout" "${words[@]}" ${create_flags[@]+"${create_flags[@]}"} || result=$?
    if ((result == 1)); then die "$refused" "$err"; fi
    if ((result)); then die "$gave_up" "$err ($tries tries)"; fi
}

remove() {
    local round
    note "and until it is gone:"
    tpus "$timeout" queued-resources delete "$name" "${where[@]}" --force --async --quiet || (($? == 1)) ||
        die "$gave_up" "$err ($tries tries); the slice may be there still, and cost"
    for ((round = 0; round < 60; round++)); do
        look
        if [[ $dry_run || $state == ABSENT ]]; then return 0; fi
        pause "$poll"
    done
    die "$gave_up" "$name: still $state; the slice may cost: look at it in the console"
}

restarted=0
again() { # again WHY
    if ((restarted >= restarts)); then
        die "$gave_up" "$1; gave up after $restarts restarts; the same command goes on"
    fi
    restarted=$((restarted + 1))
    say "$1; restart $restarted of $restarts"
    pause "$((backoff * (restarted < 7 ? 2 ** restarted : 128)))"
}

# Until the slice is there and its machines are.
provision() {
    local since=$SECONDS last=''
    while :; do
        if ! gone; then
            if [[ $node == READY ]]; then return 0; fi
            state="ACTIVE, machines $node"
        fi
        if [[ $state != "$last" ]]; then
            say "$name: $state"
            last=$state
        elif ((SECONDS - since >= queue_timeout)); then
            die "$gave_up" "$name: $state after $queue_timeout s; the same command waits on, delete ends it"
        fi
        if [[ $followed && ($state == ABSENT || $initiator == USER) ]]; then
            die "$gave_up" "$name was deleted by someone; the same command creates it again and goes on"
        fi
        case $state in
            ABSENT)
                create
                pause "$((poll / 3))"
                ;;
            FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPING | STOPPED | HID*)
                if [[ $state == FAILED && ${reason,,} =~ $hopeless ]]; then
                    die "$refused" "$reason (the request counts against the quota until tpu_pod.sh delete)"
                fi
                again "$name: $state${reason:+, $reason}"
                followed=
                remove
                ;;
            *) pause "$poll" ;;
        esac
    done
}

on_workers() { # on_workers LIMIT COMMAND; of words that need no quotes
    tpus "$1" tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet ${ssh_flags[@]+"${ssh_flags[@]}"} --command="$2"
}

copy() { # copy TARGET FILE...
    local target=$1
    shift
    tpus "$timeout" tpu-vm scp "$@" "$name:xmc_jax/$target" "${where[@]}" --worker=all --quiet \
        ${ssh_flags[@]+"${ssh_flags[@]}"}
}

worker='bash xmc_jax/tpu_worker.sh'

# Sets the counts of workers by what the run does there, and codes.
survey() {
    local line run what _
    running=0 ended=0 lost=0 idle=0 foreign='' stopped='' codes=()
    call "$timeout" compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet \
        ${ssh_flags[@]+"${ssh_flags[@]}"} \
        --command="test ! -f xmc_jax/tpu_worker.sh && echo xmc_jax - - none || $worker status" || return
    while read -r line _ run what; do
        if [[ $line != xmc_jax ]]; then continue; fi
        if [[ $what == running && $run != "$run_id" ]]; then
            foreign=$run
        elif [[ $run != "$run_id" ]]; then
            idle=$((idle + 1))
        else
            case $what in
                running) running=$((running + 1)) ;;
                exit-0) ended=$((ended + 1)) ;;
                lost) lost=$((lost + 1)) ;;
                stopped-*) stopped=1 codes+=("${what#*-}") ;;
                exit-*) codes+=("${what#*-}") ;;
            esac
        fi
    done <<<"$out"
    if ((!running && !ended && !lost && !idle && !${#codes[@]})) && [[ ! $foreign ]]; then
        err="the workers said nothing that could be read"
        return 1
    fi
}

deploy() {
    say "installing $commit"
    local files=("$launch/tpu_worker.sh" "$stage/source-$commit.tar.gz" "$stage/arguments")
    on_workers "$timeout" 'mkdir -p xmc_jax && chmod 700 xmc_jax' || return
    copy '' "${files[@]}" || return
    if [[ $secrets ]]; then copy secrets "$secrets" || return; fi
    on_workers "$install_timeout" "$worker install $commit $extras${data:+ $data}" || return
    on_workers "$timeout" "$worker start $commit $run_id" || return
    say "started run $run_id"
}

halt() { on_workers "$(($1 + 60))" "$worker stop $1"; }

# Workers that wait for one that failed do not end by themselves. False if the slice is gone.
halt_or_recreate() {
    if halt 60; then return 0; fi
    local why=$err
    if gone; then return 1; fi
    die "$gave_up" "workers of $name do not answer: $why; the same command tries again"
}

fetch() { # fetch FROM TO
    run mkdir -p -- "$2"
    insist "$install_timeout" storage rsync --recursive --exclude='(^|.*/)(checkpoints|compiled)/.*' "$1" "$2"
}

finish() { # finish CODE
    on_workers "$timeout" "$worker log 2000" || say "no logs: $err"
    if [[ ! $dry_run ]]; then
        mkdir -p -- "$to"
        printf '%s\n' "$out" >"$to/workers.log"
        if (($1)); then tail -n 20 -- "$to/workers.log" >&2; fi
    fi
    if (($1 == 0)); then fetch "$workdir" "$to"; fi
    if [[ $delete ]]; then
        remove
        say "$name: deleted"
    else
        say "$name is there still, and costs; tpu_pod.sh delete ends that"
    fi
    [[ ! $dry_run ]] || exit 0
    case $1 in
        0) say "done; results in $to" && exit 0 ;;
        130 | 143) say "the run was stopped and has saved; the same command goes on" && exit "$1" ;;
        *) die "$1" "the run ended with exit code $1; logs in $to/workers.log" ;;
    esac
}

prepare() {
    commit=$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}") ||
        die "$usage" "--commit: no such commit in $root"
    if [[ $(git -C "$root" status --porcelain --untracked-files=no) ]]; then
        say "note: changes that are not committed are not part of the run"
        note "changes that are not committed are not part of the run"
    fi
    run_id=$(printf '%s\0' "$commit" "$extras" "$data" "$@" | sha256sum | cut -c 1-12)
    run mkdir -p -- "$stage"
    run chmod 700 "$stage"
    run git -C "$root" archive --format=tar.gz --output="$stage/source-$commit.tar.gz" "$commit"
    if [[ $dry_run ]]; then
        printf '%s > %s\n' "$(quoted printf '%s\0' "$@")" "$(quoted "$stage/arguments")"
    else
        printf '%s\0' "$@" >"$stage/arguments"
    fi
}

up() {
    local argument why failures=0 waited exit_code
    workdir='' followed=''
    matches --type "$type" '^[a-z0-9]+-[0-9]+$' "an accelerator type, e.g. v5litepod-16"
    if [[ ! $runtime ]]; then
        case $type in
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            *) runtime=tpu-ubuntu2204-base ;;
        esac
    fi
    matches --runtime "$runtime" '^[a-z0-9.-]+$' "a version of the TPU runtime"
    matches --extras "$extras" '^[a-z0-9_]+(,[a-z0-9_]+)*$' "names with commas"
    [[ ! $data ]] || matches --data "$data" "$bucket" "gs://BUCKET/FOLDER"
    [[ ! $account ]] || matches --service-account "$account" '^[^@[:space:]]+@[^@[:space:]]+$' "an e-mail address"
    [[ ! $secrets ]] || check_secrets "$secrets"
    check_arguments "$@"
    for argument; do
        case $argument in --workdir=*) workdir=${argument#*=} ;; esac
    done
    # A preempted slice takes its disks with it, and checkpoints are written by all workers.
    matches "the run's --workdir=" "$workdir" "$bucket" "gs://BUCKET/RUN after --"
    to=${to:-$root/runs/$name}
    prepare "$@"

    if [[ $dry_run ]]; then
        look
        note "if there is none:"
        create
        note "until it is ACTIVE and its machines are READY:"
        state=ACTIVE
        gone || true
        note "unless the run is going on already:"
        deploy
        note "every $poll s, until it has ended:"
        survey || true
        note "after a preemption, and then all from the creation on:"
        remove
        note "at the end:"
        finish 0
    fi

    while :; do
        provision
        if ! survey; then
            why=$err
            say "$why"
            if gone; then continue; fi
            failures=$((failures + 1))
            if ((failures >= tries)); then
                die "$gave_up" "workers of $name do not answer: $why; the run may go on, the same command looks again"
            fi
            pause "$poll"
            continue
        fi
        failures=0

        if [[ $foreign ]]; then
            die "$usage" "$name: another run, $foreign, is going on there; end it with stop, or give its arguments and commit"
        elif ((running && !lost && !idle && !${#codes[@]})); then
            [[ $followed ]] || say "following run $run_id on $((running + ended)) workers"
            followed=1
            pause "$poll"
        elif ((ended && !running && !lost && !idle && !${#codes[@]})); then
            finish 0
        elif [[ ! $followed ]]; then # nothing there, or what an earlier command left
            if ((running)); then halt_or_recreate || continue; fi
            if deploy; then
                followed=1
                continue
            fi
            why=$err
            if ! gone; then die "$gave_up" "installing failed: $why; the same command tries again"; fi
        else
            exit_code=0
            for argument in ${codes[@]+"${codes[@]}"}; do
                if ((argument == 2)); then finish 2; fi
                if ((!exit_code || argument == 143 || argument == 75)); then exit_code=$argument; fi
            done
            if [[ $stopped ]]; then
                if ((!running)); then finish "$exit_code"; fi
                pause "$poll" # the others are saving
                continue
            fi
            say "the run failed on $((lost + ${#codes[@]})) workers, exit codes ${codes[*]:-unknown}"
            for ((waited = 0; waited <= grace; waited += poll + 1)); do
                if gone; then continue 2; fi
                pause "$poll"
            done
            halt_or_recreate || continue
            if ((exit_code && exit_code != 143 && exit_code != 75)); then finish "$exit_code"; fi
            # Restarted machines, a process that was lost or stuck (75), or told to save by something else.
            again "$name: the run was interrupted on a slice that is there"
            followed=
        fi
    done
}

trap interrupted INT TERM
[[ $dry_run ]] || mkdir -p -- "$stage"
case $action in
    up) up "$@" ;;
    status)
        look
        printf '%s: %s%s\n' "$name" "$state" "${reason:+, $reason}"
        if [[ $dry_run || $state == ACTIVE ]]; then
            on_workers "$timeout" "$worker status" || die "$gave_up" "workers do not answer: $err"
            printf '%s\n' "$out"
        fi
        ;;
    logs)
        on_workers "$timeout" "$worker log 100" || die "$gave_up" "$err"
        printf '%s\n' "$out"
        ;;
    stop)
        halt 600 || die "$gave_up" "$err"
        say "stopped; $name is there still, and costs; tpu_pod.sh delete ends that"
        ;;
    fetch) fetch "$from" "$to" ;;
    delete)
        remove
        say "$name: deleted"
        ;;
esac
