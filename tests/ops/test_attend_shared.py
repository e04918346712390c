"""Sinks that all rows share: with what is found among them, decode over the ring alone is decode over both."""

import dataclasses

import pytest
import torch

from cases import BACKENDS, Case, assert_close, copies, dtypes, fitted, same_bits
from sinkattn import ops, reference

SHAPES = {
    "plain": {},
    "many of a key head": {"heads": 24},
    "a key head for each": {"kv_heads": 6},
    "partial, offset, interleaved": {"rotary": 8, "start": 4, "interleaved": True},
    "no rotation": {"rotary": 0},
    "ALiBi": {"alibi": True},
    "learned logits, softcap": {"learned": True, "softcap": 2.0},
    "other values": {"head_dim": 192, "v_dim": 128},
    "one sink": {"sink": 1},
    "many sinks": {"sink": 700},
    "padding": {"counts": (1, 0, 1, 1, 0)},
}


def shared(tensors, case):
    """The call with the sinks of its first row for all rows, and what `decode` and `attend_shared` take of it."""
    tensors = copies(tensors)
    for cache in tensors[3:5]:
        cache[:, :, : case.sink] = cache[:1, :, : case.sink].clone()
    q, k, v, *caches, lengths, counts, rotation, learned, slopes = tensors[:10]
    rings, sinks = [x[:, :, case.sink :] for x in caches], [x[:1, :, : case.sink] for x in caches]
    q = q.nan_to_num(0)  # of padding: what is found for it is dropped
    rotation = None if rotation is None else rotation.nan_to_num(0)
    ring = (q, k, v, *rings, lengths - case.sink, counts, rotation, learned, slopes, None, None)
    return tensors, ring, (q, *sinks, lengths, rotation, slopes)


