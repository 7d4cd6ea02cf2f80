#!/bin/sh
# From a fresh checkout to text: installs what is missing, builds the CLI, and lets the model that ships with perk go on
# from a prompt, on the GPU where there is one, else with the reference executor on the CPU.
# usage: scripts/quickstart.sh [PROMPT]
set -eu
cd "$(dirname "$0")/.."
prompt=${1:-Once upon a time}

scripts/install.sh
TARGET=perk_cli scripts/build.sh build

# NVRTC, where scripts/install.sh had to fetch it.
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .cuda ] || export VIRTUAL_ENV="$PWD/.cuda"
if build/bin/perk doctor --require-gpu >/dev/null 2>&1; then
    echo "On the GPU:"
else
    echo "On the CPU, for want of a usable GPU (build/bin/perk doctor says why):"
fi
printf '\n%s' "$prompt"
build/bin/perk run --model examples/tiny --prompt "$prompt" --temperature 0.7 --top-p 0.95 --seed 1
