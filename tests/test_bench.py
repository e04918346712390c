"""The experiments under bench/ and examples/, each at a tiny size, with numbers that are known otherwise."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import transformers
import typer
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "examples")]

import ablation  # noqa: E402
import both_ways  # noqa: E402
import cache_dtype  # noqa: E402
import cpu  # noqa: E402
import experiments  # noqa: E402
import long_run  # noqa: E402
import perplexity  # noqa: E402
import plot  # noqa: E402
import proof  # noqa: E402
import recall  # noqa: E402
import speculative  # noqa: E402
import streaming_chat  # noqa: E402
import train_model  # noqa: E402
from common import read_csv as rows_of  # noqa: E402
from experiments import Reader, SinkLlama, causal_attention, losses, open_model, plain_forward  # noqa: E402

from oracle import relative_error, streaming_logits  # noqa: E402
from sinkattn import Stream, demo, patch  # noqa: E402
from tiny import tiny  # noqa: E402


def run(main, *arguments) -> str:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout  # progress bars are on stderr


def random_ids(rows: int, tokens: int):
    return torch.randint(1, 97, (rows, tokens))


# ------------------------------------------------------------------------------------------------------ experiments


@pytest.mark.parametrize("chunk", [1, 5, 50])
def test_the_four_ways_are_what_they_say(chunk):
    """Against the model itself (dense, re-computation token by token) and the oracle (window, sinks)."""
    model, ids, front = tiny("llama"), random_ids(2, 50), 2
    with torch.no_grad():
        dense = model(ids).logits
        anew = [
            model(ids[:, : t + 1] if t < 14 else torch.cat((ids[:, :front], ids[:, t - 11 : t + 1]), dim=1)).logits[
                :, -1
            ]
            for t in range(50)
        ]
    expected = {
        "dense": dense,
        "window": torch.cat([streaming_logits(model, row[None], 0, 14) for row in ids]),
        "sinks": torch.cat([streaming_logits(model, row[None], 4, 10) for row in ids]),
        "recompute": torch.stack(anew, dim=1),
    }
    for name, logits in expected.items():
        with Reader(model, name, 4, 10, front, batch=3) as reader:
            found = torch.cat([reader.feed(piece) for piece in ids.split(chunk, dim=1)], dim=1)
            assert relative_error(found, logits) < 1e-4, name
            reader.reset()
            targets = ids[:, 1:]
            loss = cross_entropy(logits[:, :-1].mT, targets, reduction="none")
            torch.testing.assert_close(losses(reader, ids, chunk), loss, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)  # unpatched again


def test_only_some_columns():
    model, ids = tiny("llama"), random_ids(1, 40)
    for name in experiments.EXPERIMENTS:
        with Reader(model, name, 4, 10, 1) as reader:
            every = torch.cat([reader.feed(piece) for piece in ids.split(8, dim=1)], dim=1)
            reader.reset()
            some = [reader.feed(piece, torch.tensor([1, 6])) for piece in ids.split(8, dim=1)]
            none = reader.feed(ids[:, :3], torch.arange(0))
        wanted = torch.tensor([8 * i + j for i in range(5) for j in (1, 6)])
        assert relative_error(torch.cat(some, dim=1), every[:, wanted]) < 1e-4
        assert none.shape[:2] == (1, 0)


def test_the_plain_definition():
    """plain_forward against the oracle, also where a text is left out between the sinks and what is asked for."""
    model, ids = tiny("llama").double(), random_ids(1, 60)
    with torch.no_grad():
        expected = streaming_logits(model, ids, 3, 7)
        found = model.lm_head(plain_forward(model, ids, 3, 7, chunk=16))
        assert relative_error(found, expected) < 5e-5  # the oracle's angles are float32
        start = 55 - 3 * 6  # layers * (W - 1) tokens earlier
        positions = torch.cat((torch.arange(3), torch.arange(start, 60)))
        later = model.lm_head(plain_forward(model, ids[:, positions], 3, 7, positions, chunk=4))
    assert relative_error(later[:, -5:], found[:, -5:]) < 1e-12
    assert relative_error(later[:, 3:6], found[:, start : start + 3]) > 1e-3  # those did know what was left out


def test_sink_logits_in_training_in_streaming_and_by_definition(tmp_path):
    """SinkLlama: SDPA with one more key, sinkattn's learned logits, and softmax with one more column by definition."""
    transformers.AttentionInterface.register("causal_sdpa", causal_attention)
    config = tiny("llama").config
    config.learns_sinks, config._attn_implementation = True, "causal_sdpa"
    torch.manual_seed(0)
    model, ids = SinkLlama(config).eval(), random_ids(2, 30)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(std=2)
    logits = model(ids, use_cache=False).logits
    logits.sum().backward()
    assert all(layer.self_attn.sinks.grad.abs().min() > 0 for layer in model.model.layers)
    with torch.no_grad():
        expected = model.lm_head(plain_forward(model, ids, 0, 30))
        assert relative_error(logits.detach(), expected) < 5e-5
        streamed = model.lm_head(plain_forward(model, ids, 4, 10))
        assert relative_error(streamed, expected) > 1e-2
        with patch(model, 4, 10):
            assert relative_error(model(ids).logits, streamed) < 5e-5
        model.save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(tmp_path)
        again, _, front = open_model(str(tmp_path), "cpu", "float32")
        assert isinstance(again, SinkLlama) and front == 1
        assert relative_error(again(ids, use_cache=False).logits, expected) < 5e-5
        without = [layer.self_attn.sinks.data.fill_(-1e4) for layer in model.model.layers]
        assert len(without) == 3 and relative_error(model(ids, use_cache=False).logits, expected) > 1e-2


