"""The command line: sinkattn demo | generate | chat | info."""

import contextlib
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

from . import __version__, demo, ops
from .patch import patch
from .stream import Stream

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Model = Annotated[str, typer.Argument(help='Hub name or local path; "demo" is the model that comes with the package.')]
SinkSize = Annotated[int, typer.Option(help="Tokens at the start of the text that stay for ever.")]
WindowSize = Annotated[int, typer.Option(help="Recent tokens kept, the current one included.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, ...; the GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help='Of the weights: "auto" (as saved), float32, bfloat16, float16.')]
Backend = Annotated[str, typer.Option(help="auto, cuda, triton, cpu or reference.")]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature; greedy if not given.")]
TopK = Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that make up this probability.")]
Penalty = Annotated[float | None, typer.Option(help="Divide the scores of tokens that stand in the cache by this.")]
Seed = Annotated[int | None, typer.Option(help="Of the sampling.")]


@app.callback()
def _quiet() -> None:
    transformers.logging.set_verbosity_error()  # it would warn that the text gets longer than the context


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors that the user can mend are told in a line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, markup=True, soft_wrap=True)
        raise typer.Exit(1) from error


def _open(
    name: str, device, dtype, sink_size, window_size, backend
) -> tuple[Stream, transformers.PreTrainedTokenizerBase]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = demo.MODEL if name == "demo" else name
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    patch(model, sink_size, window_size, backend=backend)
    return Stream(model), tokenizer


def _write(stream: Stream, tokenizer, max_new_tokens, temperature, top_k, top_p, penalty, seed) -> None:
    """Print what the stream generates, word by word; Ctrl-C ends it."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=seed)
    with contextlib.suppress(KeyboardInterrupt):
        for token_ids in stream.generate(max_new_tokens, do_sample=temperature is not None, **options):
            streamer.put(token_ids.cpu())
    streamer.end()


@app.command("demo")
def demo_command(
    device: Device = None,
    tokens: Annotated[int, typer.Option(help="Length of the held-out text.", min=1024)] = 4096,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated behind it.", min=0)] = 300,
    plot: Annotated[Path, typer.Option(help="Where the plot goes; a CSV goes beside it.")] = Path("sinkattn_demo.png"),
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Run the shipped model far beyond its context: dense, window, sinks + window; loss, memory, time and text."""
    with _told():
        demo.run(console, device or ("cuda" if torch.cuda.is_available() else "cpu"), tokens, new_tokens, plot, seed)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help='Text to go on from; "-" reads standard input.')],
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop after so many; endless if not given.", min=1)] = None,
    sink_size: SinkSize = 4,
    window_size: WindowSize = 1020,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
) -> None:
    """Stream text from a model, beyond its context and at constant memory."""
    with _told():
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text:
            raise ValueError("an empty prompt: give --prompt some text to go on from")
        stream, tokenizer = _open(model, device, dtype, sink_size, window_size, backend)
        stream.append(tokenizer(text, return_tensors="pt").input_ids)
        _write(stream, tokenizer, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt; choose --sink-size to hold it for ever.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; endless if not given.", min=1)] = 1000,
    sink_size: SinkSize = 4,
    window_size: WindowSize = 1020,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
) -> None:
    """Talk to a model, turn after turn through one cache, as long as you like. An empty line or Ctrl-D ends it."""
    with _told():
        stream, tokenizer = _open(model, device, dtype, sink_size, window_size, backend)
        is_first = True
        while True:
            try:
                said = console.input("[bold green]you:[/bold green] ")
            except EOFError:
                said = ""
            if not said:
                return
            turn = _turn(tokenizer, said, system, is_first)
            special = is_first and tokenizer.chat_template is None
            stream.append(tokenizer(turn, return_tensors="pt", add_special_tokens=special).input_ids)
            _write(stream, tokenizer, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
            is_first = False


def _turn(tokenizer, said: str, system: str | None, is_first: bool) -> str:
    """What a turn adds to the text: by the chat template, or plain lines for a model that has none."""
    user = {"role": "user", "content": said}
    if tokenizer.chat_template is None:
        return (f"{system}\n" if system and is_first else "") + f"{said}\n"
    render = lambda *messages, **more: tokenizer.apply_chat_template(list(messages), tokenize=False, **more)  # noqa: E731
    if is_first:
        first = [{"role": "system", "content": system}] if system else []
        return render(*first, user, add_generation_prompt=True)
    before = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]  # any earlier turn
    return render(*before, user, add_generation_prompt=True).removeprefix(render(*before))


@app.command()
def info() -> None:
    """Print versions, devices, backends, and what is missing."""
    table = Table(show_header=False, box=None)
    table.add_row("sinkattn", __version__)
    for package in ("torch", "transformers", "triton"):
        try:
            table.add_row(package, __import__(package).__version__)
        except ImportError:
            table.add_row(package, "not installed")
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        kind = torch.device(device).type
        if kind == "cpu":
            table.add_row(device, f"{torch.get_num_threads()} threads, {ops.CPU_ISA or 'no compiled ops'}")
        else:
            table.add_row(device, torch.cuda.get_device_name(device))
        for backend in ops.BACKENDS:
            reason = ops.missing_backend(backend, kind)
            table.add_row(
                f"  {backend}", "[green]available[/green]" if reason is None else f"[yellow]missing:[/yellow] {reason}"
            )
    table.add_row("demo model", str(demo.MODEL) if demo.MODEL.exists() else f"[yellow]missing:[/yellow] {demo.MODEL}")
    console.print(table)
