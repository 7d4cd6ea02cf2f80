#!/bin/sh
# Formats all C and device code with clang-format 14; with --check only says what is not formatted, and fails then.
# usage: scripts/format.sh [--check]
set -eu
cd "$(dirname "$0")/.."
mode=-i
[ "${1:-}" != --check ] || mode='--dry-run -Werror'
# shellcheck disable=SC2086
git ls-files -co --exclude-standard '*.c' '*.h' '*.cuh' '*.cu' | xargs clang-format-14 $mode
