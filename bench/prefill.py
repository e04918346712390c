"""Prefill attention on one GPU: python bench/prefill.py --output-dir bench/results/h200

A prompt of T tokens into an empty cache of C = 4 + (C - 4) tokens. sinkattn's figure holds all that a prompt needs:
rotation of q and k, attention over sinks and window, the ring written. The peers are given rotated keys and write no
cache:

    flex                            FlexAttention, compiled, block mask of sinks and window
    flashinfer_fa2, flashinfer_fa3  single_prefill_with_kv_cache, that backend, window of C tokens and no sinks
    sdpa_cudnn, sdpa_flash          scaled_dot_product_attention, that backend forced, causal over all T tokens

Times are medians with an L2 that is flushed before each. TFLOP/s count 4 * head_dim * num_heads * batch for each pair
of query and key that the provider looks at by its definition: sinks and window, the window alone, all before.
"""

import csv
import itertools
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from decode import DTYPES, SINKS, console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sinkattn import ops

PROVIDERS = ("sinkattn", "flex", "flashinfer_fa2", "flashinfer_fa3", "sdpa_cudnn", "sdpa_flash")
COLUMNS = (
    "num_heads", "num_kv_heads", "head_dim", "batch", "tokens", "capacity", "dtype", "provider", "ms", "tflops"
)  # fmt: skip


def pairs_seen(provider: str, tokens: int, capacity: int) -> int:
    """Pairs of query and key of one head."""
    dense = tokens * (tokens + 1) // 2
    if provider.startswith("sdpa") or tokens <= capacity:
        return dense
    return dense - (tokens - capacity) * (tokens - capacity + 1) // 2  # each query sees C keys, sinks or not


def call(provider, num_heads, num_kv_heads, head_dim, batch, tokens, capacity, dtype):
    """A function that runs the provider once; raises what the provider raises where it cannot."""
    new = lambda heads: torch.randn(batch, heads, tokens, head_dim, device="cuda", dtype=dtype)  # noqa: E731
    q, k, v = new(num_heads), new(num_kv_heads), new(num_kv_heads)
    if provider == "sinkattn":
        shape = (batch, num_kv_heads, capacity, head_dim)
        caches = tuple(torch.zeros(shape, device="cuda", dtype=dtype) for _ in range(2))
        lengths = torch.zeros(batch, device="cuda", dtype=torch.int64)
        rotation = torch.randn(batch, tokens, 2, 2, head_dim // 2, device="cuda")
        sizes = dict(sink_size=SINKS, window_size=capacity - SINKS, scale=head_dim**-0.5)
        return lambda: ops.prefill(q, k, v, *caches, lengths, None, rotation, **sizes)
    if provider == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b, h, t, j):
            return (j <= t) & ((j < SINKS) | (j > t - (capacity - SINKS)))

        mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda")
        flex = torch.compile(flex_attention)
        return lambda: flex(q, k, v, block_mask=mask, enable_gqa=num_heads != num_kv_heads)
    if provider.startswith("flashinfer"):
        from flashinfer import single_prefill_with_kv_cache

        if batch > 1:
            raise RuntimeError("single_prefill_with_kv_cache takes one row")
        rows = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
        backend = provider.removeprefix("flashinfer_")
        return lambda: single_prefill_with_kv_cache(*rows, causal=True, window_left=capacity - 1, backend=backend)
    backend = SDPBackend.CUDNN_ATTENTION if provider == "sdpa_cudnn" else SDPBackend.FLASH_ATTENTION

    def sdpa():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=num_heads != num_kv_heads)

    return sdpa


def main(
    output_dir: Annotated[Path, typer.Option(help="Where prefill.csv goes.")] = Path("bench/results"),
    heads: Annotated[str, typer.Option(help="Query heads / key heads.")] = "32/8,32/32",
    sizes: Annotated[str, typer.Option(help="Tokens x capacity.")] = "8192x1024,32768x1024,32768x4096",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1",
    head_dims: Annotated[str, typer.Option(help="Sizes of a head.")] = "128",
    dtypes: Annotated[str, typer.Option(help="bfloat16, float16.")] = "bfloat16",
    providers: Annotated[str, typer.Option(help="Who is measured.")] = ",".join(PROVIDERS),
) -> None:
    """Time sinkattn's prefill beside its peers; print the table, write prefill.csv."""
    chosen = providers.split(",")
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        console.print(f"[yellow]missing peers:[/yellow] flashinfer_fa2, flashinfer_fa3 ({error})")
        chosen = [name for name in chosen if not name.startswith("flashinfer")]
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    title = f"ms (TFLOP/s); {torch.cuda.get_device_name()}, {versions}"
    table = Table("heads/kv", "dim", "dtype", "batch", "T", "C", *chosen, title=title)
    rows = []
    output_dir.mkdir(parents=True, exist_ok=True)
    integers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    cases = itertools.product(
        dtypes.split(","), integers(head_dims), heads.split(","), integers(batches), sizes.split(",")
    )
    for dtype, head_dim, pair, batch, size in cases:
        (num_heads, num_kv_heads), (tokens, capacity) = map(int, pair.split("/")), map(int, size.split("x"))
        cells = []
        for provider in chosen:
            try:
                run = call(provider, num_heads, num_kv_heads, head_dim, batch, tokens, capacity, DTYPES[dtype])
                ms = triton.testing.do_bench(run, warmup=50, rep=100, return_mode="median")
            except (RuntimeError, OSError, ValueError) as error:
                console.print(f"[yellow]{provider} cannot do this row:[/yellow] {str(error)[:120]}")
                cells.append("-")
                continue
            flops = 4 * head_dim * num_heads * batch * pairs_seen(provider, tokens, capacity)
            tflops = flops / ms * 1e-9
            cells.append(f"{ms:.3f} ({tflops:.0f})")
            key = (num_heads, num_kv_heads, head_dim, batch, tokens, capacity, dtype, provider)
            rows.append((*key, f"{ms:.4f}", f"{tflops:.1f}"))
        table.add_row(pair, str(head_dim), dtype, str(batch), str(tokens), str(capacity), *cells)
        with (output_dir / "prefill.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
