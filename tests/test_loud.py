"""Loud models (loud.py) in every dtype: served, and as near to float64 as unpatched; wrong patches are refused."""

import functools
import math
import os

import pytest
import torch

from helpers import DEVICES, fed
from loud import ALLOWED, EMBEDDED, KEY_BIAS, Exactly, exact, loud, times_worse, token_errors
from oracle import streaming_logits
from sinkattn import UnsupportedModelError, patch
from tiny import FAMILIES
from wrong import refused

S, W = 4, 10
TEXTS, TOKENS = 12, 2 * (S + W) + 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(f"loud {name}")) for name in FAMILIES]  # see `measured`
SEED = int(os.environ.get("SINKATTN_SEED") or torch.seed() % 2**32)  # of the texts; a failing test shows it


@functools.lru_cache(maxsize=len(DTYPES))  # tests of one model follow each other
def measured(name: str, dtype, device: str):
    """Texts, their streaming logits in float64, and those of the unpatched model in `dtype`, by the oracle."""
    ids = torch.randint(1, 97, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(SEED)).to(device)
    model = loud(name, dtype, device)
    with Exactly():
        expected = streaming_logits(exact(model), ids, S, W)
    return ids, expected, streaming_logits(model, ids, S, W)


@pytest.mark.parametrize("name", NAMES)
def test_loud_models_are_loud_and_sane(name):
    model, ids = loud(name), torch.randint(1, 97, (16, S + W))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    stream = output.hidden_states[1].abs().flatten(0, 1).median(0).values
    assert stream[EMBEDDED].min() > 15_000 and stream.median() < 20
    norms = [x for n, x in model.named_parameters() if "norm" in n and n.endswith("weight")]
    shift = "gemma" in name
    assert min((x + shift).min() for x in norms) < 0.03 and max(x.max() for x in norms) > 190
    biases = [x for n, x in model.named_parameters() if n.endswith(("k_proj.bias", "query_key_value.bias"))]
    assert all((x.abs() == KEY_BIAS).any() for x in biases)
    assert bool(biases) == (name in ("qwen2", "gpt_neox", "glm4", "gpt_oss"))
    largest = output.attentions[1][:, :, S:].amax(-1).mean((0, 2))  # (heads,), how much the first key of all gets
    assert largest[0] > 0.45 or name == "gemma2"  # its logits are capped at 2
    for dtype, allowed in ((torch.bfloat16, 0.3), (torch.float16, 0.3)):
        _, expected, own = measured(name, dtype, "cpu")
        error = (own.double() - expected).square().mean().sqrt() / expected.std()
        assert error < allowed, f"{dtype}: unpatched is {error:.2f} of the spread away from float64"


@pytest.mark.parametrize("fused", ["none", "attention", "layers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_as_near_to_float64_as_unpatched(device, name, dtype, fused):
    """At once, and token by token in batches of 8, 3 and 1 rows: 1.1 times the unpatched model's own error at most."""
    ids, expected, own = measured(name, dtype, device)
    model = loud(name, dtype, device)
    if not own.isfinite().all():
        return broken_by_itself(model, dtype, fused)
    with patch(model, S, W, fuse=fused), torch.no_grad():
        at_once = model(ids).logits
        by_token = torch.cat([fed(model, rows, 1) for rows in ids.split([8, 3, 1])])
    for what, found in {"at once": at_once, "token by token": by_token}.items():
        times, noise = times_worse(token_errors(found, expected), token_errors(own, expected))
        print(f"{device} {name} {dtype} {fused} {what}: {times:.3f} times, noise {noise:.3f}")
        assert math.log(times) <= math.log(ALLOWED) + 3 * noise, f"{what}: {times:.3f} times, {noise=:.3f}, {SEED=}"
        assert noise < 0.2, "so little is known that the test is none"
        if dtype == torch.float32:  # no single token is far off, if it is not in the unpatched model
            error, of_own = ((x.double() - expected).abs().amax(-1) / expected.std(-1) for x in (found, own))
            assert (error < (ALLOWED * of_own).clamp_min(5e-3)).all(), (
                f"{what}: {error.max():.1e} of the spread, {SEED=}"
            )


def broken_by_itself(model, dtype, fused: str) -> None:
    """A model that gives NaN unpatched is served, or refused in words that name the dtype and blame the model."""
    try:
        patch(model, S, W, fuse=fused).remove()
    except UnsupportedModelError as refusal:
        assert str(dtype).removeprefix("torch.") in str(refusal) and "unpatched" in str(refusal), str(refusal)


@pytest.mark.parametrize("fused", ["none", "layers"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_model_that_float16_breaks(name, fused):
    """Hidden states beyond float16 give NaN without any patch (as Gemma-3 does): sinkattn must not blame itself."""
    model = loud(name, torch.float16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, EMBEDDED[0]] *= 4
        assert not model(torch.arange(3, 11)[None]).logits.isfinite().any()
    broken_by_itself(model, torch.float16, fused)
    assert not hasattr(model, "_sinkattn")


# Rotated layers of these keep a window of their own, and so no sinks
WITH_SINKS = [name for name in FAMILIES if name not in ("mistral-sliding", "cohere2")]
CASES = [
    *((wrong, name, "layers") for wrong in ("sinks one nearer", "sinks one farther") for name in WITH_SINKS),
    *(("sinks one farther past the wrap", name, "layers") for name in ("llama", "gpt_neox", "glm4", "gpt_oss")),
    *(("scale + 2 %", name, "layers") for name in FAMILIES),
    *((wrong, "llama", "none") for wrong in ("sinks one nearer", "sinks one farther", "scale - 2 %")),
    *(("no q norm", name, fused) for name in ("qwen3", "gemma3") for fused in ("attention", "layers")),
    *(("norm of 1 + w", name, fused) for name in ("qwen3", "gemma3") for fused in ("attention", "layers")),
    ("norm of 1 + w", "llama", "layers"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wrong, name, fused", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_wrong_patches_are_refused(device, wrong, name, fused, dtype):
    refused(loud(name, dtype, device), wrong, S, W, fuse=fused)
