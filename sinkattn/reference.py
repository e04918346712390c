"""The ops in plain PyTorch, in any dtype up to float64: the definition that every backend is tested against.

Words used everywhere in this package (arXiv 2309.17453, section 3.2):

* position: index of a token in the text of its own row, padding not counted.
* slot: physical place in the cache. Slots ``[0, S)`` hold the sinks, slots ``[S, S + R)`` the ring, ``R >= W``.
* S = ``sink_size``, W = ``window_size`` (counts the current token), C = S + W = capacity.

Position j lives in slot ``j`` if ``j < S`` and in slot ``S + (j - S) % R`` otherwise.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of `linear`'s gates
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "gelu": gelu,
}
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(("", *ACTIVATIONS))}  # as csrc/activation.h has them
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # of the dtypes that `quantised` makes


def slot_of(position: Tensor, sink_size: int, ring_size: int) -> Tensor:
    """Slot that stores a position: ``j if j < S else S + (j - S) % R``. Any integer shape in, the same shape out."""
    return torch.where(position < sink_size, position, sink_size + (position - sink_size) % ring_size)


def held_positions(lengths: Tensor, sink_size: int, ring_size: int) -> Tensor:
    """Position that each slot holds once ``lengths`` tokens of a row were written.

    ``lengths``: (batch,) int64. Returns (batch, S + R) int64, -1 where a slot is still empty.
    """
    last = lengths[:, None] - 1
    slot = torch.arange(sink_size + ring_size, device=lengths.device)[None, :]
    ring = last - (last - slot) % ring_size  # the newest position that maps to this slot
    position = torch.where(slot < sink_size, slot, ring)
    empty = (position > last) | ((slot >= sink_size) & (position < sink_size))
    return position.masked_fill(empty, -1)


def positions_of(lengths: Tensor, counts: Tensor | None, tokens: int) -> Tensor:
    """Where the tokens of a step stand: the last ``counts`` of ``tokens`` go on behind a row's ``lengths``.

    ``lengths``, ``counts``: (batch,) int64; None if all tokens count. Returns (batch, tokens) int64, of padding below
    the row's length.
    """
    first = lengths if counts is None else lengths - (tokens - counts)
    return first[:, None] if tokens == 1 else first[:, None] + torch.arange(tokens, device=lengths.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, start: int = 0, interleaved: bool = False) -> Tensor:
    """Rotary embedding of ``r`` dims beginning at ``start``; the other dims pass through.

    Pairs are (i, i + r/2) or, interleaved, (2i, 2i + 1):  ``(a, b) -> (a cos - b sin, b cos + a sin)``.

    ``x``: (..., head_dim). ``cos``, ``sin``: broadcastable to (..., r/2). Computed in the wider of the dtypes and
    returned in that dtype, so the caller rounds once. Source: arXiv 2104.09864, section 3.4.2.
    """
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, cos.dtype)
    head, turned, tail = x.to(wide).split([start, 2 * half, x.shape[-1] - start - 2 * half], dim=-1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((head, turned, tail), dim=-1)


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, and what each is to be multiplied by: ``x = numbers * scale``, but for rounding.

        ``scale = max|x| / L``, ``numbers = round(x / scale)`` within -L and L; L = 127 for int8, 448 for float8_e4m3fn

    in float32, x / scale rounded to the nearest number that the dtype has, ties to even (a zero has either sign). A row
    of zeros has scale 0. A row with NaN or infinity has scale NaN and numbers 0: it makes NaN of whatever sees it.

    x: (..., dim), any floating-point dtype. Returns numbers (..., dim), dtype, and scales (...), float32. The idea, and
    a scale for each token: KIVI, arXiv 2402.02750, section 3.1.
    """
    x, largest = x.float(), LARGEST[dtype]
    most = x.abs().amax(-1)
    scales = most / torch.full_like(most, largest)  # by a tensor: torch multiplies by the inverse of a number on a GPU
    scales = scales.where(scales.isfinite(), torch.nan)
    numbers = (x / scales[..., None]).clamp(-largest, largest).where(scales[..., None] > 0, 0)
    return (numbers if dtype.is_floating_point else numbers.round()).to(dtype), scales


