"""Decoder layers that follow one another, and the head behind them, as one kernel: csrc/cuda/sm80/stack.cu.

In a captured step of one token the first layer runs all of them, and the others hand on what they are given: nothing
looks at what is between them, as whatever does keeps a model from being captured. The last norm runs by itself too, as
others may want what it gives; the head is left out.
"""

import itertools
import logging
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..backends import HAS_CUDA_LIBRARY
from ..changes import configs
from ..observe import same
from ..reference import ACTIVATION_NUMBERS
from ..rings import SinkLayer
from ..rows import Rows
from ..step import Step
from .forms import Layer, Records
from .parts import is_linear
from .small import FewRowsLinear, FusedNorm

MOST_BYTES = {1: 250_000_000, 2: 75_000_000}  # of a layer's weights by rows: larger ones are faster one at a time
DIMS = (64, 128)  # of heads
DEVICE = "cuda"  # type of those that have the kernel
logger = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """What all layers have in common. inner: columns between gate and down. eps and shift: of norms."""

    inner: int
    heads: int
    kv_heads: int
    dim: int
    scale: float
    eps: float
    shift: float
    head_eps: float
    head_shift: float
    activation: int


class Ready(NamedTuple):
    """What the kernel is given for some rows. table: (layers, 17) int64, `StackLayer` of csrc/cuda/stack.h. state: what
    it keeps between launches, int32. has_end: whether it multiplies the head too.
    """

    table: Tensor
    state: Tensor
    sizes: Sizes
    rings: list[SinkLayer]
    slots: int
    has_end: bool


