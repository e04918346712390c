"""What calls of the ops must be: whatever they are not is said before anything is written."""

import torch
from torch import Tensor

from . import backends, reference
from .schemas import Paged, Sizes, Tensors, check_devices

LINEAR_MAX_ROWS, LINEAR_MAX_ROWS_ELSEWHERE = 64, 16  # on Hopper and the CPU, on other GPUs


def check_call(tensors: Tensors, sizes: Sizes) -> None:
    """Raise ValueError (shapes, sizes, devices) or TypeError (dtypes) before anything is written."""
    q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, k_scales, v_scales = tensors
    sink_size, window_size, scale, _, rotary_start, *_ = sizes
    stored = k_cache.dtype if k_cache.dtype in reference.LARGEST else q.dtype
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs (batch, heads, tokens or slots, dim)")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last must be 1, call contiguous()")
        if tensor.dtype != (stored if "cache" in name else q.dtype):
            raise TypeError(
                f"{name} is {tensor.dtype}, q is {q.dtype}; all five must have one dtype, or both caches int8 or "
                "float8_e4m3fn"
            )
        check_inference(**{name: tensor})
    batch, num_heads, tokens, head_dim = q.shape
    num_kv_heads, v_dim = v.shape[1], v.shape[3]
    if k.shape != (batch, num_kv_heads, tokens, head_dim) or v.shape != (batch, num_kv_heads, tokens, v_dim):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: k and v need q's batch and "
            "tokens and one number of heads, k needs q's head_dim"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads evenly")
    slots = k_cache.shape[2]
    if k_cache.shape != (batch, num_kv_heads, slots, head_dim) or v_cache.shape != (batch, num_kv_heads, slots, v_dim):
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} do not fit k {tuple(k.shape)} and "
            f"v {tuple(v.shape)}: they need the same batch, heads and dims, and one number of slots"
        )
    if sink_size < 0 or window_size < 1 or slots < sink_size + window_size:
        raise ValueError(
            f"sink_size={sink_size}, window_size={window_size} do not fit a cache of {slots} slots: "
            "sink_size >= 0, window_size >= 1, sink_size + window_size <= slots"
        )
    if not scale > 0:
        raise ValueError(f"scale={scale}: scores are multiplied by it, it needs a positive number")
    for name, tensor in (("lengths", lengths), ("counts", counts)):
        if tensor is not None and (tensor.shape != (batch,) or tensor.dtype != torch.int64):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it needs int64 ({batch},)")
    if rotation is not None:
        half = rotation.shape[-1] if rotation.dim() == 5 else 0
        if rotation.shape != (batch, tokens, 2, 2, half) or rotary_start < 0 or rotary_start + 2 * half > head_dim:
            raise ValueError(
                f"rotation {tuple(rotation.shape)} from dim {rotary_start} does not fit: it needs ({batch}, {tokens}, "
                f"text | sink, cos | sin, r / 2) with rotary_start + r <= head_dim = {head_dim}"
            )
        if rotation.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rotation is {rotation.dtype}; it needs float32")
    for name, tensor in (("learned_logits", learned_logits), ("alibi_slopes", alibi_slopes)):
        if tensor is not None and tensor.shape != (num_heads,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs ({num_heads},)")
    for name, tensor in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (tensor is None) != (stored == q.dtype):
            raise ValueError(
                f"{name} is {'missing' if tensor is None else 'given'}: caches in 8 bits have scales alone"
            )
        if tensor is not None and tensor.shape != (batch, num_kv_heads, slots):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs {(batch, num_kv_heads, slots)}")
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}; it needs float32")
    check_devices(tensors)


