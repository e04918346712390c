"""The demo: a model run over a text many times as long as its cache, in three ways."""

import contextlib
import csv
import json
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from .cache import SinkCache
from .introspect import cache_name, input_device
from .models import MODEL, sizes, trained_length
from .patch import patch

TEXTS = 4  # held-out texts, side by side, for a small model
CHUNK = 128  # tokens fed at a time
SMALL = 20_000_000  # parameters; below, several texts are read at once, and a CPU takes one thread
TIMED = 64  # last tokens of the text, fed one by one and timed


@dataclass
class Way:
    """One way of attending, and what was measured."""

    name: str
    losses: list[Tensor] = field(default_factory=list)  # each (texts, tokens)
    ms_per_step: float = 0.0
    cache_bytes: int = 0  # of one text, at the end

    @property
    def texts(self) -> int:
        return len(self.losses[0])

    @property
    def loss(self) -> Tensor:
        """(tokens,) mean over the texts."""
        return torch.cat(self.losses, dim=1).mean(0)


def held_out_text() -> str:
    """Modules of this Python's standard library that the model was not trained on."""
    names = json.loads((MODEL / "training.json").read_text())["held_out"]
    paths = [Path(sysconfig.get_path("stdlib")) / name for name in names]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    if not texts:
        raise OSError(
            f"the demo reads standard library sources, and {sysconfig.get_path('stdlib')} has none of {names}"
        )
    return "\n".join(texts)


def run(
    console: Console,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    new_tokens: int,
    plot: Path,
    seed: int,
) -> None:
    """Measure the three ways, print the table, save the plot, and stream what each would write next."""
    plot.parent.mkdir(parents=True, exist_ok=True)
    is_small, device = model.num_parameters() < SMALL, input_device(model)
    if is_small and device.type == "cpu":
        torch.set_num_threads(1)  # layers this small would spend their time waiting for each other's threads
    ids = _text_ids(tokenizer, TEXTS if is_small else 1, tokens).to(device)
    sinks, window = sizes(model.config)
    capacity = sinks + window
    ways = [
        _run(console, Way(name), model, tokenizer, patched, ids, new_tokens, seed)
        for name, patched in (
            ("dense", None),
            (f"window {capacity}", (0, capacity)),
            (f"sinks {sinks} + window {window}", (sinks, window)),
        )
    ]
    context = trained_length(model.config)
    figures = _figures(ways, capacity, context, device)
    console.print(_table(figures))
    plot.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    _plot(ways, capacity, context, plot)
    files = ", ".join(str(plot.with_suffix(kind)) for kind in (".json", ".csv"))
    console.print(f"plot: {plot}, figures: {files}", markup=False, highlight=False, soft_wrap=True)


