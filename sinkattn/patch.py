"""patch(model): endless, exact generation for one transformers model object, in place, and back."""

import copy
import inspect
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import interface, ops
from .cache import SinkCache
from .fuse import Fused, Observer
from .generation import Generation
from .interface import IMPLEMENTATION, current
from .introspect import cache_name, input_device, rewind, takes_positions, untouched
from .probe import Recorder, probe
from .rope import UnsupportedModelError
from .rows import Plan
from .runner import CHUNK, Runner

ROUTES = {  # how attention is reached: the implementation that the config names meanwhile, None for the model's own
    "interface": IMPLEMENTATION,  # interface.py, through transformers' attention interface
    "watch": None,  # whatever the model does with what `Cache.update` returns, see watch.py
}


class _Replaced:
    """A callable put on one model object in a method's place: it keeps the signature, which `generate` inspects."""

    def __init__(self, call, original):
        self.call, self.original, self.__signature__ = call, original, inspect.signature(original)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


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
        self.model = model
        self._configs = [
            (module, module.config)
            for module in model.modules()
            if isinstance(vars(module).get("config"), PreTrainedConfig)
        ]
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
        plan = Plan(sink_size, window_size, prefill, backend, config, True, layers, route)
        self.runner = Runner(model, plan, cuda_graph)
        self._install()
        try:
            if observer is not None:
                with torch.no_grad():
                    self.runner.fused = Fused(model, fuse, observer, current)
                self.runner.fused.apply()
            with untouched(model):
                self._verify(ids, expected)
            self.runner.look()
        except BaseException:
            self.remove()
            raise

    @property
    def plan(self) -> Plan:
        return self.runner.plan

    @property
    def why_eager(self) -> str | None:
        return self.runner.why_eager

    def _install(self) -> None:
        """Put the runner's forward, and what `generate` needs, in the place of the model's own methods."""
        self._replace("forward", self.runner.forward)
        if hasattr(self.model, "generate"):
            for name, call in Generation(self.model, self.runner).methods.items():
                self._replace(name, call)
        self.model._sinkattn = self

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
                with current.of(recorder):
                    return route, probe(self.model, recorder, capacity, CHUNK)
            except UnsupportedModelError as error:
                refusal = error
                if recorder.reached:  # but not served
                    break
        raise refusal

    def _observe(self, ids: Tensor, capacity: int, window_size: int) -> Observer:
        """What every part of the model does with a few tokens that all stand at position 0."""
        observer = Observer(self.model, capacity, window_size, watches=False)
        more = {"position_ids": torch.zeros_like(ids)} if takes_positions(self.model.forward) else {}
        try:
            with current.of(observer):
                self.model(input_ids=ids, use_cache=True, **{cache_name(self.model.forward): observer}, **more)
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
        self.runner.plan = replace(self.plan, continues=continues)

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
            now = vars(self.model).get(name, replaced.original)
            if now is not replaced and now != replaced.original:  # PEFT puts back what it has found
                raise RuntimeError(
                    f"{name} of the model was replaced after sinkattn.patch(); undo that before remove()"
                )
        for name in self._replaced:
            vars(self.model).pop(name, None)
            if name in self._had:
                setattr(self.model, name, self._had[name])
        if self.runner.fused is not None:
            self.runner.fused.undo()
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
    interface.register()
    return Handle(model, sink_size, window_size, prefill, backend, fuse, cuda_graph)
