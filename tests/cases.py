"""Calls of the ops with random data, for tests/ops: every backend there is against `sinkattn.reference` in float64.

What no one may look at holds NaN: slots that are still empty, and all that belongs to padding.
"""

import dataclasses

import pytest
import torch

from helpers import GPU
from sinkattn import ops, reference

BACKENDS = [
    pytest.param(backend, device, id=f"{backend}-{device}", marks=[pytest.mark.gpu] if device == GPU else [])
    for device in (("cpu", GPU) if torch.cuda.is_available() else ("cpu",))
    for backend in ops.BACKENDS
    if backend != "auto" and ops.missing_backend(backend, torch.device(device).type) is None
]
GPU_BACKENDS = [param for param in BACKENDS if param.values[1] == GPU and param.values[0] != "reference"]
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
both_ops = pytest.mark.parametrize("op", ["decode", "prefill"])
with_cpu_library = pytest.mark.skipif(not ops.HAS_CPU_LIBRARY, reason="the compiled CPU ops were not built")
with_cuda_library = pytest.mark.skipif(not ops.HAS_CUDA_LIBRARY, reason="the compiled CUDA ops were not built")


# dtype: error of one number, absolute and relative; floor of the error of a tensor, relative, where twice that of the
# reference in the same dtype is next to nothing.
TOLERANCES = {
    torch.float32: (1e-5, 4e-6),
    torch.float16: (2e-3, 2.4e-4),
    torch.bfloat16: (1.6e-2, 2e-3),
}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes of a number
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


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
    near: bool = False  # sinks are to all queries where they are
    learned: bool = False
    alibi: bool = False
    softcap: float = 0.0
    dense: int | None = None  # of prefill
    stored: torch.dtype | None = None  # of caches in 8 bits

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
        """The tensors of the ops: q, k, v transposed views, caches slices of something larger, data all random.

        With caches in 8 bits all products by which keys turn are exact, in every dtype, so that every backend has to
        store the same bits.
        """
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

        def eight_bits(dim):
            most = reference.LARGEST[self.stored]
            large = (most / 3 * torch.randn(batch + 1, self.kv_heads, slots + 3, dim + 16)).clamp(-most, most)
            part = large.to(self.stored)[1:, :, 2:-1, 16:]
            part.view(torch.int8).masked_fill_(empty, 127)  # 127 is NaN in float8
            scales = (torch.rand(batch, self.kv_heads, slots, 2) + 0.5)[..., 0] * 3 / most
            return part, scales.masked_fill_(empty[..., 0], torch.nan)

        empty = (reference.held_positions(lengths, self.sink, slots - self.sink) < 0)[:, None, :, None]
        q, k, v = new(self.heads, self.head_dim), new(self.kv_heads, self.head_dim), new(self.kv_heads, v_dim)
        if self.stored is None:
            caches, scales = (cache(self.head_dim), cache(v_dim)), (None, None)
        else:
            caches, scales = zip(eight_bits(self.head_dim), eight_bits(v_dim), strict=True)
            k.copy_((32 * k.float()).round().clamp(-127, 127) / 32)
        half = (self.head_dim if self.rotary is None else self.rotary) // 2
        angles = 100 * torch.randn(batch, self.tokens, 2, half)
        if self.near:
            angles[:, :, 1] = angles[:, :, 0]
        rotation = torch.stack((angles.cos(), angles.sin()), dim=3) if half else None
        if half and self.stored is not None:
            rotation = (4 * rotation).round() / 4
        learned = torch.randn(self.heads) if self.learned else None
        slopes = 2 * torch.rand(self.heads) / self.window if self.alibi else None
        if counts is not None:
            padding = torch.arange(self.tokens) < self.tokens - counts[:, None]
            for x in (q, k, v):
                x.masked_fill_(padding[:, None, :, None], torch.nan)
            if half:
                rotation.masked_fill_(padding[:, :, None, None, None], torch.nan)
        tensors = q, k, v, *caches, lengths, counts, rotation, learned, slopes, *scales
        return tuple(x if x is None or device == "cpu" else _like(x, x.to(device)) for x in tensors)


def _like(x, values):
    """``values`` with the strides of x."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=values.dtype, device=values.device)
    return out.copy_(values)


def copies(tensors, dtype=None, device=None):
    """Caches that may be written to, the rest as it is; or all in another dtype."""
    out = [x if x is None else x.to(device) if device else x for x in tensors]
    if dtype:
        is_kept = [x is None or not x.is_floating_point() or x.itemsize == 1 or i > 9 for i, x in enumerate(out)]
        out = [x if kept else x.to(dtype) for x, kept in zip(out, is_kept, strict=True)]
    return tuple(_like(x, x) if x is not None and i in (3, 4, 10, 11) else x for i, x in enumerate(out))


def same_bits(a, b):
    """But for the sign of a zero in float8."""
    if a.dtype == b.dtype == torch.float8_e4m3fn:
        a, b = (x.contiguous().view(torch.int8) for x in (a, b))
        a, b = (x.masked_fill(x == -128, 0) for x in (a, b))
    return torch.equal(*(x.contiguous().view(BITS[x.itemsize]) for x in (a, b)))


def assert_close(out, exact, low, dtype, room=1):
    """``exact`` is float64; ``low`` the same computation by the reference in ``dtype``. room: times the error that is
    allowed of one number."""
    tolerance, floor = room * TOLERANCES[dtype][0], TOLERANCES[dtype][1]
    assert out.dtype == dtype and out.shape == exact.shape
    out, low = out.double(), low.double()
    torch.testing.assert_close(out, exact, rtol=tolerance, atol=tolerance)
    assert (out - exact).norm() <= 2 * (low - exact).norm() + floor * exact.norm()


def fitted(case, backend):
    """The small heads of most cases are not for CUDA C++."""
    return dataclasses.replace(case, head_dim=64) if backend == "cuda" and case.head_dim == 16 else case


def check(op, backend, device, dtype, case, room=1):
    """One call: the output, the new slots and the old ones. room: as of `assert_close`."""
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
    assert_close(out, exact_out, low_out, dtype, room)
    if case.stored is not None:
        for i, name in ((3, "keys"), (4, "values"), (10, "scales of keys"), (11, "scales of values")):
            assert same_bits(run[i].cpu(), low[i]) and same_bits(low[i], exact[i].cpu()), f"{name} are not as defined"
        return
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
