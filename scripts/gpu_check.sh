#!/bin/sh
# Runs the GPU checks on this machine and writes tests/gpu/record.json (see tests/gpu/README.md).
#
#   scripts/gpu_check.sh [--build DIR] [--out DIR] [--quick] [--budget SECONDS] [--cpu]
#
# Takes DIR/bin/perk and DIR/bin/test_* as they are, and builds them only where DIR/bin/perk is missing. PERK_PYTHON
# names a python3 that has torch, transformers, safetensors and numpy. Ends with a table and 'N passed, N failed'.
# Exit codes: 0 nothing failed, 1 something failed, 77 there is no GPU.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PERK_PYTHON:-python3}
build=$root/build
previous=
for word in "$@"; do
    case $word in --build=*) build=${word#--build=} ;; esac
    [ "$previous" = --build ] && build=$word
    previous=$word
done

if ! "$python" -c 'import numpy, safetensors, torch, transformers' 2>/dev/null; then
    echo "gpu_check: $python lacks one of torch, transformers, safetensors, numpy; PERK_PYTHON names another" >&2
    exit 1
fi
if [ ! -x "$build/bin/perk" ]; then
    cmake -G Ninja -S "$root" -B "$build"
    cmake --build "$build"
fi
exec "$python" -u "$root/tests/gpu/check.py" "$@"
