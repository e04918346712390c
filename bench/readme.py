"""Put the measured figures into README.md, between its markers: python bench/readme.py

They come from bench/results/demo.json, which `sinkattn demo --tokens 8192 --plot bench/results/demo.png` writes, from
bench/results/h200/decode.csv, which bench/decode.py writes, and from sinkattn/demo_model/training.json, which
bench/train_model.py writes. `--check` only says whether README.md is up to date.
"""

import csv
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    return {
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
    path = ROOT / "README.md"
    before = after = path.read_text()
    for name, text in figures().items():
        after = re.sub(
            rf"(<!-- {name} -->).*?(<!-- end -->)", lambda m, t=text: m[1] + t + m[2], after, flags=re.DOTALL
        )
    if "--check" in sys.argv:
        sys.exit(None if before == after else "README.md is behind the results: run python bench/readme.py")
    path.write_text(after)


if __name__ == "__main__":
    main()
