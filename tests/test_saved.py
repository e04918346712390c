"""Texts kept, moved and doubled go on to the bit as if nothing had been, and a damaged file is one clear error."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from safetensors import safe_open

import sweep
from helpers import GPU
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, Stream, patch, saved
from test_pictures import Shown, vision_model
from tiny import FAMILIES, ROPES, SLIDING, tiny

S, W, SLACK = 4, 10, 5
C = S + W
HYBRIDS = ("falcon_h1", "jamba", "lfm2", "qwen3_next")


def made(name: str, **more):
    with torch.random.fork_rng():
        return sweep.build(name) if name in HYBRIDS else tiny(name, **more)


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 97, (rows, tokens))


def padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, and their mask."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, max(lengths) - n :] = 1
    return ids_of(len(lengths), max(lengths)) * mask, mask


# ----------------------------------------------------------------------------------------------------------- as before


@pytest.mark.parametrize("name", [*FAMILIES, *ROPES, *HYBRIDS])
def test_a_loaded_cache_goes_on(name, tmp_path):
    """To the bit, for rows of several lengths, also where tokens are taken back; and it is the oracle's text."""
    model, plain = made(name), made(name)
    ids, more = ids_of(2, 3 * C), ids_of(2, 2 * C)
    mask = torch.ones_like(ids)
    mask[1, : 3 * C - 5] = 0
    with patch(model, S, W, slack=SLACK), torch.no_grad():
        cache = SinkCache(model)
        model(ids, attention_mask=mask, past_key_values=cache)
        if not cache.has_state:
            model(ids_of(2, 2), past_key_values=cache)
            cache.crop(-2)
        cache.save(tmp_path / "text")
        loaded = SinkCache.load(model, tmp_path / "text")
        assert loaded.lengths.tolist() == [3 * C, 5] and loaded.seen == 3 * C
        for part in more.split([1, 1, 7, 2 * C - 9], dim=1):
            expected, found = (model(part, past_key_values=x).logits for x in (cache, loaded))
            assert torch.equal(found, expected)
            if not cache.has_state and part.shape[1] == 7:
                for x in (cache, loaded):
                    x.crop(-3)
                    model(part[:, -3:], past_key_values=x)
        for row, begin in enumerate((0, 3 * C - 5)):
            text = torch.cat((ids[row, begin:], more[row]))[None]
            expected = streaming_logits(plain, text, S, W)[0, -2 * C + 9 :]
            assert relative_error(found[row], expected) < (2e-3 if name in HYBRIDS else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_stream_samples_on(dtype, tmp_path):
    """Rows that have ended or wait, and torch's generator, are as they were; what comes next is the same."""
    model, options = made("llama").to(dtype), dict(do_sample=True, temperature=2.0, eos_token_id=[3])
    with patch(model, S, W, slack=SLACK):
        stream = Stream(model)
        stream.append(*padded(20, 3, 11, 7))
        for _ in stream.generate(9, **options):
            pass
        stream.reset([2])
        stream.save(tmp_path / "text")
        expected = torch.stack(list(stream.generate(3 * C, **options)))
        for _ in range(2):
            torch.manual_seed(5)
            loaded = Stream.load(model, str(tmp_path / "text"))
            assert loaded._waiting == {2}
            assert torch.equal(torch.stack(list(loaded.generate(3 * C, **options))), expected)
        assert torch.equal(stream.cache.rows.digest, loaded.cache.rows.digest)
        loaded.append(ids_of(1, 4), rows=[2])
        loaded.rewind(1, [0])
        stream.append(ids_of(4, 4), rows=range(4))


def test_rows_that_have_ended_stay_so(tmp_path):
    """Saved in the middle of a loop; the same loop over what was loaded goes on with all, as a new one does."""
    model, ids = made("llama"), ids_of(3, 12)
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(ids)
        first = next(stream.generate(1, do_sample=False))
        stream.reset()
        stream.append(ids)
        for step, _ in enumerate(stream.generate(4, do_sample=False, eos_token_id=first[:1].tolist())):
            if step == 1:
                stream.save(tmp_path / "text")
                assert stream._ended[0]
                assert torch.equal(Stream.load(model, tmp_path / "text")._ended, stream._ended)


class Interrupting(transformers.generation.BaseStreamer):
    """Ctrl-C between the feeding of a token and its yield."""

    def put(self, value):
        raise KeyboardInterrupt

    def end(self):
        pass


def test_what_an_interrupt_left_is_yielded_first(tmp_path):
    model = made("llama")
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(ids_of(2, 12))
        copied = stream.fork(0, 1), stream.fork(1, 1)  # they choose the same, and are not interrupted
        with pytest.raises(KeyboardInterrupt):
            next(stream.generate(5, do_sample=False, streamer=Interrupting()))
        stream.save(tmp_path / "text")
        loaded, forks = Stream.load(model, tmp_path / "text"), stream.fork(1, 3)
        expected = torch.stack(list(stream.generate(5, do_sample=False)))
        assert expected[0].tolist() == [int(next(x.generate(1, do_sample=False))) for x in copied]
        assert torch.equal(torch.stack(list(loaded.generate(5, do_sample=False))), expected)
        assert torch.equal(torch.stack(list(forks.generate(5, do_sample=False))), expected[:, [1, 1, 1]])


def test_an_answer_that_is_not_fed_yet(tmp_path):
    """`generate` over a loaded cache takes the history, and new ids alone, as over the first one."""
    model, ids = made("llama"), ids_of(2, 12)
    with patch(model, S, W):
        cache = SinkCache(model)
        text = model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
        cache.save(tmp_path / "text")
        for more in (torch.cat((text, ids_of(2, 5)), dim=1), ids_of(2, 5)):
            expected, found = (
                model.generate(more, past_key_values=x, max_new_tokens=2 * C, do_sample=False)
                for x in (SinkCache.load(model, tmp_path / "text"), copy.deepcopy(cache))
            )
            assert torch.equal(found, expected)


PROCESS = """
import sys, torch, transformers
from sinkattn import SinkCache, Stream, patch
folder, S, W = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
patch(model, S, W)
cache, stream = SinkCache.load(model, folder + "/cache"), Stream.load(model, folder + "/stream")
ids = torch.load(folder + "/ids.pt")
with torch.no_grad():
    logits = model(ids, past_key_values=cache).logits
sampled = torch.stack(list(stream.generate(30, do_sample=True)))
torch.save((logits, sampled), folder + "/found.pt")
"""


@pytest.mark.parametrize("name", ["falcon_h1"])  # with rings and states
def test_another_process(name, tmp_path):
    made(name).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, more = ids_of(2, 2 * C), ids_of(2, 9)
    torch.save(more, tmp_path / "ids.pt")
    with patch(model, S, W), torch.no_grad():
        cache, stream = SinkCache(model), Stream(model)
        model(ids, past_key_values=cache)
        stream.append(ids)
        cache.save(tmp_path / "cache")
        stream.save(tmp_path / "stream")
        expected = model(more, past_key_values=cache).logits, torch.stack(list(stream.generate(30, do_sample=True)))
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path), str(S), str(W)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for x, y in zip(torch.load(tmp_path / "found.pt"), expected, strict=True):
        assert torch.equal(x, y)


