"""The ops under torch.compile and in CUDA graphs; Triton kernels down to machine code."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from cases import GPU_BACKENDS, Case, both_ops, copies, same_bits, with_cuda_library
from helpers import DEVICES, GPU
from sinkattn import ops

GPU_OPS = ["decode", "prefill", "decode_triton", "prefill_triton"]
GPU_OPS += [pytest.param(f"{op}_cuda", marks=with_cuda_library) for op in ("decode", "prefill")]


def opcheck(op, device):
    tokens, dtype = 1 if "decode" in op else 3, torch.float16 if op.endswith("cuda") else torch.float32
    case = Case((20, 40), (1, 0), tokens, 4, head_dim=64, learned=True, alibi=op != "prefill_cuda")
    tensors = [x if x is None else x.nan_to_num(0) if x.is_floating_point() else x for x in case.tensors(dtype)]
    tensors = [x if x is None else x.to(device) for x in tensors]
    torch.library.opcheck(getattr(torch.ops.sinkattn, op).default, (*tensors, *case.sizes.values()))


@both_ops
def test_opcheck(op):
    opcheck(op, "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_shared_sinks(device):
    q, keys = torch.randn(3, 4, 1, 64, device=device), torch.randn(1, 2, 300, 64, device=device)
    lengths, rotation = torch.tensor([300, 310, 999], device=device), torch.randn(3, 1, 2, 2, 16, device=device)
    parts = 1 if device == "cpu" else 3
    torch.library.opcheck(
        torch.ops.sinkattn.attend_shared.default,
        (q, keys, keys + 1, lengths, rotation, torch.rand(4, device=device), 50, 0.1, 0.0, 0, False, parts),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("op", GPU_OPS)
def test_opcheck_on_a_gpu(op):
    if op == "prefill_cuda" and torch.cuda.get_device_capability(GPU) != (9, 0):
        pytest.skip("an op of Hopper GPUs")
    opcheck(op, GPU)


@pytest.mark.parametrize("device", DEVICES)
@both_ops
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile them")
def test_kernels_compile():
    """Down to machine code, which needs no GPU, only its name: the interpreter is less strict about types."""
    pytest.importorskip("triton.backends.nvidia")
    code = """
        import torch, triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        class Driver:
            get_current_target = staticmethod(lambda: GPUTarget("cuda", 89, 32))
            get_current_device = staticmethod(lambda: 0)
            get_current_stream = staticmethod(lambda device: 0)

        triton.runtime.driver.set_active(Driver())
        compile_and_launch = JITFunction.run
        JITFunction.run = lambda *args, **kwargs: compile_and_launch(*args, **kwargs | {"warmup": True})
        from sinkattn.kernels import decode, pages, prefill

        def tensors(batch, heads, tokens, alibi, stored=None, dtype=torch.bfloat16):
            new = torch.empty(3, batch, heads, tokens, 32, dtype=dtype)
            cache = torch.empty(2, batch, 2, 300, 32, dtype=stored or dtype)
            scales = (None, None) if stored is None else torch.empty(2, batch, 2, 300)
            lengths, rotation = torch.zeros(batch, dtype=torch.int64), torch.empty(batch, tokens, 2, 2, 16)
            per_head = (torch.empty(heads), torch.empty(heads)) if alibi else (None, None)
            return new[0], *new[1:, :, :2], *cache, lengths, lengths, rotation, *per_head, *scales, 4, 290, 0.2, 30.0

        decode.decode(*tensors(1, 2, 1, alibi=True))
        decode.decode(*tensors(9, 6, 1, alibi=True))
        prefill.prefill(*tensors(1, 4, 200, alibi=True))
        decode.decode(*tensors(1, 6, 1, alibi=False))
        prefill.prefill(*tensors(1, 4, 200, alibi=False))
        for stored, dtype in (torch.int8, torch.bfloat16), (torch.float8_e4m3fn, torch.float16):
            for heads in (2, 6):
                decode.decode(*tensors(1, heads, 1, False, stored, dtype))
                decode.decode(*tensors(9, heads, 1, True, stored, dtype))
            prefill.prefill(*tensors(1, 4, 200, True, stored, dtype))

        def over_pages(texts, tokens, heads, most, rotated=True):
            q, k = (torch.empty(tokens, n, 32, dtype=torch.bfloat16) for n in (heads, 2))
            cache = torch.empty(50, 2, 16, 64, dtype=torch.bfloat16).split(32, dim=-1)
            small = (torch.zeros(shape, dtype=torch.int32) for shape in ((texts + 1,), (texts,), (texts, 30)))
            rotation = torch.empty(tokens, 2, 2, 16) if rotated else None
            pages.attend_pages(q, k, k, *cache, *small, rotation, 4, 290, 0.2, 30.0, max_tokens=most)

        over_pages(1, 1, 6, 1)
        over_pages(9, 9, 2, 1, rotated=False)
        over_pages(3, 200, 6, 0)
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, check=True, timeout=120)


def step(backend, frequencies, q, k, v, k_cache, v_cache, lengths):
    """One token of a model: the angles from ``lengths``, the op, and ``lengths`` advanced."""
    positions = torch.stack((lengths, lengths.clamp(max=63)), dim=1)
    angles = positions[:, None, :, None] * frequencies
    rotation = torch.stack((angles.cos(), angles.sin()), dim=3).float()
    sizes = {"sink_size": 4, "window_size": 60, "scale": 0.125}
    out = ops.decode(q, k, v, k_cache, v_cache, lengths, None, rotation, **sizes, backend=backend)
    lengths += 1
    return out


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), GPU_BACKENDS)
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_graphs(backend, device, batch, warm):
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
        expected.append([step(backend, frequencies, *token, *state) for token in text])
        state = state if warm else tuple(x.clone() for x in start)
        for x, y in zip(state, start, strict=True):
            x.copy_(y)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.device(device), torch.cuda.graph(graphs[-1], stream=torch.cuda.Stream(device)):
            outs.append(step(backend, frequencies, *new, *state))
        states.append((new, state))
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    torch.cuda.synchronize(device)
    for i, token in enumerate(text):
        for (new, _), graph, stream in zip(states, graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                for x, y in zip(new, token, strict=True):
                    x.copy_(y)
                graph.replay()
        torch.cuda.synchronize(device)
        for out, wanted in zip(outs, expected, strict=True):
            assert same_bits(out, wanted[i])
