"""Loss, memory and latency by token, in up to four ways of attending (bench/experiments.py says which).

    python bench/perplexity.py --experiment dense window sinks recompute --model demo --tokens 8192 --texts 3
    python bench/perplexity.py --experiment attention_sinks --model_name_or_path meta-llama/Llama-2-7b-hf \\
        --dataset_name emozilla/pg19-test --num_tokens 8192 --output_dir outputs     # attention_sinks' names do as well

Writes EXPERIMENT.csv, a row a token, and perplexity.json: the mean loss by position range of every text, with the
medians of latency and memory. A run that was stopped goes on from its CSV. bench/plot.py draws them.

    text           which of the texts, from 0; they are consecutive pieces of the same source
    input_length   tokens read so far
    nll            loss of the next token, nats
    seconds        time of this token's step, if it was fed alone
    bytes          memory at the most during that step: what torch has allocated on a GPU; weights and cache on a CPU

Tokens are fed `--chunk` at a time, but for the last of each chunk, which is fed alone and timed; `--chunk 1` feeds
and times every token. How a text is cut does not change its losses.
"""

import csv
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import (
    Device,
    TextFile,
    console,
    forget_peak,
    now,
    print_table,
    progress,
    read_csv,
    record,
    write_csv,
    write_json,
)
from experiments import EXPERIMENTS, Reader, Text, open_model, ranges, take, text_blocks, token_ids
from torch.nn.functional import cross_entropy

OLD_NAMES = {"attention_sinks": "sinks", "windowed": "window", "transformers": "dense"}
NAMES = {name: name for name in EXPERIMENTS} | OLD_NAMES
COLUMNS = ("text", "input_length", "nll", "seconds", "bytes")


