"""Sinks that all rows share: python bench/shared.py --output-dir bench/results/h200

attention: one layer's step of one token a row, 32 query heads and 8 key heads of 128 in bfloat16, S sinks and W tokens
behind them, all full. "own" is decode over rows that each have the sinks; "shared" is ops.attend_shared over the one
copy and decode over the rings; "sinks" is the first of these two alone. Medians of CUDA graph replays, as in decode.py,
through enough rings to exceed the L2; the shared sinks are one copy a ring as well. The floor of "shared" is its bytes,
sinks once and rings, over the read bandwidth of the same run.

step: a whole model of a real shape with random weights, a system prompt of S tokens and rows behind it: the seconds
until all rows have read the prompt (every row by itself, or one row and `fork`), memory and time of a token by Stream.

Writes shared.csv, shared_step.csv, shared.json.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, Output, default_device, free, median, now, print_table, track, write_csv
from generate import make
from gpu import cold, graph_us, new, operands, read_bandwidth, title, write_about

import sinkattn
from sinkattn import ops, rows

ATTENTION = ("rows", "sinks", "window", "way", "us", "floor_us", "bytes", "times")
STEP = ("model", "rows", "sinks", "window", "way", "prompt_s", "ms_per_token", "cache_gb")
DEVICE = torch.device(default_device())
HEADS, KV_HEADS, DIM = 32, 8, 128


def attention(batch: int, sinks: int, window: int, bandwidth: float) -> list[dict]:
    q, k, v, rotation = operands(HEADS, KV_HEADS, batch, 1, DIM)
    lengths = torch.randint(sinks + window, 10 * (sinks + window), (batch,), device="cuda")
    sizes = dict(window_size=window, scale=DIM**-0.5)
    of_token = 2 * KV_HEADS * DIM * 2  # bytes
    count = min(max(2, cold(batch * window * of_token)), 16)
    pair = lambda rows, slots: tuple(new(rows, KV_HEADS, slots, DIM) for _ in range(2))  # noqa: E731

    def whole(kv):
        return ops.decode(q, k, v, *kv, lengths, None, rotation, sink_size=sinks, overlap=True, **sizes)

    def found(kv):
        return ops.attend_shared(q, *kv, lengths, rotation, **sizes)

    def shared(kv, ring):
        more = dict(sizes, sink_size=0, joined=found(kv), overlap=True)
        return ops.decode(q, k, v, *ring, lengths - sinks, None, rotation, **more)

    own = [pair(batch, sinks + window) for _ in range(min(count, 4))]
    us = {"own": graph_us([lambda kv=kv: whole(kv) for kv in own])}
    del own
    free(DEVICE)
    lone, rings = [pair(1, sinks) for _ in range(count)], [pair(batch, window) for _ in range(count)]
    us["shared"] = graph_us([lambda x=x: shared(*x) for x in zip(lone, rings, strict=True)])
    us["sinks"] = graph_us([lambda kv=kv: found(kv) for kv in lone])
    tokens = {"own": batch * (sinks + window), "shared": sinks + batch * window, "sinks": sinks}
    about = dict(rows=batch, sinks=sinks, window=window)
    return [
        dict(
            about, way=way, us=round(x, 2), floor_us=round(tokens[way] * of_token / bandwidth * 1e6, 2),
            bytes=tokens[way] * of_token, times=round(us["own"] / x, 2),
        )
        for way, x in us.items()
    ]  # fmt: skip


def step(name: str, batch: int, sinks: int, window: int, tokens: int) -> list[dict]:
    model, found = make(name), []
    system, text = (torch.randint(3, 100, shape, device=DEVICE) for shape in ((1, sinks), (batch, window)))
    least = rows.SHARED
    with sinkattn.patch(model, sinks, window):
        for way in ("own", "shared"):
            rows.SHARED = least if way == "shared" else 1 << 60
            free(DEVICE)
            stream, begin = sinkattn.Stream(model), now(DEVICE)
            if way == "own":
                stream.append(system.expand(batch, -1))
            else:
                stream.append(system)
                stream = stream.fork(0, batch)
            prompt_s = now(DEVICE) - begin
            stream.append(text)
            times = []
            for ids in stream.generate(tokens, do_sample=False, eos_token_id=[]):
                ids.tolist()
                times.append(now(DEVICE))
            ms = 1e3 * median(b - a for a, b in zip(times[4:], times[5:], strict=False))
            about = dict(model=name, rows=batch, sinks=sinks, window=window, way=way, prompt_s=round(prompt_s, 3))
            found.append(dict(about, ms_per_token=round(ms, 3), cache_gb=round(stream.cache.nbytes / 1e9, 3)))
            del stream
    rows.SHARED = least
    return found


def main(
    output_dir: Output = RESULTS,
    model: Annotated[str, typer.Option(help="Of bench/generate.py; 'none' for no step.")] = "llama-3-8b",
    batch: Annotated[int, typer.Option(help="Rows of the model's step.")] = 64,
    sinks: Annotated[int, typer.Option(help="S of the model's step, tokens.")] = 2048,
    window: Annotated[int, typer.Option(help="W of all, tokens.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens of the model's step.")] = 60,
) -> None:
    """Time both; print the tables, write CSV."""
    bandwidth, found = read_bandwidth(), []
    cases = [(n, 2048) for n in (1, 4, 16, 64, 256)] + [(64, 512), (64, 8192)]
    for count, size in track(cases, "attention"):
        found += attention(count, size, window, bandwidth)
    print_table(ATTENTION, found, title())
    write_csv(output_dir / "shared.csv", ATTENTION, found)
    if model != "none":
        found = step(model, batch, sinks, window, tokens)
        print_table(STEP, found, title())
        write_csv(output_dir / "shared_step.csv", STEP, found)
    write_about(Path(output_dir) / "shared.json", read_gb_s=round(bandwidth / 1e9))


if __name__ == "__main__":
    typer.run(main)
