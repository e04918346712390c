"""Prefill on every backend: outputs and caches at every length, shape and padding."""

import dataclasses

import pytest
import torch

from cases import GPU_BACKENDS, MIXED, SHAPES, Case, check, dtypes, edges, every_backend, with_cuda_library
from helpers import GPU
from sinkattn import ops


@every_backend
@pytest.mark.parametrize("tokens", [1, 5, 35])
@pytest.mark.parametrize("lengths", edges(), ids=str)
def test_edges(backend, device, lengths, tokens):
    for dtype in dtypes(backend, device):
        check("prefill", backend, device, dtype, Case(lengths, tokens=tokens))


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, device, shape):
    for dtype in dtypes(backend, device, few=True):
        check("prefill", backend, device, dtype, Case(**{"lengths": MIXED, "tokens": 19} | SHAPES[shape]))


@every_backend
@pytest.mark.parametrize("dense", [0, 12, 20, 10**15])
@pytest.mark.parametrize("tokens", [3, 30])
def test_padding(backend, device, tokens, dense):
    """Left padding from none to all of a row, streaming and dense."""
    counts = (0, 1, tokens // 2, tokens - 1, tokens, tokens)
    case = Case((0, 1, 3, 20, 0, 4_000_000), counts, tokens, dense=dense, heads=4, learned=True, alibi=True)
    for dtype in dtypes(backend, device, few=True):
        check("prefill", backend, device, dtype, case)


@every_backend
@pytest.mark.parametrize("dense", [0, 130])
def test_long_chunks(backend, device, dense):
    """Several blocks of queries, and of keys that all of them see."""
    case = Case((0, 500), (150, 149), 150, 2, 1, window=100, dense=dense)
    for dtype in dtypes(backend, device, few=True):
        check("prefill", backend, device, dtype, case)


@every_backend
@pytest.mark.parametrize(("shape", "tokens"), [("plain", 2), ("plain", 16), *((shape, 5) for shape in SHAPES)])
def test_few_tokens(backend, device, shape, tokens):
    """A ring with room for all of them beside the window, or for one less; padding, and slots at both ends at once."""
    case = Case(**{"lengths": (0, 3, 4, 15, 16, 26, 27, 31, 55, 4_000_000), "tokens": tokens} | SHAPES[shape])
    counts = tuple((3 * i + tokens) % (tokens + 1) for i in range(len(case.lengths)))
    for dtype in dtypes(backend, device, few=True):
        is_slow = backend == "triton" and device == "cpu"
        for ring in (case.window + tokens - 1, case.window + tokens - 2):
            for taken in (counts,) if is_slow else (None, counts):
                check("prefill", backend, device, dtype, dataclasses.replace(case, ring=ring, counts=taken))


@pytest.mark.parametrize(("backend", "device"), GPU_BACKENDS)
@pytest.mark.parametrize(("rows", "kv_heads"), [(1, 1), (1, 8), (3, 8), (12, 8)])
def test_few_tokens_of_long_rings(backend, device, rows, kv_heads):
    """Key heads that one block, a cluster or many blocks share."""
    for tokens, window in ((5, 1020), (16, 300), (2, 3000)):
        lengths = tuple(1000 * i + 7 for i in range(1, rows + 1))
        case = Case(lengths, None, tokens, 4 * kv_heads, kv_heads, 64, window=window, ring=window + 16)
        for dtype in dtypes(backend, device, few=True)[-2:]:
            check("prefill", backend, device, dtype, case)


@pytest.mark.parametrize(("backend", "device"), GPU_BACKENDS)
@pytest.mark.parametrize("group", [1, 3, 5, 8, 16])
def test_few_tokens_of_groups(backend, device, group):
    """As many tokens share a block as have 16 query heads: blocks that are full and not, where tokens become the first
    of the ring and where they wrap, with padding within a block and blocks of nothing else. Turned queries and weights
    are rounded there, which shows in one number of a hundred thousand."""
    for tokens, sink, window in ((2, 4, 100), (3, 37, 12), (7, 0, 40), (16, 4, 200)):
        lengths = (0, 1, sink, sink + 3, sink + window - 1, sink + 3 * window, 10**7)
        counts = tuple((5 * i + 2) % (tokens + 1) for i in range(len(lengths)))
        case = Case(lengths, None, tokens, 2 * group, 2, 64, sink=sink, window=window, ring=window + 17, alibi=True)
        for dtype in dtypes(backend, device, few=True)[-2:]:
            for taken, more in ((None, {}), (counts, dict(alibi=False)), (counts, dict(learned=True, softcap=3.0))):
                check("prefill", backend, device, dtype, dataclasses.replace(case, counts=taken, **more), room=2)


@every_backend
def test_no_rows(backend, device):
    tensors = Case((), tokens=7, heads=6, v_dim=24).tensors(torch.float32, device)
    assert ops.prefill(*tensors, **Case().sizes, backend=backend).shape == (0, 7, 6, 24)


PREFILL_SHAPES = {
    "plain": {},
    "partial": {"rotary": 32},
    "partial, offset": {"rotary": 16, "start": 24},
    "interleaved": {"interleaved": True},
    "interleaved, partial, offset": {"interleaved": True, "rotary": 32, "start": 8},
    "no rotation": {"rotary": 0},
    "no sinks": {"sink": 0},
    "many sinks": {"sink": 37},
    "48 sinks": {"sink": 48},
    "128 sinks": {"sink": 128},
    "window 1": {"window": 1},
    "window 2": {"window": 2},
    "window beyond all": {"window": 5000, "lengths": (0, 100, 4999, 5004, 5005, 123_456)},
    "slack slots": {"ring": 177},
    "learned logits, softcap": {"learned": True, "softcap": 20.0},
    "alibi": {"alibi": True, "rotary": 0},
    "alibi, softcap, many sinks": {"alibi": True, "softcap": 20.0, "sink": 37},
    "alibi, dense": {"alibi": True, "dense": 200, "tokens": 400},
    "dense": {"dense": 10**15},
    "dense, banded": {"dense": 200, "tokens": 400},
    "padding": {"tokens": 777, "counts": (777, 300, 776, 0, 1, 128)},
    "mha": {"heads": 3, "kv_heads": 3},
    "gqa 4, learned logits, alibi": {"heads": 8, "learned": True, "alibi": True},
    "gqa 7": {"heads": 7, "kv_heads": 1},
    "gqa 8, padding": {"heads": 8, "kv_heads": 1, "tokens": 333, "counts": (333, 300, 31, 0, 1, 33)},
    "one token": {"tokens": 1},
    "many tiles": {"tokens": 2000, "heads": 32, "kv_heads": 4, "lengths": (0, 1000)},
    "many tiles, near": {"tokens": 2000, "heads": 32, "kv_heads": 4, "lengths": (0, 1000), "near": True, "window": 700},
    "new texts, near": {"tokens": 300, "heads": 8, "kv_heads": 2, "lengths": (0,) * 70, "near": True, "window": 252},
    "alibi, 37 sinks, padding, near": {"sink": 37, "counts": (150, 149, 7, 0, 1, 33), "near": True, "alibi": True},
}


# Triton compiles each anew.
LARGE = [(*param.values, dim) for param in GPU_BACKENDS for dim in (64, 128)]
LARGE += [("cuda", GPU, dim) for dim in (40, 72, 80, 96, 112, 160, 192, 200, 256)] if ops.HAS_CUDA_LIBRARY else []


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device", "head_dim"), LARGE)
@pytest.mark.parametrize("shape", PREFILL_SHAPES)
def test_large_shapes(backend, device, shape, head_dim):
    """Rows of every age, several tiles of queries and keys."""
    case = {"lengths": (0, 3, 16, 55, 700, 4_000_000), "tokens": 150, "heads": 4, "window": 140}
    for dtype in (torch.float16, torch.bfloat16):
        check("prefill", backend, device, dtype, Case(**case | {"head_dim": head_dim} | PREFILL_SHAPES[shape]))


@pytest.mark.gpu
@with_cuda_library
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("edge", [48, 128])
@pytest.mark.parametrize("near", [False, True])
def test_edges_of_tiles(head_dim, edge, near):
    """Chunks and windows that end a token before the edge of a tile, at it, or behind it."""
    for tokens in (edge - 1, edge, edge + 1, 3 * edge + 1):
        for window, group in ((edge, 1), (edge + 1, 2), (edge + 2, 4), (2 * edge + 1, 6)):
            lengths = (0, 1, edge - 4, window + 3, window + 4, 5 * edge + 7)
            case = Case(lengths, None, tokens, group, 1, head_dim, window=window, near=near, alibi=tokens == edge)
            check("prefill", "cuda", GPU, torch.bfloat16, case)
