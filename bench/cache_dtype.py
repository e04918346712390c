"""What 8 bits cost a real model, and what they save: python bench/cache_dtype.py --output-dir bench/results/real

SmolLM2-135M-Instruct (tests/real.py) reads English prose, Python's own documentation, through caches of 4 + 1020 tokens
and of every `cache_dtype` side by side, a chunk at a time. By range of positions: the loss, how far it is from that of
the cache in the model's dtype, and the root mean square error of the logits against those, relative to their spread. A
second model in bfloat16 says what that rounding does by itself. Nothing may grow with the position: a key is rounded
once. `--until 1000000` reads on, the text over and over, and measures the last range again.

    bytes    of the cache, `SinkCache.nbytes`, a token of a row that it holds

`--speed` measures decode instead, of bfloat16 and caches that are full. On a CPU, cache_dtype_decode.csv has
microseconds a call, the median and the least of interleaved rounds, in which each call has keys and values that no
recent one has touched (300 MB in turn). On a GPU it has those of CUDA graphs (bench/gpu.py) by every backend, and of
FlashInfer's decode over pages of 16, which neither turns nor appends, beside the floor, the bytes of the cache over the
read bandwidth of that run; and cache_dtype_step.csv has whole steps of `Stream` over a model of Llama-3-8B's shape.
"""

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import (
    RESULTS,
    SINKS,
    Device,
    Output,
    default_device,
    free,
    median,
    now,
    print_table,
    record,
    track,
    write_csv,
    write_json,
)
from torch.nn.functional import cross_entropy

from sinkattn import SinkCache, Stream, ops, patch, reference

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import real

COLUMNS = ("window", "model", "cache", "begin", "end", "loss", "loss_off_percent", "logits_error", "bytes")
STORED = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
KINDS = tuple(STORED)


# --------------------------------------------------------------------------------------------------------------- loss


def opened(dtype: torch.dtype, window: int, device: str) -> list:
    """A patched model for each `cache_dtype`, over the same weights."""
    made = real.real_model(dtype, device)
    shared = {id(x): x for x in (*made.parameters(), *made.buffers())}
    models = [copy.deepcopy(made, dict(shared)) for _ in KINDS]
    for model, kind in zip(models, KINDS, strict=True):
        patch(model, SINKS, window, cache_dtype=kind, fuse="attention")  # which lays no weights side by side
    return models


