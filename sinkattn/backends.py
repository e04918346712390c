"""The backends of the ops: what each needs, which calls it takes, and what runs then.

`torch.ops.sinkattn.decode`, `.prefill` and `.attend_pages`, which `schemas` defines, choose as "auto" does.
"""

import ctypes
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .schemas import OWN_SIZES, Call, Paged, Sizes, Tensors

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
CUDA_HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))  # of csrc/cuda
CUDA_MAX_GROUP = 16
CUDA_PREFILL_MAX_SINKS = (128, 48)  # with heads of up to 128, and with larger ones
CUDA_FEW = 16  # tokens of a row that its decode takes, where the ring has room for all of them beside the window


# What there is.


def _load(name: str) -> bool:
    """Load compiled ops, which register themselves. False where they were not built, or the driver is too old."""
    library = Path(__file__).parent / name
    if not library.exists():
        return False
    torch.ops.load_library(library)
    return name == "_C_cpu.so" or bool(ctypes.CDLL(library).sinkattn_cuda_runs())


def _cpu_isa() -> str:
    """What the compiled CPU ops run here. ValueError if SINKATTN_CPU_ISA names no instruction set that this CPU has."""
    library = ctypes.CDLL(Path(__file__).parent / "_C_cpu.so")
    library.sinkattn_cpu_isa.restype = ctypes.c_char_p
    name = library.sinkattn_cpu_isa()
    if name is None:
        library.sinkattn_cpu_isa_error.restype = ctypes.c_char_p
        raise ValueError(library.sinkattn_cpu_isa_error().decode())
    return name.decode()


HAS_CPU_LIBRARY = _load("_C_cpu.so")
CPU_ISA = _cpu_isa() if HAS_CPU_LIBRARY else ""  # what the compiled CPU ops run here: "amx", ..., "portable"
HAS_CUDA_LIBRARY = torch.version.cuda is not None and _load("_C_cuda.so")
if not HAS_CPU_LIBRARY:
    torch.library.impl("sinkattn::decode", "CPU", reference.decode)
    torch.library.impl("sinkattn::prefill", "CPU", reference.attention)
    torch.library.impl("sinkattn::attend_pages", "CPU", reference.attend_pages)
    torch.library.impl("sinkattn::linear", "CPU", reference.linear)


def _triton(op: str, module: str = "") -> Callable:
    def run(*args, **kwargs):  # on first use: importing triton takes a while
        kernels = importlib.import_module(f".kernels.{module or op}", __package__)
        return getattr(kernels, op)(*args, **kwargs)

    return run


def _chosen_anew(op: str) -> Callable:
    kind, own = Paged if op == "attend_pages" else Tensors, OWN_SIZES.get(op, ())
    first = len(kind._fields)

    def run(*args):  # the tensors, the sizes, what decode alone takes; those at the end may be missing
        tensors, sizes, more = kind(*args[:first]), Sizes(*args[first : first + 6]), args[first + 6 :]
        sizes = sizes._replace(**dict(zip(own, more, strict=False)))
        return chosen(op, "auto", tensors, sizes)(*tensors, *sizes.of(op), *more[len(own) :])

    return run


torch.library.impl("sinkattn::attend_shared", "cuda", _triton("attend_shared", "shared"))
torch.library.impl("sinkattn::attend_shared", "cpu", reference.attend_shared)
for _name in ("decode", "prefill", "attend_pages"):
    _run_triton = _triton(_name, "pages" if _name == "attend_pages" else "")
    torch.library.impl(f"sinkattn::{_name}_triton", ("cuda", "cpu"), _run_triton)  # on the CPU: Triton's interpreter
    torch.library.impl(f"sinkattn::{_name}", "cuda", _chosen_anew(_name))


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of csrc/cuda that want nothing special run on a device."""
    return device.type == "cuda" and HAS_CUDA_LIBRARY and _is_served(device.index)


@torch.compiler.assume_constant_result
def _is_served(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


@torch.compiler.assume_constant_result
def is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


@torch.compiler.assume_constant_result
def has_float8(index: int) -> bool:
    """Whether a GPU converts float8_e4m3fn."""
    return torch.cuda.get_device_capability(index) >= (8, 9)


@torch.compiler.assume_constant_result
def is_new(index: int) -> bool:
    """Whether a GPU is one that the decode of csrc/cuda takes caches in 8 bits on."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


