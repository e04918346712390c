"""Rows that share their sinks: the text of rows that have their own, in less memory, whatever is done to them."""

import copy
import pickle

import pytest
import torch

import real
from helpers import GPU, left_padded, plain, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, Stream, ops, patch, rows
from sinkattn.rollback import take_back
from tiny import FAMILIES, ROPES, tiny

S, W, SLACK = 70, 20, 5
ALONE = ("dynamic", "longrope", "cohere2", "gemma2", "gemma3", "gpt_oss", "mistral-sliding")
NEAR = dict(rtol=2e-5, atol=2e-5)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """As if the few tokens of a test were worth it."""
    monkeypatch.setattr(rows, "SHARED", S)


def made(name: str, **more):
    with torch.random.fork_rng():
        return tiny(name, **{"max_position_embeddings": 1024, **more} if name not in ROPES else more)


def prompted(model, tokens: int = S + 5) -> SinkCache:
    """A cache of one row, longer than its sinks."""
    cache = SinkCache(model)
    model(random_ids(1, tokens, model.device), past_key_values=cache)
    return cache


@pytest.mark.parametrize("name", sorted({*FAMILIES, *ROPES, "mistral-sliding"}))
def test_the_oracles_text(name):
    """Of every row, in steps of one token and of several, padded, past the wrap. Rows of models whose frequencies vary
    or that have layers without sinks do not share."""
    model, ids = made(name), random_ids(1, S + 5)
    mine, mask = left_padded(random_ids(3, 3 * W))
    with patch(model, S, W, slack=SLACK), torch.no_grad():
        one = SinkCache(model)
        model(ids, past_key_values=one)
        cache = one.repeat(3)
        begin, found = 0, []
        for size in (2 * W, 1, 1, 4, 1, W - 7):
            piece, there = mine[:, begin : begin + size], mask[:, begin : begin + size]
            found.append(model(piece, past_key_values=cache, attention_mask=there).logits)
            begin += size
        found, shares = torch.cat(found, dim=1), cache.shares_sinks
        assert cache.lengths.tolist() == [S + 5 + int(row.sum()) for row in mask]
    for row in range(3):
        text = torch.cat((ids, mine[row : row + 1, mask[row].bool()]), dim=1)
        expected = streaming_logits(made(name), text, S, W)[:, S + 5 :]
        assert relative_error(found[row, mask[row].bool()], expected[0]) < 1e-4
    assert shares == (name not in ALONE)


def test_memory():
    """Sinks once and rings per row; who copies a copy copies no sinks."""
    with patch(plain(), S, W, slack=SLACK), torch.no_grad():
        cache = prompted(plain())
        of_one = cache.nbytes // (S + W + SLACK)  # bytes of a token
        many = cache.repeat(9)
        assert many.shares_sinks and many.nbytes == of_one * (S + 9 * (W + SLACK))
        sinks = [ring.shared.keys.data_ptr() for ring in many.rings.values()]
        for other in (many.repeat(2), many.picked(torch.tensor([3, 1])), copy.copy(many), copy.deepcopy(many)):
            assert other.shares_sinks and [ring.shared.keys.data_ptr() for ring in other.rings.values()] == sinks
        assert pickle.loads(pickle.dumps(many)).nbytes == many.nbytes


def test_sinks_are_never_copied_for_each_row(monkeypatch):
    """Nor for a moment: that would be the memory that sharing saves."""
    copied, select = [], torch.Tensor.index_select
    with patch(plain(), S, W, slack=SLACK), torch.no_grad():
        cache = prompted(plain())
        monkeypatch.setattr(torch.Tensor, "index_select", lambda *a: copied.append(select(*a)) or copied[-1])
        cache.repeat(9)
        assert {x.shape[2] for x in copied if x.dim() == 4} == {W + SLACK}


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smollm2(dtype):
    """In half precision about as near to float32 as with sinks of their own, past the wrap."""
    real.needed()
    ids, new = real.prose(200), real.prose(600)[:, 200:].view(4, 100)

    def read(model, least):
        with patch(model, 128, 64), torch.no_grad(), pytest.MonkeyPatch.context() as patched:
            patched.setattr(rows, "SHARED", least)
            cache = SinkCache(model)
            model(ids, past_key_values=cache)
            cache = cache.repeat(4)
            assert cache.shares_sinks == (least == 1)
            pieces = (new[:, :90], *new[:, 90:].split(1, dim=1))
            return torch.cat([model(x, past_key_values=cache).logits[:, -1:] for x in pieces], dim=1).float()

    exact = read(real.real_model(torch.float32), 1 << 60)
    assert relative_error(read(real.real_model(torch.float32), 1), exact) < 1e-4
    own, shared = ((read(real.real_model(dtype), least) - exact).square().mean() for least in (1 << 60, 1))
    assert shared.sqrt() <= 1.2 * own.sqrt(), (own, shared)


