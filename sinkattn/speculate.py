"""Speculation: something cheap proposes the next tokens of a Stream, and one step of the model judges all of them.

A round, of every row by itself, on the device: the last token that was chosen and k that are proposed go through the
model together. Proposals are taken as far as they are what the model would have chosen (greedy), or by the rule of
speculative sampling (arXiv 2211.17192), which keeps the model's distribution; then one more token is chosen by what the
model says there. What was not taken leaves the cache again. So a round gives 1 to k + 1 tokens a row.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .cache import SinkCache
from .choice import Choice, likeliest
from .graph import Repeated
from .introspect import embedded_ids, input_device


class Proposer(Protocol):
    """What proposes k tokens a row.

    begin: the text of the target, whose vocabulary has so many ids, has become another one; may_be: whether what is
    done again may be captured. propose: behind `first`, (batch,), of the rows that are `fed`, (batch,) bool: ids,
    (batch, k), and the probabilities that they were drawn from, (batch, k, vocabulary) float32, None if nothing was
    drawn. judged: on the device, how many were taken, (batch,).
    """

    def begin(self, target: SinkCache, vocabulary: int, may_be: Callable[[], bool]) -> None: ...

    def propose(self, first: Tensor, fed: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def judged(self, taken: Tensor, fed: Tensor) -> None: ...


class Draft:
    """A patched model proposes: it reads what the target holds, and goes on by itself.

    Where all proposals were taken, it has not read the last one (`late`): its next step begins with that. choice: how
    the target chooses, by which proposals are drawn as well.
    """

    def __init__(self, model: nn.Module, k: int, choice: Choice, generator: torch.Generator | None):
        self.model, self.k, self.choice, self.generator = cast(Any, model), k, choice, generator
        if not isinstance(model, nn.Module) or getattr(model, "_sinkattn", None) is None:
            raise ValueError(f"the draft, a {type(model).__name__}, is no patched model: sinkattn.patch() it")
        self.cache, self.runner = SinkCache(model), self.model._sinkattn.runner
        self.device = input_device(self.model)
        self.cache.activate_past_recording()
        if self.runner.plan.slack < k - 1:
            raise ValueError(
                f"{k} tokens at a time, of which the draft takes back {k - 1}: patch() it with slack={k - 1} or more, "
                f"not {self.runner.plan.slack}"
            )

    def begin(self, target: SinkCache, vocabulary: int, may_be: Callable[[], bool]) -> None:
        size = embedded_ids(self.model)
        if size < vocabulary:
            raise ValueError(f"the draft has a vocabulary of {size}, the model one of {vocabulary}")
        ids, mask = target.rows.text()
        self.cache, self.target = SinkCache(self.model), target
        size = len(ids)
        self.late_ids = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.is_late = torch.zeros(size, dtype=torch.bool, device=self.device)
        logits = self._logits(ids, mask)
        if logits.shape[1] != vocabulary:
            raise ValueError(f"the draft has a vocabulary of {logits.shape[1]}, the model one of {vocabulary}")
        self.scores = logits.new_empty(logits.shape)
        self.ids = torch.zeros(size, self.k, dtype=torch.int64, device=self.device)
        self.noise, self.chances = None, None
        if self.choice.do_sample:
            self.noise = torch.empty(logits.shape, device=self.device)
            self.chances = torch.zeros(size, self.k, logits.shape[1], device=self.device)
        self._draw, self._may_be = Repeated(self.device), may_be

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of the token behind ids, (batch, vocabulary)."""
        if getattr(getattr(self.model, "_sinkattn", None), "runner", None) is not self.runner:
            raise ValueError("the draft is not patched any more, or was patched anew: begin another generate()")
        return self.runner.logits(self.cache, ids, mask, are_checked=bool(self.cache.seen))[:, -1]

    def propose(self, first: Tensor, fed: Tensor) -> tuple[Tensor, Tensor | None]:
        ids = torch.stack((self.late_ids, first), dim=1)
        mask = torch.stack((self.is_late & fed, fed), dim=1)
        for i in range(self.k):
            self.scores.copy_(self._logits(ids, mask))
            if self.noise is not None:
                self.noise.exponential_(generator=self.generator)
            found, chances = self._draw(self._drawn, self._may_be)
            self.ids[:, i] = found
            if self.chances is not None:
                self.chances[:, i] = chances
            ids, mask = self.ids[:, i : i + 1], fed[:, None]
        return self.ids, self.chances

    def _drawn(self) -> tuple[Tensor, Tensor | None]:
        scores = self.choice.scores(self.scores, self.target.rows.held)
        if self.noise is None:
            return likeliest(scores), None
        chances = scores.softmax(-1)
        return likeliest(chances / self.noise), chances

    def judged(self, taken: Tensor, fed: Tensor) -> None:
        self.cache.rows.take_back(torch.where(fed, (self.k - 1 - taken).clamp(min=0), 0), self.k)
        self.is_late.copy_(torch.where(fed, taken == self.k, self.is_late))
        self.late_ids.copy_(torch.where(fed, self.ids[:, -1], self.late_ids))


