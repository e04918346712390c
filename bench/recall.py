"""StreamEval: an endless list of lines, and every 10 lines a question for one of 20 lines ago (arXiv 2309.17453, 4.4).

    python bench/recall.py --model MODEL --output-dir bench/results/recall

    line window: 28531
    ...
    what is line window? 28531

An answer counts if every token of it, and the line's end, is the likeliest one given what stands before: exactly what
greedy generation would have to write. The text then goes on with the right answer. Writes recall.csv (an answer a
row), recall.json (shares of right answers by position) and recall.png.

`--back 5,20,40` asks for lines of other distances. `--pinned` asks for the text's first line, each time as soon as the
window has forgotten the last answer, so that only sinks can hold it: try --sink-size 4, and one that covers the line.

The model must know how: `bench/train_model.py --mix recall` trains one.
"""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from experiments import COLOURS, EXPERIMENTS, Reader, open_model, ranges, record
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

EVERY = 10  # lines between questions
NAMES = (
    "name", "value", "index", "result", "error", "data", "path", "file", "node", "list", "item", "key", "size",
    "type", "code", "text", "line", "table", "count", "start", "stop", "first", "last", "user", "group", "test",
    "model", "image", "object", "class", "method", "module", "function", "string", "number", "width", "height",
    "color", "field", "query", "event", "order", "state", "action", "message", "request", "response", "server",
    "client", "token", "parser", "reader", "writer", "buffer", "cache", "batch", "layer", "tensor", "matrix",
    "vector", "graph", "edge", "point", "shape", "frame", "window", "button", "label", "title", "header", "footer",
    "column", "row", "cell", "page", "block", "chunk", "stream", "socket", "host", "port", "address", "domain",
    "email", "date", "time", "year", "month", "day", "hour", "minute", "second", "version", "package", "option",
    "config", "default", "target", "source", "output", "input", "prefix", "suffix", "pattern", "match", "mask",
    "filter",
)  # fmt: skip
KEPT = 64  # a name is not used again for so many lines
COLUMNS = ("experiment", "back", "text", "position", "right")
console = Console()


class Lines:
    """The list of lines: names that do not repeat for KEPT lines, each with a number of five digits.

    pinned: so many lines at the start whose names never repeat.
    """

    def __init__(self, seed: int, pinned: int = 0):
        self.random, self.pinned = random.Random(seed), pinned
        self.lines: list[tuple[str, int]] = []

    def line(self) -> str:
        taken = {name for name, _ in self.lines[: self.pinned] + self.lines[-KEPT:]}
        while (name := self.random.choice(NAMES)) in taken:
            pass
        self.lines.append((name, self.random.randrange(10_000, 100_000)))
        return f"line {name}: {self.lines[-1][1]}\n"

    def question(self, back: int) -> tuple[str, str]:
        """The question for the line `back` lines ago (1 is the last), and its answer."""
        name, number = self.lines[-back]
        return f"what is line {name}?", f" {number}\n"


