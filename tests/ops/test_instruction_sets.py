"""The compiled CPU ops as processors without the fastest instructions run them."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cases import with_cpu_library

INSTRUCTION_SETS = {  # what Linux calls the last that each of them needs
    "portable": "",
    "avx2": "avx2",
    "avx512": "avx512dq",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_bf16",
}


def _run_here() -> list[str]:
    if platform.machine() != "x86_64":
        return ["portable"]
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    return [name for name, flag in INSTRUCTION_SETS.items() if flag in ("", *flags)]


@with_cpu_library
@pytest.mark.parametrize("instructions", ["sse9", "AVX2", *INSTRUCTION_SETS])
def test_an_instruction_set_that_does_not_run_is_an_error(instructions):
    """Of the import, which lists what exists and what runs, and in one line of the command line."""
    run_here = _run_here()
    if instructions in run_here:
        pytest.skip(f"this machine runs {instructions}")
    env = os.environ | {"SINKATTN_CPU_ISA": instructions}
    importing = subprocess.run((sys.executable, "-c", "import sinkattn.ops"), env=env, capture_output=True, text=True)
    said = importing.stderr.strip().splitlines()[-1]
    assert importing.returncode != 0 and said.startswith(f"ValueError: SINKATTN_CPU_ISA={instructions}: choose one of ")
    names, running = said.partition("choose one of ")[2].split("; this processor runs ")
    assert set(names.split(", ")) == (set(INSTRUCTION_SETS) if platform.machine() == "x86_64" else {"portable"})
    assert set(running.split(", ")) == set(run_here)
    info = subprocess.run((sys.executable, "-m", "sinkattn", "info"), env=env, capture_output=True, text=True)
    assert info.returncode == 1 and info.stderr.split("error: ")[1].strip() == said.removeprefix("ValueError: ")


@with_cpu_library
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_other_instruction_sets(instructions):
    """The compiled ops once more, as processors without the fastest instructions run them."""
    if instructions not in _run_here():
        pytest.skip(f"this machine has no {instructions}")
    env = os.environ | {"SINKATTN_CPU_ISA": instructions}
    ask = (sys.executable, "-c", "from sinkattn import ops; print(ops.CPU_ISA)")
    chosen = subprocess.run(ask, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    assert chosen == instructions
    some = "edges and cpu-cpu or any_shape or test_inputs and cpu or wide"
    arguments = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).parent, "-k", some)
    done = subprocess.run(arguments, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
