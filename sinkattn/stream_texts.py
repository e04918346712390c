"""What a Stream holds: the texts of its rows, how they grow and go back, and how they are kept, doubled and moved."""

import functools
import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import keeping, saved
from .arguments import Rows, counts_of, ids_of, index_of, mask_of, whole
from .cache import SinkCache
from .graph import Repeated
from .introspect import input_device
from .rollback import check_room, take_back
from .runner import Runner
from .speculate import Rounds

OneStream = TypeVar("OneStream", bound="StreamTexts")
KEPT = ("logits", "ended", "waiting")  # what saved texts have besides the cache
LATE = ("late.ids", "late.fed")  # and if something was fed and not yielded yet


def runner_of(model: nn.Module) -> Runner:
    handle = getattr(model, "_sinkattn", None)
    if handle is None:
        raise ValueError("this Stream's model is not patched any more: patch() it and make another Stream")
    return handle.runner


class StreamTexts:
    """The texts of a `Stream`, which adds `generate`: a cache, and what the model says behind what stands there."""

    def __init__(self, model: nn.Module):
        self.model = cast(Any, model)
        self._cache, self._device = SinkCache(model), input_device(self.model)
        self._logits: Tensor | None = None  # (batch, vocabulary) of the next token
        self._ended: Tensor | None = None  # (batch,) bool, rows that take no tokens now
        self._late: list[tuple] = []  # what was fed and not yielded yet: ids, what the host is told, when, rows
        self._rounds: Rounds | None = None  # under way: what they gave last is in the text and not fed yet
        self._changes = 0  # of the cache's text, up to which the logits follow it
        self._waiting: set[int] = set()  # rows that were reset and have no text yet
        self._noise: Tensor | None = None  # (batch, vocabulary) float32
        self._settings: tuple | None = None  # of the last choice, whether it was watched, its rows; then what they need
        self._choice: Repeated | None = None

    @property
    def cache(self) -> SinkCache:
        """What `generate` has under way counts for whatever comes next."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_stream(side_stream(self._device))
        self._end_rounds()
        return self._cache

    @property
    def _runner(self) -> Runner:
        return runner_of(self.model)

    @property
    def lengths(self) -> Tensor | None:
        if self._rounds is not None:  # what they gave last is not fed yet
            return self._rounds.lengths
        return self.cache.lengths

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(
        self, input_ids: Tensor | Sequence, attention_mask: Tensor | Sequence | None = None, *, rows: Rows | None = None
    ) -> None:
        """Add new tokens to the text: new ones only, any number.

        input_ids: (batch, tokens) or (tokens,) of any integer dtype, or lists. attention_mask: like input_ids, 0 for
        left padding; None for none. rows: which rows get them, (n,) int64 or a list, each once, or a mask (batch,)
        bool, with input_ids (n, tokens); None for all.
        Raises TypeError for what are no ids; ValueError for an empty prompt, in any row, another batch size, rows that
        are not there, right padding or ids the model has no embedding for. Nothing is fed then.
        """
        ids = ids_of(input_ids, self._device)
        mask = None if attention_mask is None else mask_of(attention_mask, ids)
        self._check_whole()
        if rows is None:
            index = torch.arange(len(ids), device=self._device)
            if self._ended is not None and len(ids) != len(self._ended):
                raise ValueError(f"input_ids has {len(ids)} rows, this Stream holds {len(self._ended)} rows")
            logits = self._runner.logits(self.cache, ids, mask)[:, -1]
        else:
            index = self._index_of(rows)
            if len(index) != len(ids):
                raise ValueError(f"input_ids has {len(ids)} rows, for {len(index)} rows of the Stream")
            cache = self.cache.picked(index)
            logits = self._runner.logits(cache, ids, mask)[:, -1]
            self.cache.put(index, cache)
        if self._logits is None:
            self._ended = torch.zeros(len(logits), dtype=torch.bool, device=self._device)
            self._logits = torch.empty_like(logits)
        self._logits[index] = logits
        self._ended[index] = False
        self._waiting.difference_update(index.tolist())
        self._late, self._changes = [], self._cache.changes

    def _check_whole(self) -> None:
        """Raise ValueError if the logits at hand are not those behind the text."""
        self._undo_round()
        if self._cache.is_torn or self._changes != self._cache.changes:
            raise ValueError(
                "an earlier call was interrupted half-way, or the cache was used otherwise: reset() all rows"
            )
        self._end_rounds()

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self, rows: Rows | None = None) -> None:
        """Forget the text of some rows and keep the memory: they wait, and yield padding, until they get a new one.

        Rows that share their sinks (see `fork`) keep those, and the new text goes on behind them; without `rows` the
        shared sinks are forgotten as well, and the next text decides how many rows there are.

        rows: (n,) int64 or a list; None for all. Raises ValueError for rows that are not there.
        """
        if rows is None and (self._logits is None or self._cache.is_torn or self._cache.shares_sinks):
            vars(self).update(vars(type(self)(self.model)))  # begin anew, at once
            return
        index = self._index_of(self._all if rows is None else rows)
        if rows is not None:
            self._check_whole()
        self.cache.forget(index)
        self._ended[index] = True
        self._waiting.update(index.tolist())
        self._late, self._changes = [], self._cache.changes

    @torch.inference_mode(False)
    @torch.no_grad()
    def rewind(self, n: int | Sequence[int] | Tensor, rows: Rows | None = None) -> None:
        """Take the last tokens of some rows back, as if they had not been there, and go on from there.

        n: tokens, one number or one for each row. rows: (n,) int64 or a list, each once; None for all.
        Raises ValueError for rows that are not there, for more tokens than can be taken back (see `SinkCache.crop`; k
        fewer behind proposals of k at a time) and for all that a row holds, which is what `reset` is for; nothing is
        changed then.
        """
        self._check_whole()
        index = self._index_of(self._all if rows is None else rows)
        taken = counts_of(n, index)
        cache, counts = self.cache, torch.zeros(len(self._ended), dtype=torch.int64, device=self._device)
        counts[index] = taken
        asked = counts.clone()
        for *_, was_fed in self._late:  # nobody knows of these yet
            counts += 1 if was_fed is None else was_fed
        fed = counts > 0
        if not fed.any():
            return
        counts += fed  # the last that stays is fed again, for what follows it
        if bool((counts > cache.lengths).any()):
            at = int((counts > cache.lengths).nonzero()[0])
            raise ValueError(f"row {at} holds {int(cache.lengths[at])} tokens: reset() it, or take back fewer")
        cache.activate_past_recording()
        most = cache.rows.room(True) - counts + asked
        check_room(cache, asked, most, " (refused proposals count too)", ", or the row")
        take_back(cache, counts, columns=1, refeeds=True)
        ids = cache.rows.next_id()  # what was taken back last lies there still
        self._ended &= ~fed
        self._late = []
        self._feed(ids.clamp(min=0), fed)
        self._changes = self._cache.changes

    # Texts kept, doubled and moved.

    @torch.inference_mode(False)
    @torch.no_grad()
    def fork(self: OneStream, row: int, n: int) -> OneStream:
        """A new Stream of n rows, each a copy of one row's text: they go on as it would, and each on its own.

        Where that is worth it they share its sinks, see `SinkCache.shares_sinks`: with ``patch(..., sink_size=2000)``
        and a system prompt of 2,000 tokens, which is then computed, kept and read once for all rows.

        row: which. n: at least 1. Nothing is computed again, and this Stream stays as it is.
        Raises ValueError for a row that is not there, and for n below 1.
        """
        self._check_whole()
        index = self._index_of([row])
        n = whole("n", n, 1, "copies")
        index, other = index.repeat(n), type(self)(self.model)
        other._cache = self.cache.picked(index, may_share=True)
        other._follow({name: x.index_select(0, index) for name, x in self._kept().items()})
        return other

    def save(self, path: str | os.PathLike) -> None:
        """Save all rows in one safetensors file, from which `load` goes on as if they had never ended.

        Besides the cache it has the logits of the next token, which rows have ended or wait, and the state of torch's
        generator on the model's device. The generator of a ``generate(seed=...)`` under way is not among them.

        path: what stands there is replaced once the new file is whole. docs/keeping.md has the format.
        Raises ValueError if nothing was appended, or if the Stream is torn; OSError if the file cannot be written.
        """
        saved.write(path, self.texts())

    @classmethod
    def load(cls: type[OneStream], model: nn.Module, path: str | os.PathLike) -> OneStream:
        """A Stream with the texts that `save` has put into a file, in any process and from any device.

        On the same kind of device it also gives torch's generator the state that it had, so that sampling goes on too.

        model: a model that `patch` was called on, with the sizes and slack of the one that has written the texts. Its
            weights are not compared.
        Raises ValueError if the file is damaged or was not written by `save`, and if it does not fit the model, which
        says what differs; OSError if it cannot be read.
        """
        stream = cls(model)
        stream.become(saved.read(path, "stream", model))
        return stream

    def become(self, texts: saved.Texts) -> None:
        """`load` into a Stream that is empty, once the file is read."""
        self._fill(texts)
        saved.set_random_state(texts, self._device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def take(self, rows: Rows) -> saved.Texts:
        """Move the texts of some rows to host memory: the rows wait then, as after `reset`.

        rows: (n,) int64 or a list, each once. From a GPU they are copied beside what comes next. What was fed when an
        interrupt came, and not yielded yet, belongs to the text, as for `append`.
        Returns `sinkattn.saved.Texts`, n texts for `put`. Raises ValueError for rows that are not there.
        """
        self._check_whole()
        index, self._late = self._index_of(rows), []
        texts = self.texts(index)
        self.reset(rows)
        return texts

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, texts: saved.Texts, rows: Rows | None = None) -> None:
        """Let rows go on with texts that `take` gave, of this Stream or another: as if they had never been away.

        texts: n texts. rows: (n,) int64 or a list, each once, in the texts' order, whatever they hold; None for all. A
        Stream that holds nothing yet gets n rows.
        Raises TypeError for what are no texts; ValueError for rows that are not there, for another number of them than
        n, for texts that do not fit the model, and for such as have other sinks than those that the rows share (the
        same tokens, if they were read in another batch or in pieces, may have). Nothing is changed then.
        """
        if not isinstance(texts, saved.Texts):
            raise TypeError(f"put takes what take() gave, not a {type(texts).__name__}")
        self._check_whole()
        if self._logits is None and rows is None:
            other = type(self)(self.model)
            other._fill(texts)
            self._cache = other._cache
            self._follow(other._kept())
            return
        index = self._index_of(self._all if rows is None else rows)
        if len(index) != len(texts):
            raise ValueError(f"{len(texts)} texts, for {len(index)} rows of the Stream")
        texts = texts.with_logits_in(self._logits.dtype)
        cache, kept = self.cache, {name: self._kept()[name] for name in KEPT}
        one = {name: x[:1] for name, x in cache.rows.named().items()}
        texts.check_fits(cache.plan, {**cache.rows.with_sinks(one), **kept})
        keeping.hold(cache, texts, index)
        for name, x in kept.items():
            x.index_copy_(0, index, texts.on(name, self._device))
        self._follow(kept)

    @torch.inference_mode(False)
    @torch.no_grad()
    def texts(self, index: Tensor | None = None) -> saved.Texts:
        """What `save` puts into a file. index: (n,) int64, of some rows, see `keeping.texts_of`; None for all."""
        self._check_whole()
        if self._logits is None:
            raise ValueError("this Stream is empty")
        texts = keeping.texts_of(self.cache, "stream", index, self._kept())
        if index is None:
            texts.tensors["generator"] = saved.random_state(self._device)
        return texts

    def _kept(self) -> dict[str, Tensor]:
        """What belongs to the rows besides the cache, (batch, ...) each, by the names of saved texts."""
        waiting = torch.zeros_like(self._ended)
        waiting[list(self._waiting)] = True
        kept = dict(zip(KEPT, (self._logits, self._ended, waiting), strict=True))
        for ids, *_, fed in self._late:
            kept |= zip(LATE, (ids, torch.ones_like(self._ended) if fed is None else fed), strict=True)
        return kept

    def _follow(self, kept: dict[str, Tensor]) -> None:
        """Go on behind the cache with what belongs to its rows."""
        self._logits, self._ended = kept["logits"], kept["ended"]
        self._waiting = set(kept["waiting"].nonzero().flatten().tolist())
        self._late, self._changes = [], self._cache.changes
        if LATE[0] in kept:
            ids, fed = (kept[name] for name in LATE)
            chosen = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
            self._late = [(ids, torch.cat((fed.any()[None], ids)).cpu(), chosen, fed)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fill(self, texts: saved.Texts) -> None:
        """Hold texts and nothing else. This Stream is empty: how the model keeps texts is seen by one token."""
        cache = self._cache
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        logits = self._runner.logits(cache, ids, None)[:, -1]
        texts = texts.with_logits_in(logits.dtype)
        keeping.become(cache, texts, {"logits": logits})
        self._follow({name: texts.on(name, self._device).clone() for name in (*KEPT, *LATE) if name in texts.tensors})

    def _undo_round(self) -> None:
        """What nobody was given, as an interrupt or an error came before, has not been."""
        if self._rounds is not None and self._rounds.is_open and not self._cache.is_torn:
            with torch.inference_mode(False), torch.no_grad():
                self._rounds.undo()
            self._changes = self._cache.changes

    def _end_rounds(self) -> None:
        """Let the text be whole: what was given last is fed."""
        self._undo_round()
        if self._rounds is not None and not self._cache.is_torn:
            with torch.inference_mode(False), torch.no_grad():
                if self._rounds.fed.any():
                    self._feed(self._rounds.first, self._rounds.fed)
            self._rounds, self._changes = None, self._cache.changes

    def _feed(self, ids: Tensor, fed: Tensor | None) -> None:
        """One token a row through the model, (batch,); rows that are not fed stay as they are."""
        ids, mask = ids[:, None], None if fed is None else fed[:, None]
        logits = self._runner.logits(self._cache, ids, mask, are_checked=True)[:, -1]
        self._logits.copy_(logits if fed is None else torch.where(fed[:, None], logits, self._logits))

    @property
    def _all(self) -> range:
        """The rows that there are."""
        return range(0 if self._ended is None else len(self._ended))

    def _index_of(self, rows: Rows) -> Tensor:
        return index_of(rows, len(self._all), self._device)


@functools.cache
def side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)
