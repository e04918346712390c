"""Prefill attention on one GPU: python bench/prefill.py --output-dir bench/results/h200

A prompt of T tokens into an empty cache of C = 4 + (C - 4) tokens. sinkattn's figure holds all that a prompt needs:
rotation of q and k, attention over sinks and window, the ring written. The peers are given rotated keys and write no
cache:

    triton                          sinkattn's Triton kernels, with heads other than 128
    flex                            FlexAttention, compiled, block mask of sinks and window
    flashinfer_fa2, flashinfer_fa3  single_prefill_with_kv_cache, that backend, window of C tokens and no sinks
    sdpa_cudnn, sdpa_flash          scaled_dot_product_attention, that backend forced, causal over all T tokens

Times are medians with an L2 that is flushed before each. TFLOP/s count 4 * head_dim * num_heads * batch for each pair
of query and key that the provider looks at by its definition: sinks and window, the window alone, all before. Without
--tables-only there are more batch sizes, capacities, head dims and float16. prefill.json says where it ran and what a
large matrix product reaches there; the FLOPs of sinks and window at that rate are the floor in prefill.png.
"""

from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from common import RESULTS, SINKS, Output, finish, print_table, write_csv
from gpu import SDPA, installed, operands, sizes, title, tried, worth, write_about
from matplotlib.figure import Figure
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sinkattn import ops

PROVIDERS = ("sinkattn", "triton", "flex", "flashinfer_fa2", "flashinfer_fa3", "sdpa_cudnn", "sdpa_flash")
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
    q, k, v, rotation = operands(num_heads, num_kv_heads, batch, tokens, head_dim, dtype)
    if provider in ("sinkattn", "triton"):
        caches = tuple(q.new_zeros(batch, num_kv_heads, capacity, head_dim) for _ in range(2))
        lengths = torch.zeros(batch, device="cuda", dtype=torch.int64)
        more = sizes(capacity, head_dim) | {"backend": "triton" if provider == "triton" else "auto"}
        return lambda: ops.prefill(q, k, v, *caches, lengths, None, rotation, **more)
    if provider == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b, h, t, j):
            return (j <= t) & ((j < SINKS) | (j > t - (capacity - SINKS)))

        mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda")
        flex = torch.compile(flex_attention)
        return lambda: flex(q, k, v, block_mask=mask, enable_gqa=num_heads != num_kv_heads)
    if provider.startswith("flashinfer"):
        from flashinfer import single_prefill_with_kv_cache

        rows = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
        backend = provider.removeprefix("flashinfer_")
        return lambda: single_prefill_with_kv_cache(*rows, causal=True, window_left=capacity - 1, backend=backend)

    def sdpa():
        with sdpa_kernel(SDPA[provider]):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=num_heads != num_kv_heads)

    return sdpa


def median_ms(run, rep: int) -> float:
    """Milliseconds of a call with an L2 that is flushed before each."""
    return triton.testing.do_bench(run, warmup=50, rep=rep, return_mode="median")


def measure(*case) -> float:
    return median_ms(call(*case), rep=100)


def matmul_tflops(dtype: torch.dtype) -> float:
    """What a large matrix product reaches on random data."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: x @ y, rep=200) * 1e-9


def cases(tables_only: bool) -> list[tuple[str, int, int, int, int, int]]:
    """(dtype, head_dim, num_kv_heads, batch, tokens, capacity), the rows of the tables first."""
    sizes = ((8192, 1024), (32768, 1024), (32768, 4096))
    rows = [("bfloat16", 128, kv, 1, *size) for kv in (8, 32) for size in sizes]
    if not tables_only:
        rows += [("bfloat16", 128, 8, 1, tokens, capacity) for tokens, capacity in ((8192, 256), (32768, 16384))]
        rows += [
            ("bfloat16", 128, 8, batch, tokens, 1024)
            for batch, tokens in ((8, 2048), (16, 2048), (128, 512), (256, 512))
        ]
        rows += [("bfloat16", dim, 8, 1, *size) for dim in (64, 80, 96, 192, 256) for size in sizes[:2]]
        rows += [("float16", 128, 8, 1, *size) for size in sizes]
    return rows


def plot(rows: list[tuple], ceiling: float, path: Path) -> None:
    """Share of the floor, a group a shape and a bar per peer; heads of 128 in bfloat16, one row of tokens."""
    shown = [row for row in rows if row[2:4] == (128, 1) and row[6] == "bfloat16"]
    groups = list(dict.fromkeys((row[1], *row[4:6]) for row in shown))
    providers = [provider for provider in PROVIDERS if any(row[7] == provider for row in shown)]
    figure = Figure(figsize=(11, 4.2))
    axis = figure.subplots()
    for i, provider in enumerate(providers):
        x, shares = [], []
        for row in shown:
            if row[7] == provider:
                floor_ms = 4 * 128 * row[0] * pairs_seen("sinkattn", *row[4:6]) / ceiling * 1e-9
                x.append(groups.index((row[1], *row[4:6])) + (i - (len(providers) - 1) / 2) * 0.14)
                shares.append(floor_ms / float(row[8]))
        axis.bar(x, shares, width=0.13, label=provider, alpha=1 if i == 0 else 0.6)
    axis.set_xticks(
        range(len(groups)), [f"32/{kv} heads\nT {tokens}\nC {capacity}" for kv, tokens, capacity in groups], fontsize=8
    )
    finish(axis, "y", ylabel="share of the floor reached", ylim=(0, 1))
    figure.legend(ncols=len(providers), loc="outside upper center")
    figure.savefig(path)


def main(
    output_dir: Output = RESULTS,
    tables_only: Annotated[bool, typer.Option(help="Batch 1, bfloat16, heads of 128, T and C of the table.")] = False,
) -> None:
    """Time sinkattn's prefill beside its peers; print the table, write prefill.csv, plot it."""
    providers, ceiling = installed(PROVIDERS), matmul_tflops(torch.bfloat16)
    rows, lines, in_tables = [], [], cases(tables_only=True)
    for case in cases(tables_only):
        dtype, head_dim, num_kv_heads, batch, tokens, capacity = case
        shape, times = (32, num_kv_heads, head_dim, batch, tokens, capacity), {}
        common = (dtype, batch) == ("bfloat16", 1) and head_dim in (64, 128, 256)  # FlashInfer's call takes one row
        for provider in worth(providers, case in in_tables, common):
            if provider == "triton" and head_dim == 128:
                continue
            ms = tried(case, measure, provider, *shape, getattr(torch, dtype))
            if ms is not None:
                tflops = 4 * head_dim * 32 * batch * pairs_seen(provider, tokens, capacity) / ms * 1e-9
                times[provider] = f"{ms:.3f} ({tflops:.0f})"
                rows.append((*shape, dtype, provider, f"{ms:.4f}", f"{tflops:.1f}"))
        shown = (times.get(provider, "-") for provider in providers)
        lines.append((f"32/{num_kv_heads}", head_dim, dtype, batch, tokens, capacity, *shown))
        torch.cuda.empty_cache()
        write_csv(output_dir / "prefill.csv", COLUMNS, rows)
    columns = ("heads/kv", "dim", "dtype", "batch", "T", "C", *providers)
    print_table(columns, lines, f"ms (TFLOP/s); {title()}, matrix products {ceiling:.0f} TFLOP/s")
    write_about(output_dir / "prefill.json", matmul_tflops=ceiling)
    plot(rows, ceiling, output_dir / "prefill.png")


if __name__ == "__main__":
    typer.run(main)
