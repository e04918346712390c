"""patch(model): endless, exact generation for one transformers model object, in place, and back.

How a step runs: `Handle.forward` replaces the model's forward. It opens a step on the SinkCache, feeds position 0 for
every token (so that the model's own rotation is the identity, see rope.py) and calls the model's own forward. Every
attention layer reaches `_attention` through transformers' attention interface, and that is one op of ops.py.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import threading
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedConfig, PreTrainedModel

from . import ops
from .cache import Plan, SinkCache
from .fuse import Fused, Observer
from .rope import (
    Recorder,
    UnsupportedModelError,
    cache_name,
    counts_in_three,
    input_device,
    probe,
    rewind,
    takes_positions,
    untouched,
)
from .step import Captured, hooks_made, weights_of, why_eager

IMPLEMENTATION = "sinkattn"  # name in transformers' attention registries
ROUTES = {  # how attention is reached: the implementation that the config names meanwhile, None for the model's own
    "interface": IMPLEMENTATION,  # `_attention` below, through transformers' attention interface
    "watch": None,  # whatever the model does with what `Cache.update` returns, see watch.py
}
HARMLESS = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}  # tensors that attention may be given
IMAGES = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
CACHE_NAMES = ("cache", "past_key_values")  # of the cache among arguments and outputs; a caller may use either
CACHE = cache_name(GenerationMixin.prepare_inputs_for_generation)  # transformers' own
# What a step may be given and still be the one that was captured
PLAIN = {"input_ids", "attention_mask", *CACHE_NAMES, "use_cache", "return_dict", "position_ids", "cache_position",
         "logits_to_keep", "mm_token_type_ids"}  # fmt: skip
WATCHED_CHUNK = 512  # of watched attention, which goes on to compute its own (tokens, tokens) scores
CHUNK = 2048  # tokens of a prompt that go through the model at a time


class _Current(threading.local):
    """What the attention layers of the model that runs in this thread talk to: a SinkCache, or the probe's Recorder."""

    def __init__(self):  # once a thread; a class attribute would hide a thread's own from older torch.compile
        self.step: SinkCache | Recorder | None = None

    def __deepcopy__(self, memo) -> "_Current":
        return self

    @contextlib.contextmanager
    def of(self, step):
        outer, self.step = self.step, step
        try:
            yield
        finally:
            self.step = outer


_current = _Current()


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **more):
    """transformers' attention function: q, k, v (batch, heads, tokens, dim), new tokens only, not rotated."""
    if _current.step is None:
        raise RuntimeError(
            "a part of a patched model was called by itself; call the model that sinkattn.patch() was given"
        )
    if dropout:
        raise RuntimeError("attention dropout is on: sinkattn runs inference only, call model.eval()")
    unknown = [name for name, x in more.items() if isinstance(x, Tensor) and name not in HARMLESS]
    if unknown and isinstance(_current.step, Recorder):
        _current.step.reached = True
        raise UnsupportedModelError(f"{_current.step.where(module.layer_idx)}: its attention takes {unknown[0]!r}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx = getattr(module, "layer_idx", None)
    return _current.step.attend(layer_idx, query, key, value, attention_mask, scale, softcap or 0.0, s_aux), None


def _mask(*args, mask_function=None, local_size=None, device=None, **kwargs):
    """transformers' mask function: the ops know what is visible, only the probe asks what the model shows."""
    step = _current.step
    if isinstance(step, SinkCache) and mask_function is not None:
        step.check_mask(mask_function, device)
    return step.mask(mask_function, local_size, device) if isinstance(step, Recorder) else None


class _Replaced:
    """A callable put on one model object in a method's place: it keeps the signature, which `generate` inspects."""

    def __init__(self, call, original):
        self.call, self.__signature__ = call, inspect.signature(original)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


class _NoGradient(torch.autograd.Function):
    """Identity whose backward says why there is none."""

    @staticmethod
    def forward(ctx, output, parameter):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            "sinkattn runs inference only: there are no gradients through a patched model; remove() it first"
        )


