"""What an eager call costs the host: python bench/launch.py --output-dir bench/results/h200

Microseconds from one call of an op to the next, without waiting for the GPU, whose work is shorter: batch 1, 32/8 heads
of 128, 256 tokens in the cache. Beside them a bare launch of an empty Triton kernel, and of a torch op that fills a
tensor. Medians over rounds of 200 calls.
"""

import csv
import time
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from decode import console, write_about
from rich.table import Table

from sinkattn import ops


@triton.jit
def _empty_kernel(x):
    pass


def host_us(call, rounds: int = 30, calls: int = 200) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return sorted(times)[rounds // 2]


def main(output_dir: Annotated[Path, typer.Option(help="Where launch.csv goes.")] = Path("bench/results")) -> None:
    """Time the calls; print the table, write launch.csv."""

    def new(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    caches, lengths = (new(1, 8, 256, 128), new(1, 8, 256, 128)), torch.tensor([1000], device="cuda")
    sizes = dict(sink_size=4, window_size=252, scale=128**-0.5)
    calls = {"bare": {"triton": lambda: _empty_kernel[(1,)](lengths), "torch fill_": lambda: lengths.fill_(1000)}}
    for op, tokens in ("decode", 1), ("prefill", 16):
        qkv = new(1, 32, tokens, 128), new(1, 8, tokens, 128), new(1, 8, tokens, 128)
        rotation = torch.randn(1, tokens, 2, 2, 64, device="cuda")
        arguments = (*qkv, *caches, lengths, None, rotation, None, None)
        calls[op] = {
            backend: lambda op=op, backend=backend, a=arguments: getattr(ops, op)(*a, **sizes, backend=backend)
            for backend in ("auto", "cuda", "triton")
            if ops.missing_backend(backend, "cuda") is None
        }
    table = Table("op", "backend", "host us a call", title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = [(op, backend, f"{host_us(call):.1f}") for op, by in calls.items() for backend, call in by.items()]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "launch.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("op", "backend", "host_us"))
        writer.writerows(rows)
    write_about(output_dir / "launch.json")


if __name__ == "__main__":
    typer.run(main)
