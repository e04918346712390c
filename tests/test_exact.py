"""The five properties of exact streaming, against the oracle of oracle.py, on tiny random models of every family."""

import copy

import pytest
import torch

from helpers import DEVICES, fed, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, patch
from sinkattn.reference import rotate
from tiny import FAMILIES, ROPES, tiny

S, W = 4, 10
C = S + W
# Largest error of logits relative to their spread, by dtype: float32 as asked of every family
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*FAMILIES, *ROPES])
def test_streams_like_the_oracle_however_it_is_cut(name, device):
    """Properties 1, 2: dense while t < C, the oracle's logits after, and the same for every size of chunk."""
    model, ids = tiny(name).to(device), random_ids(1, 3 * C + 7, device)
    length = 10 if name in ("dynamic", "longrope") else C  # past the trained length they disagree with themselves
    with torch.no_grad():
        dense = model(ids[:, :length], use_cache=False).logits
    expected = streaming_logits(tiny(name).to(device), ids, S, W)
    with patch(model, S, W), torch.no_grad():
        assert relative_error(model(ids[:, :length]).logits, dense) < TOLERANCES[torch.float32]
        for size in (1, 7, S, C - 1, C, C + 1, ids.shape[1]):
            found = fed(model, ids, size)
            assert relative_error(found, expected) < TOLERANCES[torch.float32], f"chunks of {size}"


@pytest.mark.parametrize("name", [*FAMILIES, *ROPES])
def test_neighbours_do_not_matter(name):
    """Property 3: the rows of a left-padded batch give what they give alone, in one piece and token by token."""
    model, ids = tiny(name), random_ids(3, 2 * C + 5)
    mask = torch.ones_like(ids)
    mask[1, : C + 3], mask[2, :2] = 0, 0
    ids[mask == 0] = 0
    with patch(model, S, W), torch.no_grad():
        alone = [model(row[keep.bool()][None]).logits for row, keep in zip(ids, mask, strict=True)]
        for size in (1, 9, ids.shape[1]):
            cache = SinkCache(model)
            pieces = []
            for begin in range(0, ids.shape[1], size):
                part = slice(begin, begin + size)
                pieces.append(model(ids[:, part], attention_mask=mask[:, : begin + size], past_key_values=cache).logits)
            together = torch.cat(pieces, dim=1)
            for row in range(3):
                found = together[row : row + 1, mask[row].bool()]
                assert relative_error(found, alone[row]) < TOLERANCES[torch.float32], f"row {row}, chunks of {size}"
            assert cache.lengths.tolist() == mask.sum(1).tolist()


def aged(model, cache, shift: int):
    """The same text `shift` tokens later: every window key turned on by `shift`, in float64. shift: a multiple of R."""
    for layer in cache.layers:
        assert shift % layer.window_size == 0
        if layer.rope is not None:
            angles = shift * layer.rope.frequencies[-1]
            ring = layer.keys[:, :, layer.sink_size :]
            turned = rotate(ring.cpu().double(), angles.cos(), angles.sin(), layer.rope.start, layer.rope.interleaved)
            ring.copy_(turned.to(ring.dtype))
    cache.lengths.add_(shift)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3", "cohere2"])
def test_age_does_not_matter(name, dtype, device):
    """Property 4: the error at position 4,000,000 is no more than twice that at 5,000, dtype by dtype."""
    model, ids = tiny(name).to(device), random_ids(1, 8 * C, device)
    expected = streaming_logits(tiny(name).to(device), ids, S, W)
    model = model.to(dtype)
    exact = dict(tiny(name).named_buffers())
    for path, _ in list(model.named_buffers()):  # as from_pretrained(dtype=...) leaves them
        if "inv_freq" in path:
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], exact[path].to(device))
    errors = []
    with patch(model, S, W), torch.no_grad():
        for start in (0, 5_000, 4_000_000):
            cache = SinkCache(model)
            model(ids[:, : 2 * C], past_key_values=cache)
            aged(model, cache, start - start % 60)  # 60: a multiple of W = 10 and of the sliding window of 6
            logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(2 * C, ids.shape[1])]
            # three windows on, every key in the ring was written at its own age, through every layer
            errors.append(relative_error(torch.cat(logits, dim=1)[:, 4 * W :], expected[:, 2 * C + 4 * W :]))
    assert errors[0] < TOLERANCES[dtype]
    assert errors[2] <= 2 * max(errors[1], errors[0]), errors


