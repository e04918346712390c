"""Stream: one endless text a row, as generate() writes it; rows that end, start anew, or go to the next cache."""

import copy
import gc
import weakref

import pytest
import torch
import transformers

from helpers import DEVICES, Stops, endless, left_padded, random_ids
from oracle import streaming_logits
from sinkattn import SinkCache, Stream, patch
from tiny import tiny

S, W = 4, 10
C = S + W


def test_stream_equals_generate(model):
    ids = random_ids(2, 31)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
    stream = Stream(model)
    for piece in ids.split(9, dim=1):
        stream.append(piece)
    endless = stream.generate()
    found = [next(endless) for _ in range(25)] + list(stream.generate(35))
    assert torch.equal(torch.stack(found, dim=1), expected[:, 31:])
    more = random_ids(2, 6)
    stream.append(more)
    history = torch.cat((expected, more), dim=1)
    longer = model.generate(history, attention_mask=torch.ones_like(history), do_sample=False, max_new_tokens=5)
    assert torch.equal(torch.stack(list(stream.generate(5)), dim=1), longer[:, -5:])
    assert stream.lengths.tolist() == [31 + 60 + 6 + 5] * 2


def test_stream_with_left_padding_after_sampling(model):
    stream = Stream(model)
    ids, mask = left_padded(random_ids(2, 12))
    stream.append(ids, mask)
    sampled = torch.stack(list(stream.generate(3)), dim=1)
    more, more_mask = left_padded(random_ids(2, 9))
    stream.append(more, more_mask)
    found = torch.stack(list(stream.generate(20)), dim=1)
    for row in range(2):
        text = torch.cat((ids[row, mask[row].bool()], sampled[row], more[row, more_mask[row].bool()]))[None]
        asked = dict(attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=20)  # the pad id is text too
        assert torch.equal(found[row], model.generate(text, **asked)[0, -20:])


def test_stream_sampling_options(model):
    """Processors are transformers' own: with them on, Stream gives the scores that generate gives."""
    ids = random_ids(1, C)
    options = dict(do_sample=True, temperature=2.0, top_k=8, top_p=0.9, repetition_penalty=1.5)
    out = model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_scores=True, **options)
    allowed = set(out.scores[0][0].isfinite().nonzero().flatten().tolist())

    def drawn(seed):
        stream = Stream(model)
        stream.append(ids)
        return next(stream.generate(1, seed=seed, **options)).item()

    draws = [drawn(seed) for seed in range(40)]
    assert set(draws) <= allowed and len(set(draws)) > 1
    assert draws[:5] == [drawn(seed) for seed in range(5)]


def test_stream_penalises_what_stands_in_the_cache(model):
    """The first S and the last W ids of each row, and no others; a row that has ended keeps its own."""
    ids, mask = left_padded(random_ids(2, 20))
    stream, penalty = Stream(model), transformers.RepetitionPenaltyLogitsProcessor(3.0)
    stream.append(ids, mask)
    texts, end = [ids[row, mask[row].bool()] for row in range(2)], []
    for _ in range(2):
        has_ended = False
        for token_ids in stream.generate(12, repetition_penalty=3.0, eos_token_id=end):
            for row in range(1 if has_ended else 0, 2):
                held = torch.cat((texts[row][:S], texts[row][S:][-W:]))[None]
                scores = penalty(held, streaming_logits(tiny("llama"), texts[row][None], S, W)[:, -1])
                assert scores.argmax().item() == token_ids[row].item()
                texts[row] = torch.cat((texts[row], token_ids[row : row + 1]))
            has_ended = has_ended or token_ids[0].item() in end
        end = [next(copy.deepcopy(stream).generate(1, repetition_penalty=3.0, eos_token_id=[]))[0].item()]


