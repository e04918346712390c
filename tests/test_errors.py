"""Bad input: each with an error of its own, before anything is changed."""

import copy
import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import sweep
from helpers import GPU, random_ids
from sinkattn import SinkCache, Stream, UnsupportedModelError, backends, ops, patch
from tiny import COMMON, tiny

S, W = 4, 10


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(sink_size=-1), ValueError, "sink_size=-1"),
        (dict(sink_size=1.5), ValueError, "sink_size=1.5"),
        (dict(window_size=0), ValueError, "window_size=0"),
        (dict(window_size=True), ValueError, "window_size=True"),
        (dict(prefill="sparse"), ValueError, "prefill='sparse'"),
        (dict(backend="opencl"), ValueError, "unknown backend 'opencl'.*'reference'"),
        (dict(backend="cuda"), RuntimeError, "'cuda' is not available"),
    ],
)
def test_keywords_of_patch(kwargs, error, message):
    model = tiny("llama")
    attributes = set(vars(model))
    with pytest.raises(error, match=message):
        patch(model, **kwargs)
    assert set(vars(model)) == attributes


def test_sizes_of_numpy():
    model = tiny("llama")
    with patch(model, np.int64(S), np.int32(W)) as handle:
        assert (handle.plan.sink_size, handle.plan.window_size) == (S, W) and type(handle.plan.window_size) is int
    for size in (np.float32(4), np.bool_(True)):
        with pytest.raises(ValueError, match="sink_size="):
            patch(model, size)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch):
    monkeypatch.setattr(backends, "HAS_CPU_LIBRARY", False)
    with pytest.raises(RuntimeError, match="'cpu' is not available.*not built"):
        patch(tiny("llama"), backend="cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="'triton' is not available.*need a GPU"):
        patch(tiny("llama"), backend="triton")


def test_patched_twice(model):
    with pytest.raises(ValueError, match="patched already"):
        patch(model)


def test_not_a_model():
    with pytest.raises(TypeError, match="PreTrainedModel, not a Linear"):
        patch(torch.nn.Linear(2, 2))


SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
UNSUPPORTED = {
    "encoder-decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
        ),
        "encoder-decoder",
    ),
    "encoder": (lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), "BertSelfAttention|BertModel"),
    "rotary encoder": (
        lambda: transformers.ModernBertModel(transformers.ModernBertConfig(**SMALL, pad_token_id=0)),
        "ModernBert",
    ),
    "learned positions": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)),
        "GPT2Attention, layer 0: its values change with the position.*learned",
    ),
    "learned positions, OPT": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=97, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                word_embed_proj_dim=32,
            )
        ),
        "OPTAttention, layer 0: its values change with the position.*learned",
    ),
    "norm after the rotation": (
        lambda: transformers.HunYuanDenseV1ForCausalLM(transformers.HunYuanDenseV1Config(**COMMON, head_dim=16)),
        "HunYuanDenseV1Attention, layer 0: query and key change with the position, but not by a plain rotation",
    ),
    "state space": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
        ),
        "MambaForCausalLM: no layer attends over keys from a cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(UNSUPPORTED))
def test_models_that_cannot_be_exact_are_refused_and_left_alone(kind):
    make, message = UNSUPPORTED[kind]
    model = make().eval()
    for parameter in model.parameters():  # norms that scale all dims alike would commute with a rotation
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    attributes, state = set(vars(model)), copy.deepcopy(model.state_dict())
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=message):
        patch(model, S, W)
    assert issubclass(UnsupportedModelError, ValueError)
    assert set(vars(model)) == attributes and model.config._attn_implementation == implementation
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("deepseek_v32", "DeepseekV32Attention, layer 0: an indexer chooses"),
        ("inkling2_text", "Inkling2SlidingAttention, layer 0: its attention takes 'position_bias'"),
        ("doge", "DogeAttention, layer 0: its mask is neither"),
        ("recurrent_gemma", "RecurrentGemma.*, layer 2: its values change with the position"),
    ],
)
def test_types_that_cannot_be_exact_are_refused_and_left_alone(model_type, message):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = sweep.build(model_type)
    before = sweep.snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        patch(model, S, W)
    assert sweep.unchanged(model, before)


