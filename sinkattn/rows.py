"""What a batch of texts keeps on its device: the rings of all layers, and of each text its length and its ids.

Memory is allocated once, at capacity. Every row of the batch has its own length, its own sinks (its first S real
tokens, whatever the padding) and its own ring head; all of that follows from one tensor, `lengths`.
"""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from .agreement import BASE, INVERSE, Agreement, digest, powers
from .backends import has_kernels
from .graph import Captured
from .reference import held_positions, positions_of
from .rings import FEW, Plan, SharedSinks, has_state, layers_of, states_of

PIECE = 8  # tokens: a text that is but one piece of so many, over and over, tells nothing
FIRST = 3  # tokens of every text whose ids are kept at least, to know it by
SHARED = 8192  # copied sinks, in tokens, that take more time on an H200 than shared ones read apart


class Rows:
    """What a batch of texts keeps on its device, at fixed addresses: layers, lengths, and the graph that was captured.

    layers: one per layer of the model, as transformers' `Cache` has them. rings: whatever attends, as in `Plan.layers`.
    lengths: (batch,) int64. peak: (batch,) int64, the largest that a row's length was before tokens were taken back.
    ids: (batch, S' + R' + 1) int64, the first S' = max(S, 3) of a row's text and the last R' - 1, by slot as in
        `reference.slot_of`, R' = max(S', W) + 1 + slack, -1 where there is none or none is known. Slots from the next
        token on may hold anything, and so may the last column, for what is not kept.
    digest: (batch,) int64, of all ids of a row, those that are forgotten too: ``d * BASE + id``, modulo 2^64.
    Where images have given tokens three positions (M-RoPE): tops, like ids, the largest up to each token, -1 where that
        is its place in the text; anchor, (batch, 3), those of token C - 1.
    smallest: slots of the smallest ring and its sinks, tokens: until then nothing is overwritten.
    captured: steps over these tensors (`graph.Captured`), by their tokens. captured_for: what they were captured with;
        masked: tokens of those whose mask is not all True, see `CapturedSteps`. warm: tokens of the steps that have run
        and left everything in place.
    """

    def __init__(self, plan: Plan, batch: int, device: torch.device):
        self.layers, self.rings = layers_of(plan)
        self.plan, self.slack, self.sink_size = plan, plan.slack, max(plan.sink_size, FIRST)
        self.ring_size = max(plan.window_size, self.sink_size) + 1 + plan.slack
        self.smallest = min(ring.sink_size + ring.window_size + ring.slack for ring in self.rings.values())
        with torch.inference_mode(False):
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            self.ids = self.lengths.new_full((batch, self.sink_size + self.ring_size + 1), -1)
            self.tops = torch.full_like(self.ids, -1)
            self.digest, self.peak = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
            self.anchor = torch.zeros(batch, 3, dtype=torch.int64, device=device)
        self.has_state = has_state(self.layers)
        self.stream = _stream_of(device)
        self.drop_captured()

    def __getstate__(self) -> dict:
        return {**vars(self), "captured": {}}  # another process needs graphs of its own

    def drop_captured(self) -> None:
        """Nothing that was captured holds any more: tensors are in other places."""
        self.captured: dict[int, Captured] = {}
        self.captured_for, self.masked, self.warm = None, set(), set()

    def ran(self, tokens: int, is_fixed: bool) -> None:
        """A step of so many tokens has run. is_fixed: whether states of layers stayed where they were."""
        if self.has_state and (tokens > 1 or not is_fixed):
            self.warm.clear()
        elif tokens <= FEW:
            self.warm.add(tokens)

    def states(self) -> list[Tensor]:
        """What layers keep besides rings, (batch, ...) each."""
        return [x for layer in self.layers for x in states_of(layer)]

    def named(self) -> dict[str, Tensor]:
        """All that the rows hold, (batch, ...) each, by the names that saved texts have."""
        states = {f"state.{i}.{k}": x for i, layer in enumerate(self.layers) for k, x in enumerate(states_of(layer))}
        rings = {
            f"{name}.{layer}.{call}": x
            for (layer, call), ring in self.rings.items()
            for name, x in ring.buffers().items()
        }
        return {**self._small(), **states, **rings}

    def tensors(self) -> list[Tensor]:
        return list(self.named().values())

    def _small(self) -> dict[str, Tensor]:
        """What there is of each row but rings and states, by name."""
        return {name: getattr(self, name) for name in ("lengths", "peak", "ids", "tops", "digest", "anchor")}

    @torch.inference_mode(False)
    def picked(self, index: Tensor, may_share: bool = False) -> "Rows":
        """A copy of some rows. may_share: whether many copies of one row may have its sinks together."""
        size = self._sinks_to_share(index) if may_share else 0
        to_share = {name: ring for name, ring in self.rings.items() if size > 0 and ring.can_share}
        ends = {id(x): x[:, :, size:] for ring in to_share.values() for x in (ring.keys, ring.values)}
        made = {id(x): ends.get(id(x), x).index_select(0, index.to(x.device)) for x in self.tensors()}
        other = copy.deepcopy(self, made)
        for name, ring in to_share.items():
            sinks = (x[index[:1].to(x.device), :, :size] for x in (ring.keys, ring.values))
            other.rings[name].shared = SharedSinks(*sinks)
        if to_share:  # by other kernels, which have not run
            other.drop_captured()
        return other

    def _sinks_to_share(self, index: Tensor) -> int:
        """How many sinks copies of rows, index (n,) int64, should have together: all or none."""
        size = self.plan.sink_size
        if size == 0 or (len(index) - 1) * size < SHARED or self.has_state or self.shares_sinks:
            return 0
        if any(ring.sink_size < size for ring in self.rings.values()):  # its ring has more of the beginning than sinks
            return 0
        is_one = bool((index == index[0]).all()) and int(self.lengths[index[0]]) >= size
        return size if is_one else 0

    @property
    def shares_sinks(self) -> bool:
        """Whether the rows have their sinks together: all begin with the same S tokens, as long as they live."""
        return any(ring.shared is not None for ring in self.rings.values())

    def with_sinks(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`named` of some rows, as if each had its own sinks."""
        tensors = dict(tensors)
        for (layer, call), ring in self.rings.items():
            if ring.shared is not None:
                names = [f"{name}.{layer}.{call}" for name in ("keys", "values")]
                tensors.update(zip(names, ring.with_sinks(*(tensors[name] for name in names)), strict=True))
        return tensors

    def without_sinks(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The other way round. Raises ValueError if any row has others than those that are shared."""
        tensors = dict(tensors)
        if self.shares_sinks and int(tensors["lengths"].min()) < self.plan.sink_size:
            raise ValueError(f"these texts are shorter than the {self.plan.sink_size} sinks that the rows share")
        for (layer, call), ring in self.rings.items():
            for what in ("keys", "values") if ring.shared is not None else ():
                name, sinks = f"{what}.{layer}.{call}", getattr(ring.shared, what)
                own, tensors[name] = tensors[name].split([sinks.shape[2], tensors[name].shape[2] - sinks.shape[2]], 2)
                if not torch.equal(own, sinks.expand_as(own)):
                    raise ValueError(
                        "these texts begin otherwise than those of the rows, which share their sinks, or were computed "
                        "in another batch, which rounds otherwise"
                    )
        return tensors

    # The text.

    def take(self, ids: Tensor | None, tokens: int, counts: Tensor | None, tops: Tensor | None) -> None:
        """Note the ids that a step has fed, and count them in `lengths`.

        ids: (batch, tokens), None for unknown ones. counts: (batch,) int64, tokens that are no padding; None for all.
        tops: (batch, tokens) int64, or None.
        """
        ids = self.ids.new_full((len(self.ids), tokens), -1) if ids is None else ids.to(self.ids)
        if tokens > 1:
            self._note(ids, positions_of(self.lengths, counts, tokens), counts, tops)
        elif tops is None and has_kernels(ids.device):
            known = self.lengths, self.digest, self.ids
            torch.ops.sinkattn.note(ids[:, 0].contiguous(), counts, *known, BASE, self.sink_size)
            return  # lengths have counted
        else:  # padding is written where the next token will be
            slots = self._slots(self.lengths[:, None])
            self.ids.scatter_(1, slots, ids)
            if tops is not None:
                self.tops.scatter_(1, slots, tops)
            if counts is None:
                torch.add(ids[:, 0], self.digest, alpha=BASE, out=self.digest)
            else:
                self.digest.addcmul_(counts, torch.add(ids[:, 0], self.digest, alpha=BASE - 1))
        self.lengths.add_(tokens if counts is None else counts)

    def _note(self, ids: Tensor, positions: Tensor, counts: Tensor | None, tops: Tensor | None) -> None:
        """Note the ids of several tokens a row. positions: (batch, tokens) int64, of padding below the row's length."""
        before, after = self.lengths[:, None], self.lengths[:, None] + positions.shape[1]
        if counts is not None:
            after = self.lengths[:, None] + counts[:, None]
        fed = positions >= before
        lasting = (positions < self.sink_size) | (positions >= after - self.ring_size)  # no later one takes its slot
        slots = torch.where(fed & lasting, self._slots(positions), self.ids.shape[1] - 1)
        self.ids.scatter_(1, slots, ids)
        if tops is not None:
            self.tops.scatter_(1, slots, tops)
        power = powers(positions.shape[1], ids.device)[(after - before)[:, 0]]
        self.digest.mul_(power).add_(digest(ids, (after - 1 - positions).masked_fill(~fed, -1)))

    def _slots(self, positions: Tensor) -> Tensor:
        """`slot_of` in fewer kernels: the remainder of C is below 0 for sinks, so that they stay where they are."""
        return torch.fmod(positions - self.sink_size, self.ring_size) + self.sink_size

    def held(self, lengths: Tensor | None = None) -> Tensor:
        """The ids that stand in the cache, (batch, S + R) int64 in no order, -1 for none.

        lengths: (batch,) int64, as the cache was when the rows held so many tokens, up to `slack` fewer; None for now.
        """
        ids, positions = self.known(lengths)
        begins = (self.lengths if lengths is None else lengths)[:, None] - self.plan.window_size
        is_out = (positions >= self.plan.sink_size) & (positions < begins)
        return ids.masked_fill((positions < 0) | is_out, -1)

    def in_order(self) -> Tensor:
        """The ids that are known, (batch, S + R) int64 by their positions, behind -1 for none."""
        ids, positions = self.known()
        order = positions.argsort(1)
        return torch.where(positions < 0, -1, ids).gather(1, order)

    def text(self) -> tuple[Tensor, Tensor]:
        """`in_order`, no wider than it needs to be, for a forward: (batch, n) ids, 0 for none, and their mask, bool."""
        ids = self.in_order()[:, -max(int(self.lengths.max()), 1) :]
        return ids.clamp(min=0), ids >= 0

    def room(self, refeeds: bool) -> Tensor:
        """How many tokens can be taken back now, (batch,) int64. refeeds: whether the first of them is fed again."""
        if self.has_state:
            return torch.zeros_like(self.lengths)
        peak = torch.maximum(self.peak, self.lengths)
        spare = (self.slack + refeeds + self.lengths - peak).clamp(min=0)
        own = self.lengths - self.plan.sink_size if self.shares_sinks else self.lengths
        return torch.where(peak > self.smallest, torch.minimum(spare, own), own)

    def take_back(self, counts: Tensor, most: int) -> None:
        """Let the rows end earlier, by counts, (batch,) int64, of at most `room` and `most`.

        What they saw there is in the ring: a slot gets the token R after its own, so that those up to ``peak - 1 - R``
        are lost, and the token at t sees no ring token before ``t - W + 1``. R = W + slack keeps them apart for
        ``t >= peak - 1 - slack``.
        """
        torch.maximum(self.peak, self.lengths, out=self.peak)
        self.lengths.sub_(counts)
        behind = torch.arange(most, device=counts.device)
        ids = self.ids.gather(1, self._slots(self.lengths[:, None] + behind))  # what is taken back comes first
        exponents = counts[:, None] - 1 - behind
        self.digest.sub_(digest(ids, exponents)).mul_(powers(most, ids.device, INVERSE)[counts])

    def top(self) -> Tensor:
        """The largest position that each row has had, (batch,) int64, -1 for none."""
        last = self.lengths[:, None] - 1
        top = self.tops.gather(1, self._slots(last.clamp(min=0)))
        return torch.where((top < 0) | (last < 0), last, top)[:, 0]

    def wrote(self, tokens: int) -> None:
        """A step that did not count has written where the next tokens will be."""
        torch.maximum(self.peak, self.lengths + tokens, out=self.peak)

    def next_id(self) -> Tensor:
        """The id that lies in the slot of the next token, (batch,) int64: where tokens were taken back, the first."""
        return self.ids.gather(1, self._slots(self.lengths[:, None]))[:, 0]

    def last(self, n: int) -> Tensor:
        """The last n ids of every row, (batch, n) int64, -1 before its first. n: up to `smallest`."""
        positions = self.lengths[:, None] + torch.arange(-n, 0, device=self.lengths.device)
        return self.ids.gather(1, self._slots(positions.clamp(min=0))).masked_fill(positions < 0, -1)

    def known(self, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ids that are held, and their positions, (batch, S + R) int64 each: -1 where there is none.

        lengths: as of `held`.
        """
        lengths = self.lengths if lengths is None else lengths
        ids, positions = self.ids[:, :-1], held_positions(lengths, self.sink_size, self.ring_size)
        oldest = torch.maximum(self.peak, self.lengths + 1)[:, None] - self.ring_size  # of those not overwritten
        is_gone = (positions >= self.sink_size) & (positions < oldest)
        return ids, positions.masked_fill((ids < 0) | is_gone, -1)

    def compare(self, ids: Tensor, counts: Tensor, with_digest: bool) -> list[Agreement]:
        """How texts agree with those that the rows hold, row by row.

        ids: (batch, n) int64, padded on the left. counts: (batch,) int64, tokens of each that are no padding.
        with_digest: whether all ids of the rows were known, so that what is forgotten can be compared as well.
        """
        width, (held, positions) = ids.shape[1], self.known()
        begins, lengths = width - counts[:, None], self.lengths[:, None]
        given = ids.gather(1, (positions + begins).clamp(0, width - 1))
        compared = (positions >= 0) & (positions < counts[:, None])
        agrees = compared & (given == held)
        first = positions.masked_fill(~compared | agrees, width).amin(1)
        leading = (agrees & (positions < first[:, None])).sum(1)
        common = torch.minimum(torch.minimum(first, counts), self.lengths)[:, None]  # the digests of so many tokens
        behind = digest(self.ids[:, :-1], (lengths - 1 - positions).masked_fill(positions < common, -1))
        inverse = powers(held.shape[1], ids.device, INVERSE)
        mine = (self.digest - behind) * inverse[(lengths - common)[:, 0].clamp(max=held.shape[1])]
        columns = torch.arange(width, device=ids.device) - begins
        exponents = (common - 1 - columns).masked_fill((columns < 0) | (columns >= common), -1)
        is_same = (digest(ids, exponents) == mine) | (not with_digest)
        found = (self.lengths, counts, first, leading, agrees.sum(1), compared.sum(1), is_same, self.room(True))
        return [Agreement(*row) for row in torch.stack(found, dim=1).tolist()]

    def are_one_piece(self) -> list[bool]:
        """Whether a row's text is but one short piece, over and over, as far as it is known: blank lines, silence."""
        found = []
        for ids, positions in zip(*(x.cpu() for x in self.known()), strict=True):
            order = positions.argsort()[int((positions < 0).sum()) :]
            text, at = ids[order], positions[order]
            pieces = range(1, min(PIECE, len(text) // 3) + 1)
            found.append(any(torch.equal(text, text[-n:][(at - at[-1] - 1) % n]) for n in pieces))
        return found

    def forget(self, index: Tensor) -> None:
        """Forget the texts of some rows, index (n,) int64, all but the sinks that they share."""
        size, index = self.plan.sink_size if self.shares_sinks else 0, index.to(self.lengths.device)
        for x in (*self.states(), self.peak):
            x.index_fill_(0, index.to(x.device), 0)
        for x in (self.ids, self.tops):
            x[:, size:].index_fill_(0, index, -1)
        self.lengths.index_fill_(0, index, size)
        exponents = torch.arange(size - 1, -1, -1, device=index.device).expand(len(index), -1)
        self.digest.index_copy_(0, index, digest(self.ids[index, :size], exponents))

    def reset(self) -> None:
        for x, empty in ((self.ids, -1), (self.tops, -1), (self.digest, 0), (self.peak, 0), (self.lengths, 0)):
            x.fill_(empty)
        for layer in self.each():
            layer.reset()

    def each(self) -> set:
        return {*self.layers, *self.rings.values()}

    @torch.inference_mode(False)
    def reordered(self, index: Tensor) -> "Rows":
        """Row i of the result is what row ``index[i]`` was: in place, captured step and all, if there are as many."""
        for layer in self.each():
            layer.reorder_cache(index)
        taken = {name: x.index_select(0, index.to(x.device)) for name, x in self._small().items()}
        if len(index) == len(self.lengths):
            for name, x in taken.items():
                getattr(self, name).copy_(x)
            return self
        other = copy.copy(self)
        vars(other).update(taken)
        other.drop_captured()
        return other


class SpareRows:
    """The rows of the last cache that is gone, so that the next one need not capture its step again.

    users: the handle of a patched model, and those of its copies. is_closed: whether all of them are gone.
    """

    def __init__(self):
        self.rows: Rows | None = None
        self.users = weakref.WeakSet[Any]()
        self.is_closed = False

    def put(self, rows: Rows) -> None:
        if rows.captured and not self.is_closed and not rows.shares_sinks:
            self.rows = rows

    def take(self, batch: int, device: torch.device) -> Rows | None:
        """Empty rows, if there are any that suit."""
        rows, self.rows = self.rows, None
        if rows is None or len(rows.lengths) != batch or rows.lengths.device != device:
            return None
        if rows.stream != _stream_of(device):
            return None
        rows.reset()
        return rows

    def __getstate__(self) -> dict:
        # a graph stays with its process
        return {"rows": None, "users": weakref.WeakSet[Any](), "is_closed": self.is_closed}

    def close(self, user) -> None:
        """Give the memory back, and for good if nobody else uses it."""
        self.users.discard(user)
        self.rows, self.is_closed = None, not self.users


def _stream_of(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
