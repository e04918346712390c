"""Attention modules and decoder layers of the usual form, computed by fewer kernels.

What a module does is guessed from the names of its parts, and the guess counts if the numbers that went from part to
part in a short text are those of the form: what one part gave is what the next one took. Nothing is known of types.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cache import SinkCache
from ..changes import Sight, traits
from ..observe import AttentionRecord, ModuleRecord, same
from ..step import Step
from .parts import ACTIVATIONS, FusedLinear, Norm, Place, Share, activation_of, product, takes_one

PROJECTIONS = (  # names of what makes q, k and v, as three or as one
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
)
OUTPUTS = ("o_proj", "out_proj", "dense")
QK_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
GATED = (("gate_proj", "up_proj"), ("gate_up_proj",))
Records = dict[nn.Module, ModuleRecord]


def open_step(cache) -> Step | None:
    """The step over a cache of ours that a module's computation belongs to."""
    return cache.step if isinstance(cache, SinkCache) else None


@dataclass
class Returned:
    """Puts an output into the shape that a module returns: alone, or as the first of a tuple of nothing else."""

    rest: tuple | None

    @classmethod
    def of(cls, record: ModuleRecord) -> "Returned | None":
        """As a module returned its output; None if it returned more."""
        if isinstance(record.like, Tensor):
            return cls(None)
        if isinstance(record.like, tuple) and all(x is None for x in record.like[1:]):
            return cls(record.like[1:])
        return None

    def __call__(self, output: Tensor):
        return output if self.rest is None else (output, *self.rest)


def _unusual(module: nn.Module, record: ModuleRecord) -> str | None:
    """What keeps any module from being computed otherwise, None if nothing does."""
    if record.calls > 1:
        return f"it is called {record.calls} times"
    if Returned.of(record) is None:
        return "it returns more than its output"
    if "forward" in vars(module):
        return "its forward was replaced"
    return "it is not given the cache" if record.cache_name is None else None


class Form:
    """What a module is computed by while a model is patched.

    module: whose forward is replaced; original: its own. cache_name: of the keyword that brings the cache.
    beside: modules elsewhere whose numbers it goes without, those that make rotary tables.
    is_valid: whether the module still is what it was, as `look` found; if not, it runs its own forward.
    """

    def __init__(self, module: nn.Module, record: ModuleRecord):
        self.module, self.original, self.cache_name = module, module.forward, record.cache_name
        self.returned, self.is_valid, self.seen = Returned.of(record), True, None
        self.ours: dict[nn.Module, Callable] = {}  # the forwards that sinkattn has put on modules, once it has
        self.beside: list[nn.Module] = []
        self.dropouts = [inner for inner in module.modules() if isinstance(inner, nn.modules.dropout._DropoutNd)]

    def __getstate__(self) -> dict:
        """Of a copy: valid if this is, at this moment; what it looks like is found out when all of it is there."""
        is_valid = self.is_valid and (self.seen is None or self._looks() == self.seen)
        return {**vars(self), "seen": None, "ours": {}, "is_valid": is_valid}

    def begin(self, ours: dict[nn.Module, Callable]) -> None:
        """From now on, whatever changes inside is a change. What was changed before it was copied stays so."""
        self.ours = ours
        self.seen = self._looks() if self.is_valid else []

    def _looks(self) -> list[tuple]:
        return [traits(inner, self.ours.get(inner)) for inner in (*self.module.modules(), *self.beside)]

    def look(self, sight: Sight) -> None:
        """Find out whether anything inside, or beside, has changed since it began."""
        self.is_valid = [sight.get(inner) for inner in (*self.module.modules(), *self.beside)] == self.seen

    def step(self, kwargs: dict, hidden: Tensor) -> Step | None:
        """The step that this form serves, None if the module's own forward has to."""
        if not self.is_valid or self.module.training or torch.is_autocast_enabled(hidden.device.type):
            return None
        if self.dropouts and any(inner.training and inner.p > 0 for inner in self.dropouts):
            return None
        return open_step(kwargs.get(self.cache_name))


