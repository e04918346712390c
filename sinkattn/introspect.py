"""What can be read off a transformers model without running it, and how to leave a model as it was."""

import contextlib
import inspect
import os

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values")  # of the cache among arguments and outputs; a caller may use either


def picks_by_length(module: nn.Module, layer_type: str = "") -> bool:
    """Whether a rotary module picks its frequencies by the length of the text (dynamic NTK, longrope)."""
    kind = getattr(module, "rope_type", "default")
    kinds = [kind] if isinstance(kind, str) else [kind[layer_type]] if layer_type else list(kind.values())
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


@contextlib.contextmanager
def untouched(model: nn.Module):
    """Run the model in evaluation mode (dropout would look like a position), and leave it as it was."""
    states = [(module, _state(module)) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, state in states:
            _restore(module, state)


def rewind(model: nn.Module) -> None:
    """Let frequencies that are picked by length (dynamic NTK, longrope) start anew: what ran before does not matter."""
    for module in model.modules():
        for name in frequency_buffers(module):
            original = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
            if original is not None and hasattr(module, "original_max_seq_len"):
                setattr(module, name, original.clone())
                module.max_seq_len_cached = module.original_max_seq_len


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its ids. The weights of an offloaded model are elsewhere; accelerate's hooks know."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if device is None:
        return next(embedding.parameters()).device
    return torch.empty(0, device=device).device  # with its index


def embedded_ids(model: PreTrainedModel) -> int:
    """How many ids the model has an embedding for, whatever is wrapped around it (adapters)."""
    embedding = model.get_input_embeddings()
    return next(inner.num_embeddings for inner in embedding.modules() if hasattr(inner, "num_embeddings"))


def takes_positions(forward) -> bool:
    """Whether a model's forward takes ``position_ids``, by name or among its ``**kwargs``."""
    parameters = inspect.signature(forward).parameters.values()
    return any(x.name == "position_ids" or x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters)


def cache_name(forward) -> str:
    """What a model's forward calls the cache: "cache" from transformers 5.24 on, unless the model is older."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


CACHE = cache_name(GenerationMixin.prepare_inputs_for_generation)  # transformers' own


def named(name: str, kwargs: dict) -> dict:
    """The arguments with the cache, whichever of its names it came under, called `name`; without one if it is None."""
    cache = next((kwargs[x] for x in CACHE_NAMES if kwargs.get(x) is not None), None)
    others = {x: value for x, value in kwargs.items() if x not in CACHE_NAMES}
    return others if cache is None else {**others, name: cache}


def bodies_of(model: PreTrainedModel) -> list[nn.Module]:
    """What a model's head stands on: the parts that take the cache and hold all layers, outermost first.

    None for a model without a head (its own forward is all there is), or with its layers directly in it.
    """
    if model.base_model is model and model.get_output_embeddings() is None:
        return []
    names = (name.split(".") for name, x in model.named_modules() if isinstance(getattr(x, "layer_idx", None), int))
    path, part, bodies = os.path.commonprefix(list(names)), model, []
    for name in path:
        part = getattr(part, name)
        if isinstance(part, nn.ModuleList):
            break
        if inspect.signature(type(part).forward).parameters.keys() & CACHE_NAMES:
            bodies.append(part)
    return bodies


def counts_in_three(model: nn.Module) -> nn.Module | None:
    """The part of a model that counts time, height and width of images (M-RoPE), if it has one."""
    return next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)


def frequency_buffers(module: nn.Module) -> list[str]:
    """Names of the frequency tables that a rotary module uses (``inv_freq``, ``sliding_attention_inv_freq``)."""
    names = (name for name, buffer in module.named_buffers(recurse=False) if buffer.dim() == 1)
    return [name for name in names if name.endswith("inv_freq") and "original" not in name and "long" not in name]


def _state(module: nn.Module) -> tuple:
    """What a forward may change of one module: its attributes and, where it has frequencies, its buffers' content."""
    attributes = {k: dict(v) if k in ("_buffers", "_modules") else v for k, v in vars(module).items()}
    contents = {k: b.clone() for k, b in module._buffers.items() if b is not None and frequency_buffers(module)}
    return attributes, contents


def _restore(module: nn.Module, state: tuple) -> None:
    attributes, contents = state
    for name in vars(module).keys() - attributes.keys():
        delattr(module, name)
    for name, value in attributes.items():
        if name in ("_buffers", "_modules"):
            held = vars(module)[name]
            held.clear()
            held.update(value)
        else:
            vars(module)[name] = value
    for name, content in contents.items():
        buffer = module._buffers[name]
        with torch.inference_mode(buffer.is_inference()):  # those made in it can be written to in it alone
            buffer.copy_(content)
