"""SinkCache: the KV cache of a patched model, as a transformers `Cache`."""

import contextlib
import copy
import operator
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from . import keeping, saved
from .agreement import Agreement
from .arguments import rows_of, whole
from .introspect import input_device
from .rings import Plan, has_state, layers_of, writable
from .rollback import take_back
from .rows import Rows
from .step import Step
from .unfed import Unfed


def _in_a_step(name: str) -> Callable[..., Any]:
    """A method of transformers' own, for layers that have a state: they change it in place."""

    def method(self: "SinkCache", *args: Any, **kwargs: Any) -> Any:
        self._open_step()
        return getattr(Cache, name)(self, *args, **kwargs)

    return method


class SinkCache(Cache):
    """The KV cache of a patched model: S pinned sinks and a ring of W recent tokens per layer, constant in memory.

    ``cache = SinkCache(model)`` for a model that `patch` was called on; pass it as ``past_key_values`` (``cache``, as
    transformers calls it from 5.24 on) to hold a text over several calls of `generate` or `forward`. Batch size, dtype
    and device are those of the first call. A copy, by `copy.copy` too, is a cache of its own; it can be pickled, and
    loaded as long as its model is patched in the same process. `save` and `load` go from one process to another.

    `forward` takes new tokens alone. `generate` takes the whole history with what is new, or the new ids alone:

    - Ids that begin with all that the cache was fed are the history, however their rows are padded. They are compared
      with the ids that it holds, and by a digest with those that it has forgotten. What was fed as embeddings is
      unknown and agrees with anything.
    - Ids whose first three tokens are those of the text, or more than half of those that can be compared, are a history
      that was edited or cut. The tokens from where it differs are taken back, if they can be (see `crop`) and what is
      before them are 8 tokens or half of the text; else ValueError, which says from which token on it differs.
      Pictures are not compared, only the ids at their places.
    - Other ids are new. So are all if the text is one piece of at most 8 tokens over and over (blank lines, silence),
      which tells nothing. An attention_mask with as many more columns as `seen` says by itself that its ids are new.

    The last token of an answer is chosen and not fed yet. It belongs to the text: new ids go on behind it, unless they
    bring it themselves, as their first. Rows that end before others are fed no padding; pad ids that `generate` gave at
    the end of an answer are no part of the text, where it knows a pad id.

    Attributes:
        lengths: (batch,) int64, tokens each row holds (padding not counted), or None before the first call.
        seen: columns of the text that were fed, padding included (also `get_seq_length()`).
        nbytes: bytes of the key and value buffers, scales and all, of shared sinks once, and of layers' states.
        shares_sinks: whether the rows have their sinks together.
        is_torn: whether something has ended half-way; all but `reset` is then refused.

    Raises ValueError if the model is not patched.
    """

    def __init__(self, model: nn.Module):
        handle = getattr(model, "_sinkattn", None)
        if handle is None:
            raise ValueError(f"SinkCache needs a patched model; call sinkattn.patch({type(model).__name__}) first")
        self.plan: Plan = handle.plan
        super().__init__(layers=[])
        self.layers, self.rings = layers_of(self.plan)
        self.has_state = has_state(self.layers)
        self.rows: Rows | None = None
        self._keeper: weakref.finalize | None = None
        self.step: Step | None = None  # under way
        self.observer = None  # an `Observer` that wants to know what attends
        self.changes = 0  # how often the text has changed
        self._begin()

    def _begin(self) -> None:
        """What the host knows of an empty text."""
        self.seen = 0
        self.has_places = False  # whether places are not positions any more
        self.all_known = True  # whether all was fed as ids
        self._goes_on = False  # whether the step under way is but a piece of an input, or may turn out to be none
        self.ended: Tensor | None = None  # (batch,) bool, rows that `generate` feeds nothing any more
        self.unfed: Unfed | None = None  # what it chose last
        self.fed_for_nothing: tuple[int, Unfed] | None = None  # by one that failed then; `changes` when it had
        self.is_searched = False  # whether the rows are the beams of a search
        self.are_checked = False  # whether ids that come are known to be right: the model has proposed or chosen them
        self.is_torn = False

    def _use(self, rows: Rows) -> None:
        """Hold other rows; when this cache is gone, they may serve the next one."""
        if self._keeper is not None:
            self._keeper.detach()
        self.rows, self.layers, self.rings = rows, rows.layers, rows.rings
        if not torch.compiler.is_compiling():
            self._keeper = weakref.finalize(self, self.plan.spare.put, rows)
            self._keeper.atexit = False

    def __getstate__(self) -> dict:
        if self.step is not None:
            raise RuntimeError("a SinkCache cannot be copied in the middle of a step")
        return {**vars(self), "_keeper": None}

    def __setstate__(self, state: dict) -> None:
        with torch.inference_mode(False):  # tensors made in it could not be written to outside of it
            is_readonly = state["rows"] is not None and state["rows"].lengths.is_inference()
            vars(self).update(copy.deepcopy(state) if is_readonly else state)

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict) -> "SinkCache":
        memo[id(self)] = copied = object.__new__(type(self))
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return copied

    def __copy__(self) -> "SinkCache":
        return copy.deepcopy(self)

    @property
    def lengths(self) -> Tensor | None:
        return None if self.rows is None else self.rows.lengths

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else len(self.lengths)

    @property
    def top(self) -> Tensor:
        """The largest position that each row has had, (batch,) int64, -1 for none; pictures set it off its length."""
        return self.rows.top() if self.has_places else self.lengths - 1

    @property
    def nbytes(self) -> int:
        shared = [ring.shared for ring in self.rings.values() if ring.shared is not None]
        own = [x for ring in self.rings.values() for x in ring.buffers().values()]
        own += [] if self.rows is None else self.rows.states()
        return sum(x.nbytes for x in (*own, *(x for sinks in shared for x in (sinks.keys, sinks.values))))

    @property
    def shares_sinks(self) -> bool:
        """Whether all rows have their sinks together, (1, num_kv_heads, S, head_dim) a layer: copies of one row have,
        that `repeat` or `Stream.fork` has made, where it saves 8,192 tokens or more. They stay theirs until `reset`.

        Layers that do not see all sinks as they lie there (dynamic frequencies, windows of their own between W and
        S + W) and those in 8 bits have their own. All rows do in models with a state or with layers that see no sinks
        (a window of their own of W or less), and in texts with pictures.
        """
        return self.rows is not None and self.rows.shares_sinks

    # Steps.

    def check(self, batch: int, device: torch.device, plan: Plan) -> None:
        """Raise ValueError if this cache cannot take `batch` rows of ids on `device`, of the model that has `plan`."""
        if plan is not self.plan:
            raise ValueError("this SinkCache was made for another model, or for an earlier patch of this one")
        self.check_whole()
        if self.seen and batch != self.batch_size:
            raise ValueError(
                f"this SinkCache holds {self.batch_size} rows and cannot go on with {batch}; reset() it or make another"
            )
        if self.seen and device != self.lengths.device:
            raise ValueError(
                f"this SinkCache holds device {self.lengths.device}, the input is on {device}: make a new one"
            )

    def check_whole(self) -> None:
        if self.is_torn:
            raise ValueError("an earlier call was interrupted half-way and left this cache torn; reset() it")

    @contextlib.contextmanager
    def open(
        self, tokens: int, mask: Tensor | None, batch: int, device: torch.device, places: Tensor | None = None
    ) -> Iterator[Step]:
        """A step of `tokens` columns, see `Step`. Whoever opens it commits it; left otherwise, the step is aborted.

        A lone token, and as many more as there is slack, are then simply written again, later; a prompt or a state
        cannot be mended, and the cache is torn.
        """
        if self.rows is None or len(self.lengths) != batch or self.lengths.device != device:
            self._use(self.plan.spare.take(batch, device) or Rows(self.plan, batch, device))
        was_torn, self.is_torn = self.is_torn, True  # until the step ends as it should: Ctrl-C may come anywhere
        step = None
        try:
            self.step = step = Step(self, tokens, mask, places)
            yield step
        except BaseException:
            if step is None:  # nothing has run
                self.is_torn = was_torn
            elif self.step is not None:  # not in the middle of its commit
                is_lost = tokens > (1 if self.plan.prefill == "dense" else 1 + self.plan.slack)
                self.is_torn = was_torn or self.has_state or (step.written and is_lost)
                if step.written and not self.is_torn:
                    self.rows.wrote(tokens)
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
            self.is_torn = False
            return
        self.rows.ran(step.tokens, step.is_fixed)
        self.has_places = step.has_places
        self.count(step.tokens, ids is not None)

    def cancel(self) -> None:
        """End a step whose capture failed: nothing has run."""
        self.is_torn = False

    def tear(self) -> None:
        """Mark the text as half fed, until the next step is committed or counted."""
        self.is_torn = True

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The steps of one input: between them, and if whoever takes them is interrupted, the cache is torn."""
        self._goes_on = True
        try:
            yield
            self.is_torn = False
        finally:
            self._goes_on = False

    @contextlib.contextmanager
    def ahead(self, feeds: Callable[[], bool]) -> Iterator[None]:
        """A step that is launched before anybody knows whether it feeds a row, which `feeds` waits for: if it feeds
        none, it has not been. Torn until that is settled.
        """
        seen, unfed, self._goes_on = self.seen, self.unfed, True
        try:
            yield
            feeds()  # if ever, Ctrl-C comes while the host waits
        finally:
            if self.seen > seen:
                if not feeds():
                    self.seen, self.unfed = seen, unfed
                self.is_torn = False
            self._goes_on = False

    def count(self, tokens: int, are_known: bool) -> None:
        """What the end of a step changes on the host; the last thing of it."""
        self.unfed, self.is_searched = None, False
        self.all_known = self.all_known and are_known
        self.changes += 1
        self.seen += tokens
        self.is_torn = self._goes_on

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Whatever else changes the rows: left half-way, the cache is torn."""
        was_torn, self.is_torn = self.is_torn, True
        self.changes += 1
        yield
        self.is_torn = was_torn

    def end_turn(self, is_search: bool) -> None:
        """`generate` is over: what it chose last stays unfed, in a tensor of its own. is_search: whether by beams."""
        self.ended, self.is_searched, self.are_checked = None, self.is_searched or is_search, False
        if self.unfed is not None:
            self.unfed = self.unfed._replace(ids=self.unfed.ids.clone())

    # What the model's layers call.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands the step's keys and values through, `Step.attend` appends them."""
        return self._open_step().update(key_states, value_states, layer_idx)

    def _open_step(self) -> Step:
        if self.step is None:
            raise RuntimeError("a SinkCache serves the model that sinkattn.patch() was given, while it is patched")
        return self.step

    get_conv_state, get_recurrent_state, update_conv_state, update_recurrent_state, has_previous_state = map(
        _in_a_step,
        ("get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state", "has_previous_state"),
    )

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed, padding included: what `generate` slices re-sent ids with. In a step the model sees none."""
        return self.seen if self.step is None else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def reset(self) -> None:
        """Forget the text and keep the memory, unless it is torn or the rows share their sinks."""
        is_lost, self.is_torn = self.is_torn or (self.rows is not None and self.rows.shares_sinks), True
        self.changes += 1
        if is_lost:
            if self._keeper is not None:
                self._keeper.detach()
            self.rows, (self.layers, self.rings) = None, layers_of(self.plan)
        elif self.rows is not None:
            self.rows.reset()
        self._begin()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows: row i becomes what row ``beam_idx[i]`` was. Any number of them.

        Raises ValueError for rows that are not there, and if the cache is empty.
        """
        if self.rows is None:
            raise ValueError("this SinkCache is empty")
        beam_idx = rows_of(beam_idx, self.batch_size)
        with self.changing():
            self._use(self.rows.reordered(beam_idx))
            self.unfed = None if self.unfed is None else self.unfed.picked(beam_idx)

    batch_select_indices = reorder_cache  # type: ignore[assignment]  # its argument has another name there

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size, device=self.lengths.device).repeat_interleave(repeats))

    # Rows that go their own ways.

    def compare(self, ids: Tensor, mask: Tensor) -> list[Agreement]:
        """How texts, (batch, n) ids and mask (0 for left padding), agree with what the rows hold, row by row."""
        ids, mask = ids.to(self.lengths), mask.to(self.lengths)
        return self.rows.compare(ids, mask.sum(1), self.all_known)

    def picked(self, index: Tensor, may_share: bool = False) -> "SinkCache":
        """A cache of its own with a copy of some rows, index (n,) int64. may_share: see `Rows.picked`."""
        other = object.__new__(type(self))
        vars(other).update(self.__getstate__())
        other.unfed = None if self.unfed is None else self.unfed.picked(index)
        other._use(self.rows.picked(index, may_share and not self.has_places))
        return other

    def put(self, index: Tensor, other: "SinkCache") -> None:
        """Let the rows `index`, (n,) int64, go on as the n rows of another cache, once `picked` from this one."""
        self.overwrite(index, other.rows.named(), other.all_known, other.seen, keeps_unfed=other.unfed is not None)

    def overwrite(
        self, index: Tensor, new: dict[str, Tensor], all_known: bool, seen: int, keeps_unfed: bool = False
    ) -> None:
        """Write other texts over rows, index (n,) int64. new: as `Rows.named` has them, (n, ...) each.

        all_known, seen: of these texts. keeps_unfed: whether what was chosen last in the rows is theirs.
        """
        with self.changing(), torch.inference_mode(False), torch.no_grad():
            for name, mine in self.rows.named().items():
                writable(mine).index_copy_(0, index.to(mine.device), writable(new[name]))
            self.all_known, self.seen = self.all_known and all_known, max(self.seen, seen)
            if self.unfed is not None and not keeps_unfed:
                self.unfed = self.unfed.without(index)

    def repeat(self, n: int) -> "SinkCache":
        """A cache of its own with n copies of every row: rows ``i * n`` to ``i * n + n - 1`` go on as row i would.

        Many copies of a single row share its sinks, see `shares_sinks`.

        n: at least 1. Raises ValueError for less, and if the cache is empty or torn.
        """
        self.check_holds()
        n = whole("n", n, 1, "copies")
        index = torch.arange(self.batch_size, device=self.lengths.device).repeat_interleave(n)
        return self.picked(index, may_share=True)

    def forget(self, index: Tensor) -> None:
        """Forget the texts of some rows, index (n,) int64, and keep the memory, and the sinks that they share."""
        with self.changing():
            self.rows.forget(index)
            self.unfed = None if self.unfed is None else self.unfed.without(index)

    # Texts outside of the cache.

    def check_holds(self) -> None:
        self.check_whole()
        if self.rows is None or not self.seen:
            raise ValueError("this SinkCache is empty")

    def save(self, path: str | os.PathLike) -> None:
        """Save the text in one safetensors file, from which `load` goes on as if it had never ended.

        path: what stands there is replaced once the new file is whole. docs/keeping.md has the format.
        Raises ValueError if the cache is empty or torn; OSError if the file cannot be written.
        """
        saved.write(path, keeping.texts_of(self, "cache"))

    @classmethod
    def load(cls, model: nn.Module, path: str | os.PathLike) -> "SinkCache":
        """A cache with the text that `save` has put into a file, in any process and from any device.

        model: a model that `patch` was called on, with the sizes and slack of the one that has written the text. What
            it keeps is learned by feeding it one token. Its weights are not compared.
        Raises ValueError if the file is damaged or was not written by `save`, and if it does not fit the model, which
        says what differs; OSError if it cannot be read.
        """
        cache, texts = cls(model), saved.read(path, "cache", model)
        network = cast(Any, model)._sinkattn.model
        with torch.inference_mode(False), torch.no_grad():
            network(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=input_device(network)), past_key_values=cache)
        keeping.become(cache, texts)
        return cache

    # Tokens taken back.

    @property
    def is_croppable(self) -> bool:
        return not self.has_state

    def activate_past_recording(self) -> None:
        """Nothing to do: the last tokens can be taken back at any time. Raises ValueError for models with a state."""
        if self.has_state:
            raise ValueError(
                f"a model of {type(self.plan.config).__name__} has layers with a state of their own, which do not know "
                "what it was before: no token can be taken back, and generation cannot be assisted"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: ``crop(-n)`` the last n of every row, as if they had not been fed.

        A positive number is the columns that stay, as it was in transformers before 5.18; 0 does nothing. A row that a
        step fed nothing (as it had ended) loses n tokens as well.

        While a row has never been longer than S + W + slack, or than slack and the window of a layer that has a smaller
        one of its own, all of it can be taken back, later the last ``slack`` tokens of `patch`, counted from the
        longest that it has been. Raises ValueError for more, and for models with a state; TypeError for what is no
        number; the cache is then as it was.
        """
        try:
            columns = operator.index(tokens_to_remove)  # a tensor of one whole number has one, too
        except TypeError as error:
            raise TypeError(f"crop({tokens_to_remove!r}): it needs a whole number of tokens") from error
        taken = -columns if columns <= 0 else max(self.seen - columns, 0)
        if taken == 0:
            return
        if self.rows is None:
            raise ValueError(f"{taken} tokens cannot be taken back: this SinkCache is empty")
        take_back(self, torch.full_like(self.lengths, taken), columns=taken)
