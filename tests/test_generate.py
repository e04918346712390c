"""generate(), several turns with one cache, Stream, and the loaders, on a tiny random model."""

import copy

import pytest
import torch
import transformers

from oracle import relative_error, streaming_logits
from sinkattn import AutoModel, AutoModelForCausalLM, SinkCache, Stream, patch
from tiny import tiny

S, W = 4, 10
C = S + W
GREEDY = dict(do_sample=False, max_new_tokens=40)


@pytest.fixture
def model():
    model = tiny("llama")
    with patch(model, S, W):
        yield model


def random_ids(rows, tokens):
    return torch.randint(1, 97, (rows, tokens))


def left_padded(rows, tokens):
    ids = random_ids(rows, tokens)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row * 7] = 0
    return ids.where(mask > 0, 0), mask


def test_greedy_beyond_the_trained_length(model):
    """80 tokens of a model made for 64, in a cache of 14: every one is the oracle's."""
    ids = random_ids(1, 40)
    found = model.generate(ids, **GREEDY)
    logits = streaming_logits(tiny("llama"), found, S, W)[:, 39:-1]  # each token is the likeliest after those before it
    assert torch.equal(logits.argmax(-1), found[:, 40:])


def test_the_cache_by_either_name(model):
    """`cache`, as transformers calls it from 5.24 on, or `past_key_values`: whichever version is installed."""
    ids = random_ids(1, 20)
    expected = model.generate(ids, **GREEDY)
    for name in ("cache", "past_key_values"):
        cache = SinkCache(model)
        assert torch.equal(model.generate(ids, **{name: cache}, **GREEDY), expected) and cache.seen == 59
        output = model(expected[:, -1:], **{name: cache})
        assert output.past_key_values is cache and cache.seen == 60
    assert model(ids, use_cache=False).past_key_values is None


def test_left_padded_batch_and_prefill_chunks(model):
    ids, mask = left_padded(3, 30)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **GREEDY)
        assert torch.equal(together[row, 30:], alone[0, -40:])
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=7, **GREEDY), together)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY), together)