class Lookup:
    """What came after the same tokens the last time proposes: of up to 3 tokens, in what the cache holds."""

    def __init__(self, k: int):
        self.k = k

    def begin(self, target: SinkCache, vocabulary: int, may_be: Callable[[], bool]) -> None:
        self.rows, self.vocabulary = target.rows, vocabulary
        self.first = torch.zeros_like(self.rows.lengths)
        self._find, self._may_be = Repeated(self.first.device), may_be

    def propose(self, first: Tensor, fed: Tensor) -> tuple[Tensor, None]:
        self.first.copy_(first)
        return self._find(self._found, self._may_be), None

    def _found(self) -> Tensor:
        ids = torch.cat((self.rows.in_order(), self.first[:, None]), dim=1)  # (batch, n)
        n = ids.shape[1]
        is_same, depth = torch.ones_like(ids[:, :-1], dtype=torch.bool), torch.zeros_like(ids[:, :-1])
        for back in range(3):  # whether the tokens up to here are the last ones
            shifted = torch.nn.functional.pad(ids, (back, 0), value=-1)[:, : n - 1]
            is_same = is_same & (shifted == ids[:, n - 1 - back, None]) & (shifted >= 0)
            depth = depth + is_same
        at = (depth * n + torch.arange(n - 1, device=ids.device)).argmax(1, keepdim=True)  # the longest, then the last
        behind = (at + 1 + torch.arange(self.k, device=ids.device)).clamp(max=n - 1)
        return ids.gather(1, behind).clamp(0, self.vocabulary - 1)

    def judged(self, taken: Tensor, fed: Tensor) -> None:
        pass


