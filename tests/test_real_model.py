"""bench/real_model.py: every part, tiny, on the shipped model; its readers and judges; and one part on real weights."""

import gzip
import json
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import fluency  # noqa: E402
import readme  # noqa: E402
import real_model  # noqa: E402
from experiments import open_model, plain_forward  # noqa: E402

import real  # noqa: E402
from sinkattn import SinkCache, UnsupportedModelError, demo, patch  # noqa: E402
from test_bench import rows_of, run  # noqa: E402
from tiny import tiny  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three texts and a list of words, out of the modules that the shipped model was not trained on."""
    directory, text = tmp_path_factory.mktemp("data"), demo.held_out_text()
    for i in range(3):
        part = text[50_000 * i : 50_000 * (i + 1)]
        (directory / f"text{i}.txt.gz").write_bytes(gzip.compress(part.encode()))
    (directory / "words.gz").write_bytes(gzip.compress("\n".join(sorted(set(fluency.words_of(text)))).encode()))
    return directory


def about(directory: Path, part: str) -> dict:
    return json.loads((directory / f"{part}.json").read_text())


def test_every_part(data, tmp_path, monkeypatch):
    """Run once, as it takes a while: the files of every part, and the losses in them."""
    measured = tmp_path / "real"
    run(real_model.main, "--tiny", "--model", "demo", "--data", data, "--output-dir", measured, "--device", "cpu")
    writes_its_files(measured, monkeypatch)
    the_table_of_losses(measured, monkeypatch)
    losses_are_those_of_the_definition(measured, data)
    recompute_is_asked_for_some_tokens_alone(measured)


def writes_its_files(measured: Path, monkeypatch) -> None:
    for part in real_model.PARTS:
        rows, entry = rows_of(measured / f"{part}.csv"), about(measured, part)
        assert len(rows) > 3 and entry["command"].startswith("python bench/") and entry["seconds"] > 0, part
        assert {"device", "versions", "model", "dtype", "sink_size", "window_size"} <= entry.keys()
        assert plt.imread(measured / f"{part}.png").std() > 0.01, part
    monkeypatch.setattr(readme, "RESULTS", measured.parent)
    texts = readme.figures()
    assert sum(name.startswith("real ") for name in readme.TABLES | readme.SENTENCES) == len(texts) == 12
    assert all("nan" not in text for text in texts.values())


def the_table_of_losses(measured: Path, monkeypatch) -> None:
    """Cell by cell; without the run on a GPU, that on a CPU is shown."""
    monkeypatch.setattr(readme, "RESULTS", measured.parent)
    text, found = readme.TABLES["real loss table"](), about(measured, "loss")["loss"]
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert head == ["loss at", *found["sinks"]] and [row[0] for row in rows] == list(found)
    for way, *cells in rows:
        for cell, entry in zip(cells, found[way].values(), strict=True):
            loss, least, most = map(float, re.fullmatch(r"(.+) \((.+)-(.+)\)", cell).groups())
            expected = entry["loss"], min(entry["loss_by_text"]), max(entry["loss_by_text"])
            assert (loss, least, most) == pytest.approx(expected, abs=0.006)
    assert "(bench/results/real/loss.png)" in text
    results = measured.parent / "smaller"
    shutil.copytree(measured, results / "real" / "cpu")
    monkeypatch.setattr(readme, "RESULTS", results)
    assert readme.TABLES["real loss table"]() == text.replace("/real/", "/real/cpu/")


def losses_are_those_of_the_definition(measured: Path, data: Path) -> None:
    """By position and by size, against a plain forward; what is not asked for is the unpatched model's."""
    model, tokenizer, _ = open_model("demo", "cpu", "float32")
    texts = [real_model.unpacked(path) for path in sorted(data.glob("text*.gz"))]
    ids = torch.tensor([tokenizer(text).input_ids[:601] for text in texts])
    expected = {"window": (0, 64), "sinks": (4, 60), "dense": (0, 601)}
    for name, size in expected.items():
        with torch.no_grad():
            logits = model.lm_head(plain_forward(model, ids[:, :-1], *size))
        expected[name] = cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    found = about(measured, "loss")["loss"]
    for name, nats in expected.items():
        for span, entry in found[name].items():
            low, high = map(int, span.split("-"))
            torch.testing.assert_close(
                torch.tensor(entry["loss_by_text"]), nats[:, low:high].mean(1), atol=1e-4, rtol=1e-4
            )
    rows = [row for row in rows_of(measured / "loss.csv") if row["way"] == "sinks" and row["text"] == "1"]
    assert [int(row["begin"]) for row in rows][:6] == [0, 16, 32, 48, 64, 80] and rows[-1]["end"] == "600"
    for row in rows:
        part = expected["sinks"][1, int(row["begin"]) : int(row["end"])]
        assert float(row["loss"]) == pytest.approx(part.mean().item(), abs=1e-3) and int(row["tokens"]) == len(part)
    sizes = about(measured, "sizes")["loss"]
    assert sizes["sinks"]["4 + 60"]["loss"] == pytest.approx(expected["sinks"][:, 300:].mean().item(), abs=1e-4)
    assert sizes["sinks"]["0 + 64"]["loss"] == pytest.approx(expected["window"][:, 300:].mean().item(), abs=1e-4)


