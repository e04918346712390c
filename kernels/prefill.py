"""A chunk of T new tokens per row, in three launches: rotate the new keys, attend, append. With caches in 8 bits
in four, as new values are quantised too.

Floor: ``2 * (head_dim + v_head_dim)`` FLOPs for each query head and visible pair of query and key, about ``T * C`` in a
row; an H200 multiplies 790 TFLOP/s in bfloat16. The bytes of rotation and append are small beside it.

Attention knows three kinds of keys: sinks, in the cache or in the chunk, which meet a query turned by another angle;
ring slots, walked back from the newest; and the chunk itself, where only the two edges of the band need a mask.

Phases have the names of csrc/cuda/sm90:

* turn: `_prepare_kernel` for keys, and `load_turned` for queries; there, `gather` and `turn_queries`
* append: `_append_kernel`, at the end; there, `gather`, at the start, which keeps in scratch what is overwritten
* attend: `_attend_kernel`, `tiles.attend`; there, `attend_kernel`, from the last key back
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import (
    attend,
    load_block,
    load_rows,
    load_slopes,
    load_turned,
    open_softmax,
    quantised,
    query_scale,
    tile_dim,
)


@triton.jit(do_not_specialize=["tokens"])
def _prepare_kernel(
    x,  # (batch, num_kv_heads, tokens, DIM), keys or values
    rotation,  # (batch, tokens, text | sink, cos | sin, HALF), or None
    out,  # like x, contiguous, in the dtype of the cache
    scales,  # (batch, num_kv_heads, tokens) float32, of a cache in 8 bits, or None
    x_row, x_head, x_token,  # strides in elements
    tokens,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, START: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """New keys or values as they are stored: turned, in 8 bits."""
    blocks = tl.cdiv(tokens, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)  # a row and one of its key heads
    row, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
    index = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    angles = (row * tokens + tl.minimum(index, tokens - 1)) * (4 * HALF)
    rows = x + row * x_row + head * x_head + index * x_token
    tile = load_turned(rows, index < tokens, rotation, angles, dim, DIM, HALF, START, PAIRED)
    if scales is not None:
        tile, scale = quantised(tile, out.dtype.element_ty)
        tl.store(scales + pair * tokens + index, scale, mask=index < tokens)
    mask = (index < tokens) & (dim < DIM)
    tl.store(out + (pair * tokens + index) * DIM + dim, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "sink_size", "window_size", "ring_size", "reach"])
def _attend_kernel(
    q,  # (batch, NUM_HEADS, tokens, HEAD_DIM), not rotated
    k,  # (batch, NUM_HEADS / GROUP, tokens, HEAD_DIM), as it is stored, rotated
    v,  # (batch, NUM_HEADS / GROUP, tokens, V_DIM), as it is stored
    k_cache,  # (batch, NUM_HEADS / GROUP, sink_size + ring_size, HEAD_DIM)
    v_cache,  # (batch, NUM_HEADS / GROUP, sink_size + ring_size, V_DIM)
    lengths,  # (batch,)
    counts,  # (batch,) or None
    rotation,  # (batch, tokens, text | sink, cos | sin, HALF) or None
    learned_logits,  # (NUM_HEADS,) or None
    alibi_slopes,  # (NUM_HEADS,) or None
    k_scales, v_scales,  # (batch, NUM_HEADS / GROUP, sink_size + ring_size) float32, of a cache in 8 bits, or None
    k_new_scales, v_new_scales,  # (batch, NUM_HEADS / GROUP, tokens) float32 contiguous, of k and v, or None
    out,  # (batch, tokens, NUM_HEADS, V_DIM)
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,  # strides in elements
    k_cache_row, k_cache_head, k_cache_slot, v_cache_row, v_cache_head, v_cache_slot,
    k_scale_row, k_scale_head, k_scale_slot, v_scale_row, v_scale_head, v_scale_slot,
    tokens, sink_size, window_size, ring_size,
    reach,  # a query sees the keys of its chunk that are less than this far back
    is_dense,  # a dense call: the sinks see its queries as far on as they are
    scale,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HALF: tl.constexpr, START: tl.constexpr, PAIRED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SINK_BLOCK: tl.constexpr,  # 0 without sinks
    STAGES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % NUM_HEADS
    row = (tl.program_id(0) // blocks // NUM_HEADS).to(tl.int64)
    length = tl.load(lengths + row)
    padding = 0 if counts is None else tokens - tl.load(counts + row).to(tl.int32)

    # Queries and keys are counted from the row's first token in this chunk: 0, 1, ...; the ring goes back -1, -2, ...
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)  # in the chunk, padding included
    query = index - padding
    first = tl.maximum(block * BLOCK_M - padding, 0)
    last = tl.minimum(block * BLOCK_M + BLOCK_M, tokens) - padding - 1
    dim = tl.arange(0, BLOCK_D)[None, :]
    v_dim = tl.arange(0, BLOCK_V)[None, :]
    out_rows = out + ((row * tokens + index.to(tl.int64)) * NUM_HEADS + head)[:, None] * V_DIM + v_dim
    out_inside = (index < tokens)[:, None] & (v_dim < V_DIM)
    if last < 0:  # nothing but padding
        tl.store(out_rows, tl.zeros((BLOCK_M, BLOCK_V), out.dtype.element_ty), mask=out_inside)
        return

    q_rows = q + row * q_row + head.to(tl.int64) * q_head + index.to(tl.int64)[:, None] * q_token
    q_inside = ((query >= 0) & (index < tokens))[:, None]
    angles = (row * tokens + tl.minimum(index, tokens - 1).to(tl.int64))[:, None] * (4 * HALF)
    kv_head = (head // GROUP).to(tl.int64)
    k += row * k_row + kv_head * k_head
    v += row * v_row + kv_head * v_head
    k_cache += row * k_cache_row + kv_head * k_cache_head
    v_cache += row * v_cache_row + kv_head * v_cache_head
    if k_scales is not None:
        k_scales += row * k_scale_row + kv_head * k_scale_head
        v_scales += row * v_scale_row + kv_head * v_scale_head
        k_new_scales += (row * (NUM_HEADS // GROUP) + kv_head) * tokens
        v_new_scales += (row * (NUM_HEADS // GROUP) + kv_head) * tokens
    DTYPE: tl.constexpr = q.dtype.element_ty
    SCALED: tl.constexpr = k_scales is not None
    top, total, acc = open_softmax(learned_logits, head + tl.zeros_like(index), index < tokens, BLOCK_V)
    slopes = None if alibi_slopes is None else load_slopes(alibi_slopes, head + tl.zeros_like(index), index < tokens)

    q_text = load_turned(q_rows, q_inside, rotation, angles, dim, HEAD_DIM, HALF, START, PAIRED)
    q_text = q_text.to(DTYPE)

    # Sinks.
    if SINK_BLOCK > 0:
        q_sink = load_turned(q_rows, q_inside, rotation, angles + 2 * HALF, dim, HEAD_DIM, HALF, START, PAIRED)
        q_sink = q_sink.to(DTYPE)
        sinks = tl.minimum(length + last + 1, sink_size).to(tl.int32)
        furthest = sink_size + window_size - 1  # where the sinks see the queries: there, or nearer
        on = query + tl.minimum(length, furthest).to(tl.int32)
        seen_from = tl.where(is_dense != 0, on, tl.minimum(length + query, furthest).to(tl.int32))
        for start in tl.range(0, sinks, SINK_BLOCK, num_stages=1):
            slot = start + tl.arange(0, SINK_BLOCK)
            key = tl.maximum(slot - length, -1).to(tl.int32)  # -1 is any that the cache has
            in_cache = (slot < sinks) & (key < 0)
            in_chunk = (slot < sinks) & (key >= 0)
            k_block, v_block, k_scale, v_scale = load_block(
                k_cache, v_cache, k_scales, v_scales, slot, in_cache, k_cache_slot, v_cache_slot, k_scale_slot,
                v_scale_slot, dim, v_dim, HEAD_DIM, V_DIM, DTYPE)  # fmt: skip
            k_more, v_more, k_more_scale, v_more_scale = load_block(
                k, v, k_new_scales, v_new_scales, padding + key, in_chunk, k_token, v_token, 1, 1,
                dim, v_dim, HEAD_DIM, V_DIM, DTYPE)  # fmt: skip
            k_block += k_more
            v_block += v_more
            if k_scales is not None:
                k_scale += k_more_scale
                v_scale += v_more_scale
            visible = (slot < sinks)[None, :] & (key[None, :] <= query[:, None])
            distance = seen_from[:, None] - slot[None, :]
            top, total, acc = attend(
                q_sink, k_block, v_block, k_scale, v_scale, visible, slopes, distance, scale, top, total, acc, SOFTCAP,
                True, SCALED)  # fmt: skip

    # The ring, back from the newest token.
    written = tl.maximum(length - sink_size, 0)  # tokens that ever went into it
    next_slot = (written % ring_size).to(tl.int32)
    seen = tl.minimum(written, tl.minimum(window_size, reach - first) - 1).to(tl.int32)
    for start in tl.range(0, seen, BLOCK_N, num_stages=STAGES):
        age = start + tl.arange(0, BLOCK_N)  # 0 is the newest
        slot = sink_size + next_slot - 1 - age + tl.where(age < next_slot, 0, ring_size)
        k_block, v_block, k_scale, v_scale = load_block(
            k_cache, v_cache, k_scales, v_scales, slot, age < seen, k_cache_slot, v_cache_slot, k_scale_slot,
            v_scale_slot, dim, v_dim, HEAD_DIM, V_DIM, DTYPE)  # fmt: skip
        distance = age[None, :] + query[:, None] + 1
        visible = (age < seen)[None, :] & (distance < reach)
        top, total, acc = attend(
            q_text, k_block, v_block, k_scale, v_scale, visible, slopes, distance, scale, top, total, acc, SOFTCAP,
            True, SCALED)  # fmt: skip

    # The chunk: keys [low, high), of which all queries of the block see [all_low, all_high), in whole blocks.
    low = tl.maximum(tl.maximum(sink_size - length, 0).to(tl.int32), first - reach + 1)
    high = last + 1
    all_low = low + tl.cdiv(tl.maximum(last - reach + 1 - low, 0), BLOCK_N) * BLOCK_N
    all_high = all_low + tl.maximum(first + 1 - all_low, 0) // BLOCK_N * BLOCK_N
    for start in tl.range(all_low, all_high, BLOCK_N, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_N)
        k_block, v_block, k_scale, v_scale = load_block(
            k, v, k_new_scales, v_new_scales, padding + key, None, k_token, v_token, 1, 1,
            dim, v_dim, HEAD_DIM, V_DIM, DTYPE)  # fmt: skip
        behind = query[:, None] - key[None, :]
        top, total, acc = attend(
            q_text, k_block, v_block, k_scale, v_scale, None, slopes, behind, scale, top, total, acc, SOFTCAP,
            True, SCALED)  # fmt: skip
    left = tl.cdiv(tl.maximum(tl.minimum(all_low, high) - low, 0), BLOCK_N)
    right = tl.cdiv(tl.maximum(high - all_high, 0), BLOCK_N)
    for edge in tl.range(0, left + right, num_stages=STAGES):
        key = tl.where(edge < left, low, all_high - left * BLOCK_N) + edge * BLOCK_N + tl.arange(0, BLOCK_N)
        k_block, v_block, k_scale, v_scale = load_block(
            k, v, k_new_scales, v_new_scales, padding + key, key < high, k_token, v_token, 1, 1,
            dim, v_dim, HEAD_DIM, V_DIM, DTYPE)  # fmt: skip
        behind = query[:, None] - key[None, :]
        visible = (behind >= 0) & (behind < reach)
        top, total, acc = attend(
            q_text, k_block, v_block, k_scale, v_scale, visible, slopes, behind, scale, top, total, acc, SOFTCAP,
            True, SCALED)  # fmt: skip

    acc = tl.where(q_inside, acc / total[:, None], 0.0)
    tl.store(out_rows, acc.to(out.dtype.element_ty), mask=out_inside)


@triton.jit(do_not_specialize=["tokens", "sink_size", "ring_size"])
def _append_kernel(
    k,  # (batch, num_kv_heads, tokens, HEAD_DIM), as it is stored
    v,  # (batch, num_kv_heads, tokens, V_DIM), as it is stored
    k_cache,  # (batch, num_kv_heads, sink_size + ring_size, HEAD_DIM)
    v_cache,  # (batch, num_kv_heads, sink_size + ring_size, V_DIM)
    lengths,  # (batch,)
    counts,  # (batch,) or None
    k_scales, v_scales, k_new_scales, v_new_scales,  # as of `_attend_kernel`
    k_row, k_head, k_token, v_row, v_head, v_token,  # strides in elements
    k_cache_row, k_cache_head, k_cache_slot, v_cache_row, v_cache_head, v_cache_slot,
    k_scale_row, k_scale_head, k_scale_slot, v_scale_row, v_scale_head, v_scale_slot,
    tokens, sink_size, ring_size,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    row, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
    count = tokens if counts is None else tl.load(counts + row).to(tl.int32)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = index - (tokens - count)  # of the row
    position = tl.load(lengths + row) + token
    in_ring = position >= sink_size
    slot = tl.where(in_ring, sink_size + (position - sink_size) % ring_size, position)
    # What later tokens of the chunk would overwrite is left out: no slot is written twice.
    kept = (token >= 0) & (index < tokens) & ((token >= count - ring_size) | (position < sink_size))
    dim = tl.arange(0, BLOCK_D)[None, :]
    v_dim = tl.arange(0, BLOCK_V)[None, :]
    k_tile = load_rows(k + row * k_row + head * k_head, index, kept, k_token, dim, HEAD_DIM)
    v_tile = load_rows(v + row * v_row + head * v_head, index, kept, v_token, v_dim, V_DIM)
    k_cache += row * k_cache_row + head * k_cache_head
    v_cache += row * v_cache_row + head * v_cache_head
    tl.store(k_cache + slot[:, None] * k_cache_slot + dim, k_tile, mask=kept[:, None] & (dim < HEAD_DIM))
    tl.store(v_cache + slot[:, None] * v_cache_slot + v_dim, v_tile, mask=kept[:, None] & (v_dim < V_DIM))
    if k_scales is not None:
        new = pair * tokens + index
        k_scales += row * k_scale_row + head * k_scale_head + slot * k_scale_slot
        v_scales += row * v_scale_row + head * v_scale_head + slot * v_scale_slot
        tl.store(k_scales, tl.load(k_new_scales + new, mask=kept, other=0.0), mask=kept)
        tl.store(v_scales, tl.load(v_new_scales + new, mask=kept, other=0.0), mask=kept)


def _config(tokens: int, widest: int, itemsize: int) -> dict:
    """Launch parameters by the widest tile: what stays below 99 KB of shared memory and spills few registers."""
    if itemsize == 4:  # exact float32 products are not for tensor cores: small blocks, no copies in flight
        block_m, block_n, stages = (32, 32, 1) if widest <= 64 else (16, 16, 1)
    elif widest <= 128:
        block_m, block_n, stages = 128, 64, 2
    else:
        block_m, block_n, stages = 64, 32, 2
    block_m = min(block_m, max(16, triton.next_power_of_2(tokens)))
    warps = 8 if itemsize == 4 or block_m * widest >= 2**12 else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps}


def prefill(
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
) -> Tensor:
    """`sinkattn.ops.prefill`, which states the contract, in three kernels; the floor is at the top of this file."""
    batch, num_heads, tokens, head_dim = q.shape
    num_kv_heads, slots, v_dim = v_cache.shape[1:]
    out = q.new_empty(batch, tokens, num_heads, v_dim)
    if batch == 0 or tokens == 0:
        return out
    lengths, counts, rotation, learned_logits, alibi_slopes = (
        x if x is None else x.contiguous() for x in (lengths, counts, rotation, learned_logits, alibi_slopes)
    )
    turn = {"HALF": 0 if rotation is None else rotation.shape[-1], "START": rotary_start, "PAIRED": interleaved}
    block_d, block_v = tile_dim(head_dim), tile_dim(v_dim)
    copy_block = min(2**13 // max(block_d, block_v), max(16, triton.next_power_of_2(tokens)))
    copy_grid = (batch * num_kv_heads * triton.cdiv(tokens, copy_block),)
    config = _config(tokens, max(block_d, block_v), q.element_size())
    scale_strides = (stride for x in (k_scales, v_scales) for stride in ((0, 0, 0) if x is None else x.stride()))
    cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides)
    new_scales: list[Tensor | None] = [None, None]
    ring_size = slots - sink_size
    with torch.cuda.device_of(q):
        prepared = [k, v]
        for i, (x, angles, block) in enumerate(((k, rotation, block_d), (v, None, block_v))):
            if angles is None and k_scales is None:
                continue
            if k_scales is not None:
                new_scales[i] = x.new_empty(x.shape[:3], dtype=torch.float32)
            prepared[i] = x.new_empty(x.shape, dtype=k_cache.dtype)
            _prepare_kernel[copy_grid](
                x, angles, prepared[i], new_scales[i], *x.stride()[:3], tokens, NUM_KV_HEADS=num_kv_heads,
                DIM=x.shape[3], **turn, BLOCK=copy_block, BLOCK_D=block,
            )  # fmt: skip
        k, v = prepared
        _attend_kernel[(triton.cdiv(tokens, config["BLOCK_M"]) * batch * num_heads,)](
            q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, k_scales, v_scales,
            *new_scales, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cache_strides,
            tokens, sink_size, window_size, ring_size,
            min(dense_window or window_size, window_size + tokens),  # what lies beyond is not there: keeps it an int32
            int(dense_window > 0),  # a bool is no number to every interpreter
            query_scale(scale, softcap),
            NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, V_DIM=v_dim, **turn,
            SOFTCAP=softcap, BLOCK_D=block_d, BLOCK_V=block_v,
            SINK_BLOCK=min(max(16, triton.next_power_of_2(sink_size)), config["BLOCK_N"]) if sink_size else 0,
            **config,
        )  # fmt: skip
        _append_kernel[copy_grid](
            k, v, k_cache, v_cache, lengths, counts, k_scales, v_scales, *new_scales,
            *k.stride()[:3], *v.stride()[:3], *cache_strides,
            tokens, sink_size, ring_size, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, V_DIM=v_dim,
            BLOCK=copy_block, BLOCK_D=block_d, BLOCK_V=block_v,
        )  # fmt: skip
    return out