def test_texts_come_in_pieces(tmp_path):
    """Reading block by block gives the tokens of the whole text, whatever the blocks."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    path = tmp_path / "text.py"
    text = demo.held_out_text()[:300_000]
    path.write_text(text, encoding="utf-8")
    blocks = list(experiments.text_blocks(path))
    assert "".join(blocks) == text and len(blocks) > 3
    found = list(experiments.token_ids(tokenizer, blocks))
    assert tokenizer.decode(found) == text
    assert abs(len(found) - len(tokenizer(text, add_special_tokens=False).input_ids)) <= 2 * len(blocks)
    rows = experiments.side_by_side(tokenizer, iter(found), 2, 100)
    assert rows.tolist() == [[0, *found[:99]], [0, *found[99:198]]]
    with pytest.raises(typer.BadParameter, match="ends after 5 tokens"):
        experiments.take(iter(range(5)), 6)


# ------------------------------------------------------------------------------------------------ perplexity and plot


ARGUMENTS = ("--tokens", 700, "--texts", 2, "--dtype", "float32", "--device", "cpu", "--every", 50)


def test_perplexity(tmp_path):
    """Run once, as it takes a while: the losses, a run that goes on, and the picture."""
    directory = tmp_path / "whole"
    run(perplexity.main, "--experiment", "dense", "window", "sinks", "recompute", *ARGUMENTS, "--output-dir", directory)
    losses_are_the_models(directory)
    a_stopped_run_goes_on(directory, tmp_path)
    run(plot.main, "--features", "perplexity", "vram", "latency", "--output_dir", directory, "--title", "a title")
    assert (directory / "plot_perplexity_memory_latency.png").stat().st_size > 20_000


def losses_are_the_models(measured: Path) -> None:
    """Losses are the unpatched model's inside the context; past it the four ways come in the order of the paper."""
    model, tokenizer, _ = open_model("demo", "cpu", "float32")
    text = experiments.side_by_side(tokenizer, experiments.token_ids(tokenizer, experiments.text_blocks(None)), 2, 701)
    second = text[1:]  # both are consecutive pieces of one source
    with torch.no_grad():
        expected = cross_entropy(model(second[:, :512]).logits[0], second[0, 1:513], reduction="none")
    for name in ("dense", "window", "sinks"):
        rows = rows_of(measured / f"{name}.csv")
        assert [(int(row["text"]), int(row["input_length"])) for row in rows] == [
            (text, at + 1) for text in range(2) for at in range(700)
        ]
        found = torch.tensor([float(row["nll"]) for row in rows[700:1212]])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        timed = [int(row["input_length"]) for row in rows[:700] if row["seconds"]]
        assert timed == [*range(64, 700, 64), 700]
    summary = json.loads((measured / "perplexity.json").read_text())
    last = {name: by_range["512-700"]["loss"] for name, by_range in summary["experiments"].items()}
    assert last["sinks"] + 0.1 < last["window"] < last["dense"] - 1
    assert [row["input_length"] for row in rows_of(measured / "recompute.csv")[:14]] == [
        str(at) for at in range(50, 701, 50)
    ]
    held = {name: by_range["512-700"]["bytes"] for name, by_range in summary["experiments"].items()}
    assert held["recompute"] < held["sinks"] == held["window"] < held["dense"]
    assert abs(summary["sinks_over_recompute"]["0-512"]["all"]) < 1e-3


