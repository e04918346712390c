"""Whether a patched model computes what the model itself computes: a short text goes through both.

Half precision is noisy, so the text goes through in float32 (precise.py), where a wrong patch and rounding are orders
of magnitude apart, and the model's own sensitivity is measured beside it. Every attention is judged by itself, on the
same hidden states, within the first C tokens and behind them; then the whole model, also in pieces and with fused
modules; and last the real thing, in the model's own dtype, which must be as near to float32 as the unpatched model.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .cache import SinkCache
from .introspect import embedded_ids, input_device, rewind
from .observe import Observer
from .precise import HALF, Precise
from .rings import Plan, StatefulSinkLayer, layers_of
from .rope import UnsupportedModelError
from .rows import SpareRows
from .runner import Runner

SINKS, WINDOW, BEHIND = 4, 12, 4  # of the small cache that the text runs through; tokens that it holds no more
EXACT = 1e-3  # relative error of an attention in float32; float32 rounding is below 1e-5
NOISE = 64  # how much more than a perturbation by one rounding a whole model may differ by
TWINS = 8  # runs of the unpatched model in its own dtype: experts may be chosen otherwise by a rounding


@contextlib.contextmanager
def plainly(model: nn.Module):
    """No gradients, no autocast, no TF32, no inference mode: what runs inside computes what its dtypes say."""
    device = input_device(model).type
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def contexts(model: nn.Module) -> list[Callable]:
    """Contexts in which a model may be looked at, the most exact one first: some modules know their own dtype alone."""
    is_half = any(x.dtype in HALF for x in model.parameters())
    return [Precise, contextlib.nullcontext] if is_half else [contextlib.nullcontext]


class Verification:
    """A short text, and what the unpatched model makes of it.

    model: its forward is still its own. sink_size, window_size: tokens, of the patch; the text runs through a cache of
    at most SINKS + WINDOW.

    Attributes: ids (1, T); own, the unpatched model's outputs for the first tokens in its own dtype, (TWINS, T', n),
    where the embeddings of all rows but the first are off by one rounding; expected, those in float32 (in `context`),
    (T', n), both float64; and noise, how far these move if the embeddings move by one rounding.

    Raises UnsupportedModelError if the model is broken by itself.
    """

    def __init__(self, model: nn.Module, sink_size: int, window_size: int):
        self.model, self.forward, self.name = model, model.forward, type(model).__name__
        self.sink_size, self.window_size = min(sink_size, SINKS), min(window_size, WINDOW)
        self.steady = self.capacity = self.sink_size + self.window_size
        self.ids, self._failed = _text(model, self.capacity + BEHIND), None
        try:
            self._run_own()
        except UnsupportedModelError:
            raise
        except Exception as error:  # the probe may know why
            self._failed = error

    def _run_own(self) -> None:
        with self._perturbed(slice(1, TWINS)):
            self.own = self._unpatched([list(range(self.steady))] * TWINS)
        if not self.own.isfinite().all():
            raise UnsupportedModelError(
                f"{self.name} itself, unpatched, gives numbers that are not finite in {self.model.dtype}: load it in "
                "another dtype"
            )

    def learn(self, context: Callable, plan: Plan) -> None:
        """context: in which the model computes in float32, if it can. plan: of the patch."""
        if self._failed is not None:
            raise UnsupportedModelError(
                f"{self.name}: its own forward fails on a short text: {self._failed!r}"
            ) from self._failed
        self.context, self.plan = context, plan
        known = (*HALF, torch.float32, torch.float64)
        is_plain = all(type(x) is nn.Parameter and x.dtype in known for x in self.model.parameters())  # not quantised
        self.is_exact = is_plain and context is contexts(self.model)[0]
        for rope in (x.rope for x in plan.layers.values() if x.rope is not None and x.rope.varies):
            sets = rope.sets(torch.arange(1, self.capacity + 1))
            self.steady = min(self.steady, int((sets == sets[0]).cumprod(0).sum()))
        if self.steady < self.capacity:  # behind them a text at once turns otherwise from its first token on
            self._run_own()

    @contextlib.contextmanager
    def _perturbed(self, rows: slice = slice(1, 2)):
        """The embeddings of some rows are off by one rounding."""
        draw = torch.Generator().manual_seed(0)

        def perturb(_, args, output):
            moved = output.clone()
            wave = torch.randn(moved[rows].shape, generator=draw).to(moved)
            moved[rows] *= 1 + torch.finfo(moved.dtype).eps * wave
            return moved

        hook = self.model.get_input_embeddings().register_forward_hook(perturb)
        try:
            yield
        finally:
            hook.remove()

    def read(self, run: Callable) -> Tensor:
        """What a run says of every token, (batch, T, n) float64: logits, or hidden states where a head sums up."""
        body, held = self.model.base_model, []
        hook = (
            None if body is self.model else body.register_forward_hook(lambda _, args, output: held.append(output[0]))
        )
        try:
            output = run()
        finally:
            if hook is not None:
                hook.remove()
        found = output.get("logits", output[0])
        if held and isinstance(held[0], Tensor):
            hidden = torch.cat(held, dim=1)
            found = found if found.dim() == 3 and found.shape[1] == hidden.shape[1] else hidden
        return found.double()

    # The patched model.

    def small(self, backend: str | None = None) -> Plan:
        """The plan, in the small cache of the model's own dtype, so that nothing rounds otherwise.

        backend: by default what serves float32 and compiles nothing.
        """
        backend = backend or ("auto" if self.ids.device.type == "cpu" else "reference")
        ropes = {id(x.rope): x.rope.up_to(self.capacity) for x in self.plan.layers.values() if x.rope is not None}
        layers = {
            key: x if x.rope is None else replace(x, rope=ropes[id(x.rope)]) for key, x in self.plan.layers.items()
        }
        sizes = dict(sink_size=self.sink_size, window_size=self.window_size, cache_dtype="auto")
        return replace(self.plan, **sizes, prefill="streaming", backend=backend, layers=layers, spare=SpareRows())

    def run(self, runner: Runner, pieces: list[int], observer: Observer | None = None) -> Tensor:
        """The outputs of the patched model, (T, n), fed in pieces."""
        cache = SinkCache(self.model)
        watch = contextlib.nullcontext() if observer is None else observer.over(cache)
        with watch:
            found = [
                self.read(lambda x=x: runner.forward(input_ids=x, past_key_values=cache))
                for x in self.ids.split(pieces, 1)
            ]
        return torch.cat(found, dim=1)[0]

    def observe(self, runner: Runner, observer: Observer) -> Tensor:
        """The outputs of the patched model, with no module fused; the observer gets to know what every module does."""
        with self.context():
            return self.run(runner, [self.ids.shape[1]], observer)

    def check_attention(self, found: Tensor, observer: Observer) -> None:
        """Judge what was observed: every attention, and the whole model within the first tokens. The model attends by
        itself, over rows of C tokens: 0 is the text, 1 its perturbed twin; in row 2 attention gets what the patched one
        was given for the text, and in the others what it kept for a later token: the sinks and the window.
        """
        last, sinks, window = self.ids.shape[1], self.sink_size, self.window_size
        later = [t for t in (self.capacity, self.capacity + 1, last - 1) if t < last]
        first = list(range(self.capacity))
        rows = [first, first, first, *([*range(sinks), *range(t - window + 1, t + 1)] for t in later)]
        gave: dict[nn.Module, Tensor] = {}
        with self.context(), self._perturbed(), self._given(observer, torch.tensor(rows), gave):
            self.expected, twin, *_ = self._unpatched(rows)
        if self.steady < self.capacity:  # these tokens turn otherwise at another length
            with self.context(), self._perturbed():
                self.expected, twin = self._unpatched([first[: self.steady]] * 2)
        self.noise = _error(twin, self.expected).max().item()
        self._judge(observer, gave, later)
        error = _error(found[: self.steady], self.expected).max().item()
        if not error <= self.allowed:
            raise UnsupportedModelError(
                f"{self.name}: a short text gives other outputs than unpatched, by {error:.1e} of their spread "
                f"(rounding moves them by {self.noise:.1e}): something else than its attention looks at positions, "
                "masks or the cache"
            )

    def _unpatched(self, rows: list[list[int]]) -> Tensor:
        rewind(self.model)
        ids = self.ids[0][torch.tensor(rows, device=self.ids.device)]
        return self.read(lambda: self.forward(input_ids=ids, use_cache=False))

    @contextlib.contextmanager
    def _given(self, observer: Observer, rows: Tensor, gave: dict[nn.Module, Tensor]):
        """A context in which rows 2 and on of what attention modules take is what was observed. rows: (n, C) tokens
        of the text. gave: gets what the modules gave.
        """

        def before(module, args, kwargs):
            if module in gave:  # looped models run a module several times
                return None
            held, now = observer.of[module].hidden[0], args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat((now[:2], held[rows[2:].to(held.device)].to(now)))
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def after(module, args, output):
            gave.setdefault(module, output[0] if isinstance(output, tuple) else output)

        modules = list(dict.fromkeys(observer.attending.values()))
        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
        hooks += [module.register_forward_hook(after) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _judge(self, observer: Observer, gave: dict[nn.Module, Tensor], later: list[int]) -> None:
        """Compare what attention modules gave by themselves with what was observed of them.

        One with a state of its own (Zaya's convolves keys) gives other keys where the sinks meet the window.
        """
        first = self.capacity if self.steady == self.capacity else 0
        rings = layers_of(self.plan)[1]
        for key, module in observer.attending.items():
            behind = [] if isinstance(rings[key], StatefulSinkLayer) else later
            tokens, layer_idx = [*range(first), *behind], key[0]
            if not tokens:
                continue
            found, expected = observer.of[module].output[0].double(), gave[module].double()
            expected = torch.cat((expected[2, :first], expected[3 : 3 + len(behind), -1]))
            size = expected.square().mean(-1).sqrt()
            off = (found[tokens] - expected).square().mean(-1).sqrt()
            error = torch.where(off == 0, 0, off / size.clamp_min(1e-2 * size.max()))  # a projection of zeros gives 0
            worst = error.argmax().item()
            if not error[worst] <= (EXACT if self.is_exact else 0.3):
                raise UnsupportedModelError(
                    f"{type(module).__name__}, layer {layer_idx}: its attention differs from the model's own over the "
                    f"same hidden states by {error[worst]:.1e} of its size, at token {tokens[worst]} of a cache of "
                    f"{self.sink_size} + {self.window_size}"
                )

    @property
    def allowed(self) -> float:
        """How far outputs of a whole model may differ, relative to their spread."""
        return max(EXACT if self.is_exact else 0.05, NOISE * self.noise)

    def check_pieces(self, runner: Runner, expected: Tensor) -> bool:
        """Judge the patched model with its fused modules, fed in pieces. Returns whether states of layers go on with
        several tokens at once.
        """
        tokens, has_state = len(expected), SinkCache(self.model).has_state
        half = max(self.capacity // 2, 1)

        def difference(pieces: list[int]) -> float:
            with self.context():
                return _error(self.run(runner, pieces), expected).max().item()

        if (error := difference([half, 1, tokens - half - 1] if has_state else [tokens - 1, 1])) <= self.allowed:
            return True
        if has_state and difference([half] + [1] * (tokens - half)) <= self.allowed:
            return False
        raise UnsupportedModelError(
            f"{self.name}: a short text in pieces gives other outputs than at once, by {error:.1e} of their spread: "
            "something besides attention counts columns, keeps a state that does not go on where it stopped, or is not "
            "what sinkattn takes it for (then fuse='none' serves)"
        )

    def check_dtype(self, runner: Runner, expected: Tensor) -> None:
        """Judge the patched model as it will run, in its own dtype, by the largest error among the unpatched twins."""
        half = max(self.capacity // 2, 1)
        found = self.run(runner, [half, 1, len(expected) - half - 1])
        error = _error(found, expected).median().item()
        usual = max(_error(own, self.expected).median().item() for own in self.own)
        if not error <= max(5 * usual, 1e-2):
            raise UnsupportedModelError(
                f"{self.name}: in {self.model.dtype} a short text is off by {error:.1e} of the outputs' spread, "
                f"unpatched by {usual:.1e}"
            )


def _text(model: nn.Module, tokens: int) -> Tensor:
    """Ids from all over the vocabulary, the same every time, none of them special."""
    numbers = model.config.to_dict()
    special = {x for name, x in numbers.items() if "token" in name and isinstance(x, int)}
    size = embedded_ids(model)
    drawn = torch.randint(size, (8 * tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = [x for x in drawn if x not in special][:tokens]
    return torch.tensor([plain], device=input_device(model))


def _error(found: Tensor, expected: Tensor) -> Tensor:
    """(T, n) and (T, n) to (T,): root mean squares of the differences, relative to the spread."""
    spread = (expected - expected.mean(0)).square().mean().sqrt().clamp_min(1e-30)
    return (found - expected).square().mean(-1).sqrt() / spread
