"""What Nsight Compute counts in the kernels of csrc/cuda: python bench/counters.py --output-dir bench/results/h200

Runs itself under `ncu` (which must be on the PATH and allowed to read the counters) with caches flushed before every
kernel: 32 query heads of 128, bfloat16, 4 sinks. counters.csv has a row a kernel: its time, the share of the memory's
rate and of the busiest pipeline's (tensor cores, where they multiply), how many waves of blocks there are, and for how
much of the time a multiprocessor has work in the mean.
"""

import csv
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from decode import SINKS, console
from rich.table import Table

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
        new = lambda heads, n, rows=batch: torch.randn(rows, heads, n, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        tensors = new(32, tokens), *(new(num_kv_heads, n) for n in (tokens, tokens, capacity, capacity))
        lengths = torch.full((batch,), 3 * capacity if op == "decode" else 0, device="cuda")
        rotation = torch.randn(batch, tokens, 2, 2, 64, device="cuda")
        sizes = dict(sink_size=SINKS, window_size=capacity - SINKS, scale=128**-0.5, backend="cuda")
        calls.append(lambda op=op, t=tensors, a=(lengths, None, rotation), s=sizes: getattr(ops, op)(*t, *a, **s))
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
        rows.append(
            (*case, kernel["name"], f"{us:.1f}", *(f"{x:.0f}" for x in shares), f"{waves:.2f}", f"{active:.0f}")
        )
    return rows


def main(
    output_dir: Annotated[Path, typer.Option(help="Where counters.csv goes.")] = Path("bench/results"),
    inside: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
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
    output_dir.mkdir(parents=True, exist_ok=True)
    rows, table = rows_of(done.stdout), Table(*COLUMNS, title=torch.cuda.get_device_name())
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    with (output_dir / "counters.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