def recompute_is_asked_for_some_tokens_alone(measured: Path) -> None:
    """All of them while nothing is forgotten, then so many in every range; there it is near sinks + window."""
    entry = about(measured, "loss")
    counts = {span: x["tokens"] for span, x in entry["loss"]["recompute"].items()}
    assert counts == {"0-64": 3 * 64, **{span: 3 * 8 for span in ("64-128", "128-256", "256-512", "512-600")}}
    apart = entry["sinks_over_recompute"]
    assert abs(apart["0-64"]["all"]) < 1e-5 and all(abs(x["all"]) < 0.2 for x in apart.values())


def test_a_dtype_that_is_refused_is_told(data, tmp_path, monkeypatch):
    def refuses(model, *sizes, **options):
        if model.dtype == torch.bfloat16:
            raise UnsupportedModelError("no")
        return patch(model, *sizes, **options)

    for module in (real_model, sys.modules["experiments"]):
        monkeypatch.setattr(module, "patch", refuses)
    monkeypatch.setattr(real_model, "DTYPES", ("float32", "bfloat16"))
    arguments = ("--model", "demo", "--data", data, "--output-dir", tmp_path / "real", "--device", "cpu")
    run(real_model.main, "dtypes", "--tiny", *arguments)
    for row in rows_of(tmp_path / "real" / "dtypes.csv"):
        own = float(row["unpatched_error"])
        if row["dtype"] == "bfloat16":
            assert row["refused"] == "no" and row["error"] == "" and 1e-3 < own < 0.1
        else:
            assert not row["refused"] and float(row["error"]) < 1.5 * own
            assert own < 1e-5
    assert list(about(tmp_path / "real", "dtypes")["loss"]) == ["float32"]
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "refused" in readme.TABLES["real dtypes table"]()


def test_a_part_that_fails_costs_no_other(data, tmp_path, monkeypatch):
    def broken(bench):
        raise RuntimeError("broken")

    monkeypatch.setitem(real_model.PARTS, "cost", broken)
    with pytest.raises(AssertionError, match="failed: cost"):
        run(real_model.main, "cost", "attention", "--tiny", "--model", "demo", "--data", data, "--output-dir", tmp_path)
    assert (tmp_path / "attention.csv").exists() and not (tmp_path / "cost.csv").exists()


# -------------------------------------------------------------------------------------------------------------- texts


def test_a_database_of_r_is_read():
    def vector(lines: list[str]) -> bytes:
        part = b"X\n" + struct.pack(">iii", 3, 4, 5) + struct.pack(">ii", 16, len(lines))
        for text in lines:
            part += struct.pack(">ii", 0x40009, len(text.encode())) + text.encode()
        return struct.pack(">i", len(part)) + zlib.compress(part)

    books = [["EMMA", "", "It was a café,", "long ago.", "", ""], ["Another", "", "", "one"]]
    assert list(real_model.novels(b"".join(map(vector, books)))) == [
        "EMMA\n\nIt was a café, long ago.",
        "Another\n\none",
    ]


def test_a_page_becomes_paragraphs():
    page = "<title>no</title><h1>A  head</h1>\n<p>One\nparagraph &amp; <i>more</i></p><script>x</script>two<br>three"
    assert real_model.plain_text(page) == "A head\n\nOne paragraph & more\n\ntwo\n\nthree".replace(
        "more\n\ntwo", "moretwo"
    )


# ------------------------------------------------------------------------------------------------------------ fluency


