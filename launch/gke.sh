#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster, as a JobSet: launch/gke_jobset.yaml filled in and handed to kubectl.
#
#   launch/gke.sh up --name NAME --image IMAGE --accelerator LABEL --topology AxB [options] -- \
#       --config=configs/vixml.py:VARIANT --workdir=gs://BUCKET/RUN [overrides]
#   launch/gke.sh render ...       the manifest alone, with the options of up
#   launch/gke.sh status | logs | delete --name NAME [--namespace NAMESPACE]
#
#   --image IMAGE           of launch/Dockerfile
#   --accelerator LABEL     of the node pool, e.g. tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology AxB[xC]      of the node pool, e.g. 4x4
#   --chips N               of a host (4)
#   --service-account NAME  of Kubernetes, bound to one that may use gs:// (default)
#   --data gs://URL         copied to data/ on every worker first
#   --secrets FILE          KEY=VALUE lines (HF_TOKEN=...), made the secret NAME of the cluster; mode 600
#   --restarts N            after failures and preemptions, at most (10)
#   --template FILE         another gke_jobset.yaml, e.g. one edited for GPUs
#   --namespace NAMESPACE   (default)       --context CONTEXT   of kubectl
#   --timeout SECONDS       of a kubectl call, which is then killed (60)
#   --dry-run               prints the manifest, as comments, and every command; does nothing
#
# Exit codes: 0 done (up returns once the JobSet is there), 2 usage, 4 kubectl failed.
set -euo pipefail

program=gke.sh
launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
dry_run=
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$launch/common.sh"

action=${1-}
case $action in
    up | render | status | logs | delete) shift ;;
    --help | -h) help "${BASH_SOURCE[0]}" && exit ;;
    *) die "$usage" "expected up, render, status, logs or delete, got $(quoted "$action")" ;;
esac

name='' namespace=default context='' image='' accelerator='' topology='' chips=4 account=default data='' secrets=''
restarts=10 timeout=60 template=$launch/gke_jobset.yaml
while (($#)); do
    if [[ $1 == --?*=* ]]; then
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
    fi
    case $1 in
        --dry-run) dry_run=1 && shift && continue ;;
        --) shift && break ;;
        --?*) need "$1" $# ;;
    esac
    case $1 in
        --name) name=$2 ;;
        --namespace) namespace=$2 ;;
        --context) context=$2 ;;
        --image) image=$2 ;;
        --accelerator) accelerator=$2 ;;
        --topology) topology=$2 ;;
        --chips) number "$1" "$2" && chips=$2 ;;
        --service-account) account=$2 ;;
        --data) data=$2 ;;
        --secrets) secrets=$(absolute "$2") ;;
        --restarts) number "$1" "$2" && restarts=$2 ;;
        --template) template=$2 ;;
        --timeout) number "$1" "$2" && timeout=$2 ;;
        *) die "$usage" "$(quoted "$1"): no such option; the run's own come after --" ;;
    esac
    shift 2
done
label='^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$'
matches --name "$name" "$label" "lower-case letters, digits and hyphens, 40 at most"
matches --namespace "$namespace" '^[a-z0-9]([-a-z0-9]*[a-z0-9])?$' "a namespace"

