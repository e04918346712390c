"""patch(model): endless, exact generation for one transformers model object, in place, and back."""

import contextlib
import copy
import inspect
import itertools
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from numbers import Integral
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import changes, interface, ops, verify
from .backends import has_float8, is_new
from .fuse import Fused
from .generation import Generation
from .interface import IMPLEMENTATION, current
from .introspect import input_device, untouched
from .models import trained_length
from .observe import Observer
from .probe import probe
from .recorder import Recorder
from .rings import CACHE_DTYPES, Plan, SinkLayer
from .rope import ProbedLayer, UnsupportedModelError
from .rows import SpareRows
from .runner import CHUNK, Runner
from .verify import Verification

ROUTES = {  # how attention is reached: the implementation that the config names meanwhile, None for the model's own
    "interface": IMPLEMENTATION,  # interface.py, through transformers' attention interface
    "watch": None,  # whatever the model does with what `Cache.update` returns, see watch.py
}
logger = logging.getLogger(__name__)
OWN = (None, "eager")  # implementations of attention that tell what the model itself computes


class _Replaced:
    """A callable put on one model object in a method's place: it keeps the signature, which `generate` inspects."""

    def __init__(self, call: Callable, original: Callable):
        self.call, self.original = call, original

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class Handle:
    """What `patch` returns: `remove()` brings the model back, and so does leaving ``with patch(model):``.

    Attributes: model, plan (the keywords of `patch` and what was found of each layer), why_eager (why a step of one
    token does not replay a CUDA graph; None if it does).
    """

    def __init__(self, model: PreTrainedModel, fuse: str, cuda_graph: bool, **asked: Any):
        """asked: the keywords of `patch` that are fields of a `Plan`."""
        self.model = model
        self._configs: list[tuple[Any, PreTrainedConfig]] = [
            (module, cast(PreTrainedConfig, module.config))
            for module in model.modules()
            if isinstance(vars(module).get("config"), PreTrainedConfig)
        ]
        self._named: list[tuple[PreTrainedConfig, PreTrainedConfig, PreTrainedConfig]] = []
        self._replaced: dict[str, object] = {}
        self._had: dict[str, object] = {}
        self._watching, self.runner = changes.watch(), cast(Runner, None)  # `_find_out` makes it
        try:
            with verify.plainly(model):
                self._find_out(fuse, cuda_graph, asked)
        except BaseException:
            self._restore()
            raise
        self._install()
        self.runner.plan.spare.users.add(self)
        self.runner.look()
        self.runner.lookout.begin(self._attending)  # what the next look finds is told
        self._tell()

    def _find_out(self, fuse: str, cuda_graph: bool, asked: dict[str, Any]) -> None:
        """Probe the model, choose how it is run, and see that this gives what the model itself gives."""
        model: Any = self.model
        with untouched(model):
            check = Verification(model, asked["sink_size"], asked["window_size"])
            context, route, layers = self._reach(asked["sink_size"] + asked["window_size"])
            probed = dict(config=model.config, continues=True, layers=layers, route=route)
            plan = Plan(**asked, **probed, share=_share_of(model), spare=SpareRows())
            _check_plan(plan, input_device(model))
            check.learn(context, plan)
            self.runner = Runner(model, check.small(), cuda_graph)
            model._sinkattn = self
            observer = Observer(model)
            with self._attends_by(ROUTES[route]):
                found = check.observe(self.runner, observer)
            for implementation in OWN:  # some leave out what others compute, as softcaps
                try:
                    with self._attends_by(implementation):
                        check.check_attention(found, observer)
                    break
                except UnsupportedModelError:
                    if implementation == OWN[-1]:
                        raise
            fused = Fused(model, fuse, observer) if fuse != "none" and route == "interface" else None
        self._name_implementation(ROUTES[route])
        if fused is not None:
            self.runner.fused = fused
            fused.apply()
        model._sinkattn = self
        with untouched(model):
            continues = check.check_pieces(self.runner, found)
            self.runner.plan = replace(check.small(plan.backend), continues=continues)
            check.check_dtype(self.runner, found)
        self.runner.plan = replace(plan, continues=continues)
        self._attending = list(observer.attending.values())

    @property
    def plan(self) -> Plan:
        return self.runner.plan

    @property
    def why_eager(self) -> str | None:
        return self.runner.captured.why_eager

    def _tell(self) -> None:
        """Tell the log in a line what was found of the model, and how it runs."""
        model, plan, fused = self.model, self.plan, self.runner.fused
        rotations = Counter(_rotation(probed) for probed in plan.layers.values())
        forms = Counter(type(form).__name__ for form in (fused.replaced if fused else ()))
        rotated, replaced = (", ".join(f"{n} x {kind}" for kind, n in kinds.items()) for kinds in (rotations, forms))
        logger.info(
            "%r, %s on %s: %d attentions by route %r; rotation: %s; fused: %s",
            *(self, model.dtype, input_device(model), len(plan.layers), plan.route, rotated, replaced or "nothing"),
        )

    def _install(self) -> None:
        """Put the runner's forward, and what `generate` needs, in the place of the model's own methods."""
        self._replace("forward", self.runner.forward)
        self._replace("set_attn_implementation", _refuse_implementation)
        if hasattr(self.model, "generate"):
            for name, call in Generation(self.model, self.runner).methods.items():
                self._replace(name, call)

    def _reach(self, capacity: int) -> tuple[Callable, str, dict]:
        """The first route that leads to the model's attention, what was probed over it, and in which context: that of
        float32 if the model can be run so.
        """
        for context, (route, implementation) in itertools.product(verify.contexts(self.model), ROUTES.items()):
            with self._attends_by(implementation):
                try:
                    recorder = Recorder(self.model, capacity, watches=route == "watch")
                except (AttributeError, KeyError, ValueError) as error:
                    name = type(self.model).__name__
                    raise UnsupportedModelError(
                        f"{name}: transformers makes no cache for its config: {error!r}"
                    ) from error
                try:
                    with current.of(recorder), context():
                        found = probe(self.model, recorder, capacity, CHUNK)
                    refusal = None  # its traceback holds this call, and all that it holds
                    return context, route, found
                except UnsupportedModelError as error:
                    refusal = error
                    logger.debug("%s by route %r: %s", type(self.model).__name__, route, error)
                    if recorder.reached and error.__cause__ is None:  # but not served
                        break
        raise refusal

    def _replace(self, name: str, call: Callable) -> None:
        if name in vars(self.model):  # accelerate's hooks put their own forward there
            self._had[name] = vars(self.model)[name]
        self._replaced[name] = _Replaced(call, getattr(self.model, name))
        setattr(self.model, name, self._replaced[name])

    @contextlib.contextmanager
    def _attends_by(self, implementation: str | None) -> Iterator[None]:
        """A context in which the model's config names an attention implementation, None for its own."""
        self._name_implementation(implementation)
        try:
            yield
        finally:
            self._restore_configs()

    def _name_implementation(self, implementation: str | None) -> None:
        """Give the model copies of its configs that name an attention implementation: the originals may be shared."""
        self._restore_configs()
        memo: dict = {}
        copies: dict[int, Any] = {id(config): copy.deepcopy(config, memo) for _, config in self._configs}
        if implementation is not None:
            copies[id(self.model.config)].get_text_config(decoder=True)._attn_implementation = implementation
        for module, config in self._configs:
            module.config = copies[id(config)]
        originals = {id(config): config for _, config in self._configs}
        self._named = [(config, copies[key], copy.deepcopy(copies[key])) for key, config in originals.items()]

    def _restore_configs(self) -> None:
        for module, config in self._configs:
            module.config = config

    def remove(self) -> None:
        """Bring back exactly the model that was there before; a second call does nothing. Its caches are then useless.

        What was set meanwhile in the model or its config stays set.

        Raises RuntimeError if something else than its class's own replaced the model's forward or generate since: undo
        that first.
        """
        if getattr(self.model, "_sinkattn", None) is not self:
            return
        for name, replaced in self._replaced.items():
            now = vars(self.model).get(name, replaced.original)
            if now is replaced or now == replaced.original:  # PEFT puts back what it has found
                continue
            if getattr(now, "__func__", None) is not getattr(type(self.model), name):
                raise RuntimeError(
                    f"{name} of the model was replaced after sinkattn.patch(), as by hooks of accelerate; undo that "
                    f"before remove(), or del model.{name}"
                )
            self._had.pop(name, None)  # accelerate took its hooks off
        self._restore()
        for configs in self._named:
            _carry_over(*configs)

    def _restore(self) -> None:
        for name in self._replaced:
            vars(self.model).pop(name, None)
            if name in self._had:
                setattr(self.model, name, self._had[name])
        self._replaced, self._had = {}, {}
        self._watching.close()
        if self.runner is not None:
            if self.runner.fused is not None:
                self.runner.fused.undo()
            self.runner.plan.spare.close(self)
            self.runner.lookout.seen = None  # it holds what stood in the model, which would keep the model
        vars(self.model).pop("_sinkattn", None)
        self._restore_configs()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_watching"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _watching=changes.watch())
        if self.runner is not None:
            self.runner.plan.spare.users.add(self)
            if self.runner.fused is not None:
                self.runner.fused.begin()
        interface.register()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"<sinkattn on {type(self.model).__name__}: {plan.sink_size} sinks + window {plan.window_size}, "
            f"prefill={plan.prefill!r}, cache_dtype={plan.cache_dtype!r}, backend={plan.backend!r}, "
            f"steps {'captured' if self.why_eager is None else f'run eagerly: {self.why_eager}'}>"
        )