def test_what_the_probe_cannot_know_of_shows_in_a_short_text():
    """Something besides attention that counts columns: the patch is taken back, and the model left alone."""
    model = tiny("llama")
    count = lambda _, __, output: output + torch.arange(output.shape[1])[:, None]  # noqa: E731
    model.model.layers[1].mlp.register_forward_hook(count)
    before = sweep.snapshot(model)
    with pytest.raises(UnsupportedModelError, match="a short text in pieces gives other outputs"):
        patch(model, S, W)
    assert sweep.unchanged(model, before)


def test_scaled_normalised_rotation_is_refused():
    """A model that does something to its keys after the rotation: the layer is named."""
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def shifted(hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        return forward(hidden_states, position_embeddings=(cos * 1.1, sin), **kwargs)

    attention.forward = shifted
    with pytest.raises(UnsupportedModelError, match="LlamaAttention, layer 1: .*not by a plain rotation"):
        patch(model, S, W)


CALLS = {
    "right padding": (
        lambda i: dict(attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])),
        ValueError,
        "pad on the left",
    ),
    "a hole in the mask": (
        lambda i: dict(attention_mask=torch.tensor([[1, 0, 1, 1]] * 2)),
        ValueError,
        "pad on the left",
    ),
    "mask of another length": (lambda i: dict(attention_mask=torch.ones(2, 9)), ValueError, "does not fit 2 rows of 4"),
    "4D mask": (lambda i: dict(attention_mask=torch.ones(2, 1, 4, 4)), ValueError, "must be 2D"),
    "another batch": (lambda i: dict(input_ids=i[:1]), ValueError, "holds 2 rows and cannot go on with 1"),
    "empty prompt": (lambda i: dict(input_ids=i[:, :0]), ValueError, "empty prompt"),
    "no rows": (lambda i: dict(input_ids=i[:0]), ValueError, "empty prompt"),
    "no batch": (lambda i: dict(input_ids=i[0]), ValueError, r"input_ids of \(\d+,\): give \(batch, tokens\)"),
    "nothing": (lambda i: dict(input_ids=None), ValueError, "exactly one of"),
    "id too large": (lambda i: dict(input_ids=i + 90), ValueError, "the model embeds 0 to 96"),
    "negative id": (lambda i: dict(input_ids=i - 97), ValueError, "the model embeds 0 to 96"),
    "positions": (lambda i: dict(position_ids=torch.arange(3, 7)[None]), ValueError, "leave position_ids out"),
    "attention weights": (lambda i: dict(output_attentions=True), ValueError, "output_attentions"),
    "DynamicCache": (lambda i: dict(past_key_values=transformers.DynamicCache()), TypeError, "DynamicCache.*SinkCache"),
}


