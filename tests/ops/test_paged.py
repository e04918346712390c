"""Attention over pages on every backend: texts fed through a server's pages, and single calls at every edge.

What no token of a call may look at is poison: NaN in slots, in freed pages and in all that belongs to padding, and any
number in the table where a text has no page.
"""

import dataclasses
import functools

import pytest
import torch

from cases import (
    GPU_BACKENDS,
    assert_close,
    dtypes,
    every_backend,
    fitted,
    same_bits,
    with_cpu_library,
    with_cuda_library,
)
from helpers import DEVICES, GPU
from sinkattn import ops, reference
from sinkattn.rope import Rope

POISON = torch.tensor([-(2**31), -7, 10**6, 2**31 - 1], dtype=torch.int32)


def poison(*shape: int) -> torch.Tensor:
    return POISON[torch.randint(len(POISON), shape)]


# Texts through a server's pages, against the definition over a ring, a whole text at once.

S, W, HEADS, KV_HEADS = 5, 23, 4, 2
SIZES = dict(sink_size=S, window_size=W, scale=0.25, softcap=2.0)
ROPE = Rope(0, False, torch.rand(1, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))


def angles(t: torch.Tensor) -> torch.Tensor:
    return ROPE.table(torch.stack((t, t.clamp(max=S + W - 1)), dim=-1), t[:, None])


class Text:
    """One text: queries, keys and values of its tokens, how many are done, and the pages that it holds by now."""

    def __init__(self, tokens: int, dtype: torch.dtype, dims: tuple[int, int]):
        heads = ((HEADS, dims[0]), (KV_HEADS, dims[0]), (KV_HEADS, dims[1]))
        self.qkv = [torch.randn(tokens, *shape).to(dtype) for shape in heads]
        self.done, self.pages = 0, []

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        """(tokens, HEADS, v_dim), by the definition."""
        q, k, v = (x.to(dtype).transpose(0, 1)[None] for x in self.qkv)
        empty = [x.new_zeros(1, KV_HEADS, S + W, x.shape[3]) for x in (k, v)]
        table = angles(torch.arange(q.shape[2]))[None]
        none = torch.zeros(1, dtype=torch.int64)
        return reference.attention(q, k, v, *empty, none, None, table, *[None] * 4, **SIZES)[0]


@every_backend
@pytest.mark.parametrize("block_size", [16, 32])
def test_texts(backend, device, block_size):
    """Prompts in chunks beside single tokens, texts that wait, padding, and pages that are freed behind the window."""
    for dtype in [torch.float64] if backend == "reference" else dtypes(backend, device, few=True):
        run_texts(backend, device, dtype, block_size)


