"""Parts of modules, held by their place: norms, activations, and linear layers that are one product.

Whoever holds a module instead of its place misses every change behind it (adapters, quantisation, exchanged parts). A
`Place` is an owner and a name; changes.py tells whether what is there is what was there before.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .. import ops
from ..changes import moved, place_of

ACTIVATIONS: dict[str, Callable] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


@dataclass(frozen=True)
class Place:
    """Where a part is: an attribute of a module."""

    owner: nn.Module
    name: str

    @property
    def part(self):
        return getattr(self.owner, self.name, None)


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer and nothing else: not quantised, hooked, split over devices or replaced."""
    return is_linear(module) and "forward" not in vars(module)


def is_linear(module: nn.Module | None) -> bool:
    """`is_plain`, whatever forward was put on it."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.weight.data) is Tensor
        and module.weight.device.type != "meta"
        and not module.weight.is_inference()
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


@dataclass
class Share:
    """What this process computes of a linear layer: all of it, some of its outputs, or, with a group, what some of its
    inputs add to the sum over that group. weight, bias: parameters, or what is here of those that are split.
    """

    weight: Tensor
    bias: Tensor | None
    group: "distributed.ProcessGroup | None" = None

    @classmethod
    def of(cls, module: nn.Module | None) -> "Share | None":
        """None if a module is no linear layer, or more than that."""
        if is_plain(module):
            return cls(module.weight, module.bias)
        if not _is_split(module):
            return None
        (placement,), mesh = module.weight.placements, module.weight.device_mesh
        # What to_local() gives is a new view every time from torch 2.13 on; this is what lies in memory.
        own = (module.weight, module.bias)
        here = [x if x is None or type(x) is nn.Parameter else x._local_tensor for x in own]
        return cls(*here, mesh.get_group() if placement.is_shard(1) else None) if placement.is_shard() else None


def _is_split(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer whose weight transformers has split over processes, and nothing else."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks or module.training:
        return False
    mesh = getattr(module.weight, "device_mesh", None)
    return getattr(mesh, "ndim", 0) == 1 and hasattr(module.weight, "_local_tensor") and _runs_split(module)


def _runs_split(module: nn.Module) -> bool:
    """Whether transformers has put another forward on a module, as one of a model that is split over processes."""
    return getattr(vars(module).get("forward"), "__module__", None) == "transformers.distributed.tensor_parallel"


def _own_forward(module: nn.Module) -> Callable:
    return MethodType(type(module).forward, module) if _runs_split(module) else module.forward


class FusedLinear:
    """Linear layers with one input as one product: ``y = x [W1; W2; ...]^T + [b1; b2; ...]``.

    places: of the layers. weight (rows, in_features), bias (rows,) or None: while they are joined, else None, and the
    layers are called one by one. group: over which a layer's outputs are summed, None if they are whole.
    """

    def __init__(self, places: list[Place]):
        self.places, self.weight, self.bias, self.group = places, None, None, None
        self._where: tuple = ()  # where the parameters were when they were joined
        self._moved: list[weakref.ref] = []  # parameters that lie side by side

    @property
    def parts(self) -> list[nn.Module]:
        return [place.part for place in self.places]

    def explains(self, records) -> bool:
        """Whether what went through split layers is what they are taken for; of plain ones nothing else can be."""
        for part in self.parts:
            share = Share.of(part)
            if is_plain(part) or share is None:
                continue
            x, y = records[part].last
            if (x.shape[-1], y.shape[-1]) != share.weight.shape[::-1]:
                return False
            weight, bias = share.weight.float(), None if share.bias is None else share.bias.float()
            room = 1e-2 if share.weight.dtype in (torch.float16, torch.bfloat16) else 1e-4
            if share.group is None and not torch.allclose(F.linear(x.float(), weight, bias), y.float(), room, room):
                return False
        return True

    def join(self, shared: set[int]) -> None:
        """Lay the weights side by side, if they are not. shared: ids of parameters of several modules, which stay."""
        shares = [Share.of(part) for part in self.parts]
        if any(share is None or (share.group is not None and len(shares) > 1) for share in shares):
            self.weight = self.bias = None
            return
        tensors = [(share.weight, share.bias) for share in shares]
        if self.weight is not None and self._where == _where(tensors):
            return
        self.weight, self.bias, self.group = None, None, shares[0].group
        kinds = {(w.dtype, w.device, b is None) for w, b in tensors}
        if len(kinds) > 1 or (len(tensors) > 1 and any(id(x) in shared for pair in tensors for x in pair)):
            return
        self.weight = self._side_by_side([weight for weight, _ in tensors])
        self.bias = None if tensors[0][1] is None else self._side_by_side([bias for _, bias in tensors])
        self._where = _where(tensors)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _side_by_side(self, parameters: list[Tensor]) -> Tensor:
        """The parameters' content in one tensor, (rows, ...). They become parts of it, each a storage of its own."""
        if len(parameters) == 1:
            return parameters[0].data
        self._moved += map(weakref.ref, parameters)
        whole = _wholes.get(tuple(map(place_of, parameters)))
        if whole is not None:  # by another model with the same parameters, as a draft of itself
            return whole
        whole = torch.cat([x.data for x in parameters])
        memory, begin = whole.untyped_storage(), 0
        for x in parameters:  # a slice of a storage is a storage: whoever saves the model finds nothing shared
            x.data = whole.new_empty(0).set_(memory[begin : begin + x.nbytes], 0, x.shape)
            begin += x.nbytes
        _wholes[tuple(map(place_of, parameters))] = whole
        moved()
        return whole

    @torch.inference_mode(False)
    @torch.no_grad()
    def undo(self) -> None:
        """Give every parameter memory of its own again, with the same bits."""
        for x in (reference() for reference in self._moved):
            if x is not None:
                x.data = x.data.clone()
                moved()
        self.weight, self.bias, self._moved = None, None, []

    def __getstate__(self) -> dict:
        """Of a copy: its parameters lie where they like, until the next look."""
        return {"places": self.places, "weight": None, "bias": None, "group": None, "_where": (), "_moved": []}

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., sum of out_features)."""
        if self.weight is None:
            return torch.cat([part(x) for part in self.parts], dim=-1)
        return product(x.flatten(0, -2), self).unflatten(0, x.shape[:-1])


_wholes: "weakref.WeakValueDictionary[tuple, Tensor]" = weakref.WeakValueDictionary()  # by where their parts lie


def _where(tensors: list[tuple]) -> tuple:
    return tuple((id(x), *place_of(x)) for pair in tensors for x in pair if x is not None)


@dataclass
class Norm:
    """An RMSNorm over the last dim: ``(shift + weight) * x / sqrt(mean(x^2) + eps)``. eps_name: the attribute."""

    place: Place
    eps_name: str
    shift: float

    @property
    def weight(self) -> Tensor:
        return self.place.part.weight

    @property
    def eps(self) -> float:
        return getattr(self.place.part, self.eps_name)

    @classmethod
    def of(cls, place: Place) -> "Norm | None":
        """What a module does, if that is an RMSNorm: decided in float64, on a copy of it."""
        module = place.part
        weight = getattr(module, "weight", None)
        eps_name = next((name for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
        if type(weight) is not nn.Parameter or weight.dim() != 1 or weight.device.type == "meta" or eps_name is None:
            return None
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if "forward" in vars(module) and not _runs_split(module):
            return None
        if not isinstance(getattr(module, eps_name), float) or not takes_one(module):
            return None
        if len(inspect.signature(_own_forward(module)).parameters) > 1:  # some take a gate too
            return None
        exact = copy.deepcopy(module).double()
        vars(exact).pop("forward", None)  # of a split model: it alters gradients alone, or the text's numbers tell
        eps = getattr(module, eps_name)
        x = torch.linspace(-2, 3, 2 * len(weight), dtype=torch.float64, device=weight.device).view(2, -1)
        x = torch.cat((x, x[:1] * eps**0.5))  # a row so small that eps counts
        found, normal = exact(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        for shift in (0.0, 1.0):
            expected = normal * (exact.weight.detach() + shift)
            room = 1e-5 * expected.abs() + 1e-6 * normal.abs()  # modules may compute in float32
            if found.shape == x.shape and bool(((found - expected).abs() <= room).all()):
                return cls(place, eps_name, shift)
        return None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.shift:  # the sum has more bits than half precision
            return F.rms_norm(x.float(), weight.shape, weight.float() + self.shift, self.eps).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps)


def activation_of(mlp: nn.Module) -> str | None:
    """The name in `ACTIVATIONS` of what an MLP applies to its gate, decided in float64."""
    own = next((getattr(mlp, name) for name in ("act_fn", "activation_fn") if hasattr(mlp, name)), None)
    if own is None or (isinstance(own, nn.Module) and (next(own.children(), None) or [*own.parameters()])):
        return None
    x = torch.cat((torch.linspace(-6, 6, 97), torch.logspace(1, 4, 7), -torch.logspace(1, 4, 7))).double()
    found = own(x)
    return next((name for name, f in ACTIVATIONS.items() if torch.allclose(f(x), found, rtol=1e-6, atol=1e-9)), None)


def takes_one(module) -> bool:
    """Whether something is a module that needs one input and no more."""
    if not isinstance(module, nn.Module):
        return False
    parameters = inspect.signature(_own_forward(module)).parameters.values()
    return sum(x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD for x in parameters) == 1


def product(x: Tensor, linear: FusedLinear, norm: Norm | None = None, residual=None, activation="") -> Tensor:
    """`ops.linear`, by torch where it does not take the call. x: (rows, in_features)."""
    if linear.group is None:
        return _product(x, linear.weight, linear.bias, norm, residual, activation)
    y = _product(x, linear.weight, None, norm, None, activation)
    distributed.all_reduce(y, group=linear.group)
    y = y if linear.bias is None else y + linear.bias
    return y if residual is None else residual + y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, residual, activation: str) -> Tensor:
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