def read(reader: Reader, ids: Iterator[int], tokens: int, done: int, chunk: int, every: int) -> Iterator[list[tuple]]:
    """Rows of one text behind its first `done` tokens, chunk by chunk; what was done is read again, in large chunks."""
    device = reader.model.device
    text, begin = Text(ids, device), 0
    while begin < done:
        count = min(2048, done - begin)
        reader.feed(text.next(count)[0], torch.arange(0))
        begin += count
    while begin < tokens:
        end = min((begin // chunk + 1) * chunk, tokens)
        rows = []
        for count in filter(None, (end - begin - 1, 1)):
            wanted = torch.tensor([i for i in range(count) if (begin + i + 1) % every == 0], dtype=torch.int64)
            forget_peak(device)
            clock = now(device) if count == 1 else 0.0
            fed, following = text.next(count)
            logits = reader.feed(fed, wanted)[0]
            seconds = now(device) - clock if count == 1 and len(wanted) else None
            if len(wanted):
                nll = cross_entropy(logits.float(), torch.tensor(following, device=device)[wanted], reduction="none")
                taken = ("", "") if seconds is None else (f"{seconds:.6f}", reader.peak)
                found = zip((wanted + begin + 1).tolist(), nll.tolist(), strict=True)
                rows += [(at, f"{loss:.4f}", *taken) for at, loss in found]
            begin += count
        yield rows


def run(
    reader: Reader, source: Callable[[], Iterator[int]], front: tuple[int, ...], texts: int, tokens: int, chunk: int,
    every: int, path: Path, last: list[str] | None, advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Append to `path` what is missing behind its last row."""
    ids = source()
    for text in range(texts):
        done = 0
        if last is not None and text <= int(last[0]):
            done = tokens if text < int(last[0]) else int(last[1])
            advance(done)
            if done >= tokens - tokens % every:
                take(ids, tokens + 1 - len(front))
                continue
        reader.reset()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            for rows in read(reader, itertools.chain(front, ids), tokens, done, chunk, every):
                writer.writerows((text, *row) for row in rows)
                file.flush()
                advance(rows[-1][0] - done if rows else 0)
                done = rows[-1][0] if rows else done


def resume(path: Path, settings: dict, overwrite: bool) -> list[str] | None:
    """Make `path` ready for more rows; what it holds stays, but for a line that a killed run left half-written.

    settings: what the rows depend on; they are kept beside the CSV. Returns the last row, None if there is none. Raises
    typer.BadParameter for a CSV of other settings.
    """
    beside = path.with_suffix(".json")
    if overwrite or not path.exists() or not beside.exists():
        write_json(beside, settings)
        write_csv(path, COLUMNS, ())
        return None
    before = json.loads(beside.read_text())
    if before != settings:
        keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        differ = [f"{key} {before.get(key)} then, {settings.get(key)} now" for key in keys]
        raise typer.BadParameter(
            f"{path} was made with other settings ({'; '.join(differ)}): choose another --output-dir, or --overwrite"
        )
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    with path.open("r+b") as file:
        file.truncate(len(whole))
    lines = whole.decode().split("\n")
    return lines[-2].split(",") if len(lines) > 2 else None


def summary(path: Path, tokens: int, first: int) -> dict:
    """Means by position range: loss of every text, and over all of them; medians of seconds and bytes."""
    rows = [row for row in read_csv(path) if int(row["input_length"]) <= tokens]
    found = {}
    for low, high in ranges(tokens, first):
        part = [row for row in rows if low < int(row["input_length"]) <= high]
        texts: dict[str, list[float]] = {}
        for row in part:
            texts.setdefault(row["text"], []).append(float(row["nll"]))
        timed = [row for row in part if row["seconds"]]
        if part:
            found[f"{low}-{high}"] = {
                "loss": statistics.mean(float(row["nll"]) for row in part),
                "loss_by_text": [statistics.mean(losses) for losses in texts.values()],
                "seconds": statistics.median(float(row["seconds"]) for row in timed) if timed else None,
                "bytes": statistics.median(int(row["bytes"]) for row in timed) if timed else None,
            }
    return found


def against_recompute(directory: Path, tokens: int, first: int) -> dict:
    """Loss of sinks over that of re-computation, by position range, at the tokens where both are known: - 1."""
    losses = {}
    for name in ("sinks", "recompute"):
        rows = read_csv(directory / f"{name}.csv")
        losses[name] = {(row["text"], int(row["input_length"])): float(row["nll"]) for row in rows}
    both = losses["sinks"].keys() & losses["recompute"].keys()
    found = {}
    for low, high in ranges(tokens, first):
        keys = [key for key in both if low < key[1] <= high]
        ratio = lambda keys: sum(losses["sinks"][k] for k in keys) / sum(losses["recompute"][k] for k in keys) - 1  # noqa: E731
        texts = sorted({text for text, _ in keys}, key=int)
        if keys:
            by_text = [ratio([key for key in keys if key[0] == text]) for text in texts]
            found[f"{low}-{high}"] = {"all": ratio(keys), "by_text": by_text, "tokens": len(keys)}
    return found


def main(
    experiment: Annotated[
        list[str], typer.Option(help="dense, window, sinks, recompute: one or several. attention_sinks' names do too.")
    ] = ("dense", "window", "sinks", "recompute"),
    more: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT]...", help="More of them.")] = None,
    model: Annotated[
        str, typer.Option("--model", "--model_name_or_path", help='Hub name or local path; "demo" is the shipped one.')
    ] = "demo",
    revision: Annotated[str, typer.Option(help="Of the model.")] = "main",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", "--trust_remote_code")] = False,
    text: TextFile = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "--dataset_name", help="Hub name or folder, for the datasets library.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Which configuration of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "test",
    column: Annotated[str, typer.Option("--column", "--data_column", help="The dataset's column with text.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", "--num_tokens", help="Length of a text.", min=1)] = 8192,
    texts: Annotated[int, typer.Option(help="How many, one after another out of the source.", min=1)] = 1,
    sink_size: Annotated[int, typer.Option("--sink-size", "--attention_sink_size", help="S, tokens.")] = 4,
    window_size: Annotated[
        int, typer.Option("--window-size", "--attention_sink_window_size", help="W, tokens; the other ways get S + W.")
    ] = 508,
    whole: Annotated[
        int | None, typer.Option("--window_size", help="As attention_sinks' bench means it: S + W.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens fed at a time, the last of them alone.", min=1)] = 64,
    every: Annotated[int, typer.Option(help="Re-compute only every so many tokens.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Windows re-computed at a time.", min=1)] = 16,
    dtype: Annotated[str, typer.Option(help='Of the weights: "auto" (as saved), float32, bfloat16, ...')] = "auto",
    device: Device = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "--output_dir", help="For the CSVs.")] = Path("outputs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where a CSV is there.")] = False,
) -> None:
    """Measure each experiment, one after another."""
    chosen = [*experiment, *(more or [])]
    if unknown := [name for name in chosen if name not in NAMES]:
        raise typer.BadParameter(f"--experiment {' '.join(unknown)}: choose of {', '.join(NAMES)}")
    chosen = list(dict.fromkeys(NAMES[name] for name in chosen))
    window_size = window_size if whole is None else whole - sink_size
    code = {"trust_remote_code": True} if trust_remote_code else {}
    network, tokenizer, _ = open_model(model, device, dtype, revision=revision, **code)
    front = tuple(tokenizer("").input_ids)
    source = lambda: token_ids(tokenizer, text_blocks(text, dataset, task, split, column))  # noqa: E731
    settings = {
        "model": model, "source": dataset or (str(text) if text else "held-out modules"), "texts": texts,
        "tokens": tokens if texts > 1 else None, "sink_size": sink_size, "window_size": window_size,
        "dtype": str(network.dtype).removeprefix("torch."),
    }  # fmt: skip
    with progress() as bar:
        for number, name in enumerate(chosen):
            path, step = output_dir / f"{name}.csv", every if name == "recompute" else 1
            last = resume(path, {**settings, "every": step}, overwrite)
            if last is not None:
                console.print(f"{path}: goes on behind token {int(last[1]):,} of text {last[0]}")
            line = bar.add_task(name, total=texts * tokens)
            begin = time.perf_counter()
            with Reader(network, name, sink_size, window_size, len(front), batch) as reader:
                try:
                    run(reader, source, front, texts, tokens, chunk, step, path, last,
                        lambda n, line=line: bar.advance(line, n))  # fmt: skip
                except torch.OutOfMemoryError as error:
                    console.print(f"[yellow]{name} ends here, out of memory:[/] {error}", soft_wrap=True)
            console.print(f"{name}: {time.perf_counter() - begin:.1f} s, {path}")
            about = {**record(str(network.device)), **settings, "tokens": tokens}
            known = [other for other in EXPERIMENTS if other not in chosen[number + 1 :]]  # those are not whole yet
            found = sum_up(known, output_dir, tokens, sink_size + window_size, about)
    show(found, tokens, sink_size + window_size)


def sum_up(names: list[str], output_dir: Path, tokens: int, first: int, about: dict) -> dict:
    """`about`, and what the CSVs of these experiments say, also written to perplexity.json."""
    found = {name: summary(path, tokens, first) for name in names if (path := output_dir / f"{name}.csv").exists()}
    about["experiments"] = found
    if "sinks" in found and "recompute" in found:
        about["sinks_over_recompute"] = against_recompute(output_dir, tokens, first)
    write_json(output_dir / "perplexity.json", about)
    return about


def show(about: dict, tokens: int, first: int) -> None:
    spans = [f"{low}-{high}" for low, high in ranges(tokens, first)]
    rows = []
    for name, by_range in about["experiments"].items():
        end = by_range[list(by_range)[-1]]
        cells = [f"{by_range[span]['loss']:.3f}" if span in by_range else "" for span in spans]
        seconds, held = end["seconds"], end["bytes"]
        rows.append((name, *cells, f"{1e3 * seconds:.2f}" if seconds else "", f"{held / 2**20:.1f}" if held else ""))
    for span, ratio in about.get("sinks_over_recompute", {}).items():
        by_text = " ".join(f"{100 * x:+.2f}" for x in ratio["by_text"])
        console.print(f"sinks over recompute, {span}: {100 * ratio['all']:+.2f} % (by text {by_text})")
    print_table(("loss at", *spans, "ms a token at the end", "MiB at the end"), rows)


if __name__ == "__main__":
    typer.run(main)
