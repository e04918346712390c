"""Attention, decoder layers and linear layers of the usual form, computed by fewer kernels while a model is patched.

What a module does is guessed from the names of its parts, and the guess counts if it repeats what the module itself did
with a short text: its query, key and value, and its output. Everything else runs as it is. Nothing is known of types.

    Attention   q, k and v as one product, attention over the cache (which turns them by itself), output product
    Layer       norm, attention, residual, norm, gated MLP, residual: five kernels for few rows
    Few, Normed any other linear layer, for few rows; any other RMSNorm
    Still       the module that makes rotary tables, which are not used or always the same

Weights that share their input are laid next to each other in memory, and the model's parameters become views of that:
nothing is held twice, and `Joined.undo` gives each its own memory back.
"""

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .cache import SinkCache
from .introspect import frequency_buffers
from .probe import Recorder
from .step import Step

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
ACTIVATIONS: dict[str, Callable] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for the rounding of another order of sums."""
    if found.shape != expected.shape:
        return False
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    return bool(error <= 8 * torch.finfo(expected.dtype).eps ** 0.9)


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer and nothing else: not quantised, hooked, split over devices or replaced."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.weight.data) is Tensor
        and module.weight.device.type != "meta"
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in vars(module)
    )


def _takes_one(module) -> bool:
    """Whether something is a module that needs one input and no more."""
    if not isinstance(module, nn.Module):
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD for x in parameters) == 1


class Joined:
    """Linear layers with one input as one product: ``y = x [W1; W2; ...]^T + [b1; b2; ...]``.

    weight (rows, in_features), bias (rows,) or None: once `join` was called, and if all parts are plain; else None and
    the parts are called one by one. is_plain: whether they still are, as `Fused.look` found.
    """

    def __init__(self, parts: list[nn.Module]):
        self.parts, self.weight, self.bias, self.is_plain = parts, None, None, True

    def join(self, shared: set[int]) -> None:
        """Lay the weights side by side. shared: ids of parameters that several modules have: they stay in place."""
        self.weight = self.bias = None
        if not all(is_plain(part) for part in self.parts):
            return
        tensors = [(part.weight, part.bias) for part in self.parts]
        kinds = {(w.dtype, w.device, b is None) for w, b in tensors}
        if len(kinds) > 1 or (len(tensors) > 1 and any(id(x) in shared for pair in tensors for x in pair)):
            return
        self.weight = self._side_by_side([weight for weight, _ in tensors])
        self.bias = None if tensors[0][1] is None else self._side_by_side([bias for _, bias in tensors])

    @staticmethod
    def _side_by_side(parameters: list[nn.Parameter]) -> Tensor:
        """The parameters' content in one tensor, (rows, ...), of which they become views."""
        if len(parameters) == 1:
            return parameters[0].data
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat([x.data for x in parameters])
        for x, piece in zip(parameters, whole.split([len(x) for x in parameters]), strict=True):
            x.data = piece
        return whole

    def undo(self) -> None:
        """Give every parameter memory of its own again, with the same bits."""
        if self.is_joined and len(self.parts) > 1:
            for part in self.parts:
                for x in (part.weight, part.bias):
                    if x is not None:
                        x.data = x.data.clone()
        self.weight = self.bias = None

    def __deepcopy__(self, memo) -> "Joined":
        return Joined([copy.deepcopy(part, memo) for part in self.parts])  # copied parameters are no views

    @property
    def is_joined(self) -> bool:
        """Whether one tensor holds what the parts multiply by: somebody may have moved them, or added a hook."""
        if self.weight is None or not self.is_plain or torch.compiler.is_compiling():
            return self.weight is not None and self.is_plain
        return self.parts[0].weight.data_ptr() == self.weight.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., sum of out_features)."""
        if not self.is_joined:
            return torch.cat([part(x) for part in self.parts], dim=-1)
        return product(x.flatten(0, -2), self).unflatten(0, x.shape[:-1])


@dataclass
class Norm:
    """An RMSNorm over the last dim: ``(shift + weight) * x / sqrt(mean(x^2) + eps)``."""

    module: nn.Module
    eps: float
    shift: float

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @classmethod
    def of(cls, module: nn.Module | None) -> "Norm | None":
        """What a module does, if that is an RMSNorm."""
        weight = getattr(module, "weight", None)
        eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
        if type(weight) is not nn.Parameter or weight.dim() != 1 or not isinstance(eps, float):
            return None
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        if not _takes_one(module) or len(inspect.signature(module.forward).parameters) > 1:  # some take a gate too
            return None
        x = torch.linspace(-2, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(2, -1)
        for norm in (cls(module, eps, 0.0), cls(module, eps, 1.0)):
            if _agree(norm(x), module(x)):
                return norm
        return None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight + self.shift if self.shift else self.weight
        return F.rms_norm(x, weight.shape, weight, self.eps)


def product(x: Tensor, linear: "Joined | nn.Linear", norm: Norm | None = None, residual=None, activation="") -> Tensor:
    """`ops.linear`, by torch where it does not take the call. x: (rows, in_features)."""
    weight, bias = linear.weight, linear.bias
    if ops.takes_linear(x, weight):
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        if norm is not None and x.dtype == torch.float16 and len(x) > ops.FEW_ROWS:
            x, norm = norm(x), None  # x times the norm's weight may be too large for float16
        norms = {} if norm is None else dict(norm_weight=norm.weight, norm_eps=norm.eps, norm_shift=norm.shift)
        return ops.linear(x, weight, bias, **norms, residual=residual, activation=activation)
    y = F.linear(x if norm is None else norm(x), weight, bias)
    if activation:
        gate, up = y.chunk(2, dim=-1)
        y = ACTIVATIONS[activation](gate) * up
    return y if residual is None else residual + y


@dataclass
class ModuleRecord:
    """What one module did with a short text at position 0.

    hidden, output: (1, tokens, hidden_size). cache_name: of the keyword that brought the cache, None for none. like:
    everything that it returned. Of attention: query, key, value (1, heads, tokens, dim), attended (1, tokens, heads,
    v_dim), and what else went with them.
    """

    hidden: Tensor
    cache_name: str | None
    output: Tensor | None = None
    like: object = None
    calls: int = 1
    layer_idx: int | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    attended: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    learned_logits: Tensor | None = None

    def returned(self) -> Callable | None:
        """What puts an output into the shape that the module returns, None if there is more in it than the output."""
        if isinstance(self.like, Tensor):
            return lambda output: output
        if isinstance(self.like, tuple) and all(x is None for x in self.like[1:]):
            rest = self.like[1:]
            return lambda output: (output, *rest)
        return None


class Observer(Recorder):
    """A `Recorder` that notes what every attention and every layer took and gave, by module."""

    def __init__(self, model: nn.Module, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.of: dict[nn.Module, ModuleRecord] = {}
        self._within: list[nn.Module] = []
        self._hooks = []
        names = {*OUTPUTS, LAYER_NORMS[0]}
        for module in model.modules():
            if names & {name for name, _ in module.named_children()}:
                self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._after))

    def _before(self, module, args, kwargs):
        self._within.append(module)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if module in self.of:
            self.of[module].calls += 1
        elif isinstance(hidden, Tensor):
            self.of[module] = ModuleRecord(
                hidden.detach(), next((name for name, x in kwargs.items() if x is self), None)
            )

    def _after(self, module, args, output):
        self._within.pop()
        if module in self.of:
            self.of[module].like = output
            self.of[module].output = output[0] if isinstance(output, tuple) else output

    def attend(self, layer_idx, query, key, value, mask, scale, softcap, learned_logits):
        index = layer_idx if self.updated is None else self.updated
        out = super().attend(layer_idx, query, key, value, mask, scale, softcap, learned_logits)
        seen = self.of.get(self._within[-1]) if self._within else None
        if seen is not None:
            seen.calls += seen.query is not None
            seen.query, seen.key, seen.value, seen.attended, seen.layer_idx = query, key, value, out, index
            seen.scale, seen.softcap, seen.learned_logits = scale, softcap, learned_logits
        return out

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _is_step(cache) -> bool:
    """Whether what is computed belongs to a step over a cache of ours."""
    return isinstance(cache, SinkCache) and cache.step is not None


class Attention:
    """An attention module: projections, optional norms of q and k, attention over the cache, output projection."""

    def __init__(self, module: nn.Module, seen: ModuleRecord, parts, output: nn.Module, norms, is_grouped: bool):
        self.module, self.original, self.cache_name = module, module.forward, seen.cache_name
        self.projection, self.output, self.norms, self.is_grouped = Joined(parts), Joined([output]), norms, is_grouped
        self.layer_idx, self.scale, self.softcap = seen.layer_idx, seen.scale, seen.softcap
        self.learned_logits, self.returned, self.has_hooks = seen.learned_logits, seen.returned(), False
        (_, self.heads, _, self.dim), (_, self.kv_heads, _, self.v_dim) = seen.query.shape, seen.value.shape

    @property
    def called(self) -> list[nn.Module]:
        """Parts that are called if they have hooks."""
        return [*self.projection.parts, *self.output.parts]

    @classmethod
    def of(cls, module: nn.Module, seen: ModuleRecord) -> "Attention | None":
        """How to compute a module, if it has the usual form."""
        parameters = {id(x) for x in module.parameters(recurse=False)}
        if seen.query is None or seen.calls > 1 or seen.returned() is None or "forward" in vars(module):
            return None
        if seen.cache_name is None:
            return None
        if seen.learned_logits is not None and id(seen.learned_logits) not in parameters:
            return None
        child = lambda names: [x if _takes_one(x := getattr(module, n, None)) else None for n in names]  # noqa: E731
        projections = [parts for names in PROJECTIONS if all(parts := child(names))]
        norms = [None, *(pair for names in QK_NORMS if all(pair := child(names)))]
        for parts, output, pair in itertools.product(projections, filter(None, child(OUTPUTS)), norms):
            for is_grouped in (False, True) if len(parts) == 1 else (False,):
                if pair and (is_grouped or any(getattr(x, "weight", None) is None for x in pair)):
                    continue
                pair = pair and [Norm.of(x) or x for x in pair]
                attention = cls(module, seen, parts, output, pair, is_grouped)
                if attention._repeats(seen):
                    return attention
        return None

    def _repeats(self, seen: ModuleRecord) -> bool:
        """Whether this form gives what the module gave. Some scale what they turn (YaRN): that goes into the scale."""
        try:
            q, k, v = self.split(self.projection(seen.hidden))
            output = self.output(seen.attended.flatten(2))
        except RuntimeError:  # sizes that do not fit: another form
            return False
        factor = ((seen.query * q).sum() / (q * q).sum()).double().item() if q.shape == seen.query.shape else 1.0
        factor = factor if abs(factor - 1) > 1e-3 else 1.0
        self.scale = seen.scale * factor**2
        return (
            _agree(v, seen.value)
            and _agree(q * factor, seen.query)
            and _agree(k * factor, seen.key)
            and _agree(output, seen.output)
        )

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, tokens, rows of the projection) to q, k and v, (batch, heads, tokens, dim) each."""
        batch, tokens = y.shape[:2]
        if self.is_grouped:  # the queries of a key head, the key, the value; then those of the next key head
            y = y.view(batch, tokens, self.kv_heads, -1, self.dim)
            q, k, v = y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k, v = y.split([self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.v_dim], dim=-1)
        q_norm, k_norm = self.norms or (None, None)
        if q_norm is not None and q_norm.weight.shape[-1] != self.dim:  # over all heads together
            q, k, q_norm, k_norm = q_norm(q), k_norm(k), None, None
        q, k, v = (x.view(batch, tokens, -1, dim) for x, dim in ((q, self.dim), (k, self.dim), (v, self.v_dim)))
        if q_norm is not None:
            q, k = q_norm(q), k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, step: Step, y: Tensor) -> Tensor:
        """From what the projection gave to what the output projection takes, (batch, tokens, heads * v_dim)."""
        out = step.attend(self.layer_idx, *self.split(y), None, self.scale, self.softcap, self.learned_logits)
        return out.flatten(2)

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        cache = kwargs.get(self.cache_name)
        if not _is_step(cache) or self.module.training or self.has_hooks:
            return self.original(hidden_states, *args, **kwargs)
        return self.returned(self.output(self.attend(cache.step, self.projection(hidden_states))))


