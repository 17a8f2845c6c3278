# shellcheck shell=bash
# What the launchers share; sourced. $program is the name in messages, $dry_run is 1 or empty.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
    echo "${program:?}: error: bash 4.4 or later is needed, this is $BASH_VERSION" >&2
    exit 2
}

# Exit codes of the launchers; any other is the run's own.
# shellcheck disable=SC2034
usage=2 refused=3 gave_up=4

# What happens; in a dry run nothing does.
say() { if [[ ! $dry_run ]]; then printf '%s: %s\n' "${program:?}" "$*" >&2; fi; }

# What a command line cannot say, as a comment of the dry run.
note() { if [[ $dry_run ]]; then printf '# %s\n' "$*"; fi; }

# die CODE MESSAGE: in one line, whatever is in the message.
die() {
    local code=$1 message
    shift
    message=$(tr -s '[:space:]' ' ' <<<"$*")
    printf '%s: error: %s\n' "$program" "${message% }" >&2
    exit "$code"
}

# One line that a shell reads back as the same words.
quoted() {
    local word line=''
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
    done
    printf '%s\n' "${line# }"
}

# Shows a command in a dry run, does it otherwise.
run() {
    if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# need FLAG COUNT: FLAG has a value if COUNT, the number of words left, is 2 or more.
need() { (($2 > 1)) || die "$usage" "$1: expected a value"; }

# matches NAME VALUE REGEX EXPECTED
matches() {
    [[ $2 =~ $3 ]] || die "$usage" "$1: expected $4, got $(quoted "$2")"
}

number() { matches "$1" "$2" '^[0-9]{1,9}$' "a whole number"; }

# The comment that a launcher begins with.
help() { sed -n '2,/^set /{s/^# //p;s/^#$//p}' "$1"; }

# A path as seen from here, for use elsewhere.
absolute() {
    if [[ $1 == /* ]]; then printf '%s\n' "$1"; else printf '%s\n' "$PWD/$1"; fi
}

# A file of KEY=VALUE lines that nobody else can read. Its content is never shown.
check_secrets() {
    local file=$1 mode line count=0
    [[ -f $file && -r $file ]] || die "$usage" "--secrets: no such file: $(quoted "$file")"
    mode=$(stat -L -c %a -- "$file")
    [[ $mode == [46]00 ]] ||
        die "$usage" "--secrets: expected mode 600, got $mode: chmod 600 $(quoted "$file")"
    while IFS= read -r line || [[ $line ]]; do
        count=$((count + 1))
        [[ ! $line || $line == \#* || $line =~ ^[A-Za-z_][A-Za-z_0-9]*= ]] ||
            die "$usage" "--secrets: line $count: expected KEY=VALUE"
    done <"$file"
}

# What looks like a key does not go onto a command line.
check_arguments() {
    local argument
    for argument; do
        [[ ! $argument =~ hf_[A-Za-z0-9]{20,}|AIza[A-Za-z0-9_-]{30,}|-----BEGIN ]] ||
            die "$usage" "an argument holds a secret; write it to a file of mode 600 and give that as --secrets"
    done
}

# wait_for PID: its exit code, also when trapped signals interrupt the wait.
wait_for() {
    local code=0
    wait "$1" || true
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    wait "$1" || code=$? # bash keeps it
    return "$code"
}
