"""Try launch configurations of the decode kernels on this GPU: python bench/tune.py --output-dir bench/results/h200

For every shape it times, as bench/decode.py does, the CUDA C++ kernel with every way to share a key head and, with
--triton, candidates for `_config` of kernels/decode.py. It prints the best next to what is in use and writes tune.csv.
What is good goes into `sharing_of` of csrc/cuda/sm80/decode.cu and into `_config` by hand: nothing is tuned at run
time. Triton's candidates take most of the time to compile, and Triton keeps what it compiled: run --part k/n side by
side first, then all of them.
"""

import functools
import itertools
from typing import Annotated

import torch
import triton
import typer
from common import RESULTS, Output, console, track, write_csv
from decode import measure

from sinkattn import ops
from sinkattn.kernels import decode as kernel

COLUMNS = ("num_heads", "num_kv_heads", "head_dim", "batch", "capacity", "backend", "config", "us")


def candidates(pairs: int, group: int, ring_size: int) -> list[tuple[dict, int]]:
    """(launch parameters, span) as Triton's `_config` gives them."""
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


def sharings(pairs: int, tiles: int) -> list[tuple[int, bool]]:
    """(splits, cluster) as csrc/cuda/decode.h has them, for up to two rounds of blocks on 132 multiprocessors."""
    found = [(splits, False) for splits in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)]
    found += [(splits, True) for splits in range(1, 9)]
    most = {False: 528, True: 264}
    return [(n, cluster) for n, cluster in found if n == 1 or (n <= tiles and pairs * n <= most[cluster])]


def cuda_times(shape: tuple, head_dim: int) -> list[tuple[float, str]]:
    num_heads, num_kv_heads, batch, capacity = shape
    found = []
    for (splits, cluster), overlap in itertools.product(sharings(batch * num_kv_heads, capacity // 16), (False, True)):
        op = functools.partial(torch.ops.sinkattn.decode_cuda, splits=splits, cluster=cluster)
        config = f"splits={splits} cluster={cluster} overlap={overlap}"
        arguments = (num_heads, num_kv_heads, head_dim, batch, capacity, torch.bfloat16)
        try:
            us = measure("sinkattn_overlap" if overlap else "sinkattn", *arguments, op)
        except RuntimeError as error:
            console.print(f"{config}: {str(error).splitlines()[0][:100]}")
            continue
        found.append((us, config))
    return found


def triton_times(shape: tuple, head_dim: int) -> list[tuple[float, str]]:
    num_heads, num_kv_heads, batch, capacity = shape
    arguments = ("sinkattn", num_heads, num_kv_heads, head_dim, batch, capacity, torch.bfloat16)
    op, in_use, found = functools.partial(ops.decode, backend="triton"), kernel._config, []
    for meta, span in track(candidates(batch * num_kv_heads, num_heads // num_kv_heads, capacity - 4), f"{shape}"):
        kernel._config = lambda *_, chosen=(meta, span): chosen
        try:
            found.append((measure(*arguments, op), " ".join(f"{key}={value}" for key, value in meta.items())))
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            console.print(f"{meta}: {str(error)[:80]}")
        finally:
            kernel._config = in_use
    return found


def main(
    output_dir: Output = RESULTS,
    heads: Annotated[str, typer.Option(help="Query heads / key heads.")] = "32/32,32/8",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,64",
    capacities: Annotated[str, typer.Option(help="Tokens in the cache.")] = "1024,4096",
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 128,
    use_triton: Annotated[bool, typer.Option("--triton", help="Triton's candidates too.")] = False,
    part: Annotated[str, typer.Option(help="Which shapes: k/n takes every n-th from the k-th on.")] = "0/1",
) -> None:
    """Time the candidates."""
    first, step = map(int, part.split("/"))
    shapes = [
        (*map(int, pair.split("/")), int(batch), int(capacity))
        for pair, batch, capacity in itertools.product(heads.split(","), batches.split(","), capacities.split(","))
    ]
    rows = []
    for shape in shapes[first::step]:
        num_heads, num_kv_heads, batch, capacity = shape
        for backend, times in ("cuda", cuda_times), ("triton", triton_times):
            if backend == "triton" and not use_triton:
                continue
            op = functools.partial(ops.decode, backend=backend)
            now = measure("sinkattn", num_heads, num_kv_heads, head_dim, batch, capacity, torch.bfloat16, op)
            found = sorted(times(shape, head_dim))
            best = ", ".join(f"{config} {us:.1f}" for us, config in found[:6])
            console.print(f"{shape} {backend}: in use {now:.1f} us; best: {best}")
            rows += [
                (num_heads, num_kv_heads, head_dim, *shape[2:], backend, config, f"{us:.2f}") for us, config in found
            ]
    write_csv(output_dir / ("tune.csv" if step == 1 else f"tune_{first}.csv"), COLUMNS, rows)


if __name__ == "__main__":
    typer.run(main)
