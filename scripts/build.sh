#!/bin/sh
# Configures and builds perk. CC chooses the compiler; TARGET builds these targets alone.
# usage: scripts/build.sh [FOLDER [-DNAME=VALUE ...]]   (build)
set -eu
cd "$(dirname "$0")/.."
folder=${1:-build}
[ $# = 0 ] || shift
cmake -G Ninja -S . -B "$folder" "$@" >/dev/null
# shellcheck disable=SC2086
cmake --build "$folder" ${TARGET:+--target $TARGET} ${CI:+-- --quiet}