def _carry_over(original: PreTrainedConfig, now: PreTrainedConfig, was: PreTrainedConfig) -> None:
    """Set in a config what was set meanwhile in the copy of it that a model had, but for how it attends."""
    for name, value in vars(now).items():
        held, before = (vars(config).get(name) for config in (original, was))
        if all(isinstance(x, PreTrainedConfig) for x in (value, held, before)):
            _carry_over(held, value, before)
        elif "attn_implementation" not in name and (name not in vars(was) or value != before):
            vars(original)[name] = value


def _refuse_implementation(*args: Any, **kwargs: Any) -> None:
    raise ValueError("a patched model attends by sinkattn: set_attn_implementation() before patch(), or remove() first")


def _rotation(probed: ProbedLayer) -> str:
    """The kind of rotation of an attention, in words."""
    rope = probed.rope
    if rope is None:
        return "none" if probed.alibi_slopes is None else "ALiBi"
    kind = "interleaved" if rope.interleaved else "halves"
    many = " by length" * rope.varies + " in three axes" * (rope.axes is not None)
    return f"{2 * rope.frequencies.shape[1]} dims from {rope.start} ({kind}{many})"


def _check_plan(plan: Plan, device: torch.device) -> None:
    """Raise UnsupportedModelError for a layer that the backend asked for by name, or a cache in 8 bits, does not serve,
    and for a GPU or a backend that has no such cache."""
    stored = CACHE_DTYPES[plan.cache_dtype]
    if stored == torch.float8_e4m3fn and device.type == "cuda" and not has_float8(device.index or 0):
        raise UnsupportedModelError(
            "cache_dtype='fp8' needs a GPU of compute capability 8.9 or later; 'int8' serves on all"
        )
    if stored is not None and device.type == "cuda" and plan.backend == "cuda" and not is_new(device.index or 0):
        raise UnsupportedModelError(
            f"cache_dtype={plan.cache_dtype!r}: backend 'cuda' needs a GPU of compute capability 9.0 or later for it, "
            "'auto' and 'triton' do not"
        )
    for (layer_idx, _), probed in plan.layers.items() if stored is not None else ():
        if probed.rope is not None and probed.rope.varies:
            raise UnsupportedModelError(
                f"layer {layer_idx} turns by other frequencies the longer its text is, up to S + W tokens, so all its "
                f"keys are turned again: cache_dtype={plan.cache_dtype!r} does not serve that, 'auto' does"
            )
    for (layer_idx, _), probed in plan.layers.items():
        if SinkLayer(probed, plan).sink_reach is not None and plan.backend not in ("auto", "reference"):
            raise UnsupportedModelError(
                f"layer {layer_idx} has a sliding window of its own, {probed.own_window} tokens, between window_size "
                f"and sink_size + window_size: backend {plan.backend!r} does not serve that, 'auto' and 'reference' do"
            )


