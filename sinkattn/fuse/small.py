"""Single modules computed otherwise while a model is patched: they read what their module holds whenever they run."""

import torch
from torch import Tensor, nn

from .. import ops
from ..changes import Sight
from ..interface import current
from ..rings import FEW
from ..step import Step
from .parts import Norm


def _ahead():
    """The `Ahead` of the step under way, if there is one."""
    return None if torch.compiler.is_compiling() else getattr(current.step, "ahead", None)


class FusedNorm:
    """An RMSNorm as it is, but on a GPU one kernel."""

    def __init__(self, module: nn.Module, norm: Norm):
        self.module, self.original, self.norm = module, module.forward, norm

    def forward(self, x: Tensor) -> Tensor:
        is_slower = not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")
        y, ahead = self.original(x) if is_slower else self.norm(x), _ahead()
        if ahead is not None:
            ahead.saw_norm(self.module, x, y)
        return y


class FewRowsLinear:
    """A linear layer as it is, but few rows by `ops.linear`."""

    def __init__(self, module: nn.Linear):
        self.module, self.original = module, module.forward

    def forward(self, input: Tensor) -> Tensor:
        weight = self.module.weight
        if torch.is_grad_enabled() or type(weight) is not nn.Parameter or torch.is_autocast_enabled(input.device.type):
            return self.original(input)
        ahead = _ahead()
        if ahead is not None and (logits := ahead.logits_of(self.module, input)) is not None:
            return logits
        rows = input.flatten(0, -2)
        if not ops.takes_linear(rows, weight):
            return self.original(input)
        return ops.linear(rows.contiguous(), weight, self.module.bias).unflatten(0, input.shape[:-1])


class ConstantRotary:
    """A rotary module: all positions are 0 in a patched model, so for a few tokens it says the same every time.

    What it said is kept for as long as the model is patched, since CUDA graphs go on reading it: one pair of small
    tensors for every dtype, device and number of rows and tokens.
    """

    def __init__(self, module: nn.Module):
        self.module, self.original, self.said, self.seen = module, module.forward, {}, None

    def __getstate__(self) -> dict:
        return {**vars(self), "said": {}, "seen": None}

    def look(self, sight: Sight) -> None:
        """Forget what it said, if anything of it has changed since."""
        if (now := sight.get(self.module)) != self.seen:
            self.said, self.seen = {}, now

    def forward(self, x: Tensor, position_ids: Tensor, *args, **kwargs):
        step = current.step
        is_few = isinstance(step, Step) and step.tokens <= FEW and position_ids.shape[-1] == step.tokens
        is_text = is_few and position_ids.shape[-2:-1] in ((), (1,), step.rows.lengths.shape)  # and not a picture
        if not is_text or torch.compiler.is_compiling():
            return self.original(x, position_ids, *args, **kwargs)
        key = (x.dtype, x.device, position_ids.shape, *args, *kwargs.items())
        if key in self.said:
            return self.said[key]
        output = self.original(x, position_ids, *args, **kwargs)
        if not x.is_cuda or not torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            self.said = {**self.said, key: output}
        return output
