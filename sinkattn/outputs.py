"""Outputs of a patched model: of several chunks put together, and without gradients."""

import torch

from .introspect import CACHE_NAMES


class _NoGradient(torch.autograd.Function):
    """Identity whose backward says why there is none."""

    @staticmethod
    def forward(ctx, output, parameter):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            "sinkattn runs inference only: there are no gradients through a patched model; remove() it first"
        )


def without_cache(output):
    return type(output)(**{name: x for name, x in output.items() if name not in CACHE_NAMES})


def joined(pieces: list):
    """One model output from the outputs of consecutive chunks: token dims are concatenated."""
    output = {}
    for name, last in pieces[-1].items():
        parts = [piece[name] for piece in pieces]
        if name in ("logits", "last_hidden_state"):
            output[name] = torch.cat(parts, dim=1)
        elif name == "hidden_states":
            output[name] = tuple(torch.cat(layers, dim=1) for layers in zip(*parts, strict=True))
        else:
            output[name] = last
    return type(pieces[-1])(**output)


def finished(output, model, return_dict: bool | None):
    """The output as the caller wants it, with gradients that say why there are none."""
    if torch.is_grad_enabled():
        parameter = next((p for p in model.parameters() if p.requires_grad), None)
        if parameter is not None:
            for name in ("loss", "logits", "last_hidden_state"):
                if output.get(name) is not None:
                    output[name] = _NoGradient.apply(output[name], parameter)
    return output.to_tuple() if return_dict is False else output
