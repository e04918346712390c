"""The compiled CPU ops as processors without the fastest instructions run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases import with_cpu_library


@with_cpu_library
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_other_instruction_sets(instructions):
    """The compiled ops once more, as processors without the fastest instructions run them."""
    env = os.environ | {"SINKATTN_CPU_ISA": instructions}
    ask = (sys.executable, "-c", "from sinkattn import ops; print(ops.CPU_ISA)")
    chosen = subprocess.run(ask, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    if instructions != "portable" and chosen == "portable":
        pytest.skip(f"this machine has no {instructions}")
    assert chosen == instructions
    some = "edges and cpu-cpu or any_shape or test_inputs and cpu or wide"
    arguments = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).parent, "-k", some)
    done = subprocess.run(arguments, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
