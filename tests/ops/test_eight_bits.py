"""Caches in int8 and float8_e4m3fn: what is stored, and what comes of it, on every backend."""

import dataclasses
import functools

import pytest
import torch

from cases import (
    EIGHT_BITS,
    MIXED,
    SHAPES,
    TOLERANCES,
    Case,
    assert_close,
    both_ops,
    check,
    copies,
    dtypes,
    edges,
    every_backend,
    fitted,
    same_bits,
    with_cuda_library,
)
from helpers import GPU
from sinkattn import backends, ops, reference

every_kind = pytest.mark.parametrize("stored", EIGHT_BITS, ids=["int8", "float8"])
SOME = [
    "gqa 3", "mqa 20", "head_dim 80", "head_dim 96", "head_dim 192, v 128", "head_dim 256", "v_dim 40",
    "interleaved, partial, offset", "no sinks", "many sinks", "window 1", "slack slots", "learned logits", "softcap",
    "alibi",
]  # fmt: skip


def dtype_of(backend):
    """In which a backend takes such caches."""
    return torch.float16 if backend == "cuda" else torch.float32


def serves(backend, device, stored, dtype=None):
    """Whether a backend takes such caches; if not, that it says so."""
    dtype = dtype or dtype_of(backend)
    case = Case((20,), head_dim=64, stored=stored)
    tensors = backends.Tensors(*case.tensors(dtype, device))
    reason = backends.BACKENDS[backend].refusal("decode", tensors)
    if reason is not None:
        with pytest.raises(ValueError, match=f"backend '{backend}' takes"):
            ops.decode(*tensors, **case.sizes, backend=backend)
    return reason is None


def exact_step(numbers, stored):
    """Half the distance, at most, of a number from what is stored for it, both over the scale."""
    if stored == torch.int8:
        return torch.full_like(numbers, 0.5)
    return (2.0 ** numbers.abs().clamp(min=2**-6).log2().floor()) / 16  # three bits behind the leading one


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_stored(stored, dtype):
    """Within half a step of the row, whose largest number is the largest of the dtype; each row by itself."""
    x = (torch.randn(50, 3, 40, dtype=torch.float64) * 10.0 ** torch.randint(-4, 4, (50, 3, 1))).to(dtype)
    numbers, scales = reference.quantised(x, stored)
    assert numbers.dtype == stored and scales.dtype == torch.float32 and scales.shape == (50, 3)
    largest = 127 if stored == torch.int8 else 448
    torch.testing.assert_close(scales.double() * largest, x.double().abs().amax(-1), rtol=2e-7, atol=0)
    assert (numbers.double().abs().amax(-1) == largest).all()
    over = x.double() / scales.double()[..., None]
    assert ((numbers.double() - over).abs() <= exact_step(over, stored) * (1 + 1e-4)).all()
    again, same = reference.quantised(numbers.double() * scales.double()[..., None], stored)
    assert same_bits(again, numbers)  # what is on the grid stays
    torch.testing.assert_close(same, scales, rtol=2e-7, atol=0)


@every_kind
def test_rows_that_are_no_common_ones(stored):
    x = torch.tensor([[0.0, 0], [1e-45, -1e-45], [3e38, 1], [torch.nan, 1], [-torch.inf, 1], [1, 0], [-0.0, 0]])
    numbers, scales = reference.quantised(x, stored)
    assert scales.isnan().tolist() == [False, False, False, True, True, False, False]
    assert scales[0] == 0 and scales[6] == 0 and (numbers[[0, 3, 4, 6]].float() == 0).all()
    found = numbers.float() * scales[:, None]
    assert (found[1].abs() <= 1.3e-43).all()  # less than half a step of numbers so small
    torch.testing.assert_close(found[[2, 5]], torch.tensor([[3e38, 0], [1, 0]]))


@every_backend
@both_ops
@every_kind
@pytest.mark.parametrize("lengths", edges(), ids=str)
def test_edges(backend, device, stored, op, lengths):
    for dtype in dtypes(backend, device):
        if serves(backend, device, stored, dtype):
            check(op, backend, device, dtype, Case(lengths, tokens=1 if op == "decode" else 19, heads=4, stored=stored))