def _text_ids(tokenizer: PreTrainedTokenizerBase, texts: int, tokens: int) -> Tensor:
    """(texts, tokens) int64, pieces of the held-out text side by side, each behind the token that begins a text."""
    ids = tokenizer(held_out_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    if len(ids) < texts * tokens:
        raise ValueError(f"--tokens {tokens}: the held-out text has {len(ids)} tokens, enough for {len(ids) // texts}")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rest = tokens - len(start)
    return torch.cat((torch.tensor([start] * texts, dtype=torch.int64), ids[: texts * rest].reshape(texts, -1)), dim=1)


def _run(console, way: Way, model, tokenizer, patched: tuple[int, int] | None, ids: Tensor, new_tokens, seed) -> Way:
    """Measure a way, with the model patched to those sizes or as it is, and stream what it would write next."""
    columns = TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens")
    with contextlib.nullcontext() if patched is None else patch(model, *patched):
        cache = DynamicCache(config=model.config) if patched is None else SinkCache(model)
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task(way.name, total=ids.shape[1] - 1)
            _measure(way, model, cache, ids, lambda n: progress.advance(task, n))
        if new_tokens:
            console.rule(f"{way.name}, from token {ids.shape[1]:,} on")
            _continue(model, cache, tokenizer, ids[:1], new_tokens, seed)
    return way


@torch.no_grad()
def _measure(way: Way, model: PreTrainedModel, cache: Cache, ids: Tensor, advance) -> None:
    """Feed all ids but the last, most in chunks, the last ones one by one and timed."""
    tokens, given = ids.shape[1] - 1, {cache_name(model.forward): cache}
    begin, times = 0, []
    while begin < tokens:
        times.append(_now(ids.device))
        end = min(begin + CHUNK, tokens - TIMED) if begin < tokens - TIMED else begin + 1
        logits = model(ids[:, begin:end], use_cache=True, **given).logits
        way.losses.append(cross_entropy(logits.mT.float(), ids[:, begin + 1 : end + 1], reduction="none").cpu())
        advance(end - begin)
        begin = end
    way.ms_per_step = torch.tensor(times[-TIMED:], dtype=torch.float64).diff().median().item() * 1e3
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    way.cache_bytes = sum(x.nbytes for x in held if x is not None) // len(ids)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _figures(ways: list[Way], capacity: int, context: int | None, device: torch.device) -> dict:
    """What was measured, as it goes into the table and the JSON: loss by position ranges that double."""
    texts, tokens = ways[0].texts, len(ways[0].loss)
    borders = [0, capacity]
    while borders[-1] < tokens:
        borders.append(min(2 * borders[-1], tokens))
    ranges = list(zip(borders, borders[1:], strict=False))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    trained = f"; trained on {context} tokens" if context else ""
    return {
        "title": f"Loss by position{trained}; held-out text, {texts} x {tokens + 1} tokens; {name}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "ways": {
            way.name: {
                "loss": {f"{a}-{b}": round(way.loss[a:b].mean().item(), 3) for a, b in ranges},
                "cache_bytes": way.cache_bytes,
                "ms_per_step": round(way.ms_per_step, 2),
            }
            for way in ways
        },
    }


def _table(figures: dict) -> Table:
    ways = figures["ways"]
    table = Table("way", *next(iter(ways.values()))["loss"], "cache, MiB", "ms a step", title=figures["title"])
    table.columns[0].no_wrap = True
    for name, way in ways.items():
        losses = [f"{loss:.2f}" for loss in way["loss"].values()]
        table.add_row(name, *losses, f"{way['cache_bytes'] / 2**20:.2f}", f"{way['ms_per_step']:.1f}")
    return table


def _plot(ways: list[Way], capacity: int, context: int | None, path: Path) -> None:
    """Loss over position as a picture, and as a CSV beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = max(capacity // 8, 1)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    rows = []
    for way, colour in zip(ways, ("tab:red", "tab:orange", "tab:blue"), strict=True):
        losses = [piece.mean().item() for piece in way.loss.split(step)]
        positions = [(i + 0.5) * step for i in range(len(losses))]
        axes.plot(positions, losses, label=f"{way.name} ({way.cache_bytes / 2**20:.1f} MiB cache)", color=colour)
        rows += [(way.name, int(p), f"{loss:.4f}") for p, loss in zip(positions, losses, strict=True)]
    for at, name in {capacity: "cache", context: "trained length"}.items():
        if at is not None and at <= len(ways[0].loss):
            axes.axvline(at, color="grey", linestyle="--", linewidth=1)
            top = axes.get_ylim()[1]
            axes.annotate(name, (at, top), textcoords="offset points", xytext=(4, -12), color="grey")
    axes.set(
        xlabel="position in the text (tokens)",
        ylabel="loss (nats per token)",
        title="Loss by position of held-out text",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("way", "position", "loss"), *rows])


def _continue(model, cache: Cache, tokenizer, ids: Tensor, new_tokens: int, seed: int) -> None:
    """Print what the model writes behind the first text, (1, tokens)."""
    set_seed(seed)
    cache.batch_select_indices(torch.zeros(1, dtype=torch.int64, device=ids.device))
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{cache_name(model.forward): cache},
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