class Attention(Form):
    """An attention module: projections, optional norms of q and k, attention over the cache, output projection."""

    def __init__(self, module: nn.Module, record: ModuleRecord, parts, output: str, norms, is_grouped: bool):
        super().__init__(module, record)
        attention: AttentionRecord = record.attentions[0]
        self.projection = FusedLinear([Place(module, name) for name in parts])
        self.output = FusedLinear([Place(module, output)])
        self.norms, self.is_grouped, self.layer_idx = norms, is_grouped, attention.layer_idx
        self.scale, self.softcap = attention.scale, attention.softcap
        self.learned = None  # name of the parameter that holds the learned logits
        (_, self.heads, _, self.dim), (_, self.kv_heads, _, self.v_dim) = attention.query.shape, attention.value.shape

    @classmethod
    def of(cls, module: nn.Module, records: Records) -> "Attention | str":
        """How to compute a module, or why it has not the usual form."""
        record = records[module]
        if len(record.attentions) != 1:
            return f"it attends {len(record.attentions)} times"
        if reason := _unusual(module, record):
            return reason
        has = lambda names: all(takes_one(getattr(module, name, None)) for name in names)  # noqa: E731
        projections = [names for names in PROJECTIONS if has(names)]
        pairs = [None, *(names for names in QK_NORMS if has(names))]
        for parts, output, pair in itertools.product(projections, (name for name in OUTPUTS if has([name])), pairs):
            norms = pair and [Norm.of(Place(module, name)) for name in pair]
            if norms and not all(norms):
                continue
            for is_grouped in (False, True) if len(parts) == 1 and not norms else (False,):
                attention = cls(module, record, parts, output, norms, is_grouped)
                if attention._explains(record.attentions[0], records):
                    return attention
        if not projections:
            return "its projections have unknown names"
        return f"its numbers are not those of {' or '.join(map(', '.join, projections))}, attention and an output"

    def _explains(self, found: AttentionRecord, records: Records) -> bool:
        """Whether the numbers went through the module as this form says.

        Some scale what they turn (YaRN), which goes into the scale.
        """
        module = self.module
        if not all(part in records for part in (*self.projection.parts, *self.output.parts)):
            return False
        hidden, output = records[module].last
        projected, outer = [records[part] for part in self.projection.parts], records[self.output.parts[0]]
        if not (self.projection.explains(records) and self.output.explains(records)):
            return False
        if not all(same(x.last[0], hidden) for x in projected) or not same(outer.last[1], output):
            return False
        tokens = hidden.shape[1]
        if not same(found.attended[:, -tokens:].flatten(2), outer.last[0]):
            return False
        try:
            q, k, v = self._heads_of(torch.cat([x.last[1] for x in projected], dim=-1), self._normed(records))
        except RuntimeError:  # sizes that do not fit: another form
            return False
        query, key, value = (x[:, :, -tokens:] for x in (found.query, found.key, found.value))
        if q.shape != query.shape or k.shape != key.shape or not same(v, value):
            return False
        factor = ((query * q).sum() / (q * q).sum()).item()
        if abs(factor - 1) > 1e-6:
            if not all(torch.allclose(x * factor, y, rtol=1e-4, atol=0) for x, y in ((q, query), (k, key))):
                return False
            self.scale = found.scale * factor**2
        elif not (same(q, query) and same(k, key)):
            return False
        return self._find_learned(found.learned_logits)

    def _find_learned(self, logits: Tensor | None) -> bool:
        if logits is None:
            return True
        self.learned = next((name for name, x in self.module._parameters.items() if x is logits), None)
        return self.learned is not None

    def _normed(self, records: Records) -> Callable | None:
        """In place of the norms what they gave: they are looked at by themselves, in float64."""
        if self.norms is None:
            return None

        def given(i: int, x: Tensor) -> Tensor:
            record = records[self.norms[i].place.part]
            taken, gave = record.hidden, record.output
            if taken.dim() > 3 and taken.shape[1:3] != x.shape[1:3] and taken.shape[1] == x.shape[2]:
                taken, gave = taken.transpose(1, 2), gave.transpose(1, 2)  # heads first
            taken, gave = (y[:, -x.shape[1] :] for y in (taken, gave))
            return gave if same(x, taken) else x.new_full(x.shape, torch.nan)

        return given

    def _heads_of(self, y: Tensor, normed: Callable | None) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, tokens, rows of the projection) to q, k and v, (batch, heads, tokens, dim) each.

        normed: ``normed(0, q)`` and ``normed(1, k)`` are q and k after their norms, None without.
        """
        batch, tokens = y.shape[:2]
        if self.is_grouped:  # the queries of a key head, the key, the value; then those of the next key head
            y = y.view(batch, tokens, self.kv_heads, -1, self.dim)
            q, k, v = y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k, v = y.split([self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.v_dim], dim=-1)
        is_whole = normed is not None and self.norms[0].weight.shape[-1] != self.dim  # over all heads together
        if is_whole:
            q, k = normed(0, q), normed(1, k)
        q, k, v = (x.view(batch, tokens, -1, dim) for x, dim in ((q, self.dim), (k, self.dim), (v, self.v_dim)))
        if normed is not None and not is_whole:
            q, k = normed(0, q), normed(1, k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, step: Step, y: Tensor) -> Tensor:
        """From what the projection gave to what the output projection takes, (batch, tokens, heads * v_dim)."""
        q, k, v = self._heads_of(y, None if self.norms is None else lambda i, x: self.norms[i](x))
        learned = None if self.learned is None else getattr(self.module, self.learned)
        return step.attend(self.layer_idx, q, k, v, None, self.scale, self.softcap, learned).flatten(2)

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        step = self.step(kwargs, hidden_states)
        if step is None:
            return self.original(hidden_states, *args, **kwargs)
        return self.returned(self.output(self.attend(step, self.projection(hidden_states))))


class Layer(Form):
    """A decoder layer: ``h = x + attention(norm(x))``, then ``h + down(act(gate(norm(h))) * up(norm(h)))``.

    stack: `Stack` that it is one of the layers of, or None.
    """

    stack = None

    def __init__(self, module, record: ModuleRecord, attention: Attention, norms, mlp: nn.Module, gated, activation):
        super().__init__(module, record)
        self.attention, self.norms, self.activation = attention, norms, activation
        self.gate_up = FusedLinear([Place(mlp, name) for name in gated])
        self.down = FusedLinear([Place(mlp, "down_proj")])
        self.products = attention.projection, attention.output, self.gate_up, self.down

    @classmethod
    def of(cls, module: nn.Module, records: Records, attention: Attention) -> "Layer | str":
        """How to compute a module, or why it has not the usual form. attention: that of its attention module."""
        record = records.get(module)
        if reason := "its forward was not called" if record is None else _unusual(module, record):
            return reason
        norms = [Norm.of(Place(module, name)) for name in LAYER_NORMS]
        if not all(norms):
            return f"{' and '.join(LAYER_NORMS)} are not both RMSNorms"
        for mlp in module.children():
            has = lambda names: all(Share.of(getattr(mlp, name, None)) for name in names)  # noqa: B023, E731
            names = next((names for names in GATED if has(names)), None)
            activation = activation_of(mlp)
            if names is None or activation is None or not has(["down_proj"]):
                continue
            layer = cls(module, record, attention, norms, mlp, names, activation)
            if layer._explains(records):
                return layer
        return "no part of it is a gated MLP whose numbers are of the usual form"

    def _explains(self, records: Records) -> bool:
        """Whether the numbers went through the layer as this form says."""
        parts = [self.norms[0].place.part, self.attention.module, self.norms[1].place.part, *self.gate_up.parts]
        if not all(part in records for part in (*parts, *self.down.parts)):
            return False
        if not (self.gate_up.explains(records) and self.down.explains(records)):
            return False
        hidden, output = records[self.module].last
        (before, normal), (taken, attended), (middle, normed), *gated = (records[part].last for part in parts)
        inner, added = records[self.down.parts[0]].last
        gate, up = torch.cat([y for _, y in gated], dim=-1).chunk(2, dim=-1)
        pairs = [(hidden, before), (normal, taken), (hidden + attended, middle), (middle + added, output)]
        pairs += [(normed, x) for x, _ in gated]
        return all(same(a, b) for a, b in pairs) and torch.allclose(
            ACTIVATIONS[self.activation](gate) * up, inner, rtol=1e-4, atol=1e-6 * float(inner.abs().max())
        )

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        step = self.step(kwargs, hidden_states)
        inner = self.attention
        if step is None or not inner.is_valid or inner.module.training or any(x.weight is None for x in self.products):
            return self.original(hidden_states, *args, **kwargs)
        stacked = None if self.stack is None else self.stack(self, step, hidden_states)
        if stacked is not None:
            return self.returned(stacked)
        x = hidden_states.flatten(0, 1)
        y = product(x, self.attention.projection, self.norms[0]).unflatten(0, hidden_states.shape[:2])
        x = product(self.attention.attend(step, y).flatten(0, 1), self.attention.output, residual=x)
        gated = product(x, self.gate_up, self.norms[1], activation=self.activation)
        return self.returned(product(gated, self.down, residual=x).view_as(hidden_states))
