"""The probe finds what each layer rotates; angles are exact at any position."""

import mpmath
import pytest
import torch

from helpers import DEVICES
from sinkattn import SinkCache, patch
from sinkattn.rope import Rope
from tiny import FAMILIES, ROPES, tiny

S, W = 4, 10
HALF_SPLIT, INTERLEAVED = False, True
LAYOUTS = {  # first rotated dim, layout, rotated dims, layers without rotation
    "llama": (0, HALF_SPLIT, 16, []),
    "qwen3": (0, HALF_SPLIT, 24, []),
    "gpt_neox": (0, HALF_SPLIT, 4, []),
    "stablelm": (0, HALF_SPLIT, 4, []),
    "glm4": (0, INTERLEAVED, 8, []),
    "cohere2": (0, INTERLEAVED, 16, [1, 3]),
    "smollm3": (0, HALF_SPLIT, 16, [1, 3]),
    "deepseek_v3": (16, HALF_SPLIT, 8, []),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layouts(name, dtype):
    """Layer by layer, also in half precision, as the models' sources say."""
    start, interleaved, dims, without = LAYOUTS[name]
    with patch(tiny(name).to(dtype), S, W) as handle:
        for (layer_idx, _), layer in handle.plan.layers.items():
            assert (layer.rope is None) == (layer_idx in without)
            if layer.rope is not None:
                found = layer.rope.start, layer.rope.interleaved, 2 * layer.rope.frequencies.shape[-1]
                assert found == (start, interleaved, dims)


@pytest.mark.parametrize("name", [*FAMILIES, *ROPES])
def test_frequencies_are_those_the_model_uses(name):
    """Of every rope type: the table in use, per sequence length where the model picks by it."""
    model = tiny(name)
    buffers = [b.double() for n, b in model.named_buffers() if n.endswith("inv_freq") and "original" not in n]
    with patch(model, S, W) as handle:
        ropes = [layer.rope for layer in handle.plan.layers.values() if layer.rope is not None]
    assert ropes
    for rope in ropes:
        first = rope.frequencies[0]  # of the shortest texts: as the model was made
        assert any(b.shape == first.shape and torch.equal(b, first) for b in buffers)
        assert rope.varies == (name in ("dynamic", "longrope"))


def test_own_windows():
    """A layer's own sliding window counts where it is smaller than the cache: S and W of its ring, how far it sees."""
    usual = (S, W, None)
    for window, own in ((6, (0, 6, None)), (W, (0, W, None)), (W + 1, (S, W, W + 1)), (S + W, usual)):
        with patch(tiny("gemma2", sliding_window=window), S, W) as handle:
            rings = SinkCache(handle.model).layers
            assert [(x.sink_size, x.window_size, x.sink_reach) for x in rings] == [own, usual, own, usual]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("position", [0, 1, 4095, 4_000_000, 2**31 + 1, 2**40 + 3])
def test_angles_are_exact(position, device):
    """Against 50-digit arithmetic: float32 results of float64 angles, to the last bit or next to it."""
    frequencies = (1.0 / 10000 ** (torch.arange(0, 64, 2) / 64)).double()[None]
    rope = Rope(0, False, frequencies, torch.zeros(15, dtype=torch.int64))
    cos, sin = rope.table(torch.tensor([position], device=device))[0].double()
    with mpmath.workdps(50):
        for i, frequency in enumerate(frequencies[0].tolist()):
            angle = mpmath.mpf(position) * mpmath.mpf(frequency)
            allowed = 6.1e-8 + 2.3e-16 * float(angle)
            assert abs(cos[i].item() - mpmath.cos(angle)) <= allowed
            assert abs(sin[i].item() - mpmath.sin(angle)) <= allowed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_angles_of_a_step(tokens, device):
    """For text at the positions of a row's tokens, behind padding; for sinks the same up to the end of the cache."""
    frequencies = (1.0 / 10000 ** (torch.arange(0, 24, 2) / 24)).double()[None]
    rope, lengths = Rope(0, False, frequencies, torch.zeros(15, dtype=torch.int64)), torch.tensor([0, 13, 4_000_000])
    for counts in (None, torch.tensor([1, 0, 1]), torch.tensor([tokens, 1, 0])):
        given = lengths.to(device), None if counts is None else counts.to(device)
        found = rope.table_of_step(*given, tokens, 14)
        first = lengths if counts is None else lengths - tokens + counts
        positions = first[:, None] + torch.arange(tokens)
        text, sink = rope.table(positions), rope.table(positions.clamp(max=13))
        torch.testing.assert_close(found.cpu(), torch.stack((text, sink), dim=2), rtol=0, atol=1.2e-7)