def append(cache: Tensor, new: Tensor, position: Tensor, before: Tensor, after: Tensor, sink_size: int) -> None:
    """Write sinks, and what of a chunk is not overwritten by its own later tokens, to their slots.

    cache: (batch, heads, S + R, dim), **mutated**. new: (batch, heads, T, dim), of position (batch, T); below `before`
    it is padding. Both without dim for scales. before, after: (batch,) int64, tokens the rows hold before and after the
    chunk.
    """
    ring_size = cache.shape[2] - sink_size
    recent = position >= after[:, None] - ring_size
    kept = (position >= before[:, None]) & ((position < sink_size) | recent)
    rows, index = kept.nonzero(as_tuple=True)
    cache[rows, :, slot_of(position[rows, index], sink_size, ring_size)] = new[rows, :, index].to(cache.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    rotation: Tensor | None,
    learned_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    sink_size: int,
    window_size: int,
    scale: float,
    softcap: float = 0.0,
    rotary_start: int = 0,
    interleaved: bool = False,
    dense_window: int = 0,
    *,
    sink_reach: int | None = None,
    joined: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Append T new tokens to every row of a cache of sinks + ring, and let each of them attend over what it may see.

    The query at position t sees position j if ``j <= t`` and (``j < S`` or ``j > t - W``), with the scores

        ``softcap(scale * R_text(t) q . R_text(j) k)``   for j >= S,  and
        ``softcap(scale * R_sink(t) q . R_text(j) k)``   for j < S,

    where R_text(t) turns by the angle of t and R_sink(t) by that of ``min(t, C - 1)``. Keys and values of the call are
    seen as they are stored: rounded, and in 8 bits `quantised`. ALiBi takes the same distances,
    ``slope * (t - j)`` and ``slope * (min(t, C - 1) - j)``, from the scores. `ops.decode` and `ops.prefill` have
    the same arguments but sink_reach; their docstrings say shapes, layouts and errors. sink_reach: the distance
    from which a sink is not seen, for layers with a window of their own between W and C; None for none. joined: as of
    `ops.decode`.
    """
    batch, num_heads, tokens, _ = q.shape
    num_kv_heads, ring_size = k_cache.shape[1], k_cache.shape[2] - sink_size
    wide = torch.promote_types(q.dtype, torch.float32)
    if counts is None:
        counts = torch.full_like(lengths, tokens)

    # Left padding leaves the last `counts` tokens of a row.                                             (batch, T)
    position = lengths[:, None] + torch.arange(tokens, device=q.device) - (tokens - counts)[:, None]
    is_new = position >= lengths[:, None]

    q_text = q_sink = q.to(wide)
    if rotation is not None:  # (batch, T, text | sink, cos | sin, r/2) -> four of (batch, 1, T, r/2)
        text_cos, text_sin, sink_cos, sink_sin = rotation.to(wide)[:, None].flatten(3, 4).unbind(3)
        q_text = rotate(q, text_cos, text_sin, rotary_start, interleaved)
        q_sink = rotate(q, sink_cos, sink_sin, rotary_start, interleaved)
        k = rotate(k, text_cos, text_sin, rotary_start, interleaved)
    if k_scales is None or v_scales is None:
        stored = [(k_cache, k.to(k_cache.dtype)), (v_cache, v)]
    else:
        (k, new_k_scales), (v, new_v_scales) = (quantised(x, k_cache.dtype) for x in (k, v))
        stored = [(k_cache, k), (v_cache, v), (k_scales, new_k_scales), (v_scales, new_v_scales)]

    # Keys seen by the chunk: all slots, then the chunk itself.                                      (batch, S+R+T)
    held = held_positions(lengths, sink_size, ring_size)
    key_position = torch.cat((held, position.masked_fill(~is_new, -1)), dim=1)
    filled = (key_position >= 0)[:, None, :, None]
    keys, values, *scales = (torch.cat(pair, dim=2).to(wide) for pair in stored)
    if scales:
        keys, values = keys * scales[0][..., None], values * scales[1][..., None]
    keys, values = keys.where(filled, 0), values.where(filled, 0)  # empty slots may hold NaN
    group = num_heads // num_kv_heads
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)

    is_sink = key_position < sink_size
    scores = torch.where(is_sink[:, None, None], q_sink @ keys.mT, q_text @ keys.mT) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)

    t, j = position[:, :, None], key_position[:, None, :]
    if alibi_slopes is not None:
        seen_from = t.clamp(max=sink_size + window_size - 1)  # where the sinks see the query
        if dense_window > 0:
            seen_from = t + (lengths.clamp(max=sink_size + window_size - 1) - lengths)[:, None, None]
        distance = torch.where(is_sink[:, None], seen_from, t) - j
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance[:, None].to(wide)
    oldest = t - window_size  # exclusive
    if dense_window > 0:  # a prompt attended densely: what the cache held before the call, and all of the call
        oldest = torch.maximum(lengths[:, None, None] - window_size, t - dense_window)
    visible = (j >= 0) & (j <= t) & ((j < sink_size) | (j > oldest)) & is_new[:, :, None]
    if sink_reach is not None:
        visible &= (j >= sink_size) | (t.clamp(max=sink_size + window_size - 1) - j < sink_reach)
    values = values.where(visible.any(1)[:, None, :, None], 0)  # NaN that nobody sees any more
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    scores = scores.where(is_new[:, None, :, None], 0)  # a padding query sees nothing; its output is zero below
    if learned_logits is not None:  # one more column in the softmax's denominator, with no value
        column = learned_logits.to(wide)[None, :, None, None].expand(batch, -1, tokens, 1)
        scores = torch.cat((scores, column), dim=-1)
    if joined is not None:  # a key more for each part
        scores = torch.cat((joined[1].to(wide).permute(1, 2, 0)[:, :, None], scores), dim=-1)
        values = torch.cat((joined[0].to(wide).permute(1, 2, 0, 3), values), dim=2)
    weights = torch.softmax(scores, dim=-1)[..., : values.shape[2]].where(is_new[:, None, :, None], 0)
    out = (weights @ values).transpose(1, 2).to(q.dtype).contiguous()

    for cache, new in stored:
        append(cache, new, position, lengths, lengths + counts, sink_size)
    return out


def decode(*arguments: Any) -> Tensor:
    """`attention` of one token a row, with the arguments of `sinkattn::decode` in their order."""
    values, logits = arguments[18:20] or (None, None)
    return attention(*arguments[:18], joined=None if values is None else (values, logits))


def attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    rotation: Tensor | None,
    sink_size: int,
    window_size: int,
    scale: float,
    softcap: float = 0.0,
    rotary_start: int = 0,
    interleaved: bool = False,
    max_tokens: int = 0,
) -> Tensor:
    """`attention` of each text of a batch, over a cache filled from its pages; what that appends is written back.

    `ops.attend_pages` has the same arguments; its docstring says shapes. max_tokens: not needed here.
    """
    out, block_size, device = q.new_zeros(*q.shape[:2], v.shape[2]), k_pages.shape[2], q.device
    ends = starts.tolist()
    for row, (begin, end, length) in enumerate(zip(ends, ends[1:], lengths.tolist(), strict=False)):
        if begin == end:
            continue
        tokens, ring_size = slice(begin, end), window_size + end - begin  # all that is new stays in the ring
        caches = [x.new_empty(1, x.shape[1], sink_size + ring_size, x.shape[3]) for x in (k_pages, v_pages)]
        near = range(max(sink_size, length - window_size + 1), length)
        old = torch.tensor([*range(min(sink_size, length)), *near], dtype=torch.int64, device=device)
        new = torch.arange(length, length + end - begin, device=device)
        for pages, cache in zip((k_pages, v_pages), caches, strict=True):
            held = pages[block_table[row, old // block_size].long(), :, old % block_size]
            cache[0, :, slot_of(old, sink_size, ring_size)] = held.transpose(0, 1)
        new_q, new_k, new_v = (x[tokens].transpose(0, 1)[None] for x in (q, k, v))
        turned = None if rotation is None else rotation[None, tokens]
        out[tokens] = attention(
            new_q, new_k, new_v, caches[0], caches[1], lengths[row : row + 1].long(), None, turned,
            None, None, None, None, sink_size, window_size, scale, softcap, rotary_start, interleaved,
        )[0]  # fmt: skip
        for pages, cache in zip((k_pages, v_pages), caches, strict=True):
            held = cache[0, :, slot_of(new, sink_size, ring_size)].transpose(0, 1)
            pages[block_table[row, new // block_size].long(), :, new % block_size] = held
    return out


def attend_shared(
    q: Tensor,
    k_shared: Tensor,
    v_shared: Tensor,
    lengths: Tensor,
    rotation: Tensor | None,
    alibi_slopes: Tensor | None,
    window_size: int,
    scale: float,
    softcap: float = 0.0,
    rotary_start: int = 0,
    interleaved: bool = False,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """What `attention` finds among the sinks, one token a row, where all rows have the same: values, and log-sum-exps.

    `ops.attend_shared` has the same arguments; its docstring says shapes. parts: 1.
    """
    batch, num_heads, _, _ = q.shape
    num_kv_heads, sinks, v_dim = v_shared.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide)
    if rotation is not None:
        cos, sin = rotation.to(wide)[:, None, :, 1].unbind(3)
        q = rotate(q, cos, sin, rotary_start, interleaved)
    group = num_heads // num_kv_heads
    queries = q.view(batch, num_kv_heads, group, q.shape[3]).transpose(0, 1).flatten(1, 2)  # a key head's together
    scores = queries @ k_shared[0].to(wide).mT * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(num_kv_heads, batch, group, sinks)
    if alibi_slopes is not None:
        seen_from = lengths.clamp(max=sinks + window_size - 1)[:, None]
        distance = (seen_from - torch.arange(sinks, device=q.device)).to(wide)  # (batch, S)
        scores = scores - alibi_slopes.to(wide).view(num_kv_heads, 1, -1, 1) * distance[None, :, None]
    logits = scores.logsumexp(-1)
    values = (scores - logits[..., None]).exp().flatten(1, 2) @ v_shared[0].to(wide)
    values = values.view(num_kv_heads, batch, group, v_dim).transpose(0, 1).reshape(1, batch, num_heads, v_dim)
    return values, logits.transpose(0, 1).reshape(1, batch, num_heads)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_shift: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(gate) * up + residual`` of ``RMSNorm(x) W^T + bias``, each of them if given, rounded once, at the end.

    Only the norm rounds before the product, as transformers does: LlamaRMSNorm what is multiplied by the weight and the
    product, GemmaRMSNorm (``norm_shift`` other than 0) the product alone. `ops.linear` has the same arguments; its
    docstring says shapes, layouts and errors.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x
    if norm_weight is not None:
        normal = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + norm_eps)
        if norm_shift == 0:
            h = norm_weight * normal.to(x.dtype)
        else:
            h = (normal * (norm_shift + norm_weight.to(wide))).to(x.dtype)
    y = h.to(wide) @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    if activation:
        gate, up = y.chunk(2, dim=-1)
        y = ACTIVATIONS[activation](gate) * up
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype)
