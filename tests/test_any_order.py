"""Anything done to a cache, in any order: it holds the text that the test keeps, or says that it is torn."""

import copy
import functools
import pickle

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import plain, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, patch
from sinkattn.rollback import take_back

S, W, SLACK = 3, 6, 4
C = S + W
ROWS = st.integers(1, 3)
LENGTHS = st.integers(1, 2 * C)


@functools.lru_cache(maxsize=4096)
def logits_of(text: tuple[int, ...]):
    """(n, vocabulary), by the oracle."""
    return streaming_logits(plain(), torch.tensor([text]), S, W)[0]


@functools.cache
def patched(cache_dtype="auto"):
    """In 8 bits in float64, where no rounding before it moves a number to the next step."""
    model = copy.deepcopy(plain())
    patch(model if cache_dtype == "auto" else model.double(), S, W, slack=SLACK, cache_dtype=cache_dtype)
    return model


@functools.lru_cache(maxsize=4096)
def logits_at_once(text: tuple[int, ...]):
    """(n, vocabulary), of a cache in int8 that has seen nothing else."""
    with torch.no_grad():
        return patched("int8")(torch.tensor([text])).logits[0]


class OneCache(RuleBasedStateMachine):
    """One cache, and beside it the text of each row: all that was fed, and what `generate` has chosen behind it."""

    cache_dtype, expected, may_share = "auto", staticmethod(logits_of), True

    @initialize(rows=ROWS, seed=st.integers(0, 2**32 - 1))
    def begin(self, rows, seed):
        self.model = patched(self.cache_dtype)
        self.cache, self.texts, self.chosen = SinkCache(self.model), [[] for _ in range(rows)], None
        self.peaks = [0] * rows  # the longest that each row has been
        self.shared = []  # what all rows begin with, if they share their sinks
        torch.manual_seed(seed)

    def new(self, lengths):
        """Random texts, and the same padded on the left with a mask."""
        texts = [torch.randint(1, 97, (n,)).tolist() for n in lengths]
        width = max(lengths)
        ids = torch.tensor([[0] * (width - len(x)) + x for x in texts])
        return texts, ids, torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in texts])

    def lengths(self, data, least=1):
        return [data.draw(st.integers(least if i else 1, 2 * C)) for i in range(len(self.texts))]

    def feed(self, texts, chosen=None):
        self.texts = [held + more for held, more in zip(self.texts, texts, strict=True)]
        self.peaks = [max(peak, len(text)) for peak, text in zip(self.peaks, self.texts, strict=True)]
        self.chosen = chosen

    def room(self, row, refeeds=False):
        """Tokens of a row that can be taken back. refeeds: whether the first of them is fed again."""
        length, peak, most = len(self.texts[row]), self.peaks[row], SLACK + refeeds
        own = length - len(self.shared)
        return own if peak <= C + SLACK else min(max(most - (peak - length), 0), own)

    # Moves.

    @rule(data=st.data(), known=st.booleans())
    def append(self, data, known):
        """Some rows may get nothing."""
        texts, ids, mask = self.new(self.lengths(data, least=0))
        given = {"input_ids": ids} if known else {"inputs_embeds": self.model.get_input_embeddings()(ids)}
        with torch.no_grad():
            logits = self.model(**given, attention_mask=mask, past_key_values=self.cache).logits[:, -1]
        self.feed(texts)
        for row, (text, new) in enumerate(zip(self.texts, texts, strict=True)):
            assert not new or relative_error(logits[row], self.expected(tuple(text))[-1]) < 1e-4

    @rule(data=st.data(), steps=st.integers(1, 4), how=st.sampled_from(["new", "history", "mask"]))
    def generate(self, data, steps, how):
        texts, ids, mask = self.new(self.lengths(data))
        behind = self.chosen or [[] for _ in texts]
        if how == "history" and all(self.texts) and self.cache.all_known and not self.is_blank():
            whole = [a + b + c for a, b, c in zip(self.texts, behind, texts, strict=True)]
            width = max(map(len, whole)) + data.draw(st.integers(0, 2))
            ids = torch.tensor([[0] * (width - len(x)) + x for x in whole])
            mask = (torch.arange(width) >= torch.tensor([[width - len(x)] for x in whole])).long()
        elif self.cache.seen:  # said to be new, which need not be said unless they look like the text
            width = self.cache.seen + (self.chosen is not None)
            mask = torch.cat((torch.ones(len(texts), width, dtype=torch.int64), mask), dim=1)
        options = dict(max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=None)
        options["suppress_tokens"] = [0]  # padding, if no mask says otherwise
        found = self.model.generate(ids, attention_mask=mask, past_key_values=self.cache, **options)
        answers = found[:, ids.shape[1] :].tolist()
        self.feed([a + b + c[:-1] for a, b, c in zip(behind, texts, answers, strict=True)], [c[-1:] for c in answers])
        for text, answer in zip(self.texts, answers, strict=True):
            logits = self.expected(tuple(text))[len(text) - steps :]
            assert (
                logits.gather(1, torch.tensor(answer)[:, None]).add(1e-3).ge(logits[:, 1:].amax(1, keepdim=True)).all()
            )

    def is_blank(self):
        return all(len(set(text)) < 3 for text in self.texts)

    @precondition(lambda self: all(len(text) > 2 for text in self.texts) and self.cache.all_known)
    @rule(data=st.data())
    def edit(self, data):
        """A history with one token changed goes on from there, if that can be taken back, or nothing is fed."""
        row = data.draw(st.integers(0, len(self.texts) - 1))
        at = data.draw(st.integers(0, len(self.texts[row]) - 1))
        whole = [text + torch.randint(1, 97, (2,)).tolist() for text in self.texts]
        whole[row][at] = whole[row][at] % 96 + 1
        width = max(map(len, whole))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in whole])
        if self.is_blank():
            return
        back = len(self.texts[row]) - at
        options = dict(max_new_tokens=1, do_sample=False, pad_token_id=0, suppress_tokens=[0])
        is_sure = at >= 8 or 2 * at >= len(self.texts[row])
        if not is_sure or back > self.room(row, True):
            with pytest.raises(ValueError, match="differs from the text that this SinkCache holds"):
                self.model.generate(ids, past_key_values=self.cache, **options)
        elif at > 0 or len(whole) == 1:
            answers = self.model.generate(ids, past_key_values=self.cache, **options)[:, -1:].tolist()
            self.texts = whole
            self.feed([[] for _ in whole], answers)

    @precondition(lambda self: self.cache.seen)
    @rule(data=st.data())
    def take_back(self, data):
        """Tokens of some rows, by different counts; one too many is refused, and nothing is changed."""
        counts = [data.draw(st.integers(0, self.room(row))) for row in range(len(self.texts))]
        row = data.draw(st.integers(0, len(self.texts) - 1))
        more = torch.tensor(counts)
        more[row] = self.room(row) + 1
        with pytest.raises(ValueError, match=f"row {row} can take back {self.room(row)} of its {len(self.texts[row])}"):
            take_back(self.cache, more)
        take_back(self.cache, torch.tensor(counts))
        self.texts = [text[: len(text) - n] for text, n in zip(self.texts, counts, strict=True)]
        self.chosen = None

    @rule(data=st.data(), rows=ROWS)
    def reorder(self, data, rows):
        if self.cache.seen:
            index = data.draw(st.lists(st.integers(0, len(self.texts) - 1), min_size=rows, max_size=rows))
            self.cache.reorder_cache(torch.tensor(index))
            self.texts, self.peaks = [self.texts[i] for i in index], [self.peaks[i] for i in index]
            self.chosen = self.chosen and [self.chosen[i] for i in index]

    @rule(data=st.data(), is_fed=st.booleans())
    def pick_and_put(self, data, is_fed):
        if self.cache.seen:
            index = data.draw(st.lists(st.integers(0, len(self.texts) - 1), min_size=1, unique=True))
            picked = self.cache.picked(torch.tensor(index))
            if is_fed:
                texts, ids, mask = self.new([data.draw(LENGTHS) for _ in index])
                with torch.no_grad():
                    self.model(ids, attention_mask=mask, past_key_values=picked)
                for i, text in zip(index, texts, strict=True):
                    self.texts[i] = self.texts[i] + text
                    self.peaks[i] = max(self.peaks[i], len(self.texts[i]))
                    if self.chosen:
                        self.chosen[i] = []
            self.cache.put(torch.tensor(index), picked)

    @rule(data=st.data())
    def forget(self, data):
        if self.cache.seen:
            row = data.draw(st.integers(0, len(self.texts) - 1))
            self.cache.forget(torch.tensor([row]))
            self.texts[row], self.peaks[row] = list(self.shared), 0
            if self.chosen:
                self.chosen[row] = []

    @rule(rows=ROWS)
    def reset(self, rows):
        self.cache.reset()
        self.texts, self.chosen, self.peaks, self.shared = [[] for _ in range(rows)], None, [0] * rows, []

    @precondition(lambda self: self.cache.seen)
    @rule(data=st.data(), rows=ROWS)
    def fork(self, data, rows):
        """Copies of one row, which share its sinks if it has all of them."""
        row = data.draw(st.integers(0, len(self.texts) - 1))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sinkattn.rows.SHARED", 0)
            self.cache = self.cache.picked(torch.tensor([row] * rows), may_share=True)
        if len(self.texts[row]) >= S and self.may_share:
            self.shared = self.texts[row][:S]
        self.texts, self.peaks = [self.texts[row]] * rows, [self.peaks[row]] * rows
        self.chosen = self.chosen and [self.chosen[row]] * rows
        assert self.cache.shares_sinks == bool(self.shared)

    @rule(how=st.sampled_from([copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def go_on_with_a_copy(self, how):
        """And do something else to the first one."""
        first, self.cache = self.cache, how(self.cache)
        with torch.no_grad():
            self.model(random_ids(len(self.texts), 3), past_key_values=first)
        first.reset()

    @rule(data=st.data(), tokens=st.integers(1, SLACK + 3), layer=st.integers(0, 1))
    def fail(self, data, tokens, layer):
        """A layer raises: the step has not been, or the cache is torn and is reset."""
        hook = self.model.model.layers[layer].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            self.model(random_ids(len(self.texts), tokens), past_key_values=self.cache)
        hook.remove()
        self.peaks = [max(peak, len(text) + tokens) for peak, text in zip(self.peaks, self.texts, strict=True)]
        assert self.cache.is_torn == (tokens > SLACK + 1)
        if self.cache.is_torn:
            with pytest.raises(ValueError, match="half-way"):
                self.model.generate(random_ids(len(self.texts), 2), past_key_values=self.cache, max_new_tokens=1)
            self.reset(len(self.texts))

    # What holds after each of them.

    @invariant()
    def holds_its_text(self):
        if not hasattr(self, "cache") or not self.cache.seen:
            return
        assert self.cache.lengths.tolist() == [len(text) for text in self.texts]
        probe = torch.randint(1, 97, (len(self.texts), 1))
        with torch.no_grad():
            found = self.model(probe, past_key_values=copy.deepcopy(self.cache)).logits[:, 0]
        for row, text in enumerate(self.texts):
            assert relative_error(found[row], self.expected((*text, probe[row].item()))[-1]) < 1e-4


OneCache.TestCase.settings = settings(
    max_examples=60, stateful_step_count=13, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOneCache = pytest.mark.slow(OneCache.TestCase)


class OneCacheInEightBits(OneCache):
    """The same of a cache in int8, which holds what a text that was read at once gives it, to the bit."""

    cache_dtype, expected, may_share = "int8", staticmethod(logits_at_once), False


OneCacheInEightBits.TestCase.settings = settings(OneCache.TestCase.settings, max_examples=30)
TestOneCacheInEightBits = pytest.mark.slow(OneCacheInEightBits.TestCase)
