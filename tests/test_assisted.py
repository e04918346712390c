"""Assisted generation: the text of the model alone, whoever proposes, beyond the wrap, in turns."""

import copy
import inspect

import pytest
import torch
import transformers

import real
from helpers import Stops, random_ids
from sinkattn import SinkCache, patch
from tiny import tiny

S, W = 4, 30
# transformers 5.10 counts no tokens but its ids: assisted, a text in turns must be given whole
ASKS_WHOLE_TEXT = "max_length" in inspect.signature(transformers.Cache.crop).parameters


def made(noise: float = 0.0):
    """The same weights every time, but for noise."""
    with torch.random.fork_rng():
        model = tiny("llama", pad_token_id=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


# so that it does not go in circles; and lookups of transformers 5.10 need to be told an end
GREEDY = dict(max_new_tokens=80, do_sample=False, repetition_penalty=1.3, eos_token_id=0, suppress_tokens=[0])


@pytest.fixture(params=["lookup", "unpatched", "patched", "itself"])
def helped(request):
    """A patched model, and what generate is told so that it is assisted; all but the lookup propose often rightly."""
    model = made()
    with patch(model, S, W, slack=6):
        if request.param == "lookup":
            yield model, dict(prompt_lookup_num_tokens=4)
        else:
            draft = made(0.0 if request.param == "itself" else 0.003)
            draft.generation_config.num_assistant_tokens = 20  # more than can be taken back
            draft.generation_config.assistant_confidence_threshold = 0.0  # however unsure of them it is
            if request.param == "unpatched":
                yield model, dict(assistant_model=draft)
            else:
                with patch(draft, S, W if request.param == "itself" else 20, slack=4):
                    yield model, dict(assistant_model=draft)


def test_the_text_is_that_of_the_model_alone(helped):
    model, assistant = helped
    ids, cache = torch.randint(1, 97, (1, 20)), SinkCache(model)
    forwards = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(0))
    expected = model.generate(ids, **GREEDY)
    alone = len(forwards)
    assert torch.equal(model.generate(ids, **GREEDY, **assistant), expected)
    if "assistant_model" in assistant:
        assert len(forwards) - alone < alone  # candidates were taken, however few of them a fresh prompt allows
    for turn in range(2):
        found = model.generate(ids, past_key_values=cache, **GREEDY, **assistant)
        assert torch.equal(found, model.generate(ids, **GREEDY)), turn
        assert cache.seen == found.shape[1] - 1 and cache.lengths.tolist() == [cache.seen]
        ids = torch.cat((found, torch.randint(1, 97, (1, 5))), dim=1)


def test_new_ids_alone(helped):
    """Several turns, each of new ids alone, some behind padding: the answers are those without candidates."""
    model, assistant = helped
    alone, cache = SinkCache(model), SinkCache(model)
    if ASKS_WHOLE_TEXT:
        ids = torch.randint(1, 97, (1, 7))
        model.generate(ids, past_key_values=cache, **GREEDY, **assistant)
        with pytest.raises(ValueError, match="give the whole text"):
            model.generate(ids.flip(1), past_key_values=cache, **GREEDY, **assistant)
        return
    for turn in range(4):
        ids, mask = torch.randint(1, 97, (1, 7)), torch.ones(1, 7, dtype=torch.int64)
        mask[:, : 2 * (turn % 2)] = 0
        more = dict(GREEDY, max_new_tokens=25)
        if turn % 2:
            before = torch.ones(1, cache.seen + (cache.unfed is not None), dtype=torch.int64)
            more["attention_mask"] = torch.cat((before, mask), dim=1)
        found = model.generate(ids, past_key_values=cache, **more, **assistant)
        assert torch.equal(found, model.generate(ids, past_key_values=alone, **more)), turn
        assert torch.equal(cache.lengths, alone.lengths) and torch.equal(cache.rows.digest, alone.rows.digest)


@pytest.mark.skipif(ASKS_WHOLE_TEXT, reason="transformers 5.10 takes the whole text")
def test_new_ids_alone_behind_a_padded_text():
    """An unpatched draft is told of the new ids, not of the text's padding: BLOOM counts by its mask."""
    sizes = dict(vocab_size=97, hidden_size=64, n_layer=3, n_head=4, pad_token_id=None, eos_token_id=None)
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).eval()
    draft = copy.deepcopy(model)
    prompt, mask = torch.randint(1, 97, (1, 8)), torch.ones(1, 8, dtype=torch.int64)
    prompt[0, :2] = mask[0, :2] = 0
    with patch(model, 2, 30, slack=6):
        alone, cache = SinkCache(model), SinkCache(model)
        for x in (alone, cache):
            model.generate(prompt, attention_mask=mask, past_key_values=x, max_new_tokens=3, do_sample=False)
        new, told = torch.randint(1, 97, (1, 2)), dict(max_new_tokens=20, do_sample=False)
        expected = model.generate(new, past_key_values=alone, **told)
        assert torch.equal(model.generate(new, past_key_values=cache, assistant_model=draft, **told), expected)


