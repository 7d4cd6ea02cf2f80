#!/usr/bin/env bash
# Runs the fuzz targets of tests/fuzz, each for so many seconds (default 20), as many at a time as there are cores, and
# prints a line for each. Fails when one crashes, leaks, or takes over 10 s or 2 GB for an input; the input is then in
# FOLDER/findings. What a run learns stays in FOLDER/corpus, and the next one begins with it.
# usage: scripts/fuzz.sh [SECONDS [TARGET ...]]   (TARGET: safetensors, config, ...; none: all)
# FUZZ_BUILD is the build folder (build-fuzz), CC the compiler (clang-14).
set -euo pipefail
cd "$(dirname "$0")/.."
export seconds=${1:-20} folder=${FUZZ_BUILD:-build-fuzz}
shift $(($# > 0))

mkdir -p "$folder"
export CC=${CC:-clang-14}
TARGET=fuzz scripts/build.sh "$folder" -DPERK_FUZZ=ON -DPERK_BUILD_TESTS=OFF >"$folder/build.log" 2>&1 || {
    cat "$folder/build.log" >&2
    exit 1
}

targets=("$@")
[ $# -gt 0 ] || for source in tests/fuzz/fuzz_*.c; do
    name=${source##*/fuzz_}
    targets+=("${name%.c}")
done

# What a run's log says: how many inputs, which part of the code they reached, the memory and CPU time that it took.
summary() {
    sed -n 's/^stat::number_of_executed_units: */executions=/p; s/^stat::peak_rss_mb: */peak_mb=/p; s/^cpu /cpu_s=/p' "$1"
    grep -ao 'cov: [0-9]* ft: [0-9]*' "$1" | tail -n 1 | sed 's/cov: /edges=/; s/ ft: / features=/'
}

run() {
    local corpus=$folder/corpus/$1 log=$folder/$1.log dictionary=tests/fuzz/$1.dict TIMEFORMAT='cpu %U' verdict=ok
    local options=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=16384 -print_final_stats=1
        -artifact_prefix="$folder/findings/$1-")
    mkdir -p "$corpus" "$folder/findings"
    [ ! -e "$dictionary" ] || options+=(-dict="$dictionary")
    { time "$folder/bin/fuzz_$1" "${options[@]}" "$corpus" "tests/fuzz/corpus/$1"; } >"$log" 2>&1 || verdict=FAILED
    printf '%-12s %-6s %s\n' "$1" "$verdict" "$(summary "$log" | xargs)"
    [ $verdict = ok ] || {
        tail -n 60 "$log" >&2
        return 1
    }
}

export -f run summary
printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I{} bash -c 'run {}' || {
    echo "fuzz: FAILED; the inputs are in $folder/findings" >&2
    exit 1
}
echo "fuzz: ${#targets[@]} targets, $seconds s each, nothing found"