def test_stream_stops_at_the_end_of_text(model):
    ids = random_ids(2, 20)
    stream = Stream(model)
    stream.append(ids)
    free = torch.stack(list(copy.deepcopy(stream).generate(30)), dim=1)
    end = free[0, 4].item()
    first = [row.tolist().index(end) if end in row else None for row in free]
    steps = torch.stack(list(stream.generate(30, eos_token_id=end)), dim=1)
    for row, stop in enumerate(first):
        upto = steps.shape[1] if stop is None else stop + 1
        assert torch.equal(steps[row, :upto], free[row, :upto])
        assert (steps[row, upto:] == 0).all()  # the pad token
    assert steps.shape[1] == max(30 if stop is None else stop + 1 for stop in first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_rows_are_refilled_while_others_go_on(name, device):
    """Row 1 gets a new text in the middle of the loop: both rows then write what they would write alone."""
    model = tiny(name).to(device)
    first, second = random_ids(2, 20, device), random_ids(1, 7, device)
    with patch(model, S, W):

        def alone(text, steps):
            return model.generate(text, do_sample=False, max_new_tokens=steps)[0, text.shape[1] :]

        stream, found = Stream(model), []
        stream.append(first)
        for step, ids in enumerate(stream.generate(30, eos_token_id=[])):
            found.append(ids)
            if step == 8:
                stream.reset([1])
            if step == 11:
                stream.append(second, rows=[1])
        found = torch.stack(found, dim=1)
        assert torch.equal(found[0], alone(first[:1], 30))
        assert torch.equal(found[1, :9], alone(first[1:], 9))
        assert found[1, 9:12].tolist() == [0, 0, 0]  # the pad token, while it waits
        assert torch.equal(found[1, 12:], alone(second, 18))
        assert stream.lengths.tolist() == [50, 25]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_have_ended_stay_as_they_are(device):
    model, ids = tiny("llama").to(device), random_ids(3, 20, device)
    with patch(model, S, W):
        free = Stream(model)
        free.append(ids)
        free = endless(free, 40)
        end = free[0, 4].item()
        stops = [row.index(end) + 1 if end in row else None for row in free.tolist()]
        stream = Stream(model)
        stream.append(ids)
        steps = torch.stack(list(stream.generate(40, eos_token_id=end)), dim=1)
        taken = [40 if stop is None else stop for stop in stops]
        assert steps.shape[1] == max(taken)
        assert stream.lengths.tolist() == [20 + n for n in taken]
        more = random_ids(3, 5, device)
        stream.append(more)
        after = endless(stream, 10)
        for row, n in enumerate(taken):
            assert torch.equal(steps[row, :n], free[row, :n])
            text = torch.cat((ids[row], free[row, :n], more[row]))[None]
            expected = model.generate(text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=10)
            assert torch.equal(after[row], expected[0, -10:])


def test_rows_that_are_not_there():
    model = tiny("llama")
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(random_ids(2, 5))
        lengths = stream.lengths.tolist()
        for rows, ids in (
            ([2], random_ids(1, 3)),
            ([0, 0], random_ids(2, 3)),
            ([], random_ids(1, 3)),
            ([1], random_ids(2, 3)),
        ):
            with pytest.raises(ValueError, match="rows"):
                stream.append(ids, rows=rows)
        with pytest.raises(ValueError, match="rows"):
            stream.reset([-1])
        assert stream.lengths.tolist() == lengths
        stream.reset()
        with pytest.raises(ValueError, match="append"):
            stream.generate()
        stream.append(random_ids(2, 5))
        tokens = stream.generate()
    with pytest.raises(ValueError, match="not patched any more"):
        next(tokens)
    with patch(model, S, W), pytest.raises(ValueError, match="earlier patch"):
        stream.append(random_ids(2, 5))


def test_a_streamer_hears_every_step():
    class Heard(transformers.generation.BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids.append(value.tolist())

        def end(self):
            self.ids.append(None)

    model, heard = tiny("llama"), Heard()
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(random_ids(2, 5))
        steps = list(stream.generate(6, eos_token_id=[], streamer=heard))
    assert heard.ids == [*(ids.tolist() for ids in steps), None]


class _Step:
    """Stands for a captured step."""


def test_rows_go_to_the_next_cache():
    """What a cache leaves, with a captured step, serves the next of as many rows, and is given back by remove()."""
    model, ids = tiny("llama"), random_ids(2, 20)
    with patch(model, S, W) as handle, torch.no_grad():
        spare, expected = handle.plan.spare, model(ids).logits

        def leave(rows):
            cache = SinkCache(model)
            logits = model(ids[:rows], past_key_values=cache).logits
            cache.rows.captured = _Step()
            return cache, logits

        cache, _ = leave(2)
        rows = cache.rows
        del cache
        assert spare.rows is rows
        cache, logits = leave(2)
        assert cache.rows is rows and spare.rows is None and torch.equal(logits, expected)
        other, _ = leave(2)
        assert other.rows is not rows
        del other
        fewer, _ = leave(1)
        assert len(fewer.lengths) == 1
        del fewer, cache
        model.to(torch.bfloat16)  # rows of float32 do not suit any more
        assert model(ids).logits.dtype == torch.bfloat16
        cache, _ = leave(2)
    del cache
    assert spare.rows is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [{}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}, {"draft": True}], ids=str)
def test_rows_of_a_stream_that_nobody_holds(way, device):
    """They are gone, or if they have graphs the next one's, and wait for no collector."""
    model = tiny("llama").to(device)
    with patch(model, S, W, slack=3) as handle:
        stream = Stream(model)
        stream.append(random_ids(1, 9, device))
        way = way | {"draft": model, "num_assistant_tokens": 2} if "draft" in way else way
        for nth, _ in enumerate(stream.generate(None, eos_token_id=[], **way)):
            if nth == 5:
                break
        rows = weakref.ref(stream.cache.rows)
        gc.disable()
        try:
            del stream, _
            assert rows() is handle.plan.spare.rows
        finally:
            gc.enable()


def test_an_end_that_was_kept_ends(model):
    """Interrupted by its streamer at the end token: the next loop yields it, and nothing behind it."""
    ids = random_ids(1, 9)
    stream = Stream(model)
    stream.append(ids)
    text = [int(x) for x in stream.generate(4)]

    stream = Stream(model)
    stream.append(ids)
    with pytest.raises(KeyError):
        list(stream.generate(None, eos_token_id=text[3], streamer=Stops(text.index(text[3]))))
    assert [int(x) for x in stream.generate(30, eos_token_id=text[3])] == [text[3]]