@every_backend
@both_ops
@every_kind
@pytest.mark.parametrize("shape", SOME)
def test_shapes(backend, device, stored, op, shape):
    case = Case(**{"lengths": MIXED, "tokens": 1 if op == "decode" else 19, "stored": stored} | SHAPES[shape])
    for dtype in dtypes(backend, device, few=True):
        if serves(backend, device, stored, dtype):
            check(op, backend, device, dtype, case)


@every_backend
@both_ops
@every_kind
def test_padding_and_long_rings(backend, device, stored, op):
    """Rows that take nothing or a part of the chunk; more slots than one program reads, some of them slack."""
    dtype = dtypes(backend, device)[-1]
    tokens, counts = (1, (1, 0, 1, 1)) if op == "decode" else (30, (30, 0, 17, 1))
    case = Case((0, 20, 304, 5000), counts, tokens, 4, window=290, ring=300, stored=stored, learned=True)
    if serves(backend, device, stored, dtype):
        check(op, backend, device, dtype, case)
        if op == "prefill":
            check(op, backend, device, dtype, dataclasses.replace(case, dense=10**6))


@every_backend
@every_kind
@pytest.mark.parametrize("tokens", [2, 5, 16])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (7, 1)], ids=str)
def test_few_tokens(backend, device, stored, tokens, heads):
    """Where the ring has room for all of them, decode takes them, on GPUs."""
    lengths, counts = (0, 3, 20, 4_000_000), (tokens, 1, 0, tokens - 1)
    for dtype in dtypes(backend, device, few=True):
        if serves(backend, device, stored, dtype):
            case = Case(lengths, counts, tokens, *heads, ring=12 + 16, stored=stored)
            check("prefill", backend, device, dtype, case, room=2)


@pytest.mark.gpu
@every_kind
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window, ring", [(1, 1), (200, 200), (130, 171), (700, 716)])
def test_long_chunks(window, ring, head_dim, backend, stored):
    """Of more than a tile of queries, over windows of less and of more than a tile of keys."""
    if not serves(backend, GPU, stored):
        return
    for dtype in (torch.float16, torch.bfloat16):
        more = dict(head_dim=head_dim, window=window, ring=ring, stored=stored)
        check("prefill", backend, GPU, dtype, Case((0, 150, 5000), (333, 0, 150), 333, 4, 2, **more))
        check("prefill", backend, GPU, dtype, Case((3, 10**7), None, 129, 6, 2, sink=37, learned=True, **more))


@pytest.mark.gpu
@with_cuda_library
@every_kind
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("heads", [(2, 2), (10, 2), (24, 2)], ids=str)
@pytest.mark.parametrize("splits, cluster", [(1, False), (3, False), (25, False), (1, True), (3, True), (8, True)])
def test_splits(splits, cluster, heads, head_dim, stored):
    """However many blocks share a key head, wherever they meet."""
    if not serves("cuda", GPU, stored):
        return
    for dtype, lengths, sink in (torch.float16, (5000, 150, 430), 4), (torch.bfloat16, (100, 10**7, 3), 70):
        more = dict(sink=sink, window=371, ring=390, learned=True, alibi=True, stored=stored)
        case = Case(lengths, (1, 1, 0), 1, *heads, head_dim, **more)
        tensors = case.tensors(dtype, GPU)
        exact, low = copies(tensors, torch.float64, "cpu"), copies(tensors, device="cpu")
        exact = reference.attention(*exact, **case.sizes)
        op = functools.partial(torch.ops.sinkattn.decode_cuda, **case.sizes, splits=splits, cluster=cluster)
        out = op(*tensors, overlap=True)
        assert_close(out.cpu(), exact, reference.attention(*low, **case.sizes), dtype)
        assert all(same_bits(tensors[i].cpu(), low[i]) for i in (3, 4, 10, 11))


