"""SinkCache: the KV cache of a patched model, as a transformers `Cache`."""

import contextlib
import copy
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .rows import RECENT, Plan, Rows, layers_of
from .step import Step


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
        self.layers, self.rings = layers_of(self.plan)
        self.has_state = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        self.rows: Rows | None = None
        self._keeper: weakref.finalize | None = None
        self.seen = 0
        self.step: Step | None = None  # under way
        self.observer = None  # an `Observer` that wants to know what attends
        self._known = 0  # how many of the last ids fed are known, at the end of `rows.recent`
        self.has_places = False  # whether places are not positions any more
        self._torn = False  # whether a step has ended half-way

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
    def top(self) -> Tensor:
        """The largest position that each row has had, (batch,) int64, -1 for none; pictures set it off its length."""
        top = self.rows.top if self.has_places else self.lengths - 1
        return top.where(self.lengths > 0, -1)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for ring in self.rings.values() if ring.is_initialized for x in (ring.keys, ring.values))

    # Steps.

    def check(self, batch: int, device: torch.device, plan: Plan) -> None:
        """Raise ValueError if this cache cannot take `batch` rows of ids on `device`, of the model that has `plan`."""
        if plan is not self.plan:
            raise ValueError("this SinkCache was made for another model, or for an earlier patch of this one")
        if self._torn:
            raise ValueError("an earlier call was interrupted half-way and left this cache torn; reset() it")
        if self.seen and batch != self.batch_size:
            raise ValueError(
                f"this SinkCache holds {self.batch_size} rows and cannot go on with {batch}; reset() it or make another"
            )
        if self.seen and device != self.lengths.device:
            raise ValueError(
                f"this SinkCache holds device {self.lengths.device}, the input is on {device}: make a new one"
            )

    @contextlib.contextmanager
    def open(self, tokens: int, mask: Tensor | None, batch: int, device: torch.device, places=None) -> Iterator[Step]:
        """A step of `tokens` columns, see `Step`. Whoever opens it commits it; left otherwise, the step is aborted.

        A lone token is then simply written again, later; a prompt or a state cannot be mended, and the cache is torn.
        """
        if self.rows is None or len(self.lengths) != batch or self.lengths.device != device:
            self._use(self.plan.spare.take(batch, device) or Rows(self.plan, batch, device))
        was_torn, self._torn = self._torn, True  # until the step ends as it should: Ctrl-C may come anywhere
        self.step = step = Step(self, tokens, mask, places)
        try:
            yield step
        except BaseException:
            if self.step is not None:  # not in the middle of its commit
                self._torn = was_torn or self.has_state or (step.written and tokens > 1)
            raise
        finally:
            self.step = None

    def commit(self, ids: Tensor | None, is_captured: bool = False) -> None:
        """End the open step: its tokens now belong to the rows.

        ids: (batch, tokens), None if only embeddings are known. is_captured: whether the step is recorded as a graph
        and has not run.
        """
        step, self.step = self.step, None
        step.check_whole()
        step.settle(ids)
        if is_captured:
            self._torn = False
            return
        self.rows.is_warm = step.tokens == 1 and step.is_fixed
        self.has_places = step.has_places
        self.count(step.tokens, ids is not None)

    def cancel(self) -> None:
        """End a step whose capture failed: nothing has run."""
        self._torn = False

    def tear(self) -> None:
        """Mark the text as half fed, until the next step is committed or counted, or `mend`."""
        self._torn = True

    def mend(self) -> None:
        """What `tear` began is complete."""
        self._torn = False

    def count(self, tokens: int, are_known: bool) -> None:
        """What the end of a step changes on the host; the last thing of it."""
        goes_on = are_known and (self._known or not self.seen)
        self._known = min(self._known + tokens, RECENT) if goes_on else 0
        self.seen += tokens
        self._torn = False

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """What the model's layers call: hands the step's keys and values through, `Step.attend` appends them."""
        if self.step is None:
            raise RuntimeError("a SinkCache serves the model that sinkattn.patch() was given, while it is patched")
        return self.step.update(key_states, value_states, layer_idx)

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
        return self.seen if self.step is None else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def reset(self) -> None:
        """Forget the text and keep the memory."""
        self.seen, self._known, self._torn = 0, 0, False
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
