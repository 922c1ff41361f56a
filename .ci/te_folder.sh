#!/usr/bin/env bash
# te_folder.sh FOLDER WHEEL: Transformer Engine of the lock in a folder beside the environment, for `make test-te`.
# WHEEL is its torch extension. In the environment itself every test would see it, and its optimiser needs a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$1 wheel=$2
[ -f "$wheel" ] || { echo "TE_WHEEL=$wheel: no such file; docs/gpu.md says how to build it" >&2; exit 2; }
[ -f "$folder/.of" ] && [ "$(cat "$folder/.of")" = "$wheel" ] && exit
rm -rf "$folder"
mkdir -p "$folder"
{
    grep -v -e '^#' -e '^transformer-engine-torch=' .ci/constraints-te.txt
    grep '^ml-dtypes=' .ci/constraints-gpu.txt  # which the environment of a CPU has not
} >"$folder.txt"
.venv/bin/python -m pip install -q --no-deps --target "$folder" "$wheel" -r "$folder.txt"
echo "$wheel" >"$folder/.of"
