"""What an eager call costs the host: python bench/launch.py --output-dir bench/results/h200

Microseconds from one call of an op to the next, without waiting for the GPU, whose work is shorter: batch 1, 32/8 heads
of 128, 256 tokens in the cache. Beside them a bare launch of an empty Triton kernel, and of a torch op that fills a
tensor. Medians over rounds of 200 calls.
"""

import time

import torch
import triton
import typer
from common import RESULTS, Output, median, print_table, write_csv
from gpu import new, operands, sizes, title, write_about

from sinkattn import ops

COLUMNS = ("op", "backend", "host_us")


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
    return median(times)


def main(output_dir: Output = RESULTS) -> None:
    """Time the calls; print the table, write launch.csv."""
    caches, lengths = (new(1, 8, 256, 128), new(1, 8, 256, 128)), torch.tensor([1000], device="cuda")
    more = sizes(256)
    calls = {"bare": {"triton": lambda: _empty_kernel[(1,)](lengths), "torch fill_": lambda: lengths.fill_(1000)}}
    for op, tokens in ("decode", 1), ("prefill", 16):
        *qkv, rotation = operands(32, 8, 1, tokens)
        arguments = *qkv, *caches, lengths, None, rotation, *[None] * 4
        calls[op] = {
            backend: lambda op=op, backend=backend, a=arguments: getattr(ops, op)(*a, **more, backend=backend)
            for backend in ("auto", "cuda", "triton")
            if ops.missing_backend(backend, "cuda") is None
        }
    rows = [(op, backend, f"{host_us(call):.1f}") for op, by in calls.items() for backend, call in by.items()]
    print_table(("op", "backend", "host us a call"), rows, title())
    write_csv(output_dir / "launch.csv", COLUMNS, rows)
    write_about(output_dir / "launch.json")


if __name__ == "__main__":
    typer.run(main)