def training_text(lines: int, seed: int) -> list[str]:
    """Texts of 500 lines, with a question after every other one, for any of the last 30."""
    texts = []
    for number in range(lines // 500):
        source, text = Lines(seed * 1_000_003 + number + 1), []
        for _ in range(500):
            text.append(source.line())
            if source.random.random() < 1 / 2:
                text += source.question(source.random.randint(1, min(30, len(source.lines))))
        texts.append("".join(text))
    return texts


def examination(
    tokenizer, tokens: int, back: int | None, seed: int, forgotten: int = 0
) -> tuple[list[int], list[tuple[int, int]]]:
    """At most `tokens` ids of a text with questions, and where the answers stand: (first, behind the last).

    back: lines; None asks for the first line of the text. forgotten: tokens between an answer and the next question.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    source, answers = Lines(-1 - seed, pinned=back is None), []
    ids = list(tokenizer("").input_ids)
    while True:
        part, spans = [], []
        for _ in range(EVERY):
            part += encode(source.line())
        distance, since = back or len(source.lines), len(ids) + len(part) - (answers[-1][1] if answers else -forgotten)
        if distance <= len(source.lines) and since >= forgotten:
            question, answer = map(encode, source.question(distance))
            begin = len(ids) + len(part) + len(question)
            part += question + answer
            spans = [(begin, begin + len(answer))]
        if len(ids) + len(part) > tokens:
            return ids, answers
        ids += part
        answers += spans


def score(reader: Reader, ids: Tensor, answers: list[list[tuple[int, int]]], chunk: int = 512) -> list[list[bool]]:
    """Which answers are right. ids: (texts, tokens); answers: of each text, where its answers stand."""
    asked = torch.zeros_like(ids, dtype=torch.bool)  # the token here must be foretold
    for row, spans in enumerate(answers):
        for begin, end in spans:
            asked[row, begin:end] = True
    right = torch.ones_like(asked)
    for begin in range(0, ids.shape[1] - 1, chunk):
        end = min(begin + chunk, ids.shape[1] - 1)
        columns = asked[:, begin + 1 : end + 1].any(0).nonzero().flatten()
        logits = reader.feed(ids[:, begin:end], columns.cpu())
        right[:, begin + 1 + columns] = logits.argmax(-1).to(ids.device) == ids[:, begin + 1 + columns]
    return [[bool(right[row, a:b].all()) for a, b in spans] for row, spans in enumerate(answers)]


def shares(rows: list[tuple], spans: list[tuple[int, int]]) -> dict:
    """Share of right answers by experiment, distance and position range, and the least and most of the texts."""
    found: dict = {}
    for experiment, back in dict.fromkeys(row[:2] for row in rows):
        entry = found.setdefault(experiment, {}).setdefault(str(back), {})
        for low, high in spans:
            texts: dict[int, list[int]] = {}
            for row in rows:
                if row[:2] == (experiment, back) and low <= row[3] < high:
                    texts.setdefault(row[2], []).append(row[4])
            if texts:
                means = [sum(answers) / len(answers) for answers in texts.values()]
                every = [answer for answers in texts.values() for answer in answers]
                entry[f"{low}-{high}"] = {
                    "answers": len(every), "share": sum(every) / len(every), "least": min(means), "most": max(means),
                }  # fmt: skip
    return found


def draw(output_dir: Path) -> None:
    """recall.png from recall.json: by position, or at the end of the text by distance, where several were asked for."""
    about = json.loads((output_dir / "recall.json").read_text())
    spans = [f"{a}-{b}" for a, b in ranges(about["tokens"], about["sink_size"] + about["window_size"])]
    found, backs = about["shares"], list(next(iter(about["shares"].values())))
    if len(backs) == 1:
        ticks, where = spans, "position in the text (tokens)"
        title = "the first line" if backs == ["first"] else f"the line {backs[0]} lines back"
        pick = {name: [by_back[backs[0]].get(span) for span in spans] for name, by_back in found.items()}
    else:
        ticks, where, title = backs, "lines back", f"earlier lines, at tokens {spans[-1]}"
        pick = {name: [by_back[back].get(spans[-1]) for back in backs] for name, by_back in found.items()}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(found)
    for i, (experiment, entries) in enumerate(pick.items()):
        shown = [(x + i * width, entry) for x, entry in enumerate(entries) if entry]
        heights = [100 * entry["share"] for _, entry in shown]
        spread = [[100 * abs(entry[end] - entry["share"]) for _, entry in shown] for end in ("least", "most")]
        style = dict(yerr=spread, capsize=2, label=experiment, color=COLOURS[experiment])
        axes.bar([x for x, _ in shown], heights, width, **style)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(ticks))], ticks)
    axes.set(xlabel=where, ylabel="right answers (%)", ylim=(0, 105))
    axes.set_title(f"Asked for {title}; {about['sink_size']} sinks + window {about['window_size']}")
    figure.legend(loc="outside lower center", ncols=len(found))
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(output_dir / "recall.png", dpi=130)


def main(
    model: Annotated[str, typer.Option(help="Hub name or local path of a model that can do it.")],
    output_dir: Annotated[Path, typer.Option(help="Where the results go.")] = Path("bench/results/recall"),
    experiment: Annotated[list[str], typer.Option(help="dense, window, sinks, recompute.")] = EXPERIMENTS,
    more: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT]...")] = None,
    tokens: Annotated[int, typer.Option(help="Length of a text.")] = 16_384,
    texts: Annotated[int, typer.Option(help="Different texts, side by side.")] = 3,
    back: Annotated[str, typer.Option(help="How many lines ago: one or several distances.")] = "20",
    pinned: Annotated[bool, typer.Option(help="Ask for the first line of the text.")] = False,
    sink_size: int = 4,
    window_size: int = 508,
    device: Annotated[str | None, typer.Option(help="The GPU if there is one.")] = None,
    dtype: str = "float32",
    seed: int = 0,
) -> None:
    """Score the answers of each experiment."""
    chosen = [*experiment, *(more or [])]
    if unknown := set(chosen) - set(EXPERIMENTS):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(EXPERIMENTS)}")
    network, tokenizer, front = open_model(model, device, dtype)
    distances: Iterator = [None] if pinned else [int(x) for x in back.split(",")]
    rows: list[tuple] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(chosen) * len(distances))
        for distance in distances:
            forgotten = sink_size + window_size if pinned else 0
            exams = [examination(tokenizer, tokens, distance, seed + text, forgotten) for text in range(texts)]
            length = min(len(ids) for ids, _ in exams)
            ids = torch.tensor([ids[:length] for ids, _ in exams], device=network.device)
            answers = [[span for span in spans if span[1] <= length] for _, spans in exams]
            if not any(answers):
                raise typer.BadParameter(f"--tokens {tokens} is too short for a question of {distance} lines back")
            for name in chosen:
                progress.update(task, description=f"{name}, {'first' if pinned else distance} line")
                with Reader(network, name, sink_size, window_size, front, batch=64) as reader:
                    for text, marks in enumerate(score(reader, ids, answers)):
                        rows += [
                            (name, "first" if pinned else distance, text, span[0], int(mark))
                            for span, mark in zip(answers[text], marks, strict=True)
                        ]
                progress.advance(task)
    spans = ranges(tokens, sink_size + window_size)
    found = shares(rows, spans)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "recall.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    entry = {
        **record(str(network.device)), "model": model, "sink_size": sink_size, "window_size": window_size,
        "texts": texts, "tokens": tokens, "shares": found,
    }  # fmt: skip
    (output_dir / "recall.json").write_text(json.dumps(entry, indent=1) + "\n")
    draw(output_dir)
    table = Table("experiment", "lines back", *(f"{a}-{b}" for a, b in spans), title="right answers, %")
    for name, by_back in found.items():
        for distance, entry in by_back.items():
            parts = [entry.get(f"{a}-{b}") for a, b in spans]
            table.add_row(name, distance, *("" if part is None else f"{100 * part['share']:.1f}" for part in parts))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
