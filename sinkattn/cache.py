"""SinkCache: pinned sinks and a ring of recent tokens per layer, as a transformers `Cache`, and all slot arithmetic.

Memory is allocated once, at capacity. Every row of the batch has its own length, its own sinks (its first S real
tokens, whatever the padding) and its own ring head; all of that follows from one tensor, `lengths`.
"""

import copy
import itertools
import weakref
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from . import ops
from .reference import append, held_positions, rotate
from .rope import ProbedLayer, Rope
from .watch import Watch

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
    spare: "Spare" = field(default_factory=lambda: Spare())

    def __deepcopy__(self, memo) -> "Plan":
        return self  # copies of a cache go on with the same model

    @property
    def capacity(self) -> int:
        return self.sink_size + self.window_size


class SinkLayer(CacheLayerMixin):
    """Keys and values of one attention: (batch, num_kv_heads, S + R, head_dim) each, slots as in `reference.slot_of`.

    A layer whose own sliding window is smaller than W keeps that window: the same ring with no sinks.
    """

    is_compileable = False  # so that `generate` makes no masks of its own

    def __init__(self, probed: ProbedLayer, plan: Plan):
        super().__init__()
        self.probed, self.rope, own = probed, probed.rope, probed.own_window
        self.sink_size = plan.sink_size if own is None else 0
        self.window_size = plan.window_size if own is None else own
        self.is_dense = plan.prefill == "dense" and own is None

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
        return key_states, value_states  # handed through: `SinkCache.attend` appends

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


class _Step(Watch):
    """Watched attention of a step: what the model computes over the step alone is dropped for an op over the cache."""

    def __init__(self, cache: "SinkCache", layer_idx: int, key: Tensor, value: Tensor):
        super().__init__(layer_idx, key, value)
        self.cache = cache

    def output(self, found):
        query, layer = self.query.to(self.key.dtype), self.cache.layers[self.layer_idx]
        out = self.cache.attend(self.layer_idx, query, self.key, self.value, None, 1.0, 0.0, None)
        out = out.transpose(1, 2) if layer.probed.heads_first else out
        return out.reshape(found.shape).to(found.dtype)


class Rows:
    """What a batch of texts keeps on its device, at fixed addresses: layers, lengths, and the graph that was captured.

    layers: one per layer of the model, as transformers' `Cache` has them. rings: whatever attends, as in `Plan.layers`.
    lengths: (batch,) int64. recent: (batch, RECENT) int64, the ids last fed. Where images have given tokens three
        positions (M-RoPE): top, (batch,) int64, the largest of a row, and anchor, (batch, 3), those of token C - 1.
    step: a one-token step over these tensors, captured (`step.Captured`), or None. captured_for, is_masked: what it was
        captured with, see `patch.Handle`. is_warm: whether a one-token step has run and left everything in place.
    """

    def __init__(self, plan: Plan, batch: int, device: torch.device):
        self.layers, self.rings = _layers_of(plan)
        with torch.inference_mode(False):
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            self.recent = torch.zeros(batch, RECENT, dtype=torch.int64, device=device)
            self.top = torch.zeros(batch, dtype=torch.int64, device=device)
            self.anchor = torch.zeros(batch, 3, dtype=torch.int64, device=device)
        self.stream = _stream_of(device)
        self.step, self.captured_for, self.is_masked, self.is_warm = None, None, False, False

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
        vars(other).update(taken, step=None, is_warm=False)
        return other


class Spare:
    """The rows of the last cache that is gone, so that the next one need not capture its step again."""

    def __init__(self):
        self.rows: Rows | None = None
        self.is_closed = False

    def put(self, rows: Rows) -> None:
        if rows.step is not None and not self.is_closed:
            self.rows = rows

    def take(self, batch: int, device: torch.device) -> Rows | None:
        """Empty rows, if there are any that suit."""
        rows, self.rows = self.rows, None
        if rows is None or len(rows.lengths) != batch or rows.stream != _stream_of(device):
            return None
        rows.reset()
        return rows

    def close(self) -> None:
        """Give the memory back, for good."""
        self.rows, self.is_closed = None, True


