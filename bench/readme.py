"""Put the measured figures into README.md and docs/faq.md, between their markers: python bench/readme.py

They come from bench/results/proof, where the results of bench/proof.py lie (what was not measured stays as it is), from
bench/results/demo.json, which `sinkattn demo --tokens 8192 --plot bench/results/demo.png` writes, from
bench/results/h200/decode.csv, which bench/decode.py writes, and from sinkattn/demo_model/training.json, which
bench/train_model.py writes. `--check` only says whether both are up to date.
"""

import csv
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROOF = ROOT / "bench/results/proof"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decode_table() -> str:
    """Microseconds of a layer's decode step, a row a shape, from bench/decode.py's CSV."""
    with (ROOT / "bench/results/h200/decode.csv").open() as file:
        lines = list(csv.DictReader(file))
    providers = list(dict.fromkeys(line["provider"] for line in lines))
    times: dict[tuple, dict] = {}
    for line in lines:
        shape = f"{line['num_heads']}/{line['num_kv_heads']}", line["batch"], line["capacity"], line["floor_us"]
        times.setdefault(shape, {})[line["provider"]] = line["us"]
    rows = [
        [*shape[:3], f"{float(shape[3]):.1f}", *(f"{float(row[provider]):.1f}" for provider in providers)]
        for shape, row in times.items()
    ]
    return table(["heads/kv", "batch", "C", "floor", *providers], rows)


def read_json(path: str) -> dict:
    return json.loads((PROOF / path).read_text())


def read_csv(path: str) -> list[dict]:
    with (PROOF / path).open() as file:
        return list(csv.DictReader(file))


def made_by(about: dict) -> str:
    """The command behind a result, and where it ran."""
    return f"`{about['command']}`, {about['device']}, torch {about['versions']['torch']}"


def loss_table(folder: str) -> str:
    """Loss by position of the four ways, with the least and most of the texts."""
    about = read_json(f"{folder}/perplexity.json")
    spans = list(about["experiments"]["sinks"])
    rows = []
    for name, by_range in about["experiments"].items():
        cells = [
            f"{entry['loss']:.3f} ({min(entry['loss_by_text']):.2f}-{max(entry['loss_by_text']):.2f})"
            for entry in by_range.values()
        ]
        rows.append([name, *cells])
    return f"\n{table(['loss at', *spans], rows)}\n\n{about['texts']} texts; {made_by(about)}.\n"


def over_recompute(folder: str) -> str:
    ratios = read_json(f"{folder}/perplexity.json")["sinks_over_recompute"]
    spans = list(ratios)
    rows = [
        ["all texts", *(f"{100 * entry['all']:+.2f} %" for entry in ratios.values())],
        ["texts apart", *(f"{' '.join(f'{100 * x:+.2f}' for x in entry['by_text'])} %" for entry in ratios.values())],
    ]
    return f"\n{table(['sinks + window over re-computation', *spans], rows)}\n"


def cost_table(folder: str) -> str:
    """Milliseconds and MiB of a token by position."""
    ways = read_json(f"{folder}/perplexity.json")["experiments"]
    spans = list(ways["sinks"])
    cell = lambda entry: f"{1e3 * entry['seconds']:.1f} ms, {entry['bytes'] / 2**20:.1f} MiB"  # noqa: E731
    rows = [[name, *(cell(entry) for entry in by_range.values())] for name, by_range in ways.items()]
    return f"\n{table(['a token at', *spans], rows)}\n"


def long_run() -> str:
    about = read_json("long_run/long_run.json")
    rows, (early, late) = about["rows"], about["against_float64"]
    spread = max(max(losses) - min(losses) for losses in about["passages"])
    first, last = rows[0], rows[-1]
    error = lambda part: f"{part['largest_error']:.1e} of their spread at most ({part['rms_error']:.1e} rms)"  # noqa: E731
    return (
        f"{about['tokens']:,} tokens through {about['sink_size']} sinks + window {about['window_size']} took "
        f"{about['seconds']:.0f} s. A token fed alone takes {1e3 * first[2]:.1f} ms behind the first {first[0]:,} "
        f"tokens and {1e3 * last[2]:.1f} ms at the end, with {first[3] / 2**20:.1f} and {last[3] / 2**20:.1f} MiB. The "
        f"text is {len(about['passages'])} passages of {first[0]:,} tokens, over and over: from one time to another, "
        f"the loss of none changes by more than {spread:.1e} nats. The last {late['to'] - late['from']:,} logits are "
        f"off the float64 definition by {error(late)}, those of tokens {early['from']:,} to {early['to']:,} by "
        f"{error(early)}. {made_by(about)}."
    )


def ablation(study: str) -> str:
    """Loss by model and setting of one study."""
    lines = [line for line in read_csv("ablation/ablation.csv") if line["study"] == study]
    columns = list(dict.fromkeys(f"{line['sink_size']} + {line['window_size']}" for line in lines))
    rows: dict[str, list[str]] = {}
    for line in lines:
        rows.setdefault(line["model"], []).append(f"{float(line['loss']):.3f}")
    return f"\n{table(['model', *columns], [[name, *cells] for name, cells in rows.items()])}\n"


def attention_table() -> str:
    rows: dict[str, list[str]] = {}
    lines = read_csv("ablation/attention.csv")
    for line in lines:
        nowhere = float(line["nowhere"])
        cell = f"{float(line['first']):.2f}" + (f" / {nowhere:.2f}" if nowhere > 1e-4 else "")
        rows.setdefault(line["model"], []).append(cell)
    layers = [f"layer {i}" for i in range(len(next(iter(rows.values()))))]
    return f"\n{table(['first token / nowhere', *layers], [[name, *cells] for name, cells in rows.items()])}\n"


