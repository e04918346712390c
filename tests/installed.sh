#!/usr/bin/env bash
# The installed package, not the checkout, passes the tests: tests/installed.sh PYTHON WHEEL [arguments of pytest]
#
# PYTHON has torch, transformers and what the extra `test` names already, in the versions to be tested; the wheel is
# installed there without dependencies, so that no network is needed. The tests run from a copy in a folder of its own.
set -euo pipefail
test $# -ge 2 || { sed -n '2,5p' "$0"; exit 2; }
python=$(realpath -s "$(command -v "$1")") wheel=$(realpath "$2")
shift 2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r "$(dirname "$0")"/../{tests,bench,examples,docs,README.md,pyproject.toml} "$folder"
cd "$folder"
unset PYTHONPATH
"$python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
"$python" - <<'PYTHON'
import sys

import torch
import transformers

import sinkattn
from sinkattn import ops

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}")
print(f"sinkattn {sinkattn.__version__} in {sinkattn.__file__}")
assert "site-packages" in sinkattn.__file__, "this is a checkout"
assert ops.HAS_CPU_LIBRARY, "no compiled CPU ops"
assert ops.HAS_CUDA_LIBRARY or not torch.cuda.is_available(), "no compiled CUDA ops"
PYTHON
"$python" -m pytest "$@"
