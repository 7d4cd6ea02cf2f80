#!/bin/sh
# Installs what is missing, builds perk with its tests and runs them. Needs no GPU; scripts/gpu_check.sh is for those.
# TESTS, names with spaces between, builds and runs these alone.
# usage: scripts/test.sh [FOLDER [-DNAME=VALUE ...]]   (build; CC chooses the compiler)
set -eu
cd "$(dirname "$0")/.."
folder=${1:-build}

[ -z "${TESTS:-}" ] || export TARGET="$TESTS"
scripts/install.sh
scripts/build.sh "$@"
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .cuda ] || export VIRTUAL_ENV="$PWD/.cuda"

status=0
ctest --test-dir "$folder" -j "$(nproc)" --output-on-failure --no-tests=error --output-junit tests.xml \
    ${TESTS:+-R "^($(echo "$TESTS" | tr ' ' '|'))\$"} || status=$?
scripts/count_tests.sh "$folder/tests.xml"
exit $status
