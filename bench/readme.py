"""Put the measured figures into README.md and docs, between their markers: python bench/readme.py

They come from bench/results/real and bench/results/proof, where the results of bench/real_model.py and bench/proof.py
lie (what was not measured stays as it is), bench/results/h200, where those of the benches of kernels do, and
bench/results/cpu, where those of bench/cpu.py do.
`--check` only says whether all are up to date.
"""

import contextlib
import csv
import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
REAL, PROOF, GPU = (ROOT / "bench/results" / name for name in ("real", "proof", "h200"))

# What the kernels are meant to take, 32 query heads of 128 in bfloat16. decode: (key heads, batch, C): us; prefill:
# (key heads, T, C): ms.
DECODE_AIMS = {
    (32, 1, 1024): 6, (32, 1, 4096): 18, (32, 8, 1024): 33, (32, 8, 4096): 122, (32, 64, 1024): 242,
    (32, 64, 4096): 950, (8, 1, 1024): 5, (8, 1, 4096): 8, (8, 8, 1024): 11, (8, 8, 4096): 33, (8, 64, 1024): 63,
    (8, 64, 4096): 240,
}  # fmt: skip
PREFILL_AIMS = {(8, 8192, 1024): 0.31, (8, 32768, 1024): 1.30, (8, 32768, 4096): 3.8}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gpu_csv(name: str) -> list[dict]:
    with (GPU / name).open() as file:
        return list(csv.DictReader(file))


