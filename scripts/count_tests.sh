#!/bin/sh
# Adds up the results that ctest --output-junit wrote: "N passed, N failed, N skipped".
# usage: scripts/count_tests.sh FILE.xml ...
set -eu

# The number of the first attribute of that name, which is the test suite's.
number() { sed -n "s/^[[:space:]]*$1=\"\([0-9]*\)\".*/\1/p" "$2" | head -n 1; }

total=0 failed=0 skipped=0
for file; do
    total=$((total + $(number tests "$file")))
    failed=$((failed + $(number failures "$file")))
    skipped=$((skipped + $(number skipped "$file")))
done
echo "$((total - failed - skipped)) passed, $failed failed, $skipped skipped"