class Handle:
    """What `patch` returns: `remove()` brings the model back, and so does leaving ``with patch(model):``.

    Attributes: model, plan (the keywords of `patch` and what was found of each layer), why_eager (why a step of one
    token does not replay a CUDA graph; None if it does).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sink_size: int,
        window_size: int,
        prefill: str,
        backend: str,
        fuse: str,
        cuda_graph: bool,
    ):
        self.model, self.why_eager = model, None if cuda_graph else "cuda_graph=False"
        self._refused = not cuda_graph  # for good, while `why_eager` may change with hooks and devices
        self._weights, self._hooks = (), -1
        self._configs = [
            (module, module.config)
            for module in model.modules()
            if isinstance(vars(module).get("config"), PreTrainedConfig)
        ]
        self._forward, self._generate = model.forward, getattr(model, "generate", None)
        self._prepare_inputs = getattr(model, "prepare_inputs_for_generation", None)
        self._counts_in_three = counts_in_three(model)
        self._takes_positions, self._cache_name = takes_positions(model.forward), cache_name(model.forward)
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._fused: Fused | None = None
        self._replaced: dict[str, object] = {}
        self._had: dict[str, object] = {}
        capacity = sink_size + window_size
        ids = torch.arange(3, 3 + min(capacity, 8), device=input_device(model))[None]
        with untouched(model), torch.no_grad():
            route, layers = self._reach(capacity, window_size)
            observer = (
                self._observe(ids[:, :3], capacity, window_size) if fuse != "none" and route == "interface" else None
            )
            self._restore_configs()
            ids = ids % model.get_input_embeddings().num_embeddings
            rewind(model)
            expected = model(input_ids=ids, use_cache=False)[0]
        self._name_implementation(ROUTES[route])
        config = next(config for module, config in self._configs if module is model)
        self.plan = Plan(sink_size, window_size, prefill, backend, config, True, layers, route)
        self._replace("forward", self.forward)
        if hasattr(model, "generate"):
            self._replace("generate", self.generate)
            self._replace("_prepare_cache_for_generation", self.prepare_cache)
            self._replace("prepare_inputs_for_generation", self.prepare_inputs)
        model._sinkattn = self
        try:
            if observer is not None:
                with torch.no_grad():
                    self._fused = Fused(model, fuse, observer, _current)
                self._fused.apply()
            with untouched(model):
                self._verify(ids, expected)
            self._look_at_model()
        except BaseException:
            self.remove()
            raise

    def _reach(self, capacity: int, window_size: int) -> tuple[str, dict]:
        """The first route that leads to the model's attention, and what was probed over it."""
        for route, implementation in ROUTES.items():
            self._name_implementation(implementation)
            try:
                recorder = Recorder(self.model, capacity, window_size, watches=route == "watch")
            except (AttributeError, KeyError, ValueError) as error:
                name = type(self.model).__name__
                raise UnsupportedModelError(f"{name}: transformers makes no cache for its config: {error!r}") from error
            try:
                with _current.of(recorder):
                    return route, probe(self.model, recorder, capacity, CHUNK)
            except UnsupportedModelError as error:
                refusal = error
                if recorder.reached:  # but not served
                    break
        raise refusal

    def _observe(self, ids: Tensor, capacity: int, window_size: int) -> Observer:
        """What every part of the model does with a few tokens that all stand at position 0."""
        observer = Observer(self.model, capacity, window_size, watches=False)
        more = {"position_ids": torch.zeros_like(ids)} if self._takes_positions else {}
        try:
            with _current.of(observer):
                self.model(input_ids=ids, use_cache=True, **{self._cache_name: observer}, **more)
        finally:
            observer.close()
        return observer

    @torch.no_grad()
    def _verify(self, ids: Tensor, expected: Tensor) -> None:
        """Compare a short text with the unpatched model: whatever the probe cannot know of shows here.

        Differences are root mean squares relative to the spread. Half precision needs room where experts are chosen.
        """
        allowed = 1e-2 if expected.dtype == torch.float32 else 0.3

        def difference(pieces: list[int]) -> float:
            cache = SinkCache(self.model)
            found = [self.model(piece, past_key_values=cache)[0] for piece in ids.split(pieces, dim=1)]
            error = torch.cat(found, dim=1).double() - expected.double()
            return (error.square().mean().sqrt() / expected.double().std().clamp_min(1e-30)).item()

        name, tokens = type(self.model).__name__, ids.shape[1]
        half, has_state = tokens // 2, SinkCache(self.model).has_state
        if not (error := difference([tokens])) < allowed:
            raise UnsupportedModelError(
                f"{name}: a short text gives other outputs than unpatched, by {error:.1e} of their spread: something "
                "else than its attention looks at positions, masks or the cache"
            )
        if tokens < 2:
            return
        continues = (error := difference([half, tokens - half])) < allowed
        if has_state and not continues:
            error = difference([half] + [1] * (tokens - half))
        if not error < allowed:
            raise UnsupportedModelError(
                f"{name}: a short text in pieces gives other outputs than at once, by {error:.1e} of their spread: "
                "something besides attention counts columns, or keeps a state that does not go on where it stopped"
            )
        self.plan = replace(self.plan, continues=continues)

    def _replace(self, name: str, call) -> None:
        if name in vars(self.model):  # accelerate's hooks put their own forward there
            self._had[name] = vars(self.model)[name]
        self._replaced[name] = _Replaced(call, getattr(self.model, name))
        setattr(self.model, name, self._replaced[name])

    def _name_implementation(self, implementation: str | None) -> None:
        """Give the model copies of its configs that name an attention implementation: the originals may be shared."""
        self._restore_configs()
        memo: dict = {}
        copies = {id(config): copy.deepcopy(config, memo) for _, config in self._configs}
        if implementation is not None:
            copies[id(self.model.config)].get_text_config(decoder=True)._attn_implementation = implementation
        for module, config in self._configs:
            module.config = copies[id(config)]

    def _restore_configs(self) -> None:
        for module, config in self._configs:
            module.config = config

    def remove(self) -> None:
        """Bring back exactly the model that was there before; a second call does nothing. Its caches are then useless.

        Raises RuntimeError if something else replaced the model's forward or generate since: undo that first.
        """
        if getattr(self.model, "_sinkattn", None) is not self:
            return
        for name, replaced in self._replaced.items():
            if vars(self.model).get(name) is not replaced:
                raise RuntimeError(
                    f"{name} of the model was replaced after sinkattn.patch(); undo that before remove()"
                )
        for name in self._replaced:
            delattr(self.model, name)
            if name in self._had:
                setattr(self.model, name, self._had[name])
        if self._fused is not None:
            self._fused.undo()
        del self.model._sinkattn
        self._restore_configs()
        self.plan.spare.close()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"<sinkattn on {type(self.model).__name__}: {plan.sink_size} sinks + window {plan.window_size}, "
            f"prefill={plan.prefill!r}, backend={plan.backend!r}, "
            f"steps {'captured' if self.why_eager is None else f'run eagerly: {self.why_eager}'}>"
        )

    # The model's methods while it is patched.

    def forward(self, *args, **kwargs):
        """The model's own forward over a SinkCache: same arguments, same outputs, streaming logits.

        Without ``past_key_values`` the text starts anew; the cache is returned if ``use_cache`` (default: the
        config's). Long inputs go through in chunks. Raises ValueError or TypeError for input that cannot be right,
        before the cache is touched.
        """
        kwargs = _named(self._cache_name, dict(zip(self._parameters, args, strict=False)) | kwargs)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = ids if embeds is None else embeds
        batch, tokens = given.shape[:2]
        if batch == 0 or tokens == 0:
            raise ValueError(
                f"an empty prompt: the input has {batch} rows of {tokens} tokens, each row needs at least one"
            )
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions: the fused attention has no weights to show; remove() the patch for that"
            )
        cache, use_cache = kwargs.get(self._cache_name), kwargs.get("use_cache")
        if cache is None:
            if use_cache is None:
                use_cache = getattr(self.model.config.get_text_config(decoder=True), "use_cache", True)
            cache = SinkCache(self.model)
        elif not isinstance(cache, SinkCache):
            raise TypeError(
                f"{self._cache_name} is a {type(cache).__name__}; a patched model takes a sinkattn.SinkCache or none"
            )
        cache.check(batch, given.device, self.plan)
        keep_cache = self._cache_name in kwargs or use_cache
        mask = self._mask_of(kwargs.get("attention_mask"), batch, tokens, cache)
        if tokens == 1 and self._may_replay(kwargs, cache):
            output = self.replay(cache, ids, mask)
            if output is not None:
                copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, dict(output))
                return self._finished(type(output)(**copied, **{CACHE: cache}), kwargs)
        mask = None if mask is None else mask.bool()
        places = self._places_of(kwargs, mask, cache)
        if tokens > 1:  # one look at the values and the model a prompt, none a token
            self._look_at_model()
            self._check_values(ids, mask, None if self._counts_in_three else kwargs.get("position_ids"), cache)
        return self._run(kwargs, tokens, cache, mask, places, keep_cache)

    def _places_of(self, kwargs: dict, mask: Tensor | None, cache: SinkCache) -> Tensor | None:
        """Three positions of every token, (batch, tokens, 3), where images give them (M-RoPE), else None."""
        module, position_ids = self._counts_in_three, kwargs.get("position_ids")
        if module is None:
            return None
        if (
            isinstance(position_ids, Tensor) and position_ids.dim() == 3
        ):  # `generate` has counted; text comes first of 4
            return position_ids[-3:].movedim(0, -1)
        if all(kwargs.get(name) is None for name in ("image_grid_thw", "video_grid_thw")):
            return None
        if cache.seen:
            raise ValueError("images after the first input: give the whole history to a new SinkCache")
        takes = inspect.signature(module.get_rope_index).parameters
        given = {name: kwargs[name] for name in takes if kwargs.get(name) is not None}
        if mask is not None:
            given["attention_mask"] = mask.long()
        return module.get_rope_index(**given)[0].movedim(0, -1)

    def _mask_of(self, attention_mask, batch: int, tokens: int, cache: SinkCache) -> Tensor | None:
        """The mask's columns of the new tokens, (batch, tokens), or None where nothing is padding."""
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            raise ValueError(
                "attention_mask must be 2D, (batch, tokens): sinkattn decides what is seen, padding is up to you"
            )
        if attention_mask.shape[0] != batch or attention_mask.shape[1] not in (tokens, cache.seen + tokens):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit {batch} rows of {tokens} new tokens after "
                f"{cache.seen}: give ({batch}, {tokens}) or ({batch}, {cache.seen + tokens})"
            )
        return attention_mask[:, -tokens:]

    def _check_values(self, ids, mask, position_ids, cache: SinkCache) -> None:
        """Raise ValueError for right padding, ids without an embedding, and positions that are not the text's."""
        if mask is not None and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ValueError("attention_mask has zeros after ones: pad on the left (tokenizer.padding_side = 'left')")
        if ids is not None:
            size, low, high = self.model.get_input_embeddings().num_embeddings, int(ids.min()), int(ids.max())
            if low < 0 or high >= size:
                raise ValueError(f"input_ids reach from {low} to {high}, the model embeds 0 to {size - 1}")
        if position_ids is not None:
            new = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask
            text = new.cumsum(-1) - 1 + (cache.lengths[:, None] if cache.seen else 0)
            if position_ids.shape[-1] != new.shape[-1] or bool(((position_ids != text) & new).any()):
                raise ValueError(
                    "position_ids do not count each row's tokens from its first one on (packed texts, or padding "
                    "counted): leave position_ids out, sinkattn counts them"
                )

    def _run(self, kwargs: dict, tokens: int, cache: SinkCache, mask, places, keep_cache: bool):
        """Feed the step in chunks and put the outputs together."""
        labels, keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        last = keep if isinstance(keep, int) and keep > 0 else tokens  # tokens at the end whose logits are asked for
        images = any(kwargs.get(name) is not None for name in IMAGES)  # they are not cut
        ends = [tokens] if images else self._ends(tokens, cache, mask)
        whole = len(ends) == 1
        pieces = []
        for begin, end in itertools.pairwise([0, *ends]):
            part = {**kwargs, self._cache_name: cache, "use_cache": True, "return_dict": True}
            for name in ("input_ids", "inputs_embeds", "token_type_ids"):
                if kwargs.get(name) is not None:
                    part[name] = kwargs[name][:, begin:end]
            if mask is not None:
                part["attention_mask"] = mask[:, begin:end]
            wanted = min(max(last - (tokens - end), 0), end - begin)
            if not whole:
                part.pop("labels", None)  # the loss is taken of all chunks together
                if "logits_to_keep" in kwargs:
                    part["logits_to_keep"] = max(wanted, 1)
            place = None if places is None else places[:, begin:end]
            pieces.append(self._step(part, cache, place, torn=begin > 0))
            if wanted == 0:
                pieces[-1]["logits"] = pieces[-1]["logits"][:, :0]
        output = pieces[0] if len(pieces) == 1 else _joined(pieces)
        if not whole:
            if isinstance(keep, Tensor):
                output["logits"] = output["logits"][:, keep]
            if labels is not None:
                vocab_size = self.model.config.get_text_config(decoder=True).vocab_size
                loss = self.model.loss_function(logits=output["logits"], labels=labels, vocab_size=vocab_size)
                output = type(output)(loss=loss, **output)
        if not keep_cache:
            output = _without_cache(output)
        return self._finished(output, kwargs)

    def _finished(self, output, kwargs: dict):
        """The output as the caller wants it, with gradients that say why there are none."""
        if torch.is_grad_enabled():
            parameter = next((p for p in self.model.parameters() if p.requires_grad), None)
            if parameter is not None:
                for name in ("loss", "logits", "last_hidden_state"):
                    if output.get(name) is not None:
                        output[name] = _NoGradient.apply(output[name], parameter)
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    # A step of one token, captured.

    def _may_replay(self, kwargs: dict, cache: SinkCache) -> bool:
        """Whether a one-token step is one that a CUDA graph holds, as far as the host can tell."""
        if self._hooks != hooks_made():
            self._look_at_model()
        if self.why_eager is not None or not cache.seen or not cache.rows.is_warm:
            return False
        if not _is_plain(kwargs):
            return False
        return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()

    def _look_at_model(self) -> None:
        """Find out anew whether steps can be captured, and where the weights are that captured ones read."""
        self._hooks = hooks_made()
        weights = weights_of(self.model)
        if self._fused is not None:
            self._fused.look()
            if weights != self._weights:
                self._fused.join()
                weights = weights_of(self.model)
        self._weights = self._weights if weights == self._weights else weights
        if self._refused:
            return
        self.why_eager = why_eager(self.model)
        if any(layer.rope is not None and layer.rope.varies for layer in self.plan.layers.values()):
            self.why_eager = "its rotary frequencies change with the length of a row: S + W exceeds its trained length"

    @torch.no_grad()
    def replay(self, cache: SinkCache, ids: Tensor, mask: Tensor | None):
        """One token a row as a graph, which is captured if there is none: for whoever knows that `_may_replay`.

        ids, mask: (batch, 1). Returns the model's output, which the next step overwrites, or None if the step could not
        be captured and has not run.
        """
        rows, wanted = cache.rows, (self._weights, cache.has_places)
        if rows.step is None or rows.captured_for != wanted:
            try:
                run = functools.partial(self._one_token, cache)
                rows.step = Captured(run, ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
            except RuntimeError as error:
                self.why_eager, self._refused = f"capturing its step failed: {error}", True
                return None
            finally:
                cache.cancel()
            rows.captured_for, rows.is_masked = wanted, False
        if mask is None and rows.is_masked:
            rows.step.inputs["mask"].fill_(True)
        rows.is_masked = mask is not None
        output = rows.step(ids=ids) if mask is None else rows.step(ids=ids, mask=mask)
        cache.count(1, are_known=True)
        return output

    def next_logits(self, cache: SinkCache, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """`forward` of one token a row and nothing else, for `Stream`: the logits, (batch, 1, vocabulary), which the
        next step overwrites; None if it has to go by `forward`.
        """
        output = self.replay(cache, ids, mask) if cache.plan is self.plan and self._may_replay({}, cache) else None
        return None if output is None else output.logits

    def _one_token(self, cache: SinkCache, ids: Tensor, mask: Tensor):
        """What is captured: a step over the cache, on the device."""
        part = {"input_ids": ids, self._cache_name: cache, "use_cache": True, "return_dict": True}
        part |= {"attention_mask": mask} if cache.has_state else {}
        output = self._forward_of(part, cache, mask, None)
        cache.settle(ids)
        return _without_cache(output)

    def _ends(self, tokens: int, cache: SinkCache, mask: Tensor | None) -> list[int]:
        """Where the pieces of an input end.

        Layers with a state of their own mind the padding of the first piece only: in later ones a row has none, or
        nothing else.
        """
        if tokens == 1:
            return [1]
        size = CHUNK if self.plan.route == "interface" else min(CHUNK, WATCHED_CHUNK)
        size = size if self.plan.prefill == "streaming" else tokens
        if not cache.has_state:
            return [*range(size, tokens, size), tokens]
        if not self.plan.continues:
            first = 1 if cache.seen else tokens
            return [*range(first, tokens, 1), tokens]
        first = 0 if cache.seen else min(size, tokens)
        ends = {*range(first or size, tokens, size), tokens}
        if mask is not None:
            widths = (~mask).sum(1).tolist()
            ends |= {width for width in widths if first < width < tokens}
        return sorted(ends)

    def _step(self, part: dict, cache: SinkCache, places: Tensor | None, torn: bool):
        """One chunk through the model's own forward."""
        ids = part.get("input_ids")
        try:
            output = self._forward_of(part, cache, part.get("attention_mask"), places)
        except BaseException:
            cache.abort(torn)
            raise
        cache.advance(ids)
        return output

    def _forward_of(self, part: dict, cache: SinkCache, mask: Tensor | None, places: Tensor | None):
        """Open a step and run the model's own forward, every position 0, with its attention led to the cache."""
        given = part["input_ids"] if part.get("input_ids") is not None else part["inputs_embeds"]
        batch, tokens = given.shape[:2]
        if self._takes_positions:
            part["position_ids"] = torch.zeros(batch, tokens, dtype=torch.int64, device=given.device)
        cache.begin(tokens, mask, batch, given.device, places)
        # states of layers that transformers keeps must be writable in and out of inference mode
        with _current.of(cache), torch.inference_mode(False), torch.no_grad():
            return self._forward(**part)

    def generate(self, inputs=None, *args, **kwargs):
        """The model's own `generate` with a SinkCache: its own, or yours with the full history or new ids alone."""
        if kwargs.get("cache_implementation") is not None:
            raise ValueError("cache_implementation: a patched model brings its own cache; leave it out")
        kwargs = _named(CACHE, kwargs)
        cache, ids = kwargs.get(CACHE), inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.shape[-1] == 0 and kwargs.get("inputs_embeds") is None:
            raise ValueError("an empty prompt: give at least one token")
        if isinstance(cache, SinkCache) and cache.seen and isinstance(ids, Tensor):  # forward refuses other caches
            mask = kwargs.get("attention_mask")
            if not cache.holds(ids) and (mask is None or mask.shape[1] == ids.shape[1]):
                # transformers takes ids as long as their mask for the full history: say how much came before
                cache.check(ids.shape[0], ids.device, self.plan)
                columns = torch.arange(cache.seen, device=ids.device)[None]
                before = columns >= (cache.seen - cache.lengths[:, None]).to(ids.device)
                new = self._padding_of(ids, args, kwargs) if mask is None else mask
                kwargs["attention_mask"] = torch.cat((before.to(new.dtype), new), dim=1)
        return self._generate(inputs, *args, **kwargs)

    def prepare_inputs(self, input_ids: Tensor, *args, **kwargs) -> dict:
        """`GenerationMixin.prepare_inputs_for_generation`: one more token of a text needs no positions."""
        kwargs = _named(CACHE, kwargs)
        cache = kwargs.get(CACHE)
        is_next = kwargs.get("next_sequence_length") == 1 and isinstance(cache, SinkCache) and cache.seen
        if not is_next or not _is_plain(kwargs, "next_sequence_length"):
            return self._prepare_inputs(input_ids, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        return {"input_ids": input_ids[:, -1:], "attention_mask": mask, CACHE: cache, "use_cache": True}

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


def _is_plain(kwargs: dict, *more: str) -> bool:
    """Whether nothing is asked of a step but the next logits; more: other names that may be given."""
    given = (name for name, value in kwargs.items() if value is not None and value is not False)
    return all(name in PLAIN or name in more for name in given)


def _named(name: str, kwargs: dict) -> dict:
    """The arguments with the cache, whichever of its names it came under, called `name`; without one if it is None."""
    cache = next((kwargs[x] for x in CACHE_NAMES if kwargs.get(x) is not None), None)
    others = {x: value for x, value in kwargs.items() if x not in CACHE_NAMES}
    return others if cache is None else {**others, name: cache}


def _without_cache(output):
    return type(output)(**{name: x for name, x in output.items() if name not in CACHE_NAMES})


def _joined(pieces: list):
    """One model output from the outputs of consecutive chunks: token dims are concatenated."""
    output = {}
    for name, last in pieces[-1].items():
        parts = [piece[name] for piece in pieces]
        if name in ("logits", "last_hidden_state"):
            output[name] = torch.cat(parts, dim=1)
        elif name == "hidden_states":
            output[name] = tuple(torch.cat(layers, dim=1) for layers in zip(*parts, strict=True))
        else:
            output[name] = last
    return type(pieces[-1])(**output)


def patch(
    model: PreTrainedModel,
    sink_size: int = 4,
    window_size: int = 1020,
    *,
    prefill: str = "streaming",
    backend: str = "auto",
    fuse: str = "layers",
    cuda_graph: bool = True,
) -> Handle:
    """Make one transformers decoder endless, in place: attention sinks and a window, positions counted in the cache.

    The query at position t then sees position j if ``j < S`` or ``t - W < j <= t``, at the distance ``t - j`` in the
    window and ``min(t, S + W - 1) - j`` for a sink, S = sink_size and W = window_size: memory and time per token are
    constant.

    model: any `PreTrainedModel` decoder whose positions are rotary or ALiBi, on any device or devices and in any dtype;
        wrapped by PEFT or `torch.compile`, what they wrap. Its weights, buffers and config are not changed; other
        models are not touched.
    sink_size: tokens at the start of every row that stay for ever; 0 is plain window attention.
    window_size: tokens, the current one included. A layer whose own sliding window is smaller keeps that.
    prefill: "streaming" (a text gives the same logits however it is cut), or "dense": an input of several tokens is
        attended densely and only then cut down to sinks and window (quadratic time; what attention_sinks does).
    backend: "auto", "cuda", "triton", "cpu" or "reference", see `sinkattn.ops`.
    fuse: "layers" computes modules of the usual form by fewer kernels, see fuse.py: attention, decoder layers and, for
        few rows, linear layers; "attention" only the first; "none" leaves every module its own forward.
        Outputs differ by rounding alone. Weights are laid side by side, and held once.
    cuda_graph: on a GPU, replay steps of one token as a CUDA graph: captured at the second such step, and kept, with
        the memory of the last cache, for the next one of as many rows. What cannot be captured runs as it is, and
        ``handle.why_eager`` tells why. Hooks, adapters and exchanged weights are noticed at the next prompt at the
        latest; other changes to the model in the middle of a text are not.

    Returns a `Handle`: ``handle.remove()``, or ``with patch(model):``.

    Raises UnsupportedModelError (a ValueError) if the model cannot be served exactly, naming layer and reason;
    ValueError for sizes or names that make no sense and for a model that is patched already; TypeError for something
    that is no PreTrainedModel; RuntimeError for a backend that is not available. The model is then unchanged.

    Source: arXiv 2309.17453, section 3.2.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if hasattr(model, "get_base_model"):  # of PEFT
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"patch() takes a transformers PreTrainedModel, not a {type(model).__name__}")
    if getattr(model, "_sinkattn", None) is not None:
        raise ValueError(f"this {type(model).__name__} is patched already; call remove() on the handle first")
    for name, size, least in (("sink_size", sink_size, 0), ("window_size", window_size, 1)):
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name}={size!r}: it needs a whole number of tokens, at least {least}")
    if prefill not in ("streaming", "dense"):
        raise ValueError(f"prefill={prefill!r}: choose 'streaming' or 'dense'")
    if fuse not in ("layers", "attention", "none"):
        raise ValueError(f"fuse={fuse!r}: choose 'layers', 'attention' or 'none'")
    if reason := ops.missing_backend(backend, input_device(model).type):
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; sinkattn serves decoders")
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    return Handle(model, sink_size, window_size, prefill, backend, fuse, cuda_graph)
