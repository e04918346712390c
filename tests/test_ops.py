"""The ops of every backend there is against `sinkattn.reference` in float64: outputs, caches, errors, compilation.

What no one may look at holds NaN: slots that are still empty, and all that belongs to padding.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sinkattn import backends, ops, reference

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
BACKENDS = [
    pytest.param(backend, device, id=f"{backend}-{device}")
    for device in DEVICES
    for backend in ops.BACKENDS
    if backend != "auto" and ops.missing_backend(backend, device) is None
]

# dtype: error of one number, absolute and relative; floor of the error of a tensor, relative, where twice that of the
# reference in the same dtype is next to nothing.
TOLERANCES = {
    torch.float32: (1e-5, 4e-6),
    torch.float16: (2e-3, 1.2e-4),
    torch.bfloat16: (1.6e-2, 1e-3),
}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(autouse=True)
def seed():
    """Fresh data every time; a failing test prints the seed, and ``SINKATTN_SEED`` repeats it."""
    value = int(os.environ.get("SINKATTN_SEED") or torch.seed() % 2**32)
    torch.manual_seed(value)
    print(f"SINKATTN_SEED={value}")


@dataclasses.dataclass
class Case:
    """One call of an op. ``ring`` None is ``window``; ``rotary`` None rotates all dims, 0 none."""

    lengths: tuple = ()
    counts: tuple | None = None
    tokens: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    v_dim: int | None = None
    sink: int = 4
    window: int = 12
    ring: int | None = None
    rotary: int | None = None
    start: int = 0
    interleaved: bool = False
    learned: bool = False
    alibi: bool = False
    softcap: float = 0.0
    dense: int | None = None  # of prefill

    @property
    def sizes(self):
        sizes = {
            "sink_size": self.sink,
            "window_size": self.window,
            "scale": self.head_dim**-0.5,
            "softcap": self.softcap,
            "rotary_start": self.start,
            "interleaved": self.interleaved,
        }
        return sizes if self.dense is None else sizes | {"dense_window": self.dense}

    def tensors(self, dtype, device="cpu"):
        """The ten tensors of the ops: q, k, v transposed views, caches slices of something larger, data all random."""
        batch, slots = len(self.lengths), self.sink + (self.ring or self.window)
        v_dim = self.v_dim or self.head_dim
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        counts = None if self.counts is None else torch.tensor(self.counts, dtype=torch.int64)

        def new(heads, dim):
            return torch.randn(batch, self.tokens, heads, dim).to(dtype).transpose(1, 2)

        def cache(dim):
            large = torch.randn(batch + 1, self.kv_heads, slots + 3, dim + 8).to(dtype)
            part = large[1:, :, 2:-1, 8:]
            return part.masked_fill_(empty, torch.nan)

        empty = (reference.held_positions(lengths, self.sink, slots - self.sink) < 0)[:, None, :, None]
        q, k, v = new(self.heads, self.head_dim), new(self.kv_heads, self.head_dim), new(self.kv_heads, v_dim)
        caches = cache(self.head_dim), cache(v_dim)
        half = (self.head_dim if self.rotary is None else self.rotary) // 2
        angles = 100 * torch.randn(batch, self.tokens, 2, half)
        rotation = torch.stack((angles.cos(), angles.sin()), dim=3) if half else None
        learned = torch.randn(self.heads) if self.learned else None
        slopes = 2 * torch.rand(self.heads) / self.window if self.alibi else None
        if counts is not None:
            padding = torch.arange(self.tokens) < self.tokens - counts[:, None]
            for x in (q, k, v):
                x.masked_fill_(padding[:, None, :, None], torch.nan)
            if half:
                rotation.masked_fill_(padding[:, :, None, None, None], torch.nan)
        tensors = q, k, v, *caches, lengths, counts, rotation, learned, slopes
        return tuple(x if x is None or device == "cpu" else _like(x, x.to(device)) for x in tensors)


def _like(x, values):
    """``values`` with the strides of x."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=values.dtype, device=values.device)
    return out.copy_(values)


def copies(tensors, dtype=None, device=None):
    """Caches that may be written to, the rest as it is; or all in another dtype."""
    out = [x if x is None else x.to(device) if device else x for x in tensors]
    if dtype:
        out = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in out]
    return *out[:3], *(_like(x, x) for x in out[3:5]), *out[5:]


def same_bits(a, b):
    return torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))


