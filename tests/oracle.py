"""The independent oracle: StreamingLLM by re-computation, with the model's own unpatched code and nothing of sinkattn.

For every token the model runs over as many tokens as a cache of S + W would hold, at positions 0, 1, 2, ..., with its
own masks and rotations. A hook hands every attention module what it was given when those tokens were current: the
stored inputs of the first S and the last W tokens. The last row of the logits is the answer. (arXiv 2309.17453, section
3.2.) Layers with a state of their own (state space, linear attention, convolutions) are handed their whole history.
"""

import inspect
import re

import torch

STATEFUL = re.compile("Mamba|DeltaNet|ShortConv|Lightning|LinearAttention|DeltaAttention|RecurrentBlock")


def mixing_modules(model) -> list[tuple[torch.nn.Module, bool]]:
    """Every module that mixes tokens, and whether it attends: they know their layer, and others hold none of them."""
    found = []
    for module in model.modules():
        name = type(module).__name__
        attends = "Attention" in name and not STATEFUL.search(name)
        if isinstance(getattr(module, "layer_idx", None), int) and (attends or STATEFUL.search(name)):
            found.append((module, attends))
    inner = {id(part) for module, _ in found for part in module.modules() if part is not module}
    return [(module, attends) for module, attends in found if id(module) not in inner and "Layer" not in type(module).__name__]


@torch.no_grad()
def streaming_logits(model, ids, sink_size: int, window_size: int):
    """Logits of an unpatched model for ids (1, n), token by token: (1, n, vocabulary)."""
    hooks, length = [], 0

    def remember(module, attends):
        history, first = [], next(iter(inspect.signature(module.forward).parameters))

        def before(_, args, kwargs):
            hidden = kwargs[first] if first in kwargs else args[0]
            history.append(hidden[:, -1:].clone())
            kept = history[:sink_size] + history[sink_size:][-window_size:] if attends else history
            hidden = torch.cat(kept, dim=1)
            if not attends:
                kwargs = {name: None if "mask" in name else value for name, value in kwargs.items()}
            return (args, {**kwargs, first: hidden}) if first in kwargs else ((hidden, *args[1:]), kwargs)

        def after(_, __, output):
            if attends:
                return output
            return (output[0][:, -length:], *output[1:]) if isinstance(output, tuple) else output[:, -length:]

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))

    for module, attends in mixing_modules(model):
        remember(module, attends)
    try:
        rows = []
        for t in range(ids.shape[1]):
            length = min(t + 1, sink_size + window_size)
            rows.append(model(input_ids=ids[:, t - length + 1 : t + 1], use_cache=False).logits[:, -1:])
        return torch.cat(rows, dim=1)
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(found, expected) -> float:
    """Largest difference of logits, relative to their spread."""
    return ((found.double() - expected.double()).abs().max() / expected.double().std()).item()
