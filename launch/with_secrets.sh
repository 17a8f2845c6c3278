#!/usr/bin/env bash
# with_secrets.sh FILE COMMAND...: becomes COMMAND, with the KEY=VALUE lines of FILE in its environment.
# Values are taken as they stand, up to the end of the line: no quotes, nothing is expanded.
set -euo pipefail

file=$1
shift
if [[ $file ]]; then
    while IFS= read -r line || [[ $line ]]; do
        if [[ $line && $line != \#* ]]; then
            export "${line%%=*}=${line#*=}"
        fi
    done <"$file"
fi
exec "$@"