class Layer:
    """A decoder layer: ``h = x + attention(norm(x))``, then ``h + down(act(gate(norm(h))) * up(norm(h)))``."""

    def __init__(self, module, seen: ModuleRecord, attention: Attention, norms, gate_up, down, activation: str):
        self.module, self.original, self.attention, self.cache_name = module, module.forward, attention, seen.cache_name
        self.norms, self.gate_up, self.down = norms, Joined(gate_up), Joined([down])
        self.activation, self.returned, self.has_hooks = activation, seen.returned(), False

    called = ()  # parts that are called if they have hooks: then the whole layer calls its own

    @property
    def products(self) -> tuple[Joined, ...]:
        return self.attention.projection, self.attention.output, self.gate_up, self.down

    @classmethod
    def of(cls, module: nn.Module, seen: dict[nn.Module, ModuleRecord], attention: Attention) -> "Layer | None":
        """How to compute a module, if it has the usual form. attention: that of its attention module."""
        here, inner = seen.get(module), seen[attention.module]
        norms = [Norm.of(getattr(module, name, None)) for name in LAYER_NORMS]
        if here is None or here.calls > 1 or here.returned() is None or "forward" in vars(module) or not all(norms):
            return None
        if here.cache_name is None:
            return None
        for mlp in module.children():
            gate_up = next((parts for names in GATED if all(parts := [getattr(mlp, n, None) for n in names])), None)
            down, activation = getattr(mlp, "down_proj", None), _activation_of(mlp)
            if gate_up is None or down is None or activation is None:
                continue
            if not all(is_plain(x) for x in (*gate_up, down, *attention.projection.parts, *attention.output.parts)):
                continue
            middle = here.hidden + inner.output
            y = torch.cat([part(norms[1](middle)) for part in gate_up], dim=-1)
            gate, up = y.chunk(2, dim=-1)
            output = middle + down(ACTIVATIONS[activation](gate) * up)
            if _agree(norms[0](here.hidden), inner.hidden) and _agree(output, here.output):
                return cls(module, here, attention, norms, gate_up, down, activation)
        return None

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        attention, cache = self.attention, kwargs.get(self.cache_name)
        is_itself = self.has_hooks or self.module.training or not all(x.is_joined for x in self.products)
        if is_itself or not _is_step(cache):
            return self.original(hidden_states, *args, **kwargs)
        x = hidden_states.flatten(0, 1)
        y = product(x, attention.projection, self.norms[0]).unflatten(0, hidden_states.shape[:2])
        x = product(attention.attend(cache.step, y).flatten(0, 1), attention.output, residual=x)
        gated = product(x, self.gate_up, self.norms[1], activation=self.activation)
        return self.returned(product(gated, self.down, residual=x).view_as(hidden_states))


