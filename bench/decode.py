"""Decode attention on one GPU: python bench/decode.py --output-dir bench/results/h200

One query per row, batch rows, a full cache of C = 4 + (C - 4) tokens. sinkattn's figure holds all that a step needs:
rotation of q and k, append, sinks at their cache distance, attention, combination. The peers attend over C keys that
are rotated and stored already, and do nothing else. sinkattn_overlap is sinkattn with overlap=True, as patched models
call it: it asks for the cache's first tiles while the kernel ahead, here the same on another cache, comes to its end.

    sdpa_cudnn, sdpa_flash    torch scaled_dot_product_attention, that backend forced
    flex                      FlexAttention, compiled, block mask of sinks and window; in the rows of the tables only
    flashinfer_none           BatchDecodeWithPagedKVCacheWrapper, page 16, best of tensor cores on and off; in bfloat16
                              and with heads of 128 only
    flashinfer_rope           the same with pos_encoding_mode="ROPE_LLAMA", StreamingLLM's rotation on the fly

Times are medians of CUDA graph replays, each graph a round through enough caches to exceed the L2 four times. The
floor is the bytes of K and V, 2 * batch * num_kv_heads * C * head_dim * 2, over the read bandwidth of the same run.
Without --tables-only there are more batch sizes, capacities, head dims and float16. decode.png shows it all, and
decode.json says where it ran.
"""

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, SINKS, Output, console, finish, print_table, track, write_csv
from gpu import (
    SDPA,
    cold,
    counters_of,
    flashinfer_us,
    graph_us,
    in_pages,
    installed,
    new,
    operands,
    read_bandwidth,
    sizes,
    title,
    tried,
    worth,
    write_about,
)
from matplotlib.figure import Figure
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sinkattn import ops

PROVIDERS = ("sinkattn", "sinkattn_overlap", "sdpa_cudnn", "sdpa_flash", "flex", "flashinfer_none", "flashinfer_rope")
LARGEST = 9e9  # bytes of one layer's cache; larger ones are left out
COLUMNS = ("num_heads", "num_kv_heads", "head_dim", "batch", "capacity", "dtype", "provider", "us", "floor_us")


