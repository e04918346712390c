"""The forward of a patched model: checks what it is given, feeds the model's own forward, joins what comes out.

A step opens on the SinkCache, every position that the model is given is 0 (so that its own rotation is the identity,
see rope.py), and the attention layers reach the step through interface.py or watch.py. A step of one token is captured
as a CUDA graph where that is possible, and replayed.
"""

import functools
import inspect
import itertools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .cache import SinkCache
from .graph import Captured, hooks_made, is_shortage, weights_of, why_eager
from .interface import current
from .introspect import CACHE, CACHE_NAMES, cache_name, counts_in_three, named, takes_positions
from .outputs import finished, joined, without_cache
from .rows import Plan

IMAGES = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
# What a step may be given and still be the one that was captured
PLAIN = {"input_ids", "attention_mask", *CACHE_NAMES, "use_cache", "return_dict", "position_ids", "cache_position",
         "logits_to_keep", "mm_token_type_ids"}  # fmt: skip
WATCHED_CHUNK = 512  # of watched attention, which goes on to compute its own (tokens, tokens) scores
CHUNK = 2048  # tokens of a prompt that go through the model at a time


class Runner:
    """Runs one model over SinkCaches.

    model: with its own forward still in place. plan: how it attends. cuda_graph: whether steps may be captured.

    Attributes: plan, fused (`Fused`, or None), why_eager (why a step of one token does not replay a CUDA graph; None if
    it does), cache_name (what the model's forward calls the cache).
    """

    def __init__(self, model, plan: Plan, cuda_graph: bool):
        self.model, self.plan, self.fused = model, plan, None
        self.why_eager = None if cuda_graph else "cuda_graph=False"
        self._refused = not cuda_graph  # for good, while `why_eager` may change with hooks and devices
        self._weights, self._hooks = (), -1
        self._forward = model.forward
        self._counts_in_three = counts_in_three(model)
        self._takes_positions, self.cache_name = takes_positions(model.forward), cache_name(model.forward)
        self._parameters = tuple(inspect.signature(model.forward).parameters)

    def forward(self, *args, **kwargs):
        """The model's own forward over a SinkCache: same arguments, same outputs, streaming logits.

        Without ``past_key_values`` the text starts anew; the cache is returned if ``use_cache`` (default: the
        config's). Long inputs go through in chunks. Raises ValueError or TypeError for input that cannot be right,
        before the cache is touched.
        """
        kwargs = named(self.cache_name, dict(zip(self._parameters, args, strict=False)) | kwargs)
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
        cache, use_cache = kwargs.get(self.cache_name), kwargs.get("use_cache")
        if cache is None:
            if use_cache is None:
                use_cache = getattr(self.model.config.get_text_config(decoder=True), "use_cache", True)
            cache = SinkCache(self.model)
        elif not isinstance(cache, SinkCache):
            raise TypeError(
                f"{self.cache_name} is a {type(cache).__name__}; a patched model takes a sinkattn.SinkCache or none"
            )
        cache.check(batch, given.device, self.plan)
        keep_cache = self.cache_name in kwargs or use_cache
        mask = self._mask_of(kwargs.get("attention_mask"), batch, tokens, cache)
        if cache.ended is not None and tokens == 1:
            mask = ~cache.ended[:, None]
        if tokens == 1 and self.may_replay(kwargs, cache):
            output = self.replay(cache, ids, mask)
            if output is not None:
                copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, dict(output))
                return finished(type(output)(**copied, **{CACHE: cache}), self.model, kwargs.get("return_dict"))
        mask = None if mask is None else mask.bool()
        places = self._places_of(kwargs, mask, cache)
        if tokens > 1:  # one look at the values and the model a prompt, none a token
            self.look()
            self._check_values(ids, mask, None if self._counts_in_three else kwargs.get("position_ids"), cache)
        with cache.whole():
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
            part = {**kwargs, self.cache_name: cache, "use_cache": True, "return_dict": True}
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
            pieces.append(self._step(part, cache, part.get("attention_mask"), place))
            if wanted == 0:
                pieces[-1]["logits"] = pieces[-1]["logits"][:, :0]
        output = pieces[0] if len(pieces) == 1 else joined(pieces)
        if not whole:
            if isinstance(keep, Tensor):
                output["logits"] = output["logits"][:, keep]
            if labels is not None:
                vocab_size = self.model.config.get_text_config(decoder=True).vocab_size
                loss = self.model.loss_function(logits=output["logits"], labels=labels, vocab_size=vocab_size)
                output = type(output)(loss=loss, **output)
        if not keep_cache:
            output = without_cache(output)
        return finished(output, self.model, kwargs.get("return_dict"))

    # A step of one token, captured.

    def may_replay(self, kwargs: dict, cache: SinkCache) -> bool:
        """Whether a one-token step is one that a CUDA graph holds, as far as the host can tell."""
        if self._hooks != hooks_made():
            self.look()
        if self.why_eager is not None or not cache.seen or not cache.rows.is_warm:
            return False
        if not is_plain(kwargs):
            return False
        return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()

    def look(self) -> None:
        """Find out anew whether steps can be captured, and where the weights are that captured ones read."""
        self._hooks = hooks_made()
        weights = weights_of(self.model)
        if self.fused is not None:
            self.fused.look()
            if weights != self._weights:
                self.fused.join()
                weights = weights_of(self.model)
        self._weights = self._weights if weights == self._weights else weights
        if self._refused:
            return
        self.why_eager = why_eager(self.model)
        if any(layer.rope is not None and layer.rope.varies for layer in self.plan.layers.values()):
            self.why_eager = "its rotary frequencies change with the length of a row: S + W exceeds its trained length"

    @torch.no_grad()
    def replay(self, cache: SinkCache, ids: Tensor, mask: Tensor | None):
        """One token a row as a graph, which is captured if there is none: for whoever knows that `may_replay`.

        ids, mask: (batch, 1). Returns the model's output, which the next step overwrites, or None if the step could not
        be captured and has not run.
        """
        rows, wanted = cache.rows, (self._weights, cache.has_places)
        if rows.captured is None or rows.captured_for != wanted:
            try:
                run = functools.partial(self._one_token, cache)
                rows.captured = Captured(run, ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
            except RuntimeError as error:
                self.why_eager, self._refused = f"capturing its step failed: {error}", not is_shortage(error)
                return None
            finally:
                cache.cancel()
            rows.captured_for, rows.is_masked = wanted, False
        if mask is None and rows.is_masked:
            rows.captured.inputs["mask"].fill_(True)
        rows.is_masked = mask is not None
        cache.tear()
        output = rows.captured(ids=ids) if mask is None else rows.captured(ids=ids, mask=mask)
        cache.count(1, are_known=True)
        return output

    def next_logits(self, cache: SinkCache, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """`forward` of one token a row and nothing else, for `Stream`: the logits, (batch, 1, vocabulary), which the
        next step overwrites; None if it has to go by `forward`.
        """
        output = self.replay(cache, ids, mask) if cache.plan is self.plan and self.may_replay({}, cache) else None
        return None if output is None else output.logits

    def _one_token(self, cache: SinkCache, ids: Tensor, mask: Tensor):
        """What is captured: a step over the cache, on the device."""
        part = {"input_ids": ids, self.cache_name: cache, "use_cache": True, "return_dict": True}
        part |= {"attention_mask": mask} if cache.has_state else {}
        return without_cache(self._step(part, cache, mask, None, is_captured=True))

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

    def _step(self, part: dict, cache: SinkCache, mask: Tensor | None, places: Tensor | None, is_captured=False):
        """One chunk through the model's own forward, every position 0, its attention led to a step of the cache."""
        ids = part.get("input_ids")
        given = ids if ids is not None else part["inputs_embeds"]
        batch, tokens = given.shape[:2]
        if self._takes_positions:
            part["position_ids"] = torch.zeros(batch, tokens, dtype=torch.int64, device=given.device)
        with cache.open(tokens, mask, batch, given.device, places) as step:
            # states of layers that transformers keeps must be writable in and out of inference mode
            with current.of(step), torch.inference_mode(False), torch.no_grad():
                output = self._forward(**part)
            cache.commit(ids, is_captured)
        return output


def is_plain(kwargs: dict, *more: str) -> bool:
    """Whether nothing is asked of a step but the next logits; more: other names that may be given."""
    given = (name for name, value in kwargs.items() if value is not None and value is not False)
    return all(name in PLAIN or name in more for name in given)