def _share_of(model: nn.Module) -> str | None:
    """What this process has of a model that transformers has split, None for all of it."""
    size = getattr(model, "tp_size", None) or 1
    return None if size == 1 else f"share {torch.distributed.get_rank() % size} of {size}"


def patch(
    model: nn.Module,
    sink_size: int = 4,
    window_size: int = 1020,
    *,
    prefill: str = "streaming",
    slack: int = 16,
    cache_dtype: str = "auto",
    backend: str = "auto",
    fuse: str = "model",
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
        attended densely and only then cut down to sinks and window (quadratic time; what attention_sinks does). Inputs
        that the model itself would attend otherwise, by a larger window of its own or frequencies of longer texts, are
        a ValueError.
    slack: tokens that can be taken back at any time (`SinkCache.crop`, `Stream.rewind`, assisted generation, an edited
        history); the cache holds so many more of every layer. Models with a state of their own cannot take any back.
    cache_dtype: "auto" keeps keys and values in the dtype that the model gives them. "int8" and "fp8" (float8_e4m3fn)
        keep them, those of the sinks too, in 8 bits, and a float32 scale for each token and key head: about half of
        16 bits. Keys are turned once and quantised once, from float32, ``scale = max|x| / L`` and ``round(x / scale)``
        with L = 127 or 448, and never again. A token sees its own key and value as they are stored, so a text gives the
        same logits however it is cut. NaN or infinity in a key or value makes NaN of what sees it.
    backend: "auto", "cuda", "triton", "cpu" or "reference", see `sinkattn.ops`.
    fuse: "layers" computes modules of the usual form by fewer kernels, see fuse/: attention, decoder layers and, for
        few rows, linear layers. "model" besides computes all layers by one kernel in captured steps of one token of one
        row or two, and the head, if they are small and alike: heads of 64 or 128 dims, in 16 bits, layers of less than
        250 MB for one row and 75 for two. "attention" computes only attention, "none" nothing. Outputs differ by
        rounding alone. Weights are laid side by side, and held once.
    cuda_graph: on a GPU, replay steps of one token, and of up to 16 that were proposed, as a CUDA graph: captured at
        the second such step, and kept, with the memory of the last cache, for the next one of as many rows. What cannot
        be captured runs as it is, and ``handle.why_eager`` tells why.

    What is changed in the model afterwards counts: at once where a hook is registered or a module or parameter is put
    into it (adapters, quantisation, exchanged parts), else from the next prompt on (weights moved by ``.data``, a
    replaced ``forward``, settings such as a norm's eps or those of the config that a forward reads, removed and
    inserted modules, what is written into a module's ``_modules`` or ``_parameters`` themselves; all changes of a model
    that `torch.compile` wraps). Values written into weights count at once. A module in which something was exchanged
    runs its own forward. An exchanged attention module, other rotary frequencies, other sliding windows in the config
    and another attention implementation raise RuntimeError at the next prompt: remove(), patch() again.
    `torch.func.functional_call` is not served, as it changes parameters for one call, unseen.

    Warns once if S + W is more than the model was trained on.

    Returns a `Handle`: ``handle.remove()``, or ``with patch(model):``.

    Raises UnsupportedModelError (a ValueError) if the model cannot be served exactly, naming layer and reason;
    ValueError for sizes or names that make no sense and for a model that is patched already; TypeError for something
    that is no PreTrainedModel; RuntimeError for a backend that is not available. The model is then unchanged.

    Source: arXiv 2309.17453, section 3.2.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if hasattr(model, "get_base_model"):  # of PEFT
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"patch() takes a transformers PreTrainedModel, not a {type(model).__name__}")
    if getattr(model, "_sinkattn", None) is not None:
        raise ValueError(f"this {type(model).__name__} is patched already; call remove() on the handle first")
    for name, size, least in (("sink_size", sink_size, 0), ("window_size", window_size, 1), ("slack", slack, 0)):
        if not isinstance(size, Integral) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name}={size!r}: it needs a whole number of tokens, at least {least}")
    if prefill not in ("streaming", "dense"):
        raise ValueError(f"prefill={prefill!r}: choose 'streaming' or 'dense'")
    if not isinstance(cache_dtype, str) or cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype={cache_dtype!r}: choose 'auto', 'int8' or 'fp8'")
    if fuse not in ("model", "layers", "attention", "none"):
        raise ValueError(f"fuse={fuse!r}: choose 'model', 'layers', 'attention' or 'none'")
    if reason := ops.missing_backend(backend, input_device(model).type):
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; sinkattn serves decoders")
    trained = trained_length(model.config)
    if trained is not None and sink_size + window_size > trained:
        warnings.warn(
            f"sink_size + window_size = {sink_size + window_size} is more than the {trained} tokens that this "
            f"{type(model).__name__} was trained on: its outputs get worse from there on. Choose at most {trained}.",
            stacklevel=2,
        )
    interface.register()
    sizes = dict(sink_size=int(sink_size), window_size=int(window_size), slack=int(slack))
    return Handle(model, fuse, cuda_graph, **sizes, prefill=prefill, cache_dtype=cache_dtype, backend=backend)
