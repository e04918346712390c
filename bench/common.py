"""What all benches share: options, clocks, what a result was made by, CSV and JSON files, tables, the look of plots."""

import csv
import gc
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import rich.progress
import torch
import transformers
import typer
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SINKS = 4  # of the benches of speed
RESULTS = Path("bench/results")
Output = Annotated[Path, typer.Option(help="Where the results go.")]
Device = Annotated[str | None, typer.Option(help="The GPU if there is one.")]
TextFile = Annotated[Path | None, typer.Option(help="A file; without it the demo's held-out modules.")]

console = Console(width=None if sys.stdout.isatty() else 160)  # tables in logs are not cut
matplotlib.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 130, "legend.fontsize": "small"})


# ------------------------------------------------------------------------------------------------------------ devices


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str | torch.device) -> str:
    is_cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads"


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forget_peak(device: torch.device) -> None:
    """What a GPU's memory peak says from here on is of what comes from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer used, and forget the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    forget_peak(device)


def median(values: Iterable):
    """The upper one where two are in the middle: always a value that was measured."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


# -------------------------------------------------------------------------------------------------------------- files


def record(device: str | torch.device) -> dict:
    """The command that runs, and what it runs on."""
    return {
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *map(shlex.quote, sys.argv[1:])]),
        "device": device_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def write_json(path: Path, entry: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n")


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Sequence | dict]) -> None:
    """rows: tuples, or dicts, of which one that lacks a column leaves it empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(cells(row, columns) for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def cells(row: Sequence | dict, columns: Iterable[str]) -> Sequence:
    return [row.get(name, "") for name in columns] if isinstance(row, dict) else row


# ----------------------------------------------------------------------------------------------------------- terminal


def print_table(columns: Sequence[str], rows: Iterable[Sequence | dict], title: str | None = None) -> None:
    """rows: as in `write_csv`."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(str, cells(row, columns)))
    console.print(table)


def track(items: Sequence, label: str) -> Iterable:
    """The items, with a progress bar."""
    return rich.progress.track(items, label, console=console)


def progress() -> Progress:
    columns = TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


# -------------------------------------------------------------------------------------------------------------- plots


def finish(axes: Axes, axis: str = "both", **more) -> None:
    """Labels and limits, and a grid. axis: whose grid lines are drawn."""
    axes.set(**more)
    axes.grid(axis=axis, alpha=0.3)