def caches(batch, heads, capacity, head_dim, dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Enough (k, v), each (batch, heads, capacity, head_dim), to exceed the L2 four times over, in turn; at least 8."""
    count = max(2, cold(2 * batch * heads * capacity * head_dim * dtype.itemsize))
    pairs = [tuple(new(batch, heads, capacity, head_dim, dtype=dtype) for _ in range(2)) for _ in range(count)]
    return [pairs[i % count] for i in range(max(8, count))]


def measure(provider, num_heads, num_kv_heads, head_dim, batch, capacity, dtype, op=ops.decode) -> float | None:
    """Microseconds of one layer's step. Raises what the provider raises where it cannot, None for FlashInfer's.

    op: sinkattn's, for tuning.
    """
    q, k, v, rotation = operands(num_heads, num_kv_heads, batch, 1, head_dim, dtype)
    pairs = caches(batch, num_kv_heads, capacity, head_dim, dtype)
    if provider.startswith("sinkattn"):
        lengths = torch.randint(capacity, 10 * capacity, (batch,), device="cuda")
        more = sizes(capacity, head_dim) | {"overlap": provider == "sinkattn_overlap"}
        counters = [counters_of(kv) for kv in pairs]  # as a cache has them
        return graph_us(
            [
                lambda kv=kv, one=one: op(q, k, v, *kv, lengths, None, rotation, *[None] * 4, arrivals=one, **more)
                for kv, one in zip(pairs, counters, strict=True)
            ]
        )
    if provider in SDPA:
        with sdpa_kernel(SDPA[provider]):
            return graph_us([lambda kv=kv: scaled_dot_product_attention(q, *kv, enable_gqa=True) for kv in pairs])
    if provider == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b, h, t, j):
            return (j < SINKS) | (j >= SINKS)  # the cache is full: all of it

        mask, flex = create_block_mask(visible, None, None, 1, capacity, device="cuda"), torch.compile(flex_attention)
        return graph_us([lambda kv=kv: flex(q, *kv, block_mask=mask, enable_gqa=True) for kv in pairs])
    case = num_heads, num_kv_heads, head_dim, batch, capacity, dtype
    return flashinfer_us(case, q, in_pages(pairs), rotates=provider == "flashinfer_rope")


def cases(tables_only: bool) -> list[tuple[str, int, int, int, int]]:
    """(dtype, head_dim, num_kv_heads, batch, capacity), the rows of the two tables first."""
    rows = [("bfloat16", 128, kv, batch, size) for kv in (32, 8) for batch in (1, 8, 64) for size in (1024, 4096)]
    if not tables_only:
        more = list(itertools.product(("bfloat16",), (128,), (32, 8), (16, 128, 256), (1024, 4096)))
        more += itertools.product(("bfloat16",), (128,), (32, 8), (1, 8, 64), (256, 16384))
        others = itertools.product(("bfloat16",), (64, 256), (32, 8), (1, 8, 64), (1024, 4096))
        halves = itertools.product(("float16",), (128,), (32, 8), (1, 8, 64), (1024, 4096))
        rows += [row for row in (*more, *others, *halves) if row not in rows]
    return rows


def plot(rows: list[tuple], path: Path) -> None:
    """Share of the floor over the batch, a line per peer, a panel a shape; heads of 128 in bfloat16."""
    shown = [row for row in rows if (row[2], row[5]) == (128, "bfloat16")]
    capacities = sorted({row[4] for row in shown})
    figure = Figure(figsize=(3.2 * len(capacities), 6))
    axes = figure.subplots(2, len(capacities), sharex=True, sharey=True, squeeze=False)
    for (i, num_kv_heads), (j, capacity) in itertools.product(enumerate((32, 8)), enumerate(capacities)):
        axis = axes[i][j]
        for provider in PROVIDERS:
            of = [row for row in shown if (row[1], row[4], row[6]) == (num_kv_heads, capacity, provider)]
            points = sorted((row[3], float(row[8]) / float(row[7])) for row in of)
            style = {"linewidth": 2.5, "zorder": 3} if provider.startswith("sinkattn") else {"alpha": 0.8}
            axis.plot(*(zip(*points, strict=True) if points else ([], [])), marker="o", ms=3, label=provider, **style)
        finish(axis, xscale="log", title=f"32/{num_kv_heads} heads, C {capacity}", ylim=(0, 1.05))
        axis.set_xticks((1, 8, 64, 256), ("1", "8", "64", "256"), minor=False)
        axis.tick_params(which="minor", bottom=False, labelbottom=False)
    figure.supxlabel("batch", fontsize=10)
    figure.supylabel("share of the floor reached", fontsize=10)
    axes[0][-1].legend(loc="lower right")
    figure.savefig(path)


def main(
    output_dir: Output = RESULTS,
    tables_only: Annotated[bool, typer.Option(help="Batch 1, 8, 64, C 1024, 4096, bfloat16, heads of 128.")] = False,
) -> None:
    """Time sinkattn's decode beside its peers; print the table, write decode.csv, plot it."""
    providers, bandwidth = installed(PROVIDERS), read_bandwidth()
    rows, lines, in_tables = [], [], cases(tables_only=True)
    for case in track(cases(tables_only), "measuring"):
        dtype, head_dim, num_kv_heads, batch, capacity = case
        size = 4 * batch * num_kv_heads * capacity * head_dim
        if size > LARGEST:
            console.print(f"[yellow]left out:[/yellow] {case}, a cache of {size / 1e9:.0f} GB")
            continue
        times, floor, common = {}, size / bandwidth * 1e6, (dtype, head_dim) == ("bfloat16", 128)
        shape = (32, num_kv_heads, head_dim, batch, capacity)
        for provider in worth(providers, case in in_tables, common):
            us = tried(case, measure, provider, *shape, getattr(torch, dtype))
            if us is not None:
                times[provider] = f"{us:.2f}"
                rows.append((*shape, dtype, provider, times[provider], f"{floor:.2f}"))
        share = f"{floor / float(times['sinkattn']):.0%}"
        shown = (times.get(provider, "-") for provider in providers)
        lines.append((f"32/{num_kv_heads}", head_dim, dtype, batch, capacity, f"{floor:.1f}", *shown, share))
        torch.cuda.empty_cache()
        write_csv(output_dir / "decode.csv", COLUMNS, rows)
    columns = ("heads/kv", "dim", "dtype", "batch", "C", "floor", *providers, "share of floor")
    print_table(columns, lines, f"us a layer and step; {title()}, reads {bandwidth / 1e12:.2f} TB/s")
    write_about(output_dir / "decode.json", read_bytes_a_second=bandwidth)
    plot(rows, output_dir / "decode.png")


if __name__ == "__main__":
    typer.run(main)
