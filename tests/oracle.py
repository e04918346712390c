"""The independent oracle: StreamingLLM by re-computation, with the model's own unpatched code and nothing of sinkattn.

For every token the model runs over as many tokens as a cache of S + W would hold, at positions 0, 1, 2, ..., with its
own masks and rotations. A hook hands every attention module what it was given when those tokens were current: the
stored inputs of the first S and the last W tokens. The last row of the logits is the answer. (arXiv 2309.17453, section
3.2.)
"""

import torch


def attention_modules(model) -> list:
    """The attention module of every layer, in order: the modules that know their layer and project to an output."""
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__ and index not in found:
            found[index] = module
    return [found[index] for index in sorted(found)]


@torch.no_grad()
def streaming_logits(model, ids, sink_size: int, window_size: int):
    """Logits of an unpatched model for ids (1, n), token by token: (1, n, vocabulary)."""
    modules = attention_modules(model)
    history = [[] for _ in modules]

    def remember(layer):
        def hook(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            history[layer].append(hidden[:, -1:].clone())
            kept = history[layer][:sink_size] + history[layer][sink_size:][-window_size:]
            hidden = torch.cat(kept, dim=1)
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": hidden}
            return (hidden, *args[1:]), kwargs

        return hook

    hooks = [m.register_forward_pre_hook(remember(i), with_kwargs=True) for i, m in enumerate(modules)]
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
