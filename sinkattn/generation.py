"""What transformers' `generate` asks of a patched model: its cache, its inputs, and turns over one cache."""

import inspect
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import Cache, GenerationMixin, StoppingCriteriaList

from .agreement import Agreement
from .cache import SinkCache, Unfed
from .introspect import CACHE, named
from .runner import Runner, is_plain

BY_TOKEN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")  # a column for each token


@dataclass
class _Call:
    """A `generate` under way. has_positions: whether the caller gave some. width: of its ids, columns; held: those that
    the cache has read. mask: of the text with its ids, where these are all new to a cache that holds one. cache: what
    it feeds. is_search: by beams. is_assisted: by candidates."""

    has_positions: bool
    width: int = 0
    held: int = 0
    mask: Tensor | None = None
    cache: SinkCache | None = None
    is_search: bool = False
    is_assisted: bool = False


class _Running(threading.local):
    """call: the innermost `generate` of this thread, None if there is none."""

    def __init__(self):
        self.call: _Call | None = None


_running = _Running()


class _Stops(StoppingCriteriaList):
    """What may end a text, asked once a token: the cache hears which rows have ended, and what was not fed yet."""

    def __init__(self, criteria: StoppingCriteriaList, cache: SinkCache, width: int):
        super().__init__(criteria)
        self.cache, self.done, self.width = cache, None, width
        self.pads = any(hasattr(x, "eos_token_id") for x in criteria)  # as `generate` tells

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self.cache.ended = self.done  # before this choice
        self.cache.unfed = Unfed(input_ids[:, -1:], self.cache.ended, input_ids.shape[1] - self.width)
        done = super().__call__(input_ids, scores, **kwargs)
        if self.pads and len(input_ids) > 1:
            self.done = done if self.done is None else self.done | done
        return done


