#!/bin/sh
# Prints one hash over the sources that decide what runs on a GPU: path and content of every file. A tree has the same
# hash on every machine, with and without git; tests/gpu/record.json says with it what was tested.
set -eu

cd "$(dirname "$0")/.."
LC_ALL=C
export LC_ALL
find cache include jit kernels_src models src -type f ! -name '.*' ! -name '*.o' ! -name '*~' -exec sha256sum {} + |
    sort -k 2 | sha256sum | cut -d ' ' -f 1
