"""SinkCache: pinned sinks and a ring of recent tokens per layer, as a transformers `Cache`, and all slot arithmetic.

Memory is allocated once, at capacity. Every row of the batch has its own length, its own sinks (its first S real
tokens, whatever the padding) and its own ring head; all of that follows from one tensor, `lengths`.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from . import ops
from .reference import append, held_positions, rotate
from .rope import ProbedLayer, Rope

RECENT = 32  # ids remembered per row, to tell a re-sent history from new text


@dataclass(frozen=True)
class Plan:
    """How a patched model attends: the keywords of `patch`, and what was probed of its layers."""

    sink_size: int
    window_size: int
    prefill: str
    backend: str
    layers: tuple[ProbedLayer, ...]
    route: str = "interface"

    def __deepcopy__(self, memo) -> "Plan":
        return self  # immutable; copies of a cache go on with the same model

    @property
    def capacity(self) -> int:
        return self.sink_size + self.window_size


class SinkLayer(CacheLayerMixin):
    """Keys and values of one layer: (batch, num_kv_heads, S + R, head_dim) each, slots as in `reference.slot_of`.

    A layer whose own sliding window is smaller than W keeps that window: the same ring with no sinks.
    """

    def __init__(self, probed: ProbedLayer, plan: Plan):
        super().__init__()
        self.rope, own = probed.rope, probed.own_window
        self.sink_size = plan.sink_size if own is None else 0
        self.window_size = plan.window_size if own is None else own
        self.is_dense = plan.prefill == "dense" and own is None
        self.seen = 0  # tokens fed, padding included: what generate slices re-sent ids with

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots = self.sink_size + self.window_size
        with torch.inference_mode(False):  # so that the buffers can be written in and out of it
            self.keys, self.values = (
                torch.zeros(*x.shape[:2], slots, x.shape[3], dtype=x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    def check(self, key_states: Tensor) -> None:
        """Raise ValueError if new keys do not fit the buffers of an earlier call."""
        for what in ("dtype", "device"):
            new, old = getattr(key_states, what), getattr(self.keys, what)
            if new != old:
                raise ValueError(f"this SinkCache holds {what} {old}, the model's keys now have {new}: make a new one")

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states  # handed through: `SinkCache.attend` appends

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x

    def reset(self) -> None:
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            index = beam_idx.to(self.keys.device)
            self.keys.copy_(self.keys.index_select(0, index))
            self.values.copy_(self.values.index_select(0, index))

    def select_rows(self, index: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.index_select(0, index.to(x.device)) for x in (self.keys, self.values))


class SinkCache(Cache):
    """The KV cache of a patched model: S pinned sinks and a ring of W recent tokens per layer, constant in memory.

    ``cache = SinkCache(model)`` for a model that `patch` was called on; pass it as ``past_key_values`` to hold a text
    over several calls of `generate` or `forward`. Batch size, dtype and device are those of the first call.

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
        super().__init__(layers=[SinkLayer(layer, self.plan) for layer in self.plan.layers])
        self.lengths: Tensor | None = None
        self._recent: Tensor | None = None  # (batch, <= RECENT) ids last fed, None if unknown
        self._broken = False

    @property
    def seen(self) -> int:
        return self.layers[0].seen

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values))

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

    def begin(self, tokens: int, mask: Tensor | None, batch: int, device: torch.device) -> None:
        """Prepare a step of `tokens` columns. mask: (batch, tokens) bool, False for left padding; None for none."""
        if self.lengths is None or len(self.lengths) != batch or self.lengths.device != device:
            with torch.inference_mode(False):
                self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            for layer in self.layers:
                layer.is_initialized = False
        self._tokens = tokens
        self._counts = None if mask is None else mask.sum(1)
        first = self.lengths if mask is None else self.lengths - (tokens - self._counts)
        self._positions = first[:, None] + torch.arange(tokens, device=device)
        self._rotations: dict = {}
        self._written = False

    def advance(self, ids: Tensor | None) -> None:
        """End the step: its tokens now belong to the rows. ids: (batch, tokens), None if only embeddings are known."""
        self.lengths += self._tokens if self._counts is None else self._counts
        for layer in self.layers:
            layer.seen += self._tokens
        known = ids is not None and (self._recent is not None or self.seen == self._tokens)
        if not known:
            self._recent = None
        elif self._tokens >= RECENT or self._recent is None:
            self._recent = ids[:, -RECENT:].clone()
        else:
            self._recent = torch.cat((self._recent, ids), dim=1)[:, -RECENT:]

    def abort(self, torn: bool) -> None:
        """End a step that raised. A lone token is simply written again; a torn prompt cannot be mended."""
        self._broken = torn or (self._written and self._tokens > 1)

    def attend(self, module, query, key, value, mask, scale, softcap, learned_logits) -> Tensor:
        """Append the step's keys and values to the layer of `module` and attend; shapes as in `ops.prefill`."""
        layer: SinkLayer = self.layers[module.layer_idx]
        if layer.is_initialized:
            layer.check(key)
        else:
            layer.lazy_initialization(key, value)
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
            out = self._attend_varying(layer, query, key, value, lengths, counts, learned_logits, sizes)
        else:
            rotation = None if rope is None else self._rotation(rope, query.device)
            run = ops.decode if self._tokens == 1 else ops.prefill
            out = run(query, key, value, layer.keys, layer.values, lengths, counts, rotation, learned_logits, **sizes)
        self._written = True  # not before: arguments that an op refuses leave the cache as it was
        return out

    def _rotation(self, rope: Rope, device: torch.device) -> Tensor:
        """``[text | sink][cos | sin]`` of the step's tokens, once per step and rope: (batch, tokens, 2, 2, r / 2)."""
        if (rope, device) not in self._rotations:
            text = self._positions.to(device)
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

    def _attend_varying(self, layer, query, key, value, lengths, counts, learned_logits, sizes) -> Tensor:
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
            out = ops.prefill(q, k, v, turned, layer.values, done, after - done, rotation, learned_logits, **sizes)
            pieces.append(out)
            append(layer.keys, k, text, done, after, layer.sink_size)
        return torch.cat(pieces, dim=1)

    # What transformers asks of a cache.

    def holds(self, ids: Tensor) -> bool:
        """Whether `ids` (batch, n) begin with the text this cache has seen: True for a re-sent history."""
        if ids.shape[0] != self.batch_size or ids.shape[1] <= self.seen:
            return False
        if self._recent is None:  # the text came as embeddings: go by length alone, as transformers does
            return True
        return torch.equal(ids[:, self.seen - self._recent.shape[1] : self.seen].to(self._recent), self._recent)

    def reset(self) -> None:
        """Forget the text and keep the memory."""
        super().reset()
        self._recent, self._broken = None, False
        if self.lengths is not None:
            self.lengths.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.lengths.copy_(self.lengths.index_select(0, beam_idx.to(self.lengths.device)))
        if self._recent is not None:
            self._recent = self._recent.index_select(0, beam_idx.to(self._recent.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.select_rows(indices)
        self.lengths = self.lengths.index_select(0, indices.to(self.lengths.device))
        if self._recent is not None:
            self._recent = self._recent.index_select(0, indices.to(self._recent.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size, device=self.lengths.device).repeat_interleave(repeats))

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError("a SinkCache cannot take tokens back yet, so assisted generation is not supported")

    activate_past_recording = crop
