"""One new token per row in one launch: rotate it, append it, attend over sinks and window.

Floor: each visible key and value is read once, ``batch * num_kv_heads * min(t + 1, C) * (head_dim + v_head_dim)``
elements over the memory bandwidth (an H200 reads 4.53 TB/s). What else is read and written, and the two FLOPs per
element and query head, are small beside it.

A program takes one key head of one row, all the query heads that share it, and a span of ring slots, in the order in
which they lie: the softmax does not mind. The program of the last span, the home of the new token, also writes that and
takes in the sinks, which meet a query turned by another angle. The last program to arrive combines what all found.

Phases have the names of csrc/cuda/sm80/decode.cu:

* fetch: `_load_ring`, `_load_home`
* turn: `load_turned`
* append: at home; there, whoever has the tile of the new slot
* attend, with scores, mask, soften and values: `tiles.attend`; there, sinks are slots like others
* combine: `_combine`; there, within a block and a cluster first
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import (
    LOG2E,
    LOWEST,
    attend,
    capped,
    limits,
    load_block,
    load_slopes,
    load_turned,
    open_softmax,
    quantised,
    query_scale,
    tile_dim,
)


@triton.jit
def _load_ring(k_cache, v_cache, k_scales, v_scales, k_slot, v_slot, k_scale_slot, v_scale_slot,
               start, stop, sink_size, ring_size, new_slot, seen, dim, v_dim,
               HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block of ring slots: k (BLOCK, BLOCK_D), v (BLOCK, BLOCK_V) of DTYPE, their scales, visible and age (BLOCK,).
    The invisible are zero.

    Slots count from the first of the ring. Age counts from the newest token held, which is 0, back around the ring.
    """
    slot = start + tl.arange(0, BLOCK)
    age = new_slot - 1 - slot + tl.where(slot < new_slot, 0, ring_size)
    visible = (slot < stop) & (age < seen)
    k, v, k_scale, v_scale = load_block(
        k_cache, v_cache, k_scales, v_scales, sink_size + slot, visible, k_slot, v_slot, k_scale_slot, v_scale_slot,
        dim, v_dim, HEAD_DIM, V_DIM, DTYPE)  # fmt: skip
    return k, v, k_scale, v_scale, visible, age


@triton.jit
def _load_home(q, k, v, k_cache, v_cache, k_scales, v_scales, k_slot, v_slot, k_scale_slot, v_scale_slot,
               rotation, angles, at_home, members, sinks, dim, v_dim,
               HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr,
               START: tl.constexpr, PAIRED: tl.constexpr, SINK_BLOCK: tl.constexpr):  # fmt: skip
    """What only the home needs, and only it reads: the q (BLOCK_G, BLOCK_D) for the sinks; the new k (1, BLOCK_D) and
    v (1, BLOCK_V) as numbers of the cache's dtype, and their scales (1, 1), 0 where it needs none; the first of the
    sinks, (SINK_BLOCK, BLOCK_D) and (SINK_BLOCK, BLOCK_V), and their scales."""
    STORED: tl.constexpr = k_cache.dtype.element_ty
    members = members & at_home
    q_sink = load_turned(q, members, rotation, angles + 2 * HALF, dim, HEAD_DIM, HALF, START, PAIRED)
    k_new = load_turned(k, at_home, rotation, angles, dim, HEAD_DIM, HALF, START, PAIRED)
    v_new = tl.load(v + v_dim, mask=at_home & (v_dim < V_DIM), other=0.0)
    k_scale, v_scale = 0, 0
    if STORED.primitive_bitwidth == 8:
        k_new, k_scale = quantised(k_new, STORED)
        v_new, v_scale = quantised(v_new.to(tl.float32), STORED)
    slot = tl.arange(0, SINK_BLOCK)
    k_sinks, v_sinks, k_sink_scale, v_sink_scale = load_block(
        k_cache, v_cache, k_scales, v_scales, slot, slot < sinks, k_slot, v_slot, k_scale_slot, v_scale_slot,
        dim, v_dim, HEAD_DIM, V_DIM, DTYPE)  # fmt: skip
    return (q_sink, k_new.to(STORED), v_new.to(STORED), k_scale, v_scale, k_sinks, v_sinks, k_sink_scale,
            v_sink_scale)  # fmt: skip