def test_judges():
    known = {"the", "old", "tree", "it's", "was"}
    assert fluency.words_of('"The old--tree," it\'s 12/3?') == ["the", "old", "tree", "it's", "12", "3"]
    assert fluency.judged("The old tree's xqz. The", known) == (pytest.approx(4 / 5), pytest.approx(4 / 5))
    assert fluency.judged(" \n ... ", known) == (0.0, 0.0)
    assert fluency.is_fluent(0.8, 0.3) and not fluency.is_fluent(0.79, 0.9) and not fluency.is_fluent(0.9, 0.29)
    assert fluency.lost_at([True, False, False, True, False, False, False]) == 4
    assert fluency.lost_at([False, False]) is None
    found = fluency.summary([[True] * 4, [True, False, False, False]], 10)
    assert found == {"lost_at": [None, 10], "median_kept": 25.0, "fluent": 5 / 8}
    assert fluency.has_failed("ab" * 600, 512, 512) and not fluency.has_failed("ab" * 600, 511, 512)
    assert not fluency.has_failed("abcdefghijklmnopqrstuvwxyz", 512, 512)
    assert fluency.ways(64, 4, 100) == {"dense": (0, 100), "window": (0, 64), "sinks": (4, 60)}


def test_writing_is_drawn_as_the_model_says():
    """Cold it is greedy generation; warm, the first token comes as often as its share says."""
    model, ids = tiny("llama"), torch.randint(1, 97, (1, 20))
    greedy = fluency.endless(model, (4, 10), ids.expand(2, -1), 12, 1e-6, ())
    with patch(model, 4, 10):
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 20:]
        assert torch.equal(greedy, expected.expand(2, -1))
        many = ids.expand(20_000, -1)
        drawn = next(fluency.write(model, SinkCache(model), many[:, :1], 0.5, (int(expected[0]),)))
        with torch.no_grad():
            logits = model(ids[:, :1]).logits[0, -1]
    logits[expected[0]] = -torch.inf
    shares = (logits / 0.5).softmax(-1)
    likely = [i for i in range(97) if shares[shares > shares[i]].sum() < fluency.TOP_P]
    counts = torch.bincount(drawn, minlength=97)
    assert len(likely) < 96 and counts.sum() == counts[likely].sum()
    shares = shares[likely] / shares[likely].sum()
    off = (counts[likely] / len(many) - shares).abs()
    assert (off < 5 * (shares / len(many)).sqrt() + 1e-4).all()


def test_a_chat_is_one_text_through_one_cache(monkeypatch):
    """What the model reads is the conversation as it would be rendered, and the cache ends with the answer."""
    model, tokenizer, _ = open_model("demo", "cpu", "float32")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    read, cached = [], []
    plain = fluency.write

    def watched(model, cache, ids, temperature, never=()):
        cached.append(cache)
        read.append(ids)
        for token in plain(model, cache, ids, temperature, never):
            read.append(token[:, None])
            yield token

    monkeypatch.setattr(fluency, "write", watched)
    turns = list(fluency.chat(model, tokenizer, (4, 60), ["import os", "class A:"], 9, 0.7))
    text = tokenizer.decode(torch.cat(read, dim=1)[0])
    assert text.startswith("[user]import os</s>[assistant]") and "</s>[user]class A:</s>[assistant]" in text
    (first, one, said), (second, other, _) = turns
    assert all(cache is cached[0] for cache in cached) and len(one) <= 9 and said
    assert first == read[0].shape[1] and second > first + len(one)
    assert int(cached[0].lengths[0]) == second + len(other)


def test_the_loss_of_a_piece_alone():
    model, pieces = tiny("llama"), torch.randint(1, 97, (3, 40))
    with torch.no_grad():
        expected = [
            cross_entropy(model(piece[None]).logits[0, fluency.HEAD - 1 : -1], piece[fluency.HEAD :])
            for piece in pieces
        ]
    assert fluency.loss_alone(model, pieces, batch=2) == pytest.approx([x.item() for x in expected], rel=1e-4)


# --------------------------------------------------------------------------------------------------------- real weights


@pytest.mark.real
def test_on_real_weights(tmp_path):
    """SmolLM2 on plain English: without its first tokens it fails, with 4 of them it stays with re-computation."""
    real.needed()
    text = gzip.compress(real.tokenizer().decode(real.prose(300)[0]).encode())
    for name in ("text.txt.gz", "words.gz"):
        (tmp_path / name).write_bytes(text)
    arguments = ("--model", real.folder(), "--data", tmp_path, "--output-dir", tmp_path, "--device", "cpu")
    run(real_model.main, "loss", "--tiny", "--tokens", 256, "--capacity", 64, *arguments)
    loss = about(tmp_path, "loss")
    last = {name: spans["128-256"]["loss"] for name, spans in loss["loss"].items()}
    assert last["window"] > last["sinks"] + 0.5 and last["dense"] < last["sinks"] + 0.1
    assert abs(loss["sinks_over_recompute"]["128-256"]["all"]) < 0.1
