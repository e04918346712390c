"""One endless text, sinks + window: python bench/long_run.py --tokens 4000000 --output-dir bench/results/long_run

The held-out modules, cut to whole blocks, are read over and over, in chunks (how a text is cut does not change its
losses). The window has long forgotten a passage when it comes again, so every pass must give it the same loss: what
differs is the position alone.

Writes long_run.csv (by block: mean loss, median time of a token fed alone, bytes at the most on a GPU or of weights and
cache on a CPU), long_run.json and long_run.png. The logits of the first `--compared` tokens that lie many windows on,
and of the last ones, are compared with a float64 copy of the model in plain PyTorch (`plain_forward`: nothing of
sinkattn), started layers * (W - 1) tokens earlier, behind the sinks: earlier tokens have no way into these logits.
"""

import copy
import csv
import itertools
import math
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, Device, Output, TextFile, console, finish, forget_peak, now, progress, record, write_json
from experiments import Reader, Text, open_model, plain_forward, text_blocks, token_ids
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

COLUMNS = ("tokens", "nll", "seconds", "bytes")
TIMED = 128  # tokens at the end of a block, fed one by one


class Compared:
    """Logits of tokens [begin, end) of the run, with the ids that a reference needs to find them again."""

    def __init__(self, begin: int, end: int, before: int):
        self.begin, self.end, self.first = begin, end, max(begin - before, 0)
        self.ids: list[Tensor] = []
        self.logits: list[Tensor] = []

    def see(self, position: int, ids: Tensor, logits: Tensor) -> None:
        """ids (1, n) stand at `position` and on, logits (1, n, vocabulary) are behind them."""
        low, high = (max(x - position, 0) for x in (self.first, self.end))
        self.ids.append(ids[0, low:high].cpu())
        self.logits.append(logits[0, max(self.begin - position, 0) : high].cpu())

    def against(self, model, sinks: Tensor, window_size: int) -> dict:
        """How far the logits are from those of `model`, relative to their spread. sinks: (S,) first ids of the text."""
        ids = torch.cat(self.ids).to(sinks.device)
        positions = torch.arange(self.first, self.end, device=ids.device)
        if self.first > len(sinks):
            ids = torch.cat((sinks, ids))
            positions = torch.cat((torch.arange(len(sinks), device=ids.device), positions))
        else:
            ids, positions = torch.cat((sinks[: self.first], ids)), torch.arange(self.end, device=ids.device)
        hidden = plain_forward(model, ids[None], len(sinks), window_size, positions)[0, self.begin - self.end :]
        worst, squares, wrong, spread = 0.0, 0.0, 0, 0.0
        for found, states in zip(torch.cat(self.logits).split(1024), hidden.split(1024), strict=True):
            expected = model.lm_head(states)
            error = found.to(expected) - expected
            worst = max(worst, error.abs().max().item())
            squares += error.square().sum().item()
            spread += (expected - expected.mean()).square().sum().item()
            wrong += int((found.to(expected).argmax(-1) != expected.argmax(-1)).sum())
        count = hidden.shape[0] * model.config.vocab_size
        deviation = (spread / count) ** 0.5
        return {
            "from": self.begin, "to": self.end, "largest_error": worst / deviation,
            "rms_error": (squares / count) ** 0.5 / deviation, "other_choices": wrong,
        }  # fmt: skip


def time_of(rows: list[list]) -> dict[str, float]:
    """Seconds of a token fed alone: median and 90th percentile of the blocks."""
    seconds = sorted(row[2] for row in rows)
    return {"median": statistics.median(seconds), "p90": seconds[math.ceil(0.9 * len(seconds)) - 1]}


