"""Compiles csrc/cpu into sinkattn/_C_cpu.so and csrc/cuda into sinkattn/_C_cuda.so; other metadata: pyproject.toml.

torch is no build requirement: an isolated build would download another one. The headers of the torch that is installed
already are used instead, and the libraries, on LibTorch's stable ABI, serve every torch from 2.10 on. They have no
Python symbols either, hence the wheel's tag py3-none-<platform>. The CUDA ops are compiled if that torch has CUDA, as
no other loads them, or if they are required, for which the headers of any torch will do. What cannot be built for want
of headers or a compiler is left out, loudly, and the package works without it. Environment variables:

    SINKATTN_REQUIRE=cpu,cuda  build these; leaving out one of them is an error
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
import time
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
AMPERE = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]  # and later
LARGE = AMPERE[1:]  # Hopper and later
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]
CUDA_SOURCES = {  # file, the slowest to compile first: the GPUs it is for
    "sm80/decode": AMPERE,
    "sm80/decode_int8": LARGE,
    "sm80/decode_e4m3": LARGE,
    "sm80/decode_pages": AMPERE,
    "sm90/prefill": HOPPER,
    "sm90/linear_wide": HOPPER,
    "sm80/linear": AMPERE,
    "sm80/stack": AMPERE,
    "sm90/gather": HOPPER,
    "sm90/round": HOPPER,
    "sm80/step": AMPERE,
}

REQUIRED = {name for name in os.environ.get("SINKATTN_REQUIRE", "").split(",") if name}


def say(text: str) -> None:
    """Tell the build's log and, as pip shows that only if a build fails or under `pip -v`, the terminal."""
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError):
            Path("/dev/tty").write_text(f"\b \n{text} ")  # pip's spinner is one character and stays behind the text


