"""Attention that does not use transformers' interface, met where it happens: on the tensors `Cache.update` hands back.

A model of any kind that keeps to the `Cache` protocol gets its keys and values from ``cache.update(k, v, layer_idx)``
and goes on with plain torch: query times keys, a scale, a bias, a mask, softmax, times values, or all of it in
`scaled_dot_product_attention`. `Watched` keys and values see those calls. They note the query where it meets the keys,
and where the weights meet the values their `Watch` says what comes out, whatever was computed in between: in the probe
the model's own result, later one op of ops.py over the whole cache.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.bmm, Tensor.baddbmm, torch.einsum}
_PRODUCTS |= {Tensor.__matmul__, Tensor.__rmatmul__}
_SOFTMAX = {softmax, torch.softmax, Tensor.softmax, torch.nn.functional.log_softmax}


class Watch:
    """One attention under watch. Subclasses say what `scores`, `logits` and `output` do.

    layer_idx: what `update` was called with. key: (batch, num_kv_heads, T, head_dim), value: (..., v_head_dim), as
    `update` was given them. query: (batch, num_heads, T, head_dim), None until it met the keys.
    """

    def __init__(self, layer_idx: int, key: Tensor, value: Tensor):
        self.layer_idx, self.key, self.value, self.query = layer_idx, key, value, None

    def handed_out(self) -> tuple["Watched", "Watched"]:
        """Keys and values for the model to go on with."""
        return Watched.of(self.key, self, "key"), Watched.of(self.value, self, "value")

    def meet(self, query: Tensor) -> None:
        batch, _, tokens, head_dim = self.key.shape
        self.query = query.reshape(batch, -1, tokens, head_dim)

    def scores(self, product, args: list, kwargs: dict) -> Tensor:
        """What the product of query and keys gives; its content does not matter unless a subclass looks at it."""
        return product(*args, **kwargs)

    def logits(self, logits: Tensor) -> None:
        """What goes into the softmax."""

    def output(self, found: Tensor) -> Tensor:
        """What comes out: found is the model's own result, over the step's tokens alone."""
        raise NotImplementedError

    def refuse(self, what: str):
        raise NotImplementedError(f"layer {self.layer_idx}: between the cache and its output, attention {what}")


class Watched(Tensor):
    """Keys, values, or scores made of them ("key", "value", "scores", "weights"), on their way to the output."""

    watch: Watch
    role: str

    @classmethod
    def of(cls, tensor: Tensor, watch: Watch, role: str) -> "Watched":
        watched = tensor.as_subclass(cls)
        watched.watch, watched.role = watch, role
        return watched

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, Tensor)]
        met = [x for x in given if isinstance(x, cls)]
        watch, roles = met[0].watch, {x.role for x in met}
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:
                return watch.output(_dot_product(watch, *args, **kwargs))
            if func in _PRODUCTS and roles == {"key"}:
                watch.meet([x for x in given if not isinstance(x, cls)][-1])  # baddbmm has a bias before it
                return cls.of(watch.scores(func, args, kwargs), watch, "scores")
            if func in _PRODUCTS and roles == {"weights", "value"}:
                dtype = next(x.dtype for x in met if x.role == "value")
                cast = lambda x: x.to(dtype) if isinstance(x, cls) else x  # noqa: E731
                found = func(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})
                return watch.output(found.as_subclass(Tensor))
            if len(roles) > 1 or func in _PRODUCTS:
                watch.refuse(f"puts {' and '.join(sorted(roles))} into {getattr(func, '__name__', func)}")
            role = roles.pop()
            if func in _SOFTMAX:
                watch.logits(met[0].as_subclass(Tensor))
                role = "weights"
            result = func(*args, **kwargs)
        if isinstance(result, (tuple, list)):
            return type(result)(cls.of(x, watch, role) if isinstance(x, Tensor) else x for x in result)
        return cls.of(result, watch, role) if isinstance(result, Tensor) else result


def _flat(items) -> list:
    return [y for x in items for y in (_flat(x) if isinstance(x, (tuple, list)) else (x,))]


def _dot_product(
    watch: Watch, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """`scaled_dot_product_attention`, its steps shown to the `Watch`."""
    watch.meet(query)
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    logits = watch.scores(torch.matmul, (query, keys), {}) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        blind = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if blind else logits + attn_mask
    watch.logits(logits.as_subclass(Tensor))
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return (torch.softmax(logits.as_subclass(Tensor), dim=-1).to(value.dtype) @ values).as_subclass(Tensor)
