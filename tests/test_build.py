"""What setup.py builds beside which torch, and what it says of a build that fails; the torches are a few headers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("this is no source tree", allow_module_level=True)
HEADERS = ("csrc/inductor/aoti_torch/c/shim.h", "csrc/stable/library.h", "csrc/stable/ops.h", "csrc/stable/tensor.h")


@pytest.fixture
def build(tmp_path):
    """build(command, version, cuda, headers, **environment): code and output of setup.py beside such a torch."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "kernels", "sinkattn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "kernels"))

    def run(command, version="2.13.0", cuda=None, headers="", **environment):
        torch = tmp_path / "torches/torch"
        for name in (*HEADERS, "headeronly/core/ScalarType.h"):
            (torch / "include/torch" / name).parent.mkdir(parents=True, exist_ok=True)
            (torch / "include/torch" / name).write_text(headers)
        (torch / "__init__.py").touch()
        (torch / "version.py").write_text(f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n")
        clean = {name: value for name, value in os.environ.items() if name != "SINKATTN_REQUIRE"}
        clean |= {"PYTHONPATH": str(tmp_path / "torches"), "CUDA_HOME": "/nowhere", "CXXFLAGS": "-O0", "MAX_JOBS": "1"}
        clean |= environment
        command = [sys.executable, "setup.py", command]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def test_cuda_is_built_for_a_torch_that_has_it_or_where_it_is_required(build):
    code, said = build("build_py")
    assert code == 0 and "torch 2.13.0 has no CUDA: no CUDA ops are built" in said and "WITHOUT" not in said
    code, said = build("build_py", cuda="13.0")
    assert code == 0 and "WITHOUT its compiled CUDA ops: no CUDA compiler" in said
    code, said = build("build_py", SINKATTN_REQUIRE="cuda")
    assert code != 0 and "SINKATTN_REQUIRE=cuda, but these ops cannot be built: no CUDA compiler" in said
    code, said = build("build_py", SINKATTN_REQUIRE="rocm")
    assert code != 0 and "only cpu and cuda" in said


def test_every_module_is_built(build, tmp_path):
    code, said = build("build_py")
    assert code == 0, said
    library = next((tmp_path / "build").glob("lib*"))
    built = {str(path.relative_to(library)) for path in library.rglob("*.py")}
    modules = {f"sinkattn/{path.relative_to(ROOT / 'sinkattn')}" for path in (ROOT / "sinkattn").rglob("*.py")}
    assert built == modules | {f"sinkattn/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        ({"version": "2.9.1"}, "is older than 2.10"),
        ({"CXX": "no-such-compiler"}, "CXX names no-such-compiler, which is not there"),
        ({"CXX": "false"}, "false compiles no C++17 with these options"),
        ({"CXXFLAGS": "-std=c++98"}, "compiles no C++17 with these options"),
        ({"headers": "#error broken"}, "the headers of torch 2.13.0 in"),
        ({"headers": ""}, "ops_cpu.cpp does not compile with the headers of torch 2.13.0, though they alone do"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_is_at_fault(build, torch, message):
    if shutil.which("c++") is None and "CXX" not in torch:
        pytest.skip("no C++ compiler")
    code, said = build("build", **torch)
    assert code == 0 and "WITHOUT its compiled CPU ops" in said and message in said, said


def test_a_required_library_that_fails_to_compile_is_an_error(build):
    code, said = build("build", CXX="false", SINKATTN_REQUIRE="cpu")
    assert code != 0 and "SINKATTN_REQUIRE=cpu, but these ops cannot be built: false compiles no" in said, said
