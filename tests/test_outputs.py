"""Every output and loss of an input that goes through in chunks is that of the input at once, or refused by name."""

import copy
import sys
import threading

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, TokenClassifierOutput

from helpers import random_ids
from oracle import relative_error, streaming_logits
from remote_model import RemoteConfig, RemoteForCausalLM
from sinkattn import SinkCache, patch
from sinkattn.outputs import copied, cut, joined, logits_of
from tiny import COMMON, spread, tiny

S, W = 4, 60
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


def labels_of(ids):
    return ids.where(torch.rand(ids.shape) < 0.8, -100)


def rows_of(ids, top):
    return torch.randint(0, top, (len(ids),))


HEADS = {  # name -> class, config, what else it is given with ids (batch, tokens)
    "body": ("LlamaModel", {}, lambda ids: dict(output_hidden_states=True)),
    "causal": ("LlamaForCausalLM", {}, lambda ids: dict(labels=labels_of(ids), output_hidden_states=True)),
    "items": ("LlamaForCausalLM", {}, lambda ids: dict(labels=ids, num_items_in_batch=torch.tensor(5))),
    "shifted": ("LlamaForCausalLM", {}, lambda ids: dict(labels=ids, shift_labels=labels_of(ids))),
    "last": ("LlamaForCausalLM", {}, lambda ids: dict(logits_to_keep=3)),
    "softcap": ("Gemma2ForCausalLM", {"head_dim": 16}, lambda ids: dict(labels=ids)),
    "experts": ("MixtralForCausalLM", EXPERTS, lambda ids: dict(labels=ids, output_router_logits=True)),
    "question": (
        "LlamaForQuestionAnswering",
        {},
        lambda ids: dict(start_positions=rows_of(ids, ids.shape[1]), end_positions=rows_of(ids, ids.shape[1])),
    ),
    "tokens": ("LlamaForTokenClassification", dict(num_labels=5), lambda ids: dict(labels=ids % 5)),
    "alibi": ("BloomForTokenClassification", dict(n_head=4, num_labels=3), lambda ids: dict(labels=ids % 3)),
    "reward": ("LlamaForSequenceClassification", dict(num_labels=1), lambda ids: {}),
    "class": ("Qwen2ForSequenceClassification", dict(num_labels=3), lambda ids: dict(labels=rows_of(ids, 3))),
    "neox class": ("GPTNeoXForSequenceClassification", dict(num_labels=3), lambda ids: dict(labels=rows_of(ids, 3))),
}


def build(name, **more):
    cls, config, _ = HEADS[name]
    cls = getattr(transformers, cls)
    torch.manual_seed(0)
    config = cls.config_class(**{**COMMON, **config, **more}, attn_implementation="eager")  # see tiny.py
    model = cls(config).eval()
    spread(model)
    return model


def assert_same(found, expected, where="output", tolerance=2e-5):
    """All tensors of an output, however deep; caches aside. tolerance: of their root mean square."""
    if isinstance(expected, dict):
        names = [name for name in expected if name not in ("past_key_values", "cache")]
        assert names == [name for name in found if name not in ("past_key_values", "cache")]
        for name in names:
            assert_same(found[name], expected[name], f"{where}.{name}", tolerance)
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), where
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert_same(x, y, f"{where}[{i}]", tolerance)
    elif isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype, where
        if expected.isnan().all():  # the loss of nothing
            assert found.isnan().all(), where
            return
        size, error = expected.double().square().mean().sqrt(), (found.double() - expected.double()).abs().max()
        assert error < tolerance * size, f"{where}: off by {error / size:.1e}"
    else:
        assert found is expected or found == expected, where


@pytest.fixture
def chunk(monkeypatch):
    """Sets the tokens of a chunk."""
    return lambda size: monkeypatch.setattr(sys.modules["sinkattn.runner"], "CHUNK", size)


