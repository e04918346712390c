"""Whole decode steps on one GPU: python bench/generate.py --output-dir bench/results/h200

Models of real shapes with random weights in bfloat16, greedy, and these ways to the next token of a text of C tokens:

    dynamic           transformers' generate with its default cache
    static_compiled   generate(cache_implementation="static"), which compiles the step by itself
    recompute         the last C tokens through the model for every token (the paper's sliding window baseline)
    generate          sinkattn.patch(model, 4, C - 4) and plain generate()
    stream            the same, sinkattn.Stream
    stream_layers     the same, patched with fuse="layers": where the model's layers run as one kernel, without that

ms_per_token and p99_ms are of the time between successive tokens as the host sees them, memory_gb is the most that was
allocated, first_token_s the seconds from the start, patch() and compilation or capture included, to the third token:
that is when all of it has happened. "floor" is what the memory allows: the bytes of weights (embeddings left out) and
of the cache over the read bandwidth of the same run; ms_per_token only.

Writes generate.csv, generate.json (device, versions, bandwidth), figure10.png (the paper's Figure 10: time per token
over the cache's size, beside re-computation). --lengths adds lengths.csv and lengths.png (time per token over the
length of the text), --flatness flatness.csv, flatness.json: so many tokens through one Stream of the model that ships
with the package; ms_per_token is the mean over 10,000 tokens from there on (for the last row: up to there).
"""

import contextlib
import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from common import (
    RESULTS,
    SINKS,
    Output,
    default_device,
    device_name,
    finish,
    free,
    median,
    now,
    print_table,
    progress,
    track,
    write_csv,
    write_json,
)
from gpu import read_bandwidth
from matplotlib.figure import Figure

import sinkattn
from sinkattn.demo import MODEL

QWEN = dict(vocab_size=151936, head_dim=128, num_key_value_heads=8, rope_parameters={"rope_theta": 1e6})
SMALL = dict(QWEN, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True)
LARGE = dict(QWEN, hidden_size=5120, num_hidden_layers=40, num_attention_heads=40)


