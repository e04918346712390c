"""Attention, decoder layers and linear layers of the usual form, computed by fewer kernels while a model is patched.

    forms.py   Attention: q, k and v as one product, attention over the cache (which turns them by itself), output
               Layer: norm, attention, residual, norm, gated MLP, residual; five kernels for few rows
    stack.py   Stack: all layers and the head as one kernel, for one token of few rows
    small.py   any other linear layer, for few rows; any other RMSNorm; the module that makes rotary tables
    parts.py   what they are made of, held by its place

Weights that share their input are laid next to each other in memory, and the model's parameters become parts of that:
nothing is held twice, and `Fused.undo` gives each its own memory back.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable

from torch import nn

from ..changes import Sight, sight
from ..introspect import frequency_buffers
from ..observe import Observer
from .forms import Attention, Form, Layer
from .parts import FusedLinear, Norm, Place, is_plain
from .small import ConstantRotary, FewRowsLinear, FusedNorm
from .stack import Stack

logger = logging.getLogger(__name__)


class Fused:
    """What is computed otherwise on a model: found when made, in force after `apply`, and gone after `undo`.

    what: "model", "layers" or "attention". observer: of a short text that has run through the model.
    """

    def __init__(self, model: nn.Module, what: str, observer: Observer):
        self.model = model
        attending = [module for module, record in observer.of.items() if record.attentions]
        self.attentions = self._usual(Attention, [(module, observer.of) for module in attending])
        of = {attention.module: attention for attention in self.attentions}
        self.rotaries = [ConstantRotary(module) for module in model.modules() if _is_rotary(module)]
        self.layers, others = [], [*self.rotaries]
        if what != "attention":
            pairs = [(module, of[child]) for module in model.modules() for child in module.children() if child in of]
            self.layers = self._usual(Layer, [(module, observer.of, attention) for module, attention in pairs])
        self.linears: list[FusedLinear] = [x for a in self.attentions for x in (a.projection, a.output)]
        self.linears += [x for layer in self.layers for x in (layer.gate_up, layer.down)]
        if what != "attention":
            taken = {part for linear in self.linears for part in linear.parts}
            others += [FewRowsLinear(module) for module in model.modules() if is_plain(module) and module not in taken]
            places = [Place(owner, name) for owner in model.modules() for name, _ in owner.named_children()]
            norms = {p.part: p for p in places if "RMSNorm" in type(p.part).__name__}
            others += [FusedNorm(m, norm) for m, place in norms.items() if (norm := Norm.of(place)) is not None]
        self.replaced = [*self.attentions, *self.layers, *others]
        self.stack = Stack.of(self.layers, others, observer.of) if what == "model" else None
        for layer in self.layers:
            layer.stack = self.stack
        beside = [module for module in model.modules() if frequency_buffers(module)]
        for form in (*self.attentions, *self.layers):
            form.beside = beside

    def _usual(self, form: type[Form], modules: list[tuple]) -> list:
        """Those modules that have a form; modules: what `Form.of` takes. The log is told why others have not."""
        names = {module: name for name, module in self.model.named_modules()}
        found = [(module, form.of(module, *known)) for module, *known in modules]
        for module, reason in found:
            if isinstance(reason, str):
                logger.debug("%s (%s) is not fused: %s", names[module], type(module).__name__, reason)
        return [x for _, x in found if not isinstance(x, str)]

    @property
    def forwards(self) -> dict[nn.Module, Callable]:
        """What `apply` has put on modules."""
        return {new.module: new.forward for new in self.replaced}

    def apply(self) -> None:
        for module, forward in self.forwards.items():
            module.forward = forward
        self.begin()
        self.look(sight(self.model, self.forwards))

    def begin(self) -> None:
        """From now on, whatever changes is a change: once `apply` is done, and in a copy once its modules are there."""
        ours = self.forwards
        for form in (*self.attentions, *self.layers):
            form.begin(ours)

    def look(self, seen: Sight) -> None:
        """Find out what has changed in the model, and lay weights side by side that are not.

        A module in which anything else was exchanged, hooked or set runs its own forward from now on, until that is
        undone.
        """
        for form in (*self.attentions, *self.layers):
            form.look(seen)
        for rotary in self.rotaries:
            rotary.look(seen)
        uses = Counter(id(x) for module in self.model.modules() for x in module.parameters(recurse=False))
        shared = {x for x, count in uses.items() if count > 1}
        for linear in self.linears:
            linear.join(shared)

    def undo(self) -> None:
        for new in self.replaced:
            if vars(new.module).get("forward") == new.forward:
                del new.module.forward
        for linear in self.linears:
            linear.undo()


def _is_rotary(module: nn.Module) -> bool:
    names = list(inspect.signature(module.forward).parameters)[:2]
    return names == ["x", "position_ids"] and bool(frequency_buffers(module)) and "forward" not in vars(module)