def test_models_beside_stay_as_they_are():
    """patch works on one model object, even where another shares its config object, and remove() undoes all of it."""
    model = tiny("llama")
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    ids = random_ids(1, 2 * C)
    with torch.no_grad():
        before = model(ids).logits
        attributes, config = set(vars(model)), model.config
        handle = patch(model, S, W)
        assert relative_error(model(ids).logits, before) > 0.1
        assert torch.equal(twin(ids).logits, before)
        handle.remove()
        handle.remove()
        assert torch.equal(model(ids).logits, before)
    assert set(vars(model)) == attributes and model.config is config
    assert all(not hasattr(module, "config") or module.config is config for module in model.modules())


def test_a_copy_of_a_patched_model_is_patched_by_itself():
    model, ids = tiny("llama"), random_ids(1, 2 * C)
    handle = patch(model, S, W)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        streaming = model(ids).logits
        handle.remove()
        assert relative_error(model(ids).logits, streaming) > 0.1
        assert torch.equal(twin(ids).logits, streaming)


def test_state_of_dynamic_frequencies_does_not_leak():
    """What the model ran before the patch, and what the probe ran, change nothing."""
    model, ids = tiny("dynamic"), random_ids(1, 3 * C)
    expected = streaming_logits(tiny("dynamic"), ids, S, W)
    with torch.no_grad():
        model(ids)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with patch(model, S, W):
            assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
            assert relative_error(model(ids).logits, expected) < TOLERANCES[torch.float32]


def test_dense_prompts_that_the_model_would_see_otherwise():
    """Longer than a window of a layer's own, or than what frequencies are known for: refused, and nothing is lost."""
    for name, more, most, why in (
        ("mistral", dict(sliding_window=2 * C), 2 * C, "window of a layer's own"),
        ("mistral", dict(sliding_window=C), C, "window of a layer's own"),
        ("mistral", dict(sliding_window=W), 4 * C, None),
        ("dynamic", {}, C, "frequencies"),
        ("longrope", {}, C, "frequencies"),
    ):
        model, ids = tiny(name, **more), random_ids(2, 4 * C)
        with torch.no_grad():
            expected = model(ids[:, :most]).logits
        with patch(model, S, W, prefill="dense"), torch.no_grad():
            cache = SinkCache(model)
            if why is not None:
                with pytest.raises(ValueError, match=f"prefill='dense': .*{why}"):
                    model(ids[:, : most + 1], past_key_values=cache)
            found = model(ids[:, :most], past_key_values=cache).logits
            assert relative_error(found, expected) < TOLERANCES[torch.float32]
            assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
            padded = torch.ones_like(ids[:, :most])
            padded[0, :3] = 0
            found = model(ids[:, :most], attention_mask=padded).logits
            assert relative_error(found[1], expected[1]) < TOLERANCES[torch.float32]


def test_dense_prompt_then_cut_down():
    """prefill='dense': a prompt gives the unpatched logits, and what follows sees sinks and the last W tokens only."""
    model, ids, more = tiny("llama"), random_ids(1, 4 * C), random_ids(1, 2 * C)
    expected = streaming_logits(model, torch.cat((ids, more), dim=1), S, W, dense=4 * C)
    with torch.no_grad():
        dense = model(ids).logits
        prompt = model(ids, output_hidden_states=True).hidden_states
    with patch(model, S, W, prefill="dense"), torch.no_grad():
        assert relative_error(model(ids).logits, dense) < TOLERANCES[torch.float32]
        cache = SinkCache(model)
        found = model(ids, past_key_values=cache, output_hidden_states=True).hidden_states
        assert relative_error(found[-1], prompt[-1]) < TOLERANCES[torch.float32]
        assert cache.layers[0].keys.shape[2] == C + 16  # slack
        after = [model(x, past_key_values=cache).logits for x in more.split(1, dim=1)]
        assert relative_error(torch.cat(after, dim=1), expected[:, 4 * C :]) < TOLERANCES[torch.float32]
