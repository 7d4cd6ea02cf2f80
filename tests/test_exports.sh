#!/bin/sh
# The shared library exports what the public headers declare with PERK_API, all of it, and nothing else.
# usage: tests/test_exports.sh LIBPERK.SO
set -eu
library=$1
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Every declaration from PERK_API to its semicolon on one line, then the name before the first parenthesis.
cat "$root"/include/perk/*.h | grep -v '^#define' | tr '\n' ' ' | sed 's/PERK_API/\n&/g' |
    sed -n 's/^PERK_API [^(;]*[ *]\(perk_[a-z0-9_]*\)(.*/\1/p' | sort >"$work/declared"
nm -D --defined-only "$library" | awk '{ print $NF }' | sed 's/@.*//' | sort >"$work/exported"

[ -s "$work/declared" ] || { echo "no PERK_API declaration was found in include/perk" >&2; exit 1; }
if ! diff "$work/declared" "$work/exported" >"$work/difference"; then
    echo "declared with PERK_API (<) and exported by $library (>) differ:" >&2
    cat "$work/difference" >&2
    exit 1
fi
echo "$(wc -l <"$work/exported") symbols, all of them declared"
