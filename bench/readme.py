"""Put the measured figures into README.md and docs, between their markers: python bench/readme.py

`TABLES` and `SENTENCES` say for each marker which result of bench/results it shows, which columns, and how they are
written. What stands at a marker whose result is not there stays. `--check` only says whether all are up to date.
"""

import contextlib
import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"

# What the kernels are meant to take, 32 query heads of 128 in bfloat16. decode: (key heads, batch, C): us; prefill:
# (key heads, batch, T, C): ms, None for what has no aim.
DECODE_AIMS = {
    (32, 1, 1024): 6, (32, 1, 4096): 18, (32, 8, 1024): 33, (32, 8, 4096): 122, (32, 64, 1024): 242,
    (32, 64, 4096): 950, (8, 1, 1024): 5, (8, 1, 4096): 8, (8, 8, 1024): 11, (8, 8, 4096): 33, (8, 64, 1024): 63,
    (8, 64, 4096): 240,
}  # fmt: skip
PREFILL_AIMS = {
    (8, 1, 8192, 1024): 0.31, (8, 1, 32768, 1024): 1.3, (8, 1, 32768, 4096): 3.8, (32, 1, 8192, 1024): None,
    (32, 1, 32768, 1024): None, (32, 1, 32768, 4096): None,
}  # fmt: skip
# Of bench/generate.py, as columns come.
METHODS = ("floor", "stream", "stream_layers", "generate", "static_compiled", "dynamic", "recompute")


# ------------------------------------------------------------------------------------------------------------- results


def result(name: str) -> dict:
    """The fields of NAME.json and, as lines, what NAME.csv holds, either of which may be missing; name; picture.

    Of the real model, bench/results/real has the runs on a GPU; what is missing there is taken from real/cpu.
    """
    path = RESULTS / name
    if path.parent.name == "real" and not path.with_suffix(".json").exists():
        path = path.parent / "cpu" / path.name
    files = {kind: path.with_suffix(f".{kind}") for kind in ("json", "csv")}
    if not any(file.exists() for file in files.values()):
        raise FileNotFoundError(path)
    about = {"name": path.name, "picture": f"bench/results/{path.relative_to(RESULTS)}.png"}
    if files["json"].exists():
        about |= json.loads(files["json"].read_text())
    if files["csv"].exists():
        with files["csv"].open() as file:
            about["lines"] = [{key: number(x) for key, x in line.items()} for line in csv.DictReader(file)]
    return about


def number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def leaves(tree: dict, *names: str) -> Iterator[dict]:
    """A line for each leaf of a tree, with the keys that lead to it under these names."""
    for key, value in tree.items():
        if len(names) == 1:
            yield {names[0]: key, **(value if isinstance(value, dict) else {"value": value})}
        else:
            yield from ({names[0]: key, **leaf} for leaf in leaves(value, *names[1:]))


