"""Decode on every backend: outputs and caches at every length and shape."""

import functools

import pytest
import torch

from cases import (
    MIXED,
    SHAPES,
    Case,
    assert_close,
    check,
    copies,
    dtypes,
    edges,
    every_backend,
    same_bits,
    with_cuda_library,
)
from helpers import GPU
from sinkattn import ops, reference


@every_backend
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("lengths", edges(), ids=str)
def test_edges(backend, device, lengths, heads):
    for dtype in dtypes(backend, device):
        check("decode", backend, device, dtype, Case(lengths, heads=heads))


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, device, shape):
    for dtype in dtypes(backend, device, few=True):
        check("decode", backend, device, dtype, Case(**{"lengths": MIXED} | SHAPES[shape]))


@every_backend
@pytest.mark.parametrize("heads", [2, 6])
def test_rows_that_skip(backend, device, heads):
    case = Case(MIXED, counts=(0, 1, 0, 1), heads=heads, learned=True)
    for dtype in dtypes(backend, device):
        check("decode", backend, device, dtype, case)


@every_backend
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [2, 4])
def test_long_rings(backend, device, heads, rows):
    """More slots than one program reads, some of them slack."""
    for lengths in ((100,) * rows, (200, 304, 5000)[:rows]):
        case = Case(lengths, heads=heads, window=290, ring=300)
        check("decode", backend, device, dtypes(backend, device)[rows % 2], case)


@every_backend
def test_no_rows(backend, device):
    case, dtype = Case((), heads=6, head_dim=192, v_dim=128), dtypes(backend, device)[-1]
    assert ops.decode(*case.tensors(dtype, device), **case.sizes, backend=backend).shape == (0, 1, 6, 128)


@pytest.mark.gpu
@with_cuda_library
@pytest.mark.parametrize("heads", [(2, 2), (10, 2), (24, 2)])
@pytest.mark.parametrize(
    "splits, cluster", [*((n, False) for n in (1, 2, 3, 8, 25, 64)), *((n, True) for n in (1, 2, 3, 5, 8))]
)
def test_splits(splits, cluster, heads):
    """However many blocks share a key head, whichever of them new token and sinks fall to, wherever they meet."""
    for dtype, lengths, sink in (torch.float16, (5000, 150, 430), 4), (torch.bfloat16, (100, 10**7, 3), 70):
        case = Case(lengths, (1, 1, 0), 1, *heads, 64, sink=sink, window=371, ring=390, learned=True, alibi=True)
        tensors = case.tensors(dtype, GPU)
        exact, low = copies(tensors, torch.float64, "cpu"), copies(tensors, device="cpu")
        exact = reference.attention(*exact, **case.sizes)
        again = copies(tensors)
        op = functools.partial(torch.ops.sinkattn.decode_cuda, **case.sizes, splits=splits, cluster=cluster)
        out = op(*tensors)
        assert_close(out.cpu(), exact, reference.attention(*low, **case.sizes), dtype)
        assert same_bits(tensors[4].cpu(), low[4])
        counters = torch.zeros(9, dtype=torch.int32, device=GPU)
        for given in (None, counters, counters, None, counters):  # they are zero again, whoever arrives last
            assert same_bits(op(*again, overlap=True, arrivals=given), out)
        assert not counters.any()