def recall_table(folder: str, by: str) -> str:
    """Percent of right answers by position, or by distance past the first range."""
    about = read_json(f"{folder}/recall.json")
    share = lambda entry: f"{100 * entry['share']:.1f}"  # noqa: E731
    found, rows = about["shares"], []
    if by == "position":
        spans = list(next(iter(next(iter(found.values())).values())))
        header = ["right answers (%) at", *spans]
        rows = [[name, *map(share, next(iter(backs.values())).values())] for name, backs in found.items()]
    else:
        header = ["right answers (%), lines back", *next(iter(found.values()))]
        for name, backs in found.items():
            late = [[entry for span, entry in spans.items() if not span.startswith("0-")] for spans in backs.values()]
            counts = [sum(entry["answers"] for entry in entries) for entries in late]
            right = [sum(entry["answers"] * entry["share"] for entry in entries) for entries in late]
            rows.append([name, *(f"{100 * a / b:.1f}" if b else "" for a, b in zip(right, counts, strict=True))])
    sizes = f"{about['sink_size']} sinks + window {about['window_size']}"
    return f"\n{table(header, rows)}\n\n{sizes}, {about['texts']} texts of {about['tokens']:,} tokens.\n"


def both_ways_table() -> str:
    losses = read_json("both_ways/both_ways.json")["loss"]
    rows = [[name, *(f"{loss:.3f}" for loss in by_range.values())] for name, by_range in losses.items()]
    return f"\n{table(['masked tokens at', *next(iter(losses.values()))], rows)}\n"


def proof_figures() -> dict[str, str]:
    """Those of bench/proof.py whose results are there."""
    makers = {
        ("perplexity/perplexity.json",): {
            "loss table": lambda: loss_table("perplexity"),
            "over recompute": lambda: over_recompute("perplexity"),
            "cost table": lambda: cost_table("perplexity"),
        },
        ("perplexity_vanilla/perplexity.json",): {
            "vanilla loss table": lambda: loss_table("perplexity_vanilla"),
            "vanilla over recompute": lambda: over_recompute("perplexity_vanilla"),
        },
        ("long_run/long_run.json",): {"long run": long_run},
        ("ablation/ablation.csv", "ablation/attention.csv"): {
            "sinks table": lambda: ablation("sinks"),
            "cache table": lambda: ablation("cache"),
            "newline table": lambda: ablation("newline"),
            "attention table": attention_table,
        },
        ("recall/recall.json",): {"recall table": lambda: recall_table("recall", "position")},
        ("recall_distance/recall.json",): {"distance table": lambda: recall_table("recall_distance", "distance")},
        ("recall_small/recall.json",): {"small window table": lambda: recall_table("recall_small", "distance")},
        ("recall_first/recall.json",): {"first line table": lambda: recall_table("recall_first", "position")},
        ("recall_pinned/recall.json",): {"pinned line table": lambda: recall_table("recall_pinned", "position")},
        ("both_ways/both_ways.json",): {"both ways table": both_ways_table},
    }
    return {
        name: make()
        for files, by_name in makers.items()
        if all((PROOF / file).exists() for file in files)
        for name, make in by_name.items()
    }


def figures() -> dict[str, str]:
    """What stands between each marker and the next ``<!-- end -->``."""
    demo = json.loads((ROOT / "bench/results/demo.json").read_text())
    training = json.loads((ROOT / "sinkattn/demo_model/training.json").read_text())
    ways = demo["ways"]
    ranges = list(next(iter(ways.values()))["loss"])
    rows = [
        [
            name,
            *(f"{x:.2f}" for x in way["loss"].values()),
            f"{way['cache_bytes'] / 2**20:.1f}",
            f"{way['ms_per_step']:.1f}",
        ]
        for name, way in ways.items()
    ]
    evaluation = training["evaluation"]
    held_out = evaluation["loss_by_position"]
    training_rows = [[name, *(f"{loss:.2f}" for loss in losses.values())] for name, losses in held_out.items()]
    return proof_figures() | {
        "decode table": f"\n{decode_table()}\n",
        "demo device": demo["title"].split("; ")[-1],
        "demo table": f"\n{table(['loss at', *ranges, 'cache, MiB', 'ms a step at the end'], rows)}\n",
        "training table": f"\nThe same on {evaluation['streams']} held-out texts, computed when the model was trained "
        "by plain PyTorch and nothing of sinkattn (`bench/train_model.py`; in one layer the attention on position 0 is "
        f"{max(evaluation['attention_on_first']):.2f} in the mean):\n\n"
        + table(["loss at", *next(iter(held_out.values()))], training_rows)
        + "\n",
    }


def main() -> None:
    known, behind = figures(), []
    for path in (ROOT / "README.md", ROOT / "docs/faq.md"):
        before = after = path.read_text()
        for name, text in known.items():
            after = re.sub(
                rf"(<!-- {name} -->).*?(<!-- end -->)", lambda m, t=text: m[1] + t + m[2], after, flags=re.DOTALL
            )
        if before != after:
            behind.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(after)
    if "--check" in sys.argv and behind:
        sys.exit(f"{', '.join(behind)}: behind the results: run python bench/readme.py")


if __name__ == "__main__":
    main()
