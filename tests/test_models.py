"""Many models: a sample of the sweep, models whose code lies beside their weights, and where a model may live."""

import copy
import importlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import sweep
from helpers import fed, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, UnsupportedModelError, patch
from tiny import spread

S, W = 4, 10
C = S + W


@pytest.mark.parametrize("name", sweep.SAMPLE)
def test_types(name):
    """A sample of `tests/sweep.py`, which checks all types."""
    result = sweep.check(name)
    if name == "gpt2":
        assert result.status == "refused" and "learned" in result.reason
    else:
        assert result.status == "exact", result


@pytest.fixture
def remote(tmp_path):
    """Loads the model of remote_model.py from a folder that holds its code, as a hub's repository does."""

    def load(**settings):
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copy(Path(__file__).parent / "remote_model.py", folder / "modeling_remote.py")
        classes = {"AutoConfig": "RemoteConfig", "AutoModelForCausalLM": "RemoteForCausalLM"}
        auto_map = {name: f"modeling_remote.{cls}" for name, cls in classes.items()}
        config = dict(model_type="remote_of_the_tests", auto_map=auto_map, pad_token_id=0, **settings)
        (folder / "config.json").write_text(json.dumps(config))
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        spread(model)
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

    return load


@pytest.mark.parametrize("alibi", [False, True])
def test_code_beside_the_weights(remote, alibi):
    """A model that transformers does not know, rotary or ALiBi, is exact in every mode."""
    model = remote(alibi=alibi)
    ids, twin = random_ids(3, 3 * C + 5), copy.deepcopy(model)
    mask = torch.ones_like(ids)
    mask[1, : C + 3], mask[2, :2] = 0, 0
    expected = streaming_logits(twin, ids[:1], S, W)
    with patch(model, S, W) as handle, torch.no_grad():
        assert handle.plan.route == "watch"
        for size in (1, 7, C + 1, ids.shape[1]):
            assert relative_error(fed(model, ids[:1], size), expected) < 1e-4, f"chunks of {size}"
        for size in (1, 9, ids.shape[1]):
            together = fed(model, ids, size, mask)
            for row, kept in enumerate(mask.bool()):
                alone = streaming_logits(twin, ids[row : row + 1, kept], S, W)
                assert relative_error(together[row : row + 1, kept], alone) < 1e-4, f"row {row}, chunks of {size}"
        greedy = model.generate(ids[:1], attention_mask=mask[:1], do_sample=False, max_new_tokens=30)
    logits = streaming_logits(twin, greedy, S, W)[:, ids.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1), greedy[:, ids.shape[1] :])


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_slopes(dtype, rounding):
    """Falcon-RW's bias carries 1 / sqrt(head_dim), and is rounded to the model's dtype."""
    for settings in (dict(), dict(num_attention_heads=6, hidden_size=96)):
        model = sweep.build("falcon (ALiBi)", **settings).to(dtype)
        model.config._attn_implementation = "sdpa"  # "eager" adds the bias twice
        with patch(model, S, W) as handle:
            found = handle.plan.layers[0, 0]
        heads, dim = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
        build = importlib.import_module(type(model).__module__).build_alibi_tensor
        exact = build(torch.ones(1, 2, dtype=torch.int64), heads, torch.float64).view(heads, 2)[:, 1] / dim**0.5
        assert found.scale == pytest.approx(dim**-0.5, rel=1e-6)
        assert found.alibi_slopes.double() == pytest.approx(exact.double(), rel=rounding)


@pytest.mark.parametrize("step", [4, C - 1])  # positions between two scales; the second begins where the cache ends
def test_query_scaled_by_position(step):
    """Ministral-3 scales a query by its position; as in the cache that is ``min(t, C - 1)``: so the oracle does."""
    rope = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=step)
    model = sweep.build("ministral3", rope_parameters=dict(rope, llama_4_scaling_beta=0.5))
    ids = random_ids(1, 3 * C)
    expected = streaming_logits(copy.deepcopy(model), ids, S, W)
    with patch(model, S, W) as handle:
        last = 1 + 0.5 * math.log(1 + (C - 1) // step)
        assert handle.plan.layers[0, 0].query_scales[[0, C - 1]].tolist() == pytest.approx([1, last])
        for size in (1, 9, ids.shape[1]):
            assert relative_error(fed(model, ids, size), expected) < 1e-4, f"chunks of {size}"


def test_query_scaled_by_the_length_of_the_cache():
    """Llama-4 counts columns of the cache, padding too: served while all of them are scaled alike."""
    with pytest.raises(UnsupportedModelError, match="layer 1: its queries depend on how much the cache holds"):
        patch(sweep.build("llama4_text", floor_scale=4, no_rope_layers=[1, 0, 1, 0]), S, W)


def test_chunked_attention():
    """Llama-4's chunks count positions in the cache: no border is met, unless a chunk is shorter than the cache."""
    ids = random_ids(1, 4 * C)
    model = sweep.build("llama4_text", attention_chunk_size=C)
    expected = streaming_logits(copy.deepcopy(model), ids, S, W)
    with patch(model, S, W):
        assert relative_error(fed(model, ids, 9), expected) < 1e-4
    for size in (C - 1, W, 5):
        with pytest.raises(UnsupportedModelError, match="chunks below S"):
            patch(sweep.build("llama4_text", attention_chunk_size=size), S, W)


def test_several_turns_and_rows_of_a_hybrid():
    """The state of other layers lies in the same cache: it resets, follows the beams, and is copied with it."""
    model = sweep.build("falcon_h1")
    ids = random_ids(2, 2 * C)
    with patch(model, S, W), torch.no_grad():
        expected = model(ids).logits
        cache = SinkCache(model)
        model(ids[:, :C], past_key_values=cache)
        again = copy.deepcopy(cache)
        assert relative_error(model(ids[:, C:], past_key_values=cache).logits, expected[:, C:]) < 1e-4
        again.reorder_cache(torch.tensor([1, 0]))
        assert relative_error(model(ids[:, C:].flip(0), past_key_values=again).logits, expected[:, C:].flip(0)) < 1e-4
        cache.reset()
        with torch.inference_mode():
            first = model(ids[:, :5], past_key_values=cache).logits
        found = torch.cat((first, model(ids[:, 5:], past_key_values=cache).logits), dim=1)
        assert relative_error(found, expected) < 1e-4
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        chat = SinkCache(model)
        model.generate(ids[:, :C], past_key_values=chat, attention_mask=torch.ones_like(ids[:, :C]), max_new_tokens=1)
        again = model.generate(ids, past_key_values=chat, attention_mask=torch.ones_like(ids), max_new_tokens=8)
        assert torch.equal(again, greedy)


def test_images_are_refused():
    """Gemma-3 shows the tokens of an image those after them, which no causal cache can; nothing is lost."""
    model = sweep.build("gemma3")
    ids = random_ids(1, 12)
    with patch(model, S, W), torch.no_grad():
        cache = SinkCache(model)
        model(ids, past_key_values=cache)
        types = torch.zeros_like(ids)
        types[:, 3:7] = 1
        with pytest.raises(ValueError, match="those after them"):
            model(ids, past_key_values=cache, token_type_ids=types)
        expected = model(torch.cat((ids, ids), dim=1)).logits
        assert relative_error(model(ids, past_key_values=cache).logits, expected[:, 12:]) < 1e-4