@every_backend
@both_ops
@every_kind
def test_turned_keys(backend, device, stored, op):
    """Of any angle and size: stored within half a step of the exact ones."""
    if not serves(backend, device, stored):
        return
    case = Case((0, 7, 40, 4_000_000), tokens=1 if op == "decode" else 5, head_dim=64, stored=stored)
    tensors = list(case.tensors(dtype_of(backend), device))
    angles = 100 * torch.randn(4, case.tokens, 2, 32, dtype=torch.float64)
    tensors[1] *= 10.0 ** torch.randint(-5, 5, tensors[1].shape[:3], device=device)[..., None]
    turns = torch.stack((angles.cos(), angles.sin()), dim=3)
    tensors[7] = turns.float().to(device)
    getattr(ops, op)(*tensors, **case.sizes, backend=backend)
    text_cos, text_sin, *_ = turns.float().double()[:, None].flatten(3, 4).unbind(3)
    exact = reference.rotate(tensors[1].cpu().double(), text_cos, text_sin)
    for row, length in enumerate(case.lengths):
        for i in range(case.tokens):
            slot = reference.slot_of(torch.tensor(length + i), case.sink, case.window)
            number, scale = (tensors[j][row, :, slot].cpu().double() for j in (3, 10))
            over = exact[row, :, i] / scale[:, None]
            assert ((number - over).abs() <= exact_step(over, stored) * (1 + 1e-4) + 1e-4).all()


