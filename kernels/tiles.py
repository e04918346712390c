"""What decode.py and prefill.py share: loading and turning a tile, and one step of the online softmax.

Scores are kept in base 2, so that every exponential is one exp2. The factor that takes q . k there (`query_scale`)
joins in the subtraction of the maximum. It is not put on the query, which would be rounded once more.
"""

import functools

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # a maximum before the first score: finite, as -inf - -inf is NaN


def query_scale(scale: float, softcap: float) -> float:
    """The factor that brings q . k into base 2 or, under a softcap, into the unit that `capped` takes."""
    return LOG2E.value * (2 * scale / softcap if softcap > 0 else scale)


def tile_dim(dim: int) -> int:
    """Width of the tile that holds the dims of a head: a power of two, and wide enough for `tl.dot`."""
    return max(16, triton.next_power_of_2(dim))


@functools.cache
def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may take. Few in the interpreter, so that its tests see
    one split and several."""
    if device.type != "cuda":
        return 4, 2**17
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@triton.jit
def load_rows(x, index, inside, stride, dim, DIM: tl.constexpr):
    """Rows ``index`` (N,) of x as (N, BLOCK). Zero, and not read, where not ``inside`` (N,); None: all are."""
    mask = dim < DIM
    if inside is not None:
        mask = mask & inside[:, None]
    return tl.load(x + index.to(tl.int64)[:, None] * stride + dim, mask=mask, other=0.0)


@triton.jit
def load_turned(
    x, inside, rotation, angles, dim, DIM: tl.constexpr, HALF: tl.constexpr, START: tl.constexpr, PAIRED: tl.constexpr
):
    """Rows turned by their rotary angles: (N, BLOCK_D) float32, zero where not ``inside``.

    x: pointers to dim 0, (N, 1) or one. inside: (N, 1) or one. angles: offsets into ``rotation``, (N, 1) or one,
    always valid, of HALF cosines that HALF sines follow; ``rotation`` None turns nothing. PAIRED: interleaved pairs,
    (2i, 2i + 1) instead of (i, i + HALF).
    """
    inside = inside & (dim < DIM)
    tile = tl.load(x + dim, mask=inside, other=0.0).to(tl.float32)
    if rotation is not None:
        i = dim - START
        turned = (i >= 0) & (i < 2 * HALF)
        is_first = i % 2 == 0 if PAIRED else i < HALF
        pair = i // 2 if PAIRED else tl.where(is_first, i, i - HALF)
        apart: tl.constexpr = 1 if PAIRED else HALF
        # The partner comes from memory again, which is a cache hit, so that no thread has to hand it over.
        other = tl.load(x + dim + tl.where(is_first, apart, -apart), mask=inside & turned, other=0.0).to(tl.float32)
        cos = tl.load(rotation + angles + pair, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(rotation + angles + HALF + pair, mask=turned, other=0.0).to(tl.float32)
        # The angles of padding may be NaN.
        tile = tl.where(inside, tile * cos + tl.where(is_first, -other, other) * sin, 0.0)
    return tile


@triton.jit
def load_block(k, v, k_scales, v_scales, index, inside, k_stride, v_stride, k_scale_stride, v_scale_stride,
               dim, v_dim, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Keys (N, BLOCK_D) and values (N, BLOCK_V) as `load_rows` has them, in DTYPE, which has all that 8 bits may hold,
    and the scales of both, (N,), or 0 where k_scales and v_scales are None, which Triton 3.6 cannot return."""
    k_block = load_rows(k, index, inside, k_stride, dim, HEAD_DIM).to(DTYPE)
    v_block = load_rows(v, index, inside, v_stride, v_dim, V_DIM).to(DTYPE)
    k_scale, v_scale = 0, 0
    if k_scales is not None:
        index = index.to(tl.int64)
        k_scale = tl.load(k_scales + index * k_scale_stride, mask=inside, other=None if inside is None else 0.0)
        v_scale = tl.load(v_scales + index * v_scale_stride, mask=inside, other=None if inside is None else 0.0)
    return k_block, v_block, k_scale, v_scale


