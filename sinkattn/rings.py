"""The rings of a model's attention layers: pinned sinks, recent tokens, and the plan by which they are laid out."""

import copy
import functools
import pickle
import uuid
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .rope import ProbedLayer

FEW = 16  # tokens a row: steps of so many may be captured, and go by decode
CACHE_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of `patch`; None: that of the keys


@dataclass(frozen=True)
class Plan:
    """How a patched model attends: the keywords of `patch`, and what was found out about it.

    config: of the model.
    continues: whether layers with a state of their own go on exactly with several tokens at once; if not, all input but
        the first is fed token by token.
    layers: every attention of a step, by (layer index, how often that layer attended before in the step).
    route: how the attention is reached, a row of `patch.ROUTES`.
    slack: tokens that can be taken back at any time.
    cache_dtype: of `CACHE_DTYPES`.
    share: of a model that is split over processes, which this one has, else None.
    spare: keeps what no cache uses any more for the next one.
    name: by which a pickled cache finds the plan of its model again, in this process.
    """

    sink_size: int
    window_size: int
    prefill: str
    backend: str
    config: PreTrainedConfig
    continues: bool
    layers: dict[tuple[int, int], ProbedLayer]
    route: str
    slack: int
    cache_dtype: str
    share: str | None
    spare: Any  # a `SpareRows`
    name: str = field(init=False, default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self):
        _plans[self.name] = self

    def __deepcopy__(self, memo) -> "Plan":
        return self  # copies of a cache go on with the same model

    def __reduce__(self):
        return _plan_named, (self.name,)

    @property
    def capacity(self) -> int:
        return self.sink_size + self.window_size

    @functools.cached_property
    def form(self) -> dict[str, Any]:
        """What a saved text must have in common with whoever goes on with it, besides shapes and dtypes, for JSON."""
        return {
            "model_type": self.config.model_type,
            "num_hidden_layers": self.config.get_text_config(decoder=True).num_hidden_layers,
            "sink_size": self.sink_size,
            "window_size": self.window_size,
            "slack": self.slack,
            # As it was before there were any.
            **({} if self.cache_dtype == "auto" else {"cache_dtype": self.cache_dtype}),
            **({} if self.share is None else {"tp_plan": self.share}),
            "rings": {
                f"{layer}.{call}": {
                    "own_window": probed.own_window,
                    "rotation": None if probed.rope is None else probed.rope.form,
                }
                for (layer, call), probed in self.layers.items()
            },
        }


_plans: "weakref.WeakValueDictionary[str, Plan]" = weakref.WeakValueDictionary()


def _plan_named(name: str) -> Plan:
    plan = _plans.get(name)
    if plan is None or plan.spare.is_closed:
        raise pickle.UnpicklingError(
            "this SinkCache belongs to a model that was patched in another process, or is patched no more: "
            "cache.save(path) and SinkCache.load(model, path) go from one to another"
        )
    return plan


@dataclass(frozen=True, eq=False)
class SharedSinks:
    """The sinks of one attention that all rows have, (1, num_kv_heads, S, head_dim) each: nobody writes them."""

    keys: Tensor
    values: Tensor

    def __deepcopy__(self, memo) -> "SharedSinks":
        return self