def a_stopped_run_goes_on(measured: Path, tmp_path: Path) -> None:
    """Cut off in the middle of a line, it ends with the same rows as one that was not stopped."""
    for name in ("dense", "sinks", "recompute"):
        whole = (measured / f"{name}.csv").read_bytes()
        (tmp_path / f"{name}.json").write_bytes((measured / f"{name}.json").read_bytes())
        (tmp_path / f"{name}.csv").write_bytes(whole[: int(0.7 * len(whole))])
    output = run(perplexity.main, "--experiment", "dense", "sinks", "recompute", *ARGUMENTS, "--output-dir", tmp_path)
    assert " ".join(output.split()).count("goes on behind token") == 3
    for name in ("dense", "sinks", "recompute"):
        found, expected = rows_of(tmp_path / f"{name}.csv"), rows_of(measured / f"{name}.csv")
        for key in ("text", "input_length"):
            assert [row[key] for row in found] == [row[key] for row in expected]
        a, b = (torch.tensor([float(row["nll"]) for row in rows]) for rows in (found, expected))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_other_settings_are_refused_and_unknown_names(tmp_path):
    (tmp_path / "sinks.csv").write_text(",".join(perplexity.COLUMNS) + "\n")
    (tmp_path / "sinks.json").write_text('{"window_size": 508}')
    app = typer.Typer()
    app.command()(perplexity.main)
    result = CliRunner().invoke(
        app, ["--experiment", "sinks", "--window-size", "100", *map(str, ARGUMENTS), "--output-dir", str(tmp_path)]
    )
    assert result.exit_code == 2 and "window_size 508 then, 100 now" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["--experiment", "flash"])
    assert result.exit_code == 2 and "attention_sinks" in result.output


def test_old_argument_names(tmp_path):
    run(
        perplexity.main, "--experiment", "attention_sinks", "--model_name_or_path", demo.MODEL, "--num_tokens", 70,
        "--attention_sink_size", 4, "--window_size", 64, "--output_dir", tmp_path,
    )  # fmt: skip
    settings = json.loads((tmp_path / "sinks.json").read_text())
    assert (settings["sink_size"], settings["window_size"]) == (4, 60)
    assert len(rows_of(tmp_path / "sinks.csv")) == 70


def test_curves_of_a_plot(tmp_path):
    lines = [f"{text},{at + 1},{at + 100 * text},,\n" for text in range(2) for at in range(128)]
    (tmp_path / "x.csv").write_text("text,input_length,nll,seconds,bytes\n" + "".join(lines))
    where, mean, least, most = plot.curve(tmp_path / "x.csv", "nll", skip_first=0)
    assert where[:2] == [2.0, 6.0] and mean[:2] == [51.5, 55.5] and least[1] == 5.5 and most[1] == 105.5
    seconds = [f"{text},{at + 1},0,{100 if at == 0 else at},\n" for text in range(2) for at in range(12)]
    (tmp_path / "x.csv").write_text("text,input_length,nll,seconds,bytes\n" + "".join(seconds))
    assert plot.curve(tmp_path / "x.csv", "seconds", skip_first=9)[:2] == ([9.5, 10.5, 11.5], [9, 10, 11])
    assert plot.curve(tmp_path / "x.csv", "seconds", skip_first=0)[1][0] == 100


# ------------------------------------------------------------------------------------------------------------- recall


class Foretold:
    """Stands in for a Reader: it knows the text, but for the tokens that are listed as wrong."""

    def __init__(self, ids, wrong=()):
        self.ids, self.at, self.wrong = ids, 0, wrong

    def feed(self, ids, columns):
        following = self.ids[:, self.at + 1 + columns].clone()
        for row, position in self.wrong:
            following[row, self.at + 1 + columns == position] += 1
        self.at += ids.shape[1]
        return torch.nn.functional.one_hot(following, 5000).float()


