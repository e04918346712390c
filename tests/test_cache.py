"""The cache by itself: whatever is done to it, it holds the text that the test keeps, or says that it is torn."""

import copy
import dataclasses
import functools
import gc
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, Stream, patch
from sinkattn.rows import BASE, Rows
from tiny import tiny

S, W = 3, 6
C = S + W


@functools.cache
def plain(name="llama"):
    """For the oracle."""
    if name != "falcon_h1":
        return tiny(name, num_hidden_layers=2)
    config = transformers.FalconH1Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_chunk_size=16, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return transformers.FalconH1ForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def seed():
    """Fresh data every time; a failing test prints the seed, and ``SINKATTN_SEED`` repeats it."""
    plain(), plain("falcon_h1")
    value = int(os.environ.get("SINKATTN_SEED") or torch.seed() % 2**32)
    torch.manual_seed(value)
    print(f"SINKATTN_SEED={value}")


@pytest.fixture
def model():
    model = copy.deepcopy(plain())
    with patch(model, S, W), torch.no_grad():
        yield model


def random_ids(rows, tokens):
    return torch.randint(1, 97, (rows, tokens))


# What it keeps of the text.


@pytest.mark.parametrize(("sinks", "window"), [(4, 10), (0, 5), (6, 2), (5, 1), (1, 1)])
def test_ids_by_slot(model, sinks, window):
    """Chunks of any size, padded on the left, known or not: the first S and last W of a list, and a digest of all."""
    plan = dataclasses.replace(model._sinkattn.plan, sink_size=sinks, window_size=window)
    rows, texts = Rows(plan, 3, torch.device("cpu")), [[], [], []]
    for step in range(12):
        tokens = int(torch.randint(1, 2 * (sinks + window), ())) if step % 3 else 1
        counts = None if step % 4 == 0 else torch.randint(0, tokens + 1, (3,))
        ids = None if step == 7 else random_ids(3, tokens)
        positions = rows.lengths[:, None] - (0 if counts is None else tokens - counts[:, None]) + torch.arange(tokens)
        rows.remember(ids if step % 2 or ids is None else ids.int(), positions, counts)
        rows.lengths += tokens if counts is None else counts
        for i, text in enumerate(texts):
            new = [-1] * tokens if ids is None else ids[i].tolist()
            text += new[tokens - (tokens if counts is None else int(counts[i])) :]
        held, at = rows.known()
        for i, text in enumerate(texts):
            kept = {p: text[p] for p in range(len(text)) if p < sinks or p > len(text) - rows.ring_size}
            assert {int(p): int(x) for p, x in zip(at[i], held[i], strict=True) if p >= 0} == {
                p: x for p, x in kept.items() if x >= 0
            }
            digest = functools.reduce(lambda d, x: (d * BASE + x) % 2**64, text, 0)
            assert int(rows.digest[i]) % 2**64 == digest
    assert rows.ring_size > window and rows.ids.shape == (3, sinks + rows.ring_size + 1)
    rows.forget(torch.tensor([1]))
    assert rows.lengths.tolist() == [len(texts[0]), 0, len(texts[2])] and (rows.known()[1][1] == -1).all()


# Copies, and caches beyond their life.


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


# Interrupts.


class Interrupted:
    """Ctrl-C at a line of sinkattn's that runs inside, the n-th from 0. lines: how many have run."""

    def __init__(self, n=1 << 40):
        self.n, self.lines = n, 0

    def _trace(self, frame, event, arg):
        if event == "call":
            is_ours = f"{os.sep}sinkattn{os.sep}" in frame.f_code.co_filename
            # what puts a module's own forward back may be interrupted too: nothing in Python is proof against that
            return self._trace if is_ours and frame.f_code.co_name != "_standing_in" else None
        if event == "line":
            self.lines += 1
            if self.lines == self.n + 1:
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(self._before)
        return kind is KeyboardInterrupt


def anywhere(run, times=25):
    """Interrupt `run` at lines by chance, those at its end more often than others: it is given each `Interrupted`."""
    whole = Interrupted()
    run(whole)
    assert whole.lines > 20
    for n in torch.rand(times).sqrt().mul(whole.lines).int().tolist():
        run(Interrupted(n))


