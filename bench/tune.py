"""Try launch configurations of the decode kernel on this GPU: python bench/tune.py --output-dir bench/results/h200

For every shape it times candidates for `_config` of kernels/decode.py, prints the best next to the one in use, and
writes tune_K.csv. What is good goes into `_config` by hand: nothing is tuned at run time. Most of the time goes into
compiling, and Triton keeps what it compiled: run the parts side by side first, then all again for the times.
"""

import csv
import itertools
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from decode import measure
from rich.console import Console
from rich.progress import track

from sinkattn.kernels import decode as kernel

SHAPES = (  # num_heads, num_kv_heads, batch, capacity
    (32, 32, 1, 1024), (32, 32, 8, 1024), (32, 32, 64, 1024),
    (32, 8, 1, 1024), (32, 8, 1, 4096), (32, 8, 8, 1024), (32, 8, 8, 4096), (32, 8, 64, 1024), (32, 8, 64, 4096),
)  # fmt: skip
META = ("BLOCK", "SPLITS", "ONE_BLOCK", "DOT", "STAGES", "num_warps")
COLUMNS = ("num_heads", "num_kv_heads", "batch", "capacity", *META, "us")
console = Console(width=160)


def candidates(pairs: int, group: int, ring_size: int) -> list[tuple[dict, int]]:
    """(launch parameters, span) as `_config` gives them."""
    found = []
    for block, warps in itertools.product((32, 64, 128), (2, 4, 8)):
        blocks = triton.cdiv(ring_size, block)
        spans = {1} if pairs * blocks <= 1100 else set()
        spans |= {max(1, triton.cdiv(blocks * pairs, 132 * waves)) for waves in (1, 2, 4)}
        for per_program in spans:
            splits = triton.cdiv(blocks, min(per_program, blocks))
            one_block = per_program == 1
            for dot, stages in itertools.product(
                (True,) if group > 1 else (True, False), (2,) if one_block else (2, 3)
            ):
                meta = {
                    "BLOCK": block, "ONE_BLOCK": one_block, "SPLITS": splits,
                    "SPLIT_TILE": triton.next_power_of_2(splits), "DOT": dot,
                    "BLOCK_G": max(16, triton.next_power_of_2(group)) if dot else 1, "STAGES": stages,
                    "num_warps": warps,
                }  # fmt: skip
                found.append((meta, block * per_program))
    return found


def main(
    output_dir: Annotated[Path, typer.Option(help="Where tune.csv goes.")] = Path("bench/results"),
    part: Annotated[str, typer.Option(help="Which shapes: k/n takes every n-th from the k-th on.")] = "0/1",
) -> None:
    """Time the candidates."""
    first, step = map(int, part.split("/"))
    rows, in_use = [], kernel._config
    for num_heads, num_kv_heads, batch, capacity in SHAPES[first::step]:
        shape = (num_heads, num_kv_heads, batch, capacity)
        arguments = ("sinkattn", num_heads, num_kv_heads, 128, batch, capacity, torch.bfloat16)
        kernel._config = in_use
        now = measure(*arguments)
        found = []
        for meta, span in track(candidates(batch * num_kv_heads, num_heads // num_kv_heads, capacity - 4), f"{shape}"):
            kernel._config = lambda *_, chosen=(meta, span): chosen
            try:
                found.append((measure(*arguments), meta))
            except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
                console.print(f"{meta}: {str(error)[:80]}")
        found.sort(key=lambda pair: pair[0])
        console.print(f"{shape}: in use {now:.1f} us")
        for us, meta in found[:4]:
            keys = ("BLOCK", "SPLITS", "ONE_BLOCK", "DOT", "STAGES", "num_warps")
            console.print(f"    {us:.1f} us  { ({key: meta[key] for key in keys}) }")
        rows += [(*shape, *(meta[key] for key in META), f"{us:.2f}") for us, meta in found]
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / f"tune_{first}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
