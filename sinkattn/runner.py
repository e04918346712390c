"""The forward of a patched model: checks what it is given, feeds the model's own forward, joins what comes out.

A step opens on the SinkCache, every position that the model is given is 0 (so that its own rotation is the identity,
see rope.py), and the attention layers reach the step through interface.py or watch.py. Small steps are replayed as CUDA
graphs where that is possible (captured.py).
"""

import contextlib
import functools
import inspect
import itertools
import threading

import torch
from torch import Tensor

from .cache import SinkCache
from .captured import CapturedSteps
from .changes import Lookout
from .fuse import Fused
from .inputs import check_ids, check_values, mask_of
from .interface import current
from .introspect import bodies_of, cache_name, counts_in_three, embedded_ids, named, picks_by_length, takes_positions
from .outputs import copied, cut, finished, joined, without_cache
from .pictures import Pictures
from .rings import Plan
from .rows import Rows

WATCHED_CHUNK = 512  # of watched attention, which goes on to compute its own (tokens, tokens) scores
CHUNK = 2048  # tokens of a prompt that go through the model at a time
_ONE_AT_A_TIME = threading.RLock()  # long inputs, whatever thread they come from


class Runner:
    """Runs one model over SinkCaches.

    model: with its own forward still in place. plan: how it attends. cuda_graph: whether steps may be captured.

    Attributes: plan, fused (`Fused`, or None), pictures (`Pictures`, or None), captured (`CapturedSteps`), lookout
    (`Lookout`), cache_name (what the model's forward calls the cache).
    """

    def __init__(self, model, plan: Plan, cuda_graph: bool):
        self.model, self.plan = model, plan
        self.fused: Fused | None = None
        self._forward = model.forward
        self.captured, self.lookout = CapturedSteps(model, cuda_graph), Lookout(model)
        counting = counts_in_three(model)
        self.pictures = None if counting is None else Pictures(counting)
        self._takes_positions, self.cache_name = takes_positions(model.forward), cache_name(model.forward)
        self._parameters = tuple(inspect.signature(model.forward).parameters)

    def look(self) -> None:
        """Follow what has changed in the model. Raises RuntimeError for changes that cannot be followed."""
        self.lookout.look(self.fused)
        self.captured.ask(self.plan, tells=bool(self.lookout.attending))

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
        given, dims = (ids, 2) if embeds is None else (embeds, 3)
        if given.dim() != dims:
            name, wanted = ("input_ids", "") if embeds is None else ("inputs_embeds", ", hidden size")
            raise ValueError(f"{name} of {tuple(given.shape)}: give (batch, tokens{wanted})")
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
        mask = mask_of(kwargs.get("attention_mask"), batch, tokens, cache)
        if cache.ended is not None and tokens == 1:
            mask = ~cache.ended[:, None].to(given.device)
        if ids is not None and (tokens == 1 or cache.are_checked):
            output = self._replayed(kwargs, cache, ids, mask)
            if output is not None:
                kept = output.logits if tokens == 1 else output.logits[:, -(kwargs.get("logits_to_keep") or tokens) :]
                return finished(copied(output, cache, logits=kept), self.model, kwargs.get("return_dict"))
        mask = None if mask is None else mask.bool()
        is_at_hand = given.device.type == "cpu" and not torch.compiler.is_compiling()
        if ids is not None and (tokens > 1 or is_at_hand):
            check_ids(ids, embedded_ids(self.model))
        places = None if self.pictures is None else self.pictures.places_of(kwargs, mask, cache)
        is_new = tokens > 1 or not cache.seen or self.lookout.has_news
        if is_new and self.lookout.seen is not None and not torch.compiler.is_compiling():
            self.look()  # once a prompt, not once a token
        if tokens > 1:
            check_values(tokens, mask, kwargs.get("position_ids"), places, cache)
            self._check_dense(tokens, cache)
        with cache.whole():
            return self._run(kwargs, tokens, cache, mask, places, keep_cache)

    def _check_dense(self, tokens: int, cache: SinkCache) -> None:
        """Raise ValueError for an input that would be attended densely by frequencies of fewer tokens."""
        together, most = min(cache.seen, self.plan.window_size) + tokens, self.plan.capacity
        if self.plan.prefill == "dense" and together > most and any(map(picks_by_length, self.model.modules())):
            raise ValueError(
                f"prefill='dense': the frequencies of {type(self.model).__name__} depend on how many tokens there are, "
                f"and are known for {most}: give fewer than these {tokens} at once, or patch() with 'streaming'"
            )

    def _run(self, kwargs: dict, tokens: int, cache: SinkCache, mask, places, keep_cache: bool):
        """Feed an input, a long one in chunks, and finish what comes out."""
        given = {**kwargs, self.cache_name: cache, "use_cache": True, "return_dict": True}
        if mask is not None:
            given["attention_mask"] = mask
        ends = self._ends(tokens, cache, mask)
        if len(ends) == 1:
            output = self._step(given, cache, mask, places)
        else:
            output = self._run_long(given, cache, mask, places, ends)
        return finished(output if keep_cache else without_cache(output), self.model, kwargs.get("return_dict"))

    def _run_long(self, given: dict, cache: SinkCache, mask, places, ends: list[int]):
        """The model's own forward over all tokens, in which the part that holds its layers gets them in chunks.

        So every head, loss and choice of logits is computed by the model's own code, of what all tokens give.
        """
        ids, thread, seen = given.get("input_ids"), threading.get_ident(), cache.seen

        def read(forward, names, *args, **more):
            if cache.step is not None or threading.get_ident() != thread:
                return forward(*args, **more)
            if cache.seen > seen:
                raise ValueError(
                    f"{type(self.model).__name__} reads its input twice: give at most {ends[0]} tokens at once"
                )
            more |= dict(zip(names, args, strict=False))
            return self._chunks(forward, more, ids, cache, mask, places, ends)

        bodies = bodies_of(self.model)
        with torch.inference_mode(False), torch.no_grad():
            if not bodies:
                output, keep = read(self._forward, self._parameters, **given), given.get("logits_to_keep")
                if keep is not None and "logits_to_keep" in self._parameters:
                    if "logits" not in output:
                        raise ValueError(f"logits_to_keep without logits: give at most {ends[0]} tokens at once")
                    output["logits"] = output["logits"][:, slice(-keep, None) if isinstance(keep, int) else keep]
            else:
                with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
                    for body in bodies:
                        _, *names = inspect.signature(type(body).forward).parameters
                        stack.enter_context(_standing_in(body, functools.partial(read, body.forward, names)))
                    output = self._forward(**self._at_zero(given))
        return output

    def _chunks(self, forward, given: dict, ids, cache: SinkCache, mask, places, ends: list[int]):
        """What a forward gives for all tokens, fed in chunks, each of which is a step. ids: (batch, tokens) or None."""
        ours = ("attention_mask", "position_ids", "logits_to_keep")
        given = {name: x for name, x in given.items() if name not in ours}
        batch, tokens = (given["inputs_embeds"] if ids is None else ids).shape[:2]
        widths = [end - begin for begin, end in itertools.pairwise([0, *ends])]
        chunks = cut(given, batch, widths)
        if chunks is None and cache.seen and not self.plan.continues:
            raise ValueError(
                "pictures behind other text, in a model whose states go on token by token: begin with them"
            )
        if chunks is None:
            chunks, widths = [given], [tokens]

        def split(x):
            return [None] * len(widths) if x is None else x.split(widths, dim=1)

        pieces = []
        for chunk, chunk_ids, chunk_mask, chunk_places in zip(chunks, *map(split, (ids, mask, places)), strict=True):
            if chunk_mask is not None:
                chunk["attention_mask"] = chunk_mask
            pieces.append(self._step(chunk, cache, chunk_mask, chunk_places, forward=forward, ids=chunk_ids))
        return joined(pieces, batch, widths)

    def _replayed(self, kwargs: dict, cache: SinkCache, ids: Tensor, mask: Tensor | None):
        """What a captured step of a token a row or a few gives, until the next one; None where the step has to run."""
        if self.lookout.has_news and not torch.compiler.is_compiling():
            self.look()
        if not self.captured.serve(kwargs, cache, ids.shape[1]):
            return None
        run = functools.partial(self._few_tokens, cache)
        return self.captured.replay(cache, ids, mask, self.lookout.version, run, self._prepare)

    def _prepare(self, rows: Rows) -> None:
        """What the step of one token over these rows needs before it is captured."""
        if self.fused is not None and self.fused.stack is not None:
            self.fused.stack.prepare(rows, self.model)

    @torch.no_grad()
    def logits(self, cache: SinkCache, ids: Tensor, mask: Tensor | None, keep: int = 1, are_checked: bool = False):
        """`forward` and nothing else: the logits of the last `keep` tokens, (batch, keep, vocabulary), which the next
        step may overwrite. are_checked: whether the ids are known to be right: it may be a replay then.
        """
        output = self.replayed(cache, ids, mask) if are_checked else None
        if output is None:
            kept = {"logits_to_keep": keep} if "logits_to_keep" in self._parameters else {}
            output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, **kept).logits
        return output[:, -keep:].to(ids.device)  # of a model that is split by hand

    @torch.no_grad()
    def replayed(self, cache: SinkCache, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """The logits of a captured step, (batch, tokens, vocabulary), until the next one; None where the step has to
        run, which nothing of has then. ids: known to be right.
        """
        is_wrapped = getattr(self.model.forward, "call", None) != self.forward  # by somebody else, since the patch
        if cache.plan is not self.plan or is_wrapped:
            return None
        output = self._replayed({}, cache, ids, mask)
        return None if output is None else output.logits

    def _few_tokens(self, cache: SinkCache, ids: Tensor, mask: Tensor):
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

    def _at_zero(self, part: dict, forward=None) -> dict:
        """Arguments of a forward, the model's own by default, that put every token at position 0."""
        if not (self._takes_positions if forward is None else takes_positions(forward)):
            return part
        given = part["inputs_embeds"] if part.get("input_ids") is None else part["input_ids"]
        return {**part, "position_ids": torch.zeros(given.shape[:2], dtype=torch.int64, device=given.device)}

    def _step(
        self, part: dict, cache: SinkCache, mask: Tensor | None, places: Tensor | None, is_captured=False, forward=None,
        ids: Tensor | None = None,
    ):  # fmt: skip
        """One chunk through the model's own forward, every position 0, its attention led to a step of the cache.

        forward: of a part of the model, in place of its own. ids: of the chunk, where that part is not given them.
        """
        ids = part.get("input_ids") if ids is None else ids
        given = ids if ids is not None else part["inputs_embeds"]
        batch, tokens = given.shape[:2]
        part = self._at_zero(part, forward)
        with cache.open(tokens, mask, batch, given.device, places) as step:
            step.is_captured = is_captured
            # states of layers that transformers keeps must be writable in and out of inference mode
            with current.of(step), torch.inference_mode(False), torch.no_grad():
                output = (forward or self._forward)(**part)
            cache.commit(ids, is_captured)
        return output


@contextlib.contextmanager
def _standing_in(module: torch.nn.Module, forward):
    """A forward in the place of a module's own, for a while."""
    had = vars(module).get("forward")
    try:
        module.forward = forward
        yield
    finally:
        if had is None:
            vars(module).pop("forward", None)
        else:
            module.forward = had