def _stream_of(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _layers_of(plan: Plan) -> tuple[list, dict[tuple[int, int], SinkLayer]]:
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


class SinkCache(Cache):
    """The KV cache of a patched model: S pinned sinks and a ring of W recent tokens per layer, constant in memory.

    ``cache = SinkCache(model)`` for a model that `patch` was called on; pass it as ``past_key_values`` (``cache``, as
    transformers calls it from 5.24 on) to hold a text over several calls of `generate` or `forward`. Batch size, dtype
    and device are those of the first call.

    Attributes:
        lengths: (batch,) int64, tokens each row holds (padding not counted), or None before the first call.
        seen: tokens fed, padding included (also `get_seq_length()`).
        nbytes: bytes of the key and value buffers.

    Raises ValueError if the model is not patched.
    """

    def __init__(self, model):
        handle = getattr(model, "_sinkattn", None)
        if handle is None:
            raise ValueError(f"SinkCache needs a patched model; call sinkattn.patch({type(model).__name__}) first")
        self.plan: Plan = handle.plan
        super().__init__(layers=[])
        self.layers, self.rings = _layers_of(self.plan)
        self.has_state = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        self.rows: Rows | None = None
        self._keeper: weakref.finalize | None = None
        self.seen = 0
        self.is_open = False  # whether a step is under way
        self._known = 0  # how many of the last ids fed are known, at the end of `rows.recent`
        self._places: Tensor | None = None  # (batch, tokens, 3) of a step with images before or in it, see `begin`
        self.has_places = False  # whether places are not positions any more
        self._broken = False

    def _use(self, rows: Rows) -> None:
        """Hold other rows; when this cache is gone, they may serve the next one."""
        if self._keeper is not None:
            self._keeper.detach()
        self.rows, self.layers, self.rings = rows, rows.layers, rows.rings
        if not torch.compiler.is_compiling():
            self._keeper = weakref.finalize(self, self.plan.spare.put, rows)
            self._keeper.atexit = False

    def __deepcopy__(self, memo) -> "SinkCache":
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            setattr(copied, name, None if name == "_keeper" else copy.deepcopy(value, memo))
        return copied

    @property
    def lengths(self) -> Tensor | None:
        return None if self.rows is None else self.rows.lengths

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for ring in self.rings.values() if ring.is_initialized for x in (ring.keys, ring.values))

    # One step: begin, then attend once a layer, then advance.

    def check(self, batch: int, device: torch.device, plan: Plan) -> None:
        """Raise ValueError if this cache cannot take `batch` rows of ids on `device`, of the model that has `plan`."""
        if plan is not self.plan:
            raise ValueError("this SinkCache was made for another model, or for an earlier patch of this one")
        if self._broken:
            raise ValueError("an earlier call failed half-way through a prompt and left this cache torn; reset() it")
        if self.seen and batch != self.batch_size:
            raise ValueError(
                f"this SinkCache holds {self.batch_size} rows and cannot go on with {batch}; reset() it or make another"
            )
        if self.seen and device != self.lengths.device:
            raise ValueError(
                f"this SinkCache holds device {self.lengths.device}, the input is on {device}: make a new one"
            )

    def begin(self, tokens: int, mask: Tensor | None, batch: int, device: torch.device, places=None) -> None:
        """Prepare a step of `tokens` columns.

        mask: (batch, tokens) bool, False for left padding; None for none. places: (batch, tokens, 3) int64, where
        images give tokens three positions each (M-RoPE); text goes on after the largest. Angles follow from places, for
        sinks from that of token ``min(t, C - 1)``. What is seen follows from the count of tokens, as ever.
        """
        if self.rows is None or len(self.lengths) != batch or self.lengths.device != device:
            self._use(self.plan.spare.take(batch, device) or Rows(self.plan, batch, device))
        self._tokens = tokens
        self._counts = None if mask is None else mask.sum(1)
        first = self.lengths if mask is None else self.lengths - (tokens - self._counts)
        self._positions = first[:, None]
        if tokens > 1:
            self._positions = self._positions + torch.arange(tokens, device=device)
        self._start_places(places)
        self._rotations: dict = {}
        self._calls: dict[int, int] = {}  # how often each layer has attended in this step
        self._updated: int | None = None
        if self.has_state:
            self._held_at = self._addresses()
            self._states = [] if mask is None else [x.clone() for x in self.rows.states()]
        self._written, self.is_open = False, True

    def _start_places(self, places: Tensor | None) -> None:
        if places is None and self.has_places:
            after = self._positions - self.lengths[:, None]
            places = (self.rows.top[:, None] + 1 + after)[..., None].expand(-1, -1, 3)
        self._places, self.has_places = places, places is not None
        if places is None:
            return
        anchor, last = self.rows.anchor, self.plan.capacity - 1
        at = (self._positions == last)[..., None]
        anchor.copy_(torch.where(at.any(1), (places * at).sum(1), anchor))
        self._sink_places = torch.where((self._positions <= last)[..., None], places, anchor[:, None])

    def check_mask(self, mask_function, device) -> None:
        """Raise ValueError if a transformers mask function shows any token of the step what comes after it."""
        if self._tokens == 1:
            return
        query = torch.arange(self._tokens - 1, device=device)[None]
        rows = torch.arange(len(self.lengths), device=device)[:, None]
        if bool(torch.as_tensor(mask_function(rows, rows[:1] * 0, query, query + 1)).any()):
            raise ValueError(
                "the mask lets tokens see those after them (images do so in some models): sinkattn is causal"
            )

    def _addresses(self) -> list[int]:
        return [x.data_ptr() for x in self.rows.states()]

    def advance(self, ids: Tensor | None) -> None:
        """End the step: its tokens now belong to the rows. ids: (batch, tokens), None if only embeddings are known."""
        self.settle(ids)
        self.rows.is_warm = self._tokens == 1 and (not self.has_state or self._held_at == self._addresses())
        self.count(self._tokens, ids is not None)

    def settle(self, ids: Tensor | None) -> None:
        """What the end of a step changes on the device."""
        if self._places is not None:
            new = (self._positions >= self.lengths[:, None])[..., None]
            top = self._places.masked_fill(~new, -1).amax((1, 2))
            self.rows.top.copy_(torch.where(new.flatten(1).any(1), top, self.rows.top))
        self.lengths.add_(self._tokens if self._counts is None else self._counts)
        if self.has_state and self._counts is not None:
            self._keep_states()
        if ids is not None:
            recent = self.rows.recent
            recent.copy_(torch.cat((recent, ids), dim=1)[:, -RECENT:])

    def count(self, tokens: int, are_known: bool) -> None:
        """What the end of a step changes on the host."""
        goes_on = are_known and (self._known or not self.seen)
        self._known = min(self._known + tokens, RECENT) if goes_on else 0
        self.seen += tokens
        self.is_open = False

    def _keep_states(self) -> None:
        """Rows that took no token in this step keep their state, or start from an empty one."""
        for i, state in enumerate(self.rows.states()):
            kept = (self._counts == 0).to(state.device).view(-1, *[1] * (state.dim() - 1))
            before = self._states[i] if i < len(self._states) else torch.zeros((), device=state.device)
            state.copy_(torch.where(kept, before.to(state.dtype), state))

    def cancel(self) -> None:
        """End a step that was captured and has not run."""
        self.is_open = False

    def abort(self, torn: bool) -> None:
        """End a step that raised. A lone token is simply written again; a prompt or a state cannot be mended."""
        self._broken = torn or self.has_state or (self._written and self._tokens > 1)
        self.is_open = False

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """What the model's layers call: hands the step's keys and values through, `attend` appends them."""
        if self.plan.route == "watch":
            return _Step(self, layer_idx, key_states, value_states).handed_out()
        self._updated = layer_idx
        return key_states, value_states

    def attend(self, layer_idx: int, query, key, value, mask, scale, softcap, learned_logits) -> Tensor:
        """Append the step's keys and values to a layer and attend; shapes as in `ops.prefill`.

        layer_idx: of the module that attends; where it has called `update` before, what it said there counts.
        """
        layer_idx, self._updated = layer_idx if self._updated is None else self._updated, None
        call = self._calls[layer_idx] = self._calls.get(layer_idx, -1) + 1
        if (layer_idx, call) not in self.rings:
            raise ValueError(f"layer {layer_idx} attends, which it did not for text alone: sinkattn serves text")
        layer = self.rings[layer_idx, call]
        if layer.is_initialized and not layer.fits(key) and self.seen:
            raise ValueError(
                f"this SinkCache holds {layer.keys.dtype} on {layer.keys.device}, the model's keys are now {key.dtype} "
                f"on {key.device}: make a new one"
            )
        if not layer.is_initialized or not layer.fits(key):
            layer.allocate(key, value)
            self.rows.step = None
        probed, asked = layer.probed, query.shape[2]
        if asked < self._tokens:  # Gemma-3n, Gemma-4: layers that share keys look at the last tokens alone
            query = torch.nn.functional.pad(query, (0, 0, self._tokens - asked, 0))
        if probed.query_scales is not None:
            place = self._positions.to(query.device).clamp(0, self.plan.capacity - 1)
            query = query * probed.query_scales.to(query.device)[place][:, None, :, None].to(query.dtype)
        slopes = None if probed.alibi_slopes is None else probed.alibi_slopes.to(query.device)
        scale = scale if probed.scale is None else probed.scale
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        if learned_logits is not None:
            learned_logits = learned_logits.reshape(-1)
        lengths, counts = (None if x is None else x.to(query.device) for x in (self.lengths, self._counts))
        rope, sizes = layer.rope, dict(scale=scale, softcap=softcap, backend=self.plan.backend)
        sizes.update(sink_size=layer.sink_size, window_size=layer.window_size)
        if rope is not None:
            sizes.update(rotary_start=rope.start, interleaved=rope.interleaved)
        if self._tokens > 1 and layer.is_dense:
            sizes["dense_window"] = 1 << 40
        if rope is not None and rope.varies:
            out = self._attend_varying(layer, query, key, value, lengths, counts, learned_logits, slopes, sizes)
        else:
            rotation = None if rope is None else self._rotation(rope, query.device)
            given = (query, key, value, layer.keys, layer.values, lengths, counts, rotation, learned_logits, slopes)
            # overlap: since the cache was last written, torch's kernels have made the step's lengths and angles
            run = partial(ops.decode, overlap=True) if self._tokens == 1 else ops.prefill
            out = run(*given, **sizes)
        self._written = True  # not before: arguments that an op refuses leave the cache as it was
        return out[:, -asked:]

    def _rotation(self, rope: Rope, device: torch.device) -> Tensor:
        """``[text | sink][cos | sin]`` of the step's tokens, once per step and rope: (batch, tokens, 2, 2, r / 2)."""
        if (rope, device) not in self._rotations:
            text = self._positions.to(device)
            if self._places is not None:
                both = torch.stack((self._places, self._sink_places), dim=2).to(device)
                return self._rotations.setdefault((rope, device), rope.table_of_places(both))
            self._rotations[rope, device] = rope.table(
                torch.stack((text, self._sink_positions(text)), dim=-1), text[..., None] + 1
            )
        return self._rotations[rope, device]

    def _sink_positions(self, text: Tensor) -> Tensor:
        """Where queries stand as the sinks see them: ``min(t, C - 1)``, and counted on from there in a dense prompt."""
        if self.plan.prefill == "dense" and self._tokens > 1:
            start = self.lengths.to(text.device)[:, None]
            return start.clamp(max=self.plan.capacity - 1) + (text - start)
        return text.clamp(max=self.plan.capacity - 1)

    def _attend_varying(self, layer, query, key, value, lengths, counts, learned_logits, slopes, sizes) -> Tensor:
        """Attention where frequencies depend on the row's length n = min(t + 1, C): all keys turn when n changes them.

        So the ring keeps its keys unturned, and every run of tokens with the same frequencies gets a turned copy.
        Exact, but it moves each key three times instead of once; rows past C tokens, and C within the trained length,
        never vary.
        """
        rope, tokens, ring_size = layer.rope, self._tokens, layer.keys.shape[2] - layer.sink_size
        positions = self._positions.to(query.device)
        row_lengths = positions + 1 if self.plan.prefill != "dense" else positions[:, -1:].expand_as(positions) + 1
        changes = (rope.sets(row_lengths).diff(dim=1) != 0).any(0).nonzero().flatten() + 1
        columns = [0, *changes.tolist(), tokens]
        held = [lengths + (c if counts is None else (c - tokens + counts).clamp(min=0)) for c in columns]  # by then
        pieces = []
        for (begin, end), (done, after) in zip(itertools.pairwise(columns), itertools.pairwise(held), strict=True):
            text, row = positions[:, begin:end], row_lengths[:, end - 1 : end]
            cos, sin = rope.table(held_positions(done, layer.sink_size, ring_size), row)[:, None].unbind(-2)
            turned = rotate(layer.keys, cos, sin, rope.start, rope.interleaved).to(layer.keys.dtype)
            rotation = rope.table(torch.stack((text, self._sink_positions(text)), dim=-1), row[..., None])
            q, k, v = (x[:, :, begin:end] for x in (query, key, value))
            given = (q, k, v, turned, layer.values, done, after - done, rotation, learned_logits, slopes)
            pieces.append(ops.prefill(*given, **sizes))
            append(layer.keys, k, text, done, after, layer.sink_size)
        return torch.cat(pieces, dim=1)

    # What transformers asks of a cache.

    def holds(self, ids: Tensor) -> bool:
        """Whether `ids` (batch, n) begin with the text this cache has seen: True for a re-sent history."""
        if ids.shape[0] != self.batch_size or ids.shape[1] <= self.seen:
            return False
        if not self._known:  # the text came as embeddings: go by length alone, as transformers does
            return True
        recent = self.rows.recent[:, -self._known :]
        return torch.equal(ids[:, self.seen - self._known : self.seen].to(recent), recent)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed, padding included: what `generate` slices re-sent ids with. In a step the model sees none."""
        return 0 if self.is_open else self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def reset(self) -> None:
        """Forget the text and keep the memory."""
        self.seen, self._known, self._broken = 0, 0, False
        self.has_places = False
        if self.rows is not None:
            self.rows.reset()

    def picked(self, index: Tensor) -> "SinkCache":
        """A cache of its own with a copy of some rows, index (n,) int64."""
        other = copy.copy(self)
        other._keeper = None
        other._use(self.rows.picked(index))
        return other

    def put(self, index: Tensor, other: "SinkCache") -> None:
        """Let the rows `index`, (n,) int64, go on as the n rows of another cache, once `picked` from this one."""
        with torch.inference_mode(False):
            for mine, new in zip(self.rows.tensors(), other.rows.tensors(), strict=True):
                mine.index_copy_(0, index.to(mine.device), new)
        self.seen = max(self.seen, other.seen)

    def forget(self, index: Tensor) -> None:
        """Forget the texts of some rows, index (n,) int64, and keep the memory."""
        self.lengths.index_fill_(0, index, 0)
        for state in self.rows.states():
            state.index_fill_(0, index.to(state.device), 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows: row i becomes what row ``beam_idx[i]`` was. Any number of them."""
        self._use(self.rows.reordered(beam_idx))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size, device=self.lengths.device).repeat_interleave(repeats))

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError("a SinkCache cannot take tokens back yet, so assisted generation is not supported")

    activate_past_recording = crop
