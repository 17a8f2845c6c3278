#!/usr/bin/env bash
# Runs on each worker of a TPU slice; tpu_pod.sh copies it to ~/xmc_jax and calls it by ssh.
#
#   tpu_worker.sh install COMMIT EXTRAS [DATA]   unpack, install; copy DATA, a gs:// folder, to ~/xmc_jax/data
#   tpu_worker.sh start COMMIT RUN               the run in the background, unless it is going on
#   tpu_worker.sh status                         one line: "xmc_jax HOST RUN STATE", STATE being running, exit-N,
#                                                stopped-N (by `stop`), lost (killed or rebooted) or none
#   tpu_worker.sh stop SECONDS                   SIGTERM, and SIGKILL after SECONDS
#   tpu_worker.sh log LINES                      the end of the log, with the host's name
#
# In ~/xmc_jax lie: source-COMMIT.tar.gz, arguments (NUL after each), secrets if there are any; the run's pid, log
# and exit code. ssh has nothing to do with the run once it is started.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
umask 077

alive() { # also of a process that took over the number after a reboot
    [[ -f pid ]] && grep -q tpu_worker "/proc/$(<pid)/cmdline" 2>/dev/null
}

state() {
    if [[ ! -f run ]]; then
        echo "- none"
    elif [[ -f code ]]; then
        echo "$(<run) $([[ -f stopped ]] && echo stopped || echo exit)-$(<code)"
    elif alive; then
        echo "$(<run) running"
    else
        echo "$(<run) lost"
    fi
}

case $1 in
    install)
        commit=$2 extras=$3 data=${4-}
        if [[ ! -d source-$commit ]]; then
            rm -rf "unpacked-$commit"
            mkdir "unpacked-$commit"
            tar -xzf "source-$commit.tar.gz" -C "unpacked-$commit"
            mkdir -p data
            ln -s ../data "unpacked-$commit/data"
            mv "unpacked-$commit" "source-$commit"
        fi
        bash "source-$commit/launch/install.sh" "venv-$commit" "$extras"
        if [[ $data ]]; then
            gcloud storage rsync --recursive "$data" data
        fi
        ;;
    start)
        commit=$2
        if alive && [[ ! -f code ]]; then exit 0; fi
        rm -f code stopped pid
        echo "$3" >run
        # A session of its own, so that neither the end of ssh nor a signal to its group ends the run.
        setsid --fork bash ./tpu_worker.sh supervise "$commit" >>log 2>&1 9>&- </dev/null
        for ((i = 0; i < 200; i++)); do
            [[ ! -f pid ]] || exit 0
            sleep 0.05
        done
        echo "tpu_worker.sh: error: the run did not start" >&2
        exit 1
        ;;
    supervise)
        commit=$2 secrets='' child='' workdir='' here=$PWD
        echo $$ >pid.new && mv pid.new pid
        if [[ -f secrets ]]; then secrets=$here/secrets; fi
        mapfile -d '' -t arguments <arguments
        for argument in "${arguments[@]}"; do
            case $argument in --workdir=*) workdir=${argument#*=} ;; esac
        done
        trap '[[ ! $child ]] || kill -TERM "$child"' TERM
        trap '' HUP
        echo "# $(date -u +%FT%TZ) run $(<run)"
        cd "source-$commit"
        bash launch/with_secrets.sh "$secrets" "$here/venv-$commit/bin/python" -m xmc_jax.main \
            --distributed=auto --compilation_cache="$workdir/compiled" "${arguments[@]}" &
        child=$!
        wait "$child" || true
        while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends `wait`
        code=0
        wait "$child" || code=$?
        echo "$code" >"$here/code.new" && mv "$here/code.new" "$here/code"
        ;;
    status) echo "xmc_jax $(hostname) $(state)" ;;
    stop)
        if alive && [[ ! -f code ]]; then
            touch stopped
            kill -TERM "$(<pid)"
            for ((i = 0; i < 10 * $2; i++)); do
                [[ ! -f code ]] || exit 0
                sleep 0.1
            done
            kill -KILL -- "-$(<pid)"
            [[ -f code ]] || echo 137 >code
        fi
        ;;
    log)
        host=$(hostname)
        if [[ -f log ]]; then tail -n "$2" log | sed "s/^/[$host] /"; fi
        ;;
    *)
        echo "tpu_worker.sh: error: no such command: $1" >&2
        exit 2
        ;;
esac
