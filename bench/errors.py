"""Errors against float64 beside PyTorch's: python bench/errors.py --output-dir bench/results/h200

Root mean square of what is off the same attention in float64, relative to that of the output: sinkattn's decode over a
full cache and prefill of a chunk into an empty one, and torch's scaled_dot_product_attention of the same tensors in the
same dtype. Nothing is rotated, so that both see the same keys. Queries, keys and values are normal, times `scale`.
"""

import csv
import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from decode import DTYPES, SINKS, console, write_about
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from sinkattn import ops, reference

COLUMNS = ("op", "dtype", "num_heads", "num_kv_heads", "scale", "sinkattn", "sdpa")
CAPACITY, TOKENS = 1024, 512


def errors(op: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int, scale: float) -> tuple[float, float]:
    """sinkattn's and SDPA's."""
    tokens = 1 if op == "decode" else TOKENS
    new = lambda heads, n: scale * torch.randn(4, heads, n, 128, device="cuda", dtype=dtype)  # noqa: E731
    q, k, v, *caches = new(num_heads, tokens), *(new(num_kv_heads, n) for n in (tokens, tokens, CAPACITY, CAPACITY))
    lengths = torch.full((4,), 3 * CAPACITY if op == "decode" else 0, device="cuda")
    sizes = dict(sink_size=SINKS, window_size=CAPACITY - SINKS, scale=128**-0.5)
    exact = reference.attention(*(x.double() for x in (q, k, v, *caches)), lengths, None, None, None, None, **sizes)
    out = getattr(ops, op)(q, k, v, *caches, lengths, **sizes)
    keys, values = caches if op == "decode" else (k, v)  # the op has put the new token into the full cache
    peer = scaled_dot_product_attention(q, keys, values, is_causal=op == "prefill", enable_gqa=True).transpose(1, 2)
    return tuple(((x.double() - exact).norm() / exact.norm()).item() for x in (out, peer))


def main(output_dir: Annotated[Path, typer.Option(help="Where errors.csv goes.")] = Path("bench/results")) -> None:
    """Compare; print the table, write errors.csv."""
    torch.manual_seed(0)
    table, rows = Table(*COLUMNS, title=torch.cuda.get_device_name()), []
    for op, dtype, pair, scale in itertools.product(
        ("decode", "prefill"), DTYPES, ((32, 32), (32, 8), (32, 2)), (0.1, 1.0, 8.0)
    ):
        row = (op, dtype, *pair, scale, *(f"{error:.2e}" for error in errors(op, DTYPES[dtype], *pair, scale)))
        table.add_row(*map(str, row))
        rows.append(row)
    console.print(table)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "errors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    write_about(output_dir / "errors.json")


if __name__ == "__main__":
    typer.run(main)
