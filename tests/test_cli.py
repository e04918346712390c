"""The command line, run in process; the demo on a short text."""

import csv

import pytest
import torch
import transformers
from typer.testing import CliRunner

from sinkattn import __version__, demo
from sinkattn.cli import app
from tiny import tiny


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


def test_chat_takes_several_turns():
    result = run("chat", "demo", "--max-new-tokens", "12", "--window-size", "40", input="def f(x):\nreturn x\n\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("you:") == 3


def test_chat_template_turns(tmp_path):
    """A later turn adds what the template puts between an answer and the next one, and nothing twice."""
    from sinkattn.cli import _turn

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert _turn(tokenizer, "hi", "be kind", True) == "[system]be kind</s>[user]hi</s>[assistant]"
    assert _turn(tokenizer, "more", "be kind", False) == "[user]more</s>[assistant]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "demo", "--prompt", "", "--max-new-tokens", "1"), "empty prompt"),
        (("generate", "demo", "--prompt", "x", "--max-new-tokens", "1", "--window-size", "0"), "window_size=0"),
        (("generate", "demo", "--prompt", "x", "--max-new-tokens", "1", "--backend", "opencl"), "unknown backend"),
        (("generate", "/nowhere/at/all", "--prompt", "x"), "/nowhere/at/all"),
        (("demo", "--tokens", "10000000"), "held-out text"),
    ],
)
def test_errors_are_told_in_a_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert "error:" in result.output and message in result.output and "Traceback" not in result.output


def test_ids_out_of_range(tmp_path):
    """A tokenizer that knows more tokens than the model embeds."""
    tiny("llama").save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(tmp_path)
    result = run("generate", str(tmp_path), "--prompt", "class Foo: pass", "--max-new-tokens", "1")
    assert result.exit_code == 1
    assert "the model embeds 0 to 96" in result.output