def test_a_pickled_cache_says_what_to_do_instead():
    model = made("llama")
    with patch(model, S, W), torch.no_grad():
        cache = SinkCache(model)
        model(ids_of(1, 5), past_key_values=cache)
        pickled = pickle.dumps(cache)
    with pytest.raises(pickle.UnpicklingError, match="cache.save"):
        pickle.loads(pickled)


def test_nothing_to_save(tmp_path):
    model = made("llama")
    with patch(model, S, W), torch.no_grad():
        for empty in (SinkCache(model), Stream(model)):
            with pytest.raises(ValueError, match="is empty"):
                empty.save(tmp_path / "text")
        with pytest.raises(ValueError, match="is empty"):
            SinkCache(model).repeat(2)
        cache = SinkCache(model)
        model(ids_of(1, 5), past_key_values=cache)
        cache.is_torn = True
        for call in (lambda: cache.save(tmp_path / "text"), lambda: cache.repeat(2)):
            with pytest.raises(ValueError, match="torn"):
                call()
        assert not list(tmp_path.iterdir())
        with pytest.raises(FileNotFoundError):
            SinkCache.load(model, tmp_path / "text")
    with pytest.raises(ValueError, match="needs a patched model"):
        Stream.load(model, tmp_path / "text")


@pytest.mark.gpu
def test_from_a_gpu_and_back(tmp_path):
    """Sampled text goes on there to the bit; on the CPU greedy text goes on as the oracle says; rows come and go."""
    model, plain = made("llama").to(GPU), made("llama")
    ids = ids_of(2, 3 * C)
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(ids)
        for _ in stream.generate(5, do_sample=True):
            pass
        stream.save(tmp_path / "text")
        expected = torch.stack(list(stream.generate(2 * C, do_sample=True)))
        loaded = Stream.load(model, tmp_path / "text")
        assert torch.equal(torch.stack(list(loaded.generate(2 * C, do_sample=True))), expected)
        loaded, texts = Stream.load(model, tmp_path / "text"), []
        for row in (1, 0):
            texts.append(loaded.take([row]))
            assert all(x.is_pinned() for x in texts[-1].tensors.values())
        for row in (1, 0):
            loaded.put(texts.pop(0), [row])
        alone = Stream.load(model, tmp_path / "text")
        for found, same in zip(loaded.generate(C, do_sample=False), alone.generate(C, do_sample=False), strict=True):
            assert torch.equal(found, same)
    cpu = made("llama")
    with patch(cpu, S, W):
        loaded = Stream.load(cpu, tmp_path / "text")
        held = [row.tolist() for row in loaded.cache.rows.last(5)]
        texts = [row.tolist() + last for row, last in zip(ids, held, strict=True)]
        for step in loaded.generate(C, do_sample=False):
            for text, token in zip(texts, step.tolist(), strict=True):
                logits = streaming_logits(plain, torch.tensor([text]), S, W)[0, -1]
                assert logits.max() - logits[token] < 1e-3
                text.append(token)


