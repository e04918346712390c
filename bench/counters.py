"""What Nsight Compute counts in the kernels of csrc/cuda: python bench/counters.py --output-dir bench/results/h200

Runs itself under `ncu` (which must be on the PATH and allowed to read the counters) with caches flushed before every
kernel: 32 query heads of 128, bfloat16, 4 sinks. counters.csv has a row a kernel: its time, the share of the memory's
rate and of the busiest pipeline's (tensor cores, where they multiply), how many waves of blocks there are, and for how
much of the time a multiprocessor has work in the mean.
"""

import csv
import functools
import io
import re
import shutil
import subprocess
import sys
from typing import Annotated

import torch
import typer
from common import RESULTS, Output, print_table, write_csv
from gpu import new, operands, sizes, title

from sinkattn import ops

CASES = (  # op, key heads, batch, tokens, capacity
    ("decode", 32, 1, 1, 1024),
    ("decode", 32, 1, 1, 16384),
    ("decode", 8, 1, 1, 1024),
    ("decode", 8, 8, 1, 1024),
    ("decode", 8, 64, 1, 4096),
    ("prefill", 8, 1, 8192, 1024),
    ("prefill", 8, 1, 32768, 4096),
    ("prefill", 32, 1, 8192, 1024),
)
COLUMNS = ("op", "num_kv_heads", "batch", "tokens", "capacity", "kernel", "us", "dram", "pipeline", "waves", "active")


def run(cases) -> None:
    """Every case, between the marks that ncu waits for."""
    calls = []
    for op, num_kv_heads, batch, tokens, capacity in cases:
        *qkv, rotation = operands(32, num_kv_heads, batch, tokens)
        caches = (new(batch, num_kv_heads, capacity, 128) for _ in range(2))
        lengths = torch.full((batch,), 3 * capacity if op == "decode" else 0, device="cuda")
        arguments = *qkv, *caches, lengths, None, rotation
        calls.append(functools.partial(getattr(ops, op), *arguments, **sizes(capacity), backend="cuda"))
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls:
        call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def rows_of(report: str) -> list[tuple]:
    """Rows of counters.csv from what `ncu --csv --page details --print-units base` prints."""
    lines = csv.DictReader(io.StringIO(report[report.index('"ID"') :]))
    kernels: dict[str, dict] = {}
    for line in lines:
        kernel = kernels.setdefault(line["ID"], {"name": re.search(r"(\w+)_kernel", line["Kernel Name"])[1]})
        kernel[line["Metric Name"]] = line["Metric Value"]
    rows, cases = [], iter(CASES)
    for kernel in kernels.values():
        if kernel["name"] in ("decode", "gather"):  # the first of a call
            case = next(cases)
        number = lambda name, of=kernel: float(of[name].replace(",", ""))  # noqa: E731
        active = 100 * number("SM Active Cycles") / number("Elapsed Cycles")
        shares = number("DRAM Throughput"), number("Compute (SM) Throughput")
        us, waves = number("Duration") / 1e3, number("Waves Per SM")
        shown = (f"{us:.1f}", *(f"{x:.0f}" for x in shares), f"{waves:.2f}", f"{active:.0f}")
        rows.append((*case, kernel["name"], *shown))
    return rows


def main(output_dir: Output = RESULTS, inside: Annotated[bool, typer.Option(hidden=True)] = False) -> None:
    """Count; print the table, write counters.csv."""
    if inside:
        return run(CASES)
    if shutil.which("ncu") is None:
        raise SystemExit("ncu, of NVIDIA's CUDA toolkit, is not on the PATH")
    command = ["ncu", "--csv", "--page", "details", "--print-units", "base", "--clock-control", "none"]
    command += ["--section", "SpeedOfLight", "--section", "LaunchStats", "--profile-from-start", "off"]
    done = subprocess.run([*command, sys.executable, __file__, "--inside"], capture_output=True, text=True)
    if done.returncode or '"ID"' not in done.stdout:
        raise SystemExit(f"ncu counted nothing:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = rows_of(done.stdout)
    print_table(COLUMNS, rows, title())
    write_csv(output_dir / "counters.csv", COLUMNS, rows)


if __name__ == "__main__":
    typer.run(main)