def draw(about: dict, path: Path) -> None:
    """What long_run.json says: loss (a line a passage of the text), time and memory by block."""
    rows, block = about["rows"], about["rows"][0][0]
    passages = max(about["tokens_a_pass"] // block, 1)
    figure = Figure(figsize=(8, 5))
    loss, time, held = figure.subplots(3, 1, sharex=True)
    for first in range(passages):
        part = rows[first::passages]
        loss.plot([row[0] / 1e6 for row in part], [row[1] for row in part], marker=".", label=f"passage {first + 1}")
    where, seconds = [row[0] / 1e6 for row in rows], time_of(rows)
    time.plot(where, [1e3 * row[2] for row in rows], ".", label="median of a block")
    for name, style in (("median", "-"), ("p90", ":")):
        label = f"{name} of all blocks, {1e3 * seconds[name]:.1f} ms"
        time.axhline(1e3 * seconds[name], color="grey", linestyle=style, label=label)
    held.plot(where, [row[3] / 2**20 for row in rows], marker=".")
    for panel, name in ((loss, "loss (nats)"), (time, "ms per token"), (held, "memory (MiB)")):
        finish(panel, ylim=(0, 1.2 * panel.get_ylim()[1]), ylabel=name)
    for panel in (loss, time):
        panel.legend(loc="lower right", ncols=3)
    sizes = f"{about['sink_size']} sinks + window {about['window_size']}"
    loss.set_title(f"{about['tokens']:,} tokens, {sizes}; {about['device']}")
    held.set_xlabel("tokens read (millions)")
    figure.savefig(path)


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="Hub name or local path of a Llama.")] = "demo",
    output_dir: Output = RESULTS,
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(help="Length of the run.")] = 4_000_000,
    block: Annotated[int, typer.Option(help="Tokens in a row of the CSV.")] = 100_000,
    compared: Annotated[int, typer.Option(help="Tokens whose logits are compared, early and at the end.")] = 10_000,
    chunk: Annotated[int, typer.Option(help="Tokens fed at a time.")] = 2048,
    sink_size: int = 4,
    window_size: int = 508,
    device: Device = None,
    dtype: str = "float32",
) -> None:
    """Read on and on, and look back at the end."""
    network, tokenizer, front = open_model(model, device, dtype)
    where = network.device
    once = list(token_ids(tokenizer, text_blocks(text)))
    once = once[: len(once) // block * block] or once
    ids = itertools.cycle(once)
    before = network.config.num_hidden_layers * (window_size - 1)
    early, late = (Compared(begin, begin + compared, before) for begin in (before, tokens - compared))
    if tokens < before + 2 * compared:
        raise typer.BadParameter(f"--tokens {tokens}: two comparisons take {before + 2 * compared} at least")
    reading = Text(itertools.chain(tokenizer("").input_ids[:1], ids), where)
    first = list(reading.last)  # ids of the sinks
    output_dir.mkdir(parents=True, exist_ok=True)
    rows, losses, times, position, begin = [], [], [], 0, now(where)
    with (
        Reader(network, "sinks", sink_size, window_size, front) as reader,
        (output_dir / "long_run.csv").open("w", newline="") as file,
        progress() as bar,
    ):
        writer, task = csv.writer(file), bar.add_task("read", total=tokens)
        writer.writerow(COLUMNS)
        while position < tokens:
            border = min((position // block + 1) * block, tokens)
            timed = position >= border - TIMED
            count = 1 if timed else min(chunk, border - TIMED - position)
            fed, fresh = reading.next(count)
            if len(first) < sink_size:
                first = (first + fresh)[:sink_size]
            if border - position == TIMED:
                forget_peak(where)
            clock = now(where) if timed else 0.0
            logits = reader.feed(fed)
            if timed:
                times.append(now(where) - clock)
            targets = torch.tensor(fresh, device=where)
            losses.append(cross_entropy(logits[0].float(), targets, reduction="sum"))
            for part in (early, late):
                if part.first < position + count and position < part.end:
                    part.see(position, fed, logits)
            position += count
            bar.advance(task, count)
            if position == border:
                nll = torch.stack(losses).sum().item() / (border - (rows[-1][0] if rows else 0))
                rows.append((position, nll, statistics.median(times), reader.peak))
                writer.writerow((position, f"{nll:.5f}", f"{rows[-1][2]:.6f}", rows[-1][3]))
                file.flush()
                losses, times = [], []
    seconds = now(where) - begin
    sinks = torch.tensor(first, device=where)
    wide = copy.deepcopy(network).double()
    comparisons = [part.against(wide, sinks, window_size) for part in (early, late)]
    whole = [row[1] for row in rows[1:] if row[0] % block == 0]  # the first block begins cold
    passages = [losses for i in range(len(once) // block) if len(losses := whole[i :: len(once) // block]) > 1]
    entry = {
        **record(str(where)), "model": model, "sink_size": sink_size, "window_size": window_size, "dtype": dtype,
        "tokens": tokens, "tokens_a_pass": len(once), "seconds": seconds, "rows": rows,
        "passages": passages, "against_float64": comparisons,
    }  # fmt: skip
    write_json(output_dir / "long_run.json", entry)
    draw(entry, output_dir / "long_run.png")
    console.print(", ".join(f"{name} of the blocks {1e3 * x:.2f} ms a token" for name, x in time_of(rows).items()))
    console.print(f"{seconds:.1f} s; loss {rows[0][1]:.4f} in the first block, {rows[-1][1]:.4f} in the last")
    for losses in passages:
        console.print(f"a passage of {block:,} tokens, {len(losses)} times: {min(losses):.6f} to {max(losses):.6f}")
    for part in comparisons:
        console.print(
            f"tokens {part['from']:,} to {part['to']:,} against float64: largest error {part['largest_error']:.2e} of "
            f"the spread, rms {part['rms_error']:.2e}, {part['other_choices']} other choices"
        )


if __name__ == "__main__":
    typer.run(main)
