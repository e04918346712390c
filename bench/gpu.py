"""What the benches of kernels share: times by CUDA graphs, the read bandwidth, a cold L2, tensors, and peers."""

import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from common import SINKS, console, median, write_json
from torch.nn.attention import SDPBackend

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SDPA = {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION}


def graph_us(calls: list[Callable], replays: int = 20) -> float:
    """Microseconds of one call: median over replays of a graph that makes each of the calls once."""
    for call in calls:  # all, as what a cache needs is made at its first call
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times, warm = [], time.perf_counter() + 0.05
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times)


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (8 * BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(8):
        total += tl.load(x + first + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


def read_bandwidth() -> float:
    """Bytes a second that a kernel reads which does nothing else."""
    x = torch.randn(2**30, device="cuda")
    out = x.new_empty(2**30 // 8192)
    return x.nbytes / (graph_us([lambda: _read_kernel[(len(out),)](x, out, BLOCK=1024, num_warps=4)] * 2) * 1e-6)


def cold(size: int) -> int:
    """How many things of `size` bytes, used in turn, exceed the L2 four times over."""
    return -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // size)


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def operands(num_heads: int, num_kv_heads: int, batch: int, tokens: int, head_dim: int = 128, dtype=torch.bfloat16):
    """q, k, v, each (batch, heads, tokens, head_dim), and a rotation (batch, tokens, 2, 2, head_dim / 2) float32.

    Sinks have the angles of text, as they have until a text outgrows the cache.
    """
    q, k, v = (new(batch, heads, tokens, head_dim, dtype=dtype) for heads in (num_heads, num_kv_heads, num_kv_heads))
    angles = new(batch, tokens, 1, 2, head_dim // 2, dtype=torch.float32)
    return q, k, v, angles.repeat(1, 1, 2, 1, 1)


def counters_of(kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`arrivals` for a cache of one token a row."""
    return torch.zeros(kv[0].shape[0] * kv[0].shape[1], dtype=torch.int32, device="cuda")


def sizes(capacity: int, head_dim: int = 128) -> dict:
    """sinkattn's scalars for a cache of `capacity` tokens."""
    return dict(sink_size=SINKS, window_size=capacity - SINKS, scale=head_dim**-0.5)


def in_pages(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Caches, each (batch, num_kv_heads, capacity, head_dim), as pages of 16: (blocks, num_kv_heads, 16, head_dim)."""
    _, num_kv_heads, _, head_dim = pairs[0][0].shape
    return [tuple(x.view(-1, num_kv_heads, 16, head_dim) for x in pair) for pair in pairs]


def flashinfer_us(case: tuple, q, pages: list[tuple], blocks=None, rotates: bool = False) -> float | None:
    """Microseconds of FlashInfer's decode by the better of its two kernels, None where neither can do it.

    q: (batch, num_heads, 1, head_dim). pages: of keys and values, each (blocks, num_kv_heads, 16, head_dim), read in
    turn. blocks: those of all texts, (batch * pages of a text,) int32, None for all in their order.
    """
    import flashinfer

    batch, num_heads, _, head_dim = q.shape
    like = dict(dtype=torch.int32, device="cuda")
    blocks = torch.arange(len(pages[0][0]), **like) if blocks is None else blocks
    of_text, num_kv_heads = len(blocks) // batch, pages[0][0].shape[1]

    def measure(_: str, tensor_cores: bool) -> float:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(2**28, dtype=torch.uint8, device="cuda"), "HND", use_cuda_graph=True,
            use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=torch.zeros(batch + 1, **like),
            paged_kv_indices_buffer=torch.zeros(len(blocks), **like),
            paged_kv_last_page_len_buffer=torch.zeros(batch, **like),
        )  # fmt: skip
        wrapper.plan(
            torch.arange(batch + 1, **like) * of_text, blocks, torch.full((batch,), 16, **like), num_heads,
            num_kv_heads, head_dim, 16, q_data_type=q.dtype, kv_data_type=pages[0][0].dtype,
            pos_encoding_mode="ROPE_LLAMA" if rotates else "NONE",
        )  # fmt: skip
        return graph_us([lambda pair=pair: wrapper.run(q[:, :, 0], pair) for pair in pages])

    found = [tried(case, measure, "flashinfer", tensor_cores) for tensor_cores in (False, True)]
    return min((us for us in found if us is not None), default=None)


def installed(providers: tuple[str, ...]) -> list[str]:
    """The providers without those of FlashInfer, where that is missing."""
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        missing = [name for name in providers if name.startswith("flashinfer")]
        console.print(f"[yellow]missing peers:[/yellow] {', '.join(missing)} ({error})")
        return [name for name in providers if name not in missing]
    return list(providers)


def worth(providers: list[str], in_tables: bool, common: bool) -> list[str]:
    """The providers of a case; FlexAttention compiles for a while, and so does FlashInfer for a dtype and head_dim."""
    left_out = (() if in_tables else ("flex",)) + (() if common else ("flashinfer",))
    return [name for name in providers if not name.startswith(left_out)]


def tried(case: tuple, measure: Callable[..., float], provider: str, *arguments) -> float | None:
    """What `measure` measures; None, and why on the terminal, where the provider cannot do it."""
    try:
        return measure(provider, *arguments)
    except (RuntimeError, OSError, ValueError) as error:
        console.print(f"[yellow]{provider} cannot do[/yellow] {case}: {str(error)[:120]}")
        return None


def title() -> str:
    """Of a table: the device and the versions."""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"


def write_about(path: Path, **more) -> None:
    """Where a bench ran, and what else its figures depend on."""
    versions = {}
    for name in ("torch", "triton", "flashinfer-python"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    about = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "versions": versions}
    write_json(path, about | more)