def test_where_it_is_not_worth_it(monkeypatch):
    """Few tokens saved, a text shorter than its sinks, copies of several rows."""
    with patch(plain(), S, W), torch.no_grad():
        cache = prompted(plain())
        assert cache.repeat(2).shares_sinks and not cache.repeat(1).shares_sinks
        assert not prompted(plain(), S - 1).repeat(3).shares_sinks
        assert prompted(plain(), S).repeat(3).shares_sinks
        two = SinkCache(plain())
        plain()(random_ids(2, S + 3), past_key_values=two)
        assert not two.repeat(3).shares_sinks
        monkeypatch.setattr(rows, "SHARED", 2 * S + 1)
        assert not cache.repeat(3).shares_sinks and cache.repeat(4).shares_sinks


def same_texts(a: Stream, b: Stream, steps: int = 2 * W) -> None:
    """What two Streams say, and go on to say."""
    texts = []
    for stream in (a, b):
        texts.append(torch.stack([x for x, _ in zip(stream.generate(eos_token_id=[]), range(steps), strict=False)], 1))
    assert torch.equal(*texts)
    torch.testing.assert_close(a._logits, b._logits, **NEAR)


@pytest.fixture
def both(monkeypatch):
    """Two Streams of 4 rows, of which the first shares its sinks, with the same texts."""
    with patch(plain(), S, W, slack=SLACK):
        begun = Stream(plain())
        begun.append(random_ids(1, S + 5))
        shared = begun.fork(0, 4)
        monkeypatch.setattr(rows, "SHARED", 1 << 60)
        own = begun.fork(0, 4)
        assert shared.cache.shares_sinks and not own.cache.shares_sinks
        new, mask = left_padded(random_ids(4, W + 8))
        for stream in (shared, own):
            stream.append(new, mask)
        yield shared, own


def test_generate(both):
    same_texts(*both)


def test_turns_of_some_rows(both):
    new = random_ids(2, 30)
    for stream in both:
        stream.append(new, rows=[2, 0])
    same_texts(*both)


def test_reset_rows_begin_behind_the_sinks(both):
    """The shared tokens stay, and nothing else of the old text."""
    shared, _ = both
    with torch.no_grad():
        shared.reset([1, 3])
        assert shared.lengths.tolist()[1::2] == [S, S]
        new = random_ids(2, 40)
        shared.append(new, rows=[3, 1])
        ids = shared.cache.rows.ids[0, :S]
        assert torch.equal(shared.cache.rows.ids[1, :S], ids)
    for row, text in ((3, new[0]), (1, new[1])):
        expected = streaming_logits(unpatched(), torch.cat((ids, text))[None], S, W)[0, -1]
        torch.testing.assert_close(shared._logits[row], expected.to(shared._logits), **NEAR)
    histories = torch.cat((ids.expand(4, -1), new[[0, 1, 0, 0]]), dim=1)
    found = shared.cache.compare(histories, torch.ones_like(histories))
    assert [one.goes_on for one in found] == [False, True, False, True]


def unpatched():
    other = made("llama", num_hidden_layers=2, max_position_embeddings=plain().config.max_position_embeddings)
    other.load_state_dict(plain().state_dict())
    return other


def test_reset_of_all_forgets_the_sinks(both):
    shared, own = both
    ids = random_ids(2, 30)
    for stream in both:
        stream.reset()
        stream.append(ids) if stream is shared else None
    assert not shared.cache.shares_sinks and shared.lengths.tolist() == [30, 30]
    fresh = Stream(plain())
    fresh.append(ids)
    same_texts(shared, fresh)
    del own


def test_a_cache_that_is_reset():
    with patch(plain(), S, W), torch.no_grad():
        cache, ids = prompted(plain()).repeat(3), random_ids(2, 30)
        cache.reset()
        assert not cache.shares_sinks
        expected = plain()(ids, past_key_values=SinkCache(plain())).logits
        assert torch.equal(plain()(ids, past_key_values=cache).logits, expected)


def test_rewind_as_far_as_the_sinks(both):
    """Back to the first token behind them, which is fed again, and no further."""
    shared, own = both
    for stream in both:
        stream.rewind(SLACK, [0])
        stream.rewind([1, 4], [3, 2])
    same_texts(*both)
    shared.reset([1])
    shared.append(random_ids(1, 3), rows=[1])
    with pytest.raises(ValueError, match="row 1 can take back 2 of its 73 tokens"):
        shared.rewind(3, [1])
    shared.rewind(2, [1])
    assert shared.lengths[1] == S + 1
    cache = shared.cache
    with pytest.raises(ValueError, match="row 1 can take back 1 "):
        take_back(cache, torch.tensor([0, 2, 0, 0]))


def test_moved_and_saved(both, tmp_path):
    """Texts outside of a cache have sinks of their own, in the one format; they fit rows that share the same."""
    shared, own = both
    texts = shared.take([1])
    assert texts.tensors["keys.0.0"].shape[2] == S + W + SLACK
    shared.put(texts, [1])
    same_texts(shared, own)
    shared.save(tmp_path / "text")
    loaded = Stream.load(plain(), tmp_path / "text")
    assert not loaded.cache.shares_sinks
    same_texts(shared, loaded)
    own.put(shared.take([0]), [2])
    other = Stream(plain())
    other.append(random_ids(1, S + 5))
    before = [x.clone() for x in shared.cache.rows.tensors()]
    with pytest.raises(ValueError, match="begin otherwise"):
        shared.put(other.take([0]), [0])
    assert all(torch.equal(x, y) for x, y in zip(before, shared.cache.rows.tensors(), strict=True))


