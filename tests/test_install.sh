#!/bin/sh
# Installs a build into a folder of its own and uses it from there as an embedding program would: examples/hello.c with
# pkg-config (shared and static) and with find_package (both targets), the other examples, the headers from C++, the
# installed CLI.
# usage: tests/test_install.sh BUILD_FOLDER CC LIBDIR
set -eu
build=$1 cc=$2 libdir=$3
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
model=$root/examples/tiny

for tool in cmake pkg-config; do
    command -v "$tool" >/dev/null || { echo "skipped: no $tool" >&2; exit 77; }
done

# Runs a program and its arguments; it must print a story that begins with the prompt.
expect_story() {
    PERK_CACHE_DIR=$work/cache "$@" "$model" "Once upon a time" >"$work/out" 2>"$work/err" ||
        { echo "failed: $*" >&2; cat "$work/err" >&2; exit 1; }
    grep -q '^Once upon a time' "$work/out" || { echo "no story from: $*" >&2; cat "$work/out" >&2; exit 1; }
    echo "ok: $(basename "$1")"
}

cmake --install "$build" --prefix "$prefix" >/dev/null

# pkg-config
export PKG_CONFIG_PATH="$prefix/$libdir/pkgconfig"
[ "$(pkg-config --variable=prefix perk | xargs realpath)" = "$(realpath "$prefix")" ] ||
    { echo "perk.pc does not move with its folder: $(pkg-config --variable=prefix perk)" >&2; exit 1; }
# shellcheck disable=SC2046
"$cc" -std=c11 "$root/examples/hello.c" -o "$work/hello_pc" $(pkg-config --cflags --libs perk) \
    "-Wl,-rpath,$prefix/$libdir"
expect_story "$work/hello_pc"
mkdir "$work/archives" && cp "$prefix/$libdir/libperk.a" "$work/archives"
# shellcheck disable=SC2046
"$cc" -std=c11 "$root/examples/hello.c" -o "$work/hello_pc_static" "-L$work/archives" \
    $(pkg-config --cflags --libs --static perk | sed 's/-lperk/-l:libperk.a/')
expect_story "$work/hello_pc_static"
# Without a GPU the op runs by the tasks of its plan.
# shellcheck disable=SC2046
"$cc" -std=c11 -Wall -Wextra -Werror "$root/examples/test_op.c" -o "$work/test_op" $(pkg-config --cflags --libs perk) \
    "-Wl,-rpath,$prefix/$libdir"
PERK_CACHE_DIR=$work/cache "$work/test_op" | grep 'worst error' || { echo "failed: test_op" >&2; exit 1; }
# Every token of four prompts comes through the descriptor.
# shellcheck disable=SC2046
"$cc" -std=c11 -Wall -Wextra -Werror "$root/examples/service.c" -o "$work/service" $(pkg-config --cflags --libs perk) \
    -pthread "-Wl,-rpath,$prefix/$libdir"
PERK_CACHE_DIR=$work/cache "$work/service" "$model" >"$work/out" 2>"$work/err" &&
    [ "$(grep -c 'ended, 40 tokens' "$work/out")" = 4 ] ||
    { echo "failed: service" >&2; cat "$work/out" "$work/err" >&2; exit 1; }
echo "ok: service"
# Two requests in one loop of the program's own; the second goes on over the first one's page.
# shellcheck disable=SC2046
"$cc" -std=c11 -Wall -Wextra -Werror "$root/examples/step.c" -o "$work/step" $(pkg-config --cflags --libs perk) \
    "-Wl,-rpath,$prefix/$libdir"
PERK_CACHE_DIR=$work/cache "$work/step" "$model" >"$work/out" 2>"$work/err" &&
    [ "$(grep -c 'Once upon a time' "$work/out")" -ge 2 ] && grep -q 'over a shared page' "$work/out" ||
    { echo "failed: step" >&2; cat "$work/out" "$work/err" >&2; exit 1; }
echo "ok: step"

# find_package
build_consumer() {
    cmake -G Ninja -S "$root/tests/consumer" -B "$work/consumer" "-DCMAKE_PREFIX_PATH=$prefix" "-DCMAKE_C_COMPILER=$cc"
    cmake --build "$work/consumer"
}
build_consumer >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
expect_story "$work/consumer/hello_shared"
expect_story "$work/consumer/hello_static"

# Every public header alone, as C and as C++.
for header in "$prefix"/include/perk/*.h; do
    name=perk/$(basename "$header")
    echo "#include <$name>" >"$work/one.c" && cp "$work/one.c" "$work/one.cc"
    "$cc" -std=c11 -Wall -Wextra -Wpedantic -Werror -fsyntax-only "-I$prefix/include" "$work/one.c"
    if command -v c++ >/dev/null; then
        c++ -std=c++11 -Wall -Wextra -Werror -fsyntax-only "-I$prefix/include" "$work/one.cc"
    fi
done
echo "ok: headers"

"$prefix/bin/perk" --version | grep -q "^perk $(pkg-config --modversion perk)$"
# CUDA's libraries are opened at run time, where there are any; libperk is inside.
if ldd "$prefix/bin/perk" | grep -E 'libperk|libcuda|libnvrtc|libnccl' >&2; then
    echo "the CLI must not be linked with these" >&2
    exit 1
fi
echo "ok: perk --version"
