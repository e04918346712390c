"""What 8 bits cost a real model, and what they save: python bench/cache_dtype.py --output-dir bench/results/real

SmolLM2-135M-Instruct (tests/real.py) reads English prose, Python's own documentation, through caches of 4 + 1020 tokens
and of every `cache_dtype` side by side, a chunk at a time. By range of positions: the loss, how far it is from that of
the cache in the model's dtype, and the root mean square error of the logits against those, relative to their spread. A
second model in bfloat16 says what that rounding does by itself. Nothing may grow with the position: a key is rounded
once.

    bytes    of the cache, `SinkCache.nbytes`, a token of a row that it holds

`--speed` measures decode on the CPU instead, of a bfloat16 model with caches that are full: cache_dtype_decode.csv has
microseconds a call, the median and the least of interleaved rounds, in which each call has keys and values that no
recent one has touched (300 MB in turn).
"""

import copy
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, Device, Output, default_device, print_table, record, track, write_csv, write_json
from torch.nn.functional import cross_entropy

from sinkattn import SinkCache, ops, patch, reference

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import real

COLUMNS = ("window", "model", "cache", "begin", "end", "loss", "loss_off_percent", "logits_error", "bytes")
SINKS, CHUNK = 4, 512
KINDS = ("auto", "int8", "fp8")


def opened(dtype: torch.dtype, window: int, device: str) -> list:
    """A patched model for each `cache_dtype`, over the same weights."""
    made = real.real_model(dtype, device)
    shared = {id(x): x for x in (*made.parameters(), *made.buffers())}
    models = [copy.deepcopy(made, dict(shared)) for _ in KINDS]
    for model, kind in zip(models, KINDS, strict=True):
        patch(model, SINKS, window, cache_dtype=kind, fuse="attention")  # which lays no weights side by side
    return models


SPEED = ("rows", "heads", "kv_heads", "head_dim", "capacity", "cache", "median_us", "least_us", "of_bfloat16")
SHAPES = ((1, 32, 8, 128), (8, 32, 8, 128), (1, 32, 32, 128), (1, 32, 8, 64))


def decode_calls(rows: int, heads: int, kv_heads: int, dim: int, capacity: int, stored: torch.dtype | None):
    """Calls of decode over full caches, endlessly, each over another one than those before."""
    dtype, scales = torch.bfloat16, (None, None)
    q, k, v = (torch.randn(rows, n, 1, dim).to(dtype) for n in (heads, kv_heads, kv_heads))
    lengths, rotation = torch.full((rows,), 3 * capacity), torch.randn(rows, 1, 2, 2, dim // 2)
    held = []
    for _ in range(max(2, 300_000_000 // (4 * rows * kv_heads * capacity * dim))):
        caches = [torch.randn(rows, kv_heads, capacity, dim) for _ in range(2)]
        if stored is None:
            caches = [x.to(dtype) for x in caches]
        else:
            caches, scales = zip(*(reference.quantised(x, stored) for x in caches), strict=True)
        held.append((*caches, lengths, None, rotation, None, None, *scales))
    sizes = dict(sink_size=SINKS, window_size=capacity - SINKS, scale=dim**-0.5)
    for tensors in itertools.cycle(held):
        begun = time.perf_counter()
        ops.decode(q, k, v, *tensors, **sizes)
        yield 1e6 * (time.perf_counter() - begun)


def speed(output_dir: Path) -> None:
    """Measure decode on the CPU; print the table, write cache_dtype_decode.csv and .json."""
    rows = []
    for shape, capacity in itertools.product(SHAPES, (1024, 4096)):
        kinds = dict(zip(KINDS, (None, torch.int8, torch.float8_e4m3fn), strict=True))
        calls = {kind: decode_calls(*shape, capacity, stored) for kind, stored in kinds.items()}
        rounds = [{kind: next(call) for kind, call in calls.items()} for _ in range(33)][3:]
        for kind in KINDS:
            times = [found[kind] for found in rounds]
            ratio = statistics.median(found[kind] / found["auto"] for found in rounds)
            rows.append((*shape, capacity, kind, round(statistics.median(times)), round(min(times)), f"{ratio:.2f}"))
    print_table(SPEED, rows)
    write_csv(output_dir / "cache_dtype_decode.csv", SPEED, rows)
    write_json(output_dir / "cache_dtype_decode.json", record("cpu") | {"instructions": ops.CPU_ISA})


@torch.no_grad()
def main(
    tokens: Annotated[int, typer.Option(help="Of the text.")] = 65536,
    window: Annotated[list[int] | None, typer.Option(help="Tokens; the sinks are 4. 1020.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of the weights; float32 and bfloat16.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop behind a chunk after so many, for each window.")] = float("inf"),
    every: Annotated[int, typer.Option(help="Tokens of a range of positions.")] = 4096,
    is_speed: Annotated[bool, typer.Option("--speed", help="Measure decode on the CPU, and read nothing.")] = False,
    device: Device = None,
    output_dir: Output = RESULTS / "real",
) -> None:
    """Read; print the table, write cache_dtype.csv and cache_dtype.json."""
    if is_speed:
        return speed(output_dir)
    device, rows = device or default_device(), []
    ids = real.prose(tokens + 1, device)
    dtypes = dtype or ["float32", "bfloat16"]
    for size in window or [1020]:
        readers = [(name, kind, model) for name in dtypes
                   for kind, model in zip(KINDS, opened(getattr(torch, name), size, device), strict=True)]  # fmt: skip
        caches = [SinkCache(model) for *_, model in readers]
        found: list[list[torch.Tensor]] = [[] for _ in readers]  # of every token: its loss, its logits' squared error
        begun = time.perf_counter()
        for begin in track(range(0, ids.shape[1] - 1, CHUNK), f"window {size}"):
            end = min(begin + CHUNK, ids.shape[1] - 1)
            exact = None
            for (_, _, model), cache, pieces in zip(readers, caches, found, strict=True):
                logits = model(ids[:, begin:end], past_key_values=cache).logits[0].float()
                exact = logits if exact is None else exact
                loss = cross_entropy(logits, ids[0, begin + 1 : end + 1], reduction="none")
                error = ((logits - exact).square().mean(-1) / exact.var(-1)).double()
                pieces.append(torch.stack((loss.double(), error)).cpu())
            if time.perf_counter() - begun > seconds:
                break
        columns = [torch.cat(pieces, dim=1) for pieces in found]
        ends = [*range(every, columns[0].shape[1], every), columns[0].shape[1]]
        for begin, end in [*zip([0, *ends], ends, strict=False), (0, ends[-1])]:
            for (name, kind, _), cache, column in zip(readers, caches, columns, strict=True):
                loss, error = column[:, begin:end].mean(1).tolist()
                base = columns[[x[:2] for x in readers].index((name, "auto"))][0, begin:end].mean().item()
                held = size + SINKS + cache.plan.slack
                rows.append((size, name, kind, begin, end, f"{loss:.5f}", f"{100 * (loss / base - 1):.4f}",
                             f"{error**0.5:.2e}", f"{cache.nbytes / held:.1f}"))  # fmt: skip
    print_table(COLUMNS, [row for row in rows if row[3] == 0])
    write_csv(output_dir / "cache_dtype.csv", COLUMNS, rows)
    write_json(output_dir / "cache_dtype.json", record(device) | {"tokens": ends[-1], "chunk": CHUNK, "sinks": SINKS})


if __name__ == "__main__":
    typer.run(main)
