#!/usr/bin/env bash
# Builds .venv: trainer and engine in one Python 3.12 environment. A second run with nothing changed returns at once.
#   VARIANT=cpu|gpu   overrides what nvidia-smi says
#   TE=1              with the gpu variant: Transformer Engine too, the one thing that is compiled (some 15 minutes)
#   PYTHON=...        a Python 3.12 to build from; otherwise looked for
# Every version is that of the variant's lock, .ci/constraints-*.txt (written by .ci/lock.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/setup.stamp
LOG=$VENV/setup.log
STARTED=$SECONDS
EXTRAS=trainer,rewards,report,slurm,docs,dev  # and the variant's engine

fail() { printf 'setup: error: %s\n' "$1" >&2; exit 1; }
say() { printf 'setup: [%3d s] %s\n' $((SECONDS - STARTED)) "$1"; }
is_312() { "$1" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 "$(uv python find 3.12 2>/dev/null || true)" \
                     "$(pyenv prefix 3.12 2>/dev/null || true)/bin/python"; do
        if [ -n "$candidate" ] && is_312 "$candidate"; then echo "$candidate"; return; fi
        if [ -n "${PYTHON:-}" ] && [ "$candidate" = "$PYTHON" ]; then
            fail "PYTHON=$PYTHON is not a working Python 3.12 with the venv module"
        fi
    done
    fail "no Python 3.12 found (tried \$PYTHON, python3.12, uv, pyenv).
  Install one, for example:  uv python install 3.12   |   pyenv install 3.12   |   apt-get install python3.12 python3.12-venv
  or name it:                PYTHON=/path/to/python3.12 make setup"
}

check_machine() {
    [ "$(uname -s)/$(uname -m)" = Linux/x86_64 ] || fail "this is $(uname -s)/$(uname -m); the engine and torch wheels need Linux x86-64"
    local glibc
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo "glibc 0 (another C library)")
    [ "$(printf '%s\n' "glibc 2.34" "$glibc" | sort -V | head -n 1)" = "glibc 2.34" ] ||
        fail "this system has $glibc; the engine's wheels need glibc 2.34 or later (Ubuntu 22.04, Debian 12, RHEL 9). Use such a system, or a container of one"
}

check_disk() {
    local free_gb
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
    [ "$free_gb" -ge 10 ] || fail "$free_gb GB free in $PWD; a new environment needs 10 GB"
}

choose_variant() {
    local variant=${VARIANT:-}
    if [ -z "$variant" ]; then
        if nvidia-smi >/dev/null 2>&1; then variant=gpu; else variant=cpu; fi
    fi
    case $variant in cpu | gpu) echo "$variant" ;; *) fail "VARIANT=$variant: must be cpu or gpu" ;; esac
}

make_venv() {
    local python
    if is_312 $VENV/bin/python; then  # ours, or one that is there already: pip adds what is missing
        $VENV/bin/python -m pip --version >/dev/null 2>&1 || $VENV/bin/python -m ensurepip >/dev/null
        return
    fi
    python=$(find_python)
    check_disk
    if [ -e $VENV ]; then
        say "$VENV is not a working Python 3.12 environment: recreating it"
        rm -rf $VENV
    fi
    say "creating $VENV with $python ($("$python" -V))"
    if [ "$VARIANT" = gpu ] && brings_te "$python"; then
        say "$python brings Transformer Engine for the same torch: using it"
        "$python" -m venv --system-site-packages $VENV
    else
        "$python" -m venv $VENV
    fi
}

brings_te() {  # an image (NVIDIA's, say) whose Python has Transformer Engine built for the torch of the lock
    local pin
    pin=$(sed -n 's/^torch==//p' .ci/constraints-gpu.txt)
    "$1" -c 'import sys, torch, transformer_engine.pytorch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' \
        "$pin" >/dev/null 2>&1
}

install_te() {  # last, because it compiles against the torch that is there, with the headers that came with it
    local site headers header where
    site=$($VENV/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    headers="$site/nvidia/cu13/include $site/nvidia/cudnn/include $site/nvidia/nccl/include"
    for header in cuda_runtime.h crt/host_config.h cudnn.h nccl.h; do
        for where in $headers missing; do
            if [ -e "$where/$header" ]; then continue 2; fi
        done
        fail "Transformer Engine needs $header, which none of $headers has: install the gpu variant first, without TE=1"
    done
    command -v c++ >/dev/null || fail "Transformer Engine needs a C++ compiler (c++): apt-get install g++"
    export CUDA_HOME="$site/nvidia/cu13" CPATH="${headers// /:}" NVTE_FRAMEWORK=pytorch
    install "Transformer Engine (compiles, some 15 minutes)" --no-build-isolation \
        -c .ci/constraints-gpu.txt -c .ci/constraints-te.txt -e ".[engine,te,$EXTRAS]"
}

install() {  # install MESSAGE PIP_ARGUMENTS...
    say "$1"
    shift
    if ! $VENV/bin/python -m pip --disable-pip-version-check install --progress-bar off "$@" >>$LOG 2>&1; then
        tail -n 20 $LOG >&2
        fail "pip failed; the whole log is in $PWD/$LOG. Run 'make setup' again once the cause is gone: it goes on from here"
    fi
}

check_machine
VARIANT=$(choose_variant)
# The directory is part of the key: an editable install holds absolute paths.
case ${TE:-} in "" | 1) ;; *) fail "TE=$TE: must be 1 or unset" ;; esac
[ -z "${TE:-}" ] || [ "$VARIANT" = gpu ] || fail "TE=1 needs VARIANT=gpu: Transformer Engine's kernels run on a GPU only"
KEY=$( { echo "$PWD $VARIANT ${TE:-}"; cat setup.py .ci/setup.sh .ci/*.txt; } | sha256sum | cut -d' ' -f1)
if [ -x $VENV/bin/python ] && [ "$(cat $STAMP 2>/dev/null || true)" = "$KEY" ] && is_312 $VENV/bin/python; then
    echo "setup: $VENV is up to date ($VARIANT)"
    exit 0
fi

make_venv
rm -f $STAMP
: >$LOG
say "installing the $VARIANT variant; details in $LOG"
if [ "$VARIANT" = cpu ]; then
    install "torch, Megatron-Core, the engine's libraries, test tools (some 6 GB, minutes the first time)" \
        -c .ci/constraints-cpu.txt -e ".[engine-cpu,$EXTRAS]"
    install "SGLang without its CUDA dependencies" --no-deps -r .ci/requirements-cpu-nodeps.txt
else
    install "torch, Megatron-Core, SGLang, test tools (4 GB to download, minutes the first time)" \
        -c .ci/constraints-gpu.txt -e ".[engine,$EXTRAS]"
    if [ -n "${TE:-}" ]; then install_te; fi
fi
say "checking that it imports"
TORCHDYNAMO_DISABLE=1 $VENV/bin/python -c 'import megatron_rl, c3po, megatron.core, transformers, hydra' >>$LOG 2>&1 ||
    { tail -n 20 $LOG >&2; fail "the environment does not import; the whole log is in $PWD/$LOG"; }
echo "$KEY" >$STAMP
say "done: $PWD/$VENV ($VARIANT)"
