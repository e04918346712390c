"""generate() and the loaders, on a tiny random model."""

import gc
import weakref

import pytest
import torch
import transformers

from helpers import left_padded, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import AutoModel, AutoModelForCausalLM, SinkCache, patch
from tiny import tiny

S, W = 4, 10
C = S + W
GREEDY = dict(do_sample=False, max_new_tokens=40)


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
    ids, mask = left_padded(random_ids(3, 30))
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
    ids, mask = left_padded(random_ids(2, 25))
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
    found = model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=20)
    assert torch.equal(found[:, :20], ids.expand(3, -1)) and len(set(map(tuple, found.tolist()))) == 3


def test_memory_is_constant_and_reset_keeps_it(model):
    cache = SinkCache(model)
    assert cache.nbytes == 0
    with torch.no_grad():
        model(random_ids(2, 1), past_key_values=cache)
        buffers, nbytes = [layer.keys.data_ptr() for layer in cache.layers], cache.nbytes
        assert nbytes == 3 * 2 * (2 * 2 * (C + 16) * 16) * 4  # layers, k and v, (batch, heads, slots, dim), bytes
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
    assert relative_error(torch.cat((first, second, third.detach()), dim=1), expected) < 1e-4


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
        found, prompt, twin = torch.cat(outputs, dim=1), model(ids)[0], tiny("llama")
        if loader is AutoModel:
            found, prompt = twin.lm_head(found), twin.lm_head(prompt)
        assert relative_error(found, streaming_logits(twin, ids, S, W)) < 1e-4
        assert relative_error(prompt, twin(ids).logits) < 1e-4


@pytest.mark.parametrize("length", [9, 10, 11, 30])
def test_a_prompt_that_outgrows_the_short_frequencies(length):
    """Phi-3's own way is to drop the cache then, and to compute the text anew."""
    model, ids = tiny("phi3", original_max_position_embeddings=10, max_position_embeddings=64), random_ids(2, length)
    asked = dict(max_new_tokens=8, do_sample=False, eos_token_id=[], attention_mask=torch.ones_like(ids))
    expected, cache = ids, None
    with torch.no_grad():
        for _ in range(8):  # all of it at every step
            chosen = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat((expected, chosen), dim=1)
    with patch(model, 4, 60):
        for _ in range(2):
            assert torch.equal(model.generate(ids, past_key_values=cache, **asked), expected)
            cache = SinkCache(model)
        model.generate(ids, past_key_values=cache, **asked)
        assert cache.lengths.tolist() == [length + 7] * 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "mixtral", "gemma2", "bloom"])
def test_what_nobody_holds_is_gone(name):
    """No cache of assisted generation, and no model once its patch is removed, waits for Python's collector."""
    ids = random_ids(1, 9)
    gc.collect()
    gc.disable()
    try:
        model = tiny(name)
        handle, cache = patch(model, 4, 20, slack=4), SinkCache(model)
        model.generate(ids, past_key_values=cache, max_new_tokens=6, prompt_lookup_num_tokens=2, eos_token_id=0)
        handle.remove()
        alive = weakref.ref(cache), weakref.ref(model)
        del cache, model, handle
        assert [x() for x in alive] == [None, None]
    finally:
        gc.enable()