def grouped(lines: Iterable[dict], by: str) -> dict[tuple, list[dict]]:
    """Lines that agree in some fields (names separated by spaces), by what they agree in."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in by.split()), []).append(line)
    return groups


def only(**wanted) -> Callable[[dict], list[dict]]:
    """The lines of a result in which these fields are so."""
    return lambda about: [line for line in about["lines"] if all(line[name] == x for name, x in wanted.items())]


def shown(line: dict) -> dict:
    """A line, with what tables show of some fields: MiB, ms, percent, the least and most of the texts."""
    units = {"bytes": ("mib", 2**-20), "seconds": ("ms", 1e3), "share": ("percent", 100)}
    more = {
        unit: factor * line[name] for name, (unit, factor) in units.items() if isinstance(line.get(name), float | int)
    }
    losses = line.get("loss_by_text")
    return {**line, **more, **({"least": min(losses), "most": max(losses)} if losses else {})}


@dataclass(frozen=True)
class Table:
    """A Markdown table of a result's lines: its head and the row of a line, which names the line's fields in braces.

    Lines that agree in the fields `by` share a row, which shows the first of them; without `by` each has its own. A
    heading with a field in braces is a column for each of its values, which shows the row's line with that value.
    before and after: what stands around it.
    """

    name: str
    head: str
    row: str
    by: str = ""
    lines: Callable[[dict], Iterable[dict]] = itemgetter("lines")
    after: Callable[[dict], str] = lambda about: ""
    before: str = ""

    def __call__(self) -> str:
        about = result(self.name)
        lines = [shown(line) for line in self.lines(about)]
        rows = list(grouped(lines, self.by).values()) if self.by else [[line] for line in lines]
        columns = []
        for head, cell in zip(self.head.split(" | "), self.row.split(" | "), strict=True):
            for name in dict.fromkeys(head.format(**line) for line in lines):
                found = [[line for line in row if head.format(**line) == name] for row in rows]
                columns.append([name, "---:", *(cell.format(**x[0]).strip() if x else "-" for x in found)])
        columns[0][1] = "---"
        table = "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
        parts = [self.before.format(**about), table, self.after(about)]
        return "\n".join(["", "\n\n".join(part for part in parts if part), ""])


# --------------------------------------------------------------------------------------------------------------- lines


def shared(about: dict) -> Iterator[dict]:
    """A line for each shape: rows with sinks of their own beside rows that share them."""
    for lines in grouped(about["lines"], "rows sinks").values():
        by = {line["way"]: line for line in lines}
        more = dict(own=by["own"]["us"], of_sinks=by["sinks"]["us"])
        yield by["shared"] | more | dict(memory=by["own"]["bytes"] / by["shared"]["bytes"])


def kernel(unit: str, shape: str, aims: dict) -> Callable[[dict], Iterator[dict]]:
    """Times of a kernel for the shapes that have aims, in bfloat16 with heads of 128; sinkattn's lines come first.

    More fields: aim; share, of the floor in sinkattn's time; and by provider all, the times of the shape, x, times
    sinkattn's, and off, how far from the aim.
    """

    def off(time: float, aim: float | None) -> str:
        return "-" if aim is None else "met" if time <= aim else f"{100 * (time / aim - 1):+.0f} %"

    def lines(about: dict) -> Iterator[dict]:
        groups = grouped(only(head_dim=128, dtype="bfloat16")(about), shape)
        for key, aim in aims.items():
            times = {line["provider"]: line[unit] for line in groups[key]}
            more = {
                "aim": aim or "-",
                "share": 100 * groups[key][0].get("floor_us", math.nan) / times["sinkattn"],
                "all": times,
                "x": {name: time / times["sinkattn"] for name, time in times.items()},
                "off": {name: off(time, aim) for name, time in times.items()},
            }
            yield from ({**line, **more} for line in groups[key])

    return lines


def generate(about: dict) -> list[dict]:
    """What was measured to the end."""
    groups = grouped(about["lines"], "model batch capacity").values()
    ended = [row for row in groups if any(line["method"] == "stream" for line in row)]
    lines = [line for row in ended for line in row if line["method"] in METHODS]
    return sorted(lines, key=lambda x: (METHODS.index(x["method"]), x["model"], x["batch"], x["capacity"]))


def whole_steps(command: str) -> Callable[[dict], str]:
    def after(about: dict) -> str:
        ran = source({**about, "command": command, "versions": about})[:-1]
        return f"{ran}, transformers {about['transformers']}; reads {about['read_gb_per_s'] / 1e3:.2f} TB/s."

    return after


def other_prefills(about: dict) -> list[dict]:
    """Prefill in bfloat16 of shapes that have no aim of their own."""
    shape = itemgetter(*PREFILL.split())
    lines = only(dtype="bfloat16")(about)
    return [line for line in lines if line["head_dim"] != 128 or shape(line) not in PREFILL_AIMS]


def beside_torch(lines: list[dict], by: str) -> Iterator[dict]:
    for own, torchs in grouped(lines, by).values():
        shape = f"{own['out_features']} x {own['in_features']}" if own["in_features"] else ""
        yield {**own, "torch": torchs["us"], "weight": shape}


def step(about: dict) -> Iterator[dict]:
    """The parts of a step, then their sums."""
    yield from ({**line, "time": f"{line['us']} ({line['floor_us']})"} for line in about["lines"])
    for (model,), parts in grouped(about["lines"], "model").items():
        kernels, us, floor = (sum(part[name] for part in parts) for name in ("kernels", "us", "floor_us"))
        yield {"model": model, "part": "all", "kernels": kernels, "time": f"{us:.0f} ({floor:.0f})"}


def errors(about: dict) -> Iterator[dict]:
    """The largest over the numbers of heads."""
    for lines in grouped(about["lines"], "op dtype scale").values():
        most = {name: max(line[name] for line in lines) for name in ("sinkattn", "sdpa")}
        yield {**lines[0], **most, "ratio": max(line["sinkattn"] / line["sdpa"] for line in lines)}


def few_positions(about: dict) -> list[dict]:
    """Every second one, up to the last."""
    positions = sorted({line["position"] for line in about["lines"]})[::-2]
    return [line for line in about["lines"] if line["position"] in positions]


def answers(back: str | None = None, at_end: bool = False) -> Callable[[dict], list[dict]]:
    """Shares by way, lines back and range of positions: of one distance, or at the end of the text."""
    return lambda about: [
        line
        for line in leaves(about["shares"], "way", "back", "span")
        if back in (None, line["back"]) and (not at_end or line["span"] == end_of(about))
    ]


def end_of(about: dict) -> str:
    """The last range of positions."""
    return list(next(iter(next(iter(about["shares"].values())).values())))[-1]


def first_line(_: dict) -> Iterator[dict]:
    """By cache and way."""
    for folder in ("recall_first", "recall_pinned", "recall_pinned_far"):
        about = result(f"proof/{folder}/recall")
        found = {line["way"]: line for line in answers(at_end=True)(about)}
        yield from ({**about, **found[way]} for way in ("sinks", "window", "dense"))


def attention(about: dict) -> Iterator[dict]:
    for line in about["lines"]:
        elsewhere = f" / {line['nowhere']:.2f}" if line["nowhere"] > 1e-4 else ""
        yield {**line, "share": f"{line['first']:.2f}{elsewhere}"}


def dtypes(about: dict) -> Iterator[dict]:
    """By dtype and fuse the largest error over the capacities, and the loss over all of the texts."""
    for (dtype, _), lines in grouped(about["lines"], "dtype fuse").items():
        spans, found = about["loss"].get(dtype, {}).values(), [line["error"] for line in lines]
        count = sum(span["tokens"] for span in spans)
        loss = f"{sum(span['loss'] * span['tokens'] for span in spans) / count:.4f}" if count else "-"
        yield {**lines[0], "error": "refused" if "" in found else f"{max(found):.1e}", "loss": loss}


def decode_by_cache(about: dict) -> Iterator[dict]:
    """A line for each shape, with the times of every `cache_dtype`."""
    for lines in grouped(about["lines"], "rows heads kv_heads head_dim capacity").values():
        by = {line["cache"]: line for line in lines}
        times = {name: line["median_us"] for name, line in by.items()}
        yield lines[0] | times | {f"{name}_ratio": line["of_bfloat16"] for name, line in by.items()}


def decode_by_cache_on_gpus(about: dict) -> Iterator[dict]:
    """A line for each shape: the least it can take, and the times of `csrc/cuda` and FlashInfer."""
    for lines in grouped(about["lines"], "rows heads kv_heads head_dim capacity").values():
        by = {f"{line['by']}_{line['cache']}": line for line in lines}
        more = {f"{name}_ratio": line["of_bfloat16"] for name, line in by.items()}
        yield by["cuda_int8"] | {name: line["us"] for name, line in by.items()} | more


def endless(about: dict) -> Iterator[dict]:
    for line in leaves(about["ways"], "way"):
        lost = [at for at in line["lost_at"] if at is not None]
        after = f", after {min(lost):,} to {max(lost):,} tokens" if lost else ""
        yield {**about, **line, "lost": f"{len(lost)} of {len(line['lost_at'])} texts{after}"}


def chat(about: dict) -> Iterator[dict]:
    for line in leaves(about["ways"], "way"):
        yield {**about, **line, "lost": "never" if line["lost_at"] is None else f"turn {line['lost_at'] + 1}"}


# ----------------------------------------------------------------------------------------------------------- sentences


def source(about: dict) -> str:
    """The command behind a result, and where it ran."""
    if "command" in about:
        return f"`{about['command']}`, {about['device']}, torch {about['versions']['torch']}."
    versions = about.get("versions") or {name: about[name] for name in ("torch", "transformers")}
    return f"{command(about)[:-1]}, {about['device']}, {', '.join(f'{name} {x}' for name, x in versions.items() if x)}."


def command(about: dict) -> str:
    return f"`python bench/{about['name']}.py --output-dir bench/results/h200`."


def texts(about: dict) -> str:
    sizes = f"{about['sink_size']} sinks + window {about['window_size']}"
    return f"{sizes}; {about['texts']} texts of {about['tokens']:,} tokens, {about['device'].split(',')[0]}."


def within(about: dict) -> str:
    """How far the loss of sinks + window is from that of re-computation, at the most."""
    ranges = about["sinks_over_recompute"].values()
    everywhere = max((entry["all"] for entry in ranges), key=abs)
    apart = max((ratio for entry in ranges for ratio in entry["by_text"]), key=abs)
    return f"{100 * everywhere:+.2f} % over all texts, and by {100 * apart:+.2f} % in a single one"


def long_run(about: dict) -> str:
    rows = about["rows"]
    seconds, part = [row[2] for row in rows], max(len(rows) // 4, 1)
    whole, first, last = (1e3 * statistics.median(some) for some in (seconds, seconds[:part], seconds[-part:]))
    p90 = 1e3 * sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1]
    return (
        f"{about['tokens']:,} tokens through {about['sink_size']} sinks + window {about['window_size']} took "
        f"{about['seconds']:.0f} s. A token fed alone takes {whole:.1f} ms in the median of the blocks, {first:.1f} in "
        f"their first quarter and {last:.1f} in the last (p90 {p90:.1f}), with {rows[0][3] / 2**20:.1f} MiB at the "
        f"beginning and {rows[-1][3] / 2**20:.1f} at the end. {source(about)}"
    )


def long_run_errors(about: dict) -> str:
    early, late = about["against_float64"]
    spread = max(max(losses) - min(losses) for losses in about["passages"])
    error = "{largest_error:.1e} of their spread at most ({rms_error:.1e} rms)"
    return (
        f"The text is {len(about['passages'])} passages of {about['rows'][0][0]:,} tokens, over and over: from one "
        f"time to another, the loss of none changes by more than {spread:.1e} nats. The last "
        f"{late['to'] - late['from']:,} logits are off the float64 definition by {error.format(**late)}, those of "
        f"tokens {early['from']:,} to {early['to']:,} by {error.format(**early)}."
    )


def cpu_machine(about: dict) -> str:
    versions = {"": about["versions"], **about["peers"]}
    parts = [", ".join(f"{package} {x}" for package, x in of.items()) for of in versions.values()]
    named = "; ".join(f"{name}: {part}" if name else part for name, part in zip(versions, parts, strict=True))
    missing = f" Missing: {', '.join(about['missing'])}." if about["missing"] else ""
    return f"{about['machine']}, {about['instructions']}; {named}.{missing}"


def flatness(about: dict) -> str:
    host = " or ".join(sorted({f"{peak / 2**20:.0f} MiB" for peak in about["host_peak_bytes"].values()}))
    return (
        f"The shipped model; means over {about['span']:,} tokens. The host's peak memory at these points: {host}; all "
        f"logits finite: {'yes' if about['finite'] else 'no'}."
    )


# ------------------------------------------------------------------------------------------------------------- figures

LOSS = "loss at | {span}", "{way} | {loss:.3f} ({least:.2f}-{most:.2f})", "way"
DECODE, PREFILL = "num_kv_heads batch capacity", "num_kv_heads batch tokens capacity"
BACK = "right answers (%), lines back | {back}", "{way} | {percent:.1f}", "way"

STEPS = (
    "python bench/generate.py --models {},llama-3.2-1b,llama-3-8b,llama-2-7b "
    "--methods static_compiled,generate,stream,stream_layers --output-dir bench/results/h200{}"
)
SMALL_STEPS = "python bench/step.py --models smollm2-135m,qwen3-0.6b,llama-3.2-1b --output-dir bench/results/h200/small"
RECOMPUTE = "python bench/generate.py --output-dir bench/results/h200/recompute"
PEERS = "python bench/prefill.py --output-dir bench/results/h200/flashinfer"

TABLES = {
    # The real model: bench/real_model.py.
    "real loss table": Table(
        "real/loss", *LOSS, lambda x: leaves(x["loss"], "way", "span"),
        lambda x: f"{len(x['texts'])} texts of {x['tokens']:,} tokens; {source(x)}",
        "![Loss by position: dense, window, sinks + window and re-computation]({picture})",
    ),
    **{
        f"real {study} table": Table(
            "real/sizes", "sinks + window | {size}", "loss | {loss:.3f}", "study",
            lambda x, study=study: leaves({study: x["loss"][study]}, "study", "size"),
            lambda x: f"{len(x['texts'])} texts of {x['tokens']:,} tokens; {source(x)}",
        )
        for study in ("sinks", "cache", "newline")
    },
    "real recall table": Table(
        "real/recall", "right answers (%), 20 lines back, at | {span}", "{way} | {percent:.1f}", "way", answers("20"),
        texts, "![Right answers by position and by distance]({picture})",
    ),
    "real distance table": Table("real/recall", *BACK, answers(at_end=True), lambda x: f"At tokens {end_of(x)}."),
    "real dtypes table": Table(
        "real/dtypes", "error of the logits | unpatched | fuse={fuse} | loss",
        "{dtype} | {unpatched_error:.1e} | {error} | {loss}", "dtype", dtypes, source,
    ),
    "real endless table": Table(
        "real/endless", "{texts} texts of {tokens:,} tokens | fluent pieces | lost their fluency",
        "{way} | {fluent:.0%} | {lost}", "", endless, source,
        "![Known words, variety and loss of what is written]({picture})",
    ),
    "real chat table": Table(
        "real/chat", "of {turns} answers | fluent | failed as attention_sinks counts | known words | fluency lost at",
        "{way} | {fluent} | {failed} | {known:.0%} | {lost}", "", chat, source,
        "![Known words, variety and length of the answers by turn]({picture})",
    ),
    **{
        f"{name} table": Table(
            f"real/{folder}cache_dtype", "cache_dtype | loss | off by | error of the logits | bytes a token",
            "{cache}, {model} model | {loss:.4f} | {loss_off_percent:+.2f} % | {logits_error:.1e} | {bytes:,.0f}",
            lines=lambda about: [x for x in about["lines"] if x["begin"] == 0 and x["end"] == about["tokens"]],
            after=lambda about: f"{about['tokens']:,} tokens; {source(about)}",
        )
        for name, folder in (("cache dtype", ""), ("wide cache dtype", "c4096/"))
    },
    "cache dtype far table": Table(
        "real/far/cache_dtype", "error of the logits | tokens {begin:,} to {end:,}", "{cache} | {logits_error:.2e}",
        "cache",
        lambda about: [x for x in about["lines"] if x["begin"] in (4096, 12288, 995904) and x["cache"] != "auto"],
        source,
    ),
    "cache dtype gpu table": Table(
        "h200/cache_dtype_decode",
        "rows, heads, C | floor | bfloat16 | int8 | fp8 | int8 / bfloat16 | fp8 / bfloat16 | FlashInfer | "
        "FlashInfer, fp8",
        "{rows}, {heads}/{kv_heads}, {capacity} | {floor_us:.1f} | {cuda_auto:.1f} | {cuda_int8:.1f} | {cuda_fp8:.1f} "
        "| {cuda_int8_ratio:.2f} | {cuda_fp8_ratio:.2f} | {flashinfer_auto:.1f} | {flashinfer_fp8:.1f}",
        lines=decode_by_cache_on_gpus,
        after=lambda about: source(
            about | {"command": "python bench/cache_dtype.py --speed --output-dir bench/results/h200"}
        ),
    ),
    "cache dtype step table": Table(
        "h200/cache_dtype_step", "rows, C | cache_dtype | ms a token | of bfloat16 | cache, GB",
        "{rows}, {capacity} | {cache} | {ms_per_token:.2f} | {of_bfloat16:.2f} | {cache_gb:.1f}",
    ),
    "cache dtype decode table": Table(
        "cpu/cache_dtype_decode", "rows, heads, C | bfloat16 | int8 | fp8 | int8 / bfloat16 | fp8 / bfloat16",
        "{rows}, {heads}/{kv_heads} of {head_dim}, {capacity} | {auto} | {int8} | {fp8} | {int8_ratio:.2f} | "
        "{fp8_ratio:.2f}", lines=decode_by_cache, after=source,
    ),
    "real cost table": Table(
        "real/cost", "a token behind | {position:,}",
        "{way} | {ms:.1f} ms, {mib:,.0f} MiB", "way", few_positions, source,
    ),
    # The small models: bench/proof.py.
    **{
        f"{name}loss table": Table(
            f"proof/{folder}/perplexity", *LOSS, lambda x: leaves(x["experiments"], "way", "span"),
            lambda x: f"{x['texts']} texts; {source(x)}",
        )
        for name, folder in (("", "perplexity"), ("vanilla ", "perplexity_vanilla"))
    },
    "cost table": Table(
        "proof/perplexity/perplexity", "a token at | {span}", "{way} | {ms:.1f} ms, {mib:.1f} MiB", "way",
        lambda x: leaves(x["experiments"], "way", "span"),
    ),
    **{
        f"{study} table": Table(
            "proof/ablation/ablation", "model | {sink_size} + {window_size}", "{model} | {loss:.3f}", "model",
            only(study=study),
        )
        for study in ("sinks", "cache", "newline")
    },
    "attention table": Table(
        "proof/ablation/attention", "first token / nowhere | layer {layer}", "{model} | {share}", "model", attention
    ),
    "recall table": Table(
        "proof/recall/recall", "right answers (%) at | {span}", "{way} | {percent:.1f}", "way", answers(), texts
    ),
    **{
        f"{name} table": Table(
            f"proof/{folder}/recall", *BACK, answers(at_end=True), lambda x: f"At tokens {end_of(x)}; {texts(x)}"
        )
        for name, folder in (("distance", "recall_distance"), ("small window", "recall_small"))
    },
    "first line table": Table(
        "proof/recall_first/recall", "right answers (%) of sinks + window | {way}",
        "{sink_size} + {window_size} | {percent:.1f}", "sink_size window_size", first_line,
        lambda x: f"At tokens {end_of(x)}; {x['texts']} texts, {x['device'].split(',')[0]}.",
    ),
    "both ways table": Table(
        "proof/both_ways/both_ways", "masked tokens at | {span}", "{way} | {value:.3f}", "way",
        lambda x: leaves(x["loss"], "way", "span"),
    ),
    # Kernels and whole steps on a GPU.
    "decode table": Table(
        "h200/decode", "heads/kv | batch | C | floor | {provider}",
        "32/{num_kv_heads} | {batch} | {capacity} | {floor_us:.1f} | {us:.1f}", DECODE,
        kernel("us", DECODE, DECODE_AIMS),
        lambda x: f"{source(x)[:-1]}; reads {x['read_bytes_a_second'] / 1e12:.2f} TB/s.",
    ),
    "decode aims table": Table(
        "h200/decode", "heads/kv | batch | C | aim | us | off it | overlapped | off it | of the floor | x cuDNN | "
        "x FlashInfer | x its ROPE_LLAMA",
        "32/{num_kv_heads} | {batch} | {capacity} | {aim} | {us:.1f} | {off[sinkattn]} | {all[sinkattn_overlap]:.1f} | "
        "{off[sinkattn_overlap]} | {share:.0f} % | {x[sdpa_cudnn]:.2f} | {x[flashinfer_none]:.2f} | "
        "{x[flashinfer_rope]:.2f}", DECODE,
        kernel("us", DECODE, DECODE_AIMS),
    ),
    "decode history table": Table(
        "h200/decode_history", "us | {num_kv_heads}/{batch}/{capacity}", "{version} | {us}", "version"
    ),
    "prefill table": Table(
        "h200/prefill", "heads/kv | T | C | {provider}", "32/{num_kv_heads} | {tokens} | {capacity} | {ms:.2f}",
        PREFILL, kernel("ms", PREFILL, PREFILL_AIMS),
        lambda x: f"{source(x)[:-1]}; a large matrix product {x['matmul_tflops']:.0f} TFLOP/s.",
    ),
    "prefill aims table": Table(
        "h200/prefill", "heads/kv | T | C | ms | aim | off it | x Flex | x cuDNN, dense",
        "32/{num_kv_heads} | {tokens} | {capacity} | {ms:.3f} | {aim} | {off[sinkattn]} | {x[flex]:.2f} | "
        "{x[sdpa_cudnn]:.2f}", PREFILL,
        kernel("ms", PREFILL, PREFILL_AIMS),
    ),
    "prefill peers table": Table(
        "h200/flashinfer/prefill", "heads/kv | T | C | {provider}",
        "32/{num_kv_heads} | {tokens} | {capacity} | {ms:.2f}", PREFILL,
        lambda x: [
            line for line in kernel("ms", PREFILL, PREFILL_AIMS)(x)
            if line["provider"] in ("sinkattn", "flashinfer_fa2", "flashinfer_fa3")
        ],
        lambda x: source(x | {"command": PEERS}),
    ),
    "prefill heads table": Table(
        "h200/prefill", "heads | dim | rows | T | C | {provider}",
        "32/{num_kv_heads} | {head_dim} | {batch} | {tokens} | {capacity} | {ms:.2f}", PREFILL + " head_dim",
        other_prefills,
    ),
    "pages table": Table(
        "h200/paged", "heads/kv | batch | C | floor | {provider}",
        "{num_heads}/{num_kv_heads} | {batch} | {capacity} | {floor_us:.1f} | {us:.1f}",
        "num_heads num_kv_heads batch capacity", after=source,
    ),
    "launch table": Table("h200/launch", "what is called | by | us", "{op} | {backend} | {host_us}", after=source),
    "errors table": Table(
        "h200/errors", "op | dtype | scale | sinkattn | SDPA | ratio, at most",
        "{op} | {dtype} | {scale} | {sinkattn:.1e} | {sdpa:.1e} | {ratio:.2f}", "", errors, source,
    ),
    "counters table": Table(
        "h200/counters",
        "shape | kernel | us | of the memory's rate | of the busiest pipeline's | time at work | waves",
        "32/{num_kv_heads}, batch {batch}, T {tokens}, C {capacity} | {kernel} | {us} | {dram} % | {pipeline} % | "
        "{active} % | {waves:.2f}", after=command,
    ),
    "linear table": Table(
        "h200/linear", "us, sinkattn / torch | floor | rows: {rows}",
        "{product} {weight} | {floor_us:.1f} | {us:.1f} / {torch:.1f}", "product",
        lambda x: beside_torch(only(model="Llama-3-8B")(x), "product rows"), command,
    ),
    "step table": Table(
        "h200/step", "us (floor) | kernels | {model}", "{part} | {kernels} | {time}", "part", step, command
    ),
    "small step table": Table(
        "h200/small/step", "us (floor) | kernels | {model}", "{part} | {kernels} | {time}", "part", step,
        lambda x: f"`{SMALL_STEPS}`.",
    ),
    "generate table": Table(
        "h200/generate", "model | batch | C | {method}", "{model} | {batch} | {capacity} | {ms_per_token:.2f}",
        "model batch capacity", generate, whole_steps(STEPS.format("smollm2-135m,qwen3-0.6b", "")),
    ),
    "before table": Table(
        "h200/before/generate", "model | batch | C | {method}", "{model} | {batch} | {capacity} | {ms_per_token:.2f}",
        "model batch capacity", generate, whole_steps(STEPS.format("qwen3-0.6b,smollm2-135m", "/before")),
    ),
    "recompute table": Table(
        "h200/recompute/generate", "model | batch | C | {method}",
        "{model} | {batch} | {capacity} | {ms_per_token:.2f}", "model batch capacity",
        lambda x: [line for line in generate(x) if line["method"] in ("stream", "dynamic", "recompute")],
        whole_steps(RECOMPUTE),
    ),
    "shared table": Table(
        "h200/shared", "rows | sinks | own, us | shared, us (floor) | of that the sinks | times | memory, times",
        "{rows} | {sinks:,} | {own} | {us} ({floor_us}) | {of_sinks} | {times} | {memory:.2f}",
        lines=shared, after=command,
    ),
    "shared step table": Table(
        "h200/shared_step", "sinks | until all rows have read them, s | ms a token | cache, GB",
        "{way} | {prompt_s} | {ms_per_token} | {cache_gb}",
        after=lambda x: "`python bench/shared.py --output-dir bench/results/h200`.",
    ),
    "speculative table": Table(
        "h200/speculative_shapes", "draft | rows | proposals | {chance:.0%} right",
        "{draft} | {batch} | {proposals} | {times}", "draft batch proposals",
        after=lambda x: "`python bench/speculative.py --output-dir bench/results/h200`.",
    ),
    "speculative real table": Table(
        "h200/speculative_real", "how | proposals | right | rounds | the same text",
        "{how} | {proposals} | {taken} | {rounds} | {same_text}",
    ),
    "flatness table": Table(
        "h200/flatness", "tokens of one Stream | ms a token | bytes allocated",
        "{tokens:,} | {ms_per_token:.5f} | {memory_bytes:,}", after=flatness,
    ),
    "lengths table": Table(
        "h200/lengths", "tokens of text | {method}, ms (GB at most)", "{tokens} | {ms_per_token:.2f} ({memory_gb})",
        "tokens", after=lambda x: f"{x['lines'][0]['model']}, batch 1, C 1024.",
    ),
    "tensor parallel table": Table(
        "h200/tensor_parallel", "rows | as | ms a step, GPUs: {gpus}", "{batch} | {mode} | {ms:.1f}", "batch mode",
        after=(
            "{model}, C 1024, bfloat16; {device}, torch {torch}, transformers {transformers}. Off one GPU's float32 "
            "logits, relative to their spread: {float32_split:.1e} in float32 over {gpus}; in bfloat16 "
            "{bfloat16_alone:.1e} on one and {bfloat16_split:.1e} over {gpus}."
        ).format_map,
    ),
    # A CPU: bench/cpu.py.
    "cpu decode table": Table(
        "cpu/attention", "heads/kv x dim | C | dtype | threads | read GB/s | floor | {provider} | sinkattn of floor",
        "{heads}/{kv_heads} x {head_dim} | {capacity} | {dtype} | {threads} | {read_gb_s:.1f} | {floor_us:,.0f} | "
        "{us:,.0f} | {of_floor:.0%}", "heads kv_heads head_dim capacity dtype threads", only(tokens=1),
    ),
    "cpu prefill table": Table(
        "cpu/attention", "heads/kv x dim | T | C | dtype | threads | {provider}",
        "{heads}/{kv_heads} x {head_dim} | {tokens} | {capacity} | {dtype} | {threads} | {ms:,.1f} ({gflops:.0f})",
        "heads kv_heads head_dim capacity tokens dtype threads",
        lambda x: [{**line, "ms": 1e-3 * line["us"]} for line in x["lines"] if line["tokens"] > 1],
    ),
    "cpu linear table": Table(
        "cpu/linear", "weight | rows | dtype | threads | floor | sinkattn | torch | sinkattn of floor",
        "{weight} | {rows} | {dtype} | {threads} | {floor_us:,.0f} | {us:,.0f} | {torch:,.0f} | {of_floor:.0%}", "",
        lambda x: beside_torch(x["lines"], "out_features in_features rows dtype threads"),
    ),
    "cpu model table": Table(
        "cpu/model", "tokens/s | threads | patched | transformers | floor",
        "{dtype} | {threads} | {patched:.2f} | {transformers:.2f} | {floor:.2f}",
    ),
}  # fmt: skip

SENTENCES = {
    "real within": ("real/loss", within),
    "real attention": ("real/attention", "{mean:.0%} in the mean of its layers, up to {most:.0%}".format_map),
    "within": ("proof/perplexity/perplexity", within),
    "vanilla within": ("proof/perplexity_vanilla/perplexity", within),
    "long run": ("proof/long_run/long_run", long_run),
    "long run errors": ("proof/long_run/long_run", long_run_errors),
    "cpu machine": ("cpu/cpu", cpu_machine),
}


def figures() -> dict[str, str]:
    """What stands between each marker and the next ``<!-- end -->``: all whose results are there."""
    found = {}
    for name, (file, say) in SENTENCES.items():
        with contextlib.suppress(FileNotFoundError):
            found[name] = say(result(file))
    for name, table in TABLES.items():
        with contextlib.suppress(FileNotFoundError):
            found[name] = table()
    return found


def main() -> None:
    known, behind = figures(), []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text()
        after = before
        for name, text in known.items():
            text = text.replace("](bench/", "](../bench/") if path.parent.name == "docs" else text
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
