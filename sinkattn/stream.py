"""Stream: one endless text, or a batch of them, with nothing that grows."""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .cache import SinkCache
from .rope import input_device


class Stream:
    """An endless text (or a batch of them) of a patched model: append what comes in, generate what goes out.

    Unlike `generate`, it keeps no ids but those of the last C tokens, so its time and memory per token are flat for
    ever.

        stream = Stream(model)
        stream.append(tokenizer(text, return_tensors="pt").input_ids)
        for token_ids in stream.generate(max_new_tokens=None):
            ...

    model: a model that `patch` was called on; ValueError otherwise.

    Attributes: cache (the `SinkCache`), lengths ((batch,) int64, tokens in the cache of each row).
    """

    def __init__(self, model):
        self.model, self.cache, self._device = model, SinkCache(model), input_device(model)
        takes = inspect.signature(model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._logits: Tensor | None = None  # (batch, vocabulary) of the next token
        self._sampled: Tensor | None = None  # (batch, 1) handed out, not yet fed
        self._ids: Tensor | None = None  # (batch, C) ring of the last ids, in no particular order
        self._next, self._count = 0, 0  # where the ring goes on, and how much of it is filled

    @property
    def lengths(self) -> Tensor | None:
        return self.cache.lengths

    def append(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Add new tokens to the text: new ones only, any number.

        input_ids: (batch, tokens) or (tokens,) int64. attention_mask: like input_ids, 0 for left padding; None for
        none. Raises ValueError for an empty prompt, another batch size, right padding or ids the model has no embedding
        for.
        """
        input_ids = torch.as_tensor(input_ids, device=self._device)
        input_ids = input_ids[None] if input_ids.dim() == 1 else input_ids
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids {tuple(input_ids.shape)}: an empty prompt, or not (batch, tokens)")
        mask = None
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask, device=self._device).reshape(input_ids.shape)
        fed = input_ids
        if self._sampled is not None:
            if len(fed) != len(self._sampled):
                raise ValueError(f"this Stream holds {len(self._sampled)} rows and cannot go on with {len(fed)}")
            if mask is None:
                fed = torch.cat((self._sampled, fed), dim=1)
            else:  # padding goes in front: the sampled token moves next to the row's first new one
                width = mask.shape[1] - mask.sum(1, keepdim=True)
                column = torch.arange(mask.shape[1] + 1, device=mask.device)
                shifted = torch.cat((self._sampled, fed), dim=1)
                fed = torch.where(column == width, self._sampled, shifted)
                mask = (column >= width).to(mask.dtype)
        self._feed(fed, mask)
        self._remember(
            input_ids if mask is None else input_ids.where(mask[:, -input_ids.shape[1] :] > 0, input_ids[:, -1:])
        )

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
    ) -> Iterator[Tensor]:
        """Yield the next token of every row, (batch,) int64 on the model's device, step by step.

        max_new_tokens: tokens; None goes on until every row has met an end-of-text token, or for ever.
        do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id: as in `generate`; None takes the model's
            generation_config. A repetition is one among the last C tokens. ``eos_token_id=[]`` never stops.
        seed: of a generator of this call's own; None uses torch's.

        Rows that have ended yield the pad token (or the end-of-text token) until all have. Leaving the loop early loses
        nothing: the last token yielded is fed by the next `append` or `generate`. Raises ValueError if nothing was
        appended.
        """
        if self._logits is None and self._sampled is None:
            raise ValueError("an empty prompt: append() at least one token first")
        config = self.model.generation_config
        option = lambda value, name: getattr(config, name) if value is None else value  # noqa: E731
        do_sample, penalty = option(do_sample, "do_sample"), option(repetition_penalty, "repetition_penalty")
        processors = LogitsProcessorList()
        if penalty not in (None, 1.0):
            processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        if do_sample:
            for value, name, neutral, warper in (
                (temperature, "temperature", 1.0, TemperatureLogitsWarper),
                (top_k, "top_k", 0, TopKLogitsWarper),
                (top_p, "top_p", 1.0, TopPLogitsWarper),
            ):
                value = option(value, name)
                if value not in (None, neutral):
                    processors.append(warper(value))
        ends = option(eos_token_id, "eos_token_id")
        ends = torch.tensor([] if ends is None else ends, dtype=torch.int64, device=self._device).flatten()
        generator = None if seed is None else torch.Generator(self._device).manual_seed(seed)
        return self._steps(max_new_tokens, processors, do_sample, ends, config.pad_token_id, generator)

    def _steps(self, max_new_tokens, processors, do_sample, ends, pad, generator) -> Iterator[Tensor]:
        ended = None
        while max_new_tokens is None or max_new_tokens > 0:
            if self._sampled is not None:
                self._feed(self._sampled, None)
            with torch.no_grad():
                scores = processors(self._ids[:, : self._count], self._logits.float())
                if do_sample:
                    token_ids = torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
                else:
                    token_ids = scores.argmax(-1)
                if len(ends):
                    ended = torch.zeros_like(token_ids, dtype=torch.bool) if ended is None else ended
                    token_ids = token_ids.where(~ended, ends[0] if pad is None else pad)
                    ended = ended | torch.isin(token_ids, ends)
            self._sampled = token_ids[:, None]
            self._remember(self._sampled)
            yield token_ids
            if ended is not None and bool(ended.all()):
                return
            max_new_tokens = None if max_new_tokens is None else max_new_tokens - 1

    @torch.no_grad()
    def _feed(self, ids: Tensor, mask: Tensor | None) -> None:
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=self.cache, **self._last_logits)
        self._logits, self._sampled = output.logits[:, -1], None

    def _remember(self, ids: Tensor) -> None:
        capacity = self.cache.plan.capacity
        if self._ids is None:
            self._ids = torch.zeros(len(ids), capacity, dtype=torch.int64, device=self._device)
        ids = ids[:, -capacity:]
        end = self._next + ids.shape[1]
        first = ids[:, : capacity - self._next]
        self._ids[:, self._next : self._next + first.shape[1]] = first
        self._ids[:, : max(end - capacity, 0)] = ids[:, first.shape[1] :]
        self._next, self._count = end % capacity, min(self._count + ids.shape[1], capacity)
