"""Errors against float64 beside PyTorch's: python bench/errors.py --output-dir bench/results/h200

Root mean square of what is off the same attention in float64, relative to that of the output: sinkattn's decode over a
full cache and prefill of a chunk into an empty one, and torch's scaled_dot_product_attention of the same tensors in the
same dtype. Nothing is rotated, so that both see the same keys. Queries, keys and values are normal, times `scale`.
"""

import itertools

import torch
import typer
from common import RESULTS, Output, print_table, write_csv
from gpu import DTYPES, new, sizes, title, write_about
from torch.nn.functional import scaled_dot_product_attention

from sinkattn import ops, reference

COLUMNS = ("op", "dtype", "num_heads", "num_kv_heads", "scale", "sinkattn", "sdpa")
CAPACITY, TOKENS = 1024, 512


def errors(op: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int, scale: float) -> tuple[float, float]:
    """sinkattn's and SDPA's."""
    tokens = 1 if op == "decode" else TOKENS
    shapes = (num_heads, tokens), *((num_kv_heads, n) for n in (tokens, tokens, CAPACITY, CAPACITY))
    q, k, v, *caches = (scale * new(4, *shape, 128, dtype=dtype) for shape in shapes)
    lengths = torch.full((4,), 3 * CAPACITY if op == "decode" else 0, device="cuda")
    more = sizes(CAPACITY)
    exact = reference.attention(*(x.double() for x in (q, k, v, *caches)), lengths, *[None] * 6, **more)
    out = getattr(ops, op)(q, k, v, *caches, lengths, **more)
    keys, values = caches if op == "decode" else (k, v)  # the op has put the new token into the full cache
    peer = scaled_dot_product_attention(q, keys, values, is_causal=op == "prefill", enable_gqa=True).transpose(1, 2)
    return tuple(((x.double() - exact).norm() / exact.norm()).item() for x in (out, peer))


def main(output_dir: Output = RESULTS) -> None:
    """Compare; print the table, write errors.csv."""
    torch.manual_seed(0)
    rows = []
    for op, dtype, pair, scale in itertools.product(
        ("decode", "prefill"), DTYPES, ((32, 32), (32, 8), (32, 2)), (0.1, 1.0, 8.0)
    ):
        found = errors(op, DTYPES[dtype], *pair, scale)
        rows.append((op, dtype, *pair, scale, *(f"{error:.2e}" for error in found)))
    print_table(COLUMNS, rows, title())
    write_csv(output_dir / "errors.csv", COLUMNS, rows)
    write_about(output_dir / "errors.json")


if __name__ == "__main__":
    typer.run(main)