class Ahead:
    """Logits that a step has before its model asks the head for them.

    They are what the head gives for what the last norm makes of out, which nobody may have written in between.

    norm, head: modules. out: what the last layer gave, (batch, 1, hidden size). logits: (batch, vocabulary).
    """

    def __init__(self, norm: nn.Module, head: nn.Module, out: Tensor, logits: Tensor):
        self.norm, self.head, self.logits = norm, head, logits
        self._out, self._normed = _mark(out), None
        self._kept = [out]  # nothing else comes to lie there meanwhile

    def saw_norm(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """A norm has made y of x."""
        if module is self.norm and _mark(x) == self._out:
            self._normed = _mark(y)
            self._kept.append(y)

    def logits_of(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What a linear layer gives for x, (..., hidden size); None if it has to be computed. Once."""
        if module is not self.head or _mark(x) != self._normed:
            return None
        self._normed = object()  # what is handed out may be written
        return self.logits.view(*x.shape[:-1], -1)


class Stack:
    """All decoder layers of a model, in their order, for one token of one row or two. end: the last norm and the head,
    if they follow as usual.
    """

    def __init__(self, layers: list[Layer], end: tuple[FusedNorm, FewRowsLinear] | None):
        self.layers, self.end, self._ready = layers, end, WeakKeyDictionary[Rows, Ready]()

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "end": self.end}  # a copy has other weights

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    @classmethod
    def of(cls, layers: list[Layer], others: list, records: Records) -> "Stack | None":
        """Layers as one if each takes what the one before it gave. others: what else is computed otherwise."""
        pairs = [(records[a.module].output, records[b.module].hidden) for a, b in itertools.pairwise(layers)]
        if not (HAS_CUDA_LIBRARY and pairs and all(same(a, b) for a, b in pairs)):
            return None
        known = [x for x in others if x.module in records]
        norms, heads = ([x for x in known if isinstance(x, kind)] for kind in (FusedNorm, FewRowsLinear))
        last = records[layers[-1].module].last[1]
        norm = next((x for x in norms if same(last, records[x.module].last[0])), None)
        given = None if norm is None else records[norm.module].last[1]
        head = next((x for x in heads if same(given, records[x.module].last[0])), None)
        return cls(layers, None if head is None else (norm, head))

    def prepare(self, rows: Rows, model: nn.Module) -> None:
        """Make ready for the step of one token over these rows to be captured: within that, nothing can be copied from
        the host.
        """
        self._ready.pop(rows, None)
        ready = "what layers give is asked for" if shows_layers(model) else self._made_ready(rows, model)
        if isinstance(ready, str):
            logger.info("%d layers do not run as one kernel: %s", len(self.layers), ready)
        else:
            self._ready[rows] = ready

    def _made_ready(self, rows: Rows, model: nn.Module) -> Ready | str:
        rings = [rows.rings.get((layer.attention.layer_idx, 0)) for layer in self.layers]
        if len(rows.lengths) not in MOST_BYTES:
            return f"{len(rows.lengths)} rows are more than {max(MOST_BYTES)}"
        if len(rows.rings) > len(rings) or not all(map(_is_plain, rings)):
            return "its attention is of another kind"
        if not all(layer.is_valid and layer.attention.is_valid for layer in self.layers):
            return "a layer was changed"
        sizes = _sizes_of(self.layers[0])
        if sizes is None or any(_sizes_of(layer) != sizes for layer in self.layers):
            return "the layers are not alike, or of no form that the kernel has"
        weights = [_weights_of(layer) for layer in self.layers]
        if sum(x.nbytes for x in weights[0] if x is not None) > MOST_BYTES[len(rows.lengths)]:
            return "its layers are so large that one product at a time is as fast"
        keys = rings[0].keys
        tensors = [x for of_layer in weights for x in of_layer if x is not None]
        tensors += [x for ring in rings for x in (ring.keys, ring.values)]
        if keys.device.type != DEVICE or keys.element_size() != 2 or any(_kind(x) != _kind(keys) for x in tensors):
            return "its tensors are not all on one GPU in one dtype of 16 bits"
        if not all(map(_is_aligned, tensors)):
            return "its tensors are not all contiguous and aligned"
        if any((ring.rope, ring.probed.scale) != (rings[0].rope, None) for ring in rings):
            return "its layers turn by different angles"
        slots = max(ring.keys.shape[2] for ring in rings)
        with torch.inference_mode(False):
            x = keys.new_empty(len(rows.lengths), len(self.layers[0].norms[0].weight))
            state = torch.ops.sinkattn.stack_state(x, *sizes[:4], len(rings), slots)
            if not len(state):
                return "the kernel does not take such sizes"
            entries = [_entries(*pair) for pair in zip(weights, rings, strict=True)]
            table = torch.tensor(entries, dtype=torch.int64, device=keys.device)
            return Ready(table, state, sizes, rings, slots, self._has_end(model, sizes, keys))

    def _has_end(self, model: nn.Module, sizes: Sizes, keys: Tensor) -> bool:
        """Whether the last norm and the head are what they were, and such as the kernel takes."""
        if self.end is None:
            return False
        here = {*model.modules()}
        if any(x.module not in here or vars(x.module).get("forward") != x.forward for x in self.end):
            return False
        norm, head = self.end[0].norm, self.end[1].module
        if norm.place.part is not self.end[0].module or not is_linear(head) or head.bias is not None:
            return False
        fits = (norm.eps, norm.shift) == (sizes.eps, sizes.shift) and len(head.weight) % 2 == 0
        return fits and all(_kind(x) == _kind(keys) and _is_aligned(x) for x in self._weights_of_end())

    def _weights_of_end(self) -> tuple[Tensor, Tensor]:
        return self.end[0].norm.weight.detach(), self.end[1].module.weight.detach()

    def __call__(self, layer: Layer, step: Step, hidden: Tensor) -> Tensor | None:
        """What a layer hands on for hidden, (batch, 1, hidden size); None if it has to be computed by itself."""
        ready = self._ready.get(step.rows) if step.is_captured and step.tokens == 1 else None
        if ready is None:
            return None
        if layer is not self.layers[0]:
            return hidden
        numbers = [layer.attention.layer_idx for layer in self.layers]
        lengths, counts, rotation = step.append_to(ready.rings, numbers)
        rope, sizes = ready.rings[0].rope, ready.sizes
        start, interleaved = (0, False) if rope is None else (rope.start, rope.interleaved)
        end = self._weights_of_end() if ready.has_end else (None, None)
        out, logits = torch.ops.sinkattn.stack(
            hidden.flatten(0, 1).contiguous(), ready.table, *end, lengths, counts, rotation, ready.state, *sizes[:4],
            ready.slots, sizes.scale, start, interleaved, *sizes[5:],
        )  # fmt: skip
        out = out.view_as(hidden)
        if ready.has_end:
            step.ahead = Ahead(*(x.module for x in self.end), out, logits)
        return out


def shows_layers(model: nn.Module) -> bool:
    """Whether a config asks for more than the last layer's output."""
    return any(getattr(config, "output_hidden_states", False) for config in configs(model))


def _kind(x: Tensor) -> tuple:
    return x.device, x.dtype


def _is_aligned(x: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % 16 == 0


def _mark(x: Tensor) -> object:
    """The same for views of the same numbers, and another one once somebody has written them, which inference tensors
    do not tell.
    """
    return object() if x.is_inference() else (x.data_ptr(), x.numel(), x.dtype, x._version)


def _sizes_of(layer: Layer) -> Sizes | None:
    """Of a layer that the kernel may serve."""
    attention = layer.attention
    if any(product.weight is None or product.group for product in layer.products) or attention.is_grouped:
        return None
    norms, of_heads = layer.norms, attention.norms or []
    if len({(norm.eps, norm.shift) for norm in norms}) > 1 or len({(norm.eps, norm.shift) for norm in of_heads}) > 1:
        return None
    if any(norm.weight.shape[-1] != attention.dim for norm in of_heads):
        return None
    if attention.dim != attention.v_dim or attention.dim not in DIMS or attention.learned is not None:
        return None
    head_eps, head_shift = (of_heads[0].eps, of_heads[0].shift) if of_heads else (0.0, 0.0)
    return None if attention.softcap else Sizes(
        layer.down.weight.shape[1], attention.heads, attention.kv_heads, attention.dim, attention.scale, norms[0].eps,
        norms[0].shift, head_eps, head_shift, ACTIVATION_NUMBERS[layer.activation],
    )  # fmt: skip


def _weights_of(layer: Layer) -> list[Tensor | None]:
    """In the order of the table: of products, their biases, norms, and the norms of queries and keys."""
    products, of_heads = layer.products, [norm.weight for norm in layer.attention.norms or ()]
    return [
        *(product.weight for product in products), *(product.bias for product in products),
        *(norm.weight for norm in layer.norms), *(of_heads or (None, None)),
    ]  # fmt: skip


def _is_plain(ring: SinkLayer | None) -> bool:
    """Whether a ring is one that the kernel reads and writes."""
    if ring is None or not ring.is_initialized or ring.shared is not None or ring.sink_reach is not None:
        return False
    varies = ring.rope is not None and ring.rope.varies
    return not varies and ring.stored is None and ring.probed.query_scales is None and ring.probed.alibi_slopes is None


def _entries(weights: list[Tensor | None], ring: SinkLayer) -> list[int]:
    tensors = [*weights, ring.keys, ring.values]
    sizes = ring.sink_size, ring.keys.shape[2] - ring.sink_size, ring.window_size
    return [0 if x is None else x.data_ptr() for x in tensors] + [*sizes]