def check_pages(tensors: Paged, sizes: Sizes) -> None:
    """Raise ValueError (shapes, sizes, devices) or TypeError (dtypes) before anything is written."""
    q, k, v, k_pages, v_pages, starts, lengths, block_table, rotation = tensors
    sink_size, window_size, scale, _, rotary_start, *_ = sizes
    for name, tensor, dims in (
        ("q", q, "tokens, num_heads, head_dim"),
        ("k", k, "tokens, num_kv_heads, head_dim"),
        ("v", v, "tokens, num_kv_heads, v_head_dim"),
        ("k_pages", k_pages, "blocks, num_kv_heads, block_size, head_dim"),
        ("v_pages", v_pages, "blocks, num_kv_heads, block_size, v_head_dim"),
    ):
        if tensor.dim() != dims.count(",") + 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs ({dims})")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last must be 1, call contiguous()")
        if tensor.dtype != q.dtype or not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, q is {q.dtype}; all five must have one floating-point dtype")
        check_inference(**{name: tensor})
    (tokens, num_heads, head_dim), (_, num_kv_heads, v_dim), (blocks, _, block_size, _) = (
        q.shape,
        v.shape,
        k_pages.shape,
    )
    if k.shape != (tokens, num_kv_heads, head_dim) or v.shape[0] != tokens:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: k and v need q's tokens and "
            "one number of heads, k needs q's head_dim"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads evenly")
    pages = blocks, num_kv_heads, block_size
    if k_pages.shape != (*pages, head_dim) or v_pages.shape != (*pages, v_dim):
        raise ValueError(
            f"k_pages {tuple(k_pages.shape)} and v_pages {tuple(v_pages.shape)} do not fit k {tuple(k.shape)} and v "
            f"{tuple(v.shape)}: they need the same heads and dims, and one number and size of blocks"
        )
    if block_size == 0 or block_size % 16:
        raise ValueError(f"a page has {block_size} tokens; it needs a multiple of 16")
    if sink_size < 0 or window_size < 1 or not scale > 0 or sizes.max_tokens < 0:
        raise ValueError(
            f"sink_size={sink_size}, window_size={window_size}, scale={scale}, max_tokens={sizes.max_tokens}: they "
            "need 0 or more, 1 or more, a positive number, and 0 or more"
        )
    rows = lengths.numel()
    columns = block_table.shape[1] if block_table.dim() == 2 else 0
    for name, tensor, shape in (
        ("starts", starts, (rows + 1,)), ("lengths", lengths, (rows,)), ("block_table", block_table, (rows, columns))
    ):  # fmt: skip
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it needs int32 {shape}")
    if columns > 1 and block_table.stride(1) != 1:
        raise ValueError(f"block_table has strides {block_table.stride()}; the last must be 1, call contiguous()")
    if rotation is not None:
        half = rotation.shape[-1] if rotation.dim() == 4 else 0
        if rotation.shape != (tokens, 2, 2, half) or rotary_start < 0 or rotary_start + 2 * half > head_dim:
            raise ValueError(
                f"rotation {tuple(rotation.shape)} from dim {rotary_start} does not fit: it needs ({tokens}, text | "
                f"sink, cos | sin, r / 2) with rotary_start + r <= head_dim = {head_dim}"
            )
        if rotation.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rotation is {rotation.dtype}; it needs float32")
    check_devices(tensors)


def check_joined(tensors: Tensors, joined: tuple) -> None:
    if len(joined) != 2 or not all(isinstance(x, Tensor) for x in joined):
        raise TypeError("joined needs two tensors, values and their log-sum-exps, as attend_shared returns them")
    values, logits = joined
    (batch, num_heads), v_dim = tensors.q.shape[:2], tensors.v.shape[3]
    parts = values.shape[0] if values.dim() == 4 else 0
    if parts == 0 or values.shape != (parts, batch, num_heads, v_dim) or logits.shape != (parts, batch, num_heads):
        raise ValueError(
            f"joined has shapes {tuple(values.shape)} and {tuple(logits.shape)}; it needs (parts, {batch}, "
            f"{num_heads}, {v_dim}) and (parts, {batch}, {num_heads})"
        )
    wide = torch.promote_types(tensors.q.dtype, torch.float32)
    if values.dtype != wide or logits.dtype != wide:
        raise TypeError(f"joined is {values.dtype} and {logits.dtype}; it needs {wide}")
    check_inference(joined=values, logits=logits)
    check_devices((tensors.q, values, logits))