class Normed:
    """An RMSNorm as it is, but on a GPU one kernel."""

    def __init__(self, module: nn.Module, norm: Norm):
        self.module, self.original, self.norm = module, module.forward, norm

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda or torch.is_grad_enabled():
            return self.original(x)
        return self.norm(x)


class Still:
    """A rotary module: all positions are 0 in a patched model, so for one token it says the same every time.

    current: what holds the step of this thread.
    """

    def __init__(self, module: nn.Module, current):
        self.module, self.original, self.current, self.said = module, module.forward, current, {}

    def forward(self, x: Tensor, position_ids: Tensor, *args, **kwargs):
        if torch.compiler.is_compiling() or not isinstance(self.current.step, Step) or position_ids.shape[-1] != 1:
            return self.original(x, position_ids, *args, **kwargs)
        key = (x.dtype, x.device, position_ids.shape, *args, *kwargs.items())
        if key in self.said:
            return self.said[key]
        output = self.original(x, position_ids, *args, **kwargs)
        if not x.is_cuda or not torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            self.said = {**self.said, key: output} if len(self.said) < 8 else {key: output}
        return output


class Few:
    """A linear layer as it is, but few rows by `ops.linear`."""

    def __init__(self, module: nn.Linear):
        self.module, self.original = module, module.forward

    def forward(self, input: Tensor) -> Tensor:
        module = self.module
        if torch.is_grad_enabled() or not ops.takes_linear(rows := input.flatten(0, -2), module.weight):
            return self.original(input)
        return ops.linear(rows.contiguous(), module.weight, module.bias).unflatten(0, input.shape[:-1])


