"""Stream: one endless text, or a batch of them, with nothing that grows."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from .arguments import whole
from .cache import SinkCache
from .choice import Choice, likeliest
from .graph import Repeated
from .speculate import Draft, Lookup, Rounds
from .stream_texts import StreamTexts, runner_of, side_stream


class Stream(StreamTexts):
    """An endless text (or a batch of them) of a patched model: append what comes in, generate what goes out.

    Unlike `generate`, it keeps no ids but those that stand in the cache, so its time and memory per token are flat for
    ever. On a GPU a token is two CUDA graphs, the model's step and the choice of the next token, and the host waits for
    nothing but a flag that was set a step before.

        stream = Stream(model)
        stream.append(tokenizer(text, return_tensors="pt").input_ids)
        for token_ids in stream.generate(max_new_tokens=None):
            ...

    Rows go their own ways: those that have met their end can be `reset` and get a new text by ``append(ids, rows=...)``
    while the loop over `generate` goes on.

    Interrupted anywhere (Ctrl-C), it goes on where it was, or says that it is torn until all rows are `reset`.

    model: a model that `patch` was called on; ValueError otherwise.

    Attributes: cache (the `SinkCache`), lengths ((batch,) int64, tokens in the cache of each row).
    """

    def generate(
        self,
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        draft: nn.Module | None = None,
        num_assistant_tokens: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Yield the next token of every row, (batch,) int64 on the model's device, step by step.

        With a draft or a lookup, what a step yields is (batch, n), 1 to n tokens of every row that goes on, -1 behind
        them: as many as were proposed rightly, and one more. It is the text without them, or of the same distribution
        if it is sampled, but for the order in which half precision rounds.

        max_new_tokens: tokens of a row; None takes what a generation_config that is given says, and else goes on until
            every row has met an end-of-text token, or for ever.
        generation_config, options: how tokens are chosen, as in `generate`: do_sample, temperature, top_k, top_p,
            min_p, top_h, typical_p, epsilon_cutoff, eta_cutoff, repetition_penalty, suppress_tokens, eos_token_id,
            pad_token_id, remove_invalid_values, renormalize_logits. What is None or not given is that of the model's
            generation_config, and else transformers' default. A repetition is one of a token that stands in the cache.
            ``eos_token_id=[]`` never stops.
        seed: of a generator of this call's own; None uses torch's.
        streamer: gets the ids of each step, on the CPU, and `end()` when the loop ends.
        draft: a patched model with the same vocabulary, on the same device, that proposes num_assistant_tokens at a
            time, at most `slack` of either patch: a smaller one, or the same with a smaller window over the same
            weights. It reads what the cache holds when the loop begins, and whenever the text is changed meanwhile.
            num_assistant_tokens is 4 if not given.
        prompt_lookup_num_tokens: proposes so many tokens that followed the last ones where they stood before.

        A row that has ended yields the pad token (or the end-of-text token) and stays as it is until all have, or until
        it is reset and gets a new text. Leaving the loop early loses nothing: what was yielded belongs to the text, and
        what was fed when an interrupt came is the first that the next `generate` yields; of proposals, what was not
        yielded is taken back. Raises ValueError if nothing was appended, for a draft that does not fit or more
        proposals than can be taken back, if an interrupt has left the text and what follows it apart, and for a choice
        that needs the whole text (as no_repeat_ngram_size); TypeError for other options.
        """
        self._check_whole()
        if self._logits is None or len(self._waiting) == len(self._ended):
            raise ValueError("an empty prompt: append() at least one token first")
        settings = Choice.of(self.model, generation_config, options, self._device)
        generator = None if seed is None else torch.Generator(self._device).manual_seed(seed)
        if max_new_tokens is None and generation_config is not None:
            max_new_tokens = generation_config.max_new_tokens
        if max_new_tokens is not None:
            max_new_tokens = whole("max_new_tokens", max_new_tokens, 0)
        if draft is None and prompt_lookup_num_tokens is None:
            if num_assistant_tokens is not None:
                raise ValueError("num_assistant_tokens is of a draft, and there is none")
            return self._steps(max_new_tokens, settings, generator, streamer)
        if draft is not None and prompt_lookup_num_tokens is not None:
            raise ValueError("give a draft or prompt_lookup_num_tokens, not both")
        if draft is None:
            k = whole("prompt_lookup_num_tokens", prompt_lookup_num_tokens, 1)
        else:
            k = whole("num_assistant_tokens", 4 if num_assistant_tokens is None else num_assistant_tokens, 1)
        plan = self._cache.plan
        self._cache.activate_past_recording()
        if plan.prefill == "dense":
            raise ValueError("prefill='dense' attends proposals otherwise than tokens alone: patch() with 'streaming'")
        if k > plan.slack:
            raise ValueError(f"{k} tokens are proposed and slack={plan.slack} can be taken back: patch() with more")
        proposer = Lookup(k) if draft is None else Draft(draft, k, settings, generator)
        if isinstance(proposer, Draft) and proposer.device != self._device:
            raise ValueError(f"the draft is on {proposer.device}, the model on {self._device}")
        return self._speculated(max_new_tokens, settings, generator, streamer, proposer, k)

    def _wake(self, settings: Choice) -> None:
        """All rows with a text go on, but those whose end was fed and not yielded yet."""
        with torch.inference_mode(False), torch.no_grad():
            self._ended.fill_(False)
            self._ended[list(self._waiting)] = True
            for ids, *_, fed in self._late:
                ends = settings.ends_text(ids)
                self._ended |= ends if fed is None else ends & fed

    def _steps(
        self,
        max_new_tokens: int | None,
        settings: Choice,
        generator: torch.Generator | None,
        streamer: BaseStreamer | None,
    ) -> Iterator[Tensor]:
        """On a GPU, tokens are made on a stream of their own: whoever reads one waits until it was chosen, and not
        until the model has read it. The host looks at what it was given while the model is at work.
        """
        on_gpu, made = self._device.type == "cuda", 0
        self._wake(settings)
        watched = bool(settings.ends or self._waiting) or streamer is not None
        host = torch.zeros(1 + len(self._ended), dtype=torch.int64, pin_memory=on_gpu)  # whether any goes on, ids
        here, aside = (torch.cuda.current_stream(self._device), side_stream(self._device)) if on_gpu else (None, None)
        there = torch.cuda.device(self._device if on_gpu else -1)  # so that no other GPU is touched
        try:
            while max_new_tokens is None or made < max_new_tokens:
                watched = watched or bool(self._waiting)
                if not self._late:
                    self._check_whole()
                    with torch.inference_mode(False), torch.no_grad(), there, torch.cuda.stream(aside):
                        if on_gpu:
                            aside.wait_stream(here)
                        ids, fed, report = self._choose(settings, watched, generator)
                        ids = ids.clone()
                        if watched:
                            host.copy_(report, non_blocking=True)
                        chosen = aside.record_event() if on_gpu else None
                        if watched and not on_gpu and not host[0]:
                            return
                        self._feed(ids, fed)
                        self._late = [(ids, host if watched else None, chosen, fed)]
                        self._changes = self._cache.changes
                ids, told, chosen, _ = self._late[0]
                if on_gpu:
                    ids.record_stream(here)
                    here.wait_event(chosen)
                    if told is not None:
                        chosen.synchronize()
                if told is not None and not told[0]:  # all rows had ended, and none was fed
                    self._late.clear()
                    return
                if streamer is not None:
                    streamer.put(ids.cpu() if told is None else told[1:].clone())
                made += 1
                yield self._late.pop()[0]
        finally:
            if on_gpu:
                here.wait_stream(aside)
            if streamer is not None:
                streamer.end()

    def _speculated(
        self,
        max_new_tokens: int | None,
        settings: Choice,
        generator: torch.Generator | None,
        streamer: BaseStreamer | None,
        proposer: Draft | Lookup,
        k: int,
    ) -> Iterator[Tensor]:
        """Rounds of proposing and judging.

        Whether any row goes on is known on the device. A GPU is given the next round before the host looks at that of
        the last one; where no row went on, it gave nothing, and is taken back.
        """
        on_gpu, rounds, told = self._device.type == "cuda", None, None
        try:
            with torch.inference_mode(False), torch.no_grad():
                goes_on, went_on = (torch.zeros((), dtype=torch.bool, pin_memory=on_gpu) for _ in range(2))
                most = 1 << 62 if max_new_tokens is None else max_new_tokens
                left = torch.full_like(self._ended, most, dtype=torch.int64)
            self._wake(settings)
            while self._late and max_new_tokens != 0:
                ids, *_, fed = self._late[0]
                fed = torch.ones_like(self._ended) if fed is None else fed
                left.sub_(fed.long())
                given = torch.where(fed, ids, -1)[:, None]
                _put(streamer, given)
                self._late.pop()
                yield given
            while True:
                with torch.inference_mode(False), torch.no_grad():
                    if rounds is None or self._rounds is not rounds:  # now, or as the text was changed meanwhile
                        self._check_whole()
                        rounds = Rounds(
                            self.cache, proposer, k, settings, generator, left, self._logits, self._ended,
                            functools.partial(_verified, self.model, self._cache, k), self._may_capture(settings),
                        )  # fmt: skip
                        if settings.do_sample:
                            self._draw_noise(generator)
                        ids, fed, _ = self._next_ids(settings, True)
                        given = rounds.start(ids, fed)
                        if not rounds.fed.any():
                            return
                    else:
                        if not (on_gpu or goes_on):
                            return
                        given, last = rounds.next(), told
                        goes_on, went_on = went_on, goes_on
                        if last is not None:
                            last.synchronize()
                            if not went_on:
                                self._undo_round()
                                return
                    goes_on.copy_(rounds.any_goes_on, non_blocking=True)
                    told = torch.cuda.current_stream(self._device).record_event() if on_gpu else None
                changes = self._cache.changes
                _put(streamer, given)
                if changes != self._cache.changes or not rounds.is_open:
                    raise ValueError("this Stream was used by its streamer, in the middle of a step")
                yield self._given(rounds, given)
        finally:
            if streamer is not None:
                streamer.end()

    def _given(self, rounds: Rounds, ids: Tensor) -> Tensor:
        """What a round gives belongs to the text from now on."""
        self._rounds, self._changes, rounds.is_open = rounds, self._cache.changes, False
        return ids

    def _choose(
        self, settings: Choice, watched: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The next ids, (batch,); if watched, which rows take them, (batch,) bool, and for the host any, and ids."""
        if settings.do_sample:
            self._draw_noise(generator)
        kind = settings, watched, self._cache.rows
        if kind != self._settings:
            self._choice, self._settings = Repeated(self._device), kind
        return self._choice(functools.partial(self._next_ids, settings, watched), self._may_capture(settings))

    def _draw_noise(self, generator: torch.Generator | None) -> None:
        if self._noise is None:
            self._noise = torch.empty(self._logits.shape, device=self._device)
        self._noise.exponential_(generator=generator)

    def _may_capture(self, settings: Choice) -> Callable[[], bool]:
        """Asks whether what chooses may be captured now. It is kept, and does not hold this Stream."""
        model, on_gpu = self.model, self._device.type == "cuda"
        return lambda: on_gpu and settings.may_be_captured and runner_of(model).captured.why_eager is None

    def _next_ids(self, settings: Choice, watched: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scores = settings.scores(self._logits, self._cache.rows.held)
        if settings.do_sample:
            scores = scores.softmax(-1) / self._noise  # exponentially distributed: the largest is a draw
        ids = likeliest(scores)
        if not watched:  # every row takes its token
            return ids, None, None
        fed = ~self._ended
        ids = ids.where(fed, settings.pad)
        if settings.ends:
            self._ended |= settings.ends_text(ids)
        return ids, fed, torch.cat((fed.any()[None], ids))


def _verified(model: nn.Module, cache: SinkCache, k: int, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of k proposals and the token before them."""
    return runner_of(model).logits(cache, ids, mask, k + 1, True)


def _put(streamer: BaseStreamer | None, given: Tensor) -> None:
    """The tokens of a step, (batch, n), on the CPU: of one row those that there are."""
    if streamer is not None:
        ids = given.cpu()
        streamer.put(ids[ids >= 0] if len(ids) == 1 else ids)
