"""What stands in for cache and attention while a model is probed, and notes what every attention is given.

It holds no text: a token attends to itself alone, so attention gives back the values. Only watched attention (watch.py)
also gets a short text, to show its scores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .rope import UnsupportedModelError
from .watch import Watch


@dataclass
class ProbeRecord:
    """One attention in the probe: query, key and value (rows, heads, T, dim) and what its mask said."""

    where: str
    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None  # see `Recorder.mask`; None for a mask of its own
    logits: Tensor | None = None
    heads_first: bool = True


class Recorder(DynamicCache):
    """Stands in for cache and attention during the probe: hands keys through, notes q, k, v, and returns v.

    Attributes: seen, what every attention did, by (layer index, how often that layer attended before in the step);
    reached, whether any did.
    """

    is_probe = True

    def __init__(self, model: PreTrainedModel, capacity: int, watches: bool):
        super().__init__(config=model.config)  # for layers with a state of their own
        knowing = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        knowing.sort(key=lambda m: "Attention" in type(m).__name__)  # the layer itself may know its index too
        self.modules = {m.layer_idx: type(m).__name__ for m in knowing}
        self.capacity, self.watches = capacity, watches
        self.reports: dict[int, int] = {}  # how much text layers say they hold, if not none
        self.forget()

    def forget(self) -> None:
        self.seen: dict[tuple[int, int], ProbeRecord] = {}
        self.reached = False
        self.updated: int | None = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.updated is not None:
            raise UnsupportedModelError(f"{self.where(self.updated)}: its keys go by the attention interface")
        if self.watches:
            return _Recording(self, layer_idx, key_states, value_states).handed_out()
        self.updated = layer_idx
        return key_states, value_states

    def update_indexer(self, indexer_key_states, layer_idx, *args, **kwargs):
        self.reached = True
        raise UnsupportedModelError(
            f"{self.where(layer_idx)}: an indexer chooses what its attention sees (sparse attention, DSA)"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.reports.get(layer_idx, 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def where(self, layer_idx: int) -> str:
        return f"{self.modules.get(layer_idx, 'attention')}, layer {layer_idx}"

    def note(self, layer_idx: int, query, key, value, window: int | None) -> ProbeRecord:
        if query.dim() != 4 or key.dim() != 4 or query.shape[2] != key.shape[2]:
            raise UnsupportedModelError(
                f"{self.where(layer_idx)}: it attends to something else than the text before it"
            )
        self.reached = True
        call = sum(index == layer_idx for index, _ in self.seen)
        seen = ProbeRecord(self.where(layer_idx), *(x.detach() for x in (query, key, value)), window)
        return self.seen.setdefault((layer_idx, call), seen)

    def attend(self, layer_idx, query, key, value, mask, *_):
        layer_idx, self.updated = layer_idx if self.updated is None else self.updated, None
        if layer_idx is None:
            raise UnsupportedModelError("an attention module without a layer_idx: whose keys it sees cannot be told")
        own = mask is None or mask.numel() != 1
        self.note(layer_idx, query, key, value, None if own else int(mask.item()))
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2).contiguous()

    def mask(self, mask_function, local_size: int | None, device) -> Tensor:
        """What the layer's mask lets through: its window as a one-element tensor, 0 for all, -1 for another pattern.

        A query in the cache never stands further than C - 1 from the start, so that is where the mask is asked.
        """
        zero = torch.zeros((), dtype=torch.int64, device=device)
        windows = {}
        for query in {self.capacity - 1, max(self.capacity - 2, 0)}:
            distance = torch.arange(-1, query + 1, device=device)
            try:
                visible = mask_function(zero, zero, zero + query, query - distance)
            except IndexError:  # it looks at what the tokens are (images), and knows these few alone
                visible = (distance >= 0) & (distance < (local_size or len(distance)))
            visible = torch.as_tensor(visible, device=device).expand(distance.shape).tolist()
            causal = not visible[0] and visible[1:] == sorted(visible[1:], reverse=True)
            windows[query] = sum(visible) if causal else -1
        window = max(windows.values())
        if any(shown != min(window, query + 1) for query, shown in windows.items()):
            window = -1
        return torch.tensor([[[[0 if window >= self.capacity else window]]]], device=device)


class _Recording(Watch):
    """Watched attention in the probe: one token a row gives v; several are computed in float64, and looked at."""

    def __init__(self, recorder: Recorder, layer_idx: int, key: Tensor, value: Tensor):
        super().__init__(layer_idx, key, value)
        self.recorder, self.found = recorder, None

    def scores(self, product, args, kwargs):
        wide = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        return product(*map(wide, args), **{name: wide(x) for name, x in kwargs.items()})

    def logits(self, logits):
        self.found = logits.detach().double().reshape(*self.query.shape[:3], -1)

    def output(self, found):
        seen = self.recorder.note(self.layer_idx, self.query, self.key, self.value, 0)
        if self.found is None:
            self.refuse("has no softmax")
        seen.logits = self.found
        group = self.query.shape[1] // self.value.shape[1]
        heads_first = self.found.softmax(-1) @ self.value.double().repeat_interleave(group, 1)
        if heads_first.numel() != found.numel():
            self.refuse("changes its shape")
        for seen.heads_first, expected in ((True, heads_first), (False, heads_first.transpose(1, 2))):
            error = (expected.reshape(found.shape) - found).abs().max() / expected.abs().max()
            if error < 1e-4 + 8 * torch.finfo(found.dtype).eps:
                return found
        self.refuse("does more than softmax(scores) times values")

    def refuse(self, what):
        raise UnsupportedModelError(
            f"{self.recorder.where(self.layer_idx)}: between cache and output, attention {what}"
        )
