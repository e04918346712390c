"""Every experiment, at full size, with one command on one GPU: python bench/proof.py --output-dir proof --minutes 6

It prepares the corpus, trains six small models side by side, and runs the tools of this folder on them and on the
shipped model. Parts run as processes of their own as soon as what they need has ended, so that a part that fails or
takes too long costs no other its results. The rest spreads over the GPUs, on the first one behind those that watch a
clock. Everything is written as it goes: results and models in folders, what every part printed in logs/, and commands,
seconds and exits in proof.json.

`--tiny` runs the same on a CPU, in minutes, at sizes that show nothing but that all of it works.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import console, default_device, device_name, print_table, write_json

HERE = Path(__file__).parent
VARIANTS = ("token", "vanilla", "zero", "logits")
AFTER = 130  # seconds that a training leaves for compiling, its evaluation, and the parts that need it


@dataclass
class Part:
    """A process: `command` is asked for its arguments once the parts in `needs` have ended; None skips it."""

    needs: tuple[str, ...]
    command: Callable[[], list[str] | None]
    gpu: int = 0
    process: subprocess.Popen | None = None
    arguments: tuple[str, ...] = ()
    begin: float = 0.0
    seconds: float = 0.0
    end: str = ""  # how it ended: "ok", "skipped", "failed (1)", "stopped"


def plan(out: Path, tiny: bool, steps: int, gpus: int, left: Callable[[], float]) -> dict[str, Part]:
    """All parts by name. left: seconds until the end of the budget."""
    size = (lambda full, small: str(small)) if tiny else (lambda full, small: str(full))
    corpus, models = out / "corpus", out / "models"
    files = ["--max-files", size(14_000, 60)]
    spread = itertools.cycle((*range(1, gpus), 0))  # GPUs for what no clock watches

    def training(command: Callable[[], list[str] | None]) -> Part:
        gpu = next(spread)
        return Part(("corpus",) if gpu else ("corpus", "perplexity", "long run"), command, gpu)

    def train(name: str, count: int, *options: str) -> Callable[[], list[str] | None]:
        def command() -> list[str] | None:
            if not (corpus / "corpus.json").exists():
                return None
            minutes = max(left() - AFTER, 60) / 60
            return ["train_model.py", "--output-dir", f"{models / name}", "--corpus", f"{corpus}", "--steps",
                    f"{count}", "--batch-size", size(32, 4), "--minutes", f"{minutes:.2f}", "--eval-streams",
                    size(6, 1), *options]  # fmt: skip

        return command

    def both_ways() -> list[str] | None:
        if not (corpus / "corpus.json").exists():
            return None
        return ["both_ways.py", "--output-dir", f"{out / 'both_ways'}", "--corpus", f"{corpus}", "--steps", f"{steps}",
                "--minutes", f"{max(left() - AFTER, 60) / 60:.2f}", "--batch-size", size(32, 4), "--tokens",
                size(4096, 1100), "--texts", size(8, 1)]  # fmt: skip

    def on(name: str, *command: str) -> Callable[[], list[str] | None]:
        return lambda: [*command, "--model", f"{models / name}"] if (models / name / "training.json").exists() else None

    def ablation() -> list[str]:
        trained = [f"{models / name}" for name in VARIANTS if (models / name / "training.json").exists()]
        command = ["ablation.py", "--output-dir", f"{out / 'ablation'}", "--tokens", size(8192, 1100),
                   "--texts", size(8, 1), "--sizes", size("64,128,256,384,512,768,1024,2048", "64,512")]  # fmt: skip
        return command + [word for name in ("demo", *trained) for word in ("--model", name)]

    def recall(folder: str, *options: str) -> Part:
        command = on("recall", "recall.py", "--output-dir", f"{out / folder}", *options)
        return Part(("train recall",), command, next(spread))

    loss = ["perplexity.py", "--tokens", size(8192, 700), "--texts", size(3, 1), "--dtype", "float32", "--batch", "64",
            "--every", size(1, 64)]  # fmt: skip
    long = ["long_run.py", "--output-dir", f"{out / 'long_run'}", "--tokens", size(4_000_000, 6000), "--block",
            size(100_000, 2000), "--compared", size(10_000, 200)]  # fmt: skip
    parts = {
        "corpus": Part((), lambda: ["train_model.py", "--steps", "0", "--corpus", f"{corpus}", *files]),
        "perplexity": Part((), lambda: [*loss, "--output-dir", f"{out / 'perplexity'}"]),
        "long run": Part(("perplexity",), lambda: long),
    }
    parts["train recall"] = training(train("recall", 3 * steps // 2, "--mix", "recall"))
    for name in VARIANTS:
        parts[f"train {name}"] = training(train(name, steps, "--sinks", name))
    parts["both ways"] = training(both_ways)
    trained = tuple(f"train {name}" for name in VARIANTS)
    tokens = ["--tokens", size(16_384, 1100)]
    short = ["--tokens", size(8192, 1100), "--experiment", "sinks", "dense", "window"]
    parts |= {
        "ablation": Part(trained, ablation, next(spread)),
        "perplexity vanilla": Part(
            ("train vanilla",),
            on("vanilla", *loss, "--chunk", "512", "--output-dir", f"{out / 'perplexity_vanilla'}"),
            next(spread),
        ),
        "recall": recall("recall", *tokens, "--texts", size(3, 1)),
        "recall by distance": recall("recall_distance", *short, "--back", size("5,10,20,30,40,50,60,70", "5,20")),
        "recall small window": recall(
            "recall_small", *short, "--back", size("5,10,20,30", "5"), "--window-size", "124"
        ),
    }
    first = [*short, "--texts", size(8, 1), "--pinned"]
    for folder, sinks, window in (("first", 4, 252), ("pinned", 16, 240), ("pinned_far", 16, 496)):
        sizes = ["--sink-size", f"{sinks}", "--window-size", f"{window}"]
        parts[f"recall first line: {sinks} + {window}"] = recall(f"recall_{folder}", *first, *sizes)
    for name, *features in (
        ("perplexity", "perplexity"),
        ("perplexity", "memory", "latency", "--split"),
        ("perplexity", "perplexity", "memory"),
        ("perplexity vanilla", "perplexity"),
    ):
        command = ["plot.py", "--output-dir", f"{out / name.replace(' ', '_')}", "--features", *features]
        parts[f"plot of {name}: {' '.join(features)}"] = Part((name,), lambda command=command: command)
    return parts


def log_of(name: str, out: Path) -> Path:
    return out / "logs" / f"{name.replace(' ', '_').replace(':', '')}.txt"


def start(name: str, part: Part, out: Path, gpus: int) -> None:
    command = part.command()
    if command is None:
        part.end = "skipped"
        return
    threads = max(os.cpu_count() - 4, 1) if name == "corpus" else 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
                   "TORCHINDUCTOR_COMPILE_THREADS": "3"}  # fmt: skip
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    if gpus > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(part.gpu)
    part.arguments, part.begin = tuple(command), time.perf_counter()
    with log_of(name, out).open("w") as log:
        part.process = subprocess.Popen(
            [sys.executable, str(HERE / command[0]), *command[1:]],
            stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


def stop(part: Part) -> None:
    """End a part's process and those it started itself."""
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(part.process.pid, sign)
            part.process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def report(parts: dict[str, Part], out: Path, seconds: float) -> None:
    entry = {
        name: {"command": " ".join(part.arguments), "seconds": round(part.seconds, 1), "end": part.end}
        for name, part in parts.items()
    }
    entry = {"seconds": round(seconds, 1), "device": device_name(default_device()), "parts": entry}
    write_json(out / "proof.json", entry)


