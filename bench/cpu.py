"""Attention, products of few rows and a whole model on the CPU: python bench/cpu.py --output-dir bench/results/cpu

Decode: one token more for a cache of C tokens, one row. Prefill: T tokens into an empty cache. What is timed is all
that a layer of a model needs between its projections, rotation, storing and attention, but for two marked with a star:

    sinkattn         sinkattn.ops: 4 sinks and a window of C - 4
    sinkattn_op      the same by torch.ops.sinkattn, without the checks of arguments
    sdpa, eager      transformers' rotation, DynamicCache and attention function of that name. The cache has C tokens in
                     decode; a prompt is attended densely, since this cache has no window
    sdpa_alone *     torch's scaled_dot_product_attention, keys rotated and stored already
    attention_sinks  0.4.0: its Llama attention and eviction, C tokens in decode, a dense prompt
    llama.cpp *      ggml_flash_attn_ext of llama-cpp-python, C keys in decode, a dense prompt

The last two run in interpreters of their own, which options name; without them they are missing.

A round of decode goes through as many layers as have 256 MB of keys and values, so that they come from memory. All
providers take turns, and between any two rounds 256 MB are only read: by torch's sum, norm and amax, of which the
fastest counts. The floor of a round is the bytes of keys and values, 2 * kv_heads * C * head_dim * itemsize, at the
pace of the two readings beside it, in the mean, for the bandwidth of a virtual machine changes within seconds.
Microseconds, bandwidths and the share of the floor (floor over time, round by round) are medians over the rounds.
GFLOP/s of a prompt count 4 * head_dim * heads for each pair of query and key that the provider looks at.

Products: `sinkattn.ops.linear` and torch's `linear` take turns like that with as many weights as have 256 MB; the floor
is a weight's bytes.

The model has the shape of Qwen2.5-0.5B and random weights. Its steps, patched and not, take turns as well, at a cache
of 1024 tokens, with the same weights; the floor is the bytes of weights and cache over the read bandwidth.
"""

import copy
import functools
import json
import os
import platform
import statistics
import subprocess
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from common import RESULTS, SINKS, Output, console, finish, print_table, write_csv, write_json
from matplotlib.figure import Figure
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

import sinkattn
from sinkattn import SinkCache, ops, patch

PROVIDERS = ("sinkattn", "sinkattn_op", "sdpa", "eager", "sdpa_alone", "attention_sinks", "llama.cpp")
PEERS = PROVIDERS[5:]  # of cpu_peer.py
COLD = 256 * 2**20  # bytes read before any of them is read again
PATIENCE = 1.5  # seconds for a provider and case, after which two rounds have to do