@torch.compiler.assume_constant_result
def is_large(index: int) -> bool:
    """Whether a GPU has the clusters and the shared memory that every decode of csrc/cuda may want."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major >= 9 and properties.shared_memory_per_block_optin >= 227 * 1024


def begins_aligned(x: Tensor) -> bool:
    """Whether numbers begin at a multiple of 16 bytes. Compilation knows no offsets: it takes it so."""
    return torch.compiler.is_compiling() or x.storage_offset() * x.itemsize % 16 == 0


def _is_aligned(x: Tensor) -> bool:
    """Whether rows of numbers begin at multiples of 16 bytes."""
    return begins_aligned(x) and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:3])


# What each backend is: why it cannot serve a kind of device, why it does not take a call, and what runs the call.


class Backend(NamedTuple):
    """missing: of a device type ("cpu", "cuda", ...); refusal: of an op's name and tensors, behind "backend ... takes".
    Both say why not, or None. run: of an op's name, tensors and sizes; gives what is called with the latter two.
    """

    missing: Callable[[str], str | None]
    refusal: Callable[[str, Call], str | None]
    run: Callable[[str, Call, Sizes], Callable]


def _missing_cuda(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"the CUDA C++ ops need tensors on a GPU, not on {device_type!r}"
    return None if HAS_CUDA_LIBRARY else "the CUDA C++ ops were not built, or the driver is too old for them"


def _missing_triton(device_type: str) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); `pip install triton`"
    if device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"Triton kernels need a GPU, not {device_type!r} (or TRITON_INTERPRET=1 on the CPU, which is slow)"


def _missing_cpu(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"the compiled CPU ops need tensors on the CPU, not on {device_type!r}"
    return None if HAS_CPU_LIBRARY else "the compiled CPU ops were not built; see `sinkattn info`"


def _refused_by_kernels(op: str, t: Call) -> str | None:
    dtype, head_dim = t.q.dtype, max(t.q.shape[-1], t.v.shape[-1])
    if dtype in DTYPES and head_dim <= MAX_HEAD_DIM:
        return None
    return (
        f"float16, bfloat16 and float32 and head_dim up to {MAX_HEAD_DIM}, not {dtype} and {head_dim}; "
        "backend='reference' takes any"
    )


def _without_float8(t: Call) -> str | None:
    """Why a GPU does not take the caches: it cannot convert them."""
    if t.k_cache.dtype == torch.float8_e4m3fn and t.q.is_cuda and not has_float8(t.q.device.index):
        return "float8_e4m3fn caches on GPUs of compute capability 8.9 and later; int8 serves on all"
    return None


def _refused_by_cuda(op: str, t: Call) -> str | None:
    if reason := _without_float8(t):
        return reason
    if (reason := _refused_by_kernels(op, t)) or op != "decode":  # of others, Triton runs what csrc/cuda does not
        return reason
    head_dims, group = (t.q.shape[-1], t.v.shape[-1]), t.q.shape[1] // t.v.shape[1]
    apart = [cache.stride() for cache in (t.k_cache, t.v_cache) if not _is_aligned(cache)]
    if t.q.dtype == torch.float32:
        reason = f"float16 and bfloat16, not {t.q.dtype}"
    elif head_dims not in CUDA_HEAD_DIMS:
        reason = f"(head_dim, v_head_dim) one of {', '.join(map(str, CUDA_HEAD_DIMS))}, not {head_dims}"
    elif group > CUDA_MAX_GROUP:
        reason = f"up to {CUDA_MAX_GROUP} query heads per key head, not {group}"
    elif t.k_cache.dtype != t.q.dtype and not is_new(t.q.device.index):
        reason = f"{t.k_cache.dtype} caches on GPUs of compute capability 9.0 and later"
    elif apart:
        reason = f"caches whose rows are aligned to 16 bytes, not strides {apart[0]}"
    return reason and f"{reason}; backend='triton' takes more"


def _refused_by_triton(op: str, t: Call) -> str | None:
    if t.q.device.type == "cpu" and t.q.dtype == torch.bfloat16:
        return "float32 and float16 on the CPU: Triton's interpreter multiplies bfloat16 wrongly"
    return _without_float8(t) or _refused_by_kernels(op, t)


def _is_few(t: Tensors, s: Sizes) -> bool:
    """Whether the decode of csrc/cuda can take a prefill: no token then takes the slot of one that another sees."""
    tokens, ring_size = t.q.shape[2], t.k_cache.shape[2] - s.sink_size
    fits = 0 < tokens <= CUDA_FEW and len(t.q) * tokens <= 65535  # blocks of a grid
    fits = fits and s.dense_window == 0 and ring_size >= s.window_size + tokens - 1
    return fits and _refused_by_cuda("decode", t) is None and is_large(t.q.device.index)


def _is_in_cuda_prefill(t: Tensors, s: Sizes) -> bool:
    """Whether csrc/cuda takes a prefill."""
    return _is_few(t, s) or (
        t.q.dtype in (torch.float16, torch.bfloat16)
        and t.q.shape[3] == t.v.shape[3]
        and t.q.shape[3] % 8 == 0 < t.q.shape[3] <= MAX_HEAD_DIM
        and s.sink_size <= CUDA_PREFILL_MAX_SINKS[0 if t.q.shape[3] <= 128 else 1]
        and (t.rotation is None or s.rotary_start % 4 == t.rotation.shape[4] % 4 == 0)
        and all(_is_aligned(x) for x in t[:5])
        and is_hopper(t.q.device.index)
    )


def _is_in_cuda_pages(t: Paged, s: Sizes) -> bool:
    """Whether csrc/cuda takes a call over pages."""
    rows = max(len(t.q), len(t.lengths))  # of a grid
    return s.max_tokens == 1 and rows <= 65535 and _refused_by_cuda("decode", t) is None and is_large(t.q.device.index)


def _op(name: str) -> Callable:
    return getattr(torch.ops.sinkattn, name).default


def _run_cuda(op: str, t: Call, s: Sizes) -> Callable:
    in_pages = isinstance(t, Paged) and _is_in_cuda_pages(t, s)
    is_compiled = in_pages or op == "decode" or (isinstance(t, Tensors) and _is_in_cuda_prefill(t, s))
    return _op(f"{op}_cuda" if is_compiled else f"{op}_triton")


COMPILED = {
    _op(f"{name}_cuda") for name in ("decode", "prefill", "attend_pages")
}  # ops of csrc, for whatever they are chosen for
if HAS_CPU_LIBRARY:
    COMPILED |= {_op("decode"), _op("prefill"), _op("attend_pages")}

BACKENDS = {
    "cuda": Backend(_missing_cuda, _refused_by_cuda, _run_cuda),
    "triton": Backend(_missing_triton, _refused_by_triton, lambda op, t, s: _op(f"{op}_triton")),
    "cpu": Backend(_missing_cpu, _refused_by_kernels, lambda op, t, s: _op(op)),
    "reference": Backend(
        lambda device_type: None,
        lambda op, t: None,
        lambda op, t, s: {"prefill": reference.attention}.get(op) or getattr(reference, op),
    ),
}


def chosen_shared(backend: str, q: Tensor, k_shared: Tensor, v_shared: Tensor) -> tuple[Callable, int]:
    """What runs `ops.attend_shared`, and in how many parts: a kernel wherever Triton serves, else the reference.

    Raises ValueError if "triton" or "cuda" was asked for by name and the kernel does not take the call.
    """
    if backend in ("cpu", "reference") or (backend == "auto" and not q.is_cuda):
        return reference.attend_shared, 1
    call = Tensors(q, k_shared, v_shared, k_shared, v_shared, q)
    if reason := _missing_triton(q.device.type) or _refused_by_triton("decode", call):
        if backend == "auto":
            return reference.attend_shared, 1
        raise ValueError(f"backend {backend!r} takes {reason}")
    shared = importlib.import_module(".kernels.shared", __package__)
    return (_op("attend_shared") if q.is_cuda else shared.attend_shared), shared.parts_of(q, k_shared, v_shared)


def missing(backend: str, device_type: str) -> str | None:
    """Why a backend cannot serve tensors of a device type, or None if it can. Raises ValueError for other names."""
    if backend == "auto":
        if device_type not in ("cpu", "cuda"):
            return f"no backend runs on {device_type!r}; backend='reference' might"
        return _missing_triton(device_type) if device_type == "cuda" else None
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(map(repr, ('auto', *BACKENDS)))}")
    return BACKENDS[backend].missing(device_type)


def chosen(op: str, backend: str, t: Call, s: Sizes) -> Callable:
    """What runs a call: an op of `torch.ops.sinkattn`, or a function of `reference`.

    Raises ValueError if the backend was asked for by name and does not take the call.
    """
    candidates = [backend]
    if backend == "auto" and t.q.device.type == "cuda":
        has_cuda = HAS_CUDA_LIBRARY and (op != "decode" or is_large(t.q.device.index))
        candidates = [*(["cuda"] if has_cuda else []), "triton", "reference"]
    elif backend == "auto":
        candidates = ["cpu", "reference"]
    for name in candidates:
        reason = BACKENDS[name].refusal(op, t)
        if reason is None:
            return BACKENDS[name].run(op, t, s)
    raise ValueError(f"backend {backend!r} takes {reason}")
