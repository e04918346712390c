"""The public ops: they have their arguments checked and choose a backend.

| backend     | decode              | prefill               | attend_pages        | tensors on                    |
|-------------|---------------------|-----------------------|---------------------|-------------------------------|
| "auto"      | the first of those below that serves GPU, dtype, head_dim and group | CPU, CUDA      |
| "cuda"      | csrc/cuda, compiled | csrc/cuda, compiled * | csrc/cuda **        | CUDA                          |
| "triton"    | kernels/decode.py   | kernels/prefill.py    | kernels/pages.py    | CUDA, or CPU when interpreted |
| "cpu"       | csrc/cpu, compiled  | csrc/cpu, compiled    | csrc/cpu, compiled  | CPU                           |
| "reference" | reference.py        | reference.py          | reference.py        | any                           |

* On Hopper, what `backends._is_in_cuda_prefill` says; the rest as "triton". ** One token a text; the rest as "triton".
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from . import backends, reference
from .backends import CPU_ISA, DTYPES, HAS_CPU_LIBRARY, HAS_CUDA_LIBRARY  # noqa: F401
from .checks import LINEAR_MAX_ROWS, check_call, check_joined, check_linear, check_pages, check_shared
from .schemas import Paged, Sizes, Tensors

logger = logging.getLogger(__name__)
BACKENDS = ("auto", *backends.BACKENDS)
FEW_ROWS = 8  # with more, torch's products are as fast but on Hopper, or may be (CPUs): bench/linear.py, bench/cpu.py

missing_backend = backends.missing


_compiled: dict[tuple, Callable | None] = {}  # which op of csrc took calls of this kind
_GPU_ONLY: dict[Callable, slice] = {  # what else ops for GPUs take, of (arrivals, overlap)
    torch.ops.sinkattn.decode_cuda.default: slice(2),
    torch.ops.sinkattn.decode_triton.default: slice(1),
    torch.ops.sinkattn.prefill_cuda.default: slice(2),
    torch.ops.sinkattn.attend_pages_cuda.default: slice(2),
}
_NOTHING, _ALONE = slice(0), (None, None)  # of no op for GPUs; a decode that nothing joins


def _run(
    op: str, backend: str, tensors: Tensors | Paged, sizes: Sizes, joined: tuple = (), on_gpu: tuple = ()
) -> Tensor:
    """Run a call. The ops of csrc refuse themselves what `checks` refuses, so that calls like earlier ones go there
    at once: the checks in Python take longer than a launch.

    joined: what decode takes besides. on_gpu: what only ops for GPUs take, see `_GPU_ONLY`.
    """
    q, v, arguments = tensors.q, tensors.v, (*tensors, *sizes.of(op), *joined)
    kind = None
    if not torch.compiler.is_compiling():
        shapes = q.shape[1:2] + q.shape[-1:], v.shape[1:2] + v.shape[-1:]
        kind = op, backend, q.device, q.dtype, tensors.k_cache.dtype, *shapes, sizes.max_tokens == 1
        compiled = _compiled.get(kind)
        if compiled is not None and type(q) is Tensor and not _wants_gradients((*tensors[:5], *joined)):
            try:
                return compiled(*arguments, *on_gpu[_GPU_ONLY.get(compiled, _NOTHING)])
            except (RuntimeError, ValueError, TypeError):
                pass  # nothing is written yet: what follows finds the words, or another op
    if op == "decode" and q.dim() == 4 and q.shape[2] != 1:
        raise ValueError(f"decode takes one token a row, q has {q.shape[2]}; use prefill")
    if reason := missing_backend(backend, q.device.type):
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if isinstance(tensors, Paged):
        check_pages(tensors, sizes)
    else:
        check_call(tensors, sizes)
        if any(x is not None for x in joined):
            check_joined(tensors, joined)
    run = backends.chosen(op, backend, tensors, sizes)
    if kind is not None:
        if kind not in _compiled:
            by = f"torch.ops.{run}" if isinstance(run, torch._ops.OpOverload) else f"reference.{run.__name__}"
            logger.info(
                "%s, backend %r, %s on %s, (heads, dim) %s and %s: %s",
                *kind[:2],
                q.dtype,
                q.device,
                *map(tuple, shapes),
                by,
            )
        _compiled[kind] = run if run in backends.COMPILED else None
    return run(*arguments, *on_gpu[_GPU_ONLY.get(run, _NOTHING)])


def _wants_gradients(tensors: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None = None,
    rotation: Tensor | None = None,
    learned_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    sink_size: int,
    window_size: int,
    scale: float,
    softcap: float = 0.0,
    rotary_start: int = 0,
    interleaved: bool = False,
    joined: tuple[Tensor, Tensor] | None = None,
    arrivals: Tensor | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rotate one new token per row, append it to the cache, and attend over sinks and window.

    The query at position t = ``lengths[row]`` sees position j if ``j <= t`` and (``j < S`` or ``j > t - W``):

        ``out = softmax_j(cap(scale * R(t) q . R(j) k_j)) v_j``, with ``R(min(t, C - 1)) q`` for the keys ``j < S``

    and ``cap(x) = softcap * tanh(x / softcap)``, S = sink_size, W = window_size, C = S + W.

    Tensors, in any strides whose last is 1:
        q: (batch, num_heads, 1, head_dim); float16, bfloat16 or float32 ("reference" takes float64 too). Not rotated.
        k: (batch, num_kv_heads, 1, head_dim), v: (batch, num_kv_heads, 1, v_head_dim); dtype of q. Not rotated.
            num_heads is a multiple of num_kv_heads; consecutive query heads share a key head.
        k_cache: (batch, num_kv_heads, S + R, head_dim), v_cache: (batch, num_kv_heads, S + R, v_head_dim); dtype of q,
            or both int8 or float8_e4m3fn with scales. **Mutated.** R >= W. Position j lives in slot j if j < S, else in
            slot S + (j - S) % R. Keys are stored rotated by their position. Empty slots may hold anything, NaN too.
        lengths: (batch,) int64, tokens the row holds before this call. Not advanced: all layers of a model share it.
        counts: (batch,) int64, 1 for rows that take the token and 0 for rows that skip it (their output is zero and
            their cache is left alone); None means all take it.
        rotation: (batch, 1, 2, 2, r / 2) float32 contiguous, ``[text | sink][cos | sin]`` of the angles of t and of
            min(t, C - 1); None for no rotation.
        learned_logits: (num_heads,), one logit per head that joins the softmax's denominator (gpt-oss); None for none.
        alibi_slopes: (num_heads,) float32, ALiBi: ``slope * distance`` is taken from the capped scores, where the
            distance is ``t - j`` in the window and ``min(t, C - 1) - j`` for a sink (arXiv 2108.12409); None for none.
        k_scales, v_scales: (batch, num_kv_heads, S + R) float32, any strides, of caches in 8 bits; None for others.
            **Mutated.** Key and value j are ``cache * scale``. The new key, rotated, and the new value are quantised
            once, from float32: ``scale = max|x| / L`` and ``round(x / scale)``, to the nearest with ties to even, L =
            127 for int8 and 448 for float8_e4m3fn (a row of zeros has scale 0). The query sees them as they are
            stored, so a text gives the same however it is cut. A key or value that is not finite gets scale NaN, and
            makes NaN of what sees it. Empty slots may hold anything. (A scale a token: arXiv 2402.02750.)
        joined: what the queries have found among other keys, as `attend_shared` returns it: values (parts, batch,
            num_heads, v_head_dim) and their log-sum-exps (parts, batch, num_heads), float32. Each part joins the
            softmax like a key with this value and this score. None for none.
        arrivals: (n,) int32 on the GPU, all zero, n >= batch * num_kv_heads: by which blocks that share a key head tell
            the last of them that it is. **Mutated**, and zero again when the call is done. Whoever keeps a cache keeps
            one with it; no two calls that may run at a time share one. None: a call that needs it makes one, which
            takes another launch.
    Scalars:
        sink_size, window_size: tokens. scale: factor of the scores, positive. softcap: 0 for none.
        rotary_start: first rotated dim. interleaved: pairs (2i, 2i + 1) instead of (i, i + r / 2).
        overlap: True lets the GPU read the cache before the kernels ahead in the stream are done. It promises that
            what last wrote the cache lies further back than a kernel that does not overlap with others, as those of
            torch. The result is the same.
        backend: see the table above; one asked for by name never falls back to another.

    Returns (batch, 1, num_heads, v_head_dim), dtype of q, contiguous.

    Raises ValueError for shapes, sizes, devices or an unknown backend, TypeError for dtypes, RuntimeError for a backend
    that is not available or tensors that require gradients; the cache is then as it was.

    Source: arXiv 2309.17453, section 3.2; the definition in code is `sinkattn.reference.attention`.
    """
    tensors = Tensors(
        q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, k_scales, v_scales
    )
    sizes = Sizes(sink_size, window_size, scale, softcap, rotary_start, interleaved)
    return _run("decode", backend, tensors, sizes, _ALONE if joined is None else tuple(joined), (arrivals, overlap))


