#!/usr/bin/env bash
# Build the virtual environment .venv; run by `make setup`.
#
# The work is cut into stages. Each leaves a stamp that says what it installed, so that a stage whose lists have not
# changed is skipped, and one that was interrupted is recognised and installed again, by force.
#
#   REPAIR   stages to install again by force, or "all"; qat/doctor.py names them
#   PYTHON   interpreter to build on          (default: the first of python3, python3.12, python3.11 that fits)
#   WHEELS   folder with a mmcv-full wheel    (default: ../shared/wheels if it exists); none fits: built from source
#   MAX_JOBS  compilers run at a time for it  (default: number of cores)
#   TORCH_CUDA_ARCH_LIST  compute capabilities to compile it for, where there is a GPU  (default: the machine's)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
WHEELS=${WHEELS:-../shared/wheels}
LISTS=requirements
STAMPS=$VENV/.stages
LOG=.cache/setup.log
PY=$VENV/bin/python
CHANGED=

fail() { echo "error: $*" >&2; exit 2; }
note() { echo "setup: $*"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed, but ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo no Python);" \
        "install one and run: make setup PYTHON=/path/to/python3.12"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

gpu_architectures() { nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd ';'; }

pip() { "$PY" -m pip --disable-pip-version-check --no-input "$@"; }

# stage NAME FILES… -- COMMAND…: run COMMAND unless it has been run for the same contents of FILES and of all stages
# before it. COMMAND sees in $FORCE what makes pip install again over what an interruption has left.
KEY=
stage() {
    local name=$1 stamp=$STAMPS/$1 files=() state
    shift
    while [ "$1" != -- ]; do files+=("$1"); shift; done
    shift
    KEY=$({ echo "$KEY $name $*"; cat -- /dev/null "${files[@]}"; } | sha256sum | cut -d' ' -f1)
    state=$(cat "$stamp" 2>/dev/null || true)
    case " ${REPAIR:-} " in *" $name "* | *" all "*) state=started ;; esac
    [ "$state" != "$KEY" ] || return 0
    CHANGED=yes FORCE=
    if [ "$state" = started ]; then
        FORCE=--force-reinstall
        clear_leftovers
    fi
    echo started >"$stamp"
    note "$name ..."
    local start=$SECONDS status=0
    set +e # "|| fail" behind the command would switch -e off inside it
    (set -e; "$@") >>"$LOG" 2>&1
    status=$?
    set -e
    if [ $status != 0 ]; then
        tail -n 30 "$LOG" >&2
        fail "setup stage '$name' failed; the whole log: $LOG"
    fi
    note "$name: $((SECONDS - start)) s"
    echo "$KEY" >"$stamp.new" && mv "$stamp.new" "$stamp"
}

# A killed pip leaves packages without a list of their files, which it then can neither use nor remove.
clear_leftovers() {
    local info
    for info in "$VENV"/lib/python3*/site-packages/*.dist-info; do
        [ -e "$info/RECORD" ] || rm -rf "$info"
    done
    rm -rf "$VENV"/lib/python3*/site-packages/~*
}