def main(
    output_dir: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("proof"),
    minutes: Annotated[float, typer.Option(help="What still runs then is stopped.")] = 6.0,
    steps: Annotated[int, typer.Option(help="Of each training.")] = 4000,
    only: Annotated[list[str] | None, typer.Option(help="Parts whose names begin so; they must find models.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Sizes for a CPU.")] = False,
) -> None:
    """Run all parts."""
    begin = time.perf_counter()
    elapsed = lambda: time.perf_counter() - begin  # noqa: E731
    (output_dir / "logs").mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    parts = plan(output_dir, tiny, steps, gpus, lambda: 60 * minutes - elapsed())
    if only:
        parts = {name: part for name, part in parts.items() if name.startswith(tuple(only))}
    at_a_time = len(parts) if gpus else 1
    try:
        while any(not part.end for part in parts.values()):
            for name, part in parts.items():
                running = sum(p.process is not None and not p.end for p in parts.values())
                if part.process is None and not part.end:
                    if running < at_a_time and all(parts[need].end for need in part.needs if need in parts):
                        start(name, part, output_dir, gpus)
                        console.print(f"{elapsed():6.1f} s  {part.end or 'begins'}: {name}")
                elif not part.end and part.process.poll() is not None:
                    part.seconds = time.perf_counter() - part.begin
                    part.end = f"failed ({part.process.returncode})" if part.process.returncode else "ok"
                    console.print(f"{elapsed():6.1f} s  {part.end}: {name}, {part.seconds:.1f} s")
                    report(parts, output_dir, elapsed())
            if elapsed() > 60 * minutes:
                break
            time.sleep(0.1)
    finally:
        for name, part in parts.items():
            if part.process is not None and not part.end:
                stop(part)
                part.seconds, part.end = time.perf_counter() - part.begin, "stopped"
                console.print(f"{elapsed():6.1f} s  stopped, out of time: {name}")
            part.end = part.end or "not begun"
        report(parts, output_dir, elapsed())
        shutil.rmtree(output_dir / "corpus", ignore_errors=True)
    rows = [(name, part.end, f"{part.seconds:.1f}") for name, part in parts.items()]
    print_table(("part", "end", "seconds"), rows, f"{elapsed():.0f} s in all")
    for name, part in parts.items():
        if part.end.startswith(("failed", "stopped")):
            log = log_of(name, output_dir)
            console.rule(f"{name}: the end of {log}")
            console.print(log.read_text()[-1500:], markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