def assert_close(out, exact, low, dtype):
    """``exact`` is float64; ``low`` the same computation by the reference in ``dtype``."""
    tolerance, floor = TOLERANCES[dtype]
    assert out.dtype == dtype and out.shape == exact.shape
    out, low = out.double(), low.double()
    torch.testing.assert_close(out, exact, rtol=tolerance, atol=tolerance)
    assert (out - exact).norm() <= 2 * (low - exact).norm() + floor * exact.norm()


def fitted(case, backend):
    """The small heads of most cases are not for CUDA C++."""
    return dataclasses.replace(case, head_dim=64) if backend == "cuda" and case.head_dim == 16 else case


def check(op, backend, device, dtype, case):
    """One call: the output, the new slots and the old ones."""
    case = fitted(case, backend)
    tensors = case.tensors(dtype, device)
    if backend == "cuda" and op == "decode":
        dims, group = (case.head_dim, case.v_dim or case.head_dim), case.heads // case.kv_heads
        known = dims == (192, 128) or (dims[0] == dims[1] and dims[0] in (64, 80, 96, 128, 192, 256))
        if dtype == torch.float32 or group > 16 or not known:
            with pytest.raises(ValueError, match="backend 'cuda' takes"):
                ops.decode(*tensors, **case.sizes, backend=backend)
            return
    before = copies(tensors, device="cpu")
    exact, low = copies(before, torch.float64, device), copies(before)
    exact_out = reference.attention(*exact, **case.sizes).cpu()
    low_out = reference.attention(*low, **case.sizes)
    run = copies(tensors)
    out = getattr(ops, op)(*run, **case.sizes, backend=backend)
    assert out.is_contiguous()

    out, k_cache, v_cache = (x.cpu() for x in (out, *run[3:5]))
    assert_close(out, exact_out, low_out, dtype)
    lengths, counts = before[5:7]
    total = lengths + (case.tokens if counts is None else counts)
    slots = k_cache.shape[2]
    is_new = (reference.held_positions(total, case.sink, slots - case.sink) >= lengths[:, None])[:, None, :, None]
    assert same_bits(k_cache.masked_fill(is_new, 0), before[3].masked_fill(is_new, 0)), "an old key changed"
    assert same_bits(v_cache, low[4]), "a value was not stored, or an old one changed"
    if before[7] is None:
        assert same_bits(k_cache, low[3])
    else:  # a turned key is a sum of two products
        new_keys = (x.masked_fill(~is_new, 0).double() for x in (k_cache, exact[3].cpu()))
        torch.testing.assert_close(*new_keys, rtol=torch.finfo(dtype).eps, atol=1e-6)


def dtypes(backend, device, few=False):
    """All; the interpreter is slow, and its `tl.dot` takes bfloat16 for integers."""
    if backend == "triton" and device == "cpu":
        return [torch.float32] if few else [torch.float32, torch.float16]
    return list(TOLERANCES)


def edges(sink=4, window=12):
    """Lengths around which something changes, in groups of a few and of many rows, which may be split differently."""
    c = sink + window
    return [(0, 1, sink - 1), (sink, c - 1, c), (c + 1, 3 * c + 7, 4_000_000), (0, sink, c, c + 1, 3 * c + 7, 9 * c)]


