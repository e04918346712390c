"""Draw what bench/perplexity.py measured: python bench/plot.py --features perplexity memory --output-dir outputs

Reads the CSVs of a folder, on any machine, and writes plot_FEATURES.png beside them. The first feature has the axis on
the left; each other one has an axis of its own on the right and another line style, or with `--split` a panel of its
own. Losses are means over neighbouring tokens and over the texts, with the spread of the texts as a band; memory and
time are medians. attention_sinks' feature names do as well.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated

import typer
from common import finish, read_csv
from experiments import COLOURS, EXPERIMENTS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

FEATURES = {  # name: column, label, line style and its name, factor
    "perplexity": ("nll", "log perplexity (nats per token)", "-", "solid", 1.0),
    "memory": ("bytes", "memory (MiB)", "--", "dashed", 2.0**-20),
    "latency": ("seconds", "median time per token (ms)", ":", "dotted", 1e3),
}
POINTS = 32  # along the x axis
# sinks + window lies on re-computation (loss) and on the window (memory): a thin line over wide pale ones
LINES = {
    "dense": dict(linewidth=1.5),
    "window": dict(linewidth=3.5, alpha=0.6),
    "recompute": dict(linewidth=4.5, alpha=0.45, zorder=1.9),
    "sinks": dict(linewidth=1.3, zorder=3),
}


def curve(path: Path, column: str, skip_first: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Positions, and of neighbouring tokens the mean over the texts, and the least and most of the texts' means.

    Of memory and time, where the first steps of a run and others on the machine are far off: the median three times.
    """
    rows = [row for row in read_csv(path) if row[column] and int(row["input_length"]) > skip_first]
    length = max((int(row["input_length"]) for row in rows), default=0)
    width = max(1, -(-length // POINTS))
    bins: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        texts = bins.setdefault((int(row["input_length"]) - 1) // width, {})
        texts.setdefault(row["text"], []).append(float(row[column]))
    where = [(at + 0.5) * width for at in sorted(bins)]
    if column != "nll":
        medians = [statistics.median(sum(texts.values(), [])) for _, texts in sorted(bins.items())]
        return where, medians, medians, medians
    means = [[statistics.mean(values) for values in texts.values()] for _, texts in sorted(bins.items())]
    return where, *([function(x) for x in means] for function in (statistics.mean, min, max))


def legend_name(name: str, settings: dict) -> str:
    sinks, window = settings["sink_size"], settings["window_size"]
    return {
        "dense": "dense (all tokens)",
        "window": f"window {sinks + window}",
        "sinks": f"{sinks} sinks + window {window}",
        "recompute": f"re-computation of {sinks + window}",
    }[name]


def draw(
    output_dir: Path, features: list[str], title: str | None, limit: float | None, skip_first: int, split: bool
) -> Path:
    """Write the picture; returns where it is."""
    names = [name for name in EXPERIMENTS if (output_dir / f"{name}.csv").exists()]
    if not names:
        raise typer.BadParameter(f"{output_dir} has no CSV of {', '.join(EXPERIMENTS)}: run bench/perplexity.py first")
    settings = {name: json.loads((output_dir / f"{name}.json").read_text()) for name in names}
    figure = Figure(figsize=(8, 2.5 * len(features) + 0.5 if split else 4.5))
    panels = list(figure.subplots(len(features) if split else 1, sharex=True, squeeze=False)[:, 0])
    panels += [panels[0].twinx() for _ in features[len(panels) :]]
    shares = len(features) > 1 and not split  # one panel, told apart by line style
    for index, (feature, axes) in enumerate(zip(features, panels, strict=True)):
        column, label, style, style_name, factor = FEATURES[feature]
        if shares:
            axes.spines["right"].set_position(("axes", 1 + 0.14 * max(index - 1, 0)))
        for name in names:
            where, mean, least, most = curve(output_dir / f"{name}.csv", column, skip_first)
            axes.plot(where, [factor * y for y in mean], style if shares else "-", color=COLOURS[name], **LINES[name])
            if column == "nll":
                axes.fill_between(where, [factor * y for y in least], [factor * y for y in most],
                                  color=COLOURS[name], alpha=0.1, linewidth=0)  # fmt: skip
        axes.set_ylabel(f"{label}, {style_name}" if shares else label)
        axes.set_ylim(0, min(axes.get_ylim()[1], limit) if column == "nll" and limit is not None else None)
        if split or not index:
            finish(axes)
    panels[-1 if split else 0].set_xlabel("input length (tokens)")
    methods = [
        Line2D([], [], color=COLOURS[name], label=legend_name(name, settings[name]), **LINES[name]) for name in names
    ]
    kinds = [Line2D([], [], color="grey", linestyle=FEATURES[feature][2], label=feature) for feature in features]
    figure.legend(handles=methods + (kinds if shares else []), loc="outside lower center", ncols=4)
    model = Path(settings[names[0]]["model"]).name
    panels[0].set_title(title.replace("\\n", "\n") if title else f"{', '.join(features)} over input length: {model}")
    path = output_dir / f"plot_{'_'.join(features)}.png"
    figure.savefig(path)
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
    split: Annotated[bool, typer.Option("--split", help="A panel a feature, not one for all.")] = False,
) -> None:
    """Draw the features of every experiment in a folder."""
    wanted = ["memory" if name == "vram" else name for name in (*features, *(more or []))]
    if unknown := set(wanted) - FEATURES.keys():
        raise typer.BadParameter(f"--features {' '.join(unknown)}: choose of {', '.join(FEATURES)}")
    typer.echo(draw(output_dir, list(dict.fromkeys(wanted)), title, log_perplexity_limit, skip_first, split))


if __name__ == "__main__":
    typer.run(main)