@pytest.mark.parametrize("kind", list(CALLS))
def test_bad_calls_lose_nothing(model, kind):
    """The error comes before the cache is touched: the text goes on as if the call had not been made."""
    change, error, message = CALLS[kind]
    ids, more = random_ids(2, 17), random_ids(2, 4)
    cache = SinkCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        expected = model(more, past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(error, match=message):
            model(**{"input_ids": more, "past_key_values": cache, **change(more)})
        assert torch.equal(model(more, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("offset", [97, -97])
def test_ids_without_an_embedding_one_at_a_time(model, offset):
    """On the CPU every token is looked at, on a GPU those of a prompt: one alone would make the host wait."""
    ids, cache, stream = random_ids(2, 6), SinkCache(model), Stream(model)
    with torch.no_grad():
        for piece in ids[:, :5].split(1, dim=1):
            model(piece, past_key_values=cache)
            stream.append(piece)
        with pytest.raises(ValueError, match="the model embeds 0 to 96"):
            model(ids[:, 5:] + offset, past_key_values=cache)
        with pytest.raises(ValueError, match="the model embeds 0 to 96"):
            stream.append(ids[:, 5:] + offset)
        expected = model(ids).logits[:, -1]
        assert torch.allclose(model(ids[:, 5:], past_key_values=cache).logits[:, -1], expected, atol=1e-5)
        stream.append(ids[:, 5:])
        assert torch.equal(next(stream.generate(1, do_sample=False)), expected.argmax(-1))


def test_caches_of_others(model):
    other = tiny("qwen2")
    with pytest.raises(ValueError, match="needs a patched model"):
        SinkCache(other)
    with patch(other, S, W):
        foreign = SinkCache(other)
    with torch.no_grad(), pytest.raises(ValueError, match="made for another model"):
        model(random_ids(1, 3), past_key_values=foreign)


def test_another_dtype(model):
    cache = SinkCache(model)
    with torch.no_grad():
        model(random_ids(1, 3), past_key_values=cache)
        model.to(torch.bfloat16)
        with pytest.raises(ValueError, match="keys in torch.float32.*bfloat16"):
            model(random_ids(1, 3), past_key_values=cache)


@pytest.mark.gpu
def test_another_device(model):
    cache = SinkCache(model)
    with torch.no_grad():
        model(random_ids(1, 3), past_key_values=cache)
        model.to(GPU)
        with pytest.raises(ValueError, match="holds device cpu"):
            model(random_ids(1, 3, GPU), past_key_values=cache)


def test_gradients(model):
    """Logits and loss are there without no_grad(); asking for gradients says why there are none."""
    ids = random_ids(1, 20)
    output = model(ids, labels=ids)
    assert output.loss.item() > 0
    with pytest.raises(RuntimeError, match="sinkattn runs inference only"):
        output.loss.backward()
    with pytest.raises(RuntimeError, match="sinkattn runs inference only"):
        output.logits.sum().backward()


def test_dropout_is_refused():
    model = tiny("llama", attention_dropout=0.1).train()
    with patch(model, S, W), pytest.raises(RuntimeError, match=r"call model.eval\(\)"):
        model(random_ids(1, 3))


def test_a_part_of_the_model_alone(model):
    with pytest.raises(RuntimeError, match="part of a patched model was called by itself"):
        model.model(random_ids(1, 3))


def test_generate_arguments(model):
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(random_ids(1, 3), cache_implementation="static")
    with pytest.raises(TypeError, match="DynamicCache"):
        model.generate(random_ids(1, 3), past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="empty prompt"):
        model.generate(random_ids(1, 0))
    model.generation_config.cache_implementation = "hybrid"  # what hub configs of Gemma say does not matter
    assert model.generate(random_ids(1, 3), max_new_tokens=2).shape == (1, 5)


def test_a_prompt_that_fails_half_way_marks_the_cache(model):
    """A torn chunk cannot be mended, so the cache says so until it is reset; a torn token is simply fed again."""
    cache, ids = SinkCache(model), random_ids(1, 20)
    expected = model(ids).logits
    layer = model.model.layers[2]
    hook = lambda *_: (_ for _ in ()).throw(MemoryError())  # noqa: E731
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        handle = layer.register_forward_pre_hook(hook)
        with pytest.raises(MemoryError):
            model(ids[:, 10:11], past_key_values=cache)
        handle.remove()
        assert torch.allclose(model(ids[:, 10:], past_key_values=cache).logits, expected[:, 10:], atol=1e-4)
        handle = layer.register_forward_pre_hook(hook)
        with pytest.raises(MemoryError):
            model(ids, past_key_values=cache)
        handle.remove()
        with pytest.raises(ValueError, match="half-way"):
            model(ids, past_key_values=cache)
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_what_the_first_op_refuses_tears_nothing():
    """An op that refuses its arguments has written nothing: the cache goes on. `patch` itself tries the backend."""
    model, ids = tiny("llama", head_dim=272), random_ids(1, 20)
    backend = "cpu" if ops.HAS_CPU_LIBRARY else "triton"
    with pytest.raises(ValueError, match="head_dim up to 256"):
        patch(model, S, W, backend=backend)
    with patch(model, S, W, backend="reference") as handle, torch.no_grad():
        handle.runner.plan = dataclasses.replace(handle.plan, backend=backend)
        cache = SinkCache(model)
        for _ in range(2):
            with pytest.raises(ValueError, match="head_dim up to 256"):
                model(ids, past_key_values=cache)


def test_stream_input(model):
    stream = Stream(model)
    with pytest.raises(ValueError, match="empty prompt"):
        stream.append(random_ids(1, 0))
    with pytest.raises(ValueError, match="empty prompt"):
        stream.generate()
    stream.append(random_ids(2, 5))
    next(stream.generate())
    with pytest.raises(ValueError, match="holds 2 rows"):
        stream.append(random_ids(1, 5))
    with pytest.raises(ValueError, match="embeds 0 to 96"):
        stream.append(random_ids(2, 5) + 96)


@pytest.mark.parametrize(
    "rows, error",
    [
        ([0, 2], "from 0 to 2"), (torch.tensor([-1, 0]), "from -1 to 0"), ([], "at least one"), ([[0, 1]], "(n,)"),
        (torch.tensor([0.0, 1.0]), "float32"), (torch.tensor([True, False]), "bool"),
    ],
)  # fmt: skip
def test_rows_that_a_cache_does_not_have(model, rows, error):
    """Nothing is torn by a mistake."""
    ids, cache = random_ids(2, 20), SinkCache(model)
    with pytest.raises(ValueError, match="empty"):
        cache.reorder_cache(torch.tensor([0]))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(ValueError, match=re.escape(error)):
            cache.reorder_cache(rows)
        with pytest.raises(ValueError, match="at least one"):
            cache.batch_repeat_interleave(0)
        cache.reorder_cache([1, 0])
        assert torch.equal(model(ids[:, :1].flip(0), past_key_values=cache).logits, expected.flip(0))


@pytest.mark.parametrize("rows", [[0.5], torch.tensor([1.0]), "a", None])
def test_rows_that_are_no_numbers(model, rows):
    stream = Stream(model)
    stream.append(random_ids(2, 20))
    texts = copy.deepcopy(stream).take([0])
    calls = [lambda: stream.take(rows)]
    if rows is not None:  # which is all of them
        calls += [lambda: stream.append([[1]], rows=rows), lambda: stream.rewind(1, rows)]
        calls += [lambda: stream.put(texts, rows), lambda: stream.reset(rows)]
    for call in calls:
        with pytest.raises(ValueError, match="name some of them"):
            call()
    assert stream.lengths.tolist() == [20, 20]


def test_importing_changes_nothing():
    """No registration, no replaced attribute: what transformers and torch hold is what they held before."""
    script = (
        "import torch, transformers\n"
        "from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, GenerationMixin\n"
        "held = lambda: [dict(vars(x)) for x in (PreTrainedModel, GenerationMixin, transformers.Cache)] + [\n"
        "    dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)]\n"
        "before = held()\n"
        "import sinkattn\n"
        "assert held() == before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_numbers_of_copies():
    with patch(tiny("llama"), S, W) as handle:
        stream = Stream(handle.model)
        stream.append(random_ids(1, 5))
        for n in (0, -1, 1.5, True, "2", None):
            with pytest.raises(ValueError, match="whole number of copies"):
                stream.fork(0, n)
            with pytest.raises(ValueError, match="whole number of copies"):
                stream.cache.repeat(n)
        assert stream.fork(0, 2).cache.batch_size == 2 and stream.cache.repeat(3).batch_size == 3


def test_max_new_tokens_of_a_config():
    with patch(tiny("llama"), S, W) as handle:
        stream = Stream(handle.model)
        stream.append(random_ids(1, 5))
        config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=None)
        assert len(list(stream.generate(generation_config=config))) == 3
        assert len(list(stream.generate(2, generation_config=config))) == 2