def test_loss_is_that_of_the_streaming_logits(model):
    ids = random_ids(1, 40)
    expected = streaming_logits(tiny("llama"), ids, S, W)
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:])
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_beam_search(model):
    """Every beam carries its own cache rows: the scores are those of the sequences under the streaming model."""
    ids, mask = left_padded(2, 25)
    found = model.generate(
        ids, attention_mask=mask, num_beams=4, num_return_sequences=2, max_new_tokens=20, do_sample=False,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for i, sequence in enumerate(found.sequences):
        text = sequence[mask[i // 2].argmax() :][None]
        logprobs = streaming_logits(tiny("llama"), text, S, W).log_softmax(-1)
        score = logprobs[0, -21:-1].gather(1, text[0, -20:, None]).sum()
        assert found.sequences_scores[i].item() == pytest.approx(score.item(), rel=1e-4)


def test_sampling_returns_and_streamer(model):
    class Heard(transformers.generation.BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append(None)

    ids, heard = random_ids(1, 20), Heard()
    torch.manual_seed(1)
    out = model.generate(ids, do_sample=True, top_k=20, temperature=0.9, max_new_tokens=30, streamer=heard)
    assert heard.ids == [*out[0].tolist(), None]
    torch.manual_seed(1)
    assert torch.equal(out, model.generate(ids, do_sample=True, top_k=20, temperature=0.9, max_new_tokens=30))
    assert model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=5).shape == (3, 25)


@pytest.mark.parametrize("rows", [1, 3])
def test_turns_with_one_cache(model, rows):
    """A second turn, as the full history or as new ids only, with a full mask, with the new ids' mask or with none."""
    ids, mask = left_padded(rows, 30)
    cache = SinkCache(model)
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert cache.seen == first.shape[1] - 1
    turn = torch.cat((first, random_ids(rows, 90)), dim=1)  # new ids alone are longer than all that was seen
    full_mask = torch.cat((mask, torch.ones(rows, turn.shape[1] - 30, dtype=mask.dtype)), dim=1)
    new = turn[:, cache.seen :]
    expected = model.generate(turn, attention_mask=full_mask, **GREEDY)[:, -40:]
    for given in (
        dict(input_ids=turn, attention_mask=full_mask),
        dict(input_ids=new, attention_mask=full_mask),
        dict(input_ids=new, attention_mask=torch.ones_like(new)),
        dict(input_ids=new),
        *([dict(input_ids=turn)] if rows == 1 else []),
    ):
        again = copy.deepcopy(cache)
        assert torch.equal(model.generate(**given, past_key_values=again, **GREEDY)[:, -40:], expected)
        assert again.seen == turn.shape[1] + 39
    third = model.generate(random_ids(rows, 5), past_key_values=again, **GREEDY)
    assert third.shape == (rows, 45)


def test_memory_is_constant_and_reset_keeps_it(model):
    cache = SinkCache(model)
    assert cache.nbytes == 0
    with torch.no_grad():
        model(random_ids(2, 1), past_key_values=cache)
        buffers, nbytes = [layer.keys.data_ptr() for layer in cache.layers], cache.nbytes
        assert nbytes == 3 * 2 * (2 * 2 * C * 16) * 4  # layers, k and v, (batch, heads, slots, dim), bytes
        model(random_ids(2, 100), past_key_values=cache)
        cache.reset()
        ids = random_ids(2, 30)
        again = model(ids, past_key_values=cache).logits
        assert torch.equal(again, model(ids).logits)
    assert cache.nbytes == nbytes and buffers == [layer.keys.data_ptr() for layer in cache.layers]


def test_inference_mode_and_none_share_a_cache(model):
    ids, cache = random_ids(1, 30), SinkCache(model)
    with torch.inference_mode():
        first = model(ids[:, :10], past_key_values=cache).logits
        second = model(ids[:, 10:11], past_key_values=cache).logits
    third = model(ids[:, 11:], past_key_values=cache).logits
    with torch.no_grad():
        expected = model(ids).logits
    assert relative_error(torch.cat((first, second, third.detach()), dim=1), expected) < 2e-5


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
    ids, mask = left_padded(2, 12)
    stream.append(ids, mask)
    sampled = torch.stack(list(stream.generate(3)), dim=1)
    more, more_mask = left_padded(2, 9)
    stream.append(more, more_mask)
    found = torch.stack(list(stream.generate(20)), dim=1)
    for row in range(2):
        text = torch.cat((ids[row, mask[row].bool()], sampled[row], more[row, more_mask[row].bool()]))[None]
        assert torch.equal(found[row], model.generate(text, do_sample=False, max_new_tokens=20)[0, -20:])


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
    ids, mask = left_padded(2, 20)
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
        assert torch.equal(steps[row, :upto], free[row, :upto]) or stop is not None
        if stop is not None:
            assert (steps[row, stop + 1 :] == 0).all()  # the pad token


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel])
def test_loaders(loader, tmp_path):
    """The window of attention_sinks counts old tokens, so N is our N + 1; prompts are attended densely, as there."""
    tiny("llama").save_pretrained(tmp_path)
    model = loader.from_pretrained(tmp_path, attention_sink_size=S, attention_sink_window_size=W - 1)
    assert isinstance(model, transformers.PreTrainedModel)
    ids, cache = random_ids(1, 3 * C), None
    outputs = []
    with torch.no_grad():
        for token in ids.split(1, dim=1):  # the loop of an attention_sinks script
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outputs.append(out[0])
    if loader is AutoModelForCausalLM:
        assert relative_error(torch.cat(outputs, dim=1), streaming_logits(tiny("llama"), ids, S, W)) < 2e-5
        dense = tiny("llama")(ids).logits
        assert relative_error(model(ids).logits, dense) < 2e-5
    else:
        assert outputs[0].shape == (1, 1, 64)
