"""Stream: one endless text, or a batch of them, with nothing that grows."""

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import BaseStreamer

from .cache import SinkCache
from .graph import Captured
from .introspect import input_device


class Stream:
    """An endless text (or a batch of them) of a patched model: append what comes in, generate what goes out.

    Unlike `generate`, it keeps no ids but those of the last C tokens, so its time and memory per token are flat for
    ever. On a GPU a token is two CUDA graphs, the model's step and the choice of the next token, and the host waits for
    nothing but a flag that was set a step before.

        stream = Stream(model)
        stream.append(tokenizer(text, return_tensors="pt").input_ids)
        for token_ids in stream.generate(max_new_tokens=None):
            ...

    Rows go their own ways: those that have met their end can be `reset` and get a new text by ``append(ids, rows=...)``
    while the loop over `generate` goes on.

    model: a model that `patch` was called on; ValueError otherwise.

    Attributes: cache (the `SinkCache`), lengths ((batch,) int64, tokens in the cache of each row).
    """

    def __init__(self, model):
        self.model, self._cache, self._device = model, SinkCache(model), input_device(model)
        takes = inspect.signature(model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._logits: Tensor | None = None  # (batch, vocabulary) of the next token
        self._ended: Tensor | None = None  # (batch,) bool, rows that take no tokens now
        self._ids: Tensor | None = None  # (batch, C) the last ids in no particular order, with repetitions at first
        self._next: Tensor | None = None  # (batch, 1) how many ids were put there
        self._waiting: set[int] = set()  # rows that were reset and have no text yet
        self._noise: Tensor | None = None  # (batch, vocabulary) float32
        self._settings: tuple | None = None  # of the last choice and whether it was watched, with what belongs to them
        self._processors: LogitsProcessorList | None = None
        self._choice: Captured | None = None

    @property
    def cache(self) -> SinkCache:
        """What `generate` has under way counts for whatever comes next."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_stream(_aside(self._device))
        return self._cache

    @property
    def _runner(self):
        handle = getattr(self.model, "_sinkattn", None)
        if handle is None:
            raise ValueError("this Stream's model is not patched any more: patch() it and make another Stream")
        return handle.runner

    @property
    def lengths(self) -> Tensor | None:
        return self.cache.lengths

    def append(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, rows=None) -> None:
        """Add new tokens to the text: new ones only, any number.

        input_ids: (batch, tokens) or (tokens,) int64. attention_mask: like input_ids, 0 for left padding; None for
        none. rows: which rows get them, (n,) int64 or a list, each once, with input_ids (n, tokens); None for all.
        Raises ValueError for an empty prompt, another batch size, rows that are not there, right padding or ids the
        model has no embedding for.
        """
        ids = torch.as_tensor(input_ids, device=self._device)
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"input_ids {tuple(ids.shape)}: an empty prompt, or not (batch, tokens)")
        mask = None
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask, device=self._device).reshape(ids.shape)
        if rows is None:
            index = torch.arange(len(ids), device=self._device)
            logits = self._read(ids, mask, self.cache)
        else:
            index = self._index_of(rows)
            if len(index) != len(ids):
                raise ValueError(f"input_ids has {len(ids)} rows, for {len(index)} rows of the Stream")
            cache = self.cache.picked(index)
            logits = self._read(ids, mask, cache)
            self.cache.put(index, cache)
        if self._logits is None:
            self._start(logits)
        self._remember(ids, mask, index)
        self._logits[index] = logits
        self._ended[index] = False
        self._waiting.difference_update(index.tolist())

    def _start(self, logits: Tensor) -> None:
        rows, self._logits = len(logits), torch.empty_like(logits)
        self._ended = torch.zeros(rows, dtype=torch.bool, device=self._device)
        self._ids = torch.zeros(rows, self._cache.plan.capacity, dtype=torch.int64, device=self._device)
        self._next = torch.zeros(rows, 1, dtype=torch.int64, device=self._device)

    def reset(self, rows=None) -> None:
        """Forget the text of some rows and keep the memory: they wait, and yield padding, until they get a new one.

        rows: (n,) int64 or a list; None for all. Raises ValueError for rows that are not there.
        """
        if self._logits is None:
            return
        index = self._index_of(range(len(self._ended)) if rows is None else rows)
        self.cache.forget(index)
        self._ended[index] = True
        self._next[index] = 0
        self._waiting.update(index.tolist())

    def generate(
        self,
        max_new_tokens: int | None = None,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next token of every row, (batch,) int64 on the model's device, step by step.

        max_new_tokens: tokens; None goes on until every row has met an end-of-text token, or for ever.
        do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id: as in `generate`; None takes the model's
            generation_config. A repetition is one among the last C tokens. ``eos_token_id=[]`` never stops.
        seed: of a generator of this call's own; None uses torch's.
        streamer: gets the ids of each step, on the CPU, and `end()` when the loop ends.

        A row that has ended yields the pad token (or the end-of-text token) and stays as it is until all have, or until
        it is reset and gets a new text. Leaving the loop early loses nothing: what was yielded belongs to the text.
        Raises ValueError if nothing was appended.
        """
        if self._logits is None or len(self._waiting) == len(self._ended):
            raise ValueError("an empty prompt: append() at least one token first")
        config = self.model.generation_config
        option = lambda value, name: getattr(config, name) if value is None else value  # noqa: E731
        ends = option(eos_token_id, "eos_token_id")
        ends = tuple(torch.as_tensor([] if ends is None else ends, dtype=torch.int64).flatten().tolist())
        settings = _Settings(
            bool(option(do_sample, "do_sample")),
            option(repetition_penalty, "repetition_penalty"),
            option(temperature, "temperature"),
            option(top_k, "top_k"),
            option(top_p, "top_p"),
            ends,
            config.pad_token_id if config.pad_token_id is not None else (*ends, 0)[0],
        )
        generator = None if seed is None else torch.Generator(self._device).manual_seed(seed)
        self._ended.fill_(False)
        self._ended[list(self._waiting)] = True
        return self._steps(max_new_tokens, settings, generator, streamer)

    def _steps(self, max_new_tokens, settings: "_Settings", generator, streamer) -> Iterator[Tensor]:
        """On a GPU, tokens are made on a stream of their own: whoever reads one waits until it was chosen, and not
        until the model has read it. The host looks at what it was given while the model is at work.
        """
        on_gpu, made = self._device.type == "cuda", 0
        watched = bool(settings.ends or self._waiting) or streamer is not None
        host = torch.zeros(1 + len(self._ended), dtype=torch.int64, pin_memory=on_gpu)  # whether any goes on, ids
        here, aside = (torch.cuda.current_stream(self._device), _aside(self._device)) if on_gpu else (None, None)
        try:
            while max_new_tokens is None or made < max_new_tokens:
                watched = watched or bool(self._waiting)
                with torch.no_grad(), torch.cuda.stream(aside):
                    if on_gpu:
                        aside.wait_stream(here)
                    ids, fed, report = self._choose(settings, watched, generator)
                    ids = ids.clone()
                    if watched:
                        host.copy_(report, non_blocking=True)
                    if on_gpu:
                        chosen = aside.record_event()
                    elif watched and not host[0]:
                        return
                    self._feed(ids, fed)
                if on_gpu:
                    ids.record_stream(here)
                    here.wait_event(chosen)
                    if watched:
                        chosen.synchronize()
                        if not host[0]:
                            return
                if streamer is not None:
                    streamer.put(host[1:].clone())
                made += 1
                yield ids
        finally:
            if on_gpu:
                here.wait_stream(aside)
            if streamer is not None:
                streamer.end()

    def _choose(self, settings: "_Settings", watched: bool, generator) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The next ids, (batch,); if watched, which rows take them, (batch,) bool, and for the host any, and ids."""
        if settings.do_sample:
            if self._noise is None:
                self._noise = torch.empty(self._logits.shape, device=self._device)
            self._noise.exponential_(generator=generator)
        if (settings, watched) != self._settings:  # captured at the second token of the same settings
            self._settings, self._processors, self._choice = (settings, watched), settings.processors(), None
        elif self._choice is None and self._device.type == "cuda" and self._runner.why_eager is None:
            self._choice = Captured(lambda: self._next_ids(settings, watched), self._device)
        return self._next_ids(settings, watched) if self._choice is None else self._choice()

    def _next_ids(self, settings: "_Settings", watched: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        is_plain = not (self._processors or settings.do_sample)  # then the largest is the largest in any dtype
        scores = self._logits if is_plain else self._processors(self._ids, self._logits.float())
        if settings.do_sample:
            scores = scores.softmax(-1) / self._noise  # exponentially distributed: the largest is a draw
        ids, at = scores.argmax(-1), self._next % self._ids.shape[1]
        if not watched:  # every row takes its token
            self._ids.scatter_(1, at, ids[:, None])
            self._next += 1
            return ids, None, None
        fed = ~self._ended
        ids = ids.where(fed, settings.pad)
        for end in settings.ends:
            self._ended |= ids == end
        self._ids.scatter_(1, at, torch.where(fed[:, None], ids[:, None], self._ids.gather(1, at)))
        self._next += fed[:, None]
        return ids, fed, torch.cat((fed.any()[None], ids))

    def _feed(self, ids: Tensor, fed: Tensor | None) -> None:
        """One token a row through the model, (batch,); rows that are not fed stay as they are."""
        ids, mask = ids[:, None], None if fed is None else fed[:, None]
        logits = self._runner.next_logits(self._cache, ids, mask)
        logits = self._read(ids, mask, self._cache) if logits is None else logits[:, -1]
        self._logits.copy_(logits if fed is None else torch.where(fed[:, None], logits, self._logits))

    @torch.no_grad()
    def _read(self, ids: Tensor, mask: Tensor | None, cache: SinkCache) -> Tensor:
        """The logits after some tokens, (rows, vocabulary)."""
        return self._runner.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, **self._last_logits
        ).logits[:, -1]

    def _index_of(self, rows) -> Tensor:
        index = torch.as_tensor(list(rows) if isinstance(rows, range) else rows, dtype=torch.int64).flatten().tolist()
        held = self._cache.batch_size
        if not index or len(set(index)) < len(index) or min(index) < 0 or max(index) >= held:
            raise ValueError(f"rows={index}: this Stream holds rows 0 to {held - 1}, name some of them, each once")
        return torch.tensor(index, device=self._device)

    def _remember(self, ids: Tensor, mask: Tensor | None, index: Tensor) -> None:
        capacity = self._cache.plan.capacity
        ids = ids if mask is None else ids.where(mask > 0, ids[:, -1:])
        ids, before = ids[:, -capacity:], self._next[index]
        held = torch.where(before == 0, ids[:, -1:], self._ids[index])
        self._ids[index] = held.scatter(1, (before + torch.arange(ids.shape[1], device=ids.device)) % capacity, ids)
        self._next[index] = before + ids.shape[1]


@functools.cache
def _aside(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _Settings:
    """How the next ids are chosen; the numbers are those of `generate`."""

    do_sample: bool
    penalty: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    ends: tuple[int, ...]
    pad: int

    def processors(self) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self.penalty not in (None, 1.0):
            processors.append(RepetitionPenaltyLogitsProcessor(self.penalty))
        if self.do_sample:
            for value, neutral, warper in (
                (self.temperature, 1.0, TemperatureLogitsWarper),
                (self.top_k, 0, TopKLogitsWarper),
                (self.top_p, 1.0, TopPLogitsWarper),
            ):
                if value not in (None, neutral):
                    processors.append(warper(value))
        return processors