def find_torch() -> Path | None:
    """Folder of the installed torch, which is not imported. An isolated build doesn't have it on sys.path."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment doesn't see the user's packages
        roots.append(site.getusersitepackages())
    folders += [Path(root) / "torch" for root in roots]
    return next((folder for folder in folders if (folder / "version.py").exists()), None)


def torch_version(name: str = "__version__") -> str | None:
    """What the version.py of the installed torch says: its version or that of its `cuda`; None if that is None."""
    found = re.search(rf"^{name}\b.*= ['\"](.+)['\"]", (TORCH / "version.py").read_text(), re.MULTILINE)
    return found and found[1]


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
    if tuple(map(int, re.findall(r"\d+", torch_version() or "")[:2])) < OLDEST_TORCH:
        return f"the torch in {TORCH} is older than 2.10", "`pip install --upgrade torch`"
    if not (TORCH / "include/torch/csrc/stable/ops.h").exists():
        return f"the torch in {TORCH} has no C++ headers", "install a torch that has them, as those on PyPI do"
    if COMPILER is None:
        return "no C++ compiler was found", "install g++ or clang++, or let CXX name one"
    if not shutil.which(COMPILER[0]):
        return f"CXX names {COMPILER[0]}, which is not there", "let CXX name g++ or clang++"
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


def leave_out(name: str, reason: str, remedy: str, inplace: bool, said: str = "") -> None:
    """Say that a library is left out, or raise if it is required."""
    if inplace:  # an older one would be loaded
        Path(f"sinkattn/_C_{name}.so").unlink(missing_ok=True)
    if name in REQUIRED:
        raise SetupError(f"SINKATTN_REQUIRE={name}, but these ops cannot be built: {reason}. Remedy: {remedy}.{said}")
    rule = "*" * 100
    slower = "on the CPU" if name == "cpu" else "on a GPU, where Triton's kernels take their place"
    message = (
        f"\n{rule}\nsinkattn is built WITHOUT its compiled {name.upper()} ops: {reason}.{said}\n"
        f"The package works without them, more slowly {slower}.\n"
        f"To get them: {remedy}; then install sinkattn again, with `pip install --force-reinstall --no-deps\n"
        "--no-cache-dir` and what you gave pip now. `sinkattn info` shows whether they are there.\n"
        f"{rule}\n"
    )
    say(message)


def at_fault(command: list[str]) -> tuple[str, str]:
    """What a failed command shows to be at fault, and the remedy: less and less is compiled with the same options."""
    if "-c" not in command:
        return f"linking with the libraries in {TORCH / 'lib'} failed", "install a linker and a torch that has them"
    *options, _, source, _, _ = command
    probe = OBJECTS / f"probe{Path(source).suffix}"

    def compiles(text: str) -> bool:
        probe.write_text(text)
        return subprocess.run([*options, "-c", probe, "-o", OBJECTS / "probe.o"], capture_output=True).returncode == 0

    if not compiles("#include <optional>\nint f() { if constexpr (true) return *std::optional(0); }\n"):
        if options[0] == str(NVCC):
            return f"{NVCC} with {COMPILER[0]} compiles no C++17 at all", "let CUDA_HOME or CXX name others"
        return f"{COMPILER[0]} compiles no C++17 with these options", "let CXX name another, g++ 11 or newer"
    headers = sorted(set(re.findall("#include <torch/.+>", Path(source).read_text())))
    if not compiles("\n".join([*headers, ""])):
        return f"the headers of torch {torch_version()} in {TORCH} do not compile", "install it or another"
    though = f" with the headers of torch {torch_version()}, though they alone do" if headers else ""
    return f"{source} does not compile{though}", "take another torch or compiler, and report this"


class BuildPy(build_py):
    def run(self):
        if REQUIRED - {"cpu", "cuda"}:
            raise SetupError(f"SINKATTN_REQUIRE={','.join(sorted(REQUIRED))}: only cpu and cuda can be required")
        if not self.editable_mode:  # what an earlier build left there would be shipped
            shutil.rmtree(Path(self.build_lib, "sinkattn"), ignore_errors=True)
        for name, reason in LIBRARIES.items():
            if reason:
                leave_out(name, *reason, inplace=self.editable_mode)
        if "cuda" not in LIBRARIES:
            say(f"sinkattn: torch {torch_version()} has no CUDA: no CUDA ops are built (SINKATTN_REQUIRE=cuda would)")
            if self.editable_mode:
                Path("sinkattn/_C_cuda.so").unlink(missing_ok=True)
        super().run()


class BuildExt(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        name = ext.name.removeprefix("sinkattn._C_")
        try:
            self.compile_and_link(name, Path(self.get_ext_fullpath(ext.name)))
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr, flush=True)
            reason, remedy = at_fault(error.cmd)
            said = [line for line in error.stderr.splitlines() if re.search("error|cannot find|undefined", line)]
            said = "\n  ".join([f"\n{error.cmd[0]} says:", *said[:3]]) if said else ""
            leave_out(name, reason, remedy, self.editable_mode, said)
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
            jobs = [
                self.job([*nvcc, *gpus], sources / f"{file}.cu", Path(file).name) for file, gpus in CUDA_SOURCES.items()
            ]
            jobs.append(self.job([*COMPILER, *FLAGS, *include, *more], sources / "ops_cuda.cpp", "ops_cuda"))
            runtime = [f"-L{cudart_folder()}", "-Wl,--as-needed", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        OBJECTS.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        parts = (*sources.rglob("*.*"), *sources.parent.glob("*.h"), Path("setup.py"))
        newest = max(path.stat().st_mtime for path in parts)
        stale = [job for job in jobs if not Path(job[-1]).exists() or Path(job[-1]).stat().st_mtime < newest]
        start, at_once, done = time.monotonic(), int(os.environ.get("MAX_JOBS", 2)), []

        def compile_one(job: list[str]) -> None:
            self.call(job)
            done.append(Path(job[-1]).stem.rpartition("_")[0])
            say(f"sinkattn: {time.monotonic() - start:4.0f} s, {len(done)} of {len(stale)}: {done[-1]}")

        if stale:
            say(f"sinkattn: {name.upper()} ops, torch {torch_version()}: {len(stale)} files, {at_once} at a time")
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(compile_one, stale))
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
WANTED = ["cpu"] if TORCH and not torch_version("cuda") and "cuda" not in REQUIRED else ["cpu", "cuda"]
LIBRARIES = {name: why_not(name) for name in WANTED}

setup(
    ext_modules=[
        Extension(f"sinkattn._C_{name}", [], optional=name not in REQUIRED)
        for name, reason in LIBRARIES.items()
        if not reason
    ],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