def test_put_of_what_is_shorter(both):
    """What stands in slots that count no more is no text."""
    shared, own = both
    own.reset([0])
    ids = shared.cache.rows.ids[0, :S]
    own.append(ids[None, : S - 1], rows=[0])
    with pytest.raises(ValueError, match="shorter than the 70 sinks"):
        shared.put(own.take([0]), [1])
    assert shared.lengths.tolist() == [S + 5 + n for n in (28, 21, 14, 7)]


def test_interrupted_reset(both, monkeypatch):
    shared, _ = both

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sinkattn.stream_texts.input_device", stop)
        with pytest.raises(KeyboardInterrupt):
            shared.reset()
    shared.reset([1])
    shared.reset()
    shared.append(random_ids(2, 5))
    assert shared.lengths.tolist() == [5, 5]


def test_nothing_new_behind_the_sinks():
    """A prompt of exactly S tokens: the last of the sinks cannot be fed again, and the error says so."""
    with patch(plain(), S, W, slack=SLACK), torch.no_grad():
        cache, ids = SinkCache(plain()), random_ids(1, S)
        plain()(ids, past_key_values=cache)
        cache = cache.repeat(3)
        with pytest.raises(ValueError, match="the 70 sinks that the rows share stay"):
            plain().generate(ids.expand(3, -1), past_key_values=cache, max_new_tokens=3)
        with pytest.raises(ValueError, match="the 70 sinks that the rows share stay"):
            cache.crop(-1)
        history = torch.cat((ids.expand(3, -1), random_ids(3, 1)), dim=1)
        assert plain().generate(history, past_key_values=cache, max_new_tokens=3).shape == (3, S + 4)


def test_reordered(both):
    for stream in both:
        stream.cache.reorder_cache(torch.tensor([2, 2, 0, 1]))
        new = random_ids(1, 1).expand(4, 1)
    a, b = (plain()(new, past_key_values=stream.cache).logits for stream in both)
    torch.testing.assert_close(a, b, **NEAR)


def test_plain_generate(monkeypatch):
    """`generate` over a cache whose rows share: the history with what is new, then the new ids alone."""
    ids, new = random_ids(1, S + 5), random_ids(3, 6)
    with patch(plain(), S, W, slack=SLACK):
        texts = []
        for least in (S, 1 << 60):
            monkeypatch.setattr(rows, "SHARED", least)
            cache = SinkCache(plain())
            plain()(ids, past_key_values=cache)
            cache = cache.repeat(3)
            asked = dict(max_new_tokens=2 * W, do_sample=False, eos_token_id=None)
            history = torch.cat((ids.expand(3, -1), new), dim=1)
            texts.append(plain().generate(history, past_key_values=cache, **asked))
            texts.append(plain().generate(new[:, :4], past_key_values=cache, **asked)[:, -2 * W :])
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])


def test_what_fails_changes_nothing(monkeypatch):
    """A refused op leaves rings and lengths as they were, and the next call is right."""
    with patch(plain(), S, W, slack=SLACK), torch.no_grad():
        cache = prompted(plain()).repeat(3)
        twin = copy.copy(cache)

        def refuse(*args, **kwargs):
            raise ValueError("no")

        for name, tokens in (("attend_shared", 1), ("decode", 1), ("prefill", 7)):
            with monkeypatch.context() as patched:
                patched.setattr(ops, name, refuse)
                with pytest.raises(ValueError, match="no"):
                    plain()(random_ids(3, tokens), past_key_values=cache)
            assert not cache.is_torn
        new = random_ids(3, 4)
        assert torch.equal(plain()(new, past_key_values=cache).logits, plain()(new, past_key_values=twin).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_captured(dtype):
    """Steps are captured, new ones for new rows; the logits are about as near to float64 as with sinks of their own."""
    model = tiny("qwen3", head_dim=64, max_position_embeddings=1024).to(GPU, dtype)
    ids, new = random_ids(1, S + 5, GPU), random_ids(5, 3 * W, GPU)
    exact = copy.deepcopy(model).double()
    expected = torch.cat([streaming_logits(exact, torch.cat((ids, row[None]), 1), S, W)[:, S + 5 :] for row in new])
    errors = []
    with patch(model, S, W, slack=SLACK) as handle, torch.no_grad():
        for n in (5, 1):
            one = SinkCache(model)
            model(ids, past_key_values=one)
            cache = one.repeat(n) if n > 1 else one.picked(torch.zeros(5, dtype=torch.int64))
            assert cache.shares_sinks == (n > 1)
            found = [model(piece, past_key_values=cache).logits for piece in new.split(1, dim=1)]
            assert cache.rows.captured, handle.why_eager
            errors.append(relative_error(torch.cat(found, dim=1), expected))
    assert errors[0] <= 1.3 * errors[1], errors
