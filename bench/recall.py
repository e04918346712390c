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

import random
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, Device, Output, finish, print_table, progress, record, write_csv, write_json
from experiments import COLOURS, EXPERIMENTS, Reader, open_model, ranges
from matplotlib.figure import Figure
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


def examine(
    tokenizer, tokens: int, back: int | None, texts: int, forgotten: int = 0
) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    """Several examinations, cut to the shortest: ids (texts, n), and of each text where its answers stand."""
    found = [examination(tokenizer, tokens, back, text, forgotten) for text in range(texts)]
    length = min(len(ids) for ids, _ in found)
    ids = torch.tensor([ids[:length] for ids, _ in found])
    return ids, [[span for span in spans if span[1] <= length] for _, spans in found]


def answered(reader: Reader, back: int | str, ids: Tensor, answers: list[list[tuple[int, int]]], first: int = 0):
    """Rows as in COLUMNS. back: as it stands in them. first: number of the first text."""
    reader.reset()
    return [
        (reader.experiment, back, first + text, begin, int(mark))
        for text, marks in enumerate(score(reader, ids.to(reader.model.device), answers))
        for (begin, _), mark in zip(answers[text], marks, strict=True)
    ]


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


def draw(about: dict, path: Path) -> None:
    """What recall.json says: by position, or at the end of the text by distance, where several were asked for."""
    spans = [f"{a}-{b}" for a, b in ranges(about["tokens"], about["sink_size"] + about["window_size"])]
    found, backs = about["shares"], list(next(iter(about["shares"].values())))
    if len(backs) == 1:
        ticks, where = spans, "position in the text (tokens)"
        title = "the first line" if backs == ["first"] else f"the line {backs[0]} lines back"
        pick = {name: [by_back[backs[0]].get(span) for span in spans] for name, by_back in found.items()}
    else:
        ticks, where, title = backs, "lines back", f"earlier lines, at tokens {spans[-1]}"
        pick = {name: [by_back[back].get(spans[-1]) for back in backs] for name, by_back in found.items()}
    figure = Figure(figsize=(8, 4))
    axes, width = figure.subplots(), 0.8 / len(found)
    for i, (experiment, entries) in enumerate(pick.items()):
        shown = [(x + i * width, entry) for x, entry in enumerate(entries) if entry]
        heights = [100 * entry["share"] for _, entry in shown]
        spread = [[100 * abs(entry[end] - entry["share"]) for _, entry in shown] for end in ("least", "most")]
        style = dict(yerr=spread, capsize=2, label=experiment, color=COLOURS[experiment])
        axes.bar([x for x, _ in shown], heights, width, **style)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(ticks))], ticks)
    finish(axes, "y", xlabel=where, ylabel="right answers (%)", ylim=(0, 105))
    axes.set_title(f"Asked for {title}; {about['sink_size']} sinks + window {about['window_size']}")
    figure.legend(loc="outside lower center", ncols=len(found))
    figure.savefig(path)


def main(
    model: Annotated[str, typer.Option(help="Hub name or local path of a model that can do it.")],
    output_dir: Output = RESULTS / "recall",
    experiment: Annotated[list[str], typer.Option(help="dense, window, sinks, recompute.")] = EXPERIMENTS,
    more: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT]...")] = None,
    tokens: Annotated[int, typer.Option(help="Length of a text.")] = 16_384,
    texts: Annotated[int, typer.Option(help="Different texts, side by side.")] = 3,
    back: Annotated[str, typer.Option(help="How many lines ago: one or several distances.")] = "20",
    pinned: Annotated[bool, typer.Option(help="Ask for the first line of the text.")] = False,
    sink_size: int = 4,
    window_size: int = 508,
    device: Device = None,
    dtype: str = "float32",
) -> None:
    """Score the answers of each experiment."""
    chosen = [*experiment, *(more or [])]
    if unknown := set(chosen) - set(EXPERIMENTS):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(EXPERIMENTS)}")
    network, tokenizer, front = open_model(model, device, dtype)
    distances = ["first"] if pinned else [int(x) for x in back.split(",")]
    rows: list[tuple] = []
    with progress() as bar:
        task = bar.add_task("", total=len(chosen) * len(distances))
        for distance in distances:
            asked = (None, texts, sink_size + window_size) if pinned else (distance, texts)
            ids, answers = examine(tokenizer, tokens, *asked)
            if not any(answers):
                raise typer.BadParameter(f"--tokens {tokens} is too short for a question of {distance} lines back")
            for name in chosen:
                bar.update(task, description=f"{name}, {distance} line")
                with Reader(network, name, sink_size, window_size, front, batch=64) as reader:
                    rows += answered(reader, distance, ids, answers)
                bar.advance(task)
    spans = ranges(tokens, sink_size + window_size)
    found = shares(rows, spans)
    write_csv(output_dir / "recall.csv", COLUMNS, rows)
    entry = {
        **record(str(network.device)), "model": model, "sink_size": sink_size, "window_size": window_size,
        "texts": texts, "tokens": tokens, "shares": found,
    }  # fmt: skip
    write_json(output_dir / "recall.json", entry)
    draw(entry, output_dir / "recall.png")
    columns = [f"{a}-{b}" for a, b in spans]
    lines = [
        (name, distance, *(f"{100 * entry[span]['share']:.1f}" if span in entry else "" for span in columns))
        for name, by_back in found.items()
        for distance, entry in by_back.items()
    ]
    print_table(("experiment", "lines back", *columns), lines, "right answers, %")


if __name__ == "__main__":
    typer.run(main)
