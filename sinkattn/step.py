"""One forward over a SinkCache: where its tokens stand, how they turn, and attention over the rings.

A step is opened by the cache, and leaving it commits it whole, or aborts it, or marks the cache torn:

    with cache.open(...) as step:
        output = model(...)      # every attention layer calls step.attend
        step.commit(input_ids)
"""

import itertools
from functools import partial

import torch
from torch import Tensor

from . import ops
from .observe import AttentionRecord
from .reference import append, attention, held_positions, positions_of, rotate
from .rings import FEW, SinkLayer
from .rope import Rope
from .watch import Watch


class Step:
    """One forward of `tokens` columns over the rows of a cache.

    cache: the `SinkCache` that opened it. tokens: columns. mask: (batch, tokens) bool, False for left padding; None for
        none. places: (batch, tokens, 3) int64, where images give tokens three positions each (M-RoPE); text goes on
        after the largest. Angles follow from places, for sinks from that of token ``min(t, C - 1)``. What is seen
        follows from the count of tokens, as ever.

    Attributes: positions (batch, tokens) int64, of padding below the row's length; counts (batch,) int64, tokens that
    belong to the rows, None for all; written, whether any ring was; fixed, whether states of layers stayed in place.
    """

    is_probe = False
    is_captured = False  # whether it is recorded, and what it is given was checked when it ran
    ahead = None  # what one kernel has made of more than the module that called it, see `fuse.stack.Ahead`

    def __init__(self, cache, tokens: int, mask: Tensor | None, places: Tensor | None):
        self.cache, self.plan, self.rows, self.tokens = cache, cache.plan, cache.rows, tokens
        self.counts = self._positions = None
        if mask is not None:
            self.counts = mask.sum(1) if tokens > 1 else mask[:, 0].long()
        self._start_places(places)
        self._rotations: dict[tuple[Rope, torch.device], Tensor] = {}
        self._in_ring: dict[torch.device, Tensor] = {}  # lengths behind shared sinks
        self._calls: dict[int, int] = {}  # how often each layer has attended
        self._updated: int | None = None  # layer that has handed its keys to the cache and not attended yet
        self.written, self.is_fixed = False, True
        if cache.has_state:
            states = self.rows.states()
            self._held_at = [x.data_ptr() for x in states]
            self._states = [] if mask is None else [x.clone() for x in states]

    @property
    def positions(self) -> Tensor:
        if self._positions is None:
            self._positions = positions_of(self.rows.lengths, self.counts, self.tokens)
        return self._positions

    def _start_places(self, places: Tensor | None) -> None:
        self._places = self._sink_places = None
        if places is None and not self.cache.has_places:
            return
        rows, last = self.rows, self.plan.capacity - 1
        after = self.positions - rows.lengths[:, None]  # below 0: padding
        if places is None:
            places = (self.cache.top[:, None] + 1 + after)[..., None].expand(-1, -1, 3)
        self._places = places
        at = ((self.positions == last) & (after >= 0))[..., None]
        before = rows.anchor if self.cache.has_places else torch.full_like(rows.anchor, last)
        self._anchor = torch.where(at.any(1), (places * at).sum(1), before)  # (batch, 3), of token C - 1
        self._sink_places = torch.where((self.positions <= last)[..., None], places, self._anchor[:, None])

    @property
    def has_places(self) -> bool:
        return self._places is not None

    # What a model's layers and masks call.

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """`Cache.update`: hands the step's keys and values through, `attend` appends them."""
        if self.plan.route == "watch":
            return _Watched(self, layer_idx, key_states, value_states).handed_out()
        self._updated = layer_idx
        return key_states, value_states

    def mask(self, mask_function, local_size, device) -> None:
        """Raise ValueError if a transformers mask function shows any token of the step what comes after it, or hides
        what tokens see that are attended densely: by a window no smaller than the cache.
        """
        if self.tokens == 1 or self.is_captured:
            return
        if self.plan.prefill == "dense" and self.tokens > self.plan.capacity:
            last, zero = torch.tensor([self.tokens - 1], device=device), torch.tensor([0], device=device)
            sees = [
                bool(torch.as_tensor(mask_function(zero, zero, last, last - n)))
                for n in (self.plan.capacity - 1, self.tokens - 1)
            ]
            if sees == [True, False]:
                raise ValueError(
                    f"prefill='dense': the window of a layer's own is shorter than these {self.tokens} tokens: give "
                    "fewer at once, or patch() with 'streaming'"
                )
        query = torch.arange(self.tokens - 1, device=device)[None]
        rows = torch.arange(len(self.rows.lengths), device=device)[:, None]
        if bool(torch.as_tensor(mask_function(rows, rows[:1] * 0, query, query + 1)).any()):
            raise ValueError(
                "the mask lets tokens see those after them (images do so in some models): sinkattn is causal"
            )

    def attend(self, layer_idx: int, query, key, value, mask, scale, softcap, learned_logits) -> Tensor:
        """Append the step's keys and values to a layer and attend; shapes as in `ops.prefill`.

        layer_idx: of the module that attends; where it has called `update` before, what it said there counts.
        """
        layer_idx, self._updated = layer_idx if self._updated is None else self._updated, None
        call = self._calls[layer_idx] = self._calls.get(layer_idx, -1) + 1
        if (layer_idx, call) not in self.rows.rings:
            raise ValueError(
                f"layer {layer_idx} attends, which it did not when the model was patched: sinkattn serves text alone; "
                "if a layer was put in or numbered anew, remove() and patch() again"
            )
        out = self._attend(self.rows.rings[layer_idx, call], query, key, value, scale, softcap, learned_logits)
        if self.cache.observer is not None:
            record = AttentionRecord(layer_idx, query, key, value, out, scale, softcap, learned_logits)
            self.cache.observer.attended((layer_idx, call), record)
        return out

    def append_to(self, rings: list[SinkLayer], layer_idx: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Note that one kernel appends to these rings, and attends. What it needs: lengths, counts, rotation."""
        self._calls.update(dict.fromkeys(layer_idx, 0))
        self.written = True
        rope, device = rings[0].rope, rings[0].keys.device
        return self.rows.lengths, self.counts, None if rope is None else self._rotation(rope, device)

    def _attend(self, layer: SinkLayer, query, key, value, scale, softcap, learned_logits) -> Tensor:
        if layer.is_initialized and not layer.fits(key) and self.cache.seen:
            raise ValueError(
                f"this SinkCache is of keys in {layer.dtype} on {layer.keys.device}, the model's are now {key.dtype} "
                f"on {key.device}: make a new one"
            )
        if not layer.is_initialized or not layer.fits(key):
            layer.allocate(key, value)
            self.rows.drop_captured()
        probed, asked = layer.probed, query.shape[2]
        if asked < self.tokens:  # Gemma-3n, Gemma-4: layers that share keys look at the last tokens alone
            query = torch.nn.functional.pad(query, (0, 0, self.tokens - asked, 0))
        if probed.query_scales is not None:
            place = self.positions.to(query.device).clamp(0, self.plan.capacity - 1)
            query = query * probed.query_scales.to(query.device)[place][:, None, :, None].to(query.dtype)
        slopes = None if probed.alibi_slopes is None else probed.alibi_slopes.to(query.device)
        scale = scale if probed.scale is None else probed.scale
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        if learned_logits is not None:
            learned_logits = learned_logits.reshape(-1)
        lengths, counts = (None if x is None else x.to(query.device) for x in (self.rows.lengths, self.counts))
        rope, sizes = layer.rope, dict(scale=scale, softcap=softcap, backend=self.plan.backend)
        sizes.update(sink_size=layer.sink_size, window_size=layer.window_size)
        if rope is not None:
            sizes.update(rotary_start=rope.start, interleaved=rope.interleaved)
        if self.tokens > 1 and layer.is_dense:
            sizes["dense_window"] = 1 << 40
        if self.tokens <= FEW and layer.sink_reach is None:
            sizes["arrivals"] = layer.counters()
        if rope is not None and rope.varies:
            out = self._attend_varying(layer, query, key, value, lengths, counts, learned_logits, slopes, sizes)
        else:
            rotation = None if rope is None else self._rotation(rope, query.device)
            held = query, key, value, layer.keys, layer.values, lengths, counts, rotation, learned_logits, slopes
            given = *held, layer.key_scales, layer.value_scales
            if layer.shared is not None:
                return self._attend_shared(layer, given, sizes)[:, -asked:]
            # overlap: since the cache was last written, kernels that do not have made the step's lengths and angles
            op = partial(ops.decode if self.tokens == 1 else ops.prefill, overlap=True)
            if layer.sink_reach is not None:
                op, _ = partial(attention, sink_reach=layer.sink_reach), sizes.pop("backend")
            out = self._write(op, given, sizes)
        return out[:, -asked:]

    def _attend_shared(self, layer: SinkLayer, given: tuple, sizes: dict) -> Tensor:
        """Attention where the rows share their sinks: those are read once, and the ring as if it were all of the cache.

        Several tokens a row go over a copy of the cache with sinks for each row, by the usual op.
        """
        query, key, value, keys, values, lengths, counts, rotation, learned_logits, slopes, *_ = given
        if self.tokens > 1:
            whole = layer.with_sinks(keys, values)
            out = self._write(ops.prefill, (*given[:3], *whole, *given[5:]), sizes)
            for ring, x in zip((keys, values), whole, strict=True):
                ring.copy_(x[:, :, layer.sink_size :])
            return out
        if query.device not in self._in_ring:
            self._in_ring[query.device] = lengths - layer.sink_size
        alone = {name: x for name, x in sizes.items() if name not in ("sink_size", "arrivals")}
        sinks = layer.shared.keys, layer.shared.values
        found = ops.attend_shared(query, *sinks, lengths, rotation, slopes, **alone)
        given = query, key, value, keys, values, self._in_ring[query.device], counts, rotation, learned_logits, slopes
        return self._write(partial(ops.decode, joined=found, overlap=True), given, dict(sizes, sink_size=0))

    def _write(self, op, given: tuple, sizes: dict) -> Tensor:
        """Run an op that writes a ring. What it refuses, it refuses before it writes."""
        before, self.written = self.written, True
        try:
            return op(*given, **sizes)
        except (ValueError, TypeError):
            self.written = before
            raise

    def _rotation(self, rope: Rope, device: torch.device) -> Tensor:
        """``[text | sink][cos | sin]`` of the step's tokens, once per step and rope: (batch, tokens, 2, 2, r / 2)."""
        if (rope, device) not in self._rotations:
            self._rotations[rope, device] = self._angles(rope, device)
        return self._rotations[rope, device]

    def _angles(self, rope: Rope, device: torch.device) -> Tensor:
        if self._places is not None:
            return rope.table_of_places(torch.stack((self._places, self._sink_places), dim=2).to(device))
        if self.plan.prefill == "dense" and self.tokens > 1:
            text = self.positions.to(device)
            return rope.table(torch.stack((text, self._sink_positions(text)), dim=-1))
        lengths, counts = (None if x is None else x.to(device) for x in (self.rows.lengths, self.counts))
        return rope.table_of_step(lengths, counts, self.tokens, self.plan.capacity)

    def _sink_positions(self, text: Tensor) -> Tensor:
        """Where queries stand as the sinks see them: ``min(t, C - 1)``, and counted on from there in a dense prompt."""
        if self.plan.prefill == "dense" and self.tokens > 1:
            start = self.rows.lengths.to(text.device)[:, None]
            return start.clamp(max=self.plan.capacity - 1) + (text - start)
        return text.clamp(max=self.plan.capacity - 1)

    def _attend_varying(
        self, layer: SinkLayer, query, key, value, lengths, counts, learned_logits, slopes, sizes
    ) -> Tensor:
        """Attention where frequencies depend on the row's length n = min(t + 1, C): all keys turn when n changes them.

        So the ring keeps its keys unturned, and every run of tokens with the same frequencies gets a turned copy.
        Exact, but it moves each key three times instead of once; rows past C tokens, and C within the trained length,
        never vary.
        """
        rope, tokens, ring_size = layer.rope, self.tokens, layer.keys.shape[2] - layer.sink_size
        positions = self.positions.to(query.device)
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
            pieces.append(self._write(ops.prefill, given, sizes))
            append(layer.keys, k, text, done, after, layer.sink_size)
        return torch.cat(pieces, dim=1)

    # The end of a step.

    def check_whole(self) -> None:
        """Raise RuntimeError if any layer that attends has not reached this step."""
        missing = [layer for layer, call in self.rows.rings if self._calls.get(layer, -1) < call]
        if missing:
            raise RuntimeError(
                f"layer {missing[0]} did not attend by sinkattn: something took its attention away after "
                "sinkattn.patch() (set_attn_implementation, another attention module); remove() and patch() again"
            )

    def settle(self, ids: Tensor | None) -> None:
        """What the end of a step changes on the device. ids: (batch, tokens), None if only embeddings are known."""
        rows, tops = self.rows, None
        if self._places is not None:
            rows.anchor.copy_(self._anchor)
            new = self.positions >= rows.lengths[:, None]
            tops = self._places.amax(2).masked_fill(~new, -1).cummax(1).values
            tops = torch.maximum(tops, self.cache.top[:, None])
        rows.take(ids, self.tokens, self.counts, tops)
        if self.cache.has_state:
            self.is_fixed = self._held_at == [x.data_ptr() for x in rows.states()]
            if self.counts is not None:
                self._keep_states()

    def _keep_states(self) -> None:
        """Rows that took no token in this step keep their state, or start from an empty one."""
        for i, state in enumerate(self.rows.states()):
            kept = (self.counts == 0).to(state.device).view(-1, *[1] * (state.dim() - 1))
            before = self._states[i] if i < len(self._states) else torch.zeros((), device=state.device)
            state.copy_(torch.where(kept, before.to(state.dtype), state))


class _Watched(Watch):
    """Watched attention of a step: what the model computes over the step alone is dropped for an op over the cache."""

    def __init__(self, step: Step, layer_idx: int, key: Tensor, value: Tensor):
        super().__init__(layer_idx, key, value)
        self.step = step

    def output(self, found):
        query = self.query.to(self.key.dtype)
        heads_first = self.step.cache.layers[self.layer_idx].probed.heads_first
        out = self.step.attend(self.layer_idx, query, self.key, self.value, None, 1.0, 0.0, None)
        out = out.transpose(1, 2) if heads_first else out
        return out.reshape(found.shape).to(found.dtype)