def llama(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more) -> tuple[str, dict]:
    return "Llama", dict(
        more, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip


SHAPES = {
    "llama-2-7b": llama(32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": llama(128256, 4096, 14336, 32, 32, 8),
    "llama-3.2-1b": llama(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
    "smollm2-135m": llama(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "qwen3-0.6b": ("Qwen3", dict(SMALL, intermediate_size=3072)),
    "qwen3-14b": ("Qwen3", dict(LARGE, intermediate_size=17408)),
    "tiny": llama(128, 64, 96, 2, 4, 2),
}
SMALL_MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-3.2-1b")  # whose layers may run as one kernel
METHODS = ("dynamic", "static_compiled", "recompute", "generate", "stream", "stream_layers")
COLUMNS = ("model", "batch", "capacity", "method", "ms_per_token", "p99_ms", "memory_gb", "first_token_s")
LENGTHS = ("model", "method", "tokens", "ms_per_token", "memory_gb")  # columns of lengths.csv
FLATNESS = ("tokens", "ms_per_token", "memory_bytes")
DEVICE = torch.device(default_device())


def rows_of(model: str) -> list[tuple[int, int]]:
    """(batch, capacity) that a model is measured at."""
    if model == "tiny":
        return [(1, 16), (2, 16)]
    sizes = [(1, 256), (1, 512), (1, 2048), (1, 4096)] if model == "llama-2-7b" else []
    return [(1, 1024), *sizes, (8, 1024), *([(64, 1024)] if model.startswith("llama") else [])]


def make(name: str) -> transformers.PreTrainedModel:
    kind, shape = SHAPES[name]
    config = getattr(transformers, f"{kind}Config")(
        **shape, max_position_embeddings=1 << 20, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


class _Clock(transformers.LogitsProcessor):
    """Notes when `generate` chooses a token."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores):
        self.times.append(time.perf_counter())
        return scores


def generate_times(model, ids, tokens: int, **how) -> list[float]:
    clock = _Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
        logits_processor=transformers.LogitsProcessorList([clock]), **how,
    )  # fmt: skip
    now(DEVICE)
    return clock.times


@torch.no_grad()
def recompute_times(model, ids, tokens: int) -> list[float]:
    times, capacity = [], ids.shape[1]
    for _ in range(tokens):
        logits = model(ids[:, -capacity:], use_cache=False, logits_to_keep=1).logits
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        times.append(now(DEVICE))
    return times


def stream_times(model, ids, tokens: int) -> list[float]:
    stream, times = sinkattn.Stream(model), []
    stream.append(ids)
    for token_ids in stream.generate(tokens, do_sample=False, eos_token_id=[]):
        token_ids.tolist()  # read on the host, as whoever prints the text does
        times.append(time.perf_counter())
    return times


def measure(model, method: str, ids: torch.Tensor, capacity: int, tokens: int, warm: int) -> dict:
    """Of `tokens` tokens behind ids (batch, n), a row of generate.csv; a few behind ids[:, :warm] come first."""
    free(DEVICE)
    ways = {"recompute": recompute_times, "stream": stream_times, "stream_layers": stream_times}
    run, fuse = ways.get(method, generate_times), "layers" if method == "stream_layers" else "model"
    how = {"cache_implementation": "static"} if method == "static_compiled" else {}
    start = now(DEVICE)
    patched = method in ("generate", "stream", "stream_layers")
    with sinkattn.patch(model, SINKS, capacity - SINKS, fuse=fuse) if patched else contextlib.nullcontext():
        # a static cache is as long as text and tokens together: another number of tokens would be compiled anew
        first = run(model, ids[:, :warm], tokens if method == "static_compiled" else 4, **how)[2] - start
        times = run(model, ids, tokens, **how)
    steps = sorted((b - a) * 1e3 for a, b in zip(times[2:], times[3:], strict=False))
    memory = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    ms = dict(ms_per_token=round(median(steps), 4), p99_ms=round(steps[int(len(steps) * 0.99)], 4))
    return dict(ms, memory_gb=round(memory / 1e9, 3), first_token_s=round(first, 3))


def floor_ms(model, batch: int, capacity: int, bandwidth: float) -> float:
    """Every weight that a step uses, and the whole cache, once."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(x.nbytes for x in model.parameters()) - (0 if tied else embedding.nbytes)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * batch * capacity * config.num_key_value_heads * head_dim * 2 * config.num_hidden_layers
    return (weights + cache) / bandwidth * 1e3


def methods_of(model: str, batch: int, capacity: int) -> list[str]:
    """Compilation takes half a minute a row, and re-computation of a large batch seconds a token: not everywhere."""
    compiled = capacity == 1024 and batch == 1
    left_out = {*([] if compiled or model == "tiny" else ["static_compiled"]), *(["recompute"] if batch > 8 else [])}
    left_out |= set() if model in SMALL_MODELS and batch <= 2 else {"stream_layers"}
    return [method for method in METHODS if method not in left_out]


def steps(models: list[str], methods: list[str], output_dir: Path, tokens: int, bandwidth: float) -> list[dict]:
    rows = []
    for name in models:
        model = make(name)
        for batch, capacity in track(rows_of(name), name):
            about = dict(model=name, batch=batch, capacity=capacity)
            floor = float(f"{floor_ms(model, batch, capacity, bandwidth):.4g}")  # of a tiny model it is nanoseconds
            rows.append(dict(about, method="floor", ms_per_token=floor))
            for method in [method for method in methods_of(name, batch, capacity) if method in methods]:
                few = {"recompute": 8, "dynamic": max(5, tokens // 3)}.get(method, tokens)
                few = few if batch <= 8 else min(few, 24)
                ids = torch.randint(3, 100, (batch, capacity), device=DEVICE)
                rows.append(dict(about, method=method, **measure(model, method, ids, capacity, few, capacity)))
                if method == "static_compiled":
                    torch.compiler.reset()
                write_csv(output_dir / "generate.csv", COLUMNS, rows)
        plot_figure10(rows, output_dir / "figure10.png")
        del model
        free(DEVICE)
    return rows


def plot_figure10(rows: list[dict], path: Path) -> None:
    model = rows[0]["model"]
    chosen = sorted({row["capacity"] for row in rows if row["model"] == model and row["batch"] == 1})
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for method in ("recompute", "dynamic", "generate", "stream", "floor"):
        mine = [r for r in rows if (r["model"], r["batch"], r["method"]) == (model, 1, method)]
        at = {r["capacity"]: r for r in sorted(mine, key=lambda r: r["capacity"])}
        times = [at[c]["ms_per_token"] for c in at]
        axes.plot(list(at), times, marker="o", label=method, linestyle="-" if method != "floor" else ":")
    labels = dict(xlabel="tokens in the cache", ylabel="ms a token", title=f"{model}, batch 1")
    finish(axes, xscale="log", yscale="log", **labels)
    axes.set_xticks(chosen, [str(c) for c in chosen])
    axes.set_xticks([], minor=True)
    axes.legend()
    figure.savefig(path)


def lengths(name: str, output_dir: Path, texts: list[int], capacity: int, tokens: int) -> None:
    """Time per token after texts of several lengths."""
    model, rows = make(name), []
    for text in track(texts, "lengths"):
        for method in ("dynamic", "generate", "stream"):
            ids = torch.randint(3, 100, (1, text), device=DEVICE)
            found = measure(model, method, ids, capacity, tokens, 64)
            rows.append(dict(found, model=name, method=method, tokens=text))
            write_csv(output_dir / "lengths.csv", LENGTHS, rows)
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for method in ("dynamic", "generate", "stream"):
        mine = [row for row in rows if row["method"] == method]
        for axes, column in (left, "ms_per_token"), (right, "memory_gb"):
            axes.plot([r["tokens"] for r in mine], [r[column] for r in mine], marker="o", label=method)
    left.set(ylabel="ms a token", title=f"{name}, batch 1, C = {capacity}")
    right.set(ylabel="GB allocated at most (the prompt's activations too)")
    for axes in left, right:
        finish(axes, xscale="log", xlabel="tokens of text", ylim=(0, None))
        axes.legend()
    figure.savefig(output_dir / "lengths.png")


def flatness(output_dir: Path, total: int) -> None:
    """`total` tokens through one Stream of the model that ships with the package."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).to(DEVICE).eval()
    span = min(10_000, total // 4)
    marks = [m for m in (2_000, 10_000, 100_000) if m + span < total] or [span // 2]
    starts = {**{m: m for m in marks}, total: total - span}
    rows, host = [], {}
    with sinkattn.patch(model, SINKS, 252):
        stream, made = sinkattn.Stream(model), 0
        stream.append(torch.tensor([[1, 2, 3, 4]]))
        tokens = stream.generate(None, do_sample=False, eos_token_id=[])
        with progress() as bar:
            task = bar.add_task("flatness", total=total)
            for mark, start in sorted(starts.items(), key=lambda x: x[1]):
                while made < start:
                    next(tokens)
                    made += 1
                    if made % 1000 == 0:
                        bar.update(task, completed=made)
                memory = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
                began = now(DEVICE)
                for _ in range(span):
                    next(tokens)
                ms = (now(DEVICE) - began) / span * 1e3
                made += span
                host[mark] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                rows.append(dict(tokens=mark, ms_per_token=round(ms, 5), memory_bytes=memory))
                write_csv(output_dir / "flatness.csv", FLATNESS, rows)
        finite = bool(stream._logits.isfinite().all())
    about = dict(total=total, lengths=stream.lengths.tolist(), finite=finite, host_peak_bytes=host, span=span)
    write_json(output_dir / "flatness.json", about)
    print_table(FLATNESS, rows, "one long run")


def main(
    output_dir: Output = RESULTS,
    models: Annotated[str, typer.Option(help=f"Some of {', '.join(SHAPES)}, by commas; 'none' for no steps.")] = (
        "llama-2-7b,llama-3-8b,qwen3-0.6b,qwen3-14b"
    ),
    methods: Annotated[str, typer.Option(help="Some of the methods, by commas.")] = ",".join(METHODS),
    tokens: Annotated[int, typer.Option(help="Tokens whose times are taken.")] = 100,
    texts: Annotated[str, typer.Option("--lengths", help="Lengths of texts, by commas; none by default.")] = "",
    length_model: Annotated[str, typer.Option(help="Whose time is taken over lengths.")] = "llama-3-8b",
    capacity: Annotated[int, typer.Option(help="C, of --lengths.")] = 1024,
    total: Annotated[int, typer.Option("--flatness", help="Tokens of the long run; 0 for none.")] = 0,
) -> None:
    """Time whole steps; print tables, write CSV and plots."""
    if models != "none":
        bandwidth = read_bandwidth() if DEVICE.type == "cuda" else 1e10
        versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        about = dict(device=device_name(DEVICE), **versions, read_gb_per_s=round(bandwidth / 1e9, 1))
        write_json(output_dir / "generate.json", about)
        rows = steps(models.split(","), methods.split(","), output_dir, tokens, bandwidth)
        print_table(COLUMNS, rows, "one decode step")
    if texts:
        lengths(length_model, output_dir, [int(x) for x in texts.split(",")], capacity, min(tokens, 30))
    if total:
        flatness(output_dir, total)


if __name__ == "__main__":
    typer.run(main)