def test_pad_ids_in_the_text(helped):
    """What was chosen is text, for the draft as well, though it is the pad id."""
    model, assistant = helped
    ids = torch.randint(1, 97, (1, 20))
    told = dict(GREEDY, attention_mask=torch.ones_like(ids))
    pad = int(model.generate(ids, **told)[0, 25])
    expected = model.generate(ids, **told, pad_token_id=pad)
    assert torch.equal(model.generate(ids, **told, pad_token_id=pad, **assistant), expected)


def test_sampling_keeps_the_distribution():
    """The share of every token in the second place of many draws, assisted and alone, over a vocabulary of a few."""
    model, ids = made(), torch.randint(1, 97, (1, 40))
    draft, options = made(0.02), dict(do_sample=True, top_k=4, max_new_tokens=2)
    with patch(model, S, W), patch(draft, S, W):
        first = model.generate(ids, do_sample=False, max_new_tokens=1)
        counts = torch.zeros(2, 97)
        for which, assistant in enumerate(({}, dict(assistant_model=draft))):
            for _ in range(300):
                counts[which, model.generate(first, **options, **assistant)[0, 42]] += 1
        assert (counts[0] > 0).sum() > 1
        shares = counts / counts.sum(1, keepdim=True)
        assert 0.5 * (shares[0] - shares[1]).abs().sum() < 0.3  # total variation; by chance 0.13, if there are 16


def test_interrupted_behind_candidates():
    """Those may stand in the cache, and nobody has chosen them: it is torn."""
    model, ids = made(), torch.randint(1, 97, (1, 8)).repeat(1, 3)
    with patch(model, S, W):
        cache = SinkCache(model)
        with pytest.raises(KeyError):
            model.generate(ids, past_key_values=cache, streamer=Stops(1), prompt_lookup_num_tokens=4, **GREEDY)
        assert cache.is_torn


@pytest.mark.parametrize("period", [1, 3, 8])
def test_a_short_piece_over_and_over(period):
    """What might be new to a cache that holds it is not to a draft, which is given all of the text every time."""
    model, draft, ids = tiny("llama"), tiny("llama"), random_ids(1, period).repeat(1, 24 // period)
    with patch(model, S, W), patch(draft, 2, 6):
        alone = model.generate(ids, max_new_tokens=3 * (S + W), do_sample=False)
        assert torch.equal(
            model.generate(ids, max_new_tokens=3 * (S + W), do_sample=False, assistant_model=draft), alone
        )


def test_what_cannot_be_assisted():
    model = made()
    with patch(model, S, W, prefill="dense"), pytest.raises(ValueError, match="prefill='dense'"):
        model.generate(torch.randint(1, 97, (1, 9)), prompt_lookup_num_tokens=3, **GREEDY)
    with patch(model, S, W, slack=0), pytest.raises(ValueError, match="with slack, their number at a time"):
        model.generate(torch.randint(1, 97, (1, 9)), prompt_lookup_num_tokens=3, **GREEDY)


def test_the_model_as_its_own_draft():
    """With a smaller window: the weights are one and the same, and stay where they are."""
    model, ids = made(), torch.randint(1, 97, (1, 20))
    draft = real.over_the_same_weights(model)
    with patch(model, S, W):
        expected = model.generate(ids, **GREEDY)
        with patch(draft, S, 16):
            model.generate(ids, max_new_tokens=2)
            lie = [x.data_ptr() for x in model.parameters()]
            assert torch.equal(model.generate(ids, assistant_model=draft, **GREEDY), expected)
            assert lie == [x.data_ptr() for x in model.parameters()] == [x.data_ptr() for x in draft.parameters()]
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(draft.lm_head.weight, made().lm_head.weight)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_as_its_own_draft():
    """With a smaller window over the same weights, past the wrap of both."""
    real.needed()
    model = real.real_model(torch.float32)
    draft = real.over_the_same_weights(model)
    ids = real.prose(60)
    options = dict(do_sample=False, max_new_tokens=50)
    with patch(model, 4, 60):
        expected = model.generate(ids, **options)
        with patch(draft, 4, 28):
            assert torch.equal(model.generate(ids, assistant_model=draft, **options), expected)
