"""The cache by itself: the ids that it keeps, its copies, and models that it does not serve."""

import copy
import dataclasses
import functools
import gc
import io
import pickle
import subprocess
import sys

import pytest
import torch

from helpers import DEVICES, plain, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, patch
from sinkattn.agreement import BASE
from sinkattn.rows import Rows

S, W = 3, 6


@pytest.fixture
def model():
    model = copy.deepcopy(plain())
    with patch(model, S, W), torch.no_grad():
        yield model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("sinks", "window"), [(4, 10), (0, 5), (6, 2), (5, 1), (1, 1)])
def test_ids_by_slot(model, sinks, window, device):
    """Chunks of any size, padded on the left, known or not: the first S and last W of a list, and a digest of all."""
    plan = dataclasses.replace(model._sinkattn.plan, sink_size=sinks, window_size=window)
    rows, texts = Rows(plan, 3, torch.empty(0, device=device).device), [[], [], []]
    for step in range(12):
        tokens = int(torch.randint(1, 2 * (sinks + window), ())) if step % 3 else 1
        counts = None if step % 4 == 0 else torch.randint(0, tokens + 1, (3,))
        ids = None if step in (6, 7) else random_ids(3, tokens)
        fed = ids if step % 2 or ids is None else ids.int()
        fed, taken = (None if x is None else x.to(device) for x in (fed, counts))
        rows.take(fed, tokens, taken, None)
        for i, text in enumerate(texts):
            new = [-1] * tokens if ids is None else ids[i].tolist()
            text += new[tokens - (tokens if counts is None else int(counts[i])) :]
        held, at = rows.known()
        for i, text in enumerate(texts):
            first, oldest = max(sinks, 3), len(text) + 1 - rows.ring_size
            kept = {p: text[p] for p in range(len(text)) if p < first or p >= oldest}
            assert {int(p): int(x) for p, x in zip(at[i], held[i], strict=True) if p >= 0} == {
                p: x for p, x in kept.items() if x >= 0
            }
            digest = functools.reduce(lambda d, x: (d * BASE + x) % 2**64, text, 0)
            assert int(rows.digest[i]) % 2**64 == digest
    assert rows.ring_size > window + plan.slack and rows.ids.shape == (3, max(sinks, 3) + rows.ring_size + 1)
    rows.forget(torch.tensor([1], device=device))
    assert rows.lengths.tolist() == [len(texts[0]), 0, len(texts[2])] and (rows.known()[1][1] == -1).all()


class _Step:
    """Stands for a captured step."""


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), "torch.save"])
@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_a_copy_is_a_cache_of_its_own(name, how):
    """Also when the rows of the first one serve another cache, and in inference mode."""
    model = copy.deepcopy(plain(name))
    with patch(model, S, W), torch.no_grad():
        ids, more, cache = random_ids(2, 14), random_ids(2, 5), SinkCache(model)
        model(ids, past_key_values=cache)
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(cache, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        else:
            with torch.inference_mode(how is not copy.copy):
                copied = how(cache)
        cache.rows.captured = _Step()
        del cache
        gc.collect()
        other = SinkCache(model)
        model(random_ids(2, 9), past_key_values=other)
        found = torch.cat([model(x, past_key_values=copied).logits for x in more.split(1, dim=1)], dim=1)
        for row in range(2):
            expected = streaming_logits(plain(name), torch.cat((ids, more), dim=1)[row : row + 1], S, W)[:, 14:]
            assert relative_error(found[row : row + 1], expected) < 1e-4
        assert copied.seen == 19


def test_a_pickled_cache_of_another_process(model, tmp_path):
    cache = SinkCache(model)
    model(random_ids(1, 5), past_key_values=cache)
    (tmp_path / "cache").write_bytes(pickle.dumps(cache))
    script = f"import pickle, sinkattn; pickle.loads(open({str(tmp_path / 'cache')!r}, 'rb').read())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UnpicklingError: this SinkCache belongs to a model that was patched in another process" in done.stderr
    for gone in (copy.deepcopy(model), copy.deepcopy(model)):
        gone._sinkattn.remove()  # a copy's end is not that of the model
        assert pickle.loads((tmp_path / "cache").read_bytes()).seen == 5
    model._sinkattn.remove()
    with pytest.raises(pickle.UnpicklingError, match="is patched no more"):
        pickle.loads((tmp_path / "cache").read_bytes())


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_a_model_that_is_not_patched(name):
    """Fresh or with a text, of this model or another: refused before anything of the cache is changed."""
    model, other, ids = copy.deepcopy(plain(name)), plain(name), random_ids(1, 12)
    with patch(model, S, W), torch.no_grad():
        used, fresh, more = SinkCache(model), SinkCache(model), random_ids(1, 4)
        model(ids, past_key_values=used)
        before = [x.clone() for x in used.rows.tensors()]
        for cache in (used, fresh):
            for given in (more, more[:, :1]):
                with pytest.raises(RuntimeError, match="serves the model that sinkattn.patch"):
                    other(given, past_key_values=cache)
        assert all(map(torch.equal, before, used.rows.tensors()))
        with pytest.raises(ValueError, match="needs a patched model"):
            SinkCache(other)
    with pytest.raises(RuntimeError, match="serves the model that sinkattn.patch"):
        model.generate(torch.cat((ids, more), dim=1), past_key_values=used, max_new_tokens=3)
    with patch(model, S, W), pytest.raises(ValueError, match="earlier patch"):
        model(more, past_key_values=used)
