"""Products of a few rows on one GPU: python bench/linear.py --output-dir bench/results/h200

The products of three models' layers and their heads, bfloat16, 1 to 64 rows. sinkattn's figure holds what lies around
the product as well: the norm before qkv, gate and up, and head, the gate, the residual after o and down. The peer is
`torch.nn.functional.linear` (cuBLAS), which does the product alone. "layers" is all of a model's layers in a row, but
no attention: qkv, o, gate and up, down, with norms, gates and residuals, which the peer leaves to torch's own kernels.

Times are medians of CUDA graph replays, each graph a round through enough weights to exceed the L2 four times: every
product is one of several in a row. The floor is the bytes of the weights over the read bandwidth of the same run.
linear.png shows it all.
"""

from pathlib import Path

import torch
import typer
from common import RESULTS, Output, finish, print_table, track, write_csv
from gpu import cold, graph_us, new, read_bandwidth, title
from matplotlib.figure import Figure
from torch.nn.functional import linear, rms_norm, silu

from sinkattn import ops

ROWS = (1, 4, 8, 9, 16, 32, 64)
PROVIDERS = ("sinkattn", "torch")
EPS = 1e-5
LAYERS = {"Llama-2-7B": 32, "Llama-3-8B": 32, "Qwen3-0.6B": 28}
PRODUCTS = {  # model: product: (out_features, in_features)
    "Llama-2-7B": {
        "qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008), "head": (32000, 4096)
    },
    "Llama-3-8B": {
        "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)
    },
    "Qwen3-0.6B": {
        "qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072), "head": (151936, 1024)
    },
}  # fmt: skip
COLUMNS = ("model", "product", "out_features", "in_features", "rows", "provider", "us", "floor_us")


def weights(shape: tuple[int, int], count: int) -> list[torch.Tensor]:
    return [new(*shape) * shape[1] ** -0.5 for _ in range(count)]


def ours(product: str, x, weight, norm_weight, residual):
    """One product with what lies around it."""
    if product in ("o", "down"):
        return ops.linear(x, weight, residual=residual)
    activation = "silu" if product == "gate_up" else ""
    return ops.linear(x, weight, norm_weight=norm_weight, norm_eps=EPS, activation=activation)


def theirs(product: str, x, weight, norm_weight, residual):
    """The same by torch's own kernels."""
    if product in ("o", "down"):
        return residual + linear(x, weight)
    y = linear(rms_norm(x, x.shape[1:], norm_weight, EPS), weight)
    if product != "gate_up":
        return y
    gate, up = y.chunk(2, dim=-1)
    return silu(gate) * up


def measure(provider: str, product: str, layers: list[torch.Tensor], rows: int) -> float:
    """Microseconds of one product, one after the other with the weights of `layers`."""
    x, norm_weight, residual = new(rows, layers[0].shape[1]), new(layers[0].shape[1]), new(rows, layers[0].shape[0])
    if provider == "torch":
        return graph_us([lambda weight=weight: linear(x, weight) for weight in layers])
    return graph_us([lambda weight=weight: ours(product, x, weight, norm_weight, residual) for weight in layers])


def measure_layers(provider: str, layers: dict[str, list[torch.Tensor]], rows: int) -> float:
    """Microseconds of a model's layers, without attention."""
    call, norm_weight = ours if provider == "sinkattn" else theirs, new(layers["qkv"][0].shape[1])
    start, attended = new(rows, layers["qkv"][0].shape[1]), new(rows, layers["o"][0].shape[1])

    def run():
        x = start
        for qkv, o, gate_up, down in zip(*(layers[name] for name in ("qkv", "o", "gate_up", "down")), strict=True):
            call("qkv", x, qkv, norm_weight, None)
            x = call("o", attended, o, None, x)
            x = call("down", call("gate_up", x, gate_up, norm_weight, None), down, None, x)

    return graph_us([run])


def plot(rows: list[tuple], path: Path) -> None:
    """Share of the floor over size, a panel for 1, 8 and 64 rows of x."""
    figure = Figure(figsize=(14, 4))
    axes = figure.subplots(1, 3, sharey=True)
    for axis, wanted in zip(axes, (1, 8, 64), strict=True):
        for provider in PROVIDERS:
            points = sorted(
                {
                    (float(floor), float(floor) / float(us))
                    for _, product, _, _, count, name, us, floor in rows
                    if (name, count) == (provider, wanted) and product != "layers"
                }
            )
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=provider)
        finish(axis, xscale="log", xlabel="bytes of the weight over read bandwidth (us)", title=f"rows: {wanted}")
    axes[0].set(ylabel="share of the floor reached", ylim=(0, 1.05))
    axes[2].legend()
    figure.savefig(path)


def main(output_dir: Output = RESULTS) -> None:
    """Time sinkattn's products beside torch's; print the table, write linear.csv, plot it."""
    bandwidth, rows, lines = read_bandwidth(), [], []

    def add(model, product, shape, size, measured):
        """measured: a function of a provider and a count of rows."""
        times, floor = {count: [measured(name, count) for name in PROVIDERS] for count in ROWS}, size / bandwidth * 1e6
        for count, of in times.items():
            both = zip(PROVIDERS, of, strict=True)
            rows.extend((model, product, *shape, count, name, f"{us:.2f}", f"{floor:.2f}") for name, us in both)
        shown = (" / ".join(f"{size / us * 1e-6:.2f}" for us in of) for of in times.values())
        lines.append((model, product, "x".join(map(str, shape)), f"{floor:.1f}", *shown))

    for model, products in track(PRODUCTS.items(), "measuring"):
        layers = {name: weights(shape, LAYERS[model]) for name, shape in products.items() if name != "head"}
        for product, shape in products.items():
            size = 2 * shape[0] * shape[1]
            count = max(8, cold(size))
            some = layers.get(product, [])[:count]
            if len(some) < count:
                some = weights(shape, count)
            add(model, product, shape, size, lambda name, count, of=(product, some): measure(name, *of, count))
        size = sum(weight.nbytes for name in layers for weight in layers[name])
        add(model, "layers", ("", ""), size, lambda name, count, of=layers: measure_layers(name, of, count))
        del layers, some
        torch.cuda.empty_cache()
    columns = ("model", "product", "weight", "floor us", *(f"{count} rows" for count in ROWS))
    reads = f"{title()}, reads {bandwidth / 1e12:.2f} TB/s"
    print_table(columns, lines, f"TB/s of weights read, {' / '.join(PROVIDERS)}; {reads}")
    write_csv(output_dir / "linear.csv", COLUMNS, rows)
    plot(rows, output_dir / "linear.png")


if __name__ == "__main__":
    typer.run(main)