SHAPES = {
    "plain": {},
    "gqa 2": {"heads": 4},
    "gqa 3": {"heads": 6},
    "gqa 7": {"heads": 7, "kv_heads": 1},
    "mqa 20": {"heads": 20, "kv_heads": 1, "lengths": (3, 55)},
    "head_dim 8": {"head_dim": 8, "heads": 4},
    "head_dim 80": {"head_dim": 80},
    "head_dim 96": {"head_dim": 96, "heads": 4},
    "head_dim 192, v 128": {"head_dim": 192, "v_dim": 128, "heads": 4},
    "head_dim 256": {"head_dim": 256, "v_dim": 256},
    "v_dim 40": {"v_dim": 40, "heads": 4},
    "no rotation": {"rotary": 0},
    "partial": {"rotary": 8},
    "partial, offset": {"rotary": 6, "start": 5},
    "interleaved": {"interleaved": True},
    "interleaved, partial, offset": {"interleaved": True, "rotary": 6, "start": 3},
    "no sinks": {"sink": 0},
    "many sinks": {"sink": 37, "lengths": (0, 36, 37, 60)},
    "128 sinks, a smaller window": {"sink": 128, "window": 40, "heads": 4, "lengths": (100, 127, 130, 5000)},
    "window 1": {"window": 1, "lengths": (0, 3, 4, 5, 40)},
    "slack slots": {"ring": 17, "lengths": (4, 16, 20, 21, 22, 33, 34, 1000)},
    "learned logits": {"learned": True, "heads": 6},
    "softcap": {"softcap": 3.0, "heads": 4},
    "alibi": {"alibi": True, "rotary": 0, "heads": 6},
    "alibi, many sinks, single queries": {"alibi": True, "sink": 37, "lengths": (0, 36, 37, 60)},
    "learned logits, softcap, no sinks": {"learned": True, "softcap": 20.0, "sink": 0, "rotary": 0},
}
MIXED = (3, 16, 55, 4_000_000)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestDecode:
    @pytest.mark.parametrize("heads", [2, 4, 8])
    @pytest.mark.parametrize("lengths", edges(), ids=str)
    def test_edges(self, backend, device, lengths, heads):
        for dtype in dtypes(backend, device):
            check("decode", backend, device, dtype, Case(lengths, heads=heads))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes(self, backend, device, shape):
        for dtype in dtypes(backend, device, few=True):
            check("decode", backend, device, dtype, Case(**{"lengths": MIXED} | SHAPES[shape]))

    @pytest.mark.parametrize("heads", [2, 6])
    def test_rows_that_skip(self, backend, device, heads):
        case = Case(MIXED, counts=(0, 1, 0, 1), heads=heads, learned=True)
        for dtype in dtypes(backend, device):
            check("decode", backend, device, dtype, case)

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("heads", [2, 4])
    def test_long_rings(self, backend, device, heads, rows):
        """More slots than one program reads, some of them slack."""
        for lengths in ((100,) * rows, (200, 304, 5000)[:rows]):
            case = Case(lengths, heads=heads, window=290, ring=300)
            check("decode", backend, device, dtypes(backend, device)[rows % 2], case)

    def test_no_rows(self, backend, device):
        case, dtype = Case((), heads=6, head_dim=192, v_dim=128), dtypes(backend, device)[-1]
        assert ops.decode(*case.tensors(dtype, device), **case.sizes, backend=backend).shape == (0, 1, 6, 128)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