class SinkLayer(CacheLayerMixin):
    """Keys and values of one attention: (batch, num_kv_heads, S + R, head_dim) each, slots as in `reference.slot_of`.

    R = W + slack: what leaves the window stays in the ring for `slack` tokens, unseen unless tokens are taken back.
    Where the rows share their sinks, keys and values are the ring alone, (batch, num_kv_heads, R, head_dim).

    A layer whose own sliding window is not larger than W keeps that window: the same ring with no sinks. One whose
    window lies between W and S + W sees the sinks for as long as they are nearer than that: sink_reach, else None.

    stored: the dtype of a ring in 8 bits, which has key_scales and value_scales, (batch, num_kv_heads, S + R) float32;
    else None. dtype: of the keys that the model gives.
    """

    is_compileable = False  # so that `generate` makes no masks of its own
    shared: SharedSinks | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    _counters: Tensor | None = None

    def __init__(self, probed: ProbedLayer, plan: Plan):
        super().__init__()
        self.probed, self.rope, own = probed, probed.rope, probed.own_window
        self.sink_size, self.window_size, self.sink_reach = plan.sink_size, plan.window_size, None
        self.slack, self.stored = plan.slack, CACHE_DTYPES[plan.cache_dtype]
        self.is_dense = plan.prefill == "dense"
        if own is not None and own < plan.capacity:
            if own > plan.window_size and not self.is_dense:
                self.sink_reach = own
            else:
                self.sink_size, self.window_size, self.is_dense = 0, own, False

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        slots = self.sink_size + self.window_size + self.slack
        with torch.inference_mode(False):  # so that the buffers can be written in and out of it
            self.keys, self.values = (
                torch.zeros(*x.shape[:2], slots, x.shape[3], dtype=self.stored or x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
            if self.stored is not None:
                shape = *key_states.shape[:2], slots
                self.key_scales, self.value_scales = torch.zeros(2, *shape, device=key_states.device).unbind()
        self.is_initialized, self.shared, self.dtype = True, None, key_states.dtype

    lazy_initialization = allocate

    def __getstate__(self) -> dict[str, Any]:
        return {name: Bytes.of(x) for name, x in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: Bytes.back(x) for name, x in state.items()})

    def __deepcopy__(self, memo: dict) -> "SinkLayer":
        """By the tensors themselves, which `memo` may have others for."""
        memo[id(self)] = new = type(self).__new__(type(self))
        vars(new).update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        return new

    def buffers(self) -> dict[str, Tensor]:
        """What it keeps of the rows, (batch, ...) each, by the names of its attributes."""
        names = ("keys", "values") if self.stored is None else ("keys", "values", "key_scales", "value_scales")
        return {name: getattr(self, name) for name in names} if self.is_initialized else {}

    def counters(self) -> Tensor | None:
        """`arrivals` of the ops, enough for `FEW` tokens a row; None where no op needs them."""
        if not self.keys.is_cuda:
            return None
        count = FEW * self.keys.shape[0] * self.keys.shape[1]
        if self._counters is None or (len(self._counters), self._counters.device) != (count, self.keys.device):
            with torch.inference_mode(False):
                self._counters = torch.zeros(count, dtype=torch.int32, device=self.keys.device)
        return self._counters

    @property
    def can_share(self) -> bool:
        """Whether rows may share the sinks: there are any, not in 8 bits, and all queries see all of them as they lie
        there."""
        varies = self.rope is not None and self.rope.varies
        is_plain = self.sink_reach is None and self.stored is None and not varies
        return self.is_initialized and self.sink_size > 0 and is_plain

    def with_sinks(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of some rows' rings, (n, num_kv_heads, R, head_dim), what they would be if each row had its own sinks."""
        shared = (x.expand(len(keys), -1, -1, -1) for x in (self.shared.keys, self.shared.values))
        return tuple(torch.cat(pair, dim=2) for pair in zip(shared, (keys, values), strict=True))

    def fits(self, key_states: Tensor) -> bool:
        """Whether new keys have the dtype of the earlier ones, and the device of the buffers."""
        return key_states.dtype == self.dtype and key_states.device == self.keys.device

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states  # handed through: `Step.attend` appends

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0  # what a step shows to the model: an empty cache

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x

    def reset(self) -> None:
        pass  # what is seen follows from the lengths

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows, in place if there are as many of them."""
        for name, x in self.buffers().items():
            picked = x.index_select(0, beam_idx.to(x.device))
            if len(picked) == len(x):
                x.copy_(picked)
            else:
                setattr(self, name, picked)


class StatefulSinkLayer(LinearAttentionLayer, SinkLayer):
    """A layer that attends and has a state besides (Falcon-H1, Zamba): transformers' own holds the state."""

    is_compileable = False

    def __init__(self, probed: ProbedLayer, plan: Plan, own: LinearAttentionLayer):
        SinkLayer.__init__(self, probed, plan)
        states = {"number_of_states": own.number_of_states} if hasattr(own, "number_of_states") else {}
        LinearAttentionLayer.__init__(self, **states)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        SinkLayer.reorder_cache(self, beam_idx)


def states_of(layer) -> list[Tensor]:
    """The tensors, batch first, that a layer of transformers' keeps as its state."""
    held = (getattr(layer, name, None) for name in ("conv_states", "recurrent_states"))
    return [x for h in held for x in (h.values() if isinstance(h, dict) else [h]) if isinstance(x, Tensor)]


def writable(x: Tensor) -> Tensor:
    """A tensor as torch can write rows of it: float8 as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


@dataclass(frozen=True)
class Bytes:
    """A tensor in float8 as its bytes: pickle cannot read the other."""

    tensor: Tensor

    @classmethod
    def of(cls, x: Any) -> Any:
        """Of anything else, that."""
        return cls(writable(x)) if isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn else x

    @classmethod
    def back(cls, x: Any) -> Any:
        return x.tensor.view(torch.float8_e4m3fn) if isinstance(x, cls) else x


def has_state(layers: list) -> bool:
    """Whether any layer has a state besides keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def layers_of(plan: Plan) -> tuple[list, dict[tuple[int, int], SinkLayer]]:
    """Rings for everything that attends, and transformers' own layers where there is a state and no ring."""
    made, rings = DynamicCache(config=plan.config).layers, {}
    for (index, call), probed in sorted(plan.layers.items()):
        own = made[index] if index < len(made) else None
        stateful = call == 0 and isinstance(own, LinearAttentionCacheLayerMixin)
        ring = StatefulSinkLayer(probed, plan, own) if stateful else SinkLayer(probed, plan)
        rings[index, call] = ring
        if call == 0:
            made[index : index + 1] = [ring]
    return made, rings