@pytest.mark.parametrize("name", list(HEADS))
def test_heads(name, chunk):
    """What the unpatched model gives, at once and in chunks, for texts within the capacity."""
    model, more = build(name), HEADS[name][2]
    twin = copy.deepcopy(model)  # outputs are first captured while the model is patched
    with torch.no_grad(), patch(model, S, W):
        for rows, size in ((2, 8), (1, 7), (2, 49), (3, 1), (2, 2048)):
            chunk(size)
            ids = random_ids(rows, 50)
            given = more(ids)
            expected = twin(ids, **given)
            assert_same(model(ids, **given), expected)
            assert_same(model(inputs_embeds=model.get_input_embeddings()(ids), **given), twin(
                inputs_embeds=twin.get_input_embeddings()(ids), **given))  # fmt: skip
            cache = SinkCache(model)
            found = model(ids, past_key_values=cache, return_dict=False, **given)
            held = [x for x in found if not isinstance(x, SinkCache)]
            assert_same(held, [x for x in twin(ids, return_dict=False, use_cache=False, **given)])
            assert cache.seen == 50 and cache.lengths.tolist() == [50] * rows
            after = random_ids(rows, 3)
            whole = twin(torch.cat((ids, after), dim=1), use_cache=False)
            found = model(after, past_key_values=cache)
            if "Sequence" in type(model).__name__:
                assert_same(found.logits, whole.logits)
            else:
                assert_same(logits_of(found), logits_of(whole)[:, 50:])
    assert not [x for x in model.modules() if "forward" in vars(x)]


@pytest.mark.parametrize("name", ["items", "shifted", "experts", "question", "tokens", "class"])
def test_heads_over_2048(name):
    """The same at the real size of a chunk; the unpatched model takes its angles in float32."""
    model, ids = build(name, max_position_embeddings=4096), random_ids(1, 2100)
    given = HEADS[name][2](ids)
    with torch.no_grad():
        expected = model(ids, **given)
        with patch(model, S, 4000):
            assert_same(model(ids, **given), expected, tolerance=1e-3)


def test_padding_and_losses(chunk):
    """Rows of a left-padded batch: the losses and scores are those without sinkattn, whatever the chunk."""
    for name in ("causal", "experts", "tokens", "reward", "class"):
        model = build(name)
        ids, mask = random_ids(3, 40), torch.ones(3, 40, dtype=torch.int64)
        mask[1, :17], mask[2, :5] = 0, 0
        ids = ids.where(mask > 0, 0)
        given = HEADS[name][2](ids) if name != "reward" else {}
        given.pop("output_hidden_states", None)
        if given.get("labels", ids).dim() == 2 and "labels" in given:
            real = (
                mask & torch.nn.functional.pad(mask, (1, 0))[:, :-1]
            )  # what padding says of the first is anyone's guess
            given["labels"] = given["labels"].where(real > 0, -100)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, **given)
            keys = {"reward": ["logits"], "class": ["logits", "loss"], "experts": ["loss", "aux_loss"]}
            with patch(model, S, W):
                for size in (6, 11, 2048):
                    chunk(size)
                    found = model(ids, attention_mask=mask, **given)
                    for key in keys.get(name, ["loss"]):
                        assert_same(found[key], expected[key], f"{name}.{key}")


KEEP = {
    "none": 0,
    "one": 1,
    "nine": 9,
    "but the first 5": -5,
    "these": torch.tensor([3, 41, 40]),
    "a slice": slice(5, 45, 7),
}


@pytest.mark.parametrize("kind", list(KEEP))
def test_logits_to_keep(kind, chunk):
    """The logits asked for, whatever way, and no others are computed."""
    model, ids, keep = build("causal"), random_ids(2, 50), KEEP[kind]
    widths = []
    with torch.no_grad():
        expected = model(ids, logits_to_keep=keep)
        hook = model.lm_head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
        with patch(model, S, W):
            for size in (8, 48, 2048):
                chunk(size)
                widths.clear()
                assert_same(model(ids, logits_to_keep=keep), expected)
                assert widths == [expected.logits.shape[1]]
        hook.remove()


