"""What transformers' `generate` asks of a patched model: its cache, its inputs, and turns over one cache."""

import torch
from torch import Tensor
from transformers import GenerationMixin

from .cache import SinkCache
from .introspect import CACHE, named
from .runner import Runner, is_plain


class Generation:
    """`generate` and what it calls, in place of the methods of one model. runner: that of the model."""

    def __init__(self, model, runner: Runner):
        self.model, self.runner = model, runner
        self._generate, self._prepare_inputs = model.generate, model.prepare_inputs_for_generation

    def generate(self, inputs=None, *args, **kwargs):
        """The model's own `generate` with a SinkCache: its own, or yours with the full history or new ids alone."""
        if kwargs.get("cache_implementation") is not None:
            raise ValueError("cache_implementation: a patched model brings its own cache; leave it out")
        kwargs = named(CACHE, kwargs)
        cache, ids = kwargs.get(CACHE), inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.shape[-1] == 0 and kwargs.get("inputs_embeds") is None:
            raise ValueError("an empty prompt: give at least one token")
        if isinstance(cache, SinkCache) and cache.seen and isinstance(ids, Tensor):  # forward refuses other caches
            mask = kwargs.get("attention_mask")
            if not cache.holds(ids) and (mask is None or mask.shape[1] == ids.shape[1]):
                # transformers takes ids as long as their mask for the full history: say how much came before
                cache.check(ids.shape[0], ids.device, self.runner.plan)
                columns = torch.arange(cache.seen, device=ids.device)[None]
                before = columns >= (cache.seen - cache.lengths[:, None]).to(ids.device)
                new = self._padding_of(ids, args, kwargs) if mask is None else mask
                kwargs["attention_mask"] = torch.cat((before.to(new.dtype), new), dim=1)
        return self._generate(inputs, *args, **kwargs)

    def prepare_inputs(self, input_ids: Tensor, *args, **kwargs) -> dict:
        """`GenerationMixin.prepare_inputs_for_generation`: one more token of a text needs no positions."""
        kwargs, pictures = named(CACHE, kwargs), self.runner.pictures
        cache = kwargs.get(CACHE)
        is_next = kwargs.get("next_sequence_length") == 1 and isinstance(cache, SinkCache) and cache.seen
        if pictures is not None and is_next and not kwargs.get("is_first_iteration"):
            kwargs = {name: x for name, x in kwargs.items() if name not in pictures.names}
        if not is_next or not is_plain(kwargs, "next_sequence_length"):
            return self._prepare_inputs(input_ids, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        return {"input_ids": input_ids[:, -1:], "attention_mask": mask, CACHE: cache, "use_cache": True}

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

    def _padding_of(self, ids: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The mask `generate` would infer: pad ids are padding, unless they also end a text."""
        config = kwargs.get("generation_config") or (args[0] if args else None) or self.model.generation_config
        pad, end = (kwargs.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, list) else [end]
        return torch.ones_like(ids) if pad is None or pad in ends else ids.ne(pad).long()

    def prepare_cache(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """`GenerationMixin._prepare_cache_for_generation`: whatever the config names, the cache is a SinkCache."""
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = SinkCache(self.model)