# ------------------------------------------------------------------------------------------------------ fork and moves


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1"])
def test_forks_go_their_own_ways(name):
    """Each is what it would be alone, by the oracle, and so is the Stream that they came from."""
    model, plain, texts = made(name), made(name), [x.tolist() for x in ids_of(2, 2 * C)]
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(texts)
        with pytest.raises(ValueError, match="n=0"):
            stream.fork(0, 0)
        with pytest.raises(ValueError, match="rows="):
            stream.fork(2, 1)
        forks, own = stream.fork(1, 3), [list(texts[1]) for _ in range(3)]
        assert forks.lengths.tolist() == [2 * C] * 3
        new = ids_of(3, 3)
        forks.append(new)
        for text, more in zip(own, new.tolist(), strict=True):
            text += more
        for one, held in ((forks, own), (stream, texts)):
            for ids in one.generate(C, do_sample=True):
                for row, token in enumerate(ids.tolist()):
                    held[row].append(token)
            for row, text in enumerate(held):
                expected = streaming_logits(plain, torch.tensor([text]), S, W)[0, -1]
                assert relative_error(one._logits[row], expected) < 1e-4


def test_repeat():
    model, ids, more = made("qwen3"), ids_of(2, 2 * C), ids_of(6, C)
    with patch(model, S, W), torch.no_grad():
        cache = SinkCache(model)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="n=0"):
            cache.repeat(0)
        many = cache.repeat(3)
        found = model(more, past_key_values=many).logits
        assert cache.lengths.tolist() == [2 * C] * 2 and many.lengths.tolist() == [3 * C] * 6
        expected = SinkCache(model)
        model(ids.repeat_interleave(3, dim=0), past_key_values=expected)
        assert torch.equal(found, model(more, past_key_values=expected).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1"])
def test_texts_that_were_away(name):
    """Taken out of some rows and put into others, while these held other texts: greedy text as if they had stayed."""
    model = made(name)
    with patch(model, S, W, slack=SLACK):
        texts = [ids_of(1, n) for n in (3, C, 2 * C, 3 * C + 1)]
        alone = []
        for text in texts:
            stream = Stream(model)
            stream.append(text)
            alone.append([int(x) for x in stream.generate(4 * C, do_sample=False)])
        stream, away, found = Stream(model), {}, {i: [] for i in range(4)}
        stream.append(*padded(5, 5))
        for i, text in enumerate(texts):
            stream.reset([i % 2])
            stream.append(text, rows=[i % 2])
            away[i] = stream.take([i % 2])
            assert len(away[i]) == 1 and away[i].nbytes > 0 and stream._waiting >= {i % 2}
        for turn in range(24):
            pair = random.sample(range(4), 2)
            rows = random.sample(range(2), 2)
            for i, row in zip(pair, rows, strict=True):
                stream.put(away.pop(i), [row])
            if turn == 12 and name != "falcon_h1":
                stream.rewind(0)
            for ids in stream.generate(random.randint(1, 6), do_sample=False):
                for i, row in zip(pair, rows, strict=True):
                    found[i].append(int(ids[row]))
            away |= {i: stream.take([row]) for i, row in zip(pair, rows, strict=True)}
            with pytest.raises(ValueError, match="an empty prompt"):
                stream.generate(1)
        for i in range(4):
            assert len(found[i]) > 0 and found[i][: 4 * C] == alone[i][: len(found[i])]


def test_put_into_a_new_stream():
    """It gets as many rows; texts are not written, and can be put again."""
    model = made("llama")
    with patch(model, S, W):
        stream, empty = Stream(model), Stream(model)
        stream.append(*padded(20, 3, 7))
        expected = stream.fork(2, 1)
        texts = stream.take([2, 0])
        with pytest.raises(ValueError, match="rows="):
            empty.put(texts, [0, 1])
        with pytest.raises(TypeError, match="take"):
            empty.put("text")
        empty.put(texts)
        assert empty.lengths.tolist() == [7, 20]
        again = Stream(model)
        tokens = list(empty.generate(C, do_sample=False))
        again.put(texts)
        assert all(torch.equal(x, y) for x, y in zip(tokens, again.generate(C, do_sample=False), strict=True))
        assert [int(x[0]) for x in tokens] == [int(x) for x in expected.generate(C, do_sample=False)]
        with pytest.raises(ValueError, match="2 texts, for 3 rows"):
            stream.put(texts)
        stream.put(texts, [1, 2])
        assert stream.lengths.tolist() == [0, 7, 20] and stream._waiting == {0}


@torch.no_grad()
def test_a_text_with_pictures(tmp_path):
    """Their places go with it: what comes behind, pictures too, stands where it would have stood."""
    model = vision_model("qwen2_5_vl")
    shown, later = Shown(5, "wide", 12), Shown(7, "tall", 2 * C)
    with patch(model, S, W):
        cache = SinkCache(model)
        model(shown.ids, past_key_values=cache, **shown.pictures)
        cache.save(tmp_path / "text")
        loaded = SinkCache.load(model, tmp_path / "text")
        assert loaded.has_places and loaded.top.tolist() == cache.top.tolist() != [shown.ids.shape[1] - 1]
        for more in (later, Shown(2 * C)):
            expected, found = (model(more.ids, past_key_values=x, **more.pictures).logits for x in (cache, loaded))
            assert torch.equal(found, expected)


# -------------------------------------------------------------------------------------------------- what does not fit


def saved_texts(tmp_path: Path) -> tuple:
    """A patched model, and the paths of a cache and a stream of it, beyond its window."""
    model = made("gemma3")
    patch(model, S, W, slack=SLACK)
    cache, stream, ids = SinkCache(model), Stream(model), ids_of(2, 2 * C)
    with torch.no_grad():
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    stream.append(ids)
    cache.save(tmp_path / "cache")
    stream.save(tmp_path / "stream")
    return model, tmp_path / "cache", tmp_path / "stream"


THETA = dict(rope_type="default", rope_theta=20000.0)
OTHERS = {
    "sinks": (dict(), dict(sink_size=3), "sink_size is 4, the model's 3"),
    "window": (dict(), dict(window_size=9), "window_size is 10, the model's 9"),
    "slack": (dict(), dict(slack=4), "slack is 5, the model's 4"),
    "layers": (dict(num_hidden_layers=3, layer_types=None), dict(), "num_hidden_layers is 4, the model's 3"),
    "heads": (dict(num_key_value_heads=1), dict(), r"keys.0.0 of a row is \(2, 11, 16\)"),
    "dims": (dict(head_dim=32), dict(), "dims is 16, the model's 32"),
    "own window": (dict(sliding_window=5), dict(), "rings 0.0 own_window is 6, the model's 5"),
    "dtype": (dict(), dict(), "float32, the model's .* in torch.bfloat16"),
    "vocabulary": (dict(vocab_size=40), dict(), "from -1 to 39|logits of a row"),
    "frequencies": (dict(rope_parameters=dict.fromkeys(SLIDING, THETA)), dict(), "rotation frequencies 0 is"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_other_models_and_sizes(what, tmp_path):
    """The error says what differs, and the prefill and backend do not matter."""
    settings, sizes, message = OTHERS[what]
    _, *paths = saved_texts(tmp_path)
    model = made("gemma3", **settings)
    if what == "dtype":  # and the frequencies stay
        for x in model.parameters():
            x.data = x.data.bfloat16()
    with patch(model, **{**dict(sink_size=S, window_size=W, slack=SLACK), **sizes}):
        for kind, path in zip((SinkCache, Stream), paths, strict=True):
            with pytest.raises(ValueError, match=message):
                kind.load(model, path)
    model = made("gemma3")
    with patch(model, S, W, slack=SLACK, backend="reference", fuse="none"):
        for kind, path in zip((SinkCache, Stream), paths, strict=True):
            kind.load(model, path)


def test_texts_of_another_model():
    one, other = made("llama"), made("qwen2")
    with patch(one, S, W), patch(other, S, W):
        streams = [Stream(one), Stream(other)]
        for stream in streams:
            stream.append(ids_of(2, 9))
        texts, before = streams[0].take([0]), copy.deepcopy(streams[1].cache)
        for stream in (streams[1], Stream(other)):
            with pytest.raises(ValueError, match="model_type is llama, the model's qwen2"):
                stream.put(texts, [1] if stream is streams[1] else None)
        assert torch.equal(streams[1].cache.rows.digest, before.rows.digest)
        assert [len(x) for x in streams[1].generate(3)] == [2] * 3


def contents(path: Path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["sinkattn"]), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


FORGED = {  # what is changed in a file whose checksum is right, and what is said
    "version": (lambda about, x: about.update(version=2), "format has version 2, this sinkattn reads version 1"),
    "no version": (lambda about, x: about.clear(), "format has version None"),
    "kind": (lambda about, x: about.update(kind="page"), "another version.save"),
    "rows": (lambda about, x: about.update(rows=3), "lengths is"),
    "no rows": (lambda about, x: about.update(rows=0), "0 rows"),
    "seen": (lambda about, x: about.update(seen=float("nan")), "seen=nan"),
    "too few columns": (lambda about, x: about.update(seen=5), "lengths reaches"),
    "a true seen": (lambda about, x: about.update(seen=True), "seen=True"),
    "places": (lambda about, x: about.update(has_places=1), "has_places=1"),
    "a missing fact": (lambda about, x: about.pop("all_known"), "all_known=None"),
    "huge": (lambda about, x: about["form"].update(slack=2**60), "slack"),
    "negative": (lambda about, x: about["form"].update(sink_size=-1), "sink_size"),
    "form": (lambda about, x: about["form"].update(rings=[]), "do not fit this model: rings"),
    "ring": (lambda about, x: about["form"]["rings"]["0.0"].update(rotation=None), "rings 0.0 rotation is None"),
    "lengths": (lambda about, x: x["lengths"].fill_(-1), "lengths reaches from -1"),
    "floats": (lambda about, x: x.update(lengths=x["lengths"].float().fill_(float("nan"))), "in torch.float32, not"),
    "peak": (lambda about, x: x["peak"].fill_(-7), "peak reaches"),
    "ids": (lambda about, x: x["ids"][0].fill_(97), "ids reaches from .* to 97, not from -1 to 96"),
    "low ids": (lambda about, x: x["ids"][1].fill_(-2), "ids reaches from -2"),
    "fewer ids": (lambda about, x: x.update(ids=x["ids"][:, 1:].contiguous()), "ids is"),
    "tops": (lambda about, x: x["tops"].fill_(2**60), "tops reaches"),
    "anchor": (lambda about, x: x.update(anchor=x["anchor"][:, :2].contiguous()), "anchor is"),
    "no digest": (lambda about, x: x.pop("digest"), "it has no digest"),
    "keys": (lambda about, x: x.update({"keys.1.0": x["keys.1.0"][:, :, 1:].contiguous()}), "keys.1.0 of a row is"),
    "rows of values": (lambda about, x: x.update({"values.1.0": x["values.1.0"][:1]}), "values.1.0 is"),
    "no values": (lambda about, x: x.pop("values.2.0"), "they have no values.2.0"),
    "half": (lambda about, x: x.update({"keys.1.0": x["keys.1.0"].half()}), "keys.1.0 of a row is .* torch.float16"),
}  # fmt: skip
FORGED_STREAM = {
    "ended": (lambda about, x: x["ended"].view(torch.uint8).fill_(2), "ended reaches from 2"),
    "no waiting": (lambda about, x: x.pop("waiting"), "it has no waiting"),
    "logits": (lambda about, x: x.update(logits=x["logits"][:, 1:].contiguous()), "logits of a row is"),
    "no logits": (lambda about, x: x.pop("logits"), "they have no logits"),
    "generator": (lambda about, x: x.pop("generator"), "no state of a random generator"),
    "short generator": (lambda about, x: x.update(generator=x["generator"][:9]), "torch's generator can take"),
    "late": (lambda about, x: x.update({"late.ids": x["lengths"] * 0}), "it has no late.fed"),
}  # fmt: skip
FORGED_CACHE = {
    "unfed": (lambda about, x: x["unfed.ids"].fill_(-1), "unfed.ids reaches"),
    "no columns": (lambda about, x: about.update(columns=0), "columns=0"),
    "fractions": (lambda about, x: about.update(columns=1.5), "columns=1.5"),
}  # fmt: skip


def test_what_cannot_be_right(tmp_path):
    """Whatever the checksum says, every tensor and entry is looked at."""
    model, *paths = saved_texts(tmp_path)
    for kind, path, more in zip((SinkCache, Stream), paths, (FORGED_CACHE, FORGED_STREAM), strict=True):
        for what, (change, message) in {**FORGED, **more}.items():
            about, tensors = contents(path)
            change(about, tensors)
            text = json.dumps(about)
            metadata = {"sinkattn": text, "crc32": saved._checksum(text, tensors)}
            safetensors.torch.save_file(tensors, tmp_path / "forged", metadata)
            with pytest.raises(ValueError, match=message):
                kind.load(model, tmp_path / "forged")
                pytest.fail(what)
    for kind, path, message in ((SinkCache, paths[1], "Stream.load"), (Stream, paths[0], "SinkCache.load")):
        with pytest.raises(ValueError, match=message):
            kind.load(model, path)


def test_foreign_files(tmp_path):
    model, *_ = saved_texts(tmp_path)
    model.save_pretrained(tmp_path / "model")
    torch.save({"x": torch.zeros(3)}, tmp_path / "torch")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("It was a dark and stormy night.")
    for name in ("model/model.safetensors", "torch", "empty", "text"):
        for kind in (SinkCache, Stream):
            with pytest.raises(ValueError, match=f"{tmp_path / name} holds no texts that can go on"):
                kind.load(model, tmp_path / name)
    with pytest.raises(OSError):
        Stream.load(model, tmp_path)


def test_damaged_files(tmp_path, monkeypatch):
    """200 files with bytes flipped, cut off, left out or put in: a ValueError of one line, or the very same text."""
    model, path = saved_texts(tmp_path)[::2]
    whole, (about, expected) = path.read_bytes(), contents(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    monkeypatch.setattr(
        Stream, "_fill", lambda self, texts: texts.check_fits(self.cache.plan, {}) or loaded.append(texts)
    )
    loaded, refused = [], 0
    for case in range(200):
        data, how = bytearray(whole), case % 5
        at = random.randrange(header if how < 3 else len(whole))
        if how in (0, 3):
            data[at] ^= 1 << random.randrange(8)
        elif how == 1:
            data[at] = random.choice(b'0123456789",:{}[]\x00\xff ')
        elif how == 2:
            data = data[:at] if case % 2 else data[: random.randrange(len(whole))]
        else:
            del data[at : at + random.randint(1, 9)]
        if bytes(data) == whole:
            continue
        (tmp_path / "damaged").write_bytes(data)
        try:
            Stream.load(model, tmp_path / "damaged")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error).strip() and len(str(error)) < 500
        else:  # a blank of the header
            assert loaded[-1].about == about and loaded[-1].tensors.keys() == expected.keys()
            assert all(torch.equal(x, expected[name]) for name, x in loaded[-1].tensors.items())
    assert refused > 150


# ------------------------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, safetensors.SafetensorError])
def test_a_crash_leaves_the_old_file(where, error, tmp_path, monkeypatch):
    model, _, path = saved_texts(tmp_path)
    before, stream = path.read_bytes(), Stream.load(model, path)
    for _ in stream.generate(3):
        pass

    def crash(*arguments):
        if where == "save_file":
            Path(arguments[1]).write_bytes(b"half")
        raise error("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(*((safetensors.torch, where) if where == "save_file" else (os, where)), crash)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else (OSError, error)):
            stream.save(path)
    assert path.read_bytes() == before and sorted(x.name for x in tmp_path.iterdir()) == ["cache", "stream"]
    stream.save(path)
    assert Stream.load(model, path).lengths.tolist() == stream.lengths.tolist()
    with pytest.raises(FileNotFoundError, match="nowhere/text"):
        stream.save(tmp_path / "nowhere" / "text")


def test_another_vocabulary(tmp_path):
    model = tiny("llama")
    with patch(model, S, W), torch.no_grad():
        text = SinkCache(model)
        model(torch.tensor([[5, 96, 7]]), past_key_values=text)
        text.save(tmp_path / "text")
    with patch(tiny("llama", vocab_size=90), S, W) as handle, pytest.raises(ValueError, match="embeds 90 ids"):
        SinkCache.load(handle.model, tmp_path / "text")