def test_long_prompts_go_through_in_chunks(chunk):
    """No layer sees more than a chunk at a time, the head sees one token, and hooks on the body see all at once."""
    model, ids, widths = tiny("llama"), random_ids(2, 50), {"layer": [], "body": [], "head": []}
    with patch(model, S, 10), torch.no_grad():
        whole = model(ids)
        chunk(8)
        note = lambda name: lambda _, __, output: widths[name].append(getattr(output, "last_hidden_state", output).shape[1])  # noqa: E501,E731 # fmt: skip
        parts = {"layer": model.model.layers[0], "body": model.model, "head": model.lm_head}
        hooks = [part.register_forward_hook(note(name)) for name, part in parts.items()]
        model.generate(ids, max_new_tokens=1)
        for hook in hooks:
            hook.remove()
        assert_same(model(ids), whole)
        as_tuple = model(ids, return_dict=False, use_cache=False)
    assert widths == {"layer": [8] * 6 + [2], "body": [50], "head": [1]}
    assert len(as_tuple) == 1 and relative_error(as_tuple[0], whole.logits) < 1e-4
    assert relative_error(whole.logits[:1], streaming_logits(tiny("llama"), ids[:1], S, 10)) < 1e-4


MODELS = {}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_chunk(data):
    """Any head, any size of chunk and batch, tokens beyond the capacity too: the output of the input at once."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    name = data.draw(st.sampled_from(["body", "causal", "shifted", "experts", "question", "tokens", "class"]))
    if name not in MODELS:
        MODELS[name] = build(name)
        patch(MODELS[name], 2, 9)
    model, runner = MODELS[name], sys.modules["sinkattn.runner"]
    tokens, rows = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 3))
    ids = random_ids(rows, tokens)
    more = HEADS[name][2](ids)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        whole = model(ids, **more)
        patched.setattr(runner, "CHUNK", data.draw(st.integers(1, tokens)))
        assert_same(model(ids, **more), whole)


@given(st.integers(1, 3), st.lists(st.integers(1, 5), min_size=2, max_size=5).filter(lambda x: max(x) > 1))
@settings(deadline=None)
def test_what_is_cut_is_joined(rows, widths):
    tokens = sum(widths)
    arguments = {
        "ids": torch.rand(rows, tokens), "deep": [torch.rand(rows, tokens, 7), (torch.rand(1, tokens, 3), None)],
        "number": torch.tensor(3.0), "flag": True, "times": torch.rand(tokens), "cache": (cache := object()),
    }  # fmt: skip
    chunks = cut(arguments, rows, widths)
    assert [chunk["ids"].shape[1] for chunk in chunks] == widths and all(chunk["cache"] is cache for chunk in chunks)
    assert torch.equal(torch.cat([chunk["times"] for chunk in chunks]), arguments["times"])
    assert torch.equal(torch.cat([chunk["deep"][1][0] for chunk in chunks], 1), arguments["deep"][1][0])
    made = [
        {"x": chunk["ids"], "flat": (chunk["deep"][0].flatten(0, 1), None), "same": torch.ones(7), "cache": cache}
        for chunk in chunks
    ]
    found = joined(made, rows, widths)
    assert torch.equal(found["x"], arguments["ids"]) and found["cache"] is cache
    assert torch.equal(found["flat"][0], arguments["deep"][0].flatten(0, 1)) and torch.equal(
        found["same"], torch.ones(7)
    )
    assert cut({**arguments, "pixels": torch.rand(tokens + 1, tokens + 1)}, rows, widths) is None
    with pytest.raises(ValueError, match="pooled of .* tokens cannot be put together"):
        joined(
            [{"x": chunk["ids"], "pooled": chunk["deep"][0].mean(1) + i} for i, chunk in enumerate(chunks)],
            rows,
            widths,
        )


def test_what_cannot_be_joined_is_refused_by_name(chunk):
    """Something that the body makes of all tokens together: the cache is torn, and says so."""
    model = tiny("llama")
    forward = model.model.forward

    def pooling(*args, **kwargs):
        output = forward(*args, **kwargs)
        return BaseModelOutputWithPoolingAndCrossAttentions(**output, pooler_output=output[0].amax(1))

    model.model.forward = pooling
    with patch(model, S, W), torch.no_grad():
        cache, ids = SinkCache(model), random_ids(2, 20)
        chunk(8)
        with pytest.raises(ValueError, match="pooler_output of 20 tokens.*at most 8 tokens at once"):
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="torn"):
            model(ids, past_key_values=cache)
        chunk(2048)
        cache.reset()
        assert_same(model(ids, past_key_values=cache).logits, tiny("llama")(ids).logits)
    assert model.model.forward is pooling


def test_a_head_that_fails_leaves_the_cache_torn(chunk):
    model, ids = build("causal"), random_ids(2, 20)
    with patch(model, S, W), torch.no_grad():
        for size in (8, 2048):
            chunk(size)
            cache = SinkCache(model)
            with pytest.raises(ValueError, match="to match target batch_size"):
                model(ids, labels=ids[:, :5], past_key_values=cache)
            with pytest.raises(ValueError, match="torn"):
                model(ids, past_key_values=cache)
            assert "forward" not in vars(model.model)


class Monolith(RemoteForCausalLM):
    """A model with its layers directly in it: there is no body to feed."""

    def forward(self, input_ids, labels=None, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids, **kwargs)
        if labels is not None:
            output["loss"] = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output["logits"] = output.logits[:, kept]
        return output


def test_a_model_without_a_body(chunk):
    torch.manual_seed(0)
    model, ids = Monolith(RemoteConfig(pad_token_id=0)).eval(), random_ids(2, 50)
    spread(model)
    with torch.no_grad():
        expected = [model(ids, logits_to_keep=keep).logits for keep in KEEP.values()]
        loss = model(ids, labels=ids).loss
        with patch(model, S, W):
            for size in (8, 2048):
                chunk(size)
                for keep, logits in zip(KEEP.values(), expected, strict=True):
                    assert_same(model(ids, logits_to_keep=keep).logits, logits)
            assert_same(model(ids, labels=ids).loss, loss)
            chunk(8)
            with pytest.raises(ValueError, match="loss of 50 tokens cannot be put together"):
                model(ids, labels=ids)


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe", "Qwen3Moe", "GptOss"])
def test_router_logits_in_the_config(name):
    """The first output is then an auxiliary loss."""
    more = dict(EXPERTS, num_experts=4, moe_intermediate_size=16, head_dim=16, output_router_logits=True)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**COMMON, **more)).eval()
    ids, options = random_ids(2, 9), dict(do_sample=False, max_new_tokens=20)
    with torch.no_grad():
        expected = model(ids)
        text = model.generate(ids, output_router_logits=False, **options)  # older versions fail with them
        with patch(model, S, W):
            assert_same(model(ids), expected)
            assert torch.equal(model.generate(ids, **options), text)


def test_long_inputs_of_several_threads(chunk):
    """One part of the model stands in for itself at a time: threads do not meet."""
    model, found = tiny("llama"), {}
    ids = [random_ids(1, 30 + i) for i in range(4)]
    with patch(model, S, W), torch.no_grad():
        expected = [model(x).logits for x in ids]
        chunk(5)

        def run(i):
            with torch.no_grad():
                found[i] = [model(ids[i]).logits, model(ids[i][:, :5]).logits]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, logits in enumerate(expected):
        assert_same(found[i], [logits, logits[:, :5]])


def test_outputs_have_no_gradients():
    model, ids = build("question"), random_ids(1, 20)
    with patch(model, S, W):
        output = model(ids)
        for x in (output.start_logits, output.end_logits):
            with pytest.raises(RuntimeError, match="sinkattn runs inference only"):
                x.sum().backward()


def test_logits_of():
    """The first tensor that says something of tokens, of any output."""
    model, ids = build("experts", output_router_logits=True), random_ids(2, 9)
    with torch.no_grad():
        output = model(ids, labels=ids)
        assert logits_of(output) is output.logits
        assert torch.equal(logits_of(model(ids, return_dict=False)), output.logits)
        assert logits_of(model.model(ids)).shape == (2, 9, 64)
        assert logits_of(build("question")(ids)).shape == (2, 9)
        assert logits_of(build("class")(ids)).shape == (2, 3)


def test_copies_of_captured_outputs():
    """What the next step overwrites is copied, and gets the cache where its class has a place for one."""
    cache, logits = object(), torch.rand(1, 1, 3)
    bare = copied(TokenClassifierOutput(logits=logits), cache)
    assert dict(bare).keys() == {"logits"} and torch.equal(bare.logits, logits) and bare.logits is not logits
    full = copied(transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits), cache)
    assert full.past_key_values is cache and full.logits is not logits