def joined(ring, sinks, case, backend):
    sizes = {**case.sizes, "sink_size": 0}
    alone = {name: x for name, x in case.sizes.items() if name != "sink_size"}
    found = ops.attend_shared(*sinks, **alone, backend=backend)
    return ops.decode(*ring, **sizes, joined=found, backend=backend), found


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_with_sinks_of_their_own(backend, device, shape):
    """Output and ring, of rows that have the sinks alone, and some more tokens, and have wrapped."""
    case = Case(**{"heads": 6, "kv_heads": 2, "sink": 70, "ring": 16} | SHAPES[shape])
    case = fitted(dataclasses.replace(case, lengths=tuple(case.sink + n for n in (0, 1, 12, 16, 4_000_000))), backend)
    for dtype in dtypes(backend, device, few=True):
        whole, ring, sinks = shared(case.tensors(dtype, device), case)
        if backend == "cuda" and (dtype == torch.float32 or case.heads // case.kv_heads > 16):
            continue
        before = copies(whole, device="cpu")
        exact, low = copies(before, torch.float64), copies(before)
        expected = reference.attention(*exact, **case.sizes)
        out, _ = joined(ring, sinks, case, backend)
        assert_close(out.cpu(), expected, reference.attention(*low, **case.sizes), dtype)
        assert same_bits(ring[4].cpu(), low[4][:, :, case.sink :])


@pytest.mark.parametrize(("backend", "device"), [param for param in BACKENDS if param.values[0] in ("triton", "cuda")])
def test_in_parts(backend, device):
    """Few rows: the sinks are cut, so that a GPU is busy; and many, in several blocks of queries."""
    for rows, sink in ((1, 1000), (3, 257), (40, 130)):
        case = fitted(Case(tuple(sink + 3 * i for i in range(rows)), heads=4, kv_heads=1, sink=sink), backend)
        for dtype in dtypes(backend, device, few=True)[-1:]:
            whole, ring, sinks = shared(case.tensors(dtype, device), case)
            before = copies(whole, device="cpu")
            expected = reference.attention(*copies(before, torch.float64), **case.sizes)
            out, (values, logits) = joined(ring, sinks, case, backend)
            assert len(values) == len(logits) and (rows > 3 or len(values) > 1)
            assert_close(out.cpu(), expected, reference.attention(*copies(before), **case.sizes), dtype)


def test_a_backend_asked_for_by_name():
    """It never gives way to another, and Triton's interpreter is not asked for what it multiplies wrongly."""
    for dtype, head_dim in ((torch.float64, 16), (torch.float32, 272), (torch.bfloat16, 16)):
        q, keys = torch.zeros(2, 4, 1, head_dim, dtype=dtype), torch.zeros(1, 2, 70, head_dim, dtype=dtype)
        asked = dict(lengths=torch.tensor([70, 80]), window_size=12, scale=1.0)
        assert ops.attend_shared(q, keys, keys, **asked)[0].shape == (1, 2, 4, head_dim)
        with pytest.raises((ValueError, RuntimeError), match="backend 'triton'"):
            ops.attend_shared(q, keys, keys, **asked, backend="triton")


def test_no_rows():
    q, k = torch.zeros(0, 2, 1, 16), torch.zeros(1, 2, 70, 16)
    values, logits = ops.attend_shared(q, k, k, torch.zeros(0, dtype=torch.int64), window_size=12, scale=1.0)
    assert values.shape[1:] == (0, 2, 16) and logits.shape[1:] == (0, 2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a: a.update(q=torch.zeros(2, 4, 2, 16)), ValueError, "one token a row"),
        (lambda a: a.update(k_shared=torch.zeros(2, 2, 70, 16)), ValueError, "do not fit"),
        (lambda a: a.update(v_shared=torch.zeros(1, 2, 69, 16)), ValueError, "do not fit"),
        (lambda a: a.update(k_shared=torch.zeros(1, 3, 70, 16), v_shared=torch.zeros(1, 3, 70, 16)), ValueError, "fit"),
        (lambda a: a.update(k_shared=torch.zeros(1, 2, 70, 16).half()), TypeError, "one dtype"),
        (lambda a: a.update(lengths=torch.zeros(3, dtype=torch.int64)), ValueError, "lengths"),
        (lambda a: a.update(rotation=torch.zeros(2, 1, 2, 2, 9)), ValueError, "rotation"),
        (lambda a: a.update(alibi_slopes=torch.zeros(2)), ValueError, "alibi_slopes"),
        (lambda a: a.update(scale=0.0), ValueError, "scale"),
        (lambda a: a.update(rotation=torch.zeros(2, 1, 2, 2, 4), rotary_start=-2), ValueError, "rotation"),
        (lambda a: a.update(rotation=torch.zeros(2, 1, 2, 2, 4).half()), TypeError, "rotation"),
        (lambda a: a.update(k_shared=torch.zeros(1, 0, 70, 16), v_shared=torch.zeros(1, 0, 70, 16)), ValueError, "fit"),
        (lambda a: a["q"].requires_grad_(), RuntimeError, "gradients"),
        (lambda a: a.update({n: a[n].long() for n in ("q", "k_shared", "v_shared")}), TypeError, "dtype"),
        (lambda a: a.update(backend="cuda"), RuntimeError, "not available"),
        (lambda a: a.update(backend="none"), ValueError, "unknown backend"),
    ],
)
def test_what_is_refused(change, error, words):
    asked = dict(
        q=torch.zeros(2, 4, 1, 16), k_shared=torch.zeros(1, 2, 70, 16), v_shared=torch.zeros(1, 2, 70, 16),
        lengths=torch.tensor([70, 80]), window_size=12, scale=1.0,
    )  # fmt: skip
    ops.attend_shared(**asked)
    change(asked)
    with pytest.raises(error, match=words):
        ops.attend_shared(**asked)


@pytest.mark.parametrize(
    ("values", "logits", "error"),
    [
        (torch.zeros(1, 2, 2, 15), torch.zeros(1, 2, 2), ValueError),
        (torch.zeros(2, 2, 2, 16), torch.zeros(1, 2, 2), ValueError),
        (torch.zeros(0, 2, 2, 16), torch.zeros(0, 2, 2), ValueError),
        (torch.zeros(1, 2, 2, 16).double(), torch.zeros(1, 2, 2).double(), TypeError),
        (torch.zeros(1, 2, 2, 16), None, TypeError),
        (None, torch.zeros(1, 2, 2), TypeError),
        (torch.zeros(1, 2, 2, 16).requires_grad_(), torch.zeros(1, 2, 2), RuntimeError),
    ],
)
def test_what_decode_refuses_to_join(values, logits, error):
    """And the cache is as it was."""
    case = Case((3, 20))
    for kind in ("new", "as before"):  # an op that took such a call is asked first
        tensors = copies(case.tensors(torch.float32))
        before = copies(tensors)
        with pytest.raises(error, match="joined"):
            ops.decode(*tensors, **case.sizes, joined=(values, logits))
        assert same_bits(tensors[3], before[3]) and same_bits(tensors[4], before[4]), kind
        ops.decode(*tensors, **case.sizes)