make_venv() { # one that is half made, or made for another interpreter or folder, is made anew
    KEY="$PWD $1 $("$1" --version)"
    if [ "$(cat "$STAMPS/venv" 2>/dev/null)" = "$KEY" ] && "$PY" -c '' 2>/dev/null; then return; fi
    [ ! -e "$VENV" ] || [ -e "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] ||
        fail "$VENV exists and is no virtual environment; move it away"
    note "making $VENV with $1"
    rm -rf "$VENV"
    "$1" -m venv "$VENV"
    mkdir "$STAMPS"
    echo "$KEY" >"$STAMPS/venv"
}

install_list() { pip install $FORCE -c "$LISTS/tools.txt" -c "$LISTS/base.txt" -r "$LISTS/$1.txt"; }

install_no_deps() { pip install $FORCE --no-deps --no-build-isolation -r "$LISTS/no-deps.txt"; }

install_spconv() { # the two builds hold the same module, so the other one has to go first
    pip uninstall --yes spconv spconv-cu126 cumm cumm-cu126
    install_list "spconv-$1"
}

install_mmcv() {
    local device=$1 built
    if [ "$device" = cpu ] && [ -d "$WHEELS" ] && install_mmcv_from "$WHEELS"; then return; fi
    built=.cache/wheels/$("$PY" -c 'import sys, torch; print("py%d%d-torch" % sys.version_info[:2] + torch.__version__)')-$device
    if [ "$device" = cuda ]; then
        export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(gpu_architectures)}
        built+=-${TORCH_CUDA_ARCH_LIST//[; ]/-}
    fi
    compgen -G "$built/mmcv_full-*.whl" >/dev/null || build_mmcv "$device" "$built"
    install_mmcv_from "$built"
}

# pip's own cache keeps one mmcv-full wheel whatever torch it was built against, hence --no-cache-dir.
install_mmcv_from() {
    pip install --force-reinstall --no-deps --no-cache-dir --no-index --find-links "$1" -r "$LISTS/mmcv.txt" &&
        "$PY" -c 'import torch, mmcv.ops'
}

build_mmcv() { # keeps its object files in .cache, so that an interrupted build goes on where it was
    local device=$1 wheels=$2 source=.cache/build/$(basename "$2")
    if ! compgen -G "$source/mmcv-full-*/setup.py" >/dev/null; then
        rm -rf "$source" "$source.new"
        pip download --no-deps --no-build-isolation --no-cache-dir --no-binary :all: -d "$source.new" -r "$LISTS/mmcv.txt"
        tar xzf "$source.new"/mmcv-full-*.tar.gz -C "$source.new"
        # It asks for C++17; the headers of torch >= 2.14 are C++20, which those of older ones allow.
        sed -i 's/-std=c++17/-std=c++20/' "$source.new"/mmcv-full-*/setup.py
        mv "$source.new" "$source"
    fi
    rm -rf "$wheels.new"
    if [ "$device" = cuda ]; then
        use_cuda_compiler "$source/lib"
        export FORCE_CUDA=1
    else
        export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=
    fi
    MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} pip wheel --no-deps --no-build-isolation --no-cache-dir \
        -w "$wheels.new" "$source"/mmcv-full-*/
    mv "$wheels.new" "$wheels"
}

# torch comes with the headers and libraries of its CUDA version, but without a compiler, and any toolkit on the machine
# may be of another version.
use_cuda_compiler() {
    local links=$1 # folder for the name by which the linker looks for the runtime library
    install_list cuda-compiler
    CUDA_HOME=$(compgen -G "$PWD/$VENV/lib/python3*/site-packages/nvidia/cu[0-9]*")
    mkdir -p "$links"
    ln -sf "$CUDA_HOME"/lib/libcudart.so.* "$links/libcudart.so"
    export CUDA_HOME LIBRARY_PATH=$PWD/$links
}

install_project() { pip install --no-deps --no-build-isolation -e .; }

main() {
    local device=cpu python
    python=$(find_python)
    mkdir -p .cache/wheels .cache/build
    exec 9>.cache/setup.lock
    flock 9 # a second `make setup` waits for the first
    if has_gpu; then device=cuda; fi
    make_venv "$python"
    : >"$LOG"
    stage tools $LISTS/tools.txt -- install_list tools
    stage torch $LISTS/torch.txt -- install_list torch
    stage base $LISTS/base.txt -- install_list base
    stage spconv $LISTS/spconv-$device.txt -- install_spconv $device
    stage mmcv $LISTS/mmcv.txt $LISTS/cuda-compiler.txt -- install_mmcv $device
    stage no-deps $LISTS/no-deps.txt -- install_no_deps
    stage dev $LISTS/dev.txt -- install_list dev
    stage project setup.py pyproject.toml -- install_project
    [ -z "$CHANGED" ] || note "ready: $VENV; $PY qat/doctor.py checks it"
}

main