def made_on_gpu(bench: str, ceiling: str = "") -> str:
    """The command behind a result of the kernels, and where it ran."""
    about = json.loads((GPU / f"{bench}.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    reached = {
        "read_bytes_a_second": lambda x: f"; reads {x / 1e12:.2f} TB/s",
        "matmul_tflops": lambda x: f"; a large matrix product {x:.0f} TFLOP/s",
    }
    more = reached[ceiling](about[ceiling]) if ceiling else ""
    return f"`python bench/{bench}.py --output-dir bench/results/h200`, {about['device']}, {versions}{more}."


def by_shape(bench: str, shape: tuple[str, ...], measured: str) -> dict[tuple, dict]:
    """Times by provider, of bfloat16 and heads of 128."""
    times: dict[tuple, dict] = {}
    for line in gpu_csv(f"{bench}.csv"):
        if (line["head_dim"], line["dtype"]) == ("128", "bfloat16"):
            row = times.setdefault(tuple(int(line[name]) for name in shape), {})
            row[line["provider"]] = float(line[measured])
            row["floor"] = float(line.get("floor_us", "nan"))
    return times


def decode_times() -> dict[tuple, dict]:
    times = by_shape("decode", ("num_kv_heads", "batch", "capacity"), "us")
    return {shape: times[shape] for shape in DECODE_AIMS}


def prefill_times() -> dict[tuple, dict]:
    times = by_shape("prefill", ("num_kv_heads", "batch", "tokens", "capacity"), "ms")
    shapes = [(kv, 1, tokens, capacity) for kv in (8, 32) for _, tokens, capacity in PREFILL_AIMS]
    return {(kv, tokens, capacity): times[kv, 1, tokens, capacity] for kv, _, tokens, capacity in shapes}


def decode_table() -> str:
    """Microseconds of a layer's decode step, a row a shape."""
    times = decode_times()
    providers = [name for name in next(iter(times.values())) if name != "floor"]
    rows = [
        [f"32/{kv}", str(batch), str(capacity), *(f"{row[name]:.1f}" for name in ("floor", *providers))]
        for (kv, batch, capacity), row in times.items()
    ]
    header = ["heads/kv", "batch", "C", "floor", *providers]
    return f"\n{table(header, rows)}\n\n{made_on_gpu('decode', 'read_bytes_a_second')}\n"


def prefill_table() -> str:
    """Milliseconds of a prompt in one layer, a row a shape."""
    times = prefill_times()
    providers = [name for name in next(iter(times.values())) if name != "floor"]
    rows = [
        [f"32/{kv}", str(tokens), str(capacity), *(f"{row[name]:.2f}" for name in providers)]
        for (kv, tokens, capacity), row in times.items()
    ]
    header = ["heads/kv", "T", "C", *providers]
    return f"\n{table(header, rows)}\n\n{made_on_gpu('prefill', 'matmul_tflops')}\n"


def off(time: float, aim: float | None) -> str:
    return "-" if aim is None else "met" if time <= aim else f"{100 * (time / aim - 1):+.0f} %"


def decode_aims_table() -> str:
    rows = []
    for shape, row in decode_times().items():
        us, overlapped, aim = row["sinkattn"], row["sinkattn_overlap"], DECODE_AIMS[shape]
        share = f"{100 * row['floor'] / us:.0f} %"
        peers = [f"{row[name] / us:.2f}" for name in ("sdpa_cudnn", "flashinfer_none", "flashinfer_rope")]
        of_both = [x for time in (us, overlapped) for x in (f"{time:.1f}", off(time, aim))]
        rows.append([f"32/{shape[0]}", *map(str, shape[1:]), str(aim), *of_both, share, *peers])
    header = [
        "heads/kv",
        "batch",
        "C",
        "aim",
        "us",
        "off it",
        "overlapped",
        "off it",
        "of the floor",
        "x cuDNN",
        "x FlashInfer",
        "x its ROPE_LLAMA",
    ]
    return f"\n{table(header, rows)}\n"


def prefill_aims_table() -> str:
    rows = []
    for shape, row in prefill_times().items():
        ms, aim = row["sinkattn"], PREFILL_AIMS.get(shape)
        peers = [f"{row[name] / ms:.2f}" for name in ("flex", "flashinfer_fa3", "sdpa_cudnn")]
        rows.append([f"32/{shape[0]}", *map(str, shape[1:]), f"{ms:.3f}", str(aim or "-"), off(ms, aim), *peers])
    header = ["heads/kv", "T", "C", "ms", "aim", "off it", "x Flex", "x FlashInfer FA3", "x cuDNN, dense"]
    return f"\n{table(header, rows)}\n"


def flatness_table() -> str:
    """One Stream over the length of its text, and whole models after texts of several lengths."""
    rows = [
        [f"{int(x['tokens']):,}", x["ms_per_token"], f"{int(x['memory_bytes']):,}"] for x in gpu_csv("flatness.csv")
    ]
    about = json.loads((GPU / "flatness.json").read_text())
    host = {f"{bytes_ / 2**20:.0f} MiB" for bytes_ in about["host_peak_bytes"].values()}
    times: dict[str, list[str]] = {}
    for line in gpu_csv("lengths.csv"):
        times.setdefault(line["tokens"], []).append(f"{float(line['ms_per_token']):.2f} ({line['memory_gb']})")
    methods = list(dict.fromkeys(line["method"] for line in gpu_csv("lengths.csv")))
    lengths = table(
        ["tokens of text", *(f"{m}, ms (GB at most)" for m in methods)], [[n, *x] for n, x in times.items()]
    )
    return (
        f"\n{table(['tokens of one Stream', 'ms a token', 'bytes allocated'], rows)}\n\nThe shipped model; means over "
        f"{about['span']:,} tokens. The host's peak memory at these points: {' or '.join(sorted(host))}; all logits "
        f"finite: {'yes' if about['finite'] else 'no'}.\n\n{lengths}\n\n{gpu_csv('lengths.csv')[0]['model']}, batch 1, "
        "C 1024.\n"
    )


def launch_table() -> str:
    rows = [[line["op"], line["backend"], line["host_us"]] for line in gpu_csv("launch.csv")]
    return f"\n{table(['what is called', 'by', 'us'], rows)}\n\n{made_on_gpu('launch')}\n"


def linear_table() -> str:
    """Products of one model, a column a number of rows: sinkattn and torch, microseconds."""
    times: dict[str, dict] = {}
    for line in gpu_csv("linear.csv"):
        if line["model"] == "Llama-3-8B":
            times.setdefault(line["product"], {})[line["rows"], line["provider"]] = line
    counts = list(dict.fromkeys(rows for of in times.values() for rows, _ in of))
    rows = []
    for product, of in times.items():
        first = of[counts[0], "sinkattn"]
        shape = f" {first['out_features']} x {first['in_features']}" if first["in_features"] else ""
        digits = 1 if shape else 0
        us = lambda line, column: f"{float(line[column]):.{digits}f}"  # noqa: B023, E731
        cells = [f"{us(of[n, 'sinkattn'], 'us')} / {us(of[n, 'torch'], 'us')}" for n in counts]
        rows.append([product + shape, us(first, "floor_us"), *cells])
    header = ["us, sinkattn / torch", "floor", *(f"rows: {n}" for n in counts)]
    return f"\n{table(header, rows)}\n\n`python bench/linear.py --output-dir bench/results/h200`\n"


def counters_table() -> str:
    rows = []
    for line in gpu_csv("counters.csv"):
        where = f"32/{line['num_kv_heads']}, batch {line['batch']}, T {line['tokens']}, C {line['capacity']}"
        shares = [f"{line[name]} %" for name in ("dram", "pipeline", "active")]
        rows.append([where, line["kernel"], line["us"], *shares, line["waves"]])
    header = ["shape", "kernel", "us", "of the memory's rate", "of the busiest pipeline's", "time at work", "waves"]
    return f"\n{table(header, rows)}\n\n`python bench/counters.py --output-dir bench/results/h200`.\n"


def errors_table() -> str:
    """The largest over the numbers of heads."""
    errors: dict[tuple, list] = {}
    for line in gpu_csv("errors.csv"):
        pair = float(line["sinkattn"]), float(line["sdpa"])
        errors.setdefault((line["op"], line["dtype"], line["scale"]), []).append(pair)
    rows = [
        [*shape, *(f"{max(column):.1e}" for column in zip(*pairs, strict=True)), f"{max(x / y for x, y in pairs):.2f}"]
        for shape, pairs in errors.items()
    ]
    header = ["op", "dtype", "scale", "sinkattn", "SDPA", "ratio, at most"]
    return f"\n{table(header, rows)}\n\n{made_on_gpu('errors')}\n"


def tensor_parallel_table() -> str:
    about = json.loads((GPU / "tensor_parallel.json").read_text())
    lines = gpu_csv("tensor_parallel.csv")
    ms = {(line["gpus"], line["batch"], line["mode"]): f"{float(line['ms']):.1f}" for line in lines}
    alone, split = "1", str(about["gpus"])
    rows = [[batch, mode, ms[alone, batch, mode], ms[split, batch, mode]] for gpus, batch, mode in ms if gpus == alone]
    header = ["rows", "as", "one GPU, ms a step", f"{split} GPUs, ms a step"]
    return (
        f"\n{table(header, rows)}\n\n{about['model']}, C {lines[0]['capacity']}, bfloat16; {about['device']}, torch "
        f"{about['torch']}, transformers {about['transformers']}. Off one GPU's float32 logits, relative to their "
        f"spread: {about['float32_split']:.1e} in float32 over {split}; in bfloat16 {about['bfloat16_alone']:.1e} on "
        f"one and {about['bfloat16_split']:.1e} over {split}.\n"
    )


def history_table() -> str:
    """What each version of decode.cu took, a column a shape: heads of the keys / batch / capacity."""
    times: dict[str, dict] = {}
    for line in gpu_csv("decode_history.csv"):
        shape = f"{line['num_kv_heads']}/{line['batch']}/{line['capacity']}"
        times.setdefault(line["version"], {})[shape] = line["us"]
    shapes = list(dict.fromkeys(shape for row in times.values() for shape in row))
    rows = [[name, *(row.get(shape, "-") for shape in shapes)] for name, row in times.items()]
    return "\n" + table(["us", *shapes], rows) + "\n"


def cpu_rows(is_prefill: bool) -> dict[tuple, dict[str, dict]]:
    """By shape and provider, from bench/cpu.py's CSV."""
    rows: dict[tuple, dict[str, dict]] = {}
    with (ROOT / "bench/results/cpu/attention.csv").open() as file:
        for line in csv.DictReader(file):
            names = ("heads", "kv_heads", "head_dim", "capacity", "tokens", "dtype", "threads")
            if (line["tokens"] != "1") == is_prefill:
                rows.setdefault(tuple(line[name] for name in names), {})[line["provider"]] = line
    return rows


def cpu_machine() -> str:
    about = json.loads((ROOT / "bench/results/cpu/cpu.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    peers = "; ".join(
        f"{name}: " + ", ".join(f"{part} {version}" for part, version in of.items())
        for name, of in about["peers"].items()
    )
    missing = f" Missing: {', '.join(about['missing'])}." if about["missing"] else ""
    return f"{about['machine']}, {about['instructions']}; {versions}; {peers}.{missing}"


def cpu_decode_table() -> str:
    """Microseconds of a layer and token."""
    rows, providers = cpu_rows(is_prefill=False), []
    for row in rows.values():
        providers += [name for name in row if name not in providers]
    lines = []
    for (heads, kv_heads, head_dim, capacity, _, dtype, threads), row in rows.items():
        own, cells = row["sinkattn"], [f"{float(row[name]['us']):,.0f}" if name in row else "-" for name in providers]
        floor, share = float(own["floor_us"]), float(own["of_floor"])
        shape = [f"{heads}/{kv_heads} x {head_dim}", capacity, dtype, threads]
        lines.append([*shape, f"{float(own['read_gb_s']):.1f}", f"{floor:,.0f}", *cells, f"{share:.0%}"])
    header = ["heads/kv x dim", "C", "dtype", "threads", "read GB/s", "floor", *providers, "sinkattn of floor"]
    return f"\n{table(header, lines)}\n"


def cpu_prefill_table() -> str:
    """Milliseconds of a layer's prompt, and GFLOP/s."""
    rows, lines = cpu_rows(is_prefill=True), []
    providers = list(next(iter(rows.values())))
    for (heads, kv_heads, head_dim, capacity, tokens, dtype, threads), row in rows.items():
        cells = [f"{1e-3 * float(row[name]['us']):,.1f} ({float(row[name]['gflops']):.0f})" for name in providers]
        lines.append([f"{heads}/{kv_heads} x {head_dim}", tokens, capacity, dtype, threads, *cells])
    return f"\n{table(['heads/kv x dim', 'T', 'C', 'dtype', 'threads', *providers], lines)}\n"


def cpu_linear_table() -> str:
    """Microseconds."""
    with (ROOT / "bench/results/cpu/linear.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows = []
    for own, torchs in zip(lines[::2], lines[1::2], strict=True):
        case = f"{own['out_features']} x {own['in_features']}", own["rows"], own["dtype"], own["threads"]
        times = (f"{float(line['us']):,.0f}" for line in (own, torchs))
        rows.append([*case, f"{float(own['floor_us']):,.0f}", *times, f"{float(own['of_floor']):.0%}"])
    names = ["weight", "rows", "dtype", "threads", "floor", "sinkattn", "torch", "sinkattn of floor"]
    return f"\n{table(names, rows)}\n"


def cpu_model_table() -> str:
    """Tokens a second."""
    with (ROOT / "bench/results/cpu/model.csv").open() as file:
        lines = list(csv.DictReader(file))
    names = ("patched", "transformers", "floor")
    rows = [[line["dtype"], line["threads"], *(f"{float(line[name]):.2f}" for name in names)] for line in lines]
    return f"\n{table(['tokens/s', 'threads', *names], rows)}\n"


def generate_table() -> str:
    """Milliseconds a token, a row for each model, batch and capacity that was measured to the end."""
    methods = ("floor", "stream", "generate", "static_compiled", "dynamic", "recompute")
    times: dict[tuple, dict] = {}
    for line in gpu_csv("generate.csv"):
        times.setdefault(tuple(line[name] for name in ("model", "batch", "capacity")), {})[line["method"]] = line
    rows = [
        [*at, *(f"{float(row[m]['ms_per_token']):.2f}" if m in row else "-" for m in methods)]
        for at, row in sorted(times.items(), key=lambda x: (x[0][0], int(x[0][1]), int(x[0][2])))
        if "stream" in row
    ]
    about = json.loads((GPU / "generate.json").read_text())
    source = f"`python bench/generate.py --output-dir bench/results/h200`, {about['device']}, torch {about['torch']}, "
    source += f"transformers {about['transformers']}; reads {about['read_gb_per_s'] / 1e3:.2f} TB/s."
    return f"\n{table(['model', 'batch', 'C', *methods], rows)}\n\n{source}\n"


def step_table() -> str:
    """Microseconds of a step by part, and what reading takes at least."""
    lines = gpu_csv("step.csv")
    models, parts = (list(dict.fromkeys(line[name] for line in lines)) for name in ("model", "part"))
    at = {(line["model"], line["part"]): line for line in lines}
    header = ["us (floor)", "kernels", *models]
    rows = [
        [part, at[models[0], part]["kernels"], *(f"{at[m, part]['us']} ({at[m, part]['floor_us']})" for m in models)]
        for part in parts
    ]
    sums = [[sum(float(at[m, part][column]) for part in parts) for column in ("us", "floor_us")] for m in models]
    rows.append(["all", str(sum(int(row[1]) for row in rows)), *(f"{us:.0f} ({floor:.0f})" for us, floor in sums)])
    return f"\n{table(header, rows)}\n\n`python bench/step.py --output-dir bench/results/h200`\n"


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


def within(folder: str) -> str:
    """How far the loss of sinks + window is from that of re-computation, at the most."""
    return at_most(read_json(f"{folder}/perplexity.json")["sinks_over_recompute"])


def at_most(ranges: dict) -> str:
    everywhere = max((entry["all"] for entry in ranges.values()), key=abs)
    apart = max((ratio for entry in ranges.values() for ratio in entry["by_text"]), key=abs)
    return f"{100 * everywhere:+.2f} % over all texts, and by {100 * apart:+.2f} % in a single one"


def cost_table(folder: str) -> str:
    """Milliseconds and MiB of a token by position."""
    ways = read_json(f"{folder}/perplexity.json")["experiments"]
    spans = list(ways["sinks"])
    cell = lambda entry: f"{1e3 * entry['seconds']:.1f} ms, {entry['bytes'] / 2**20:.1f} MiB"  # noqa: E731
    rows = [[name, *(cell(entry) for entry in by_range.values())] for name, by_range in ways.items()]
    return f"\n{table(['a token at', *spans], rows)}\n"


def long_run() -> str:
    about = read_json("long_run/long_run.json")
    rows = about["rows"]
    seconds, part = [row[2] for row in rows], max(len(rows) // 4, 1)
    whole, first, last = (1e3 * statistics.median(some) for some in (seconds, seconds[:part], seconds[-part:]))
    p90 = 1e3 * sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1]
    return (
        f"{about['tokens']:,} tokens through {about['sink_size']} sinks + window {about['window_size']} took "
        f"{about['seconds']:.0f} s. A token fed alone takes {whole:.1f} ms in the median of the blocks, {first:.1f} in "
        f"their first quarter and {last:.1f} in the last (p90 {p90:.1f}), with {rows[0][3] / 2**20:.1f} MiB at the "
        f"beginning and {rows[-1][3] / 2**20:.1f} at the end. {made_by(about)}."
    )


def long_run_errors() -> str:
    about = read_json("long_run/long_run.json")
    early, late = about["against_float64"]
    spread = max(max(losses) - min(losses) for losses in about["passages"])
    error = lambda part: f"{part['largest_error']:.1e} of their spread at most ({part['rms_error']:.1e} rms)"  # noqa: E731
    return (
        f"The text is {len(about['passages'])} passages of {about['rows'][0][0]:,} tokens, over and over: from one "
        f"time to another, the loss of none changes by more than {spread:.1e} nats. The last "
        f"{late['to'] - late['from']:,} logits are off the float64 definition by {error(late)}, those of tokens "
        f"{early['from']:,} to {early['to']:,} by {error(early)}."
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


def percent(entry: dict) -> str:
    return f"{100 * entry['share']:.1f}"


def recall_caption(about: dict) -> str:
    sizes = f"{about['sink_size']} sinks + window {about['window_size']}"
    return f"{sizes}; {about['texts']} texts of {about['tokens']:,} tokens, {about['device'].split(',')[0]}."


def recall_by_position(folder: str) -> str:
    about = read_json(f"{folder}/recall.json")
    by_range = {name: next(iter(backs.values())) for name, backs in about["shares"].items()}
    header = ["right answers (%) at", *next(iter(by_range.values()))]
    rows = [[name, *map(percent, entries.values())] for name, entries in by_range.items()]
    return f"\n{table(header, rows)}\n\n{recall_caption(about)}\n"


def recall_by_distance(folder: str) -> str:
    """At the end of the text."""
    about = read_json(f"{folder}/recall.json")
    last = list(next(iter(next(iter(about["shares"].values())).values())))[-1]
    header = ["right answers (%), lines back", *next(iter(about["shares"].values()))]
    rows = [[name, *(percent(spans[last]) for spans in backs.values())] for name, backs in about["shares"].items()]
    return f"\n{table(header, rows)}\n\nAt tokens {last}; {recall_caption(about)}\n"


def first_line_table(folders: tuple[str, ...]) -> str:
    """By cache, at the end of the text."""
    rows = []
    for folder in folders:
        about = read_json(f"{folder}/recall.json")
        ends = {name: list(backs["first"].items())[-1] for name, backs in about["shares"].items()}
        last, _ = ends["sinks"]
        sizes = f"{about['sink_size']} + {about['window_size']}"
        rows.append([sizes, *(percent(ends[name][1]) for name in ("sinks", "window", "dense"))])
    header = ["right answers (%), sinks + window", "sinks + window", "window", "dense"]
    return f"\n{table(header, rows)}\n\nAt tokens {last}; {about['texts']} texts, {about['device'].split(',')[0]}.\n"


def both_ways_table() -> str:
    losses = read_json("both_ways/both_ways.json")["loss"]
    rows = [[name, *(f"{loss:.3f}" for loss in by_range.values())] for name, by_range in losses.items()]
    return f"\n{table(['masked tokens at', *next(iter(losses.values()))], rows)}\n"


def real(part: str) -> dict:
    return json.loads((REAL / f"{part}.json").read_text())


def real_csv(part: str) -> list[dict]:
    with (REAL / f"{part}.csv").open() as file:
        return list(csv.DictReader(file))


def real_loss_table() -> str:
    """Loss by position of the four ways, with the least and most of the texts."""
    about = real("loss")
    rows = [
        [
            name,
            *(f"{x['loss']:.3f} ({min(x['loss_by_text']):.2f}-{max(x['loss_by_text']):.2f})" for x in spans.values()),
        ]
        for name, spans in about["loss"].items()
    ]
    header = ["loss at", *about["loss"]["sinks"]]
    return f"\n{table(header, rows)}\n\n{len(about['texts'])} texts of {about['tokens']:,} tokens; {made_by(about)}.\n"


def real_within() -> str:
    return at_most(real("loss")["sinks_over_recompute"])


def real_sizes_table(study: str) -> str:
    found = real("sizes")["loss"][study]
    row = ["loss", *(f"{entry['loss']:.3f}" for entry in found.values())]
    return f"\n{table(['sinks + window', *found], [row])}\n"


def real_attention() -> str:
    about = real("attention")
    return f"{about['mean']:.0%} in the mean of its layers, up to {about['most']:.0%}"


def real_recall_table() -> str:
    """By position, and at the end of the text by distance."""
    about = real("recall")
    ways = about["shares"].items()
    places = {name: by_back["20"] for name, by_back in ways}
    last = list(places["sinks"])[-1]
    ends = {name: {back: spans[last] for back, spans in by_back.items()} for name, by_back in ways}
    backs = list(ends["sinks"])
    by_place = table(
        ["right answers (%), 20 lines back, at", *places["sinks"]],
        [[name, *map(percent, spans.values())] for name, spans in places.items()],
    )
    by_back = table(
        [f"at {last}, lines back", *backs],
        [[name, *(percent(by[back]) for back in backs)] for name, by in ends.items() if len(by) == len(backs)],
    )
    return f"\n{by_place}\n\n{by_back}\n\n{recall_caption(about)}\n"


def real_dtypes_table() -> str:
    """Errors by dtype, those of a fuse the largest over its capacities, and the loss over all of the texts."""
    about, rows = real("dtypes"), {}
    for line in real_csv("dtypes"):
        row = rows.setdefault(line["dtype"], {"unpatched": line["unpatched_error"]})
        row.setdefault(line["fuse"], []).append(float(line["error"] or "nan"))
    fuses = ("none", "attention", "layers")
    lines = []
    for dtype, row in rows.items():
        worst = [f"{max(row[fuse]):.1e}" if all(x == x for x in row[fuse]) else "refused" for fuse in fuses]
        spans = about["loss"].get(dtype, {}).values()
        count = sum(x["tokens"] for x in spans)
        loss = f"{sum(x['loss'] * x['tokens'] for x in spans) / count:.4f}" if count else "-"
        lines.append([dtype, f"{float(row['unpatched']):.1e}", *worst, loss])
    header = ["error of the logits", "unpatched", *(f"fuse={fuse}" for fuse in fuses), "loss"]
    return f"\n{table(header, lines)}\n\n{made_by(about)}.\n"


def real_endless_table() -> str:
    about, rows = real("endless"), []
    for name, way in about["ways"].items():
        lost = [x for x in way["lost_at"] if x is not None]
        where = f"{len(lost)} of {len(way['lost_at'])} texts"
        where += f", after {min(lost):,} to {max(lost):,} tokens" if lost else ""
        rows.append([name, f"{way['fluent']:.0%}", where])
    header = [f"{about['texts']} texts of {about['tokens']:,} tokens", "fluent pieces", "lost their fluency"]
    return f"\n{table(header, rows)}\n\n{made_by(about)}.\n"


def real_chat_table() -> str:
    about = real("chat")
    rows = [
        [
            name,
            str(x["fluent"]),
            str(x["failed"]),
            f"{x['known']:.0%}",
            "never" if x["lost_at"] is None else f"turn {x['lost_at'] + 1}",
        ]
        for name, x in about["ways"].items()
    ]
    header = [
        f"of {about['turns']} answers",
        "fluent",
        "failed as attention_sinks counts",
        "known words",
        "fluency lost at",
    ]
    return f"\n{table(header, rows)}\n\n{made_by(about)}.\n"


def real_cost_table() -> str:
    """Milliseconds and MiB of one token, a column a position."""
    by_way: dict[str, list[str]] = {}
    lines = real_csv("cost")
    for line in lines:
        by_way.setdefault(line["way"], []).append(f"{float(line['ms']):.1f} ms, {int(line['bytes']) / 2**20:,.0f} MiB")
    where = list(dict.fromkeys(f"{int(line['position']):,}" for line in lines))
    rows = [[name, *cells[::-2][::-1]] for name, cells in by_way.items()]
    return f"\n{table(['a token behind', *where[::-2][::-1]], rows)}\n\n{made_by(real('cost'))}.\n"


def figures() -> dict[str, str]:
    """What stands between each marker and the next ``<!-- end -->``: all whose results are there."""
    first_line = ("recall_first", "recall_pinned", "recall_pinned_far")
    makers = {
        "real loss table": (real_loss_table,),
        "real within": (real_within,),
        **{f"real {study} table": (real_sizes_table, study) for study in ("sinks", "cache", "newline")},
        "real attention": (real_attention,),
        "real recall table": (real_recall_table,),
        "real dtypes table": (real_dtypes_table,),
        "real endless table": (real_endless_table,),
        "real chat table": (real_chat_table,),
        "real cost table": (real_cost_table,),
        "loss table": (loss_table, "perplexity"),
        "within": (within, "perplexity"),
        "cost table": (cost_table, "perplexity"),
        "vanilla loss table": (loss_table, "perplexity_vanilla"),
        "vanilla within": (within, "perplexity_vanilla"),
        "long run": (long_run,),
        "long run errors": (long_run_errors,),
        **{f"{study} table": (ablation, study) for study in ("sinks", "cache", "newline")},
        "attention table": (attention_table,),
        "recall table": (recall_by_position, "recall"),
        "distance table": (recall_by_distance, "recall_distance"),
        "small window table": (recall_by_distance, "recall_small"),
        "first line table": (first_line_table, first_line),
        "both ways table": (both_ways_table,),
        "decode table": (decode_table,),
        "decode aims table": (decode_aims_table,),
        "decode history table": (history_table,),
        "prefill table": (prefill_table,),
        "prefill aims table": (prefill_aims_table,),
        "launch table": (launch_table,),
        "flatness": (flatness_table,),
        "generate table": (generate_table,),
        "step table": (step_table,),
        "linear table": (linear_table,),
        "counters table": (counters_table,),
        "errors table": (errors_table,),
        "tensor parallel table": (tensor_parallel_table,),
        "cpu machine": (cpu_machine,),
        "cpu decode table": (cpu_decode_table,),
        "cpu prefill table": (cpu_prefill_table,),
        "cpu linear table": (cpu_linear_table,),
        "cpu model table": (cpu_model_table,),
    }
    found = {}
    for name, (make, *arguments) in makers.items():
        with contextlib.suppress(FileNotFoundError):
            found[name] = make(*arguments)
    return found


def main() -> None:
    known, behind = figures(), []
    for path in (
        ROOT / "README.md",
        ROOT / "docs/faq.md",
        ROOT / "docs/kernels.md",
        ROOT / "docs/cpu.md",
        ROOT / "docs/step.md",
    ):
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