@triton.jit
def quantised(tile, STORED: tl.constexpr):
    """Rows (N, BLOCK) float32 in 8 bits, as float32, and their scales (N, 1): `sinkattn.reference.quantised`."""
    INTEGER: tl.constexpr = STORED.is_int()
    LARGEST: tl.constexpr = 127.0 if INTEGER else 448.0
    most = tl.max(tl.abs(tile), axis=1, keep_dims=True)
    # A sum of zeros, or of NaN where a number is not finite.
    scales = tl.div_rn(most, tl.full(most.shape, LARGEST, tl.float32)) + tl.sum(tile * 0.0, axis=1, keep_dims=True)
    is_number = scales > 0
    numbers = tl.div_rn(tl.where(is_number, tile, 0.0), tl.where(is_number, scales, 1.0) + tl.zeros_like(tile))
    numbers = tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST)
    # Rounded to even, by the last bit of a sum: of a float32, 2^-23 of its power of two, is 1 or, of e4m3, 2^-3.
    power = tl.full(numbers.shape, 8388608.0, tl.float32)
    if not INTEGER:
        power = (numbers.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, 0.015625) * 1048576.0
    numbers = (numbers + 1.5 * power) - 1.5 * power
    return numbers, scales


@triton.jit
def capped(scores, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap) in base 2, from 2 x / softcap in base 2, as tanh(y) = 2 / (1 + exp(-2 y)) - 1."""
    if SOFTCAP > 0:
        scores = SOFTCAP * LOG2E * (2.0 / (1.0 + tl.exp2(-scores)) - 1.0)
    return scores


@triton.jit
def open_softmax(learned_logits, head, inside, BLOCK_V: tl.constexpr):
    """Maximum (M,), sum (M,) and weighted values (M, BLOCK_V) before any key; a learned logit is in them as a key of
    value zero. ``head`` (M,) says whose, ``inside`` (M,) which of them are there."""
    top = tl.full(head.shape, LOWEST, tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    if learned_logits is not None:
        logit = tl.load(learned_logits + head, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
        top = tl.maximum(top, logit)
        total = tl.exp2(logit - top)
    return top, total, tl.zeros((head.shape[0], BLOCK_V), tl.float32)


@triton.jit
def load_slopes(alibi_slopes, head, inside):
    """ALiBi's slopes of the heads (M,) as (M, 1), in base 2."""
    return (tl.load(alibi_slopes + head, mask=inside, other=0.0).to(tl.float32) * LOG2E)[:, None]


@triton.jit
def attend(
    q, k, v, k_scales, v_scales, visible, slopes, distance, scale, top, total, acc,
    SOFTCAP: tl.constexpr, DOT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Take a block of keys through the online softmax; returns new ``top`` (M,), ``total`` (M,), ``acc`` (M, BLOCK_V).

    q: (M, BLOCK_D), k: (N, BLOCK_D), v: (N, BLOCK_V). k_scales, v_scales: (N,) float32, if SCALED, what they are to be
    multiplied by, which scores and weights are. visible: (N,), or (M, N) with DOT, or None: all are.
    slopes: ALiBi's, (M, 1), in base 2, for a distance of the shapes of visible; None for none.

    With DOT the scores, (M, N), come from the tensor cores, and q is rounded to k's dtype. Without it M is 1, and the
    scores stand upright, (N, 1), as the sums over a key's dims leave them.
    """
    KEYS: tl.constexpr = 1 if DOT else 0  # the axis along which the keys lie in the scores
    # Scores.
    if DOT:
        scores = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee")
    else:
        scores = tl.sum(q * k.to(tl.float32), axis=1, keep_dims=True)
    if SCALED:
        scores *= tl.expand_dims(k_scales, 1 - KEYS)
    # Mask.
    if SOFTCAP > 0 or slopes is not None:
        scores = capped(scores * scale, SOFTCAP)
        scale = 1.0
    if slopes is not None:
        if len(distance.shape) == 1:
            distance = tl.expand_dims(distance, 1 - KEYS)
        scores -= slopes * distance.to(tl.float32)
    if visible is not None:
        if len(visible.shape) == 1:
            visible = tl.expand_dims(visible, 1 - KEYS)
        scores = tl.where(visible, scores, float("-inf"))
    # Soften.
    higher = tl.maximum(top, tl.max(scores, axis=KEYS) * scale)
    fade = tl.exp2(top - higher)
    weights = tl.exp2(scores * scale - tl.expand_dims(higher, KEYS))
    total = total * fade + tl.sum(weights, axis=KEYS)
    acc = acc * fade[:, None]
    # Values.
    if SCALED and not (DOT and v.dtype == tl.float16):
        weights *= tl.expand_dims(v_scales, 1 - KEYS)
    if SCALED and DOT and v.dtype == tl.float16:  # small scales would leave its range
        largest = tl.max(v_scales, axis=0)
        weights *= (v_scales / tl.where(largest > 0, largest, 1.0))[None, :]
        acc += largest * tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    elif DOT:
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    else:
        acc += tl.sum(weights * v.to(tl.float32), axis=0, keep_dims=True)
    return higher, total, acc
