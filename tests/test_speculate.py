"""A Stream whose tokens are proposed, by a draft or from its own text: the text without proposals, row by row."""

import types

import pytest
import torch
from transformers import LogitsProcessorList

import real
from helpers import left_padded, random_ids
from oracle import streaming_logits
from sinkattn import SinkCache, Stream, patch
from sinkattn.choice import Choice
from sinkattn.speculate import Rounds
from tiny import tiny

S, W = 4, 30
GOES_ON = dict(repetition_penalty=1.3)  # so that it does not go in circles


def noisy(noise: float, name: str = "llama"):
    """The same weights every time, but for noise."""
    with torch.random.fork_rng():
        model = tiny(name, pad_token_id=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


@pytest.fixture
def model():
    model = noisy(0)
    with patch(model, S, W):
        yield model


@pytest.fixture(params=["lookup", "another", "itself", "one at a time"])
def proposed(request):
    """What generate is told."""
    if request.param == "lookup":
        yield dict(prompt_lookup_num_tokens=3)
        return
    draft = noisy(0 if request.param == "itself" else 0.003)
    with patch(draft, S, W if request.param == "itself" else 20, slack=5):
        yield dict(draft=draft, num_assistant_tokens=1 if request.param == "one at a time" else 5)


def begun(model, ids, mask=None) -> Stream:
    stream = Stream(model)
    stream.append(ids, mask)
    return stream


def rows_of(steps) -> list[list[int]]:
    """The tokens of each row, of steps with -1 behind them."""
    found = torch.cat(list(steps), dim=1)
    return [row[row >= 0].tolist() for row in found]


def until(row: list[int], ends) -> list[int]:
    """Up to the first of some tokens, with it."""
    return row[: next((i + 1 for i, x in enumerate(row) if x in ends), len(row))]


@pytest.mark.parametrize("ends", [[], [3, 50, 71]])
def test_the_text_without_proposals(model, proposed, ends):
    """Greedy, rows of different lengths and ends, beyond the wrap; then both go on, with and without proposals."""
    ids, mask = left_padded(random_ids(3, 20))
    alone, helped = begun(model, ids, mask), begun(model, ids, mask)
    for tokens in (100, 7):
        asked = dict(**GOES_ON, eos_token_id=ends)
        plain = torch.stack(list(alone.generate(tokens, **asked)), dim=1)
        expected = [until(row, ends) for row in plain.tolist()]
        steps = list(helped.generate(tokens, **proposed, **asked))
        assert rows_of(steps) == expected
        if proposed.get("num_assistant_tokens") == 5 and not ends and tokens == 100:
            assert len(steps) < 100 if "draft" in proposed else True
        assert torch.equal(helped.lengths, alone.lengths)
        more = random_ids(3, 4)
        alone.append(more)
        helped.append(more)
    assert torch.equal(torch.stack(list(helped.generate(20))), torch.stack(list(alone.generate(20))))


def test_a_draft_that_is_the_model_is_right(model):
    ids, draft = random_ids(2, 20), noisy(0)
    with patch(draft, S, W):
        steps = list(begun(model, ids).generate(100, draft=draft, num_assistant_tokens=4))
    assert len(steps) == 21 and all(step.shape == (2, 5) and (step >= 0).all() for step in steps[1:-1])


def test_left_early_and_changed_meanwhile(model, proposed):
    """What was given out belongs to the text: rows that get another text, taken tokens, forks, what is appended."""
    ids = random_ids(3, 20)
    stream, told = begun(model, ids), [[], [], []]

    def read(steps, n):
        for step in (next(steps) for _ in range(n)):
            for row, new in zip(told, step.tolist(), strict=True):
                row += [x for x in new if x >= 0]

    def check(texts):
        for i, (text, found) in enumerate(zip(texts, told, strict=True)):
            other = begun(model, text[None])
            assert torch.stack(list(other.generate(len(found), **GOES_ON)), dim=1)[0].tolist() == found, i
        assert stream.lengths.tolist() == [len(text) + len(found) for text, found in zip(texts, told, strict=True)]

    steps = stream.generate(**proposed, **GOES_ON)
    read(steps, 9)
    check(ids)
    read(steps, 30)
    check(ids)
    new = random_ids(1, 11)
    stream.reset([1])
    stream.append(new, rows=[1])
    told[1] = []
    texts = [ids[0], new[0], ids[2]]
    read(steps, 12)
    check(texts)
    fork = stream.fork(0, 2)
    stream.rewind(3, rows=[2])
    told[2] = told[2][:-3]
    read(steps, 12)
    check(texts)
    text = torch.cat((ids[0], torch.tensor(told[0])))
    kept = len(ids[0]) + len(told[0]) - int(stream.lengths[0]) + int(fork.lengths[0])
    assert torch.equal(fork.cache.rows.last(10)[0], text[kept - 10 : kept])
    stream.append(random_ids(3, 2))
    assert (
        stream.lengths[:2] - torch.tensor([len(x) + len(y) for x, y in zip(texts[:2], told, strict=False)]) == 2
    ).all()


def test_max_new_tokens(model, proposed):
    for tokens in (0, 1, 2, 3, 17):
        found = rows_of(
            [torch.zeros(2, 0, dtype=torch.int64), *begun(model, random_ids(2, 9)).generate(tokens, **proposed)]
        )
        assert [len(row) for row in found] == [tokens] * 2


@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_sampling_keeps_the_distribution(model, kind):
    """The share of every token in the third place of many rows, proposed and alone."""
    rows, options = 600, dict(do_sample=True, top_k=4, temperature=1.5)
    ids = random_ids(1, 40)
    ids[:, 20:] = ids[:, :20]  # so that lookups find something
    draft = noisy(0.02)
    with patch(draft, S, W):
        how = dict(draft=draft, num_assistant_tokens=2) if kind == "draft" else dict(prompt_lookup_num_tokens=2)
        first = begun(model, ids)
        alone = torch.stack(list(first.fork(0, rows).generate(3, **options)), dim=1)
        helped = torch.tensor(rows_of(first.fork(0, rows).generate(3, **how, **options)))
    for place in range(3):
        shares = torch.stack([torch.bincount(x[:, place], minlength=97) / rows for x in (alone, helped)])
        kinds = int((shares > 0).any(0).sum())
        assert kinds > 1
        # total variation; by chance about sqrt(kinds / (pi rows))
        assert 0.5 * (shares[0] - shares[1]).abs().sum() < 3 * (kinds / (3.14 * rows)) ** 0.5 + 0.02, place


class Guesses:
    """Proposes by the same chances behind every text, or always the same id of them; (k, vocabulary)."""

    def __init__(self, chances, are_drawn):
        self.chances, self.are_drawn = chances, are_drawn

    def begin(self, target, vocabulary):
        pass

    def propose(self, first, fed):
        if not self.are_drawn:
            return self.chances.argmax(-1).expand(len(first), -1), None
        ids = torch.stack([torch.multinomial(x, len(first), replacement=True) for x in self.chances], dim=1)
        return ids, self.chances.expand(len(first), -1, -1)

    def judged(self, taken, fed):
        pass


@pytest.mark.parametrize("are_drawn", [True, False])
def test_chances_are_those_of_the_model(model, are_drawn):
    """One round of very many rows, whose model says the same behind every text: each place has its chances."""
    rows, k, vocabulary = 200_000, 3, 6
    said, guessed = (torch.randn(n, vocabulary).mul(1.5).softmax(-1) for n in (k + 1, k))
    cache = SinkCache(model)
    cache.rows = types.SimpleNamespace(lengths=torch.zeros(rows), take_back=lambda counts, most: None)
    none, all_rows = torch.zeros(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)
    choice = Choice("", True, (), 0, LogitsProcessorList())
    left, logits = torch.full((rows,), 1 << 40), torch.zeros(rows, vocabulary)
    rounds = Rounds(cache, Guesses(guessed, are_drawn), k, choice, None, left, logits, none)
    rounds.start(torch.zeros(rows, dtype=torch.int64), all_rows)
    given = rounds.next(lambda ids, mask: said.log().expand(rows, -1, -1))
    assert (given[:, 0] >= 0).all() and (given[:, k] < 0).any()
    for place in range(k + 1):
        there = given[:, place][given[:, place] >= 0]
        n = max(len(there), 1)
        shares = torch.bincount(there, minlength=vocabulary) / n
        assert n < 1000 or ((shares - said[place]).abs() < 5 * (said[place] / n).sqrt() + 1 / n).all(), place


def test_drawn_texts_are_the_models(model):
    """Sampled with a top_k of 2, every token is one of the two likeliest: proposals do not slip in."""
    draft, ids = noisy(0.05), random_ids(2, 20)
    with patch(draft, S, 20):
        found = rows_of(begun(model, ids).generate(60, draft=draft, do_sample=True, top_k=2))
    for row, new in zip(ids, found, strict=True):
        text = torch.cat((row, torch.tensor(new)))[None]
        logits = streaming_logits(noisy(0), text, S, W)[0, 19:-1]
        assert (logits.topk(2).indices == torch.tensor(new)[:, None]).any(1).all()


def test_what_does_not_fit(model):
    draft, stream = noisy(0), begun(model, random_ids(1, 9))
    with pytest.raises(ValueError, match="patched"):
        stream.generate(5, draft=draft)
    with patch(draft, S, W, slack=1):
        with pytest.raises(ValueError, match="not both"):
            stream.generate(5, draft=draft, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="takes back 3"):
            stream.generate(5, draft=draft)
        for n in (0, -1, 2.5):
            with pytest.raises(ValueError, match="at least one"):
                stream.generate(5, draft=draft, num_assistant_tokens=n)
    with pytest.raises(ValueError, match="slack=16"):
        stream.generate(5, prompt_lookup_num_tokens=17)
    other = tiny("llama", vocab_size=103)
    with patch(other, S, W), pytest.raises(ValueError, match="vocabulary of 103"):
        next(stream.generate(5, draft=other))
    dense = noisy(0)
    with patch(dense, S, W, prefill="dense"), pytest.raises(ValueError, match="prefill='dense'"):
        begun(dense, random_ids(1, 9)).generate(5, prompt_lookup_num_tokens=3)
    assert len(list(stream.generate(5))) == 5


def test_interrupted_in_a_round(model, monkeypatch):
    """Nothing is known of what stands in the cache then: it says so until it is reset."""
    stream = begun(model, random_ids(1, 9))
    steps = stream.generate(prompt_lookup_num_tokens=3)
    next(steps)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("sinkattn.speculate.Rounds._judge", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        next(steps)
    with pytest.raises(ValueError, match="interrupted"):
        stream.append(random_ids(1, 3))
    stream.reset()
    stream.append(random_ids(1, 3))
    assert len(list(stream.generate(5))) == 5


@pytest.mark.real
@pytest.mark.slow
def test_smollm2():
    """Its own draft with a smaller window over the same weights; and its own text."""
    import copy

    real.needed()
    model = real.real_model(torch.float32)
    draft = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    ids = real.prose(60)
    with patch(model, 4, 60), patch(draft, 4, 28):
        expected = torch.stack(list(begun(model, ids).generate(40)), dim=1).tolist()
        for how in (dict(draft=draft, num_assistant_tokens=3), dict(prompt_lookup_num_tokens=3)):
            steps = list(begun(model, ids).generate(40, **how))
            assert rows_of(steps) == expected
