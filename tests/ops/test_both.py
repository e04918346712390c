"""What holds of decode and prefill alike: chunks, neighbours and strides do not matter, and PyTorch is no better."""

import dataclasses

import pytest
import torch

from cases import (
    BACKENDS,
    GPU_BACKENDS,
    MIXED,
    TOLERANCES,
    Case,
    both_ops,
    check,
    copies,
    every_backend,
    fitted,
    same_bits,
)
from sinkattn import ops, reference


@every_backend
def test_chunks_do_not_matter(backend, device):
    """A text at once, in chunks, and token by token."""
    text = fitted(Case((0,), tokens=45, heads=4, learned=True, alibi=True), backend)
    dtype, tolerance = (torch.float16, 4e-3) if backend == "cuda" else (torch.float32, 1e-5)
    q, k, v, k_cache, v_cache, lengths, counts, rotation, learned, slopes, *_ = text.tensors(dtype, device)

    def run(chunks):
        caches = k_cache.clone(), v_cache.clone()
        outs, begin = [], 0
        for size in chunks:
            part = slice(begin, begin + size)
            op = ops.decode if size == 1 else ops.prefill
            at = (q[:, :, part], k[:, :, part], v[:, :, part], *caches, lengths + begin, counts, rotation[:, part])
            outs.append(op(*at, learned, slopes, **text.sizes, backend=backend))
            begin += size
        return torch.cat(outs, dim=1), *caches

    whole = run([45])
    for chunks in ([1] * 45, [3, 1, 16, 20, 5], [30, 15]):
        torch.testing.assert_close(run(chunks), whole, rtol=tolerance, atol=tolerance)


@every_backend
@both_ops
def test_same_bits(backend, device, op):
    """The same input gives the same bits, in whatever order programs and threads finish."""
    for lengths in ((5000,), MIXED):
        case = fitted(Case(lengths, tokens=1 if op == "decode" else 40, heads=6, window=290), backend)
        tensors = case.tensors(torch.float16, device)
        runs = [copies(tensors) for _ in range(2 if device == "cpu" else 20)]
        outs = [getattr(ops, op)(*run, **case.sizes, backend=backend) for run in runs]
        for out, run in zip(outs, runs, strict=True):
            assert same_bits(out, outs[0]) and same_bits(run[3], runs[0][3]) and same_bits(run[4], runs[0][4])


@every_backend
@both_ops
def test_neighbours_do_not_matter(backend, device, op):
    """A row of a batch gives what it gives alone."""
    case = fitted(Case((2, 40, 4_000_000), tokens=1 if op == "decode" else 9, heads=4), backend)
    dtype, tolerance = (torch.float16, 2e-3) if backend == "cuda" else (torch.float32, 1e-5)
    tensors = case.tensors(dtype, device)
    together = copies(tensors)
    out = getattr(ops, op)(*together, **case.sizes, backend=backend)
    for row in range(3):
        alone = copies([x if x is None or 7 < i < 10 else x[row : row + 1] for i, x in enumerate(tensors)])
        single = getattr(ops, op)(*alone, **case.sizes, backend=backend)
        torch.testing.assert_close(single, out[row : row + 1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(alone[3], together[3][row : row + 1], rtol=0, atol=0, equal_nan=True)


@every_backend
@both_ops
def test_strides_of_small_tensors_do_not_matter(backend, device, op):
    """Lengths, counts, rotation, learned logits and slopes may be slices of something larger."""
    tokens = 1 if op == "decode" else 9
    case = fitted(Case((3, 5000), (1, tokens), tokens=tokens, heads=4, learned=True, alibi=True), backend)
    tensors = copies(case.tensors(torch.float16, device))
    sliced = (*copies(tensors)[:5], *(torch.stack((x, x + 1), dim=-1)[..., 0] for x in tensors[5:10]))
    assert not any(x.is_contiguous() for x in sliced[5:])
    outs = [getattr(ops, op)(*given, **case.sizes, backend=backend) for given in (tensors, sliced)]
    assert same_bits(*outs) and same_bits(sliced[3], tensors[3]) and same_bits(sliced[4], tensors[4])


COMPILED_BACKENDS = [*GPU_BACKENDS, *(param for param in BACKENDS if param.values[0] == "cpu")]


@pytest.mark.parametrize(("backend", "device"), COMPILED_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (16, 2), (32, 2), (12, 4)])
@pytest.mark.parametrize("scale", [0.1, 1, 8])
def test_as_good_as_sdpa(backend, device, heads, dtype, scale):
    """Against float64, half as much again as PyTorch's attention in the same dtype is the most that may be lost."""
    case = Case((3000, 700), None, 1, *heads, 128, window=1020, rotary=0)
    errors = torch.zeros(2, dtype=torch.float64)
    for op, tokens in ("decode", 1), ("prefill", 300):
        case = dataclasses.replace(case, tokens=tokens, lengths=(3000, 700) if tokens == 1 else (0, 0))
        tensors = [scale * x if x is not None and x.is_floating_point() else x for x in case.tensors(dtype, device)]
        before = copies(tensors)
        out = getattr(ops, op)(*tensors, **case.sizes, backend=backend)
        q, k, v, k_cache, v_cache, lengths = before[:6]
        exact = reference.attention(*copies(before, torch.float64), **case.sizes)
        for row, length in enumerate(lengths.tolist()):
            if tokens > 1:
                keys, values, causal = k[row : row + 1], v[row : row + 1], True
            else:  # what the call left in the cache, as far as it is filled
                keys, values, causal = tensors[3][row : row + 1], tensors[4][row : row + 1], False
                keys, values = keys[:, :, : length + 1], values[:, :, : length + 1]
            peer = torch.nn.functional.scaled_dot_product_attention(
                q[row : row + 1], keys, values, is_causal=causal, enable_gqa=True
            )
            for i, x in enumerate((out[row : row + 1], peer.transpose(1, 2))):
                errors[i] += (x.double() - exact[row : row + 1]).square().sum().cpu()
    ours, peers = errors.sqrt().tolist()
    assert ours <= 1.5 * peers


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), GPU_BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (6, 2), (16, 1)])
def test_large(backend, device, heads, head_dim, dtype):
    case = Case((500, 1024, 4_000_000), None, 1, *heads, head_dim, window=1020)
    check("decode", backend, device, dtype, case)
    many = dataclasses.replace(case, lengths=(1019, 1020, 3000, 70_000) * 8)
    check("decode", backend, device, dtype, many)
    check("prefill", backend, device, dtype, dataclasses.replace(case, tokens=777, counts=(777, 300, 776)))
    check("prefill", backend, device, dtype, dataclasses.replace(case, lengths=(0,), tokens=1500, dense=10**6))
