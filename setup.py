"""Compiles csrc/cpu into sinkattn/_C_cpu.so and csrc/cuda into sinkattn/_C_cuda.so; other metadata: pyproject.toml.

torch is no build requirement: an isolated build would download another one. The headers of the torch that is installed
already are used instead, one for CPUs only will do for both, and the libraries, on LibTorch's stable ABI, serve every
torch from 2.10 on. They have no Python symbols either, hence the wheel's tag py3-none-<platform>. What cannot be built
for want of headers or a compiler is left out, loudly, and the package works without it. Environment variables:

    SINKATTN_REQUIRE=cpu,cuda  leaving out one of these is an error
    CXX, CXXFLAGS, LDFLAGS     compiler and more flags for it
    CUDA_HOME                  where CUDA's bin/nvcc is; without it, the nvcc on the PATH
    MAX_JOBS                   files compiled at a time (2)
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

OBJECTS = Path("build/objects")  # setuptools' own folder for them doesn't survive an editable installation
OLDEST_TORCH, OLDEST_NVCC = (2, 10), (12, 4)
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
# Products and sums are fused where the source says so: vec.h. Nobody reads errno or floating-point exceptions.
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
    INSTRUCTION_SETS["amx"] = [*INSTRUCTION_SETS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all", "--threads=2"]
CUDA_SOURCES = {  # file: the GPUs it is for
    "decode": ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"],  # and later
    "prefill": ["-gencode=arch=compute_90a,code=sm_90a"],
    "linear_wide": ["-gencode=arch=compute_90a,code=sm_90a"],
    "linear": ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"],
}

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


def find_nvcc() -> Path | None:
    """The CUDA compiler, links followed or not: its folder's neighbours are headers and libraries."""
    if "CUDA_HOME" in os.environ:
        found = Path(os.environ["CUDA_HOME"], "bin/nvcc")
        return found if found.exists() else None
    candidates = [Path(found) for found in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if found]
    homes = [path.resolve().parent.parent for path in candidates if path.exists()]
    homes += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)  # nvcc on the PATH may be a script elsewhere
    return next((home / "bin/nvcc" for home in homes if (home / "include/cuda.h").exists()), None)


def cudart_folder() -> Path | None:
    """Where NVCC's static runtime library is."""
    folders = (NVCC.parent.parent / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"))
    return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)


def why_not(name: str) -> tuple[str, str] | None:
    """What keeps a library from being built, and the remedy."""
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
    if name == "cpu":
        return None
    remedy = "install CUDA's compiler, 12.4 or newer, and let CUDA_HOME say where"
    if NVCC is None:
        return "no CUDA compiler (nvcc, with its headers) was found", remedy
    version = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    )
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        return f"{NVCC} is older than 12.4", remedy
    if cudart_folder() is None:
        return f"libcudart_static.a is not beside {NVCC}", remedy
    return None


def leave_out(name: str, reason: str, remedy: str, inplace: bool) -> None:
    """Say that a library is left out, or raise if it is required."""
    if inplace:  # an older one would be loaded
        Path(f"sinkattn/_C_{name}.so").unlink(missing_ok=True)
    if name in REQUIRED:
        raise SetupError(
            f"SINKATTN_REQUIRE={name}, but the compiled {name.upper()} ops cannot be built: {reason}. Remedy: {remedy}."
        )
    rule = "*" * 100
    slower = "on the CPU" if name == "cpu" else "on a GPU, where Triton's kernels take their place"
    message = (
        f"\n{rule}\nsinkattn is built WITHOUT its compiled {name.upper()} ops: {reason}.\n"
        f"The package works without them, more slowly {slower}.\n"
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
        if REQUIRED - set(LIBRARIES):
            raise SetupError(f"SINKATTN_REQUIRE={','.join(sorted(REQUIRED))}: only cpu and cuda can be required")
        if not self.editable_mode:  # what an earlier build left there would be shipped
            shutil.rmtree(Path(self.build_lib, "sinkattn"), ignore_errors=True)
        for name, reason in LIBRARIES.items():
            if reason:
                leave_out(name, *reason, inplace=self.editable_mode)
        super().run()


class BuildExt(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        name = ext.name.removeprefix("sinkattn._C_")
        try:
            self.compile_and_link(name, Path(self.get_ext_fullpath(ext.name)))
        except subprocess.CalledProcessError as error:
            reason = f"the compiler failed.\n{shlex.join(map(str, error.cmd))}\n{error.stderr.strip()}"
            compiler = (
                "let CXX name a compiler for C++17, g++ 11 or newer" if name == "cpu" else "try another CUDA compiler"
            )
            leave_out(name, reason, compiler, inplace=self.editable_mode)
            self.distribution.ext_modules.remove(ext)
            raise CompileError(str(error)) from error  # a warning, since the extension is optional

    def compile_and_link(self, name: str, library: Path):
        sources, more = Path("csrc", name), shlex.split(os.environ.get("CXXFLAGS", ""))
        include = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", str(TORCH / "include")]
        include.append(f"-fmacro-prefix-map={TORCH}=torch")  # __FILE__ in messages
        runtime = []
        if name == "cpu":
            jobs = [self.job([*COMPILER, *FLAGS, *include, *more], sources / "ops_cpu.cpp", "ops_cpu")]
            for instructions, options in INSTRUCTION_SETS.items():
                options = [*COMPILER, *FLAGS, f"-DSINKATTN_ISA={instructions}", *options, *more]
                for file in ("attention", "linear"):
                    jobs.append(self.job(options, sources / f"{file}.cpp", f"{file}_{instructions}"))
        else:
            include += ["-isystem", str(NVCC.parent.parent / "include")]
            nvcc = [str(NVCC), "-ccbin", COMPILER[0], *NVCC_FLAGS]
            jobs = [self.job([*nvcc, *gpus], sources / f"{file}.cu", file) for file, gpus in CUDA_SOURCES.items()]
            jobs.append(self.job([*COMPILER, *FLAGS, *include, *more], sources / "ops_cuda.cpp", "ops_cuda"))
            runtime = [f"-L{cudart_folder()}", "-Wl,--as-needed", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        OBJECTS.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        newest = max(
            path.stat().st_mtime for path in (*sources.iterdir(), *sources.parent.glob("*.h"), Path("setup.py"))
        )
        stale = [job for job in jobs if not Path(job[-1]).exists() or Path(job[-1]).stat().st_mtime < newest]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
            list(pool.map(self.call, stale))
        # libtorch.so is needed by name: torch.ops.load_library looks for symbols in what a library needs. No rpath:
        # torch has been imported by then.
        link = [*COMPILER, "-shared", "-o", str(library), *(job[-1] for job in jobs), f"-L{TORCH / 'lib'}"]
        self.call([*link, "-Wl,--no-as-needed", "-ltorch", *runtime, *shlex.split(os.environ.get("LDFLAGS", ""))])

    def job(self, command: list[str], source: Path, name: str) -> list[str]:
        """Command that compiles a file. The name of its output, which comes last, changes with the options."""
        command = [*command, "-c", str(source), "-o"]
        return [*command, str(OBJECTS / f"{name}_{zlib.crc32(shlex.join(command).encode()):08x}.o")]

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
NVCC = find_nvcc()
LIBRARIES = {name: why_not(name) for name in ("cpu", "cuda")}

setup(
    ext_modules=[
        Extension(f"sinkattn._C_{name}", [], optional=name not in REQUIRED)
        for name, reason in LIBRARIES.items()
        if not reason
    ],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
