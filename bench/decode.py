"""Decode attention on one GPU: python bench/decode.py --output-dir bench/results/h200

One query per row, batch rows, a full cache of C = 4 + (C - 4) tokens. sinkattn's figure holds all that a step needs:
rotation of q and k, append, sinks at their cache distance, attention, combination. The peers attend over C keys that
are rotated and stored already, and do nothing else:

    sdpa_cudnn, sdpa_flash    torch scaled_dot_product_attention, that backend forced
    flashinfer_none           BatchDecodeWithPagedKVCacheWrapper, page 16, best of tensor cores on and off
    flashinfer_rope           the same with pos_encoding_mode="ROPE_LLAMA", StreamingLLM's rotation on the fly

Times are medians of CUDA graph replays, each graph a round through enough caches to exceed the L2 four times. The
floor is the bytes of K and V, 2 * batch * num_kv_heads * C * head_dim * 2, over the read bandwidth of the same run.
"""

import csv
import itertools
import time
from pathlib import Path
from typing import Annotated

import torch
import triton
import triton.language as tl
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sinkattn import ops

SINKS = 4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PROVIDERS = ("sinkattn", "sdpa_cudnn", "sdpa_flash", "flashinfer_none", "flashinfer_rope")
COLUMNS = ("num_heads", "num_kv_heads", "head_dim", "batch", "capacity", "dtype", "provider", "us", "floor_us")
console = Console(width=160)


def graph_us(calls: list, replays: int = 20) -> float:
    """Microseconds of one call: median over replays of a graph that makes each of the calls once."""
    for call in calls[:2]:
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
    return sorted(times)[len(times) // 2]


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


def caches(batch, heads, capacity, head_dim, dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Enough (k, v), each (batch, heads, capacity, head_dim), to exceed the L2 four times over; at least 8 pairs."""
    size = 2 * batch * heads * capacity * head_dim * dtype.itemsize
    wanted = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    shape = (batch, heads, capacity, head_dim)
    return [
        tuple(torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
        for _ in range(max(8, -(-wanted // size)))
    ]


def measure(provider, num_heads, num_kv_heads, head_dim, batch, capacity, dtype, op=ops.decode) -> float:
    """Microseconds of one layer's step; raises what the provider raises where it cannot. op: sinkattn's, for tuning."""
    q = torch.randn(batch, num_heads, 1, head_dim, device="cuda", dtype=dtype)
    pairs = caches(batch, num_kv_heads, capacity, head_dim, dtype)
    if provider == "sinkattn":
        k, v = (torch.randn(batch, num_kv_heads, 1, head_dim, device="cuda", dtype=dtype) for _ in range(2))
        lengths = torch.randint(capacity, 10 * capacity, (batch,), device="cuda")
        rotation = torch.randn(batch, 1, 2, 2, head_dim // 2, device="cuda")
        sizes = dict(sink_size=SINKS, window_size=capacity - SINKS, scale=head_dim**-0.5)
        calls = [lambda kv=kv: op(q, k, v, *kv, lengths, None, rotation, None, None, **sizes) for kv in pairs]
        return graph_us(calls)
    if provider.startswith("sdpa"):
        backend = SDPBackend.CUDNN_ATTENTION if provider == "sdpa_cudnn" else SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(backend):
            return graph_us([lambda kv=kv: scaled_dot_product_attention(q, *kv, enable_gqa=True) for kv in pairs])
    return min(flashinfer_us(provider, q, pairs, tensor_cores) for tensor_cores in (False, True))


def flashinfer_us(provider, q, pairs, tensor_cores) -> float:
    import flashinfer

    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, capacity = pairs[0][0].shape[1:3]
    pages = capacity // 16
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(2**28, dtype=torch.uint8, device="cuda"),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=torch.zeros(batch + 1, dtype=torch.int32, device="cuda"),
        paged_kv_indices_buffer=torch.zeros(batch * pages, dtype=torch.int32, device="cuda"),
        paged_kv_last_page_len_buffer=torch.zeros(batch, dtype=torch.int32, device="cuda"),
    )
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages,
        torch.arange(batch * pages, dtype=torch.int32, device="cuda"),
        torch.full((batch,), 16, dtype=torch.int32, device="cuda"),
        num_heads,
        num_kv_heads,
        head_dim,
        16,
        pos_encoding_mode="ROPE_LLAMA" if provider == "flashinfer_rope" else "NONE",
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    paged = [tuple(x.view(batch * pages, num_kv_heads, 16, head_dim) for x in pair) for pair in pairs]
    rows = q[:, :, 0]
    return graph_us([lambda pair=pair: wrapper.run(rows, pair) for pair in paged])


def main(
    output_dir: Annotated[Path, typer.Option(help="Where decode.csv goes.")] = Path("bench/results"),
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,64",
    capacities: Annotated[str, typer.Option(help="Tokens in the cache, sinks included.")] = "1024,4096",
    head_dims: Annotated[str, typer.Option(help="Sizes of a head.")] = "128",
    dtypes: Annotated[str, typer.Option(help="bfloat16, float16.")] = "bfloat16",
) -> None:
    """Time sinkattn's decode beside its peers; print the table, write decode.csv."""
    try:
        import flashinfer  # noqa: F401

        providers = PROVIDERS
    except ImportError as error:
        providers = PROVIDERS[:3]
        console.print(f"[yellow]missing peers:[/yellow] flashinfer_none, flashinfer_rope ({error})")
    bandwidth = read_bandwidth()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    title = f"us a layer and step; {torch.cuda.get_device_name()}, {versions}, reads {bandwidth / 1e12:.2f} TB/s"
    table = Table("heads/kv", "dim", "dtype", "batch", "C", "floor", *providers, "share of floor", title=title)
    rows = []
    split = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    cases = itertools.product(dtypes.split(","), split(head_dims), (32, 8), split(batches), split(capacities))
    for dtype, head_dim, num_kv_heads, batch, capacity in cases:
        floor = 4 * batch * num_kv_heads * capacity * head_dim / bandwidth * 1e6
        times = {}
        for provider in providers:
            try:
                times[provider] = measure(provider, 32, num_kv_heads, head_dim, batch, capacity, DTYPES[dtype])
            except RuntimeError as error:
                console.print(f"[yellow]{provider} cannot do this row:[/yellow] {str(error)[:120]}")
                continue
            rows.append((32, num_kv_heads, head_dim, batch, capacity, dtype, provider, times[provider], floor))
        cells = [f"{times[provider]:.1f}" if provider in times else "-" for provider in providers]
        share = f"{floor / times['sinkattn']:.0%}"
        table.add_row(
            f"32/{num_kv_heads}", str(head_dim), dtype, str(batch), str(capacity), f"{floor:.1f}", *cells, share
        )
    console.print(table)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "decode.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((*row[:-2], f"{row[-2]:.2f}", f"{row[-1]:.2f}") for row in rows)


if __name__ == "__main__":
    typer.run(main)
