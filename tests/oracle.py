"""The independent oracle: StreamingLLM by re-computation, with the model's own unpatched code and nothing of sinkattn.

For every token the model runs over as many tokens as a cache of S + W would hold, at positions 0, 1, 2, ..., with its
own masks and rotations. A hook hands every attention module what it was given when those tokens were current: the
stored inputs of the first S and the last W tokens. The last row of the logits is the answer. (arXiv 2309.17453, section
3.2.) Layers with a state of their own (state space, linear attention, convolutions) are handed their whole history.
"""

import inspect
import re

import torch

STATEFUL = re.compile(
    "Mamba|Mixer|DeltaNet|ShortConv|Lightning|(?<!Kimi)LinearAttention|DeltaAttention|RecurrentBlock|CCAProj"
)


def mixing_modules(model) -> list[tuple[torch.nn.Module, bool]]:
    """Every module that mixes tokens, and whether it attends; they know their layer. State may lie inside attention."""
    found = []
    for module in model.modules():
        name = type(module).__name__
        keeps_state = bool(STATEFUL.search(name))
        knows = (
            isinstance(getattr(module, "layer_idx", None), int)
            or "layer_idx" in inspect.signature(module.forward).parameters
        )
        if knows and (keeps_state or re.search("Attention|MLA", name)):
            inside = any(other is module for outer, held in found if held != keeps_state for other in outer.modules())
            if "DecoderLayer" not in name and (keeps_state or not inside):
                found.append((module, keeps_state))
    return [(module, not keeps_state) for module, keeps_state in found]


@torch.no_grad()
def streaming_logits(model, ids, sink_size: int, window_size: int, run=None, dense: int = 0):
    """Logits of an unpatched model for ids (1, n), token by token: (1, n, vocabulary).

    run: what gives the logits of token t over as many tokens as a cache holds, ``run(t, length)``; None: ids alone.
    dense: tokens of a prompt that see all before them; what follows it sees of it the first S and the last W - 1 on.
    """
    hooks, calls, is_prompt = [], {}, False

    def cut(x, dim=1):
        if x.shape[dim] <= sink_size + window_size:
            return x
        return torch.cat((x.narrow(dim, 0, sink_size), x.narrow(dim, x.shape[dim] - window_size, window_size)), dim)

    def remember(module, attends):
        histories, first = [], next(iter(inspect.signature(module.forward).parameters))

        def before(_, args, kwargs):
            hidden = kwargs[first] if first in kwargs else args[0]
            call = calls[module] = calls.get(module, -1) + 1  # looped models run a module several times
            if call == len(histories):
                histories.append(hidden[:, :0])
            histories[call] = torch.cat((histories[call], hidden if is_prompt else hidden[:, -1:]), dim=1)
            hidden = cut(histories[call]) if attends and not is_prompt else histories[call]
            if not attends:
                kwargs = {name: None if "mask" in name else value for name, value in kwargs.items()}
            return (args, {**kwargs, first: hidden}) if first in kwargs else ((hidden, *args[1:]), kwargs)

        def after(_, __, output):
            if attends or is_prompt:
                return output
            if isinstance(output, tuple):
                return tuple(cut(x) if isinstance(x, torch.Tensor) and x.dim() > 2 else x for x in output)
            return cut(output)

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))

    for module, attends in mixing_modules(model):
        remember(module, attends)
    try:
        rows = []
        if dense:
            is_prompt = True
            rows.append(model(input_ids=ids[:, :dense], use_cache=False).logits)
            is_prompt = False
        for t in range(dense, ids.shape[1]):
            calls.clear()
            length = min(t + 1, sink_size + window_size)
            ids_held = ids[:, t - length + 1 : t + 1]
            logits = model(input_ids=ids_held, use_cache=False).logits if run is None else run(t, length)
            rows.append(logits[:, -1:])
        return torch.cat(rows, dim=1)
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(found, expected) -> float:
    """Largest difference of logits, relative to their spread."""
    return ((found.double() - expected.double()).abs().max() / expected.double().std()).item()