@every_backend
@every_kind
def test_as_near_to_the_exact_as_the_format_says(backend, device, stored):
    """Against attention over what was never rounded: scores move by ``scale |q|_1 step``, and values by a step."""
    if not serves(backend, device, stored):
        return
    case = Case((0, 0), tokens=40, heads=4, head_dim=64, sink=4, window=100, stored=stored)
    tensors = case.tensors(dtype_of(backend), device)
    q, k, v, _, _, lengths, _, rotation = (x if x is None else x.cpu().double() for x in copies(tensors)[:8])
    lengths, nothing = lengths.long(), torch.zeros(2, 2, 104, 64, dtype=torch.float64)
    sizes = case.sizes
    exact = reference.attention(q, k, v, nothing, nothing.clone(), lengths, None, rotation, *[None] * 4, **sizes)
    out = ops.prefill(*tensors, **sizes, backend=backend).cpu().double()
    turned = reference.rotate(k, *rotation[:, None, :, 0].unbind(3))
    most = 127 if stored == torch.int8 else 448
    step = 0.5 if stored == torch.int8 else 16.0  # of the largest numbers, in units of the scale
    moved = sizes["scale"] * q.abs().sum(-1).max() * 2 * turned.abs().max() * step / most  # cos and sin are up to 1.25
    of_values = v.abs().max() * step / most
    allowed = (torch.expm1(2 * moved) * v.abs().max() + of_values).item()
    assert 1e-4 < (out - exact).abs().max() < allowed
    typical = (out - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert typical < (0.02 if stored == torch.int8 else 0.1)


@every_backend
@every_kind
def test_chunks_do_not_matter(backend, device, stored):
    """The new token is seen as it is stored: at once, in chunks, and token by token."""
    if not serves(backend, device, stored):
        return
    has_slopes = backend != "cuda"  # which has no prefill with them
    text = fitted(Case((0,), tokens=45, heads=4, learned=True, alibi=has_slopes, stored=stored), backend)
    dtype = dtype_of(backend)
    q, k, v, *held, lengths, counts, rotation, learned, slopes, ks, vs = text.tensors(dtype, device)

    def run(chunks):
        caches, scales = [x.clone() for x in held], [x.clone() for x in (ks, vs)]
        outs, begin = [], 0
        for size in chunks:
            part = slice(begin, begin + size)
            at = (q[:, :, part], k[:, :, part], v[:, :, part], *caches, lengths + begin, counts, rotation[:, part])
            op = ops.decode if size == 1 else ops.prefill
            outs.append(op(*at, learned, slopes, *scales, **text.sizes, backend=backend))
            begin += size
        return torch.cat(outs, dim=1), *caches, *scales

    whole = run([45])
    for chunks in ([1] * 45, [3, 1, 16, 20, 5]):
        out, *ends = run(chunks)
        allowed = 2 * TOLERANCES[dtype][0]
        torch.testing.assert_close(out, whole[0], rtol=allowed, atol=allowed)
        assert all(map(same_bits, ends, whole[1:]))


@every_backend
@both_ops
@every_kind
@pytest.mark.parametrize("what", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(backend, device, stored, op, what, bad):
    """It makes NaN of its head's outputs, then and as long as it is seen, and of no other row's or head's."""
    if not serves(backend, device, stored):
        return
    case = fitted(Case((20, 30), heads=4, window=3, stored=stored), backend)
    tensors = copies(case.tensors(dtype_of(backend), device))
    tensors[what][0, 1, 0, 3] = bad
    for step in range(case.window + 1):
        fresh = case.tensors(dtype_of(backend), device)
        if step:
            tensors = (*fresh[:3], *tensors[3:5], tensors[5] + 1, *fresh[6:10], *tensors[10:])
        out = getattr(ops, op)(*tensors, **case.sizes, backend=backend).cpu()
        is_seen = step < case.window
        assert out[0, 0, 2:].isnan().all() == is_seen and out[0, 0, 2:].isfinite().all() != is_seen
        assert out[0, 0, :2].isfinite().all() and out[1].isfinite().all()


BAD = {
    "no scales": (dict(k_scales=lambda x: None), ValueError, "k_scales is missing"),
    "scales of 16 bits": (dict(v_scales=lambda x: x.half()), TypeError, "v_scales is torch.float16; it needs float32"),
    "scales of another shape": (dict(v_scales=lambda x: x[:, :, 1:]), ValueError, "v_scales has shape"),
    "one cache in 8 bits": (dict(v_cache=lambda x: x.float()), TypeError, "v_cache is torch.float32, q is"),
    "two kinds": (dict(v_cache=lambda x: x.view(torch.uint8)), TypeError, "v_cache is torch.uint8"),
    "scales without": (dict(k_cache=lambda x: x.float(), v_cache=lambda x: x.float()), ValueError, "scales is given"),
    "another device": (dict(k_scales=lambda x: x.to("meta")), ValueError, "all must be on one device"),
}


@both_ops
@every_kind
@pytest.mark.parametrize("name", BAD)
def test_errors(name, stored, op):
    """Named, and the cache is left alone: also after good calls, when the compiled op is asked first."""
    change, error, message = BAD[name]
    case = Case((3, 20), heads=4, head_dim=64, stored=stored)
    tensors = dict(zip(backends.Tensors._fields, case.tensors(torch.float32), strict=True))
    getattr(ops, op)(*copies(tuple(tensors.values())), **case.sizes)
    tensors |= {key: function(tensors[key]) for key, function in change.items()}
    before = tensors["k_cache"].clone()
    with pytest.raises(error, match=message):
        getattr(ops, op)(**tensors, **case.sizes)
    assert same_bits(tensors["k_cache"], before)


@both_ops
@every_kind
def test_compile_and_opcheck(op, stored):
    case = Case((3, 20), (1, 0), 1 if op == "decode" else 3, 4, head_dim=64, stored=stored)
    tensors = [
        x.nan_to_num(0) if x is not None and x.dtype == torch.float32 else x for x in case.tensors(torch.float32)
    ]
    eager, compiled = copies(tensors), copies(tensors)

    def function(*tensors):
        return 2 * getattr(ops, op)(*tensors, **case.sizes)

    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    assert same_bits(out, function(*eager))
    assert all(same_bits(compiled[i], eager[i]) for i in (3, 4, 10, 11))
    if stored == torch.int8:  # torch compares no float8
        torch.library.opcheck(getattr(torch.ops.sinkattn, op).default, (*tensors, *case.sizes.values()))
