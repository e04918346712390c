"""A Stream whose tokens are proposed, by a draft or from its own text: the text without proposals, row by row."""

import contextlib
import itertools
import types

import pytest
import torch
from transformers import LogitsProcessorList

import real
from helpers import Stops, left_padded, random_ids
from oracle import streaming_logits
from sinkattn import SinkCache, Stream, patch
from sinkattn.choice import Choice
from sinkattn.speculate import Rounds
from test_interrupts import Interrupted
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
        assert rows_of(steps) == expected and all((step >= 0).any() for step in steps)
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
        steps = list(begun(model, random_ids(2, 9)).generate(tokens, **proposed))
        assert all((step >= 0).any() for step in steps)
        found = rows_of([torch.zeros(2, 0, dtype=torch.int64), *steps])
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

    def begin(self, target, vocabulary, may_be):
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
    zeros = torch.zeros(rows)
    cache.rows = types.SimpleNamespace(lengths=zeros, digest=zeros, take_back=lambda counts, most: None)
    none, all_rows = torch.zeros(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)
    choice = Choice("", True, (), 0, LogitsProcessorList())
    left, logits = torch.full((rows,), 1 << 40), torch.zeros(rows, vocabulary)
    rounds = Rounds(
        cache, Guesses(guessed, are_drawn), k, choice, None, left, logits, none,
        lambda ids, mask: said.log().expand(rows, -1, -1), lambda: False,
    )  # fmt: skip
    rounds.start(torch.zeros(rows, dtype=torch.int64), all_rows)
    given = rounds.next()
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
        for n in (0, -1, 2.5, True, "a"):
            with pytest.raises(ValueError, match="a whole number of tokens, at least 1"):
                stream.generate(5, draft=draft, num_assistant_tokens=n)
    with pytest.raises(ValueError, match="of a draft, and there is none"):
        stream.generate(5, num_assistant_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens=2.5"):
        stream.generate(2.5)
    for other in ("a model", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="is no patched model"):
            stream.generate(5, draft=other)
    small = tiny("llama", vocab_size=50)
    with patch(small, S, W), pytest.raises(ValueError, match="the draft has a vocabulary of 50, the model one of 97"):
        next(stream.generate(5, draft=small))
    with pytest.raises(ValueError, match="slack=16"):
        stream.generate(5, prompt_lookup_num_tokens=17)
    other = tiny("llama", vocab_size=103)
    with patch(other, S, W), pytest.raises(ValueError, match="vocabulary of 103"):
        next(stream.generate(5, draft=other))
    dense = noisy(0)
    with patch(dense, S, W, prefill="dense"), pytest.raises(ValueError, match="prefill='dense'"):
        begun(dense, random_ids(1, 9)).generate(5, prompt_lookup_num_tokens=3)
    assert len(list(stream.generate(5))) == 5


def read(steps, most: int) -> list[int]:
    """The tokens of the first steps, of one row."""
    return [x for step in itertools.islice(steps, most) for x in step.flatten().tolist() if x >= 0]


@pytest.mark.parametrize("then", ["plain", "proposed"])
def test_interrupted_anywhere(model, proposed, then):
    """By the streamer or at a line of sinkattn's: the text goes on behind what was yielded, or the Stream is torn."""
    ids, torn = random_ids(1, 9), 0
    expected = torch.stack(list(begun(model, ids).generate(120, **GOES_ON)), dim=1)[0].tolist()
    for n in [-1, -2, -3, *torch.randint(0, 3000, (12,)).tolist()]:
        stream, found = begun(model, ids), []
        streamer = Stops(-1 - n if n < 0 else 1 << 40, KeyboardInterrupt)
        steps = stream.generate(None, streamer=streamer, **proposed, **GOES_ON)
        with Interrupted(n if n >= 0 else 1 << 40), contextlib.suppress(KeyboardInterrupt):
            for step in itertools.islice(steps, 8):
                found += [x for x in step.flatten().tolist() if x >= 0]
        steps.close()
        assert streamer.ended == 1 or n >= 0
        try:
            assert stream.lengths.tolist() == [len(ids[0]) + len(found)] or n >= 0
            found += read(stream.generate(**GOES_ON, **(proposed if then == "proposed" else {})), 9)
        except ValueError as error:
            assert "interrupted half-way" in str(error) and n >= 0
            torn += 1
        assert found == expected[: len(found)], n
    assert torn < 8


def test_ended_rows_stay_ended(model, proposed):
    """Whatever else is done to the Stream meanwhile."""
    ids = random_ids(2, 9)
    text = torch.stack(list(begun(model, ids).generate(60, **GOES_ON)), dim=1)
    for at in (5, 6, 7, 8, 9):
        ends = [int(text[0, at])]
        expected = until(text[0].tolist(), ends)
        for change in (lambda x: x.cache, lambda x: x.append([[7, 8]], rows=[1]), lambda x: x.fork(1, 1)):
            stream, found = begun(model, ids), []
            for steps, step in enumerate(stream.generate(None, **proposed, **GOES_ON, eos_token_id=ends)):
                found += [x for x in step[0].tolist() if x >= 0]
                change(stream)
                if steps == 20:
                    break
            assert found == expected


def test_two_loops_in_turn(model, proposed):
    """Each goes on by its own settings, behind what the other gave."""
    ids = random_ids(1, 9)
    stream, plain = begun(model, ids), begun(model, ids)
    a, b = stream.generate(**proposed, **GOES_ON), stream.generate(**proposed, repetition_penalty=2.0)
    for turn in range(6):
        found, options = (read(a, 2), GOES_ON) if turn % 2 == 0 else (read(b, 2), dict(repetition_penalty=2.0))
        assert found == read(plain.generate(len(found), **options), len(found))
    third = stream.generate(4, **proposed)
    assert read(third, 99) == read(plain.generate(4), 4)


def test_a_refused_call_wakes_no_row(model):
    stream, found = begun(model, random_ids(2, 9)), []
    end = int(next(begun(model, stream.cache.rows.last(9)).generate(1))[0])
    for step, ids in enumerate(stream.generate(8, eos_token_id=end, pad_token_id=0)):
        found.append(int(ids[0]))
        if step == 3:
            with pytest.raises(ValueError, match="slack"):
                stream.generate(prompt_lookup_num_tokens=99)
            stream.generate(5)  # and one that never begins
    assert found == [end] + [0] * (len(found) - 1)


def test_a_draft_that_is_taken_away(model):
    """Nothing is lost of the text."""
    draft, ids = noisy(0), random_ids(1, 9)
    stream, handle = begun(model, ids), patch(draft, S, W)
    steps = stream.generate(draft=draft, **GOES_ON)
    found = read(steps, 3)
    handle.remove()
    with pytest.raises(ValueError, match="the draft is not patched any more"):
        next(steps)
    found += read(stream.generate(20, **GOES_ON), 20)
    assert found == read(begun(model, ids).generate(len(found), **GOES_ON), len(found))


def test_used_by_its_streamer(model):
    stream = begun(model, random_ids(1, 9))

    class Uses(Stops):
        def put(self, ids):
            stream.append(random_ids(1, 2))

    steps = stream.generate(prompt_lookup_num_tokens=3, streamer=Uses(0))
    with pytest.raises(ValueError, match="used by its streamer"):
        next(steps)
    assert stream.lengths.tolist() == [11] and len(list(stream.generate(5))) == 5


def test_in_inference_mode(model, proposed):
    ids = random_ids(2, 9)
    expected = rows_of(begun(model, ids).generate(20, **proposed))
    with torch.inference_mode():
        stream = begun(model, ids)
        assert rows_of(stream.generate(20, **proposed)) == expected
    assert len(list(stream.generate(3))) == 3


def test_embeddings_without_logits():
    """More ids have embeddings than logits; a lookup proposes what cannot be chosen, and nothing of that is taken."""
    model = tiny("llama")
    model.lm_head = torch.nn.Linear(64, 60, bias=False)
    model.config.vocab_size = 60
    with patch(model, S, 140):
        ids = torch.tensor([[x for a in range(60) for x in (a, 90)]])
        for options in ({}, dict(do_sample=True, seed=0)):
            found = rows_of(begun(model, ids).generate(12, prompt_lookup_num_tokens=3, **options))
            assert len(found[0]) == 12 and max(found[0]) < 60


def test_rewind_behind_proposals(model):
    """k fewer than slack, until the text has grown; the refusal says how many."""
    stream = begun(model, random_ids(1, 60))
    steps = stream.generate(prompt_lookup_num_tokens=10)
    read(steps, 5)
    length = int(stream.lengths[0])
    with pytest.raises(ValueError, match=r"row 0 can take back \d+ of its \d+ tokens now, not 16") as refusal:
        stream.rewind(16)
    most = int(str(refusal.value).split("take back ")[1].split()[0])
    assert 5 <= most < 16
    with pytest.raises(ValueError, match=f"can take back {most} "):
        stream.rewind(most + 1)
    stream.rewind(most)
    assert stream.lengths.tolist() == [length - most]


@pytest.mark.real
@pytest.mark.slow
def test_smollm2():
    """Its own draft with a smaller window over the same weights; and its own text."""
    real.needed()
    model = real.real_model(torch.float32)
    draft = real.over_the_same_weights(model)
    ids = real.prose(60)
    with patch(model, 4, 60), patch(draft, 4, 28):
        expected = torch.stack(list(begun(model, ids).generate(40)), dim=1).tolist()
        for how in (dict(draft=draft, num_assistant_tokens=3), dict(prompt_lookup_num_tokens=3)):
            steps = list(begun(model, ids).generate(40, **how))
            assert rows_of(steps) == expected
