"""What transformers' `generate` asks of a patched model: its cache, its inputs, which loop, and candidates."""

import functools
import inspect
import itertools
import threading
import weakref
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import Cache, GenerationMixin, StoppingCriteriaList
from transformers.generation import GenerationMode

from .cache import SinkCache
from .captured import is_plain
from .introspect import CACHE, named
from .loop import Stops, is_usual, serves, text_of
from .runner import Runner
from .turns import go_on, padded_left

ELSEWHERE = (  # what transformers does not hand to a loop of ours, or runs another one for
    "custom_generate", "assistant_model", "tokenizer", "assistant_tokenizer", "synced_gpus",
)  # fmt: skip
_ARGUMENTS = inspect.signature(GenerationMixin.generate).parameters.keys()


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


def _config_of(args: tuple, kwargs: dict) -> transformers.GenerationConfig | None:
    """What `generate` is given as its configuration: by name, or behind its inputs."""
    return kwargs.get("generation_config") or (args[0] if args else None)


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
        itself or the text, before anything is fed but the last token of an answer; new ids may bring it all the same.
        """
        if kwargs.get("cache_implementation") is not None:
            raise ValueError("cache_implementation: a patched model brings its own cache; leave it out")
        kwargs = named(CACHE, kwargs)
        self._refuse(args, kwargs)
        cache, given = kwargs.get(CACHE), inputs if inputs is not None else kwargs.get("input_ids")
        holds_text = isinstance(cache, SinkCache) and bool(cache.seen)  # forward refuses other caches
        outer, is_assistant = _running.call, getattr(kwargs.get("generation_config"), "is_assistant", False)
        seen, changes, undo = (cache.seen, cache.changes, None) if holds_text else (0, 0, None)
        unfed = cache.unfed if holds_text else None
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
            ids = given if pad is None else padded_left(given, pad, kwargs, cache if holds_text else None)
            if holds_text:
                undo = go_on(self.model, cache, ids, pad, kwargs, is_history=is_assistant)
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
        is_fed = unfed is not None and before != changes  # by `go_on`
        _running.call = call
        try:
            output = self._generate(inputs, *args, **kwargs | self._own_loop(args, kwargs))
        except BaseException:
            call.is_search &= call.cache is not None and call.cache.changes != before
            if call.is_assisted and call.cache is not None and call.cache.changes != before:
                call.cache.tear()  # candidates that nobody has chosen may stand in it
            if is_fed and cache.changes == before:
                cache.fed_for_nothing = (before, unfed)
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

    def _own_loop(self, args: tuple, kwargs: dict) -> dict:
        """`custom_generate`, where transformers would run its loop for sampling, and alone; else nothing."""
        is_usual_generate = getattr(self._generate, "__func__", None) is GenerationMixin.generate
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if len(args) > 1 or is_distributed or not (is_usual_generate and is_usual(self.model)):
            return {}
        if any(kwargs.get(name) not in (None, False) for name in ELSEWHERE):
            return {}
        config = _config_of(args, kwargs)
        asked = {name: x for name, x in kwargs.items() if name not in _ARGUMENTS}
        config, _ = self.model._prepare_generation_config(config, **asked)
        if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return {}
        return {"custom_generate": functools.partial(self._sample, kwargs.get("streamer"))}

    def _sample(
        self, streamer, model, input_ids: Tensor, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ):
        """`GenerationMixin._sample`, by a loop of our own where that serves."""
        cache, pictures = named(CACHE, model_kwargs).get(CACHE), self.runner.pictures
        later = {name: x for name, x in model_kwargs.items() if pictures is None or name not in pictures.names}
        is_prepared = getattr(model.prepare_inputs_for_generation, "call", None) == self.prepare_inputs
        if is_prepared and is_plain(later) and serves(model, cache, input_ids, stopping_criteria, generation_config):
            return text_of(
                model, self.runner, cache, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
                model_kwargs,
            )  # fmt: skip
        asked = dict(
            logits_processor=logits_processor, stopping_criteria=stopping_criteria, generation_config=generation_config,
            streamer=streamer,
        )  # fmt: skip
        return type(model)._sample(model, input_ids, **asked, **model_kwargs)

    def _refuse(self, args: tuple, kwargs: dict) -> None:
        """Raise ValueError for what cannot be right over a SinkCache, or would leave the model changed."""
        config, mask = _config_of(args, kwargs), kwargs.get("attention_mask")
        told = lambda name: next((x for x in (kwargs.get(name), getattr(config, name, None)) if x is not None), None)  # noqa: E731
        if told("assistant_early_exit"):
            raise ValueError("assistant_early_exit runs a part of the model, whose other layers a SinkCache waits for")
        if isinstance(kwargs.get(CACHE), SinkCache) and told("use_cache") is False:
            raise ValueError("use_cache=False feeds the whole text again at every token: leave it out, or the cache")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ValueError("attention_mask must be a tensor, (batch, columns)")

    def _pad_of(self, args: tuple, kwargs: dict) -> int | None:
        """The id that `generate` takes for padding wherever it stands, None if there is none."""
        config = _config_of(args, kwargs)
        pad, ends = (self._token(name, config, kwargs) for name in ("pad_token_id", "eos_token_id"))
        return pad[0] if kwargs.get("attention_mask") is None and pad and pad[0] not in ends else None

    def _token(self, name: str, config, kwargs: dict) -> list[int]:
        """The ids that `generate` takes a special token to be."""
        told = (kwargs.get(name), getattr(config, name, None), getattr(self.model.generation_config, name))
        found = next((x for x in told if x is not None), [])
        return torch.as_tensor(found).flatten().tolist()

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
        if isinstance(cache, SinkCache) and named(CACHE, dict(given)).get(CACHE) is None:
            # Phi-3 drops it to compute a text anew once it outgrows the short frequencies, which our layers switch by
            # themselves.
            given = GenerationMixin.prepare_inputs_for_generation(self.model, input_ids, *args, **kwargs)
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
        places = self.runner.pictures.places_of(given, mask, cache)
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
        return Stops(criteria, call.cache, call.width) if is_heard else criteria

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
        told = getattr(generator, "assistant_kwargs", {})
        if handle is None and _running.call.mask is not None and told.get("attention_mask") is not None:
            told["attention_mask"] = _running.call.mask[:, -_running.call.width :]  # it is given the new ids alone
        most = min(x.plan.slack for x in (self.runner, handle) if x is not None)
        cache, times, alive = _running.call.cache, itertools.count(), weakref.ref(generator)  # no circle
        if most < 1:
            raise ValueError("assisted generation takes candidates back: patch() with slack, their number at a time")

        def get_candidates(input_ids: Tensor, *args, **kwargs):
            generator = alive()
            for name in ("num_assistant_tokens", "num_output_tokens"):  # how many, as transformers calls it
                if hasattr(generator, name):
                    setattr(generator, name, min(getattr(generator, name), most))
            ids, logits = type(generator).get_candidates(generator, input_ids, *args, **kwargs)
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
