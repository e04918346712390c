"""The demo: a small model, trained on 512 tokens, run over a held-out text many times as long, in three ways."""

import copy
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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    TextStreamer,
    set_seed,
)

from .cache import SinkCache
from .introspect import cache_name
from .patch import patch

MODEL = Path(__file__).parent / "demo_model"
TEXTS = 4  # held-out texts, side by side
CHUNK = 128  # tokens fed at a time
TIMED = 64  # last tokens of the text, fed one by one and timed
SINKS = 4


@dataclass
class Way:
    """One way of attending: a model with its cache, and what was measured."""

    name: str
    model: PreTrainedModel
    cache: Cache
    losses: list[Tensor] = field(default_factory=list)  # each (texts, tokens)
    ms_per_step: float = 0.0
    cache_bytes: int = 0  # of one text, at the end

    @property
    def loss(self) -> Tensor:
        """(tokens,) mean over the texts."""
        return torch.cat(self.losses, dim=1).mean(0)

    @property
    def with_cache(self) -> dict[str, Cache]:
        """The argument that hands the cache to the model."""
        return {cache_name(self.model.forward): self.cache}


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


def run(console: Console, device: str, tokens: int, new_tokens: int, plot: Path, seed: int) -> None:
    """Measure the three ways, print the table, save the plot, and stream what each would write next."""
    if device == "cpu":
        torch.set_num_threads(1)  # layers this small would spend their time waiting for each other's threads
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device).eval()
    context = model.config.max_position_embeddings
    ids = tokenizer(held_out_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    if len(ids) < TEXTS * tokens:
        raise ValueError(f"--tokens {tokens}: the held-out text has {len(ids)} tokens, enough for {len(ids) // TEXTS}")
    ids = ids[: TEXTS * (tokens - 1)].reshape(TEXTS, -1)
    ids = torch.cat((torch.full((TEXTS, 1), tokenizer.bos_token_id), ids), dim=1).to(device)

    ways = [Way("dense", model, DynamicCache(config=model.config))]
    for name, sinks in (("window", 0), (f"sinks {SINKS} + window", SINKS)):
        patched = copy.deepcopy(model)
        patch(patched, sinks, context - sinks)
        ways.append(Way(f"{name} {context - sinks}", patched, SinkCache(patched)))
    columns = TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens")
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for way in ways:
            task = progress.add_task(way.name, total=tokens)
            _measure(way, ids, lambda n, task=task: progress.advance(task, n))
    figures = _figures(ways, tokens, context, device)
    console.print(_table(figures))
    plot.parent.mkdir(parents=True, exist_ok=True)
    _plot(ways, context, plot)
    plot.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    console.print(f"plot: {plot}, figures: {plot.with_suffix('.json')}, {plot.with_suffix('.csv')}")
    for way in ways if new_tokens else ():
        console.rule(f"{way.name}, from token {tokens:,} on")
        _continue(way, tokenizer, ids[:1], new_tokens, seed)


@torch.no_grad()
def _measure(way: Way, ids: Tensor, advance) -> None:
    """Feed all ids but the last, most in chunks, the last ones one by one and timed."""
    tokens = ids.shape[1] - 1
    begin, times = 0, []
    while begin < tokens:
        times.append(_now(ids.device))
        end = min(begin + CHUNK, tokens - TIMED) if begin < tokens - TIMED else begin + 1
        logits = way.model(ids[:, begin:end], use_cache=True, **way.with_cache).logits
        way.losses.append(cross_entropy(logits.mT.float(), ids[:, begin + 1 : end + 1], reduction="none").cpu())
        advance(end - begin)
        begin = end
    way.ms_per_step = torch.tensor(times[-TIMED:], dtype=torch.float64).diff().median().item() * 1e3
    way.cache_bytes = sum(x.nbytes for layer in way.cache.layers for x in (layer.keys, layer.values)) // TEXTS


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _figures(ways: list[Way], tokens: int, context: int, device: str) -> dict:
    """What was measured, as it goes into the table and the JSON: loss by position ranges that double."""
    borders = [0, context]
    while borders[-1] < tokens - 1:
        borders.append(min(2 * borders[-1], tokens - 1))
    ranges = list(zip(borders, borders[1:], strict=False))
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} thread"
    return {
        "title": f"Loss by position; trained on {context} tokens, {TEXTS} held-out texts of {tokens}; {name}",
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


def _plot(ways: list[Way], context: int, path: Path) -> None:
    """Loss over position as a picture, and as a CSV beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = context // 8
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    rows = []
    for way, colour in zip(ways, ("tab:red", "tab:orange", "tab:blue"), strict=True):
        losses = [piece.mean().item() for piece in way.loss.split(step)]
        positions = [(i + 0.5) * step for i in range(len(losses))]
        axes.plot(positions, losses, label=f"{way.name} ({way.cache_bytes / 2**20:.1f} MiB cache)", color=colour)
        rows += [(way.name, int(p), f"{loss:.4f}") for p, loss in zip(positions, losses, strict=True)]
    axes.axvline(context, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        "trained length", (context, axes.get_ylim()[1]), textcoords="offset points", xytext=(4, -12), color="grey"
    )
    axes.set(
        xlabel="position in the text (tokens)", ylabel="loss (nats per token)", title="Held-out text beyond the context"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("way", "position", "loss"), *rows])


def _continue(way: Way, tokenizer, ids: Tensor, new_tokens: int, seed: int) -> None:
    """Print what the model writes behind the first text, (1, tokens)."""
    set_seed(seed)
    way.cache.batch_select_indices(torch.zeros(1, dtype=torch.int64, device=ids.device))
    way.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **way.with_cache,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
