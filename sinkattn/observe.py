"""What every module of a model takes and gives while a short text goes through it."""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

TOKENS = 3  # the last tokens of a text, which is what is kept of modules without children


@dataclass
class AttentionRecord:
    """One attention of a step: where it happened, and what went in and came out.

    query, key, value: (batch, heads, T, dim), not rotated. attended: (batch, T, heads, v_dim). learned_logits: the
    tensor itself.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    attended: Tensor
    scale: float
    softcap: float
    learned_logits: Tensor | None


@dataclass
class ModuleRecord:
    """What one module took and gave, at its first call.

    hidden: its first tensor, (batch, T, in_features). output: the first tensor it returned; like, all of it. Of modules
    without children the last `TOKENS` alone, unless heads have a dim of their own. calls: of the module. cache_name: of
    the keyword that brought the cache, if any. attentions: what attended inside it, and inside none of its children.
    """

    hidden: Tensor
    cache_name: str | None
    calls: int = 1
    output: Tensor | None = None
    like: object = None
    attentions: list[AttentionRecord] = field(default_factory=list)

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """hidden and output of the last `TOKENS`."""
        return self.hidden[:, -TOKENS:], self.output[:, -TOKENS:]


class Observer:
    """Notes what every module of a model does while it runs in `over`.

    Attributes: of (`ModuleRecord` by module), attending ((layer index, call) to the module that attended then).
    """

    def __init__(self, model: nn.Module):
        self.model, self.cache = model, None
        self.of: dict[nn.Module, ModuleRecord] = {}
        self.attending: dict[tuple[int, int], nn.Module] = {}
        self._within: list[nn.Module] = []

    @contextlib.contextmanager
    def over(self, cache):
        """A context in which the model runs over a cache, and is observed."""
        hooks = []
        for module in self.model.modules():
            hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after))
        self.cache, cache.observer = cache, self
        try:
            yield
        finally:
            self.cache, cache.observer = None, None
            for hook in hooks:
                hook.remove()

    def _before(self, module, args, kwargs) -> None:
        self._within.append(module)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if module in self.of:
            self.of[module].calls += 1
        elif isinstance(hidden, Tensor) and hidden.dim() > 1:
            name = next((name for name, x in kwargs.items() if x is self.cache), None)
            self.of[module] = ModuleRecord(_kept(module, hidden), name)

    def _after(self, module, args, output) -> None:
        self._within.pop()
        record = self.of.get(module)
        if record is not None and record.output is None:
            first = output[0] if isinstance(output, tuple) else output
            record.output = _kept(module, first) if isinstance(first, Tensor) else None
            record.like = output

    def attended(self, key: tuple[int, int], record: AttentionRecord) -> None:
        """Called by a `Step`: something has attended. key: (layer index, how often that layer attended before)."""
        for module in reversed(self._within):  # the innermost that makes the keys, and does not only take them
            if module in self.of and next(module.parameters(), None) is not None:
                self.attending[key] = module
                self.of[module].attentions.append(record)
                return


def _kept(module: nn.Module, x: Tensor) -> Tensor:
    x = x if x.dim() > 3 or next(module.children(), None) is not None else x[:, -TOKENS:]
    return x.detach().clone()  # somebody may go on to write it


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two tensors are the same number for number, but for the last bits of a function like exp."""
    if found is None or expected is None:
        return False
    if (found.shape, found.dtype, found.device) != (expected.shape, expected.dtype, expected.device):
        return False
    room = 8 * torch.finfo(expected.dtype).eps * expected.abs()
    return bool(((found - expected).abs() <= room).all())