# json TEXT: as a JSON string; other control characters than these are refused below.
json() {
    local text=$1 escape="\\"
    text=${text//"$escape"/"$escape$escape"}
    text=${text//'"'/"$escape"'"'}
    text=${text//$'\n'/"${escape}n"}
    text=${text//$'\r'/"${escape}r"}
    text=${text//$'\t'/"${escape}t"}
    printf '"%s"' "$text"
}

# Kubernetes replaces $(NAME) in arguments; $$ stands for $.
list() {
    local argument separator=''
    printf '['
    for argument; do
        printf '%s%s' "$separator" "$(json "${argument//\$/'$$'}")"
        separator=', '
    done
    printf ']'
}

# One pass: what is filled in is not looked at again.
render() {
    local pattern='^([^$]*)\$\{([A-Z_]+)\}(.*)$' rest text key
    while IFS= read -r rest || [[ $rest ]]; do
        text=''
        while [[ $rest =~ $pattern ]]; do
            key=${BASH_REMATCH[2]}
            [[ ${values[$key]+set} ]] || die "$usage" "$template: no value for $key"
            text+=${BASH_REMATCH[1]}${values[$key]}
            rest=${BASH_REMATCH[3]}
        done
        printf '%s\n' "$text$rest"
    done <"$template"
}

kubectl=(timeout --kill-after=10 "$timeout" kubectl --namespace="$namespace")
[[ ! $context ]] || kubectl+=(--context="$context")
ask() {
    run "${kubectl[@]}" "$@" </dev/null || die "$gave_up" "kubectl $1 failed; see above"
}

if [[ $action == up || $action == render ]]; then
    matches --image "$image" '^[A-Za-z0-9][A-Za-z0-9._/:@-]*$' "an image"
    matches --accelerator "$accelerator" '^[a-z0-9]([-a-z0-9]*[a-z0-9])?$' "a label of a node pool"
    matches --topology "$topology" '^[1-9][0-9]*(x[1-9][0-9]*){1,2}$' "e.g. 4x4 or 2x2x4"
    matches --service-account "$account" '^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$' "the name of a service account"
    [[ ! $data ]] || matches --data "$data" '^gs://[A-Za-z0-9._/-]+$' "gs://BUCKET/FOLDER"
    [[ ! $secrets ]] || check_secrets "$secrets"
    check_arguments "$@"
    workdir=''
    for argument; do
        [[ ! ${argument//[$'\n\r\t']/} =~ [[:cntrl:]] ]] ||
            die "$usage" "an argument has a control character: $(quoted "$argument")"
        case $argument in --workdir=*) workdir=${argument#*=} ;; esac
    done
    matches "the run's --workdir=" "$workdir" '^gs://[A-Za-z0-9._/-]+$' "gs://BUCKET/RUN after --"
    [[ -f $template ]] || die "$usage" "--template: no such file: $(quoted "$template")"

    all=$((${topology//x/*}))
    ((chips > 0 && all % chips == 0)) || die "$usage" "--topology $topology: $all chips, not a multiple of --chips $chips"
    declare -A values=(
        [NAME]=$(json "$name") [NAMESPACE]=$(json "$namespace") [IMAGE]=$(json "$image")
        [SERVICE_ACCOUNT]=$(json "$account") [ACCELERATOR]=$(json "$accelerator") [TOPOLOGY]=$(json "$topology")
        [CHIPS]=$chips [HOSTS]=$((all / chips)) [RESTARTS]=$restarts [DATA]=$(json "$data") [SECRET]=$(json "$name")
        [ARGUMENTS]=$(list --distributed=auto --compilation_cache="$workdir/compiled" "$@")
    )
fi

case $action in
    render) render ;;
    up)
        stage=${XDG_CACHE_HOME:-${HOME:?}/.cache}/xmc_jax/$name
        run mkdir -p -- "$stage"
        if [[ $dry_run ]]; then
            note "into $stage/jobset.yaml:"
            render | sed 's/^/#   /'
        else
            render >"$stage/jobset.yaml"
        fi
        if [[ $secrets ]]; then
            # kubectl reads the file; `apply` would keep its content in an annotation.
            ask delete secret "$name" --ignore-not-found
            ask create secret generic "$name" --from-env-file="$secrets"
        fi
        # Refused where there is one of that name.
        ask create --filename="$stage/jobset.yaml"
        ;;
    status)
        ask get jobset "$name"
        ask get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
        ;;
    logs) ask logs --selector="jobset.sigs.k8s.io/jobset-name=$name" --container=train --tail=100 --prefix ;;
    delete)
        ask delete jobset "$name" --ignore-not-found --wait=false
        ask delete secret "$name" --ignore-not-found
        ;;
esac
