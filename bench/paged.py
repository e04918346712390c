"""Decode over pages beside decode over a ring, on one GPU: python bench/paged.py --output-dir bench/results/h200

One token for each of batch texts, 4 sinks and a window of C - 4 tokens, far behind the wrap, heads of 128 in bfloat16.
sinkattn's figures hold all that a step needs: rotation of q and k, append, sinks at their cache distance, attention,
combination. Keys and values of a text lie in pages of 16 tokens, strewn over all there are, as vLLM gives them out.

    ring            ops.decode, over a ring of the same tokens
    pages           ops.attend_pages
    pages_triton    the same by Triton's kernel
    flashinfer      BatchDecodeWithPagedKVCacheWrapper, page 16, best of tensor cores on and off, over C keys that are
                    rotated and stored already: it attends and does nothing else

ring and pages with overlap: as models call them, the cache asked for while the kernel ahead comes to its end; here that
is the same op on another cache. Times are medians of CUDA graph replays, each graph a round through enough caches to
exceed the L2 four times. The floor is the bytes of K and V, 2 * batch * num_kv_heads * C * 128 * 2, over the read
bandwidth of the same run. paged.json says where it ran.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, SINKS, Output, print_table, track, write_csv
from decode import caches
from gpu import (
    cold,
    counters_of,
    flashinfer_us,
    graph_us,
    installed,
    new,
    operands,
    read_bandwidth,
    sizes,
    title,
    tried,
    write_about,
)

from sinkattn import ops

PROVIDERS = ("ring", "ring_overlap", "pages", "pages_overlap", "pages_triton", "flashinfer")
COLUMNS = ("num_heads", "num_kv_heads", "batch", "capacity", "provider", "us", "floor_us", "of_ring")
DIM, PAGE = 128, 16


def paged(batch: int, num_kv_heads: int, lengths: torch.Tensor, capacity: int) -> list[tuple[torch.Tensor, ...]]:
    """Enough (k_pages, v_pages, block_table) to exceed the L2 four times over, in turn, at least 8. Both are views of
    one tensor, as vLLM's are, and all layers have one table. Of each text the pages of its sinks and of its window lie
    anywhere."""
    sinks, window = -(-SINKS // PAGE), (capacity - SINKS + PAGE - 2) // PAGE + 1
    blocks = batch * (sinks + window)
    entries = (lengths // PAGE)[:, None] - torch.arange(window, device="cuda")  # of the window, back from the newest
    entries = torch.cat((torch.arange(sinks, device="cuda").expand(batch, -1), entries), dim=1)
    table = torch.full((batch, int(lengths.max()) // PAGE + 1), -1, dtype=torch.int32, device="cuda")
    table.scatter_(1, entries, torch.randperm(blocks, device="cuda").int().view(batch, -1))
    count = max(2, cold(2 * batch * num_kv_heads * capacity * DIM * 2))
    found = [(*new(blocks, num_kv_heads, PAGE, 2 * DIM).split(DIM, dim=-1), table) for _ in range(count)]
    return [found[i % len(found)] for i in range(max(8, len(found)))]


def measure(provider: str, num_heads: int, num_kv_heads: int, batch: int, capacity: int) -> float | None:
    """Microseconds of one layer's step; None where the provider cannot do it."""
    q, k, v, rotation = operands(num_heads, num_kv_heads, batch, 1)
    lengths = torch.randint(capacity, 10 * capacity, (batch,), device="cuda")
    more = sizes(capacity) | {"overlap": provider.endswith("overlap")}
    if provider.startswith("ring"):
        pairs = caches(batch, num_kv_heads, capacity, DIM, q.dtype)

        def decode(kv, arrivals):
            ops.decode(q, k, v, *kv, lengths, None, rotation, *[None] * 4, arrivals=arrivals, **more)

        return graph_us([partial(decode, kv, counters_of(kv)) for kv in pairs])
    given = paged(batch, num_kv_heads, lengths, capacity)
    if provider == "flashinfer":
        both = [tuple(x.contiguous() for x in pages[:2]) for pages in given]
        blocks = torch.randperm(len(both[0][0]), device="cuda").int()[: batch * capacity // PAGE]
        return flashinfer_us((num_heads, num_kv_heads), q, both, blocks)
    flat, angles = [x[:, :, 0] for x in (q, k, v)], rotation[:, 0]
    starts, before = torch.arange(batch + 1, dtype=torch.int32, device="cuda"), lengths.int()
    more |= {"max_tokens": 1, "backend": "triton" if provider == "pages_triton" else "auto"}

    def attend(k_pages, v_pages, table, arrivals):
        ops.attend_pages(*flat, k_pages, v_pages, starts, before, table, angles, arrivals=arrivals, **more)

    counters = [torch.zeros(batch * num_kv_heads, dtype=torch.int32, device="cuda") for _ in given]
    return graph_us([partial(attend, *pages, one) for pages, one in zip(given, counters, strict=True)])


def main(
    output_dir: Output = RESULTS,
    batches: Annotated[list[int], typer.Option("--batch", help="Texts, as often as wanted.")] = [1, 8, 64],  # noqa: B006
) -> None:
    """Time sinkattn's two decodes beside each other and FlashInfer's; print the table, write paged.csv."""
    providers, bandwidth = installed(PROVIDERS), read_bandwidth()
    rows, lines = [], []
    heads = ((32, 32), (32, 8), (28, 4))
    cases = [(*pair, batch, capacity) for pair in heads for batch in batches for capacity in (1024, 4096)]
    for case in track(cases, "measuring"):
        num_heads, num_kv_heads, batch, capacity = case
        floor = 2 * batch * num_kv_heads * capacity * DIM * 2 / bandwidth * 1e6
        times = {provider: tried(case, measure, provider, *case) for provider in providers}
        for provider, us in times.items():
            if us is not None:
                ring = times["ring_overlap" if provider.endswith("overlap") else "ring"]
                rows.append((*case, provider, f"{us:.2f}", f"{floor:.2f}", f"{us / ring:.3f}"))
        shown = ("-" if times.get(name) is None else f"{times[name]:.1f}" for name in PROVIDERS)
        lines.append((f"{num_heads}/{num_kv_heads}", batch, capacity, f"{floor:.1f}", *shown))
        torch.cuda.empty_cache()
        write_csv(Path(output_dir) / "paged.csv", COLUMNS, rows)
    columns = ("heads/kv", "batch", "C", "floor", *PROVIDERS)
    print_table(columns, lines, f"us a layer and step; {title()}, reads {bandwidth / 1e12:.2f} TB/s")
    write_about(Path(output_dir) / "paged.json", read_bytes_a_second=bandwidth)


if __name__ == "__main__":
    typer.run(main)
