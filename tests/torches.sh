#!/usr/bin/env bash
# Built from source, imported and tested with every torch that is promised: tests/torches.sh [VERSION ...]
#
# For each version (2.10, 2.11, 2.12, 2.13 and the newest, if none is given) the package is built with the headers of that
# torch in a fresh environment, installed there, and passes the tests of the ops; a table at the end says what came of it.
# Interpreted Triton kernels and other instruction sets than the machine's best are left to the whole suite.
#
# PyPI's torch is a build for CUDA, of several GB; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has smaller
# ones. With a torch for CUDA the CUDA ops are built too if there is an nvcc (once: only ops_cuda.cpp sees torch).
# PYTHON names the interpreter (python3), and SINKATTN_REQUIRE is what setup.py says.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/source"
git -C "$root" ls-files -z | tar -C "$root" --null -T - -c | tar -C "$folder/source" -x
grep -hvE '^(#|-r|torch==|triton|setuptools)' "$root"/requirements*.txt >"$folder/constraints.txt" # torch says which fit it
python=$folder/venv/bin/python failed=0
export SINKATTN_REQUIRE=${SINKATTN_REQUIRE:-cpu}

install() {
    rm -rf "$folder"/{venv,wheel} &&
        "${PYTHON:-python3}" -m venv "$folder/venv" &&
        "$python" -m pip install --quiet --no-cache-dir --no-compile -c "$folder/constraints.txt" "$wanted" transformers safetensors \
            numpy pytest pytest-xdist hypothesis "setuptools>=77" wheel &&
        "$python" -c 'import torch; print(torch.__version__, torch.version.cuda or "-", sep="\t")' >"$folder/torch"
}

build() {
    "$python" -m pip wheel --verbose --no-deps --no-build-isolation --wheel-dir "$folder/wheel" "$folder/source" &&
        "$python" -m zipfile --list "$folder"/wheel/*.whl | grep -oP '_C_\K\w+(?=\.so)' | paste -sd, >"$folder/built"
}

check() {
    "$folder/source/tests/installed.sh" "$python" "$folder"/wheel/*.whl -q tests/ops \
        -k "not triton and not other_instruction_sets"
}

printf 'torch\tCUDA\tbuilt\ttests\n' >"$folder/table"
(($#)) || set -- 2.10 2.11 2.12 2.13 newest
for version; do
    [ "$version" = newest ] && wanted=torch || wanted="torch==$version.*"
    printf '%s\t-\n' "$version" >"$folder/torch"
    echo - >"$folder/built"
    : >"$folder/log"
    for step in install build check; do
        echo "torch $version: $step"
        if ! "$step" &>>"$folder/log"; then
            tail -n 50 "$folder/log"
            failed=1 result="$step failed"
            break
        fi
        result=$(tail -n 1 "$folder/log")
    done
    paste "$folder/torch" "$folder/built" - <<<"$result" >>"$folder/table"
done
echo
column -ts $'\t' "$folder/table"
exit "$failed"
