"""Wrong patches, which `patch` must refuse: what is computed is changed behind every guess that sinkattn makes.

They know sinkattn's insides: where those change, this file does. No other test here knows them.
"""

import contextlib

import pytest
import torch

from sinkattn import UnsupportedModelError, fuse, ops, patch
from sinkattn.reference import positions_of
from sinkattn.rope import Rope


@contextlib.contextmanager
def replaced(owner, name: str, make, reached: list):
    """Replace a function or method by ``make(original)``, which appends to `reached` when it is used."""
    original = vars(owner)[name]
    setattr(owner, name, make(original))
    try:
        yield reached
    finally:
        setattr(owner, name, original)


def sinks_elsewhere(by: int, after: int = 0):
    """Sinks are seen from `by` positions too far on, by tokens from `after` times the cache on."""
    reached = []

    def make(original):
        def table(rope, lengths, counts, tokens, capacity):
            reached.append(True)
            text = positions_of(lengths, counts, tokens)
            sink = text.clamp(max=capacity - 1) + by * (text >= after * capacity)
            return rope.table(torch.stack((text, sink), dim=-1))

        return table

    return replaced(Rope, "table_of_step", make, reached)


@contextlib.contextmanager
def scores_scaled(by: float):
    """All scores are `by` times as large."""
    reached = []

    def make(original):
        def run(*args, scale, **kwargs):
            reached.append(True)
            return original(*args, scale=by * scale, **kwargs)

        return run

    with replaced(ops, "decode", make, reached), replaced(ops, "prefill", make, reached):
        yield reached


def fused_otherwise(change):
    """What was found of a model is changed after all guesses: ``change(fused)`` returns the parts that it changed."""
    reached = []

    def make(original):
        def init(fused, *args, **kwargs):
            original(fused, *args, **kwargs)
            reached.extend(change(fused))

        return init

    return replaced(fuse.Fused, "__init__", make, reached)


def without_query_norm(fused):
    class Nothing:
        def __init__(self, norm):
            self.weight = norm.weight

        def __call__(self, x):
            return x

    found = [attention for attention in fused.attentions if attention.norms]
    for attention in found:
        attention.norms = [Nothing(attention.norms[0]), attention.norms[1]]
    return found


def shifted_otherwise(fused):
    """``w * x`` in place of ``(1 + w) * x``, or the other way round."""
    norms = [norm for attention in fused.attentions for norm in attention.norms or ()]
    norms += [norm for layer in fused.layers for norm in layer.norms]
    norms += [part.norm for part in fused.replaced if isinstance(part, fuse.FusedNorm)]
    norms = [norm for norm in norms if isinstance(norm, fuse.Norm)]
    for norm in {id(norm): norm for norm in norms}.values():
        norm.shift = 1.0 - norm.shift
    return norms


WRONG = {
    "sinks one nearer": lambda: sinks_elsewhere(-1),
    "sinks one farther": lambda: sinks_elsewhere(1),
    "sinks one farther past the wrap": lambda: sinks_elsewhere(1, after=1),
    "scale + 2 %": lambda: scores_scaled(1.02),
    "scale - 2 %": lambda: scores_scaled(0.98),
    "no q norm": lambda: fused_otherwise(without_query_norm),
    "norm of 1 + w": lambda: fused_otherwise(shifted_otherwise),
}


def refused(model, wrong: str, *args, **kwargs) -> None:
    """Fail unless `patch` refuses a wrong patch and leaves the model alone."""
    with WRONG[wrong]() as reached:
        try:
            patch(model, *args, **kwargs).remove()
        except UnsupportedModelError:
            assert reached, f"{wrong}: refused, but not for that: the change never came to bear"
            assert not hasattr(model, "_sinkattn")
            return
    assert reached, f"{wrong}: the change never came to bear; adapt it to sinkattn's insides"
    pytest.fail(f"{wrong}: served")
