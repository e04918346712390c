"""The way from a model's attention layers to sinkattn: transformers' attention interface, and who listens to it now."""

import contextlib
import threading

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from .rope import UnsupportedModelError

IMPLEMENTATION = "sinkattn"  # name in transformers' attention registries
HARMLESS = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}  # tensors that attention may be given


class _Current(threading.local):
    """What the attention layers of the model that runs in this thread talk to: a `Step`, or the probe's `Recorder`."""

    def __init__(self):  # once a thread; a class attribute would hide a thread's own from older torch.compile
        self.step = None

    def __deepcopy__(self, memo) -> "_Current":
        return self

    @contextlib.contextmanager
    def of(self, step):
        outer = self.step
        try:  # an interrupt may come between any two lines
            self.step = step
            yield
        finally:
            self.step = outer


current = _Current()


def register() -> None:
    """Add sinkattn to transformers' registries; models use it if their config names it."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **more):
    """transformers' attention function: q, k, v (batch, heads, tokens, dim), new tokens only, not rotated."""
    step = current.step
    if step is None:
        raise RuntimeError(
            "a part of a patched model was called by itself; call the model that sinkattn.patch() was given. A model "
            "made from the config of a patched one asks for sinkattn too: model.set_attn_implementation('sdpa') first"
        )
    if dropout:
        raise RuntimeError("attention dropout is on: sinkattn runs inference only, call model.eval()")
    layer_idx = getattr(module, "layer_idx", None)
    unknown = [name for name, x in more.items() if isinstance(x, Tensor) and name not in HARMLESS]
    if unknown and step.is_probe:
        step.reached = True
        raise UnsupportedModelError(f"{step.where(layer_idx)}: its attention takes {unknown[0]!r}")
    if query.dtype != key.dtype or query.dtype != value.dtype:
        query, key, value = _one_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step.attend(layer_idx, query, key, value, attention_mask, scale, softcap or 0.0, s_aux), None


def _one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Under autocast some of q, k, v are float32: the matrix products of attention would cast them all."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    return [x.to(tensors[2].dtype) for x in tensors]


def mask(*args, mask_function=None, local_size=None, device=None, **kwargs):
    """transformers' mask function: the ops know what is visible, only the probe asks what the model shows."""
    step = current.step
    if step is None or mask_function is None:
        return None
    return step.mask(mask_function, local_size, device)