def check_shared(
    q: Tensor,
    k_shared: Tensor,
    v_shared: Tensor,
    lengths: Tensor,
    rotation: Tensor | None,
    alibi_slopes: Tensor | None,
    window_size: int,
    scale: float,
    rotary_start: int,
) -> None:
    """Raise ValueError (shapes, sizes, devices), TypeError (dtypes) or RuntimeError (gradients)."""
    check_inference(q=q, k_shared=k_shared, v_shared=v_shared)
    if any(x.dim() != 4 or (x.shape[3] > 1 and x.stride(3) != 1) for x in (q, k_shared, v_shared)) or q.shape[2] != 1:
        raise ValueError("q, k_shared and v_shared need 4 dims, the last of stride 1, and q one token a row")
    (batch, num_heads, _, head_dim), (_, num_kv_heads, sinks, _) = q.shape, k_shared.shape
    if (
        k_shared.shape != (1, num_kv_heads, sinks, head_dim)
        or v_shared.shape[:3] != (1, num_kv_heads, sinks)
        or sinks == 0
        or num_kv_heads == 0
        or num_heads % num_kv_heads
    ):
        raise ValueError(
            f"k_shared {tuple(k_shared.shape)} and v_shared {tuple(v_shared.shape)} do not fit q {tuple(q.shape)}: "
            "they need (1, num_kv_heads, S, head_dim) and (1, num_kv_heads, S, v_head_dim), S >= 1"
        )
    if {q.dtype, k_shared.dtype, v_shared.dtype} != {q.dtype} or not q.is_floating_point():
        raise TypeError(f"k_shared is {k_shared.dtype}, v_shared {v_shared.dtype}, q {q.dtype}: they need one dtype")
    if rotation is not None and rotation.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rotation is {rotation.dtype}; it needs float32")
    half = rotation.shape[-1] if rotation is not None and rotation.dim() == 5 else 0
    ends = rotary_start, rotary_start + 2 * half
    if rotation is not None and (rotation.shape != (batch, 1, 2, 2, half) or ends[0] < 0 or ends[1] > head_dim):
        raise ValueError(f"rotation {tuple(rotation.shape)} from dim {rotary_start} does not fit q {tuple(q.shape)}")
    if lengths.shape != (batch,) or lengths.dtype != torch.int64 or window_size < 1 or not scale > 0:
        raise ValueError(f"lengths need int64 ({batch},), window_size={window_size} 1 or more, scale={scale} above 0")
    if alibi_slopes is not None and alibi_slopes.shape != (num_heads,):
        raise ValueError(f"alibi_slopes has shape {tuple(alibi_slopes.shape)}; it needs ({num_heads},)")
    check_devices((q, k_shared, v_shared, lengths, rotation, alibi_slopes))


def check_inference(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires gradients; these ops are for inference: use torch.no_grad()")


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, residual: Tensor | None, activation: str
) -> None:
    """Raise ValueError (shapes, layouts, devices), TypeError (dtypes) or RuntimeError (gradients, no library)."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: they need (rows, in_features) and "
            "(out_features, in_features)"
        )
    if x.shape[0] > LINEAR_MAX_ROWS:
        raise ValueError(
            f"linear takes up to {LINEAR_MAX_ROWS} rows, x has {x.shape[0]}; use torch.nn.functional.linear for more"
        )
    if activation and activation not in reference.ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of '', {str([*reference.ACTIVATIONS])[1:-1]}")
    if activation and weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows; gates and what they let through need an even number")
    outputs = weight.shape[0] // (2 if activation else 1)
    shapes = {"bias": weight.shape[:1], "norm_weight": x.shape[1:], "residual": (x.shape[0], outputs)}
    for name, tensor in (
        ("x", x),
        ("weight", weight),
        ("bias", bias),
        ("norm_weight", norm_weight),
        ("residual", residual),
    ):
        if tensor is None:
            continue
        if name in shapes and tensor.shape != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs {tuple(shapes[name])}")
        if tensor.dtype != x.dtype or not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, x is {x.dtype}; all must have one floating-point dtype")
        if tensor.device != x.device:
            raise ValueError(f"tensors on {tensor.device} and {x.device}: all must be on one device")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires gradients; these ops are for inference: use torch.no_grad()")
    if x.device.type == "cpu":
        return
    if reason := backends.missing("cuda", x.device.type):
        raise RuntimeError(f"linear is not available: {reason}")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"on a GPU linear takes float16 and bfloat16, not {x.dtype}")
    if x.shape[1] % 8 or not x.shape[1]:
        raise ValueError(f"on a GPU linear takes multiples of 8 for in_features, not {x.shape[1]}")
    if x.shape[0] > LINEAR_MAX_ROWS_ELSEWHERE and not backends.is_hopper(x.device.index):
        raise ValueError(
            f"x has {x.shape[0]} rows; on GPUs of another compute capability than 9.0 linear takes up to "
            f"{LINEAR_MAX_ROWS_ELSEWHERE}: use torch.nn.functional.linear"
        )
    for name, tensor in (("x", x), ("norm_weight", norm_weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; on a GPU it must be contiguous")
    if weight.stride(1) != 1:
        raise ValueError(f"weight has strides {weight.stride()}; on a GPU the last must be 1")
    for name, tensor in (("x", x), ("norm_weight", norm_weight), ("weight", weight)):
        if not (tensor is None or backends.begins_aligned(tensor)) or (name == "weight" and weight.stride(0) % 8):
            raise ValueError(f"{name} begins or has rows off a multiple of 16 bytes; on a GPU all must begin at one")
