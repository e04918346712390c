"""What the ops refuse, in which words, and which backend takes which call."""

import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import Case, both_ops, copies, every_backend
from helpers import GPU
from sinkattn import backends, ops, reference

DEVICE = GPU if torch.cuda.is_available() else "cpu"
BAD_INPUTS = {
    "unknown backend": ({}, {"backend": "fast"}, ValueError, "unknown backend 'fast'"),
    "missing backend": ({}, {"backend": "cuda" if DEVICE == "cpu" else "cpu"}, RuntimeError, "is not available"),
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


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_errors(name, dtype, op):
    """Bad input is named, and the cache is left alone: also after good calls, when the compiled op is asked first."""
    change, sizes, error, message = BAD_INPUTS[name]
    case = Case((3, 20), (1, 1), heads=4, head_dim=64, learned=True)
    tensors = dict(zip(backends.Tensors._fields, case.tensors(dtype, DEVICE), strict=True))
    getattr(ops, op)(*copies(tuple(tensors.values())), **case.sizes)
    tensors |= {key: function(tensors[key]) for key, function in change.items()}
    before = {key: tensors[key].clone() for key in ("k_cache", "v_cache")}
    with pytest.raises(error, match=message):
        getattr(ops, op)(**tensors, **case.sizes | sizes)
    for key, cache in before.items():
        torch.testing.assert_close(tensors[key], cache, rtol=0, atol=0, equal_nan=True)


@both_ops
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


@every_backend
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
        new, few, many, cache = (
            torch.empty(1, 8, n, 128, dtype=torch.bfloat16, device="cuda:0") for n in (1, 5, 20, 68)
        )

    def chosen(op, backend, x=None):
        x = (new if op == "decode" else many) if x is None else x
        tensors, sizes = backends.Tensors(x, x, x, cache, cache, None), backends.Sizes(4, 60, 1.0)
        return backends.chosen(op, backend, tensors, sizes).name()

    assert chosen("decode", "auto") == f"sinkattn::{decode}"
    assert chosen("decode", "cuda") == "sinkattn::decode_cuda"
    assert chosen("prefill", "auto") == f"sinkattn::{prefill}"
    assert chosen("prefill", "auto", few) == f"sinkattn::{decode}".replace("decode", "prefill")  # by the same kernel
    assert chosen("prefill", "triton") == "sinkattn::prefill_triton"

    def over_pages(backend, max_tokens):
        with FakeTensorMode():
            x, pages = (torch.empty(*n, 8, *dim, dtype=torch.bfloat16, device="cuda:0")
                        for n, dim in (((3,), (128,)), ((9,), (16, 128))))  # fmt: skip
        tensors = backends.Paged(x, x, x, pages, pages, None, x, None)
        sizes = backends.Sizes(4, 60, 1.0, max_tokens=max_tokens)
        return backends.chosen("attend_pages", backend, tensors, sizes).name()

    for backend in ("auto", "cuda"):
        assert over_pages(backend, 1) == f"sinkattn::{decode}".replace("decode", "attend_pages")
        assert over_pages(backend, 0) == over_pages(backend, 7) == "sinkattn::attend_pages_triton"
    assert over_pages("triton", 1) == "sinkattn::attend_pages_triton"


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (8, 9), (8, 0)], ids=str)
def test_what_serves_8_bits(monkeypatch, capability, stored):
    """CUDA C++ from 9.0 on, Triton all of them but float8 before 8.9."""
    properties = types.SimpleNamespace(major=capability[0], shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(backends, "HAS_CUDA_LIBRARY", True)
    with FakeTensorMode():
        x = torch.empty(1, 8, 1, 128, dtype=torch.bfloat16, device="cuda:0")
        cache, scales = (torch.empty(1, 8, 68, *dim, dtype=dtype, device="cuda:0")
                         for dim, dtype in (((128,), stored), ((), torch.float32)))  # fmt: skip
    tensors = backends.Tensors(x, x, x, cache, cache, None, k_scales=scales, v_scales=scales)

    def chosen(backend):
        return backends.chosen("decode", backend, tensors, backends.Sizes(4, 60, 1.0))

    has_float8 = stored == torch.int8 or capability >= (8, 9)
    if capability >= (9, 0):
        assert chosen("auto").name() == chosen("cuda").name() == "sinkattn::decode_cuda"
    else:
        with pytest.raises(ValueError, match="9.0 and later" if has_float8 else "8.9 and later; int8 serves on all"):
            chosen("cuda")
        if has_float8:
            assert chosen("auto").name() == chosen("triton").name() == "sinkattn::decode_triton"
        else:
            assert chosen("auto") is reference.decode
            with pytest.raises(ValueError, match="8.9 and later; int8 serves on all"):
                chosen("triton")


@pytest.mark.parametrize(
    ("head_dim", "v_dim", "sinks", "is_served"),
    [(8, 8, 4, True), (80, 80, 128, True), (96, 96, 129, False), (256, 256, 48, True), (256, 256, 49, False)]
    + [(192, 128, 4, False), (68, 68, 4, False), (264, 264, 4, False)],
)
def test_heads_of_prefill_on_hopper(monkeypatch, head_dim, v_dim, sinks, is_served):
    """What csrc/cuda takes, with slopes as well."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with FakeTensorMode():
        q, v, keys, values = (
            torch.empty(1, 8, n, dim, dtype=torch.bfloat16, device="cuda:0")
            for n, dim in ((200, head_dim), (200, v_dim), (500, head_dim), (500, v_dim))
        )
        slopes = torch.empty(8, device="cuda:0")
    tensors, sizes = backends.Tensors(q, q, v, keys, values, None, alibi_slopes=slopes), backends.Sizes(sinks, 300, 1.0)
    assert backends._is_in_cuda_prefill(tensors, sizes) == is_served