@triton.jit
def _combine(out, partials, lse, pair, others, GROUP: tl.constexpr, V_DIM: tl.constexpr, SPLITS: tl.constexpr,
             SPLIT_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr):  # fmt: skip
    """Weigh together what the programs of a pair found, in the order of the splits: the same bits every time."""
    COLUMNS: tl.constexpr = GROUP * V_DIM  # a query head of the group, and one of its dims
    split = tl.arange(0, SPLIT_TILE)[:, None]
    part = pair.to(tl.int64) * SPLITS + split
    for start in tl.range(0, COLUMNS, COLUMN_TILE, num_stages=1):
        column = start + tl.arange(0, COLUMN_TILE)
        inside = ((split < others) | (split == SPLITS - 1)) & (column < COLUMNS)[None, :]
        bits = tl.load(lse + part * GROUP + (column // V_DIM)[None, :], mask=inside, other=LOWEST)
        found = tl.load(partials + part * COLUMNS + column[None, :], mask=inside, other=0.0)
        weight = tl.exp2(bits - tl.max(bits, axis=0, keep_dims=True))
        mean = tl.sum(weight * found, axis=0) / tl.sum(weight, axis=0)
        tl.store(out + column, mean.to(out.dtype.element_ty), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["sink_size", "window_size", "ring_size", "span"])
def _decode_kernel(
    q,  # (batch, num_kv_heads * GROUP, 1, HEAD_DIM)
    k,  # (batch, num_kv_heads, 1, HEAD_DIM)
    v,  # (batch, num_kv_heads, 1, V_DIM)
    k_cache,  # (batch, num_kv_heads, sink_size + ring_size, HEAD_DIM)
    v_cache,  # (batch, num_kv_heads, sink_size + ring_size, V_DIM)
    lengths,  # (batch,)
    counts,  # (batch,) or None
    rotation,  # (batch, 1, text | sink, cos | sin, HALF) or None
    learned_logits,  # (num_kv_heads * GROUP,) or None
    alibi_slopes,  # (num_kv_heads * GROUP,) or None
    k_scales,  # (batch, num_kv_heads, sink_size + ring_size) float32, of a cache in 8 bits, or None
    v_scales,
    joined_values,  # (PARTS, batch, num_kv_heads * GROUP, V_DIM) float32 or None
    joined_logits,  # (PARTS, batch, num_kv_heads * GROUP) float32 or None
    out,  # (batch, 1, num_kv_heads * GROUP, V_DIM)
    partials,  # float32: outputs (pairs, SPLITS, GROUP, V_DIM), log-sum-exps (pairs, SPLITS, GROUP); None for one split
    arrivals,  # (pairs,) int32, zero between launches; None for one split; pairs = batch * num_kv_heads
    q_row, q_head, k_row, k_head, v_row, v_head,  # strides in elements
    k_cache_row, k_cache_head, k_cache_slot, v_cache_row, v_cache_head, v_cache_slot,
    k_scale_row, k_scale_head, k_scale_slot, v_scale_row, v_scale_head, v_scale_slot,
    sink_size, window_size, ring_size,
    span,  # ring slots per program
    scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HALF: tl.constexpr, START: tl.constexpr, PAIRED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,  # ring slots at a time
    ONE_BLOCK: tl.constexpr,  # the span is one block
    SINK_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    split = tl.program_id(1)
    is_home = split == SPLITS - 1
    at_home = tl.full((1, 1), split, tl.int32) == SPLITS - 1  # the same for masks: the interpreter widens no bool
    row = (pair // NUM_KV_HEADS).to(tl.int64)
    head = pair % NUM_KV_HEADS
    member = tl.arange(0, BLOCK_G)  # of the group
    dim = tl.arange(0, BLOCK_D)[None, :]
    v_dim = tl.arange(0, BLOCK_V)[None, :]
    out += pair.to(tl.int64) * GROUP * V_DIM
    tile = member[:, None] * V_DIM + v_dim
    tile_inside = (member[:, None] < GROUP) & (v_dim < V_DIM)

    count = 1 if counts is None else tl.load(counts + row)
    if count == 0:
        if is_home:
            tl.store(out + tile, tl.zeros((BLOCK_G, BLOCK_V), out.dtype.element_ty), mask=tile_inside)
        return

    t = tl.load(lengths + row)
    written = tl.maximum(t - sink_size, 0)  # tokens that ever went into the ring
    new_slot = (written % ring_size).to(tl.int32)  # the new token's, of the ring; what it holds is no longer visible
    held = tl.minimum(written, ring_size).to(tl.int32)
    seen = tl.minimum(written, window_size - 1).to(tl.int32)
    others = tl.minimum(tl.cdiv(held, span), SPLITS - 1)  # programs with work, besides the home
    if (split >= others) & (split < SPLITS - 1):
        return

    k_cache += row * k_cache_row + head.to(tl.int64) * k_cache_head
    v_cache += row * v_cache_row + head.to(tl.int64) * v_cache_head
    if k_scales is not None:
        k_scales += row * k_scale_row + head.to(tl.int64) * k_scale_head
        v_scales += row * v_scale_row + head.to(tl.int64) * v_scale_head
    DTYPE: tl.constexpr = q.dtype.element_ty
    SCALED: tl.constexpr = k_scales is not None
    first = split * span
    stop = tl.minimum(first + span, held)
    sinks = tl.where(is_home, tl.minimum(t, sink_size), 0).to(tl.int32)
    heads = head * GROUP + member
    q += row * q_row + heads[:, None] * q_head
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    members = member[:, None] < GROUP
    angles = row * (4 * HALF)

    # Fetch and turn.
    if ONE_BLOCK:  # everything is asked for before anything is waited for
        k_block, v_block, k_scale, v_scale, visible, age = _load_ring(
            k_cache, v_cache, k_scales, v_scales, k_cache_slot, v_cache_slot, k_scale_slot, v_scale_slot,
            first, stop, sink_size, ring_size, new_slot, seen, dim, v_dim, HEAD_DIM, V_DIM, DTYPE, BLOCK)  # fmt: skip
        q_sink, k_new, v_new, k_new_scale, v_new_scale, k_sinks, v_sinks, k_sink_scale, v_sink_scale = _load_home(
            q, k, v, k_cache, v_cache, k_scales, v_scales, k_cache_slot, v_cache_slot, k_scale_slot, v_scale_slot,
            rotation, angles, at_home, members, sinks, dim, v_dim, HEAD_DIM, V_DIM, DTYPE, HALF, START, PAIRED,
            SINK_BLOCK)  # fmt: skip
    q_text = load_turned(q, members, rotation, angles, dim, HEAD_DIM, HALF, START, PAIRED)
    q_ring = q_text.to(k.dtype.element_ty) if DOT else q_text
    top, total, acc = open_softmax(learned_logits, heads, member < tl.where(is_home, GROUP, 0), BLOCK_V)
    if joined_values is not None and is_home:
        for part in tl.range(0, PARTS, num_stages=1):
            query = (part * (tl.num_programs(0) // NUM_KV_HEADS) + row) * (NUM_KV_HEADS * GROUP) + heads
            logit = tl.load(joined_logits + query, mask=member < GROUP, other=float("-inf")) * LOG2E
            value = tl.load(joined_values + query[:, None] * V_DIM + v_dim, mask=tile_inside, other=0.0)
            higher = tl.maximum(top, logit)
            fade, weight = tl.exp2(top - higher), tl.exp2(logit - higher)
            top, total, acc = higher, total * fade + weight, acc * fade[:, None] + weight[:, None] * value
    slopes = None if alibi_slopes is None else load_slopes(alibi_slopes, heads, member < GROUP)

    # Attend.
    if ONE_BLOCK:
        top, total, acc = attend(
            q_ring, k_block, v_block, k_scale, v_scale, visible, slopes, age + 1, scale, top, total, acc, SOFTCAP, DOT,
            SCALED)  # fmt: skip
    else:
        for start in tl.range(first, stop, BLOCK, num_stages=STAGES):
            k_block, v_block, k_scale, v_scale, visible, age = _load_ring(
                k_cache, v_cache, k_scales, v_scales, k_cache_slot, v_cache_slot, k_scale_slot, v_scale_slot,
                start, stop, sink_size, ring_size, new_slot, seen, dim, v_dim, HEAD_DIM, V_DIM, DTYPE,
                BLOCK)  # fmt: skip
            top, total, acc = attend(
                q_ring, k_block, v_block, k_scale, v_scale, visible, slopes, age + 1, scale, top, total, acc, SOFTCAP,
                DOT, SCALED)  # fmt: skip

    if is_home:
        if not ONE_BLOCK:
            q_sink, k_new, v_new, k_new_scale, v_new_scale, k_sinks, v_sinks, k_sink_scale, v_sink_scale = _load_home(
                q, k, v, k_cache, v_cache, k_scales, v_scales, k_cache_slot, v_cache_slot, k_scale_slot, v_scale_slot,
                rotation, angles, at_home, members, sinks, dim, v_dim, HEAD_DIM, V_DIM, DTYPE, HALF, START, PAIRED,
                SINK_BLOCK)  # fmt: skip
        # Append.
        place = tl.where(t < sink_size, t, sink_size + new_slot)
        tl.store(k_cache + place * k_cache_slot + dim, k_new, mask=dim < HEAD_DIM)
        tl.store(v_cache + place * v_cache_slot + v_dim, v_new, mask=v_dim < V_DIM)
        # Attend, to the new token, as it is stored, and the sinks.
        q_new = tl.where(t < sink_size, q_sink, q_text)
        k_seen, v_seen = k_new.to(tl.float32), v_new.to(tl.float32)
        if k_scales is not None:
            one = tl.zeros((1, 1), tl.int64)
            tl.store(k_scales + place * k_scale_slot + one, k_new_scale)
            tl.store(v_scales + place * v_scale_slot + one, v_new_scale)
            k_seen, v_seen = k_seen * k_new_scale, v_seen * v_new_scale
        score = capped(tl.sum(q_new * k_seen, axis=1) * scale, SOFTCAP)
        higher = tl.maximum(top, score)
        fade, weight = tl.exp2(top - higher), tl.exp2(score - higher)
        top = higher
        total = total * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * v_seen
        slot = tl.arange(0, SINK_BLOCK)
        seen_from = tl.minimum(t, sink_size + window_size - 1).to(tl.int32)  # where the sinks see the query
        for start in tl.range(0, sinks, SINK_BLOCK, num_stages=1):
            top, total, acc = attend(
                q_sink, k_sinks, v_sinks, k_sink_scale, v_sink_scale, slot < sinks - start, slopes,
                seen_from - start - slot, scale, top, total, acc, SOFTCAP, DOT, SCALED)  # fmt: skip
            after = start + SINK_BLOCK + slot
            k_sinks, v_sinks, k_sink_scale, v_sink_scale = load_block(
                k_cache, v_cache, k_scales, v_scales, after, after < sinks, k_cache_slot, v_cache_slot, k_scale_slot,
                v_scale_slot, dim, v_dim, HEAD_DIM, V_DIM, DTYPE)  # fmt: skip

    # Combine.
    found = acc / tl.where(total > 0, total, 1.0)[:, None]  # a program may find slack slots alone
    if SPLITS == 1:
        tl.store(out + tile, found.to(out.dtype.element_ty), mask=tile_inside)
    else:
        part = (pair.to(tl.int64) * SPLITS + split) * GROUP
        lse = partials + tl.num_programs(0).to(tl.int64) * (SPLITS * GROUP * V_DIM)
        tl.store(partials + part * V_DIM + tile, found, mask=tile_inside)
        tl.store(lse + part + member, top + tl.log2(total), mask=member < GROUP)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == others:
            tl.store(arrivals + pair, 0)
            _combine(out, partials, lse, pair, others, GROUP, V_DIM, SPLITS, SPLIT_TILE, COLUMN_TILE)


@functools.cache
def _config(
    pairs: int, group: int, ring_size: int, slot_bytes: int, itemsize: int, sms: int, shared: int
) -> tuple[dict, int]:
    """Launch parameters and ring slots per program. ``slot_bytes``: a key and a value, rounded up to a power of two.

    Few pairs are a matter of latency: one large block per program, if eight of them make the ring. Otherwise programs
    loop over a span with the next blocks in flight, and there are no more of them than it takes to fill the GPU. What
    bench/tune.py found on an H200 (bench/results/h200/tune_0.csv) for bfloat16 and heads of 128 is behind the numbers.
    """
    block = min(2**16 // slot_bytes, triton.next_power_of_2(max(ring_size, 16)))
    splits = triton.cdiv(ring_size, block)
    one_block = splits <= 8 and pairs * splits <= 2 * sms
    if one_block:
        span = block
        warps = 8 if block * slot_bytes >= 2**15 else 4
    else:
        block = min(2**15 // slot_bytes, 128)
        blocks = triton.cdiv(ring_size, block)
        span = block * triton.cdiv(blocks, min(max(3 * sms // pairs, 1), 16, blocks))
        splits = triton.cdiv(ring_size, span)
        warps = 2 if itemsize == 2 and pairs >= 3 * sms else 4
    # One query alone is no work for tensor cores, but padded to 16 they leave more time to the loads. In one block they
    # would save 2 us on an H200, but round the turned query: float16 errors then pass twice PyTorch's now and then.
    dot = group > 1 or (itemsize == 2 and not one_block)
    meta = {
        "BLOCK": block,
        "ONE_BLOCK": one_block,
        "SPLITS": splits,
        "SPLIT_TILE": triton.next_power_of_2(splits),
        "DOT": dot,
        "BLOCK_G": max(16, triton.next_power_of_2(group)) if dot else 1,
        "STAGES": 3 if pairs < 3 * sms and 4 * block * slot_bytes <= shared else 2,
        "num_warps": warps,
    }
    return meta, span


def decode(
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
    joined_values: Tensor | None = None,
    joined_logits: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """`sinkattn.ops.decode`, which states the contract, in one kernel; the floor is at the top of this file."""
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, slots, v_dim = v_cache.shape[1:]
    out = q.new_empty(batch, 1, num_heads, v_dim)
    if batch == 0:
        return out
    pairs, group, ring_size = batch * num_kv_heads, num_heads // num_kv_heads, slots - sink_size
    block_d, block_v = tile_dim(head_dim), tile_dim(v_dim)
    slot_bytes = triton.next_power_of_2(block_d + block_v) * q.element_size()  # as it is multiplied
    meta, span = _config(pairs, group, ring_size, slot_bytes, q.element_size(), *limits(q.device))
    splits = meta["SPLITS"]
    small = lengths, counts, rotation, learned_logits, alibi_slopes, joined_values, joined_logits
    with torch.cuda.device_of(q):
        partials = None
        if splits > 1:
            partials = q.new_empty(pairs * splits * group * (v_dim + 1), dtype=torch.float32)
            arrivals = torch.zeros(pairs, dtype=torch.int32, device=q.device) if arrivals is None else arrivals
        _decode_kernel[pairs, splits](
            q, k, v, k_cache, v_cache,
            *(x if x is None else x.contiguous() for x in small[:5]), k_scales, v_scales,
            *(x if x is None else x.contiguous() for x in small[5:]), out, partials, arrivals,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            *(stride for x in (k_scales, v_scales) for stride in ((0, 0, 0) if x is None else x.stride())),
            sink_size, window_size, ring_size, span, query_scale(scale, softcap),
            NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, V_DIM=v_dim,
            HALF=0 if rotation is None else rotation.shape[-1], START=rotary_start, PAIRED=interleaved, SOFTCAP=softcap,
            BLOCK_D=block_d, BLOCK_V=block_v,
            SINK_BLOCK=min(max(16, triton.next_power_of_2(sink_size)), meta["BLOCK"]),
            COLUMN_TILE=min(triton.next_power_of_2(group * v_dim), max(64, 2**13 // meta["SPLIT_TILE"])),
            PARTS=0 if joined_values is None else len(joined_values),
            **meta,
        )  # fmt: skip
    return out