class TestPrefill:
    @pytest.mark.parametrize("tokens", [1, 5, 35])
    @pytest.mark.parametrize("lengths", edges(), ids=str)
    def test_edges(self, backend, device, lengths, tokens):
        for dtype in dtypes(backend, device):
            check("prefill", backend, device, dtype, Case(lengths, tokens=tokens))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes(self, backend, device, shape):
        for dtype in dtypes(backend, device, few=True):
            check("prefill", backend, device, dtype, Case(**{"lengths": MIXED, "tokens": 19} | SHAPES[shape]))

    @pytest.mark.parametrize("dense", [0, 12, 20, 10**15])
    @pytest.mark.parametrize("tokens", [3, 30])
    def test_padding(self, backend, device, tokens, dense):
        """Left padding from none to all of a row, streaming and dense."""
        counts = (0, 1, tokens // 2, tokens - 1, tokens, tokens)
        case = Case((0, 1, 3, 20, 0, 4_000_000), counts, tokens, dense=dense, heads=4, learned=True, alibi=True)
        for dtype in dtypes(backend, device):
            check("prefill", backend, device, dtype, case)

    @pytest.mark.parametrize("dense", [0, 130])
    def test_long_chunks(self, backend, device, dense):
        """Several blocks of queries, and of keys that all of them see."""
        case = Case((0, 500), (150, 149), 150, 2, 1, window=100, dense=dense)
        for dtype in dtypes(backend, device):
            check("prefill", backend, device, dtype, case)

    def test_no_rows(self, backend, device):
        tensors = Case((), tokens=7, heads=6, v_dim=24).tensors(torch.float32, device)
        assert ops.prefill(*tensors, **Case().sizes, backend=backend).shape == (0, 7, 6, 24)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_chunks_do_not_matter(backend, device):
    """A text at once, in chunks, and token by token."""
    text = fitted(Case((0,), tokens=45, heads=4, learned=True, alibi=True), backend)
    dtype, tolerance = (torch.float16, 4e-3) if backend == "cuda" else (torch.float32, 1e-5)
    q, k, v, k_cache, v_cache, lengths, counts, rotation, learned, slopes = text.tensors(dtype, device)

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


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_same_bits(backend, device, op):
    """The same input gives the same bits, in whatever order programs and threads finish."""
    for lengths in ((5000,), MIXED):
        case = fitted(Case(lengths, tokens=1 if op == "decode" else 40, heads=6, window=290), backend)
        tensors = case.tensors(torch.float16, device)
        runs = [copies(tensors) for _ in range(2 if device == "cpu" else 20)]
        outs = [getattr(ops, op)(*run, **case.sizes, backend=backend) for run in runs]
        for out, run in zip(outs, runs, strict=True):
            assert same_bits(out, outs[0]) and same_bits(run[3], runs[0][3]) and same_bits(run[4], runs[0][4])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_neighbours_do_not_matter(backend, device, op):
    """A row of a batch gives what it gives alone."""
    case = fitted(Case((2, 40, 4_000_000), tokens=1 if op == "decode" else 9, heads=4), backend)
    dtype, tolerance = (torch.float16, 2e-3) if backend == "cuda" else (torch.float32, 1e-5)
    tensors = case.tensors(dtype, device)
    together = copies(tensors)
    out = getattr(ops, op)(*together, **case.sizes, backend=backend)
    for row in range(3):
        alone = copies([x if x is None or i > 7 else x[row : row + 1] for i, x in enumerate(tensors)])
        single = getattr(ops, op)(*alone, **case.sizes, backend=backend)
        torch.testing.assert_close(single, out[row : row + 1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(alone[3], together[3][row : row + 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_strides_of_small_tensors_do_not_matter(backend, device, op):
    """Lengths, counts, rotation, learned logits and slopes may be slices of something larger."""
    tokens = 1 if op == "decode" else 9
    case = fitted(Case((3, 5000), (1, tokens), tokens=tokens, heads=4, learned=True, alibi=True), backend)
    tensors = copies(case.tensors(torch.float16, device))
    sliced = (*copies(tensors)[:5], *(torch.stack((x, x + 1), dim=-1)[..., 0] for x in tensors[5:]))
    assert not any(x.is_contiguous() for x in sliced[5:])
    outs = [getattr(ops, op)(*given, **case.sizes, backend=backend) for given in (tensors, sliced)]
    assert same_bits(*outs) and same_bits(sliced[3], tensors[3]) and same_bits(sliced[4], tensors[4])


BAD_INPUTS = {
    "unknown backend": ({}, {"backend": "fast"}, ValueError, "unknown backend 'fast'"),
    "missing backend": ({}, {"backend": "cuda" if DEVICES == ("cpu",) else "cpu"}, RuntimeError, "is not available"),
    "q of 3 dims": ({"q": lambda x: x[0]}, {}, ValueError, "q has shape"),
    "two tokens": ({"q": lambda x: x.repeat(1, 1, 2, 1)}, {}, ValueError, "one token a row, q has 2|do not fit"),
    "k of another dtype": ({"k": lambda x: x.double()}, {}, TypeError, "k is torch.float64, q is torch.float"),
    "last stride": ({"k_cache": lambda x: x.mT.contiguous().mT}, {}, ValueError, "k_cache has strides"),
    "cache of another dtype": ({"v_cache": lambda x: x.double()}, {}, TypeError, "v_cache is torch.float64"),
    "v of another head count": ({"v": lambda x: x[:, :1]}, {}, ValueError, "do not fit"),
    "k of another dim": ({"k": lambda x: x[..., :8]}, {}, ValueError, "k needs q's head_dim"),
    "heads that do not divide": ({"q": lambda x: x[:, :3]}, {}, ValueError, "3 query heads cannot share 2"),
    "caches that do not fit": ({"k_cache": lambda x: x[:, :, 1:]}, {}, ValueError, "one number of slots"),
    "window beyond the ring": ({}, {"window_size": 13}, ValueError, "do not fit a cache of 16 slots"),
    "no window": ({}, {"window_size": 0}, ValueError, "window_size >= 1"),
    "negative sinks": ({}, {"sink_size": -1}, ValueError, "sink_size >= 0"),
    "lengths of int32": ({"lengths": lambda x: x.int()}, {}, ValueError, "lengths is torch.int32"),
    "counts of another batch": ({"counts": lambda x: x[:1]}, {}, ValueError, "counts is torch.int64"),
    "rotation of 4 dims": ({"rotation": lambda x: x[:, 0]}, {}, ValueError, "rotation .* does not fit"),
    "rotation beyond the head": ({}, {"rotary_start": 1}, ValueError, "rotary_start . r <= head_dim = 64"),
    "rotation of half precision": ({"rotation": lambda x: x.half()}, {}, TypeError, "rotation is torch.float16"),
    "slopes of another head count": ({"alibi_slopes": lambda x: torch.rand(3)}, {}, ValueError, "slopes has shape"),
    "logits of another head count": ({"learned_logits": lambda x: x[1:]}, {}, ValueError, "learned_logits has shape"),
    "a negative scale": ({}, {"scale": -0.25}, ValueError, "scale=-0.25: scores are multiplied by it"),
    "gradients": ({"q": lambda x: x.clone().requires_grad_()}, {}, RuntimeError, "these ops are for inference"),
    "another device": ({"lengths": lambda x: x.to("meta")}, {}, ValueError, "all must be on one device"),
}  # fmt: skip


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_errors(name, dtype, op):
    """Bad input is named, and the cache is left alone: also after good calls, when the compiled op is asked first."""
    change, sizes, error, message = BAD_INPUTS[name]
    case = Case((3, 20), (1, 1), heads=4, head_dim=64, learned=True)
    names = ("q", "k", "v", "k_cache", "v_cache", "lengths", "counts", "rotation", "learned_logits", "alibi_slopes")
    tensors = dict(zip(names, case.tensors(dtype, DEVICES[-1]), strict=True))
    getattr(ops, op)(*copies(tuple(tensors.values())), **case.sizes)
    tensors |= {key: function(tensors[key]) for key, function in change.items()}
    before = {key: tensors[key].clone() for key in ("k_cache", "v_cache")}
    with pytest.raises(error, match=message):
        getattr(ops, op)(**tensors, **case.sizes | sizes)
    for key, cache in before.items():
        torch.testing.assert_close(tensors[key], cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_what_the_compiled_op_refuses(monkeypatch, op):
    """It is asked first, unless gradients are wanted; what it refuses goes the careful way, and is not asked again."""
    case, asked = Case((3, 20), heads=4), []

    def refuse(*args):
        asked.append(args)
        raise RuntimeError("not this")

    class Known(dict):
        def get(self, kind):
            return self.setdefault(kind, refuse)

    monkeypatch.setattr(ops, "_compiled", known := Known())
    tensors = case.tensors(torch.float32)
    expected, again = copies(tensors), copies(tensors)
    out = getattr(ops, op)(*tensors, **case.sizes)
    own = [getattr(torch.ops.sinkattn, op).default] if ops.HAS_CPU_LIBRARY else []
    assert len(asked) == 1 and list(known.values()) == own
    torch.testing.assert_close(out, reference.attention(*expected, **case.sizes))
    torch.testing.assert_close(tensors[3:5], expected[3:5], equal_nan=True)
    again[0].requires_grad_()
    with pytest.raises(RuntimeError, match="q requires gradients"):
        getattr(ops, op)(*again, **case.sizes)
    assert len(asked) == 1


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 16), (torch.float32, 272)])
def test_what_only_the_reference_takes(backend, device, dtype, head_dim):
    """A backend asked for by name says no, "auto" finds the reference."""
    case = Case((20,), head_dim=head_dim)
    tensors = case.tensors(dtype, device)
    out = reference.attention(*copies(tensors), **case.sizes)
    assert torch.equal(ops.decode(*copies(tensors), **case.sizes, backend="auto"), out)
    if backend != "reference":
        with pytest.raises(ValueError, match="backend='reference' takes any"):
            ops.decode(*tensors, **case.sizes, backend=backend)


@pytest.mark.parametrize(
    ("capability", "shared", "decode", "prefill"),
    [
        ((9, 0), 232_448, "decode_cuda", "prefill_cuda"),
        ((10, 0), 232_448, "decode_cuda", "prefill_triton"),
        ((12, 0), 101_376, "decode_triton", "prefill_triton"),  # later, and too small for large heads
        ((8, 0), 166_912, "decode_triton", "prefill_triton"),  # no clusters: few rows would leave it idle
    ],
)
def test_what_serves_which_gpu(monkeypatch, capability, shared, decode, prefill):
    properties = types.SimpleNamespace(major=capability[0], shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(backends, "HAS_CUDA_LIBRARY", True)
    with FakeTensorMode():
        new, cache = (torch.empty(1, 8, n, 128, dtype=torch.bfloat16, device="cuda:0") for n in (1, 64))
        tensors, sizes = backends.Tensors(new, new, new, cache, cache, None), backends.Sizes(4, 60, 1.0)

    def chosen(op, backend):
        return backends.chosen(op, backend, tensors, sizes).name()

    assert chosen("decode", "auto") == f"sinkattn::{decode}"
    assert chosen("decode", "cuda") == "sinkattn::decode_cuda"
    assert chosen("prefill", "auto") == f"sinkattn::{prefill}"
    assert chosen("prefill", "triton") == "sinkattn::prefill_triton"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["decode", "prefill", "decode_cuda", "prefill_cuda", "decode_triton", "prefill_triton"])
def test_opcheck(op, device):
    if "_" in op and (device == "cpu" or (op.endswith("cuda") and not ops.HAS_CUDA_LIBRARY)):
        pytest.skip("an op of GPUs")
    if op == "prefill_cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("an op of Hopper GPUs")
    tokens, dtype = 1 if "decode" in op else 3, torch.float16 if op.endswith("cuda") else torch.float32
    case = Case((20, 40), (1, 0), tokens, 4, head_dim=64, learned=True, alibi=op != "prefill_cuda")
    tensors = [x if x is None else x.nan_to_num(0) if x.is_floating_point() else x for x in case.tensors(dtype)]
    tensors = [x if x is None else x.to(device) for x in tensors]
    torch.library.opcheck(getattr(torch.ops.sinkattn, op).default, (*tensors, *case.sizes.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_compile(op, device):
    """One graph, and it writes to the cache it was given."""
    case = Case((3, 20), tokens=1 if op == "decode" else 3, heads=4, head_dim=64)
    tensors = case.tensors(torch.float32 if device == "cpu" else torch.float16, device)
    eager, compiled = copies(tensors), copies(tensors)

    def function(*tensors):
        return 2 * getattr(ops, op)(*tensors, **case.sizes)

    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(out, function(*eager), rtol=0, atol=0)
    torch.testing.assert_close(compiled[3:5], eager[3:5], rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not ops.HAS_CUDA_LIBRARY, reason="the CUDA C++ ops were not built, or there is no CUDA")
@pytest.mark.parametrize("heads", [(2, 2), (10, 2), (24, 2)])
@pytest.mark.parametrize(
    "splits, cluster", [*((n, False) for n in (1, 2, 3, 8, 25, 64)), *((n, True) for n in (1, 2, 3, 5, 8))]
)
def test_splits(splits, cluster, heads):
    """However many blocks share a key head, whichever of them new token and sinks fall to, wherever they meet."""
    for dtype, lengths, sink in (torch.float16, (5000, 150, 430), 4), (torch.bfloat16, (100, 10**7, 3), 70):
        case = Case(lengths, (1, 1, 0), 1, *heads, 64, sink=sink, window=371, ring=390, learned=True, alibi=True)
        tensors = case.tensors(dtype, "cuda")
        exact, low = copies(tensors, torch.float64, "cpu"), copies(tensors, device="cpu")
        exact = reference.attention(*exact, **case.sizes)
        again = copies(tensors)
        op = functools.partial(torch.ops.sinkattn.decode_cuda, **case.sizes, splits=splits, cluster=cluster)
        out = op(*tensors)
        assert_close(out.cpu(), exact, reference.attention(*low, **case.sizes), dtype)
        assert same_bits(tensors[4].cpu(), low[4])
        for _ in range(5):  # counters of arrivals are zero again, and nothing depends on who arrives last
            assert same_bits(op(*again, overlap=True), out)


PREFILL_SHAPES = {
    "plain": {},
    "partial": {"rotary": 32},
    "partial, offset": {"rotary": 16, "start": 24},
    "interleaved": {"interleaved": True},
    "interleaved, partial, offset": {"interleaved": True, "rotary": 32, "start": 8},
    "no rotation": {"rotary": 0},
    "no sinks": {"sink": 0},
    "many sinks": {"sink": 37},
    "128 sinks": {"sink": 128},
    "window 1": {"window": 1},
    "window 2": {"window": 2},
    "window beyond all": {"window": 5000, "lengths": (0, 100, 4999, 5004, 5005, 123_456)},
    "slack slots": {"ring": 177},
    "learned logits, softcap": {"learned": True, "softcap": 20.0},
    "dense": {"dense": 10**15},
    "dense, banded": {"dense": 200, "tokens": 400},
    "padding": {"tokens": 777, "counts": (777, 300, 776, 0, 1, 128)},
    "gqa 7": {"heads": 7, "kv_heads": 1},
    "one token": {"tokens": 1},
    "many tiles": {"tokens": 2000, "heads": 32, "kv_heads": 4, "lengths": (0, 1000)},
}

GPU_BACKENDS = [param for param in BACKENDS if param.values[1] == "cuda" and param.values[0] != "reference"]
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


@pytest.mark.parametrize(("backend", "device"), GPU_BACKENDS)
class TestGPU:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("heads", [(8, 8), (32, 8), (6, 2), (16, 1)])
    def test_large(self, backend, device, heads, head_dim, dtype):
        case = Case((500, 1024, 4_000_000), None, 1, *heads, head_dim, window=1020)
        check("decode", backend, device, dtype, case)
        many = dataclasses.replace(case, lengths=(1019, 1020, 3000, 70_000) * 8)
        check("decode", backend, device, dtype, many)
        check("prefill", backend, device, dtype, dataclasses.replace(case, tokens=777, counts=(777, 300, 776)))
        check("prefill", backend, device, dtype, dataclasses.replace(case, lengths=(0,), tokens=1500, dense=10**6))

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("shape", PREFILL_SHAPES)
    def test_prefill(self, backend, device, shape, head_dim):
        """Rows of every age, several tiles of queries and keys."""
        case = {"lengths": (0, 3, 16, 55, 700, 4_000_000), "tokens": 150, "heads": 4, "window": 140}
        for dtype in (torch.float16, torch.bfloat16):
            check("prefill", backend, device, dtype, Case(**case | {"head_dim": head_dim} | PREFILL_SHAPES[shape]))

    def step(self, backend, frequencies, q, k, v, k_cache, v_cache, lengths):
        """One token of a model: the angles from ``lengths``, the op, and ``lengths`` advanced."""
        positions = torch.stack((lengths, lengths.clamp(max=63)), dim=1)
        angles = positions[:, None, :, None] * frequencies
        rotation = torch.stack((angles.cos(), angles.sin()), dim=3).float()
        sizes = {"sink_size": 4, "window_size": 60, "scale": 0.125}
        out = ops.decode(q, k, v, k_cache, v_cache, lengths, None, rotation, **sizes, backend=backend)
        lengths += 1
        return out

    @pytest.mark.parametrize("warm", [True, False])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_graphs(self, backend, device, batch, warm):
        """Two graphs captured at length 3, the caches known by then or not, and replayed at the same time, far beyond
        the wrap, give what eager calls give."""
        case = Case((3,) * batch, heads=16, kv_heads=4, head_dim=64, window=60)
        frequencies = 10_000.0 ** -torch.linspace(0, 1, 32, dtype=torch.float64, device=device)
        states, expected, graphs, outs = [], [], [], []
        text = [case.tensors(torch.bfloat16, device)[:3] for _ in range(5 * 64 - 3)]
        for _ in range(2):
            _, _, _, k_cache, v_cache, lengths, *_ = case.tensors(torch.bfloat16, device)
            new = tuple(torch.empty_like(x) for x in text[0])
            start, state = (k_cache, v_cache, lengths), (k_cache.clone(), v_cache.clone(), lengths.clone())
            expected.append([self.step(backend, frequencies, *token, *state) for token in text])
            state = state if warm else tuple(x.clone() for x in start)
            for x, y in zip(state, start, strict=True):
                x.copy_(y)
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                outs.append(self.step(backend, frequencies, *new, *state))
            states.append((new, state))
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        for i, token in enumerate(text):
            for (new, _), graph, stream in zip(states, graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    for x, y in zip(new, token, strict=True):
                        x.copy_(y)
                    graph.replay()
            torch.cuda.synchronize()
            for out, wanted in zip(outs, expected, strict=True):
                assert same_bits(out, wanted[i])


@given(sink=st.integers(0, 6), ring=st.integers(1, 9), lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_slot_arithmetic(sink, ring, lengths):
    """`slot_of` and `held_positions` against a list that is written to token by token."""
    rows = []
    for length in lengths:
        held, oldest = [-1] * (sink + ring), sink
        for position in range(length):
            if position < sink + ring:  # slots fill up in order
                slot = position
            else:  # and then the oldest token that is no sink makes room
                slot, oldest = held.index(oldest), oldest + 1
            assert reference.slot_of(torch.tensor(position), sink, ring) == slot
            held[slot] = position
        rows.append(held)
    assert reference.held_positions(torch.tensor(lengths), sink, ring).tolist() == rows


@st.composite
def calls(draw):
    """A case that the compiled CPU ops take, the order in which batch, heads and tokens lie in memory, and a seed."""
    ints, flag = lambda *ends: draw(st.integers(*ends)), lambda: draw(st.booleans())  # noqa: E731
    head_dim = draw(st.integers(1, 70) | st.sampled_from((96, 128, 256)))
    start = ints(0, head_dim - 1)
    kv_heads, window, tokens, rows = ints(1, 3), ints(1, 150), draw(st.just(1) | st.integers(2, 90)), ints(1, 3)
    lengths = st.integers(0, 400) | st.integers(0, 10**12)
    case = Case(
        lengths=tuple(draw(lengths) for _ in range(rows)),
        counts=tuple(ints(0, tokens) for _ in range(rows)) if flag() else None,
        tokens=tokens,
        heads=kv_heads * ints(1, 9),
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_dim=draw(st.none() | st.integers(1, 70)),
        sink=ints(0, 80),
        window=window,
        ring=window + ints(0, 20),
        rotary=2 * ints(0, (head_dim - start) // 2),
        start=start,
        interleaved=flag(),
        learned=flag(),
        alibi=flag(),
        softcap=draw(st.sampled_from((0.0, 2.0, 30.0))),
        dense=draw(st.none() | st.integers(0, 200)) if tokens > 1 else None,
    )
    return case, [draw(st.permutations((0, 1, 2))) for _ in range(5)], ints(0, 2**32 - 1)


@pytest.mark.skipif(not ops.HAS_CPU_LIBRARY, reason="the compiled CPU ops were not built")
@given(call=calls(), dtype=st.sampled_from(list(TOLERANCES)))
@settings(deadline=None, max_examples=60)
def test_any_shape_and_stride_on_the_cpu(call, dtype):
    """Against the reference in the same dtype, whose arithmetic is float32 as well: the order of sums may differ. With
    AVX512_BF16, products of bfloat16 round queries and weights, and float64 says how much of that is too much."""
    case, orders, seed = call
    torch.manual_seed(seed)
    tensors = list(case.tensors(dtype))
    for i, order in enumerate(orders):
        stored = tensors[i].permute(*order, 3).contiguous()
        tensors[i] = stored.permute(*(order.index(dim) for dim in range(3)), 3)
    expected, run, exact = copies(tensors), copies(tensors), copies(tensors, torch.float64)
    low = reference.attention(*expected, **case.sizes)
    out = getattr(ops, "decode" if case.tokens == 1 else "prefill")(*run, **case.sizes, backend="cpu")
    eps = torch.finfo(dtype).eps
    if dtype == torch.bfloat16 and ops.CPU_ISA in ("avx512_bf16", "amx"):
        tolerance, _ = TOLERANCES[dtype]
        torch.testing.assert_close(
            out.double(), reference.attention(*exact, **case.sizes), rtol=tolerance, atol=tolerance
        )
    else:
        torch.testing.assert_close(out, low, rtol=max(eps, 2e-5), atol=3e-5)
    torch.testing.assert_close(run[3], expected[3], rtol=eps, atol=1e-6, equal_nan=True)
    assert same_bits(run[4], expected[4])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile them")
def test_kernels_compile():
    """Down to machine code, which needs no GPU, only its name: the interpreter is less strict about types."""
    pytest.importorskip("triton.backends.nvidia")
    code = """
        import torch, triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        class Driver:
            get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))
            get_current_device = staticmethod(lambda: 0)
            get_current_stream = staticmethod(lambda device: 0)

        triton.runtime.driver.set_active(Driver())
        compile_and_launch = JITFunction.run
        JITFunction.run = lambda *args, **kwargs: compile_and_launch(*args, **kwargs | {"warmup": True})
        from sinkattn.kernels import decode, prefill

        def tensors(batch, heads, tokens, alibi):
            new = torch.empty(3, batch, heads, tokens, 32, dtype=torch.bfloat16)
            cache = torch.empty(2, batch, 2, 300, 32, dtype=torch.bfloat16)
            lengths, rotation = torch.zeros(batch, dtype=torch.int64), torch.empty(batch, tokens, 2, 2, 16)
            per_head = (torch.empty(heads), torch.empty(heads)) if alibi else (None, None)
            return new[0], *new[1:, :, :2], *cache, lengths, lengths, rotation, *per_head, 4, 290, 0.2, 30.0

        decode.decode(*tensors(1, 2, 1, alibi=True))
        decode.decode(*tensors(9, 6, 1, alibi=True))
        prefill.prefill(*tensors(1, 4, 200, alibi=True))
        decode.decode(*tensors(1, 6, 1, alibi=False))
        prefill.prefill(*tensors(1, 4, 200, alibi=False))
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, check=True, timeout=120)


@pytest.mark.skipif(not ops.HAS_CPU_LIBRARY, reason="the compiled CPU ops were not built")
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_other_instruction_sets(instructions):
    """The compiled ops once more, as processors without the fastest instructions run them."""
    env = os.environ | {"SINKATTN_CPU_ISA": instructions}
    ask = (sys.executable, "-c", "from sinkattn import ops; print(ops.CPU_ISA)")
    chosen = subprocess.run(ask, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    if instructions != "portable" and chosen == "portable":
        pytest.skip(f"this machine has no {instructions}")
    assert chosen == instructions
    files, some = (
        (__file__, Path(__file__).with_name("test_linear.py")),
        "edges and cpu-cpu or any_shape or test_inputs and cpu or wide",
    )
    arguments = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", some)
    done = subprocess.run(arguments, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
