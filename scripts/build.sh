#!/bin/sh
# Configures and builds perk. CC chooses the compiler; TARGET builds that target alone.
# usage: scripts/build.sh [FOLDER [-DNAME=VALUE ...]]   (build)
set -eu
cd "$(dirname "$0")/.."
folder=${1:-build}
[ $# = 0 ] || shift
cmake --log-level=NOTICE -G Ninja -S . -B "$folder" "$@"
cmake --build "$folder" ${TARGET:+--target "$TARGET"} ${CI:+-- --quiet}