class Readers:
    """A model and a cache for each dtype of weights and each `cache_dtype`, which read the same text."""

    def __init__(self, dtypes: list[str], window: int, device: str):
        self.names = [(name, kind) for name in dtypes for kind in KINDS]
        self.models = [model for name in dtypes for model in opened(getattr(torch, name), window, device)]
        self.caches = [SinkCache(model) for model in self.models]

    def skip(self, ids: torch.Tensor) -> None:
        for model, cache in zip(self.models, self.caches, strict=True):
            model(ids, past_key_values=cache, logits_to_keep=1)

    def read(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of every reader and token, (readers, 2, tokens): its loss, and its logits' squared error over the spread of
        those of the first reader."""
        found, exact = [], None
        for model, cache in zip(self.models, self.caches, strict=True):
            logits = model(ids, past_key_values=cache).logits[0].float()
            exact = logits if exact is None else exact
            loss = cross_entropy(logits, targets[0], reduction="none")
            error = (logits - exact).square().mean(-1) / exact.var(-1)
            found.append(torch.stack((loss, error)).double().cpu())
        return torch.stack(found)


def lines_of(readers: Readers, window: int, begin: int, end: int, found: torch.Tensor) -> Iterator[tuple]:
    """Rows of cache_dtype.csv, of what `Readers.read` has found from begin to end."""
    loss, error = found.mean(2).unbind(1)
    for i, (name, kind) in enumerate(readers.names):
        cache, base = readers.caches[i], loss[readers.names.index((name, "auto"))]
        off, held = 100 * (loss[i] / base - 1), window + SINKS + cache.plan.slack
        yield (window, name, kind, begin, end, f"{loss[i]:.5f}", f"{off:.4f}", f"{error[i] ** 0.5:.2e}",
               f"{cache.nbytes / held:.1f}")  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- speed

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


def speed_on_cpu(output_dir: Path) -> None:
    rows = []
    for shape, capacity in itertools.product(SHAPES, (1024, 4096)):
        calls = {kind: decode_calls(*shape, capacity, stored) for kind, stored in STORED.items()}
        rounds = [{kind: next(call) for kind, call in calls.items()} for _ in range(33)][3:]
        for kind in KINDS:
            times = [found[kind] for found in rounds]
            ratio = statistics.median(found[kind] / found["auto"] for found in rounds)
            rows.append((*shape, capacity, kind, round(statistics.median(times)), round(min(times)), f"{ratio:.2f}"))
    print_table(SPEED, rows)
    write_csv(output_dir / "cache_dtype_decode.csv", SPEED, rows)
    write_json(output_dir / "cache_dtype_decode.json", record("cpu") | {"instructions": ops.CPU_ISA})


ON_GPU = ("rows", "heads", "kv_heads", "head_dim", "capacity", "by", "cache", "us", "floor_us", "of_bfloat16")
GPU_SHAPES = [(rows, 32, kv_heads, 128) for kv_heads in (32, 8) for rows in (1, 64)]
STEP = ("model", "rows", "capacity", "cache", "ms_per_token", "of_bfloat16", "cache_gb")


def filled(rows: int, kv_heads: int, capacity: int, dim: int, stored: torch.dtype | None) -> list[tuple]:
    """Enough (k, v, their scales or None) to exceed the L2 four times over, in turn; at least 8."""
    from gpu import cold, new

    def one() -> tuple:
        pair = [new(rows, kv_heads, capacity, dim) for _ in range(2)]
        if stored is None:
            return *pair, None, None
        caches, scales = zip(*(reference.quantised(x, stored) for x in pair), strict=True)
        return *caches, *scales

    count = max(2, cold(2 * rows * kv_heads * capacity * dim * (2 if stored is None else 1)))
    made = [one() for _ in range(count)]
    return [made[i % count] for i in range(max(8, count))]


def decode_us(backend: str, rows: int, heads: int, kv_heads: int, dim: int, capacity: int, held: list[tuple]) -> float:
    """Microseconds of one layer's step as a patched model calls it."""
    from gpu import counters_of, graph_us, operands, sizes

    q, k, v, rotation = operands(heads, kv_heads, rows, 1, dim)
    lengths = torch.randint(capacity, 10 * capacity, (rows,), device="cuda")
    more = sizes(capacity, dim) | {"overlap": True, "backend": backend}
    counters = [counters_of(x[:2]) for x in held]
    return graph_us(
        [
            lambda x=x, one=one: ops.decode(
                q, k, v, *x[:2], lengths, None, rotation, None, None, *x[2:], arrivals=one, **more
            )
            for x, one in zip(held, counters, strict=True)
        ]
    )


def decode_on_gpu(output_dir: Path) -> None:
    from gpu import flashinfer_us, in_pages, installed, new, read_bandwidth, title, write_about

    rows, bandwidth = [], read_bandwidth()
    with_flashinfer = bool(installed(("flashinfer",)))
    for shape, capacity in track([*itertools.product(GPU_SHAPES, (1024, 4096))], "decode"):
        base: dict[str, float] = {}  # of caches in bfloat16
        for kind, stored in STORED.items():
            held = filled(shape[0], shape[2], capacity, shape[3], stored)
            floor = sum(x.nbytes for x in held[0] if x is not None) / bandwidth * 1e6
            times = {backend: decode_us(backend, *shape, capacity, held) for backend in ("cuda", "triton")}
            if with_flashinfer and stored != torch.int8:
                q = new(shape[0], shape[1], 1, shape[3])
                us = flashinfer_us((*shape, capacity, stored), q, in_pages([x[:2] for x in held]))
                times |= {} if us is None else {"flashinfer": us}
            base = base or times
            for by, us in times.items():
                ratio = f"{us / base[by]:.2f}" if by in base else ""
                rows.append((*shape, capacity, by, kind, f"{us:.2f}", f"{floor:.2f}", ratio))
            del held
            torch.cuda.empty_cache()
            write_csv(output_dir / "cache_dtype_decode.csv", ON_GPU, rows)
    print_table(ON_GPU, rows, f"us a layer and step; {title()}, reads {bandwidth / 1e12:.2f} TB/s")
    write_about(output_dir / "cache_dtype_decode.json", read_bytes_a_second=bandwidth)


def steps(output_dir: Path, name: str, batch: int, capacity: int, tokens: int = 40) -> None:
    """Whole steps of a `Stream` of so many rows, behind a cache that is full."""
    from generate import DEVICE, make

    model, rows = make(name), []
    vocabulary = min(model.config.vocab_size, 30_000)
    ids = torch.randint(3, vocabulary, (batch, capacity), device=DEVICE)
    for kind in track(KINDS, f"{name}, {batch} rows"):
        free(DEVICE)
        with patch(model, SINKS, capacity - SINKS, cache_dtype=kind):
            stream, times = Stream(model), []
            for piece in ids.split(512, dim=1):
                stream.append(piece)
            for _ in stream.generate(tokens, do_sample=False, eos_token_id=[]):
                times.append(now(DEVICE))
            held = stream.cache.nbytes
            del stream
        ms = 1e3 * median(b - a for a, b in itertools.pairwise(times[4:]))  # the first ones are captured
        rows.append((name, batch, capacity, kind, ms, held))
    rows = [(*row[:4], f"{row[4]:.3f}", f"{row[4] / rows[0][4]:.2f}", f"{row[5] / 1e9:.3f}") for row in rows]
    print_table(STEP, rows, "whole steps")
    write_csv(output_dir / "cache_dtype_step.csv", STEP, rows)


# --------------------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def main(
    tokens: Annotated[int, typer.Option(help="Of the text.")] = 65536,
    window: Annotated[int, typer.Option(help="Tokens; the sinks are 4.")] = 1020,
    dtype: Annotated[list[str] | None, typer.Option(help="Of the weights; float32 and bfloat16.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop behind a chunk after so many.")] = float("inf"),
    every: Annotated[int, typer.Option(help="Tokens of a range of positions.")] = 4096,
    chunk: Annotated[int, typer.Option(help="Tokens that are read at once.")] = 512,
    until: Annotated[int, typer.Option(help="Read on so far, and measure the last range again; 0: do not.")] = 0,
    is_speed: Annotated[bool, typer.Option("--speed", help="Measure decode and steps, and read nothing.")] = False,
    model: Annotated[str, typer.Option(help="Of bench/generate.py: its steps, on a GPU.")] = "llama-3-8b",
    device: Device = None,
    output_dir: Output = RESULTS / "real",
) -> None:
    """Read; print the table, write cache_dtype.csv and cache_dtype.json."""
    device, rows = device or default_device(), []
    if is_speed and torch.device(device).type == "cuda":
        decode_on_gpu(output_dir)
        return steps(output_dir, model, 64, 4096)
    if is_speed:
        return speed_on_cpu(output_dir)
    readers, text = Readers(dtype or ["float32", "bfloat16"], window, device), real.prose(tokens + 1, device)
    begun = time.perf_counter()

    def piece(begin: int, end: int) -> torch.Tensor:  # the text, over and over
        return text[:, torch.arange(begin, end, device=device) % text.shape[1]]

    def measured(begin: int, end: int, label: str) -> torch.Tensor:
        found = []
        for first in track(range(begin, end, chunk), label):
            last = min(first + chunk, end)
            found.append(readers.read(piece(first, last), piece(first + 1, last + 1)))
            if time.perf_counter() - begun > seconds:
                break
        return torch.cat(found, dim=2)

    found = measured(0, min(tokens, text.shape[1] - 1), f"window {window}")
    end = found.shape[2]
    for first in range(0, end, every):
        last = min(first + every, end)
        rows += lines_of(readers, window, first, last, found[:, :, first:last])
    whole = [*lines_of(readers, window, 0, end, found)]
    rows += whole
    shown = [*whole, *(row for row in rows if row[3] <= 5000 < row[4] and row not in whole)]
    if until > end + every:
        for first in track(range(end, until - every, chunk), f"to {until:,}"):
            readers.skip(piece(first, min(first + chunk, until - every)))
        far = [*lines_of(readers, window, until - every, until, measured(until - every, until, "the last"))]
        rows, shown = rows + far, shown + far
    print_table(COLUMNS, shown)
    write_csv(output_dir / "cache_dtype.csv", COLUMNS, rows)
    write_json(output_dir / "cache_dtype.json", record(device) | {"tokens": end, "chunk": chunk, "sinks": SINKS})


if __name__ == "__main__":
    typer.run(main)