KINDS = {  # name of the model, prefill, tokens before, tokens of the step, chunk
    "token": ("llama", "streaming", 14, 1, None),
    "prompt": ("llama", "streaming", 14, 5, None),
    "chunks": ("llama", "streaming", 14, 9, 4),
    "first prompt": ("llama", "streaming", 0, 9, 4),
    "dense": ("llama", "dense", 14, 5, None),
    "dense token": ("llama", "dense", 14, 1, None),
    "varying frequencies": ("dynamic", "streaming", 4, 9, None),
    "state": ("falcon_h1", "streaming", 14, 1, None),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_ctrl_c_anywhere_in_a_step(kind, monkeypatch):
    """A step that is left is committed whole, or not at all, or the cache is torn and says so."""
    name, prefill, before, tokens, chunk = KINDS[kind]
    model = copy.deepcopy(plain(name))
    ids, more = random_ids(1, before + tokens), random_ids(1, 4)
    outcomes = set()
    with patch(model, S, W, prefill=prefill), torch.no_grad():
        if chunk:
            monkeypatch.setattr(sys.modules["sinkattn.runner"], "CHUNK", chunk)
        begun, ends = SinkCache(model), {}
        if before:
            model(ids[:, :before], past_key_values=begun)
        for name in ("not at all", "whole"):
            cache = copy.deepcopy(begun)
            if name == "whole":
                model(ids[:, before:], past_key_values=cache)
            ends[name] = model(more, past_key_values=cache).logits

        def run(ctrl_c):
            cache = copy.deepcopy(begun)
            with ctrl_c:
                model(ids[:, before:], past_key_values=cache)
            if cache.is_torn:
                outcomes.add("torn")
                with pytest.raises(ValueError, match="half-way"):
                    model(more, past_key_values=cache)
                cache.reset()
                assert torch.equal(model(more, past_key_values=cache).logits, model(more).logits)
            else:
                length = 0 if cache.lengths is None else cache.lengths.item()
                outcome = "whole" if length == before + tokens else "not at all"
                outcomes.add(outcome)
                assert length in (before, before + tokens) and cache.seen == length
                assert relative_error(model(more, past_key_values=cache).logits, ends[outcome]) < 1e-4

        anywhere(run, times=40)
    assert "whole" in outcomes and ("torn" in outcomes or tokens == 1)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_op_that_fails(model, error):
    """The same for what torch raises, at any op of a step."""

    class Failing(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self, n):
            super().__init__()
            self.left = n

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.left -= 1
            if self.left == 0:
                raise error
            return func(*args, **(kwargs or {}))

    ids, begun = random_ids(1, 20), SinkCache(model)
    model(ids[:, :14], past_key_values=begun)
    expected = streaming_logits(plain(), ids, S, W)[:, 14:]
    for tokens in (1, 6):
        for n in range(1, 200, 7):
            cache, failing = copy.deepcopy(begun), Failing(n)
            try:
                with failing:
                    model(ids[:, 14 : 14 + tokens], past_key_values=cache)
            except error:
                pass
            if failing.left > 0:
                break
            if not cache.is_torn:
                rest = ids[:, cache.lengths.item() :]
                if rest.numel():
                    found = model(rest, past_key_values=cache).logits
                    assert relative_error(found, expected[:, -rest.shape[1] :]) < 1e-4


def test_ctrl_c_while_rows_change(model):
    """Reordering, putting, forgetting: done, or torn."""
    ids, begun = random_ids(2, 14), SinkCache(model)
    model(ids, past_key_values=begun)
    picked = begun.picked(torch.tensor([1]))
    model(ids[:1, :3], past_key_values=picked)
    changes = (
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])),
        lambda cache: cache.put(torch.tensor([0]), picked),
        lambda cache: cache.forget(torch.tensor([0])),
        lambda cache: cache.reset(),
    )
    for change in changes:
        outcomes = set()
        whole = copy.deepcopy(begun)
        change(whole)

        def run(ctrl_c, change=change, whole=whole, outcomes=outcomes):
            cache = copy.deepcopy(begun)
            with ctrl_c:
                change(cache)
            outcomes.add(cache.is_torn)
            if not cache.is_torn:
                ends = [x.rows.tensors() for x in (begun, whole)]
                assert any(all(map(torch.equal, cache.rows.tensors(), end)) for end in ends)
            cache.reset()
            assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)

        anywhere(run, times=10)
        assert outcomes == {True, False}


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_ctrl_c_anywhere_in_a_stream(name):
    """What was yielded before and what comes after are one text, or the Stream says that it is torn until its reset."""
    model, ids = copy.deepcopy(plain(name)), random_ids(2, 12)
    outcomes, end = set(), []
    with patch(model, S, W):

        def write(stream, written, tokens):
            for token_ids in stream.generate(tokens, eos_token_id=end, do_sample=False):
                written.append(token_ids)

        def run(ctrl_c):
            stream, written = Stream(model), []
            with ctrl_c:
                stream.append(ids)
                write(stream, written, 3)
            try:
                if stream.lengths is None or not stream.lengths.any():
                    stream.append(ids)
                write(stream, written, 6 - len(written))
                outcomes.add("goes on")
            except ValueError as error:
                assert "half-way" in str(error)
                outcomes.add("torn")
                stream.reset()
                written.clear()
                stream.append(ids)
                write(stream, written, 6)
            assert torch.equal(torch.stack(written), expected)

        stream, expected = Stream(model), []
        stream.append(ids)
        write(stream, expected, 6)
        expected = torch.stack(expected)
        anywhere(run)
        end = [96]
        anywhere(run)
    assert outcomes <= {"torn", "goes on"} and outcomes


