#!/bin/sh
# Installs what is missing to build perk on Debian 12, Ubuntu 24.04 or newer: a C compiler, CMake, Ninja, four small
# libraries, and two headers of CUDA. Changes nothing when all is there. With --ci also what .ci/run needs.
# usage: scripts/install.sh [--ci]
set -eu
cd "$(dirname "$0")/.."

missing=
need_command() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need_header() { [ -e "/usr/include/$1" ] || [ -e "/usr/local/include/$1" ] || missing="$missing $2"; }

need_command "${CC:-cc}" gcc
need_command cmake cmake
need_command ninja ninja-build
need_header stdio.h libc6-dev
need_header jansson.h libjansson-dev
need_header xxhash.h libxxhash-dev
need_header pcre2.h libpcre2-dev
need_header utf8proc.h libutf8proc-dev
if [ "${1:-}" = --ci ]; then
    need_command git git
    need_command gcc gcc
    need_command c++ g++
    need_command pkg-config pkg-config
    need_command clang-14 clang-14
    need_command clang-format-14 clang-format-14
    need_command clang-tidy-14 clang-tidy-14
    dpkg -s libclang-rt-14-dev >/dev/null 2>&1 || missing="$missing libclang-rt-14-dev"
fi

# ---- the CUDA headers: from a toolkit, else from pip ----
# Only cuda.h and nvrtc.h are needed to build. NVRTC itself comes in the same package and is opened at run time.
find_cuda_header() {
    for folder in "${CUDA_HOME:-/usr/local/cuda}/include" "${CUDA_PATH:-/usr/local/cuda}/include" \
        /usr/local/cuda/include /usr/include /usr/local/include \
        .cuda/lib/python3*/site-packages/nvidia/*/include \
        "${VIRTUAL_ENV:-.cuda}"/lib/python3*/site-packages/nvidia/*/include; do
        [ -e "$folder/$1" ] && return 0
    done
    return 1
}
fetch_cuda=no
if ! find_cuda_header cuda.h || ! find_cuda_header nvrtc.h; then
    fetch_cuda=yes
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
fi

if [ -n "$missing" ]; then
    command -v apt-get >/dev/null 2>&1 || {
        echo "Missing, and there is no apt-get to install it with; these are the Debian names:$missing" >&2
        exit 1
    }
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    echo "Installing:$missing"
    $as_root apt-get update -q
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
fi

if [ $fetch_cuda = yes ]; then
    # A driver for CUDA 12 cannot load what NVRTC 13 compiles.
    driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' || true)
    suffix=
    [ "$driver" != 12 ] || suffix=-cu12
    echo "Fetching the CUDA headers and NVRTC into .cuda (nvidia-cuda-runtime$suffix, nvidia-cuda-nvrtc$suffix)"
    python3 -m venv .cuda
    .cuda/bin/pip install --quiet --disable-pip-version-check --no-deps \
        "nvidia-cuda-runtime$suffix" "nvidia-cuda-nvrtc$suffix"
fi

version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
# shellcheck disable=SC2086
set -- $version
if [ "$1" -lt 3 ] || { [ "$1" = 3 ] && [ "$2" -lt 25 ]; }; then
    echo "CMake $1.$2 is too old: perk needs 3.25 or newer (pip install cmake, in a virtual environment, has one)" >&2
    exit 1
fi