def attend_shared(
    q: Tensor,
    k_shared: Tensor,
    v_shared: Tensor,
    lengths: Tensor,
    rotation: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    window_size: int,
    scale: float,
    softcap: float = 0.0,
    rotary_start: int = 0,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend with one token of every row over sinks that all rows share, which are read once for all of them.

        ``values = softmax_j(s_j) v_j`` and ``logits = log sum_j exp(s_j)`` over the S sinks j,
        with ``s_j = cap(scale * R(min(t, C - 1)) q . k_j)``

    `decode` takes both as `joined`, over a cache of the ring alone (its sink_size 0, its lengths and positions less S):
    the result is that of `decode` over sinks and ring together.

    Tensors, in any strides whose last is 1:
        q: (batch, num_heads, 1, head_dim), as for `decode`. Not rotated.
        k_shared: (1, num_kv_heads, S, head_dim), v_shared: (1, num_kv_heads, S, v_head_dim); dtype of q, S >= 1. Keys
            rotated by their position, as `decode` stores them.
        lengths, rotation, alibi_slopes: as for `decode`; lengths count the sinks, and are S at least.
    Scalars: as for `decode`. S and window_size make C.

    Returns values, (parts, batch, num_heads, v_head_dim), and logits, (parts, batch, num_heads), float32 contiguous: of
    so many parts of the sinks as keep a GPU busy. backend: "cuda" and "triton" are kernels/shared.py, "cpu" and
    "reference" are reference.py.

    Raises ValueError for shapes, devices or an unknown backend, TypeError for dtypes, RuntimeError for a backend that
    is not available or tensors that require gradients.

    Source: Hydragen, arXiv 2402.05099, section 3.1; the definition in code is `sinkattn.reference.attend_shared`.
    """
    if reason := missing_backend(backend, q.device.type):
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    check_shared(q, k_shared, v_shared, lengths, rotation, alibi_slopes, window_size, scale, rotary_start)
    run, parts = backends.chosen_shared(backend, q, k_shared, v_shared)
    return run(
        q, k_shared, v_shared, lengths, rotation, alibi_slopes, window_size, scale, softcap, rotary_start, interleaved,
        parts,
    )  # fmt: skip


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None = None,
    rotation: Tensor | None = None,
    learned_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    sink_size: int,
    window_size: int,
    scale: float,
    softcap: float = 0.0,
    rotary_start: int = 0,
    interleaved: bool = False,
    dense_window: int = 0,
    arrivals: Tensor | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Append T new tokens to every row and attend as `decode` would token by token: the cut of a text is not seen.

    Formula, tensors, scalars, errors and source are those of `decode`, with T tokens where it has one:
        q (batch, num_heads, T, head_dim), k, v and rotation (batch, T, 2, 2, r / 2) alike, T >= 1;
        counts: (batch,) int64, the *last* ``counts[row]`` of the T tokens belong to the row, those before them are
            left padding: they are not stored and their output is zero. The token at index i has the position
            ``lengths + i - (T - counts)``. None means no padding.
        dense_window: 0 for streaming. Otherwise tokens, and the call is attended densely: its queries see what the
            cache's window held before the call, ``j > lengths - W``, and of the call all with ``j > t - dense_window``.
            To the sinks, ALiBi then counts on from ``min(lengths, C - 1)``.
        arrivals: n >= batch * T * num_kv_heads; only few tokens on a GPU need it. overlap: as in `decode`, for few
            tokens.

    Returns (batch, T, num_heads, v_head_dim), dtype of q, contiguous.
    """
    tensors = Tensors(
        q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, k_scales, v_scales
    )
    sizes = Sizes(sink_size, window_size, scale, softcap, rotary_start, interleaved, dense_window)
    return _run("prefill", backend, tensors, sizes, (), (arrivals, overlap))


def attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    rotation: Tensor | None = None,
    *,
    sink_size: int,
    window_size: int,
    scale: float,
    softcap: float = 0.0,
    rotary_start: int = 0,
    interleaved: bool = False,
    max_tokens: int = 0,
    arrivals: Tensor | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Append the new tokens of many texts to pages of keys and values, and attend as `decode` and `prefill` would.

    The formula is that of `decode`, for every token at its position t in its own text. Position j of a text lies in
    slot ``j % block_size`` of the page ``block_table[text, j // block_size]``. A text holds the pages of its sinks and
    those that its window reaches, as a server gives them out (vLLM, arXiv 2309.06180, section 4.1).

    Tensors; q, k, v and pages in any strides whose last is 1:
        q: (tokens, num_heads, head_dim); float16, bfloat16 or float32 ("reference" takes float64 too). Not rotated. The
            tokens of all texts one behind the other: a prompt, part of one, or a single token, in any mixture.
        k: (tokens, num_kv_heads, head_dim), v: (tokens, num_kv_heads, v_head_dim); dtype of q. Not rotated. num_heads
            is a multiple of num_kv_heads; consecutive query heads share a key head.
        k_pages: (blocks, num_kv_heads, block_size, head_dim), v_pages: (blocks, num_kv_heads, block_size, v_head_dim);
            dtype of q, block_size a multiple of 16. **Mutated.** Keys are stored rotated by their position. Slots that
            no token of the call sees may hold anything, NaN too. Both may be views of one tensor.
        starts: (texts + 1,) int32, never falling: text i has the tokens from ``starts[i]`` to before ``starts[i + 1]``,
            none if it waits. Tokens from ``starts[texts]`` on are padding: not stored, and their output is zero.
        lengths: (texts,) int32, tokens that each text has before this call. Not advanced.
        block_table: (texts, n) int32, rows contiguous. Entries of pages that no token of the call sees, and none is
            written to, may be any number.
        rotation: (tokens, 2, 2, r / 2) float32 contiguous, ``[text | sink][cos | sin]`` of the angles of t and of
            min(t, C - 1); None for no rotation.
        arrivals: as for `decode`; n >= max(texts, tokens) * num_kv_heads.
    Scalars: as for `decode`, and
        max_tokens: no text has more new tokens than this; 0 if that is not known. 1 is faster on a GPU.
        overlap: as for `decode`; what last wrote starts, lengths and block_table has to lie as far back.

    Nothing is asked of the GPU by the host, so the call may be part of a CUDA graph.

    Returns (tokens, num_heads, v_head_dim), dtype of q, contiguous.

    Raises what `decode` raises; the pages are then as they were. Numbers out of bounds in starts, lengths and the table
    are RuntimeError in "cpu", which looks at them; on a GPU they are not looked at.

    Source: arXiv 2309.17453, section 3.2; the definition in code is `sinkattn.reference.attend_pages`.
    """
    tensors = Paged(q, k, v, k_pages, v_pages, starts, lengths, block_table, rotation)
    sizes = Sizes(sink_size, window_size, scale, softcap, rotary_start, interleaved, 0, max_tokens)
    return _run("attend_pages", backend, tensors, sizes, (), (arrivals, overlap))


def takes_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled `linear` serves x (rows, in_features) and is the faster one: few rows, no small GPU, and
    on the CPU instructions that it is written for."""
    if x.dtype != weight.dtype:
        return False
    if x.device.type == "cpu":
        return (
            CPU_ISA not in ("", "portable")
            and len(x) <= FEW_ROWS
            and x.dtype in DTYPES
            and weight.stride(1) == 1
            and not torch.is_autocast_enabled("cpu")
        )
    return (
        x.device.type == "cuda"
        and HAS_CUDA_LIBRARY
        and (len(x) <= FEW_ROWS or (len(x) <= LINEAR_MAX_ROWS and backends.is_hopper(x.device.index)))
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[1] % 8 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 8 == 0
        and backends.begins_aligned(weight)
        and backends.is_large(x.device.index)
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_shift: float = 0.0,
    residual: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Multiply a few rows by a weight, with the norm before and the gate and residual after: one pass over the weight.

        ``h = RMSNorm(x)``, ``y = h weight^T + bias``, ``out = act(gate) * up + residual`` with ``[gate | up] = y``

    where what is not given is left out: ``h = x``, ``out = y + residual``. RMSNorm is ``n = x / sqrt(mean(x^2) +
    norm_eps)`` in float32, then ``norm_weight * n`` with n rounded before and the product after as in LlamaRMSNorm if
    norm_shift is 0, and otherwise ``(norm_shift + norm_weight) * n``, rounded once as in GemmaRMSNorm. What follows,
    the gate too, is float32 and rounded once, at the end. The same input gives the same bits. Of more than 8 rows on a
    GPU of compute capability 9.0 ``norm_weight * x`` is what is rounded, and the root of the mean square divides y. In
    float16 that product, times a power of two up to 4 that brings 64 of the row's numbers near 1, must be within the
    range of float16.

    Tensors, on a GPU float16 or bfloat16, on the CPU any floating-point dtype; none is mutated. Layouts are what a GPU
    needs, the CPU takes any: its compiled op the three dtypes of `decode` and weights with contiguous rows, and
    `reference.linear` the rest.
        x: (rows, in_features), contiguous, up to 64 rows, on GPUs of another compute capability than 9.0 up to 16;
            in_features a multiple of 8.
        weight: (out_features, in_features), dtype of x; rows contiguous, aligned to 16 bytes, any distance apart. With
            an activation its first half are the gate's rows. On a GPU, weights (weight, bias, norm_weight) are read
            before the kernel ahead in the stream is done, so that one must not be what writes them.
        bias: (out_features,), dtype of x; None for none.
        norm_weight: (in_features,), dtype of x; None for no norm.
        residual: (rows, out_features), or half of them with an activation; dtype of x, contiguous; None for none.
    Scalars:
        norm_eps: added to the mean square. norm_shift: added to norm_weight; 0 for Llama, 1 for Gemma.
        activation: of the gate: "silu", "gelu_tanh", "gelu"; "" for no gate.

    Returns (rows, out_features), or half of them with an activation; dtype of x, contiguous.

    Raises ValueError for shapes, layouts, sizes or devices, TypeError for dtypes, RuntimeError where the compiled op is
    missing or tensors require gradients.

    Source: the definition in code is `sinkattn.reference.linear`.
    """
    check_linear(x, weight, bias, norm_weight, residual, activation)
    given = x, weight, bias, norm_weight, norm_eps, norm_shift, residual
    if x.device.type == "cpu" and (x.dtype not in DTYPES or weight.stride(1) != 1):
        return reference.linear(*given, activation)
    return torch.ops.sinkattn.linear(*given, reference.ACTIVATION_NUMBERS[activation])
