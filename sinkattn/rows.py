"""What a batch of texts keeps on its devices: pinned sinks and a ring of recent tokens for each attention, and lengths.

Memory is allocated once, at capacity. Every row of the batch has its own length, its own sinks (its first S real
tokens, whatever the padding) and its own ring head; all of that follows from one tensor, `lengths`.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .rope import ProbedLayer

RECENT = 32  # ids remembered per row, to tell a re-sent history from new text


@dataclass(frozen=True)
class Plan:
    """How a patched model attends: the keywords of `patch`, and what was found out about it.

    config: of the model.
    continues: whether layers with a state of their own go on exactly with several tokens at once; if not, all input but
        the first is fed token by token.
    layers: every attention of a step, by (layer index, how often that layer attended before in the step).
    route: how the attention is reached, a row of `patch.ROUTES`.
    spare: keeps what no cache uses any more for the next one.
    """

    sink_size: int
    window_size: int
    prefill: str
    backend: str
    config: PreTrainedConfig
    continues: bool
    layers: dict[tuple[int, int], ProbedLayer]
    route: str
    spare: "SpareRows" = field(default_factory=lambda: SpareRows())

    def __deepcopy__(self, memo) -> "Plan":
        return self  # copies of a cache go on with the same model

    @property
    def capacity(self) -> int:
        return self.sink_size + self.window_size


class SinkLayer(CacheLayerMixin):
    """Keys and values of one attention: (batch, num_kv_heads, S + R, head_dim) each, slots as in `reference.slot_of`.

    A layer whose own sliding window is not larger than W keeps that window: the same ring with no sinks. One whose
    window lies between W and S + W sees the sinks for as long as they are nearer than that: sink_reach, else None.
    """

    is_compileable = False  # so that `generate` makes no masks of its own

    def __init__(self, probed: ProbedLayer, plan: Plan):
        super().__init__()
        self.probed, self.rope, own = probed, probed.rope, probed.own_window
        self.sink_size, self.window_size, self.sink_reach = plan.sink_size, plan.window_size, None
        self.is_dense = plan.prefill == "dense"
        if own is not None and own < plan.capacity:
            if own > plan.window_size and not self.is_dense:
                self.sink_reach = own
            else:
                self.sink_size, self.window_size, self.is_dense = 0, own, False

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        slots = self.sink_size + self.window_size
        with torch.inference_mode(False):  # so that the buffers can be written in and out of it
            self.keys, self.values = (
                torch.zeros(*x.shape[:2], slots, x.shape[3], dtype=x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    lazy_initialization = allocate

    def fits(self, key_states: Tensor) -> bool:
        """Whether new keys have the dtype and the device of the buffers."""
        return key_states.dtype == self.keys.dtype and key_states.device == self.keys.device

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
        if self.is_initialized:
            picked = [x.index_select(0, beam_idx.to(x.device)) for x in (self.keys, self.values)]
            if len(beam_idx) == len(self.keys):
                self.keys.copy_(picked[0])
                self.values.copy_(picked[1])
            else:
                self.keys, self.values = picked


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


def _states(layer) -> list[Tensor]:
    """The tensors, batch first, that a layer of transformers' keeps as its state."""
    held = (getattr(layer, name, None) for name in ("conv_states", "recurrent_states"))
    return [x for h in held for x in (h.values() if isinstance(h, dict) else [h]) if isinstance(x, Tensor)]


class Rows:
    """What a batch of texts keeps on its device, at fixed addresses: layers, lengths, and the graph that was captured.

    layers: one per layer of the model, as transformers' `Cache` has them. rings: whatever attends, as in `Plan.layers`.
    lengths: (batch,) int64. recent: (batch, RECENT) int64, the ids last fed. Where images have given tokens three
        positions (M-RoPE): top, (batch,) int64, the largest of a row, and anchor, (batch, 3), those of token C - 1.
    captured: a one-token step over these tensors (`graph.Captured`), or None. captured_for, is_masked: what it was
        captured with, see `Runner.replay`. is_warm: whether a one-token step has run and left everything in place.
    """

    def __init__(self, plan: Plan, batch: int, device: torch.device):
        self.layers, self.rings = layers_of(plan)
        with torch.inference_mode(False):
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            self.recent = torch.zeros(batch, RECENT, dtype=torch.int64, device=device)
            self.top = torch.zeros(batch, dtype=torch.int64, device=device)
            self.anchor = torch.zeros(batch, 3, dtype=torch.int64, device=device)
        self.stream = _stream_of(device)
        self.captured, self.captured_for, self.is_masked, self.is_warm = None, None, False, False

    def states(self) -> list[Tensor]:
        """What layers keep besides rings, (batch, ...) each."""
        return [x for layer in self.layers for x in _states(layer)]

    def tensors(self) -> list[Tensor]:
        """All that the rows hold, (batch, ...) each."""
        rings = [x for ring in self.rings.values() if ring.is_initialized for x in (ring.keys, ring.values)]
        return [self.lengths, self.recent, self.top, self.anchor, *self.states(), *rings]

    @torch.inference_mode(False)
    def picked(self, index: Tensor) -> "Rows":
        """A copy of some rows."""
        return copy.deepcopy(self, {id(x): x.index_select(0, index.to(x.device)) for x in self.tensors()})

    def remember(self, ids: Tensor) -> None:
        """Note the ids that a step has fed, (batch, tokens)."""
        self.recent.copy_(torch.cat((self.recent, ids), dim=1)[:, -RECENT:])

    def reset(self) -> None:
        self.lengths.zero_()
        for layer in self.each():
            layer.reset()

    def each(self) -> set:
        return {*self.layers, *self.rings.values()}

    @torch.inference_mode(False)
    def reordered(self, index: Tensor) -> "Rows":
        """Row i of the result is what row ``index[i]`` was: in place, captured step and all, if there are as many."""
        for layer in self.each():
            layer.reorder_cache(index)
        small = {name: getattr(self, name) for name in ("lengths", "recent", "top", "anchor")}
        taken = {name: x.index_select(0, index.to(x.device)) for name, x in small.items()}
        if len(index) == len(self.lengths):
            for name, x in small.items():
                x.copy_(taken[name])
            return self
        other = copy.copy(self)
        vars(other).update(taken, captured=None, is_warm=False)
        return other


class SpareRows:
    """The rows of the last cache that is gone, so that the next one need not capture its step again."""

    def __init__(self):
        self.rows: Rows | None = None
        self.is_closed = False

    def put(self, rows: Rows) -> None:
        if rows.captured is not None and not self.is_closed:
            self.rows = rows

    def take(self, batch: int, device: torch.device) -> Rows | None:
        """Empty rows, if there are any that suit."""
        rows, self.rows = self.rows, None
        if rows is None or len(rows.lengths) != batch or rows.stream != _stream_of(device):
            return None
        rows.reset()
        return rows

    def __getstate__(self) -> dict:
        return {"rows": None, "is_closed": self.is_closed}  # a graph stays with its process

    def close(self) -> None:
        """Give the memory back, for good."""
        self.rows, self.is_closed = None, True


def _stream_of(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


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