def _activation_of(mlp: nn.Module) -> str | None:
    """The name in `ACTIVATIONS` of what an MLP applies to its gate."""
    own = next((getattr(mlp, name) for name in ("act_fn", "activation_fn") if hasattr(mlp, name)), None)
    x = torch.linspace(-4, 4, 64)
    return None if own is None else next((n for n, f in ACTIVATIONS.items() if _agree(f(x), own(x))), None)


def _is_rotary(module: nn.Module) -> bool:
    names = list(inspect.signature(module.forward).parameters)[:2]
    return names == ["x", "position_ids"] and bool(frequency_buffers(module)) and "forward" not in vars(module)


class Fused:
    """What is computed otherwise on a model: found when made, in force after `apply`, and gone after `undo`.

    what: "layers" or "attention". observer: of a short text that has run through the model.
    """

    def __init__(self, model: nn.Module, what: str, observer: Observer, current):
        self.model = model
        found = [Attention.of(module, seen) for module, seen in observer.of.items()]
        self.attentions = [attention for attention in found if attention is not None]
        of = {attention.module: attention for attention in self.attentions}
        self.layers, others = [], [Still(module, current) for module in model.modules() if _is_rotary(module)]
        if what == "layers":
            pairs = [(module, of[child]) for module in model.modules() for child in module.children() if child in of]
            self.layers = [layer for module, a in pairs if (layer := Layer.of(module, observer.of, a)) is not None]
        self.joined = [x for a in self.attentions for x in (a.projection, a.output)]
        self.joined += [x for layer in self.layers for x in (layer.gate_up, layer.down)]
        if what == "layers":
            taken = {part for joined in self.joined for part in joined.parts}
            others += [Few(module) for module in model.modules() if is_plain(module) and module not in taken]
            norms = ((module, Norm.of(module)) for module in model.modules() if "RMSNorm" in type(module).__name__)
            others += [Normed(module, norm) for module, norm in norms if norm is not None]
        self.replaced = [*self.attentions, *self.layers, *others]

    def apply(self) -> None:
        self.join()
        for new in self.replaced:
            new.module.forward = new.forward

    def look(self) -> None:
        """Find out which modules have hooks, or were exchanged: they are then called."""
        for joined in self.joined:
            joined.is_plain = all(is_plain(part) for part in joined.parts)
        for new in (*self.attentions, *self.layers):
            inner = {*new.module.modules()} - {new.module, *new.called}
            new.has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in inner)

    def join(self) -> None:
        """Lay weights side by side, again if they were moved."""
        uses = Counter(id(x) for module in self.model.modules() for x in module.parameters(recurse=False))
        shared = {x for x, count in uses.items() if count > 1}
        for joined in self.joined:
            if not joined.is_joined:
                joined.join(shared)

    def undo(self) -> None:
        for new in self.replaced:
            if vars(new.module).get("forward") == new.forward:
                del new.module.forward
        for joined in self.joined:
            joined.undo()