def test_recall_asks_what_it_says_and_scores_exactly(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    exams = [recall.examination(tokenizer, 3000, 20, seed) for seed in range(2)]
    for ids, answers in exams:
        lines = tokenizer.decode(ids[1:]).splitlines()
        questions = [i for i, line in enumerate(lines) if line.startswith("what")]
        plain = [line for line in lines if line.startswith("line")]
        assert len(questions) == len(answers) > 20
        for number, at in enumerate(questions):
            name, value = lines[at].removeprefix("what is line ").split("? ")
            assert plain[10 * number] == f"line {name}: {value}"  # the first question comes after 20 lines
            begin, end = answers[number]
            assert tokenizer.decode(ids[begin:end]) == f" {value}\n"
    length = min(len(ids) for ids, _ in exams)
    ids = torch.tensor([ids[:length] for ids, _ in exams])
    answers = [[span for span in spans if span[1] <= length] for _, spans in exams]
    marks = recall.score(Foretold(ids), ids, answers, chunk=100)
    assert all(map(all, marks)) and [len(x) for x in marks] == [len(x) for x in answers]
    wrong = [(1, answers[1][3][1] - 1), (0, answers[0][0][1])]  # an answer's last token; a token behind an answer
    marks = recall.score(Foretold(ids, wrong), ids, answers, chunk=100)
    assert all(marks[0]) and [i for i, mark in enumerate(marks[1]) if not mark] == [3]
    rows = [
        ("sinks", 20, text, span[0], int(mark))
        for text in range(2)
        for span, mark in zip(answers[text], marks[text], strict=True)
    ]
    found = recall.shares(rows, [(0, length)])["sinks"]["20"][f"0-{length}"]
    assert found["share"] == 1 - 1 / len(rows) and found["most"] == 1 and found["least"] < 1


def test_the_first_line_is_in_no_window():
    """Between two questions for it lie `forgotten` tokens, and its name is never used again."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    ids, answers = recall.examination(tokenizer, 4000, None, 0, forgotten=300)
    lines = tokenizer.decode(ids[1:]).splitlines()
    name, value = lines[0].removeprefix("line ").split(": ")
    assert [line for line in lines if line.startswith(f"line {name}:")] == lines[:1]
    asked = [line for line in lines if line.startswith("what")]
    assert asked == [f"what is line {name}? {value}"] * len(answers) and len(answers) > 8
    gaps = [begin - end for (_, end), (begin, _) in zip(answers, answers[1:], strict=False)]
    assert min(gaps) >= 300 and max(gaps) < 450


def test_recall_scores_what_greedy_generation_would_write():
    model, ids = tiny("llama"), random_ids(1, 30)
    with patch(model, 4, 10):
        written = model.generate(ids, max_new_tokens=3, do_sample=False)
    changed = written.clone()
    changed[0, 31] = (changed[0, 31] + 1) % 97
    for text, right in ((written, True), (changed, False)):
        with Reader(model, "sinks", 4, 10, 1) as reader:
            assert recall.score(reader, text, [[(30, 33)]], chunk=7) == [[right]]


def test_recall_command(tmp_path):
    """The shipped model was never shown how: it must get none right, and every file is written."""
    run(recall.main, "--model", "demo", "--tokens", 600, "--texts", 1, "--output-dir", tmp_path, "--device", "cpu")
    entry = json.loads((tmp_path / "recall.json").read_text())
    assert all(part["share"] == 0 for by in entry["shares"].values() for part in by["20"].values())
    assert len(rows_of(tmp_path / "recall.csv")) == 4 * sum(
        part["answers"] for part in entry["shares"]["dense"]["20"].values()
    )
    assert (tmp_path / "recall.png").exists()


# ----------------------------------------------------------------------------------- ablation, long run, both ways


def test_ablation(tmp_path):
    run(ablation.main, "--tokens", 1100, "--texts", 1, "--sizes", "64,512", "--output-dir", tmp_path, "--device", "cpu")
    rows = rows_of(tmp_path / "ablation.csv")
    loss = {(row["study"], row["sink_size"], row["window_size"]): float(row["loss"]) for row in rows}
    assert loss["sinks", "0", "512"] > loss["sinks", "4", "508"] + 0.1
    assert loss["cache", "4", "60"] > loss["cache", "4", "508"] == loss["sinks", "4", "508"]
    assert loss["newline", "4", "508"] > loss["sinks", "4", "508"] + 0.1  # its sink is <s>, which is gone there
    model, tokenizer, _ = open_model("demo", "cpu", "float32", attn_implementation="eager")
    ids = experiments.side_by_side(tokenizer, experiments.token_ids(tokenizer, experiments.text_blocks(None)), 1, 512)
    maps, first, nowhere = ablation.attention(model, ids)
    with torch.no_grad():
        own = model(ids, output_attentions=True).attentions
        short = model(ids[:, : ablation.MAP], output_attentions=True).attentions
    torch.testing.assert_close(maps, torch.stack([share.mean((0, 1)) for share in short]), atol=1e-4, rtol=1e-3)
    expected = torch.stack([share[:, :, 256:, 0].mean() for share in own])
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-3)
    assert expected.max() > 0.3 and nowhere.abs().max() < 1e-5


def test_long_run(tmp_path, monkeypatch):
    """Logits are the float64 definition's, early and late, and a passage costs the same whenever it comes."""
    text = tmp_path / "text.txt"
    text.write_text(demo.held_out_text()[:12_000])
    monkeypatch.setattr(long_run, "TIMED", 8)
    run(
        long_run.main, "--tokens", 6000, "--block", 1000, "--compared", 300, "--window-size", 124, "--text", text,
        "--output-dir", tmp_path, "--device", "cpu",
    )  # fmt: skip
    entry = json.loads((tmp_path / "long_run.json").read_text())
    early, late = entry["against_float64"]
    assert (early["from"], late["from"], late["to"]) == (8 * 123, 5700, 6000)
    assert max(early["largest_error"], late["largest_error"]) < 1e-4 and late["other_choices"] == 0
    assert late["rms_error"] < 2 * early["rms_error"]
    assert entry["passages"] and all(max(losses) - min(losses) < 1e-4 for losses in entry["passages"])
    rows = rows_of(tmp_path / "long_run.csv")
    assert [int(row["tokens"]) for row in rows] == [1000 * (i + 1) for i in range(6)]
    assert len({row["bytes"] for row in rows}) == 1
    blocks = [[0, 0.0, at / 100, 0] for at in range(20)]
    assert long_run.time_of(blocks) == {"median": 0.095, "p90": 0.17}
    assert plt.imread(tmp_path / "long_run.png").std() > 0.01


def test_looking_both_ways():
    """logits_of is the model's own forward where all is near, and the window hides what is far."""
    transformers.AttentionInterface.register("both_ways", both_ways.attention)
    torch.manual_seed(0)
    model = train_model.build_model("token")
    model.set_attn_implementation("both_ways")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(3, 4000, (1, 700))
    with torch.no_grad():
        own = model(ids[:, :250], use_cache=False).logits
        for sinks in both_ways.WAYS.values():
            assert relative_error(both_ways.logits_of(model, ids[:, :250], sinks, chunk=64), own) < 1e-4
        before = both_ways.logits_of(model, ids, 4)
        changed = ids.clone()
        changed[0, 2] = 5
        near = both_ways.logits_of(model, changed, 4)
        assert relative_error(near, before) > 1e-3  # a global token reaches everything
    inputs, targets = both_ways.masked(ids)
    hidden = targets >= 0
    assert 0.08 < hidden.float().mean() < 0.25 and (inputs[hidden] == train_model.PAD).all()
    assert torch.equal(torch.where(hidden, targets, inputs), ids)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("sinks", ["token", "vanilla", "zero", "logits"])
def test_variants_learn(sinks):
    torch.manual_seed(0)
    train_model.random.seed(0)
    model = train_model.build_model(sinks)
    stream = torch.arange(3000, dtype=torch.int16) % 50 + 3  # the next token is always the same
    data = train_model.samples([stream, stream], 2, sinks)
    rows = next(data)
    assert rows.shape == (2, 513) and bool((rows[:, 0] == train_model.BOS).all()) == (sinks == "token")
    entry = train_model.train(model, data, steps=3, minutes=5, batch_size=2)
    assert entry["steps"] == 3 and entry["loss"][-1][1] < 8.4
    learned = [p for name, p in model.named_parameters() if name.endswith("self_attn.sinks")]
    assert len(learned) == (8 if sinks in ("zero", "logits") else 0)
    assert all((p.abs().max() > 0) == (sinks == "logits") for p in learned)


def test_a_kept_corpus_is_taken_again(tmp_path, monkeypatch):
    paths = sorted(train_model.stdlib().glob("*.py"))  # those of all packages take a while to list
    monkeypatch.setattr(train_model, "source_files", lambda: paths)
    laps = []
    first = train_model.prepared(tmp_path, 4, 0, laps.append)
    again = train_model.prepared(tmp_path, 4, 0, laps.append)
    assert laps == ["corpus", "tokenizer", "tokenize"]
    assert (first[1] == again[1]).all() and first[2] == again[2] and first[2]["corpus"]["files"] == 4
    text = "def f(x):\n    return x\n"
    assert first[0].encode(text).ids == again[0].encode(text).ids


# -------------------------------------------------------------------------------------------------------------- proof


def test_proof_loses_nothing_to_parts_that_fail(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("print('fine')")
    (tmp_path / "bad.py").write_text("raise SystemExit('broken')")
    (tmp_path / "slow.py").write_text("import time; time.sleep(600)")
    parts = {
        "bad": proof.Part((), lambda: ["bad.py"]),
        "good": proof.Part(("bad",), lambda: ["good.py", "--flag"]),
        "none": proof.Part(("good",), lambda: None),
        "slow": proof.Part(("none",), lambda: ["slow.py"]),
        "late": proof.Part(("slow",), lambda: ["good.py"]),
    }
    monkeypatch.setattr(proof, "HERE", tmp_path)
    monkeypatch.setattr(proof, "plan", lambda *_: parts)
    (tmp_path / "out" / "corpus").mkdir(parents=True)
    output = run(proof.main, "--output-dir", tmp_path / "out", "--minutes", 0.05)
    entry = json.loads((tmp_path / "out/proof.json").read_text())["parts"]
    ends = {name: part["end"] for name, part in entry.items()}
    assert ends == {"bad": "failed (1)", "good": "ok", "none": "skipped", "slow": "stopped", "late": "not begun"}
    assert "broken" in output and (tmp_path / "out/logs/good.txt").read_text() == "fine\n"
    assert parts["slow"].process.poll() is not None and not (tmp_path / "out/corpus").exists()


def test_proof_plans_what_exists(tmp_path):
    """Every script of the plan is there, every need is a part, and parts without their models are skipped."""
    parts = proof.plan(tmp_path, False, 10, 1, lambda: 300.0)
    for name, part in parts.items():
        assert all(need in parts for need in part.needs), name
    assert parts["recall"].command() is None and parts["train zero"].command() is None
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/corpus.json").write_text("{}")
    command = parts["train zero"].command()
    assert (proof.HERE / command[0]).exists() and command[command.index("--sinks") + 1] == "zero"
    assert 2 < float(command[command.index("--minutes") + 1]) < 5
    assert "long run" in parts["train zero"].needs and {part.gpu for part in parts.values()} == {0}
    four = proof.plan(tmp_path, False, 10, 4, lambda: 300.0)
    trained = [four[name] for name in four if name.startswith("train")]
    assert {part.gpu for part in trained} == {0, 1, 2, 3} and four["long run"].gpu == 0
    for part in trained:  # none beside those that watch a clock
        assert part.needs == (("corpus",) if part.gpu else ("corpus", "perplexity", "long run"))
    assert parts["ablation"].command()[-2:] == ["--model", "demo"]


# ----------------------------------------------------------------------------------------------------------- examples


def test_streaming_chat(tmp_path, monkeypatch):
    words = tmp_path / "words"
    words.write_text("import return self the\n")
    prompts = tmp_path / "prompts"
    prompts.write_text('{"turns": ["import os", "class A:"]}\n\ndef f(x):\n')
    run(
        streaming_chat.main, "--prompts", prompts, "--words", words, "--log", tmp_path / "log.txt",
        "--max-new-tokens", 20, "--window-size", 28, "--dtype", "float32",
    )  # fmt: skip
    rows = rows_of(tmp_path / "log.csv")
    assert [row["turn"] for row in rows] == ["0", "1", "2"] and all(0 < float(row["loss"]) < 8 for row in rows)
    seen = [int(row["tokens_seen"]) for row in rows]
    assert seen == sorted(seen) and seen[-1] > 32  # more than the cache holds
    log = (tmp_path / "log.txt").read_text()
    assert all(prompt in log for prompt in ("import os", "class A:", "def f(x):"))
    assert streaming_chat.known_share("the selbst the", {"the"}) == pytest.approx(2 / 3)
    assert streaming_chat.known_share("...", {"the"}) is None


def test_the_judge_is_the_unpatched_model():
    model, ids = tiny("llama"), random_ids(1, 12)[0]
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    expected = cross_entropy(logits[4:11], ids[5:]).item()
    assert streaming_chat.judge(model, ids[:5], ids[5:]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("endless", [(), ("--endless",)])
def test_endless_generation(endless, monkeypatch):
    import endless_generation

    from sinkattn import Stream

    steps = Stream.generate  # an end for the test
    monkeypatch.setattr(Stream, "generate", lambda self, _, **options: steps(self, 40, **options))
    monkeypatch.delattr(transformers.GenerationMixin if endless else Stream, "generate")  # the other way
    output = run(endless_generation.main, "--text", "import os", "--max-new-tokens", 40, "--window-size", 20, *endless)
    assert output.startswith("import os") and len(output) > 60


def test_many_chats():
    """Every chat says what it says alone, whatever rows it sat in."""
    import many_chats

    from sinkattn import Stream, models, patch
    from sinkattn.chat import Conversation, ends_of

    output = run(many_chats.main, "--chats", 5, "--rows", 2, "--max-new-tokens", 3, "--window-size", 20)
    assert "5 chats over 2 rows" in output
    network, tokenizer = models.load("demo", "cpu", "float32")
    asked, ends = [many_chats.QUESTIONS[i % 2 : 2 + i % 2] for i in range(7)], ends_of(network, tokenizer)
    with patch(network, 4, 12):
        found, away = many_chats.serve(Stream(network), tokenizer, asked, 3, 15)
        for questions, chat, texts in zip(asked, found, away, strict=True):
            stream, alone = Stream(network), Conversation(tokenizer)
            for question in questions:
                stream.append(alone.ask(question))
                alone.answer([int(x) for x in stream.generate(15, do_sample=False, eos_token_id=ends)], ends)
            assert chat.ids == alone.ids and texts.tensors["lengths"].tolist() == [len(chat.ids)]


def test_generate_bench(tmp_path):
    """Every method gives a row, and the text's length does not matter to memory."""
    pytest.importorskip("triton")
    import generate

    sizes = ("--tokens", 5, "--lengths", "24,48", "--length-model", "tiny", "--capacity", 16, "--flatness", 200)
    run(generate.main, "--models", "tiny", *sizes, "--output-dir", tmp_path)
    rows = rows_of(tmp_path / "generate.csv")
    methods = {row["method"] for row in rows if row["batch"] == "2"}
    assert methods == {"floor", "dynamic", "static_compiled", "recompute", "generate", "stream"}
    assert all(float(row["ms_per_token"]) > 0 for row in rows)
    assert [row["tokens"] for row in rows_of(tmp_path / "lengths.csv")] == ["24"] * 3 + ["48"] * 3
    assert json.loads((tmp_path / "flatness.json").read_text())["lengths"] == [204]
    for name in ("figure10.png", "lengths.png"):
        assert plt.imread(tmp_path / name).std() > 0.01


def test_speculative_bench(monkeypatch):
    """Proposals that are taken with a stated chance: 4 at 0.8 give 3.36 tokens a round."""
    monkeypatch.setattr("sinkattn.stream.Rounds", speculative.Stated)
    monkeypatch.setattr(speculative.generate, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(speculative, "DEVICE", torch.device("cpu"))
    for draft in ("tiny", ""):
        rows = speculative.of_shape("tiny", draft, 2, [2], [0.0, 1.0], 12)
        assert [row["chance"] for row in rows] == [0.0, 1.0] and all(row["ms_per_token"] > 0 for row in rows)
    monkeypatch.setattr(speculative.Stated, "chance", 0.8)
    model = tiny("llama")
    with patch(model, 4, 20):
        stream = Stream(model)
        stream.append(random_ids(20, 9))
        steps = stream.generate(None, eos_token_id=[], prompt_lookup_num_tokens=4)
        given = sum(int((next(steps) >= 0).sum()) for _ in range(41)) - 20
    assert abs(given / 800 - 3.36) < 0.25


def test_cpu_bench(tmp_path):
    """Every provider of this interpreter gives a row, by the docstring's formulas; the missing ones are named."""
    output = run(cpu.main, "--tiny", "--output-dir", tmp_path)
    assert "missing peers: attention_sinks, llama.cpp" in output
    rows = rows_of(tmp_path / "attention.csv")
    own = ["sinkattn", "sinkattn_op", "sdpa", "eager", "sdpa_alone"]
    assert [(row["provider"], row["tokens"]) for row in rows] == [(name, size) for size in ("1", "64") for name in own]
    keys = dict.fromkeys(own[:2], lambda t: min(t + 1, 32))  # that the query at position t looks at
    for row in rows:
        assert float(row["floor_us"]) * float(row["read_gb_s"]) == pytest.approx(2 * 2 * 32 * 16 * 4 / 1e3, rel=1e-2)
        if row["tokens"] == "64":
            flops = 4 * 16 * 4 * sum(keys.get(row["provider"], lambda t: t + 1)(t) for t in range(64))
            assert float(row["gflops"]) * float(row["us"]) == pytest.approx(flops / 1e3, rel=1e-2)
    products = rows_of(tmp_path / "linear.csv")
    assert [(row["provider"], row["rows"]) for row in products] == 3 * [
        (name, rows) for rows in ("1", "4", "8") for name in ("sinkattn", "torch")
    ]
    assert all(float(row["floor_us"]) > 0 and float(row["us"]) > 0 for row in products)
    assert all(float(row[name]) > 0 for row in rows_of(tmp_path / "model.csv") for name in ("patched", "transformers"))
    assert json.loads((tmp_path / "cpu.json").read_text())["missing"] == ["attention_sinks", "llama.cpp"]
    assert plt.imread(tmp_path / "cpu.png").std() > 0.01


@pytest.mark.parametrize("tokens", [1, 64])
def test_cpu_bench_times_the_same_attention(tokens):
    """What is timed as transformers' gives what its sdpa gives for keys that were rotated by the model's function."""
    case = cpu.cases(tiny=True)[tokens > 1]
    torch.manual_seed(0)
    sdpa = cpu.steps("sdpa", case)[0](0)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(cpu.steps("eager", case)[0](0)[0], sdpa)


def test_what_8_bits_cost(tmp_path, monkeypatch):
    """The losses are those of the oracle's logits, however the text is cut and wherever a range lies; 8 bits have
    errors, and little more than a quarter of float32's bytes."""
    model, ids = tiny("llama"), random_ids(1, 51)
    monkeypatch.setattr(cache_dtype.real, "real_model", lambda dtype, device: model)
    monkeypatch.setattr(cache_dtype.real, "prose", lambda tokens, device: ids[:, :tokens])
    sizes = ["--tokens", 50, "--window", 12, "--dtype", "float32", "--every", 20, "--chunk", 7, "--until", 130]
    run(cache_dtype.main, *sizes, "--device", "cpu", "--output-dir", tmp_path)
    text = ids.repeat(1, 3)[:, :131]
    loss = cross_entropy(streaming_logits(model, text, 4, 12)[:, :-1].mT, text[:, 1:], reduction="none")[0]
    rows = rows_of(tmp_path / "cache_dtype.csv")
    spans = [(0, 20), (20, 40), (40, 50), (0, 50), (110, 130)]
    assert [(int(row["begin"]), int(row["end"])) for row in rows[::3]] == spans
    for row in rows:
        expected, error = loss[int(row["begin"]) : int(row["end"])].mean().item(), float(row["logits_error"])
        if row["cache"] == "auto":
            assert error == float(row["loss_off_percent"]) == 0
            assert float(row["loss"]) == pytest.approx(expected, abs=2e-4)
        else:
            assert 1e-4 < error < 0.3 and float(row["loss"]) == pytest.approx(expected, rel=0.1)
            off = 100 * (float(row["loss"]) / expected - 1)
            assert float(row["loss_off_percent"]) == pytest.approx(off, abs=0.02)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    assert float(rows[1]["bytes"]) / float(rows[0]["bytes"]) == pytest.approx((head_dim + 4) / (4 * head_dim), rel=1e-3)
    assert json.loads((tmp_path / "cache_dtype.json").read_text())["tokens"] == 50