def run_texts(backend, device, dtype, block_size):
    dims = (64, 64) if backend == "cuda" else (16, 24)
    texts = [Text(n, dtype, dims) for n in (118, 41, 97)]
    chunks = [[40, 30, *[1] * 48], [0, *[1] * 20, 0, 0, *[1] * 21], [3, 1, 64, *[1] * 29]]
    blocks = 3 * (118 // block_size + 2)
    pages = torch.full((blocks, KV_HEADS, block_size, sum(dims)), torch.nan, dtype=dtype, device=device)
    free = torch.randperm(blocks).tolist()
    found = [[] for _ in texts]
    while any(chunks):
        rows = [i for i, left in enumerate(chunks) if left]
        counts = [chunks[i].pop(0) for i in rows]
        padding = torch.randint(3, ()).item()
        for i, count in zip(rows, counts, strict=True):
            text = texts[i]
            for b in range(-(-S // block_size), (text.done - W + 1) // block_size):
                if text.pages[b] is not None:  # no token of the call sees it
                    pages[text.pages[b]] = torch.nan
                    free.append(text.pages[b])
                    text.pages[b] = None
            while len(text.pages) * block_size < text.done + count:
                text.pages.append(free.pop())
        table = poison(len(rows), max(len(texts[i].pages) for i in rows) + 1)
        for row, i in zip(table, rows, strict=True):
            for b, page in enumerate(texts[i].pages):
                row[b] = row[b] if page is None else page
        new = [slice(texts[i].done, texts[i].done + count) for i, count in zip(rows, counts, strict=True)]
        positions = torch.cat([torch.arange(part.start, part.stop) for part in new])
        poisoned = [
            *(torch.cat([texts[i].qkv[n][part] for i, part in zip(rows, new, strict=True)]) for n in range(3)),
            angles(positions),
        ]
        q, k, v, rotation = (torch.cat((x, x.new_full((padding, *x.shape[1:]), torch.nan))) for x in poisoned)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        lengths = torch.tensor([texts[i].done for i in rows], dtype=torch.int32)
        given = (x.to(device) for x in (starts, lengths, table, rotation))
        out = ops.attend_pages(
            *(x.to(device) for x in (q, k, v)), *pages.split(dims, dim=-1), *given, **SIZES,
            max_tokens=max(counts) if padding % 2 else 0, backend=backend,
        )  # fmt: skip
        *parts, rest = out.cpu().split([*counts, padding])
        assert not rest.any()
        for i, count, part in zip(rows, counts, parts, strict=True):
            found[i].append(part)
            texts[i].done += count
    for text, parts in zip(texts, found, strict=True):
        exact, out = text.expected(torch.float64), torch.cat(parts)
        if dtype == torch.float64:
            torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
        else:
            assert_close(out, exact, text.expected(dtype), dtype)


# Single calls, against `reference.attend_pages` in float64, which the above is a test of.


@dataclasses.dataclass
class Case:
    """One call: texts with so many tokens each, and so many new ones."""

    lengths: tuple
    counts: tuple
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_dim: int | None = None
    sink: int = 4
    window: int = 20
    block_size: int = 16
    rotary: int | None = None
    start: int = 0
    interleaved: bool = False
    softcap: float = 0.0
    padding: int = 0
    by_slots: bool = False  # pages lie as (blocks, block_size, heads, dims)
    max_tokens: int | None = None  # of the counts

    @property
    def sizes(self):
        most = max(self.counts, default=0) if self.max_tokens is None else self.max_tokens
        return dict(
            sink_size=self.sink, window_size=self.window, scale=self.head_dim**-0.5, softcap=self.softcap,
            rotary_start=self.start, interleaved=self.interleaved, max_tokens=most,
        )  # fmt: skip

    def tensors(self, dtype, device="cpu") -> list:
        """Those of the op, in their order. q, k and v are parts of one tensor, and so are the pages of both."""
        v_dim, size, tokens = self.v_dim or self.head_dim, self.block_size, sum(self.counts)
        heads = (self.heads, self.head_dim), (self.kv_heads, self.head_dim), (self.kv_heads, v_dim)
        qkv = torch.randn(tokens + self.padding, sum(n * dim for n, dim in heads)).to(dtype)
        turns = 100 * torch.randn(len(qkv), 2, (self.head_dim if self.rotary is None else self.rotary) // 2)
        rotation = torch.stack((turns.cos(), turns.sin()), dim=2)
        for x in (qkv, rotation):
            x[tokens:] = torch.nan
        parts = qkv.to(device).split([n * dim for n, dim in heads], dim=1)
        q, k, v = (x.view(-1, *shape) for x, shape in zip(parts, heads, strict=True))

        texts = list(zip(self.lengths, self.counts, strict=True))
        ends = [length + count for length, count in texts]
        old = [[*range(min(self.sink, n)), *range(max(self.sink, n - self.window + 1), n)] for n in self.lengths]
        held = [
            sorted({j // size for j in (*old[i], *range(n, ends[i]))}) if m else [] for i, (n, m) in enumerate(texts)
        ]
        table = poison(len(texts), max(ends, default=0) // size + 2)
        count = sum(map(len, held)) + 3
        pages = torch.full((count, self.kv_heads, size, self.head_dim + v_dim), torch.nan, dtype=dtype)
        if self.by_slots:
            pages = pages.transpose(1, 2).contiguous().transpose(1, 2)
        free = torch.randperm(count).tolist()
        for row, blocks, seen in zip(table, held, old, strict=True):
            for b in blocks:
                row[b] = free.pop()
            for j in seen if blocks else ():
                pages[row[j // size], :, j % size] = torch.randn(self.kv_heads, self.head_dim + v_dim).to(dtype)
        pages = torch.empty_strided(pages.shape, pages.stride(), dtype=dtype, device=device).copy_(pages)
        starts = torch.tensor([0, *self.counts]).cumsum(0)
        small = starts.int(), torch.tensor(self.lengths, dtype=torch.int32), table, rotation if turns.numel() else None
        views = pages.split((self.head_dim, v_dim), dim=-1)
        return [q, k, v, *views, *(x if x is None else x.to(device) for x in small)]


def copies(tensors, dtype=None, device=None) -> list:
    """Pages, a new tensor of which both are views, and the rest; all in another dtype or elsewhere, if asked for."""
    q, k, v, k_pages, v_pages, *small = (x if x is None else x.to(device or x.device) for x in tensors)
    pages = torch.cat((k_pages, v_pages), dim=-1).to(dtype or q.dtype)
    views = pages.split((k_pages.shape[3], v_pages.shape[3]), dim=-1)
    return [*(x.to(dtype or x.dtype) for x in (q, k, v)), *views, *small]


def check(backend, device, dtype, case):
    """One call: the output, the new slots and all others."""
    case = fitted(case, backend)
    tensors = case.tensors(dtype, device)
    before = copies(tensors, device="cpu")
    exact, low = copies(before, torch.float64), copies(before)
    exact_out, low_out = (reference.attend_pages(*x, **case.sizes) for x in (exact, low))
    out = ops.attend_pages(*tensors, **case.sizes, backend=backend).cpu()
    assert out.is_contiguous()
    assert_close(out, exact_out, low_out, dtype)
    assert not out[sum(case.counts) :].any()
    k_pages, v_pages = (x.cpu() for x in tensors[3:5])
    assert same_bits(v_pages, low[4]), "a value was not stored, or another one changed"
    is_new = ~same(before[4], low[4])  # values are written wherever keys are
    assert is_new.sum() == sum(case.counts) * case.kv_heads
    is_new = is_new[..., None]
    assert same_bits(k_pages.masked_fill(is_new, 0), before[3].masked_fill(is_new, 0)), "another key changed"
    new_keys = (x.masked_fill(~is_new, 0).double() for x in (k_pages, exact[3]))
    torch.testing.assert_close(*new_keys, rtol=torch.finfo(dtype).eps, atol=1e-6)  # a sum of two products


def same(a, b):
    """Which rows of two tensors are, bit for bit: bool without the last dim."""
    return ((a == b) | (a.isnan() & b.isnan())).all(-1)


@every_backend
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_edges(backend, device, count):
    """Lengths around sinks, capacity and the edges of pages."""
    lengths = (0, 1, 3, 4, 5, 15, 16, 17, 22, 23, 24, 25, 31, 32, 35, 36, 47, 48, 49, 79, 1000)
    for dtype in dtypes(backend, device, few=count > 2):
        for block_size, some in ((16, lengths[::2]), (32, lengths[1::2])):
            check(backend, device, dtype, Case(some, (count,) * len(some), block_size=block_size))


MIXED = {"lengths": (3, 0, 500, 36, 77, 2_000_000), "counts": (1, 33, 0, 1, 18, 1)}
SHAPES = {
    "plain": {},
    "by slots": {"by_slots": True},
    "pages of 48": {"block_size": 48, "padding": 3},
    "gqa 3": {"heads": 6, "padding": 1},
    "gqa 7": {"heads": 7, "kv_heads": 1},
    "mha": {"heads": 3, "kv_heads": 3},
    "mqa 20": {"heads": 20, "kv_heads": 1},
    "head_dim 8": {"head_dim": 8},
    "head_dim 80, v 96": {"head_dim": 80, "v_dim": 96},
    "head_dim 256": {"head_dim": 256},
    "no rotation": {"rotary": 0},
    "partial, offset": {"rotary": 6, "start": 5},
    "interleaved": {"interleaved": True, "rotary": 8, "start": 2},
    "softcap": {"softcap": 3.0},
    "no sinks": {"sink": 0},
    "many sinks": {"sink": 70, "window": 33},
    "window 1": {"window": 1},
    "long window": {"window": 300, "lengths": (290, 303, 304, 310, 900, 2000)},
    "not known how many": {"max_tokens": 0, "padding": 5},
}


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, device, shape):
    """Texts with one token, with many and with none, side by side."""
    for dtype in dtypes(backend, device, few=True):
        check(backend, device, dtype, Case(**MIXED | SHAPES[shape]))


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_single_tokens(backend, device, shape):
    for dtype in dtypes(backend, device, few=True):
        check(backend, device, dtype, Case(**MIXED | SHAPES[shape] | {"counts": (1, 1, 0, 1, 1, 1)}))


@every_backend
@pytest.mark.parametrize("texts", [1, 5])
def test_long_windows(backend, device, texts):
    """More pages than one program reads; few texts, which several programs share, and more."""
    lengths = (700, 350, 300, 5000, 271)[:texts]
    for heads, dtype in zip((4, 2), 2 * dtypes(backend, device), strict=False):
        check(backend, device, dtype, Case(lengths, (1,) * texts, heads=heads, head_dim=64, window=300))


@every_backend
def test_nothing(backend, device):
    for case in (Case((), ()), Case((), (), padding=3), Case((5, 40), (0, 0)), Case((5, 40), (0, 0), padding=2)):
        for dtype in dtypes(backend, device, few=True):
            tensors = case.tensors(dtype, device)
            out = ops.attend_pages(*tensors, **case.sizes, backend=backend)
            assert out.shape == (case.padding, 4, 16) and not out.any() and tensors[3].isnan().all()


@every_backend
def test_same_bits(backend, device):
    for case in (Case(**MIXED), Case((900, 1000), (1, 1), window=600)):
        tensors = case.tensors(torch.float16, device)
        runs = [copies(tensors) for _ in range(2 if device == "cpu" else 20)]
        outs = [ops.attend_pages(*run, **case.sizes, backend=backend) for run in runs]
        assert all(
            same_bits(out, outs[0]) and same_bits(run[3], runs[0][3]) for out, run in zip(outs, runs, strict=True)
        )


# What is refused.

BAD = {
    "q of 4 dims": ("q", lambda x: x[None], ValueError, "q has shape"),
    "pages of 3 dims": ("k_pages", lambda x: x[0], ValueError, "k_pages has shape"),
    "k of another dtype": ("k", lambda x: x.double(), TypeError, "k is torch.float64"),
    "pages of another dtype": ("v_pages", lambda x: x.double(), TypeError, "v_pages is torch.float64"),
    "last stride": ("k_pages", lambda x: x.mT.contiguous().mT, ValueError, "k_pages has strides"),
    "heads that do not divide": ("q", lambda x: x[:, :3], ValueError, "3 query heads cannot share 2"),
    "tokens that differ": ("v", lambda x: x[1:], ValueError, "do not fit"),
    "pages that differ": ("v_pages", lambda x: x[1:], ValueError, "one number and size of blocks"),
    "pages of another size": ("v_pages", lambda x: x[:, :, :8], ValueError, "one number and size of blocks"),
    "starts of int64": ("starts", lambda x: x.long(), ValueError, "starts is torch.int64"),
    "starts without an end": ("starts", lambda x: x[1:], ValueError, "it needs int32 .3,."),
    "lengths of 2 dims": ("lengths", lambda x: x[None], ValueError, "lengths is"),
    "a table of another batch": ("block_table", lambda x: x[1:], ValueError, "block_table is"),
    "a table by columns": ("block_table", lambda x: x.mT.contiguous().mT, ValueError, "block_table has strides"),
    "rotation of others": ("rotation", lambda x: x[1:], ValueError, "rotation .* does not fit"),
    "rotation of half precision": ("rotation", lambda x: x.half(), TypeError, "rotation is torch.float16"),
    "gradients": ("q", lambda x: x.clone().requires_grad_(), RuntimeError, "these ops are for inference"),
    "another device": ("lengths", lambda x: x.to("meta"), ValueError, "all must be on one device"),
    "no window": ("window_size", lambda x: 0, ValueError, "window_size=0"),
    "a negative scale": ("scale", lambda x: -x, ValueError, "scale=-"),
    "negative max_tokens": ("max_tokens", lambda x: -1, ValueError, "max_tokens=-1"),
    "unknown backend": ("backend", lambda x: "fast", ValueError, "unknown backend"),
}
OUT_OF_BOUNDS = {  # what the compiled CPU op looks at
    "starts that fall": ("starts", lambda x: x.flip(0), "sinkattn: starts"),
    "starts below zero": ("starts", lambda x: x - 1, "sinkattn: starts"),
    "starts beyond the tokens": ("starts", lambda x: x + 1, "sinkattn: starts"),
    "more tokens than max_tokens": ("starts", lambda x: x // 3 * 3, "a text has 3 new tokens, not max_tokens=2"),
    "lengths below zero": ("lengths", lambda x: x - 4, "lengths not be negative"),
    "lengths beyond the table": ("lengths", lambda x: x + 100, "too short for a text of"),
    "pages beyond the last": ("block_table", lambda x: x + 10, "a text has page"),
    "pages before the first": ("block_table", lambda x: x - 10, "a text has page"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BAD)
def test_errors(name, device):
    """Bad input is named, and pages are left alone: also after good calls, when the compiled op is asked first."""
    names = ("q", "k", "v", "k_pages", "v_pages", "starts", "lengths", "block_table", "rotation")
    case, (key, change, error, message) = Case((3, 40), (1, 2), rotary=8), BAD[name]
    tensors = case.tensors(torch.float32, device)
    ops.attend_pages(*copies(tensors), **case.sizes)
    given = dict(zip(names, tensors, strict=True)) | case.sizes | {"backend": "auto"}
    before = copies(tensors)
    with pytest.raises(error, match=message):
        ops.attend_pages(**given | {key: change(given[key])})
    assert all(same(x, y).all() for x, y in zip(tensors[3:5], before[3:5], strict=True))


def test_pages_of_other_sizes_than_multiples_of_16():
    tensors = Case((3, 8), (1, 2), block_size=8).tensors(torch.float32)
    with pytest.raises(ValueError, match="a page has 8 tokens; it needs a multiple of 16"):
        ops.attend_pages(*tensors, **Case((), ()).sizes)


@with_cpu_library
@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_out_of_bounds(name):
    """What leads elsewhere than into the tensors is found out before anything is written."""
    case, (key, change, message) = Case((3, 40), (1, 2)), OUT_OF_BOUNDS[name]
    tensors, at = case.tensors(torch.float32), ["starts", "lengths", "block_table"].index(key) + 5
    before = copies(tensors)
    tensors[at] = change(tensors[at])
    for backend in ("auto", "cpu"):
        with pytest.raises(RuntimeError, match=message):
            ops.attend_pages(*tensors, **case.sizes, backend=backend)
    assert all(same(x, y).all() for x, y in zip(tensors[3:5], before[3:5], strict=True))


# As torch calls it.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("together", [True, False])
def test_opcheck(device, together):
    """Pages of keys and values are views of one tensor, or tensors of their own."""
    case = Case((3, 40, 17), (1, 2, 1), max_tokens=2)
    tensors = [x.nan_to_num(0) if x.is_floating_point() else x for x in case.tensors(torch.float32, device)]
    tensors[7] = tensors[7].clamp(0, len(tensors[3]) - 1)
    if together:
        tensors[3:5] = torch.cat(tensors[3:5], dim=-1).split(16, dim=-1)
    names = ["attend_pages", *(["attend_pages_triton"] if device != "cpu" else [])]
    for name in names:
        torch.library.opcheck(getattr(torch.ops.sinkattn, name).default, (*tensors, *case.sizes.values()))


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device):
    """One graph, and it writes to the pages it was given."""
    case = Case((3, 40), (1, 2))
    tensors = case.tensors(torch.float32, device)
    eager, compiled = copies(tensors), copies(tensors)

    def function(*tensors):
        return 2 * ops.attend_pages(*tensors, **case.sizes)

    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(out, function(*eager), rtol=0, atol=0)
    assert all(same(x, y).all() for x, y in zip(compiled[3:5], eager[3:5], strict=True))


@pytest.mark.gpu
@with_cuda_library
def test_opcheck_of_one_token_a_text():
    case = Case((3, 40, 17), (1, 1, 0), head_dim=64, padding=1)
    tensors = [x.nan_to_num(0) if x.is_floating_point() else x for x in case.tensors(torch.float16, GPU)]
    torch.library.opcheck(torch.ops.sinkattn.attend_pages_cuda.default, (*tensors, *case.sizes.values()))


@pytest.mark.gpu
@with_cuda_library
@pytest.mark.parametrize("heads", [(2, 2), (10, 2), (24, 2)])
@pytest.mark.parametrize(
    "splits, cluster", [*((n, False) for n in (1, 2, 3, 8, 25, 64)), *((n, True) for n in (1, 2, 3, 5, 8))]
)
def test_splits(splits, cluster, heads):
    """However many blocks share a key head, whichever of them new token and sinks fall to, wherever they meet."""
    for dtype, lengths, sink in (torch.float16, (5000, 150, 430, 9), 4), (torch.bfloat16, (100, 10**7, 3, 70), 70):
        case = Case(lengths, (1, 1, 1, 0), *heads, 64, sink=sink, window=371, softcap=3.0, padding=2, block_size=32)
        tensors = case.tensors(dtype, GPU)
        before = copies(tensors, device="cpu")
        exact, low, again = copies(before, torch.float64), copies(before), copies(tensors)
        exact_out, low_out = (reference.attend_pages(*x, **case.sizes) for x in (exact, low))
        op = functools.partial(torch.ops.sinkattn.attend_pages_cuda, **case.sizes, splits=splits, cluster=cluster)
        out = op(*tensors)
        assert_close(out.cpu(), exact_out, low_out, dtype)
        assert same_bits(tensors[4].cpu(), low[4])
        counters = torch.zeros(len(out) * heads[1], dtype=torch.int32, device=GPU)
        for given in (None, counters, counters, None, counters):  # they are zero again, whoever arrives last
            assert same_bits(op(*again, overlap=True, arrivals=given), out)
        assert not counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), GPU_BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (28, 4), (16, 1)])
def test_large(backend, device, heads, head_dim):
    """As models have it: one text and many, and prompts beside them."""
    lengths = (500, 1024, 4_000_000, 1019, 1020, 3000, 70_000)
    for dtype in (torch.float16, torch.bfloat16):
        for some, counts in ((lengths[:1], (1,)), (9 * lengths, (1,) * 63), (lengths, (1, 300, 1, 0, 777, 1, 1))):
            check(backend, device, dtype, Case(some, counts, *heads, head_dim, window=1020))


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), GPU_BACKENDS)
@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 30, 5)])
def test_graphs(backend, device, counts):
    """A captured call takes whatever tokens, lengths and pages are there when it is replayed."""
    most = max(counts)
    cases = [
        Case(lengths, counts, head_dim=64, max_tokens=most) for lengths in ((3, 17, 40), (900, 0, 5), (36, 36, 2000))
    ]
    calls = [case.tensors(torch.bfloat16, device) for case in cases]
    columns, blocks = max(x[7].shape[1] for x in calls), max(len(x[3]) for x in calls)
    static = copies(calls[0])
    static[7] = torch.zeros(3, columns, dtype=torch.int32, device=device)
    pages = torch.zeros(blocks, *calls[0][3].shape[1:3], 128, dtype=torch.bfloat16, device=device)
    static[3:5] = pages.split(64, dim=-1)

    def fill(call):
        pages[: len(call[3])] = torch.cat(call[3:5], dim=-1)
        static[7][:, : call[7].shape[1]] = call[7]
        for i in (0, 1, 2, 5, 6, 8):
            static[i].copy_(call[i])

    fill(calls[0])
    ops.attend_pages(*static, **cases[0].sizes, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        out = ops.attend_pages(*static, **cases[0].sizes, backend=backend)
    for call, case in zip(calls, cases, strict=True):
        fill(call)
        graph.replay()
        torch.cuda.synchronize(device)
        assert same_bits(out, ops.attend_pages(*call, **case.sizes, backend=backend))
        assert same(torch.cat(call[3:5], dim=-1), pages[: len(call[3])]).all()
