"""How a Stream chooses its tokens: by transformers' own processors, from the generation config and what is given."""

import pytest
import torch
import transformers

from helpers import DEVICES
from sinkattn import Stream, patch
from sinkattn.choice import likeliest
from tiny import tiny

S, W, ROWS = 4, 30, 200
OPTIONS = [
    dict(top_k=3), dict(top_p=0.3), dict(min_p=0.4), dict(typical_p=0.2), dict(epsilon_cutoff=0.05),
    dict(eta_cutoff=0.1), dict(top_h=0.3), dict(temperature=0.3, top_k=4), dict(repetition_penalty=3.0, top_k=2),
    dict(top_k=5, renormalize_logits=True), dict(suppress_tokens=[*range(40)], top_k=3),
    dict(top_k=2, remove_invalid_values=True), {},
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        model = tiny("llama")
    with patch(model, S, W):
        yield model


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x) or "none")
def test_sampling_draws_what_generate_does(model, options, by_config):
    """Of 200 draws the share of each token is its probability, by the scores that `generate` draws from."""
    ids = torch.randint(1, 97, (1, 20))
    options, stream = {"do_sample": True, **options}, Stream(model)
    told = model.generate(ids, **options, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    expected = told.scores[0][0].softmax(-1)
    stream.append(ids.expand(ROWS, -1))
    given = dict(generation_config=transformers.GenerationConfig(**options)) if by_config else options
    found = next(iter(stream.generate(1, **given))).bincount(minlength=97) / ROWS
    assert (expected[found > 0] > 0).all()
    assert 0.5 * (found - expected).abs().sum() < 0.35  # total variation
    if not set(options) & {"top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}:
        assert (expected > 0).sum() == 50  # transformers' default


def test_greedy_choices_are_those_of_generate(model):
    ids = torch.randint(1, 97, (2, 12))
    for options in (dict(suppress_tokens=[*range(1, 60)]), dict(repetition_penalty=1.7), dict(renormalize_logits=True)):
        stream = Stream(model)
        stream.append(ids)
        found = torch.stack(list(stream.generate(15, do_sample=False, **options)), dim=1)
        assert torch.equal(found, model.generate(ids, do_sample=False, max_new_tokens=15, **options)[:, 12:])


def test_what_a_stream_cannot_choose_by(model):
    stream = Stream(model)
    stream.append(torch.randint(1, 97, (1, 12)))
    for name in ("num_beams", "max_length", "temprature"):
        with pytest.raises(TypeError, match=f"takes no '{name}'; it takes do_sample"):
            stream.generate(5, **{name: 3})
    for told, message in (
        (dict(no_repeat_ngram_size=3), "NoRepeatNGramLogitsProcessor, which needs more of the text"),
        (dict(bad_words_ids=[[5, 6]]), "NoBadWordsLogitsProcessor, which needs more of the text"),
        (dict(num_beams=3), "num_beams=3: a Stream"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.generate(5, generation_config=transformers.GenerationConfig(**told))
    assert len(list(stream.generate(5, top_k=None, eos_token_id=[]))) == 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [1, 97, 4096, 50257, 128256, 151936])
def test_the_likeliest_is_the_first_of_the_largest(vocabulary, device):
    """Few values, so that many are the largest; NaN is above all, zeros are equal, and all may be minus infinity."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores = torch.randint(-3, 4, (5, vocabulary)).to(device, dtype)
        scores[1] = -torch.inf
        scores[2, vocabulary // 3 :: 7] = torch.nan
        scores[3] = torch.randn(vocabulary).to(scores)
        scores[4] = -1 - torch.rand(vocabulary).to(scores)
        scores[4, vocabulary // 2 :] = -0.0
        scores[4, vocabulary // 2 + 1 :: 2] = 0.0
        first = (scores == scores.amax(-1, keepdim=True)) | scores.isnan()
        expected = first.int().cpu().numpy().argmax(-1)
        assert likeliest(scores).tolist() == expected.tolist()
        assert likeliest(scores.view(5, 1, -1))[:, 0].tolist() == expected.tolist()
        behind = torch.cat((scores[:, :1], scores), dim=1)[:, 1:]  # rows that begin anywhere
        assert likeliest(behind).tolist() == expected.tolist()
