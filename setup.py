"""Compiles csrc/cpu into sinkattn/_C_cpu.so; all other metadata is in pyproject.toml.

torch is no build requirement: an isolated build would download another one. The headers of the torch that is installed
already are used instead, and the library, on LibTorch's stable ABI, serves every torch from 2.10 on. It has no Python
symbols either, hence the wheel's tag py3-none-<platform>. Without headers or compiler the package is built without the
library, says so loudly, and works. Environment variables:

    SINKATTN_REQUIRE=cpu    leaving the library out is an error
    CXX, CXXFLAGS, LDFLAGS  compiler and more flags for it
    MAX_JOBS                files compiled at a time (2)
"""

import contextlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

SOURCES = Path("csrc/cpu")
OBJECTS = Path("build/objects")  # setuptools' own folder for them doesn't survive an editable installation
OLDEST_TORCH = (2, 10)
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
# Products and sums are fused where the source says so: vec.h. Nobody reads errno or floating-point exceptions.
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]

REQUIRED = {name for name in os.environ.get("SINKATTN_REQUIRE", "").split(",") if name}


def find_torch() -> Path | None:
    """Folder of the installed torch, which is not imported. An isolated build doesn't have it on sys.path."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment doesn't see the user's packages
        roots.append(site.getusersitepackages())
    folders += [Path(root) / "torch" for root in roots]
    return next((folder for folder in folders if (folder / "version.py").exists()), None)


def find_compiler() -> list[str] | None:
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def why_not() -> tuple[str, str] | None:
    """What keeps the library from being built, and the remedy."""
    if not sys.platform.startswith("linux"):
        return f"they are built on Linux only, this is {sys.platform}", "use Linux"
    if TORCH is None:
        return "no torch is installed here, whose headers they need", "`pip install torch`"
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (TORCH / "version.py").read_text())
    if version is None or tuple(map(int, version.groups())) < OLDEST_TORCH:
        return f"the torch in {TORCH} is older than 2.10", "`pip install --upgrade torch`"
    if not (TORCH / "include/torch/csrc/stable/ops.h").exists():
        return f"the torch in {TORCH} has no C++ headers", "install a torch that has them, as those on PyPI do"
    if COMPILER is None:
        return "no C++ compiler was found", "install g++ or clang++, or let CXX name one"
    return None


def leave_out(reason: str, remedy: str, inplace: bool) -> None:
    """Say that the library is left out, or raise if it is required."""
    if inplace:  # an older one would be loaded
        Path("sinkattn/_C_cpu.so").unlink(missing_ok=True)
    if "cpu" in REQUIRED:
        raise SetupError(f"SINKATTN_REQUIRE=cpu, but the compiled CPU ops cannot be built: {reason}. Remedy: {remedy}.")
    rule = "*" * 100
    message = (
        f"\n{rule}\nsinkattn is built WITHOUT its compiled CPU ops: {reason}.\n"
        "The package works without them, more slowly on the CPU.\n"
        f"To get them: {remedy}; then install sinkattn again, with `pip install --force-reinstall --no-deps\n"
        "--no-cache-dir` and what you gave pip now. `sinkattn info` shows whether they are there.\n"
        f"{rule}\n"
    )
    print(message, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():  # pip shows a build's output only if it fails
        with contextlib.suppress(OSError):
            Path("/dev/tty").write_text(message)


class BuildPy(build_py):
    def run(self):
        if REQUIRED - {"cpu"}:
            raise SetupError(f"SINKATTN_REQUIRE={','.join(sorted(REQUIRED))}: 'cpu' is all that can be required")
        if not self.editable_mode:  # what an earlier build left there would be shipped
            shutil.rmtree(Path(self.build_lib, "sinkattn"), ignore_errors=True)
        if WHY_NOT:
            leave_out(*WHY_NOT, inplace=self.editable_mode)
        super().run()


class BuildExt(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        try:
            self.compile_and_link(Path(self.get_ext_fullpath(ext.name)))
        except subprocess.CalledProcessError as error:
            reason = f"the compiler failed.\n{shlex.join(error.cmd)}\n{error.stderr.strip()}"
            leave_out(reason, "let CXX name a compiler for C++17, g++ 9 or newer", inplace=self.editable_mode)
            self.distribution.ext_modules = []
            raise CompileError(str(error)) from error  # a warning, since the extension is optional

    def compile_and_link(self, library: Path):
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        include = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", str(TORCH / "include")]
        include.append(f"-fmacro-prefix-map={TORCH}=torch")  # __FILE__ in messages
        jobs = [self.job(SOURCES / "ops_cpu.cpp", "ops", [*FLAGS, *include, *more])]
        for name, options in INSTRUCTION_SETS.items():
            options = [*FLAGS, f"-DSINKATTN_ISA={name}", *options, *more]
            jobs.append(self.job(SOURCES / "attention.cpp", f"attention_{name}", options))
        OBJECTS.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
            list(pool.map(self.call, [command for command in jobs if self.is_stale(Path(command[-1]))]))
        # libtorch.so is needed by name: torch.ops.load_library looks for symbols in what a library needs. No rpath:
        # torch has been imported by then.
        link = [*COMPILER, "-shared", "-o", str(library), *(command[-1] for command in jobs), f"-L{TORCH / 'lib'}"]
        self.call([*link, "-Wl,--no-as-needed", "-ltorch", *shlex.split(os.environ.get("LDFLAGS", ""))])

    def job(self, source: Path, name: str, options: list[str]) -> list[str]:
        """Command that compiles a file. The name of its output, which comes last, changes with the options."""
        command = [*COMPILER, *options, "-c", str(source), "-o"]
        return [*command, str(OBJECTS / f"{name}_{zlib.crc32(shlex.join(command).encode()):08x}.o")]

    def is_stale(self, output: Path) -> bool:
        inputs = [path.stat().st_mtime for path in (*SOURCES.iterdir(), Path("setup.py"))]
        return not output.exists() or output.stat().st_mtime < max(inputs)

    def call(self, command: list[str]):
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)


class BdistWheel(bdist_wheel):
    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()  # building it may have failed
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2] if self.distribution.has_ext_modules() else "any"


TORCH = find_torch()
COMPILER = find_compiler()
WHY_NOT = why_not()

setup(
    ext_modules=[] if WHY_NOT else [Extension("sinkattn._C_cpu", [], optional="cpu" not in REQUIRED)],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