class Generation:
    """`generate` and what it calls, in place of the methods of one model. runner: that of the model."""

    def __init__(self, model, runner: Runner):
        self.model, self.runner = model, runner
        self._generate, self._prepare_inputs = model.generate, model.prepare_inputs_for_generation
        self._stopping_criteria, self._candidates = model._get_stopping_criteria, model._get_candidate_generator

    @property
    def methods(self) -> dict:
        """What stands in the place of which method of the model."""
        methods = {
            "generate": self.generate,
            "init_continuous_batching": self.refuse_batches,
            "prepare_inputs_for_generation": self.prepare_inputs,
            "_prepare_cache_for_generation": self.prepare_cache,
            "_get_stopping_criteria": self.stopping_criteria,
            "_get_candidate_generator": self.candidate_generator,
        }
        if self.runner.pictures is not None:
            methods["_prepare_position_ids_for_generation"] = self.prepare_positions
        return methods

    def generate(self, inputs=None, *args, **kwargs):
        """The model's own `generate` with a SinkCache: one of its own, or yours, which may hold a text, see there.

        Without an attention_mask, pad ids are padding wherever they stand, as in transformers, unless they also end a
        text, or were chosen in an answer and cannot be taken back any more. Raises ValueError for what contradicts
        itself or the text, before anything is fed but the last token of an answer.
        """
        if kwargs.get("cache_implementation") is not None:
            raise ValueError("cache_implementation: a patched model brings its own cache; leave it out")
        kwargs = named(CACHE, kwargs)
        self._refuse(args, kwargs)
        cache, given = kwargs.get(CACHE), inputs if inputs is not None else kwargs.get("input_ids")
        holds_text = isinstance(cache, SinkCache) and bool(cache.seen)  # forward refuses other caches
        outer, is_assistant = _running.call, getattr(kwargs.get("generation_config"), "is_assistant", False)
        seen, changes, undo = (cache.seen, cache.changes, None) if holds_text else (0, 0, None)
        ids, held, mask = None, 0, None
        if kwargs.get("inputs_embeds") is not None:
            if holds_text:
                raise ValueError(
                    "inputs_embeds over a SinkCache that holds a text: generate cannot tell whether they are all of it "
                    "or new. Give input_ids, or all embeddings to a new SinkCache, or feed new ones by a forward"
                )
        elif isinstance(given, Tensor) and given.dim() == 2:
            if given.shape[1] == 0:
                raise ValueError("an empty prompt: give at least one token")
            if is_assistant and outer is not None and outer.mask is not None:  # it was given that of all the text
                new = given.shape[1] - outer.width
                kwargs["attention_mask"] = torch.nn.functional.pad(outer.mask[:, -outer.width :], (0, new), value=1)
            elif is_assistant and kwargs.get("attention_mask") is None:  # pad ids are text that was chosen
                kwargs["attention_mask"] = torch.ones_like(given)
            if holds_text:
                cache.check(len(given), cache.lengths.device, self.runner.plan)
            pad = self._pad_of(args, kwargs)
            ids = given if pad is None else self._padded_left(given, pad, kwargs, cache if holds_text else None)
            if holds_text:
                undo = self._go_on(cache, ids, pad, kwargs)
                changes += undo is not None
                mask = kwargs["attention_mask"]
                held, mask = (cache.seen, None) if mask.shape[1] == ids.shape[1] else (0, mask)
            inputs = None if inputs is None else ids
            kwargs |= {} if inputs is not None else {"input_ids": ids}
        has_positions = kwargs.get("position_ids") is not None and not is_assistant  # its positions count padding
        if holds_text:
            cache.are_checked = is_assistant  # what is new was chosen
        call = _Call(has_positions, 0 if ids is None else ids.shape[1], held, mask)
        before = cache.changes if isinstance(cache, SinkCache) else 0
        _running.call = call
        try:
            output = self._generate(inputs, *args, **kwargs)
        except BaseException:
            call.is_search &= call.cache is not None and call.cache.changes != before
            if call.is_assisted and call.cache is not None and call.cache.changes != before:
                call.cache.tear()  # candidates that nobody has chosen may stand in it
            raise
        finally:
            _running.call = outer
            if call.cache is not None:
                call.cache.end_turn(call.is_search)
            if holds_text and cache.changes == changes:  # it has failed before anything was fed
                if undo is not None:
                    undo()
                cache.seen = seen
        if ids is not None and not torch.equal(ids, given):
            sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
            if sequences is not None:
                sequences[:, : given.shape[1]] = given.repeat_interleave(len(sequences) // len(given), dim=0)
        return output

    def _refuse(self, args: tuple, kwargs: dict) -> None:
        """Raise ValueError for what cannot be right over a SinkCache, or would leave the model changed."""
        config, mask = kwargs.get("generation_config") or (args[0] if args else None), kwargs.get("attention_mask")
        told = lambda name: next((x for x in (kwargs.get(name), getattr(config, name, None)) if x is not None), None)  # noqa: E731
        if told("assistant_early_exit"):
            raise ValueError("assistant_early_exit runs a part of the model, whose other layers a SinkCache waits for")
        if isinstance(kwargs.get(CACHE), SinkCache) and told("use_cache") is False:
            raise ValueError("use_cache=False feeds the whole text again at every token: leave it out, or the cache")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ValueError("attention_mask must be a tensor, (batch, columns)")

    def _pad_of(self, args: tuple, kwargs: dict) -> int | None:
        """The id that `generate` takes for padding wherever it stands, None if there is none."""
        config = kwargs.get("generation_config") or (args[0] if args else None)
        pad, ends = (self._token(name, config, kwargs) for name in ("pad_token_id", "eos_token_id"))
        return pad[0] if kwargs.get("attention_mask") is None and pad and pad[0] not in ends else None

    def _padded_left(self, ids: Tensor, pad: int, kwargs: dict, cache: SinkCache | None) -> Tensor:
        """ids, and in kwargs what belongs to them, with padding, ids that are `pad`, brought to the left.

        cache: that holds a text, or None. Pad ids in an answer that can be taken back no more are none in its history.
        """
        real = ids != pad
        if real.all():
            return ids
        order = real.int().argsort(dim=1, stable=True)
        if cache is not None:
            behind_first = real.cumsum(1) > 0
            as_padding, as_text = (
                cache.compare(ids.gather(1, order), real.gather(1, order)),
                cache.compare(ids, behind_first),
            )
            likelier = torch.tensor(
                [
                    text.likeness > row.likeness and not row.can_follow
                    for row, text in zip(as_padding, as_text, strict=True)
                ]
            )
            real = torch.where(likelier[:, None].to(real.device), behind_first, real)
            order = real.int().argsort(dim=1, stable=True)
        if not real[:, -1].all():
            raise ValueError(
                f"input_ids end with the pad token, {pad}, which is padding where no attention_mask says otherwise: "
                "pad on the left"
            )
        kwargs["attention_mask"] = real.to(ids.dtype)
        for name in BY_TOKEN:
            if isinstance(kwargs.get(name), Tensor) and kwargs[name].shape == ids.shape:
                kwargs[name] = kwargs[name].gather(1, order)
        return ids.gather(1, order)

    def _token(self, name: str, config, kwargs: dict) -> list[int]:
        """The ids that `generate` takes a special token to be."""
        told = (kwargs.get(name), getattr(config, name, None), getattr(self.model.generation_config, name))
        found = next((x for x in told if x is not None), [])
        return torch.as_tensor(found).flatten().tolist()

    def _go_on(self, cache: SinkCache, ids: Tensor, pad: int | None, kwargs: dict) -> Callable[[], None] | None:
        """Tell `generate` what of ids, (batch, width), is new to a cache that holds a text.

        It slices off as many columns as the cache says to have seen, if the mask has as many as ids; columns of rows
        with less that is new than others are then padding. pad: the id that is padding, or None.

        Returns what undoes the taking back of tokens, if any were.
        """
        (batch, width), mask = ids.shape, kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.dim() != 2:
            return None  # an error of transformers' own
        seen, last = cache.seen, 0 if cache.unfed is None else 1
        if mask.shape[0] != batch or mask.shape[1] not in (width, seen + width, seen + width + last):
            raise ValueError(
                f"attention_mask {tuple(mask.shape)} does not fit {batch} rows of {width} ids after {seen}: give "
                f"({batch}, {width}), or ({batch}, {seen + width}) if all of them are new"
            )
        real = mask[:, -width:] > 0
        if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
            raise ValueError(
                "attention_mask has zeros after ones, as behind a row that ended early: pad on the left, with all that "
                "belongs to a row at its end"
            )
        if mask.shape[1] == width:
            rows = cache.compare(ids, real)
            telling = [
                row for row, tells_nothing in zip(rows, cache.rows.are_one_piece(), strict=True) if not tells_nothing
            ]
            if telling and all(row.can_follow for row in rows):
                new = [row.count - row.length + row.back for row in rows]
                if max(new) == width and min(new) < width:
                    raise ValueError(
                        f"row {new.index(width)} of input_ids has a text, and this SinkCache holds none for it: "
                        "reset() it or make another"
                    )
                back, undo = torch.tensor([row.back for row in rows], device=cache.lengths.device), None
                if any(row.back for row in rows):
                    undo = cache.take_back(back, refeeds=True)
                kwargs["attention_mask"] = self._history(cache, new, real).to(ids.dtype)
                return undo
            if any(row.seems_meant for row in telling):
                at = next(i for i, row in enumerate(rows) if not row.can_follow)
                raise ValueError(
                    f"row {at} of input_ids differs from the text that this SinkCache holds {rows[at].difference}, and "
                    f"{self._why_not(cache, rows[at])}. If all ids are new, say so by an attention_mask of ({batch}, "
                    f"{seen + width})"
                )
        if cache.is_searched:
            raise ValueError(
                "the rows of this SinkCache are the beams of a search, not the texts that it returned: reset() it"
            )
        if pad is not None and cache.unfed is not None:
            self._drop_pads(cache, pad)
        self._feed_last(cache, ids, real, is_told=mask.shape[1] == seen + width + 1)
        columns = torch.arange(cache.seen, device=ids.device)
        before = columns >= (cache.seen - cache.lengths[:, None]).to(ids.device)
        kwargs["attention_mask"] = torch.cat((before, real), dim=1).to(ids.dtype)
        return None

    def _why_not(self, cache: SinkCache, row: Agreement) -> str:
        if cache.has_state:
            return "a model with a state takes no tokens back: reset() it or make another"
        if not row.is_same:
            return "what is forgotten cannot be taken back: reset() it or make another"
        if row.back > row.room:
            return f"it can take back {row.room} tokens now, not {row.back}: {cache.bound}, or make another"
        return f"too little of it agrees to take {row.back} tokens back: crop() or reset() it, or make another"

    def _history(self, cache: SinkCache, new: list[int], real: Tensor) -> Tensor:
        """Let `generate` slice the history off ids that begin with it; returns the mask, (batch, width). new: tokens
        of each row behind it.
        """
        width = real.shape[1]
        cache.seen = width - max(new)
        columns, behind = torch.arange(width, device=real.device), torch.tensor(new, device=real.device)
        return torch.where(columns < cache.seen, real, columns >= width - behind[:, None])

    def _drop_pads(self, cache: SinkCache, pad: int) -> None:
        """Take pad ids out of the last answer, as `generate` does if it is given the whole text, if they can be."""
        unfed, device = cache.unfed, cache.lengths.device
        fed = cache.rows.last(min(unfed.columns - 1, cache.rows.smallest))
        is_pad, room = fed == pad, cache.rows.room(True)
        is_pad &= fed.shape[1] - torch.arange(fed.shape[1], device=device) <= room[:, None]
        if is_pad.any():
            behind = is_pad.cumsum(1) > 0  # all from the first of them on is taken back, and fed again without them
            cache.take_back(behind.sum(1), refeeds=True)
            if (again := behind & ~is_pad).any():
                order = again.int().argsort(dim=1, stable=True)
                self._feed(cache, fed.gather(1, order), again.gather(1, order))
            cache.unfed = unfed
        if (is_pad := unfed.ids[:, 0] == pad).any():
            cache.unfed = unfed.without(is_pad.nonzero()[:, 0])

    def _feed(self, cache: SinkCache, ids: Tensor, mask: Tensor) -> None:
        self.model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, use_cache=True)

    def _feed_last(self, cache: SinkCache, ids: Tensor, real: Tensor, is_told: bool) -> None:
        """Feed the last token of an answer to the rows that have one and whose new ids do not begin with it."""
        if cache.unfed is None:
            return
        last, ended = (None if x is None else x.to(cache.lengths.device) for x in cache.unfed[:2])
        first = ids.gather(1, real.int().argmax(1, keepdim=True)).to(last)
        misses = torch.ones_like(last, dtype=torch.bool) if is_told else first != last
        misses = misses if ended is None else misses & ~ended[:, None]
        if misses.any():
            self._feed(cache, last, misses)

    def prepare_inputs(self, input_ids: Tensor, *args, **kwargs) -> dict:
        """`GenerationMixin.prepare_inputs_for_generation`: no positions but the caller's own, sinkattn counts."""
        kwargs, pictures = named(CACHE, kwargs), self.runner.pictures
        cache, call = kwargs.get(CACHE), _running.call
        if call is not None and call.held and cache is call.cache and kwargs.get("next_sequence_length") is None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - call.held  # assisted generation gives the history too
        if call is not None and call.is_assisted and call.mask is not None and cache is call.cache:
            new = input_ids.shape[1] - call.width  # for which transformers cuts the mask to the columns of ids
            kwargs["attention_mask"] = torch.nn.functional.pad(call.mask, (0, new), value=1)
        is_next = kwargs.get("next_sequence_length") == 1 and isinstance(cache, SinkCache) and cache.seen
        if pictures is not None and is_next and not kwargs.get("is_first_iteration"):
            kwargs = {name: x for name, x in kwargs.items() if name not in pictures.names}
        if is_next and is_plain(kwargs, "next_sequence_length"):
            mask = kwargs.get("attention_mask")
            return {"input_ids": input_ids[:, -1:], "attention_mask": mask, CACHE: cache, "use_cache": True}
        given = self._prepare_inputs(input_ids, *args, **kwargs)
        if call is not None and not call.has_positions and pictures is None:
            given.pop("position_ids", None)
        return given

    def prepare_positions(self, inputs_tensor: Tensor, model_kwargs: dict) -> Tensor:
        """`GenerationMixin._prepare_position_ids_for_generation` of a model that counts in three.

        The count of tokens, (batch, columns), and where there are new pictures also their places, (4, batch, columns).
        Pictures of the history are taken out of `model_kwargs`: the cache holds them.
        """
        text = GenerationMixin._prepare_position_ids_for_generation(self.model, inputs_tensor, model_kwargs)
        ids, cache = model_kwargs.get("input_ids"), named(CACHE, model_kwargs).get(CACHE)
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        if ids.dim() != 2 or not (cache is None or isinstance(cache, SinkCache)):
            return text
        seen = 0 if cache is None else cache.seen
        if seen:
            cache.check(len(ids), ids.device, self.runner.plan)
        held = seen if text.shape[1] == ids.shape[1] else 0  # columns of ids that the cache has read
        self.runner.pictures.forget(model_kwargs, ids, held)
        mask = model_kwargs.get("attention_mask")
        given = {**model_kwargs, "input_ids": ids[:, held:], CACHE: cache}
        mask = None if mask is None else mask[:, mask.shape[1] - ids.shape[1] + held :].bool()
        places = self.runner.places_of(given, mask, cache)
        if places is None:
            return text
        places = torch.nn.functional.pad(places.movedim(-1, 0), (text.shape[1] - places.shape[1], 0))
        return torch.cat((text.expand(len(ids), -1)[None], places))

    def prepare_cache(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """`GenerationMixin._prepare_cache_for_generation`: whatever the config names, the cache is a SinkCache."""
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = SinkCache(self.model)
        cache, call = model_kwargs.get(CACHE), _running.call
        if call is not None and isinstance(cache, SinkCache):
            call.cache, call.is_search = cache, generation_config.num_beams > 1
            if cache.seen and cache.plan.prefill == "streaming":  # forward takes long inputs in chunks of its own
                generation_config.prefill_chunk_size = None  # and early versions of this one feed the history again

    def stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        """`GenerationMixin._get_stopping_criteria`: the cache hears what they say."""
        criteria, call = self._stopping_criteria(*args, **kwargs), _running.call
        is_heard = call is not None and call.cache is not None and not call.is_search
        return _Stops(criteria, call.cache, call.width) if is_heard else criteria

    def candidate_generator(self, *args, **kwargs):
        """`GenerationMixin._get_candidate_generator`: no more candidates at a time than can be taken back.

        The assistant, if it is patched, takes its own back as well.
        """
        generator = self._candidates(*args, **kwargs)
        handle = getattr(getattr(generator, "assistant_model", None), "_sinkattn", None)
        if self.runner.plan.prefill == "dense":
            raise ValueError("prefill='dense' attends candidates otherwise than tokens alone: patch() with 'streaming'")
        if _running.call.mask is not None and "max_length" in inspect.signature(Cache.crop).parameters:
            raise ValueError(
                f"transformers {transformers.__version__} counts no tokens but its ids: give the whole text, or leave "
                "the assistant out"
            )
        _running.call.is_assisted = True
        most = min(x.plan.slack for x in (self.runner, handle) if x is not None)
        propose, cache = generator.get_candidates, _running.call.cache
        times = itertools.count()
        if most < 1:
            raise ValueError("assisted generation takes candidates back: patch() with slack, their number at a time")

        def get_candidates(input_ids: Tensor, *args, **kwargs):
            for name in ("num_assistant_tokens", "num_output_tokens"):  # how many, as transformers calls it
                if hasattr(generator, name):
                    setattr(generator, name, min(getattr(generator, name), most))
            ids, logits = propose(input_ids, *args, **kwargs)
            cache.are_checked = next(times) > 0  # behind the prompt, what is fed was chosen or proposed
            return ids[:, : input_ids.shape[1] + most], None if logits is None else logits[:, :most]

        generator.get_candidates = get_candidates
        return generator

    def refuse_batches(self, *args, **kwargs):
        """`ContinuousMixin.init_continuous_batching`, by which `generate_batch` begins."""
        raise ValueError(
            "generate_batch brings a paged cache of its own, which has no sinks: batch by generate or sinkattn.Stream, "
            "or remove() the patch"
        )