# Anything, in any order.

ROWS = st.integers(1, 3)
LENGTHS = st.integers(1, 2 * C)


@functools.lru_cache(maxsize=4096)
def logits_of(text: tuple[int, ...]):
    """(n, vocabulary), by the oracle."""
    return streaming_logits(plain(), torch.tensor([text]), S, W)[0]


@functools.cache
def patched():
    model = copy.deepcopy(plain())
    patch(model, S, W)
    return model


class OneCache(RuleBasedStateMachine):
    """One cache, and beside it the text of each row: all that was fed, and what `generate` has chosen behind it."""

    @initialize(rows=ROWS, seed=st.integers(0, 2**32 - 1))
    def begin(self, rows, seed):
        self.model = patched()
        self.cache, self.texts, self.chosen = SinkCache(self.model), [[] for _ in range(rows)], None
        torch.manual_seed(seed)

    def new(self, lengths):
        """Random texts, and the same padded on the left with a mask."""
        texts = [torch.randint(1, 97, (n,)).tolist() for n in lengths]
        width = max(lengths)
        ids = torch.tensor([[0] * (width - len(x)) + x for x in texts])
        return texts, ids, torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in texts])

    def lengths(self, data, least=1):
        return [data.draw(st.integers(least if i else 1, 2 * C)) for i in range(len(self.texts))]

    def feed(self, texts, chosen=None):
        self.texts = [held + more for held, more in zip(self.texts, texts, strict=True)]
        self.chosen = chosen

    # Moves.

    @rule(data=st.data(), known=st.booleans())
    def append(self, data, known):
        """Some rows may get nothing."""
        texts, ids, mask = self.new(self.lengths(data, least=0))
        given = {"input_ids": ids} if known else {"inputs_embeds": self.model.get_input_embeddings()(ids)}
        with torch.no_grad():
            logits = self.model(**given, attention_mask=mask, past_key_values=self.cache).logits[:, -1]
        self.feed(texts)
        for row, (text, new) in enumerate(zip(self.texts, texts, strict=True)):
            assert not new or relative_error(logits[row], logits_of(tuple(text))[-1]) < 1e-4

    @rule(data=st.data(), steps=st.integers(1, 4), how=st.sampled_from(["new", "history", "mask"]))
    def generate(self, data, steps, how):
        texts, ids, mask = self.new(self.lengths(data))
        behind = self.chosen or [[] for _ in texts]
        if how == "history" and all(self.texts) and self.cache._all_known and not self.is_blank():
            whole = [a + b + c for a, b, c in zip(self.texts, behind, texts, strict=True)]
            width = max(map(len, whole)) + data.draw(st.integers(0, 2))
            ids = torch.tensor([[0] * (width - len(x)) + x for x in whole])
            mask = (torch.arange(width) >= torch.tensor([[width - len(x)] for x in whole])).long()
        elif self.cache.seen:  # said to be new, which need not be said unless they look like the text
            width = self.cache.seen + (self.chosen is not None)
            mask = torch.cat((torch.ones(len(texts), width, dtype=torch.int64), mask), dim=1)
        options = dict(max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=None)
        found = self.model.generate(ids, attention_mask=mask, past_key_values=self.cache, **options)
        answers = found[:, ids.shape[1] :].tolist()
        self.feed([a + b + c[:-1] for a, b, c in zip(behind, texts, answers, strict=True)], [c[-1:] for c in answers])
        for text, answer in zip(self.texts, answers, strict=True):
            logits = logits_of(tuple(text))[len(text) - steps :]
            assert logits.gather(1, torch.tensor(answer)[:, None]).add(1e-3).ge(logits.amax(1, keepdim=True)).all()

    def is_blank(self):
        return all(len(set(text)) < 3 for text in self.texts)

    @precondition(lambda self: all(len(text) > 2 for text in self.texts) and self.cache._all_known)
    @rule(data=st.data())
    def edit(self, data):
        """A history with one token changed, anywhere, is refused, and nothing of it is fed."""
        row = data.draw(st.integers(0, len(self.texts) - 1))
        at = data.draw(st.integers(0, len(self.texts[row]) - 1))
        whole = [text + torch.randint(1, 97, (2,)).tolist() for text in self.texts]
        whole[row][at] = whole[row][at] % 96 + 1
        width = max(map(len, whole))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in whole])
        if not self.is_blank():
            with pytest.raises(ValueError, match="differs from the text that this SinkCache holds"):
                self.model.generate(ids, past_key_values=self.cache, max_new_tokens=1, pad_token_id=0)

    @rule(data=st.data(), rows=ROWS)
    def reorder(self, data, rows):
        if self.cache.seen:
            index = data.draw(st.lists(st.integers(0, len(self.texts) - 1), min_size=rows, max_size=rows))
            self.cache.reorder_cache(torch.tensor(index))
            self.texts = [self.texts[i] for i in index]
            self.chosen = self.chosen and [self.chosen[i] for i in index]

    @rule(data=st.data(), is_fed=st.booleans())
    def pick_and_put(self, data, is_fed):
        if self.cache.seen:
            index = data.draw(st.lists(st.integers(0, len(self.texts) - 1), min_size=1, unique=True))
            picked = self.cache.picked(torch.tensor(index))
            if is_fed:
                texts, ids, mask = self.new([data.draw(LENGTHS) for _ in index])
                with torch.no_grad():
                    self.model(ids, attention_mask=mask, past_key_values=picked)
                for i, text in zip(index, texts, strict=True):
                    self.texts[i] = self.texts[i] + text
                    if self.chosen:
                        self.chosen[i] = []
            self.cache.put(torch.tensor(index), picked)

    @rule(data=st.data())
    def forget(self, data):
        if self.cache.seen:
            row = data.draw(st.integers(0, len(self.texts) - 1))
            self.cache.forget(torch.tensor([row]))
            self.texts[row] = []
            if self.chosen:
                self.chosen[row] = []

    @rule(rows=ROWS)
    def reset(self, rows):
        self.cache.reset()
        self.texts, self.chosen = [[] for _ in range(rows)], None

    @rule(how=st.sampled_from([copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def go_on_with_a_copy(self, how):
        """And do something else to the first one."""
        first, self.cache = self.cache, how(self.cache)
        with torch.no_grad():
            self.model(random_ids(len(self.texts), 3), past_key_values=first)
        first.reset()

    @rule(data=st.data(), tokens=st.integers(1, 5), layer=st.integers(0, 1))
    def fail(self, data, tokens, layer):
        """A layer raises: the step has not been, or the cache is torn and is reset."""
        hook = self.model.model.layers[layer].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            self.model(random_ids(len(self.texts), tokens), past_key_values=self.cache)
        hook.remove()
        assert self.cache.is_torn == (tokens > 1)
        if tokens > 1:
            with pytest.raises(ValueError, match="half-way"):
                self.model.generate(random_ids(len(self.texts), 2), past_key_values=self.cache, max_new_tokens=1)
            self.reset(len(self.texts))

    # What holds after each of them.

    @invariant()
    def holds_its_text(self):
        if not hasattr(self, "cache") or not self.cache.seen:
            return
        assert self.cache.lengths.tolist() == [len(text) for text in self.texts]
        probe = torch.randint(1, 97, (len(self.texts), 1))
        with torch.no_grad():
            found = self.model(probe, past_key_values=copy.deepcopy(self.cache)).logits[:, 0]
        for row, text in enumerate(self.texts):
            assert relative_error(found[row], logits_of((*text, probe[row].item()))[-1]) < 1e-4


OneCache.TestCase.settings = settings(
    max_examples=60, stateful_step_count=13, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOneCache = OneCache.TestCase
