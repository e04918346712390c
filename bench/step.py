"""Where the time of one decode step goes: python bench/step.py --output-dir bench/results/h200

Stream over a model of bench/generate.py, batch 1, a full cache of C tokens, under torch's profiler. Every kernel is
charged with the time from the end of the kernel before it to its own end, so that the parts add up to the step. The
floor of a part is the bytes it has to read, its weights or its keys and values, over the read bandwidth of that run.
Models whose layers run as one kernel have that as one part.

Writes step.csv (model, part, kernels, us, floor_us; medians over steps, all layers together) and step.png.
"""

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, SINKS, Output, median, print_table, write_csv
from generate import make
from gpu import read_bandwidth
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

import sinkattn

COLUMNS = ("model", "part", "kernels", "us", "floor_us")
PARTS = ("q, k, v", "attention", "output", "gate and up", "down", "head", "layers and head", "everything else")


def part_of(names: list[str]) -> list[str]:
    """The part that every kernel of a step belongs to: products are known by where they stand around attention."""
    if any("stack_kernel" in name for name in names):
        return ["layers and head" if "stack_kernel" in name else "everything else" for name in names]
    is_product = ["linear_kernel" in name for name in names]
    attention = [i for i, name in enumerate(names) if "decode_kernel" in name]
    parts = ["everything else"] * len(names)
    for i, after in itertools.pairwise([*attention, len(names)]):
        parts[i] = "attention"
        before = max(j for j in range(i) if is_product[j])
        parts[before] = "q, k, v"
        products = [j for j in range(i + 1, after) if is_product[j]]
        for j, part in zip(products, ("output", "gate and up", "down"), strict=False):
            parts[j] = part
    last = max(j for j in range(len(names)) if is_product[j])
    parts[last] = "head"
    return parts


def floors(model, capacity: int, bandwidth: float) -> dict[str, float]:
    """Microseconds that reading takes at least, by part."""
    layer, layers = model.model.layers[0], len(model.model.layers)
    attention, mlp = layer.self_attn, layer.mlp
    size = lambda *modules: layers * sum(x.nbytes for m in modules for x in m.parameters())  # noqa: E731
    keys = 2 * capacity * attention.k_proj.weight.shape[0] * 2 * layers
    read = {
        "q, k, v": size(attention.q_proj, attention.k_proj, attention.v_proj),
        "attention": keys,
        "output": size(attention.o_proj),
        "gate and up": size(mlp.gate_proj, mlp.up_proj),
        "down": size(mlp.down_proj),
        "head": model.lm_head.weight.nbytes,
        "everything else": 0,
    }
    read["layers and head"] = sum(read.values())
    return {part: x / bandwidth * 1e6 for part, x in read.items()}


def steps_of(model, capacity: int, steps: int) -> list[dict[str, tuple[int, float]]]:
    """Kernels and microseconds by part, of so many steps."""
    with sinkattn.patch(model, SINKS, capacity - SINKS):
        stream = sinkattn.Stream(model)
        stream.append(torch.randint(3, 100, (1, capacity), device="cuda"))
        tokens = stream.generate(None, do_sample=False, eos_token_id=[])
        for _ in range(5):
            next(tokens)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(steps):
                next(tokens)
            torch.cuda.synchronize()
        tokens.close()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    names, ends = [e.name for e in events], list(itertools.accumulate((e.time_range.end for e in events), max))
    period = len(names) // steps
    found = []
    for begin in range(period, period * steps, period):  # the first has no kernel before it
        here = range(begin, begin + period)
        by_part: dict[str, tuple[int, float]] = {}
        for i, part in zip(here, part_of(names[begin : begin + period]), strict=True):
            count, us = by_part.get(part, (0, 0.0))
            by_part[part] = (count + 1, us + ends[i] - ends[i - 1])
        found.append(by_part)
    return found


def main(
    output_dir: Output = RESULTS,
    models: Annotated[str, typer.Option(help="Of bench/generate.py, by commas.")] = "llama-2-7b,llama-3-8b",
    capacity: Annotated[int, typer.Option(help="C, tokens.")] = 1024,
    steps: Annotated[int, typer.Option(help="Steps to look at.")] = 20,
) -> None:
    """Profile a step; print the table, write CSV and plot."""
    bandwidth, rows = read_bandwidth(), []
    for name in models.split(","):
        model = make(name)
        floor, found = floors(model, capacity, bandwidth), steps_of(model, capacity, steps)
        for part in (part for part in PARTS if part in found[0]):
            kernels, us = median(step[part] for step in found)
            rows.append(dict(model=name, part=part, kernels=kernels, us=round(us, 1), floor_us=round(floor[part], 1)))
        del model
        torch.cuda.empty_cache()
    print_table(COLUMNS, rows)
    write_csv(output_dir / "step.csv", COLUMNS, rows)
    plot(rows, capacity, output_dir / "step.png")


def plot(rows: list[dict], capacity: int, path: Path) -> None:
    """Milliseconds by part, a pair of bars a model: what it takes, and its floor."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.7 * len(names)))
    axes = figure.subplots()
    for i, name in enumerate(names):
        for y, column, alpha in ((i + 0.18, "us", 1.0), (i - 0.18, "floor_us", 0.45)):
            left = 0.0
            for j, row in enumerate(row for row in rows if row["model"] == name):
                label = row["part"] if i == 0 and column == "us" else None
                axes.barh(y, row[column] / 1e3, 0.34, left=left, color=f"C{j}", alpha=alpha, label=label)
                left += row[column] / 1e3
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=f"ms a step, batch 1, C = {capacity}; pale: what reading takes at least")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
