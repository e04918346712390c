"""Draw what bench/perplexity.py measured: python bench/plot.py --features perplexity memory --output-dir outputs

Reads the CSVs of a folder and writes plot_FEATURES.png beside them. The first feature has the axis on the left; each
other one has an axis of its own on the right and another line style. Losses are means over neighbouring tokens and over
the texts, with the spread of the texts as a band. attention_sinks' feature names do as well.
"""

import csv
import json
import statistics
from pathlib import Path
from typing import Annotated

import typer
from experiments import COLOURS, EXPERIMENTS

FEATURES = {  # name: column, label, line style, factor
    "perplexity": ("nll", "log perplexity (nats per token)", "-", 1.0),
    "memory": ("bytes", "memory (MiB)", "--", 2.0**-20),
    "latency": ("seconds", "time per token (ms)", ":", 1e3),
}
POINTS = 64  # along the x axis


def curve(path: Path, column: str, skip_first: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Positions; mean, least and most over the texts of neighbouring tokens' means (of time: of their medians)."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row[column] and int(row["input_length"]) > skip_first]
    length = max((int(row["input_length"]) for row in rows), default=0)
    width = max(1, -(-length // POINTS))
    bins: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        texts = bins.setdefault((int(row["input_length"]) - 1) // width, {})
        texts.setdefault(row["text"], []).append(float(row[column]))
    middle = statistics.mean if column == "nll" else statistics.median
    means = {at: [middle(values) for values in texts.values()] for at, texts in sorted(bins.items())}
    found = [[function(x) for x in means.values()] for function in (statistics.mean, min, max)]
    return [(at + 0.5) * width for at in means], *found


def legend_name(name: str, settings: dict) -> str:
    sinks, window = settings["sink_size"], settings["window_size"]
    return {
        "dense": "dense (all tokens)",
        "window": f"window {sinks + window}",
        "sinks": f"{sinks} sinks + window {window}",
        "recompute": f"re-computation of {sinks + window}",
    }[name]


def draw(output_dir: Path, features: list[str], title: str | None, limit: float | None, skip_first: int) -> Path:
    """Write the picture; returns where it is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    names = [name for name in EXPERIMENTS if (output_dir / f"{name}.csv").exists()]
    if not names:
        raise typer.BadParameter(f"{output_dir} has no CSV of {', '.join(EXPERIMENTS)}: run bench/perplexity.py first")
    settings = {name: json.loads((output_dir / f"{name}.json").read_text()) for name in names}
    figure, left = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, feature in enumerate(features):
        column, label, style, factor = FEATURES[feature]
        axes = left.twinx() if index else left
        axes.spines["right"].set_position(("axes", 1 + 0.14 * max(index - 1, 0)))
        for name in names:
            where, mean, least, most = curve(output_dir / f"{name}.csv", column, skip_first)
            axes.plot(where, [factor * y for y in mean], style, color=COLOURS[name])
            if column == "nll":
                axes.fill_between(where, [factor * y for y in least], [factor * y for y in most],
                                  color=COLOURS[name], alpha=0.12, linewidth=0)  # fmt: skip
        axes.set_ylabel(f"{label}, {style}" if len(features) > 1 else label)
        if column == "nll" and limit is not None:
            axes.set_ylim(top=min(axes.get_ylim()[1], limit))
        elif column != "nll":
            axes.set_ylim(bottom=0)
    left.set_xlabel("input length (tokens)")
    left.grid(alpha=0.3)
    methods = [Line2D([], [], color=COLOURS[name], label=legend_name(name, settings[name])) for name in names]
    kinds = [Line2D([], [], color="grey", linestyle=FEATURES[feature][2], label=feature) for feature in features]
    figure.legend(handles=methods + (kinds if len(features) > 1 else []), loc="outside lower center", ncols=4)
    model = settings[names[0]]["model"]
    left.set_title(title.replace("\\n", "\n") if title else f"{', '.join(features)} over input length: {model}")
    path = output_dir / f"plot_{'_'.join(features)}.png"
    figure.savefig(path, dpi=150)
    return path


def main(
    features: Annotated[list[str], typer.Option(help="perplexity, memory, latency: one or several.")] = ("perplexity",),
    more: Annotated[list[str] | None, typer.Argument(metavar="[FEATURE]...", help="More of them.")] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "--output_dir", help="Of the CSVs.")] = Path("outputs"),
    title: str | None = None,
    log_perplexity_limit: Annotated[
        float | None, typer.Option("--limit", "--log_perplexity_limit", help="Cut the loss off above this.")
    ] = None,
    skip_first: Annotated[int, typer.Option("--skip-first", "--skip_first", help="Leave out so many tokens.")] = 0,
) -> None:
    """Draw the features of every experiment in a folder."""
    wanted = ["memory" if name == "vram" else name for name in (*features, *(more or []))]
    if unknown := set(wanted) - FEATURES.keys():
        raise typer.BadParameter(f"--features {' '.join(unknown)}: choose of {', '.join(FEATURES)}")
    typer.echo(draw(output_dir, list(dict.fromkeys(wanted)), title, log_perplexity_limit, skip_first))


if __name__ == "__main__":
    typer.run(main)