class Rounds:
    """The rounds of one `Stream.generate`, over the cache of the Stream.

    proposer: what proposes, k at a time. choice: how tokens are chosen. left: (batch,) int64, tokens that each row may
    still give, which outlives this. logits: (batch, vocabulary), what the Stream goes on by, kept up to date.
    ended: (batch,) bool, rows of the Stream that take no tokens. feed: of ids (batch, k + 1) and a mask of them, gives
    their logits. may_be: whether what is done again may be captured.

    Attributes: first (batch,) int64, chosen and given out and not fed yet, of the rows that are fed, (batch,) bool, of
    which some end with it: closes. is_open: whether a round is under way, or was not given out: `undo` takes it back.
    """

    def __init__(
        self,
        cache: SinkCache,
        proposer: Proposer,
        k: int,
        choice: Choice,
        generator: torch.Generator | None,
        left: Tensor,
        logits: Tensor,
        ended: Tensor,
        feed: Callable[[Tensor, Tensor], Tensor],
        may_be: Callable[[], bool],
    ):
        self.cache, self.proposer, self.k, self.choice, self.generator = cache, proposer, k, choice, generator
        self.left, self.logits, self.ended, self._feed = left, logits, ended, feed
        size, vocabulary, device = len(left), logits.shape[1], logits.device
        self.first, self.fed, self.closes = torch.zeros_like(left), torch.zeros_like(ended), torch.zeros_like(ended)
        self.scores = logits.new_empty(size, k + 1, vocabulary)
        self.ids = torch.zeros(size, k, dtype=torch.int64, device=device)
        self.chances: Tensor | None = None
        self.noise = torch.empty(size, vocabulary, device=device) if choice.do_sample else None
        self.draws = torch.empty(size, k, device=device)
        self._state = dict(first=self.first, fed=self.fed, closes=self.closes, left=left, ended=ended)
        self._state |= dict(lengths=cache.rows.lengths, digest=cache.rows.digest)
        self._before, self.is_open = {name: x.clone() for name, x in self._state.items()}, False
        proposer.begin(cache, vocabulary, may_be)
        self._judge, self._may_be = Repeated(device), may_be

    def start(self, ids: Tensor, fed: Tensor) -> Tensor:
        """Begin with what was chosen behind the text, ids (batch,), of some rows: what to give out."""
        fed = fed & (self.left > 0)
        self.left.sub_(fed.long())
        self.first.copy_(ids)
        self.fed.copy_(fed)
        self.closes.copy_(fed & (self.choice.ends_text(ids) | (self.left == 0)))
        self.is_open = True
        return torch.where(fed, ids, -1)[:, None]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row that were given out or stood there before: (batch,) int64."""
        known = self._before if self.is_open else self._state
        return known["lengths"] + known["fed"]

    @property
    def any_goes_on(self) -> Tensor:
        """Whether another round would give any row a token: () bool."""
        return (self.fed & ~self.closes).any()

    def next(self) -> Tensor:
        """One round; what it gives, (batch, k + 1) int64, -1 behind a row's tokens."""
        for name, x in self._state.items():
            self._before[name].copy_(x)
        self.is_open = True
        ids, self.chances = self.proposer.propose(self.first, self.fed)
        self.ids.copy_(ids)
        if self.noise is not None:
            self.noise.exponential_(generator=self.generator)
            self.draws.uniform_(generator=self.generator)
        ids = torch.cat((self.first[:, None], self.ids), dim=1)
        self.scores.copy_(self._feed(ids, self.fed[:, None].expand_as(ids)))
        return self._judge(self._judged, self._may_be).clone()

    def undo(self) -> None:
        """The round under way has not been. What was fed last stays in its slots, unseen."""
        rows = self.cache.rows
        torch.maximum(rows.peak, rows.lengths, out=rows.peak)
        for name, x in self._state.items():
            x.copy_(self._before[name])
        self.is_open = False

    def _judged(self) -> Tensor:
        k, fed, lengths = self.k, self.fed, self.cache.rows.lengths
        column = torch.arange(k + 1, device=lengths.device)
        scores = self.choice.scores(self.scores.flatten(0, 1), self._held).view_as(self.scores)
        said = likeliest(scores) if self.noise is None else scores.softmax(-1)  # ids, or chances of all
        is_end = self.choice.ends_text(self.ids)
        until_end = (is_end.cumsum(1) == 0).sum(1) + 1  # tokens up to the first end, k + 1 for none
        agreeing = (self._agrees(said) & ~self.closes[:, None]).cumprod(1).sum(1)
        taken = torch.minimum(torch.minimum(agreeing, until_end), self.left)
        goes_on = fed & ~self.closes & (taken < until_end) & (taken < self.left)
        here = taken[:, None]
        chosen = said.gather(1, here)[:, 0] if self.noise is None else self._drawn(said, here)
        given = torch.where(column < here, torch.nn.functional.pad(self.ids, (0, 1)), -1)
        given = torch.where((column == here) & goes_on[:, None], chosen[:, None], given)
        given = torch.where(fed[:, None], given, -1)

        self.left.sub_(torch.where(fed, taken + goes_on, 0))
        self.logits.copy_(torch.where(fed[:, None], _at(self.scores, here), self.logits))
        self.cache.rows.take_back(torch.where(fed, k - taken, 0), k)
        self.proposer.judged(taken, fed)
        self.ended.logical_or_(fed & (taken == until_end) | goes_on & self.choice.ends_text(chosen))
        self.first.copy_(chosen)
        self.closes.copy_(goes_on & (self.choice.ends_text(chosen) | (self.left == 0)))
        self.fed.copy_(goes_on)
        return given

    def _agrees(self, said: Tensor) -> Tensor:
        """Whether the model would take each proposal if it took those before, (batch, k) bool.

        said: the model's likeliest ids, (batch, k + 1), or if it draws its chances, (batch, k + 1, vocabulary).
        """
        if self.noise is None:
            return said[:, :-1] == self.ids
        of_ids = said[:, :-1].gather(2, self.ids[..., None])[..., 0]
        asked = 1.0 if self.chances is None else self.chances.gather(2, self.ids[..., None])[..., 0]
        return self.draws * asked < of_ids

    def _held(self) -> Tensor:
        """The ids that stood in the cache behind each token that was fed, (batch * (k + 1), n)."""
        rows, k = self.cache.rows, self.k
        return torch.stack([rows.held(rows.lengths - k + i) for i in range(k + 1)], dim=1).flatten(0, 1)

    def _drawn(self, chances: Tensor, here: Tensor) -> Tensor:
        """Draws behind what was taken: by what the model says, less what the proposals had their chance of."""
        of_model, at = _at(chances, here), here.clamp(max=self.k - 1)
        if self.chances is None:
            refused = self.ids.gather(1, at)
            rest = of_model.scatter(1, refused, 0.0)
        else:
            rest = (of_model - _at(self.chances, at)).clamp(min=0)
        is_refused = (here < self.k) & (rest.sum(1, keepdim=True) > 0)
        return likeliest(torch.where(is_refused, rest, of_model) / self.noise)


def _at(x: Tensor, column: Tensor) -> Tensor:
    """x, (batch, n, vocabulary), at one column of each row, (batch, 1): (batch, vocabulary)."""
    return x.gather(1, column[..., None].expand(-1, -1, x.shape[2]))[:, 0]
