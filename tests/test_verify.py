"""What patch() looks at: float32 without a copy of the weights, and layers with windows of their own."""

import pytest
import torch
from torch.nn import functional as F

from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, UnsupportedModelError, patch
from sinkattn.precise import PIECE, Precise
from tiny import FAMILIES, tiny

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_runs_in_float32(name, dtype):
    """The same numbers as the model's weights in float32: bit for bit, but where sums have another order."""
    model, ids = tiny(name).to(dtype), torch.randint(1, 97, (2, 20))
    with torch.no_grad():
        with Precise():
            found = model(ids).logits
        native = model(ids).logits
        weights = {key: x.clone() for key, x in model.state_dict().items()}
        expected = model.float()(ids).logits
    assert found.dtype == torch.float32 and native.dtype == dtype
    assert relative_error(found, expected) < 5e-5 < relative_error(native, expected)
    assert all(x.dtype == dtype for x in weights.values())


def test_large_weights_are_widened_by_pieces(monkeypatch):
    monkeypatch.setitem(PIECE, "cpu", 100)
    x, weight, bias = torch.randn(3, 7), torch.randn(33, 7).bfloat16(), torch.randn(33).bfloat16()
    with Precise():
        torch.testing.assert_close(F.linear(x, weight, bias), F.linear(x, weight.float(), bias.float()))


def test_what_is_written_keeps_its_dtype():
    half, wide = torch.zeros(4, dtype=torch.bfloat16), torch.randn(4)
    with Precise():
        half.copy_(wide)
        half[1:2] = wide[:1]
        half.add_(wide)
        assert half.dtype == torch.bfloat16 and wide.to(torch.bfloat16).dtype == torch.float32
    rounded = wide.to(torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and torch.equal(half, rounded[[0, 0, 2, 3]] + rounded)


@pytest.mark.parametrize(
    "own, S, W", [(12, 4, 12), (12, 4, 9), (12, 8, 12), (12, 4, 8), (12, 4, 13), (6, 1, 6), (9, 6, 5)]
)
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3", "gemma2", "cohere2", "gpt_oss"])
def test_windows_of_a_layers_own(name, own, S, W):
    """The oracle's logits at every token, where a layer's own window is less than, in or more than [W, S + W)."""
    model, ids = tiny(name, sliding_window=own), torch.randint(1, 97, (2, 3 * (S + W)))
    expected = torch.cat([streaming_logits(tiny(name, sliding_window=own), row[None], S, W) for row in ids])
    with torch.no_grad():
        dense = model(ids[:, : S + W]).logits
        with patch(model, S, W):
            assert relative_error(model(ids[:, : S + W]).logits, dense) < 1e-4
            assert relative_error(model(ids).logits, expected) < 1e-4
            cache = SinkCache(model)
            pieces = [model(x, past_key_values=cache).logits for x in ids.split([W, 1, 1, ids.shape[1] - W - 2], dim=1)]
            assert relative_error(torch.cat(pieces, dim=1), expected) < 1e-4


def test_a_named_backend_does_not_take_what_it_cannot():
    with pytest.raises(UnsupportedModelError, match="window of its own, 10 tokens"):
        patch(tiny("gemma2", sliding_window=10), 4, 8, backend="cpu")


class Off(torch.nn.Module):
    """A head that looks at positions behind sinkattn's back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.05 * torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] / x.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_what_counts_columns_is_refused(dtype):
    model = tiny("llama").to(dtype)
    model.lm_head = Off(model.lm_head)
    with pytest.raises(UnsupportedModelError, match="short text .*other outputs"):
        patch(model, 4, 8)
    assert not hasattr(model, "_sinkattn") and "forward" not in vars(model)


def test_more_than_the_trained_length_is_told():
    model = tiny("llama", max_position_embeddings=32)
    with pytest.warns(UserWarning, match="40 .* 32"):
        patch(model, 4, 36).remove()