@dataclass(frozen=True)
class Case:
    """tokens: 1 for decode. layers: that a round goes through."""

    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    tokens: int
    dtype: str
    threads: int
    layers: int
    rounds: int

    @property
    def bytes(self) -> int:
        """Of the keys and values of a layer."""
        return 2 * self.kv_heads * self.capacity * self.head_dim * getattr(torch, self.dtype).itemsize

    def flops(self, provider: str) -> int:
        """Of a prompt."""
        left_out = max(self.tokens - self.capacity, 0) if provider.startswith("sinkattn") else 0
        pairs = self.tokens * (self.tokens + 1) // 2 - left_out * (left_out + 1) // 2
        return 4 * self.head_dim * self.heads * pairs


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case(4, 2, 16, 32, tokens, "float32", 1, 2, 3) for tokens in (1, 64)]
    shapes = [(32, 8, 128, 1024, 1), (32, 8, 128, 1024, 2), (32, 8, 128, 4096, 2), (32, 32, 128, 1024, 2)]
    shapes.append((14, 2, 64, 1024, 2))
    found = []
    for heads, kv_heads, head_dim, capacity, threads in shapes:
        for dtype in ("float32", "bfloat16", "float16"):
            case = Case(heads, kv_heads, head_dim, capacity, 1, dtype, threads, 1, 25)
            found.append(replace(case, layers=-(-COLD // case.bytes)))
    for tokens in (1024, 2048):
        for dtype in ("float32", "bfloat16"):
            found.append(Case(32, 8, 128, 1024, tokens, dtype, 2, 1, 5))
    return found


class Reader:
    """Reads, and does nothing else."""

    def __init__(self, size: int = COLD):
        self.x = torch.randn(size // 4)
        self.ways = self.x.sum, self.x.norm, self.x.amax

    def bandwidth(self) -> float:
        """Bytes a second, now, in the fastest way."""
        seconds = []
        for way in self.ways:
            begin = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - begin)
        return self.x.nbytes / min(seconds)


def steps(provider: str, case: Case):
    """(function that runs a layer, given its index; function that takes back what a round has stored)."""
    dtype, tokens = getattr(torch, case.dtype), case.tokens
    new = lambda heads: torch.randn(1, tokens, heads, case.head_dim).to(dtype).transpose(1, 2)  # noqa: E731
    q, k, v = new(case.heads), new(case.kv_heads), new(case.kv_heads)
    scale, length = case.head_dim**-0.5, case.capacity if tokens == 1 else 0
    shape = (1, case.kv_heads, case.capacity, case.head_dim)
    full = lambda: torch.randn(shape).to(dtype)  # noqa: E731
    if provider.startswith("sinkattn"):
        caches = [(full(), full()) for _ in range(case.layers)]
        rotation = torch.randn(1, tokens, 2, 2, case.head_dim // 2)
        lengths = torch.tensor([3 * case.capacity + 7 if tokens == 1 else 0])
        more = (lengths, None, rotation, *[None] * 4)
        sizes = dict(sink_size=SINKS, window_size=case.capacity - SINKS, scale=scale)
        op = getattr(ops if provider == "sinkattn" else torch.ops.sinkattn, "decode" if tokens == 1 else "prefill")
        return lambda i: op(q, k, v, *caches[i], *more, **sizes), lambda: None
    if provider == "sdpa_alone":
        if tokens > 1:
            return lambda i: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), lambda: None
        caches = [(full(), full()) for _ in range(case.layers)]
        return lambda i: scaled_dot_product_attention(q, *caches[i], enable_gqa=True), lambda: None

    attention = sdpa_attention_forward if provider == "sdpa" else eager_attention_forward
    module = types.SimpleNamespace(num_key_value_groups=case.heads // case.kv_heads, training=False, is_causal=True)
    mask = None  # sdpa says "causal" instead
    if provider == "eager" and tokens > 1:
        mask = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    cos, sin = (torch.randn(1, tokens, case.head_dim).to(dtype) for _ in range(2))
    cache = DynamicCache()
    for i in range(case.layers if length else 0):  # the step adds the last of the C tokens
        cache.update(full()[:, :, 1:], full()[:, :, 1:], i)

    def step(i):
        rotated_q, rotated_k = apply_rotary_pos_emb(q, k, cos, sin)
        return attention(module, rotated_q, *cache.update(rotated_k, v, i), mask, scaling=scale, dropout=0.0)

    def take_back():
        nonlocal cache
        if length:
            cache.crop(-1)
        else:
            cache = DynamicCache()

    return step, take_back


class Peer:
    """One of PEERS in the interpreter that has it."""

    def __init__(self, name: str, python: str):
        command = [python, str(Path(__file__).with_name("cpu_peer.py")), name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ""}
        )
        self.versions = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self.answer()


def take_turns(
    rounds: dict[str, Callable[[], float]], parts: int, size: int, count: int, reader: Reader
) -> dict[str, dict[str, float]]:
    """By provider the medians of its rounds, of which a function runs one and gives the seconds.

    "us" of each of a round's parts, "floor_us" of a part's bytes, "of_floor" and "read_gb_s".
    """
    found: dict[str, list[dict]] = {name: [] for name in rounds}
    for number in range(count + 1):
        before = reader.bandwidth()
        for name, one_round in rounds.items():
            if number > 2 and parts * sum(1e-6 * row["us"] for row in found[name]) > PATIENCE:
                continue
            us, after = 1e6 * one_round() / parts, reader.bandwidth()
            floor = 1e6 * size * (1 / before + 1 / after) / 2
            if number:  # the first warms up
                row = {"us": us, "floor_us": floor, "of_floor": floor / us, "read_gb_s": 1e-3 * size / floor}
                found[name].append(row)
            before = after
    return {name: {key: statistics.median(row[key] for row in some) for key in some[0]} for name, some in found.items()}


def measure(case: Case, peers: dict[str, Peer], reader: Reader) -> dict[str, dict[str, float]]:
    """What `take_turns` says of a layer."""
    torch.set_num_threads(case.threads)

    def own_round(step, take_back) -> float:
        begin = time.perf_counter()
        for layer in range(case.layers):
            step(layer)
        seconds = time.perf_counter() - begin
        take_back()
        return seconds

    rounds = {name: functools.partial(own_round, *steps(name, case)) for name in PROVIDERS if name not in PEERS}
    for name, peer in peers.items():
        peer.ask(asdict(case))
        rounds[name] = functools.partial(peer.ask, "round")
    return take_turns(rounds, case.layers, case.bytes, case.rounds, reader)


def linear_rows(out_features: int, in_features: int, rows: int, dtype: str, threads: int, reader: Reader, rounds: int):
    """By provider, medians over the rounds: a row of linear.csv each."""
    torch.set_num_threads(threads)
    count = -(-reader.x.nbytes // (out_features * in_features * getattr(torch, dtype).itemsize))
    weights = [torch.randn(out_features, in_features).to(getattr(torch, dtype)) for _ in range(count)]
    x = torch.randn(rows, in_features).to(weights[0].dtype)

    def own_round(product) -> float:
        begin = time.perf_counter()
        for weight in weights:
            product(x, weight)
        return time.perf_counter() - begin

    products = {"sinkattn": ops.linear, "torch": linear}
    found = take_turns(
        {name: functools.partial(own_round, product) for name, product in products.items()},
        count, weights[0].nbytes, rounds, reader,
    )  # fmt: skip
    case = dict(out_features=out_features, in_features=in_features, rows=rows, dtype=dtype, threads=threads)
    keys = ("us", "floor_us", "of_floor")
    return [case | {"provider": name} | {key: row[key] for key in keys} for name, row in found.items()]


def model_seconds(dtype: str, threads: tuple[int, ...], capacity: int, rounds: int, reader: Reader, shape: dict):
    """{threads: (seconds of a step patched, unpatched, at the floor)}."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    for name, x in model.named_parameters():
        x.data.fill_(1) if "norm" in name else x.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
    model.tie_weights()
    peer = copy.deepcopy(model, {id(x): x for x in model.parameters()})  # the same weights
    size = sum(x.nbytes for x in model.parameters())
    head_dim = config.hidden_size // config.num_attention_heads
    size += 2 * capacity * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    patch(model, SINKS, capacity - SINKS)
    ids, found = torch.randint(config.vocab_size, (1, capacity)), {}
    caches = SinkCache(model), DynamicCache()
    torch.set_num_threads(max(threads))
    for it, cache in zip((model, peer), caches, strict=True):
        it(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    for count in threads:
        torch.set_num_threads(count)
        times: tuple[list, list] = [], []
        bandwidths = []
        for number in range(rounds + 2):
            bandwidths.append(reader.bandwidth())
            for it, cache, some in zip((model, peer), caches, times, strict=True):
                begin = time.perf_counter()
                it(ids[:, -1:], past_key_values=cache)
                if number > 1:
                    some.append(time.perf_counter() - begin)
            caches[1].crop(-1)
        found[count] = (*map(statistics.median, times), size / statistics.median(bandwidths))
    return found


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.processor()}, {os.cpu_count()} cores"


def plot(rows: list[dict], path: Path) -> None:
    """Microseconds of a decode step by provider, a panel a capacity and dtype, the largest number of threads."""
    rows = [row for row in rows if row["tokens"] == 1 and row["threads"] == max(row["threads"] for row in rows)]
    panels = list(dict.fromkeys((row["heads"], row["kv_heads"], row["capacity"], row["dtype"]) for row in rows))
    lines = -(-len(panels) // 3)  # of a panel a dtype
    figure = Figure(figsize=(10, 2.6 * lines + 1))
    axes = figure.subplots(lines, 3, squeeze=False, sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        some = [r for r in rows if (r["heads"], r["kv_heads"], r["capacity"], r["dtype"]) == panel]
        axis.bar([r["provider"] for r in some], [r["us"] for r in some], color=["C1"] * 2 + ["C0"] * (len(some) - 2))
        axis.axhline(some[0]["floor_us"], color="black", linestyle="--", linewidth=1)
        finish(axis, "y", title=f"{panel[0]}/{panel[1]} heads, C {panel[2]}, {panel[3]}", yscale="log")
        axis.title.set_size(9)
    for axis in axes[-1]:
        axis.tick_params(axis="x", rotation=90)
    figure.supylabel("us a layer and token (dashed: floor)", fontsize=9)
    figure.savefig(path)


def write(path: Path, rows: list[dict]) -> None:
    """With four digits."""
    short = ({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
    write_csv(path, list(rows[0]), short)


@torch.no_grad()
def main(
    output_dir: Output = RESULTS / "cpu",
    attention_sinks_python: Annotated[str, typer.Option(help="Python that has attention_sinks 0.4.0.")] = "",
    llama_cpp_python: Annotated[str, typer.Option(help="Python that has llama-cpp-python.")] = "",
    tiny: Annotated[bool, typer.Option(help="Sizes that show that it runs, and nothing else.")] = False,
) -> None:
    """Time sinkattn's CPU ops beside their peers, and a model patched and not; print tables and write files."""
    pythons = {"attention_sinks": attention_sinks_python, "llama.cpp": llama_cpp_python}
    peers = {name: Peer(name, python) for name, python in pythons.items() if python}
    missing = [name for name in pythons if name not in peers]
    if missing:
        console.print(f"[yellow]missing peers:[/yellow] {', '.join(missing)}; options name interpreters that have them")
    versions = {"sinkattn": sinkattn.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    about = {
        "machine": machine(),
        "instructions": ops.CPU_ISA,
        "versions": versions | {"python": platform.python_version()},
        "peers": {name: peer.versions for name, peer in peers.items()},
        "missing": missing,
    }
    write_json(output_dir / "cpu.json", about)
    title = f"us; {about['machine']}, {about['instructions']}, torch {torch.__version__}"
    reader, rows, lines = Reader(2**20 if tiny else COLD), [], []
    for case in cases(tiny):
        times = measure(case, peers, reader)
        for name in (name for name in PROVIDERS if name in times):
            gflops = 1e-3 * case.flops(name) / times[name]["us"] if case.tokens > 1 else ""
            rows.append(asdict(case) | {"provider": name} | times[name] | {"gflops": gflops})
        own = times["sinkattn"]
        shape = f"{case.heads}/{case.kv_heads}", case.head_dim, case.capacity, case.tokens, case.dtype, case.threads
        shown = (f"{times[name]['us']:.0f}" if name in times else "-" for name in PROVIDERS)
        share = f"{own['of_floor']:.0%}" if case.tokens == 1 else "-"
        lines.append((*shape, f"{own['read_gb_s']:.1f}", f"{own['floor_us']:.0f}", *shown, share))
        write(output_dir / "attention.csv", rows)
    print_table(("heads", "dim", "C", "T", "dtype", "threads", "GB/s", "floor", *PROVIDERS, "of floor"), lines, title)
    plot(rows, output_dir / "cpu.png")

    rows, lines = [], []
    for shape in ((64, 48),) if tiny else ((4096, 4096), (9728, 896)):
        for dtype in ("float32", "bfloat16", "float16"):
            for count in (1, 4, 8):
                own, torchs = linear_rows(*shape, count, dtype, 1 if tiny else 2, reader, 2 if tiny else 7)
                rows += own, torchs
                numbers = f"{own['us']:.0f}", f"{torchs['us']:.0f}", f"{own['of_floor']:.0%}"
                lines.append((f"{shape[0]} x {shape[1]}", count, dtype, *numbers))
        write(output_dir / "linear.csv", rows)
    print_table(("weight", "rows", "dtype", "us", "torch us", "of floor"), lines, "products of few rows")

    shape = dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
    )  # fmt: skip
    threads, capacity, rounds, rows, lines = (1, 2), 1024, 20, [], []
    if tiny:
        shape |= dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=97)
        shape |= dict(num_attention_heads=2, num_key_value_heads=1)
        threads, capacity, rounds = (1,), 32, 2
    for dtype in ("float32", "bfloat16", "float16"):
        for count, seconds in model_seconds(dtype, threads, capacity, rounds, reader, shape).items():
            speeds = [1 / x for x in seconds]
            names = ("patched", "transformers", "floor")
            rows.append(dict(dtype=dtype, threads=count, capacity=capacity, **dict(zip(names, speeds, strict=True))))
            lines.append((dtype, count, *(f"{x:.2f}" for x in speeds)))
            write(output_dir / "model.csv", rows)
    columns = ("dtype", "threads", "patched tokens/s", "transformers tokens/s", "floor tokens/s")
    print_table(columns, lines, "model")


if __name__ == "__main__":
    typer.run(main)
