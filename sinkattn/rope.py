"""Which rotation a layer applies, found by watching it, and its angles at any position.

A patched model is fed position 0 for every token, so its own rotation is the identity (times any attention scaling) and
queries and keys arrive unturned. The ops then turn them by angles computed here in float64 from integer positions:
exact at position 4,000,000 as at 5, whatever tables or float32 products the model itself would use.

To know the angles, `probe` runs one-token rows at a few positions through the model. A lone token attends to itself
alone, so every layer sees the same hidden states whatever the position is, and what differs between the rows of a key
is the rotation. It must agree with one of the model's own frequency tables, in one of the layouts below, or be nothing.
"""

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .reference import rotate
from .watch import Watch

FAR = 100_000  # a position at which even the slowest pair has turned visibly


class UnsupportedModelError(ValueError):
    """The model cannot be patched exactly; the message names the layer and the reason. The model is unchanged."""


@dataclass(eq=False)
class Rope:
    """The rotation of one or more layers: pairs of dims, from `start` on, turned by ``position * frequency``.

    frequencies: (sets, r / 2) float64, radians per token. One set, unless the model picks frequencies by sequence
        length (dynamic NTK, longrope).
    set_of_length: (C + 1,) int64, which set serves a row of n tokens, n <= C; longer rows use the last.
    axes: (r / 2,) int64, which of a token's three positions turns a pair (M-RoPE: time, height, width); None for models
        with one.
    """

    start: int
    interleaved: bool
    frequencies: Tensor
    set_of_length: Tensor
    axes: Tensor | None = None
    _on: dict = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo) -> "Rope":
        return self  # immutable, and known by identity

    @property
    def varies(self) -> bool:
        return len(self.frequencies) > 1

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """On a device: frequencies, set_of_length, and (2, 1) float64 what makes a sine the cosine and the sine."""
        if device not in self._on:
            quarter = torch.tensor([[math.pi / 2], [0.0]], dtype=torch.float64)
            self._on[device] = tuple(x.to(device) for x in (self.frequencies, self.set_of_length, quarter))
        return self._on[device]

    def sets(self, lengths: Tensor) -> Tensor:
        """Which frequency set serves rows of `lengths` tokens: any int64 shape in, the same out."""
        set_of_length = self._tables(lengths.device)[1]
        return set_of_length[lengths.clamp(0, len(set_of_length) - 1)]

    def table_of_places(self, places: Tensor) -> Tensor:
        """`table` of tokens with three positions each, (..., 3) int64. Returns (..., 2, r / 2)."""
        return self._cos_sin(places[..., self.axes.to(places.device)] * self._tables(places.device)[0][0])

    def table(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """``[cos | sin](position * frequency)`` in float32.

        positions: (..., P) int64; lengths: broadcastable to positions, tokens the row holds. Returns
            (..., P, 2, r / 2).
        """
        frequencies = self._tables(positions.device)[0]
        frequencies = frequencies[self.sets(lengths)] if self.varies else frequencies[0]
        return self._cos_sin(positions[..., None] * frequencies)

    def _cos_sin(self, angles: Tensor) -> Tensor:
        """(..., r / 2) float64 to ``[cos | sin]``, (..., 2, r / 2) float32: cos(x) = sin(x + pi / 2) in one kernel."""
        return torch.sin(angles[..., None, :] + self._tables(angles.device)[2]).float()


@dataclass(frozen=True)
class ProbedLayer:
    """What one attention does.

    rope: its rotation, None for none. own_window: tokens its own sliding window shows, None for all.
    query_scales: (C,) float32, factor of the query at position ``min(t, C - 1)``, or None where it is 1.
    Of attention that is watched: scale, the factor of the scores; alibi_slopes, (num_heads,) float32 or None;
        heads_first, whether its output is (batch, heads, T, dim) or (batch, T, heads, dim).
    """

    rope: Rope | None
    own_window: int | None = None
    scale: float | None = None
    alibi_slopes: Tensor | None = None
    heads_first: bool = True
    query_scales: Tensor | None = None


@dataclass
class Seen:
    """One attention in the probe: query, key and value (rows, heads, T, dim) and what its mask said."""

    where: str
    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None  # see `Recorder.mask`; None for a mask of its own
    logits: Tensor | None = None
    heads_first: bool = True


class Recorder(DynamicCache):
    """Stands in for cache and attention during the probe: hands keys through, notes q, k, v, and returns v.

    Attributes: seen, what every attention did, by (layer index, how often that layer attended before in the step);
    reached, whether any did.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, window_size: int, watches: bool):
        super().__init__(config=model.config)  # for layers with a state of their own
        knowing = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        knowing.sort(key=lambda m: "Attention" in type(m).__name__)  # the layer itself may know its index too
        self.modules = {m.layer_idx: type(m).__name__ for m in knowing}
        self.capacity, self.window_size, self.watches = capacity, window_size, watches
        self.reports: dict[int, int] = {}  # how much text layers say they hold, if not none
        self.forget()

    def forget(self) -> None:
        self.seen: dict[tuple[int, int], Seen] = {}
        self.reached = False
        self.updated: int | None = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.updated is not None:
            raise UnsupportedModelError(f"{self.where(self.updated)}: its keys go by the attention interface")
        if self.watches:
            return _Recording(self, layer_idx, key_states, value_states).handed_out()
        self.updated = layer_idx
        return key_states, value_states

    def update_indexer(self, indexer_key_states, layer_idx, *args, **kwargs):
        self.reached = True
        raise UnsupportedModelError(
            f"{self.where(layer_idx)}: an indexer chooses what its attention sees (sparse attention, DSA)"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.reports.get(layer_idx, 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def where(self, layer_idx: int) -> str:
        return f"{self.modules.get(layer_idx, 'attention')}, layer {layer_idx}"

    def note(self, layer_idx: int, query, key, value, window: int | None) -> Seen:
        if query.dim() != 4 or key.dim() != 4 or query.shape[2] != key.shape[2]:
            raise UnsupportedModelError(
                f"{self.where(layer_idx)}: it attends to something else than the text before it"
            )
        self.reached = True
        call = sum(index == layer_idx for index, _ in self.seen)
        seen = Seen(self.where(layer_idx), *(x.detach() for x in (query, key, value)), window)
        return self.seen.setdefault((layer_idx, call), seen)

    def attend(self, layer_idx, query, key, value, mask, *_):
        layer_idx, self.updated = layer_idx if self.updated is None else self.updated, None
        if layer_idx is None:
            raise UnsupportedModelError("an attention module without a layer_idx: whose keys it sees cannot be told")
        own = mask is None or mask.numel() != 1
        self.note(layer_idx, query, key, value, None if own else int(mask.item()))
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2).contiguous()

    def mask(self, mask_function, local_size: int | None, device) -> Tensor:
        """What the layer's mask lets through: its window as a one-element tensor, 0 for all, -1 for another pattern.

        A query in the cache never stands further than C - 1 from the start, so that is where the mask is asked.
        """
        zero = torch.zeros((), dtype=torch.int64, device=device)
        windows = {}
        for query in {self.capacity - 1, max(self.capacity - 2, 0)}:
            distance = torch.arange(-1, query + 1, device=device)
            try:
                visible = mask_function(zero, zero, zero + query, query - distance)
            except IndexError:  # it looks at what the tokens are (images), and knows these few alone
                visible = (distance >= 0) & (distance < (local_size or len(distance)))
            visible = torch.as_tensor(visible, device=device).expand(distance.shape).tolist()
            causal = not visible[0] and visible[1:] == sorted(visible[1:], reverse=True)
            windows[query] = sum(visible) if causal else -1
        window = max(windows.values())
        if any(shown != min(window, query + 1) for query, shown in windows.items()):
            window = -1
        return torch.tensor([[[[0 if window >= self.window_size else window]]]], device=device)


class _Recording(Watch):
    """Watched attention in the probe: one token a row gives v; several are computed in float64, and looked at."""

    def __init__(self, recorder: Recorder, layer_idx: int, key: Tensor, value: Tensor):
        super().__init__(layer_idx, key, value)
        self.recorder, self.found = recorder, None

    def scores(self, product, args, kwargs):
        wide = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        return product(*map(wide, args), **{name: wide(x) for name, x in kwargs.items()})

    def logits(self, logits):
        self.found = logits.detach().double().reshape(*self.query.shape[:3], -1)

    def output(self, found):
        seen = self.recorder.note(self.layer_idx, self.query, self.key, self.value, 0)
        if self.found is None:
            self.refuse("has no softmax")
        seen.logits = self.found
        group = self.query.shape[1] // self.value.shape[1]
        heads_first = self.found.softmax(-1) @ self.value.double().repeat_interleave(group, 1)
        if heads_first.numel() != found.numel():
            self.refuse("changes its shape")
        for seen.heads_first, expected in ((True, heads_first), (False, heads_first.transpose(1, 2))):
            error = (expected.reshape(found.shape) - found).abs().max() / expected.abs().max()
            if error < 1e-4 + 8 * torch.finfo(found.dtype).eps:
                return found
        self.refuse("does more than softmax(scores) times values")

    def refuse(self, what):
        raise UnsupportedModelError(
            f"{self.recorder.where(self.layer_idx)}: between cache and output, attention {what}"
        )


@contextlib.contextmanager
def untouched(model: nn.Module):
    """Run the model in evaluation mode (dropout would look like a position), and leave it as it was."""
    states = [(module, _state(module)) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, state in states:
            _restore(module, state)


def rewind(model: nn.Module) -> None:
    """Let frequencies that are picked by length (dynamic NTK, longrope) start anew: what ran before does not matter."""
    for module in model.modules():
        for name in frequency_buffers(module):
            original = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
            if original is not None and hasattr(module, "original_max_seq_len"):
                setattr(module, name, original.clone())
                module.max_seq_len_cached = module.original_max_seq_len


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its ids. The weights of an offloaded model are elsewhere; accelerate's hooks know."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return next(embedding.parameters()).device if device is None else torch.device(device)


def takes_positions(forward) -> bool:
    """Whether a model's forward takes ``position_ids``, by name or among its ``**kwargs``."""
    parameters = inspect.signature(forward).parameters.values()
    return any(x.name == "position_ids" or x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters)


def cache_name(forward) -> str:
    """What a model's forward calls the cache: "cache" from transformers 5.24 on, unless the model is older."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def probe(
    model: PreTrainedModel, recorder: Recorder, capacity: int, longest: int
) -> dict[tuple[int, int], ProbedLayer]:
    """Find what every attention of `model` does, by feeding the same token at several positions.

    model: in evaluation mode; its attention must already reach `recorder`. capacity: C, tokens. longest: tokens that a
    step may have. Returns a `ProbedLayer` for each attention of a step, by (layer index, how often that layer attended
    before). Raises UnsupportedModelError with layer and reason.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    last = max(min(capacity, getattr(config, "max_position_embeddings", None) or capacity) - 1, 1)
    positions = sorted(p for p in {0, 1, 2, 3, 5, 7, last // 2, last} if p <= last)
    tables, device = _frequency_tables(model, capacity), input_device(model)
    ran: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: ran.add(module))
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]

    def run(ids: Tensor, positions: list[int] | Tensor | None) -> Tensor:
        recorder.forget()
        recorder.reset()
        more = {cache_name(model.forward): recorder}
        if positions is not None and takes_positions(model.forward):
            lists = isinstance(positions, list)
            more["position_ids"] = torch.tensor(positions, device=ids.device)[:, None] if lists else positions
        try:
            return model(input_ids=ids, use_cache=True, **more)[0]
        except UnsupportedModelError:
            raise
        except Exception as error:  # a model that cannot even run the probe cannot be patched: say why
            raise UnsupportedModelError(f"{name}: its forward failed in the probe, over a cache: {error!r}") from error

    try:
        with torch.no_grad():
            output = run(torch.ones(len(positions), 1, dtype=torch.int64, device=device), positions)
            rows = recorder.seen
            if not rows:
                raise UnsupportedModelError(
                    f"{name}: no layer attends over keys from a cache; there is no place for sinks"
                )
            if not tables:
                tables = _standard_tables(config, {seen.key.shape[-1] for seen in rows.values()}, capacity)
            used = [table.in_use() for table in tables]
            scaled = {key: _scales_query(seen) for key, seen in rows.items()}
            if any(scaled.values()):
                pieces = []
                for piece in torch.arange(capacity).split(256):
                    run(torch.ones(len(piece), 1, dtype=torch.int64, device=device), piece.tolist())
                    pieces.append({key: _length(seen.query) for key, seen in recorder.seen.items()})
                norms = {key: torch.cat([piece[key] for piece in pieces]) for key in rows}
            spread = None
            if counts_in_three(model):
                far = torch.zeros(3, 4, 1, dtype=torch.int64, device=device)
                far[range(3), range(1, 4)] = FAR
                run(torch.ones(4, 1, dtype=torch.int64, device=device), far)
                spread = recorder.seen
            if not recorder.watches:
                held = max(capacity, longest)
                recorder.reports = {index: held for index, _ in rows}
                run(torch.ones(1, 1, dtype=torch.int64, device=device), [0])
                for key, seen in recorder.seen.items():
                    if (seen.query[0] - rows[key].query[0]).abs().max() > 1e-3 * seen.query.abs().max():
                        raise UnsupportedModelError(
                            f"{seen.where}: its queries depend on how much the cache holds, {held} tokens "
                            "or less: a smaller S + W may do (Llama-4 scales queries from position 8191 on)"
                        )
            if recorder.watches:
                run(torch.arange(1, 1 + min(capacity, 16), device=device)[None], None)
                text = recorder.seen
    finally:
        for hook in hooks:
            hook.remove()

    keeps_state = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in recorder.layers]
    attends = {index for index, _ in rows}
    for index in sorted({module.layer_idx for module in ran if "Attention" in type(module).__name__} - attends):
        if index >= len(keeps_state) or not keeps_state[index]:
            raise UnsupportedModelError(
                f"{recorder.where(index)}: it goes neither through transformers' attention interface, nor over keys "
                "from a cache"
            )
    ropes: dict[tuple | None, Rope] = {}  # layers with one rotation share its tables
    layers = {}
    for key, seen in rows.items():
        if seen.window is None or seen.window < 0:
            raise UnsupportedModelError(
                f"{seen.where}: its mask is neither causal nor a causal sliding window (encoders look both ways, "
                "chunks below S + W have borders, some models choose their keys)"
            )
        if scaled[key]:
            seen.query = seen.query / (norms[key][positions] / norms[key][0])[:, None, None, None].to(seen.query)
        found = _match(seen.where, positions, seen.query, seen.key, seen.value, used)
        if found is not None and found not in ropes:
            index, start, interleaved, sign = found
            frequencies = sign * tables[index].frequencies
            axes = None if spread is None else _axes(spread[key], start, interleaved, frequencies[0])
            ropes[found] = Rope(start, interleaved, frequencies, tables[index].set_of_length, axes)
        layers[key] = ProbedLayer(ropes.get(found), seen.window or None)
        if scaled[key]:
            layers[key] = replace(layers[key], query_scales=(norms[key] / norms[key][0]).float())
        if recorder.watches:
            scale, slopes = _linear_bias(text[key], config, capacity)
            layers[key] = replace(layers[key], scale=scale, alibi_slopes=slopes, heads_first=text[key].heads_first)
    output = output.double().flatten(1)
    if (output - output[:1]).abs().max() > (1e-3 + 4 * torch.finfo(seen.key.dtype).eps) * output.abs().max():
        raise UnsupportedModelError(f"{name}: its output changes with the position, other than by its attention")
    if not any(keeps_state) and all(x.rope is None and x.alibi_slopes is None for x in layers.values()):
        raise UnsupportedModelError(f"{name}: no rotation found in any layer, and nothing else that tells distances")
    return layers


def counts_in_three(model: nn.Module) -> nn.Module | None:
    """The part of a model that counts time, height and width of images (M-RoPE), if it has one."""
    return next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)


def _axes(seen: Seen, start: int, interleaved: bool, frequencies: Tensor) -> Tensor:
    """Which position turns each pair: keys (4, heads, 1, dim) at the origin and at `FAR` along each axis."""
    keys, size = seen.key.double().transpose(1, 2).flatten(1, 2), 2 * len(frequencies)  # (4, heads, dim)
    angles = FAR * frequencies.to(keys.device)
    turned = rotate(keys[0], angles.cos(), angles.sin(), start, interleaved)
    miss = (keys[1:] - turned)[..., start : start + size].square().sum(1)  # (3, r)
    pairs = miss.unflatten(-1, (-1, 2)).sum(-1) if interleaved else miss.unflatten(-1, (2, -1)).sum(-2)
    return pairs.argmin(0).cpu()


def _length(x: Tensor) -> Tensor:
    return x.double().flatten(1).norm(dim=1)


def _scales_query(seen: Seen) -> bool:
    """Whether the query's length depends on the position (Llama-4, Ministral-3), while the key's does not."""
    query, key = (_length(x) for x in (seen.query, seen.key))
    noise = 1e-5 + 4 * torch.finfo(seen.key.dtype).eps
    return bool((query / query[0] - 1).abs().max() > noise >= (key / key[0] - 1).abs().max())


def _linear_bias(seen: Seen, config, capacity: int) -> tuple[float, Tensor | None]:
    """Scale and ALiBi slopes of watched attention, from the logits (1, heads, T, T) of a short text.

    They must be ``scale * q.k - slope * (i - j)``, up to what is the same for all keys of a query, and causal.
    """
    if (getattr(config, "sliding_window", None) or capacity) < capacity:
        raise UnsupportedModelError(f"{seen.where}: a sliding window outside transformers' attention interface")
    logits, heads, tokens = seen.logits[0], seen.query.shape[1], seen.query.shape[2]
    keys = seen.key[0].double().repeat_interleave(heads // seen.key.shape[1], 0)
    product = seen.query[0].double() @ keys.mT
    i, j = torch.tril_indices(tokens, tokens, device=logits.device)
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=logits.device).tril()
    depth = logits - logits.amax(-1, keepdim=True)
    if bool((depth[:, ~visible] > -1e3).any()) or bool((depth[:, visible] < -1e3).any()):
        raise UnsupportedModelError(f"{seen.where}: its mask is not causal")
    drop, gain = (x[:, i, j] - x[:, i, i] for x in (logits, product))
    distance = (i - j).double().expand_as(gain)
    fit = torch.linalg.lstsq(torch.stack((gain, -distance), dim=-1), drop[..., None]).solution[..., 0]  # (heads, 2)
    scale, slopes = fit[:, 0].median().item(), fit[:, 1]
    error = (scale * gain - slopes[:, None] * distance - drop).abs().max() / drop.abs().max()
    if not error < 1e-4 + 2 * torch.finfo(seen.value.dtype).eps:
        raise UnsupportedModelError(
            f"{seen.where}: its scores are not scale * q.k with an optional linear bias (ALiBi), off by {error:.1e}"
        )
    if slopes.abs().max() < 1e-4 * drop.abs().max():
        return scale, None
    return scale, slopes.float()


def _match(where, positions, query, key, value, used) -> tuple[int, int, bool, int] | None:
    """The rotation that explains how q and k of one layer change with the position, or None if they do not change.

    used: the frequency tables as the model had them in the probe. Returns (which of them, first dim, interleaved, 1
    or -1 for the sense).
    """
    noise = 1e-5 + 4 * torch.finfo(key.dtype).eps
    tolerance = 1e-3 + noise + 2e-7 * positions[-1]  # float32 angles are off by 6e-8 of the position
    query, key, value = (x.double().transpose(1, 2).flatten(1, 2) for x in (query, key, value))  # (P, heads, dim)

    def residual(found, expected):
        return ((found - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30)).item()

    if residual(value, value[:1].expand_as(value)) > tolerance:
        raise UnsupportedModelError(
            f"{where}: its values change with the position, so positions enter outside a rotation (learned or added "
            "position embeddings, as in GPT-2 and OPT)"
        )
    best = max(residual(x, x[:1].expand_as(x)) for x in (query, key))
    if best < noise:
        return None
    position = torch.tensor(positions, dtype=torch.float64, device=key.device)
    for index, frequency in enumerate(used):
        rotated = 2 * len(frequency)
        if rotated > key.shape[-1]:
            continue
        angles = (position[:, None] * frequency.to(key.device))[:, None]  # (P, 1, r / 2)
        for start in sorted({0, key.shape[-1] - rotated}):  # MLA turns the last dims
            for interleaved, sign in itertools.product((False, True), (1, -1)):
                error = max(
                    residual(x, rotate(x[:1].expand_as(x), angles.cos(), sign * angles.sin(), start, interleaved))
                    for x in (query, key)
                )
                best = min(best, error)
                if error < tolerance:
                    return index, start, interleaved, sign
    raise UnsupportedModelError(
        f"{where}: query and key change with the position, but not by a plain rotation with the model's frequencies "
        f"(best residual {best:.1e}, allowed {tolerance:.1e}): something acts after the rotation, or scales by position"
    )


def frequency_buffers(module: nn.Module) -> list[str]:
    """Names of the frequency tables that a rotary module uses (``inv_freq``, ``sliding_attention_inv_freq``)."""
    names = (name for name, buffer in module.named_buffers(recurse=False) if buffer.dim() == 1)
    return [name for name in names if name.endswith("inv_freq") and "original" not in name and "long" not in name]


@dataclass
class _Table:
    """Frequencies a model may rotate by, (sets, r / 2) and set_of_length as in `Rope`, and the row now in use."""

    frequencies: Tensor
    set_of_length: Tensor
    in_use: Callable[[], Tensor]


def _frequency_tables(model: nn.Module, capacity: int) -> list[_Table]:
    """Every frequency buffer of the model.

    Models that pick frequencies by sequence length are asked for every length up to the capacity, through a copy.
    """
    tables = []
    for module in model.modules():
        for name in frequency_buffers(module):
            layer_type = name.removesuffix("inv_freq").removesuffix("_")
            rope_type = getattr(module, "rope_type", "default")
            rope_type = rope_type[layer_type] if isinstance(rope_type, dict) else rope_type
            rows = [getattr(module, name)]
            if "dynamic" in rope_type or rope_type == "longrope":
                rotary, more = copy.deepcopy(module), {"layer_type": layer_type} if layer_type else {}
                rows, like = [], getattr(module, name)
                rewind(rotary)
                for length in range(1, capacity + 1):
                    rotary(like, torch.tensor([[length - 1]], device=like.device), **more)
                    rows.append(getattr(rotary, name).clone())
            frequencies, sets = torch.stack(rows).double().cpu().unique_consecutive(dim=0, return_inverse=True)
            set_of_length = sets[torch.arange(-1, capacity).clamp(0, len(rows) - 1)]
            tables.append(_Table(frequencies, set_of_length, lambda m=module, n=name: getattr(m, n).double().clone()))
    return tables


def _standard_tables(config, head_dims: set[int], capacity: int) -> list[_Table]:
    """``base ** (-2 i / r)`` for every r, of models that keep angles and no frequencies (GPT-J, CodeGen)."""
    names = ("rope_theta", "rotary_emb_base", "rotary_base")
    bases = {10000.0} | {float(getattr(config, name)) for name in names if getattr(config, name, None)}
    made = []
    for base, rotated in itertools.product(sorted(bases), range(max(head_dims), 0, -2)):
        frequencies = (
            1.0 / base ** (torch.arange(0, rotated, 2) / rotated)
        ).double()  # float32, as models compute them
        made.append(_Table(frequencies[None], torch.zeros(capacity + 1, dtype=torch.int64), lambda f=frequencies: f))
    return made


def _state(module: nn.Module) -> tuple:
    """What a forward may change of one module: its attributes and, where it has frequencies, its buffers' content."""
    attributes = {k: dict(v) if k in ("_buffers", "_modules") else v for k, v in vars(module).items()}
    contents = {k: b.clone() for k, b in module._buffers.items() if b is not None and frequency_buffers(module)}
    return attributes, contents


def _restore(module: nn.Module, state: tuple) -> None:
    attributes, contents = state
    for name in vars(module).keys() - attributes.keys():
        delattr(module, name)
    for name, value in attributes.items():
        if name in ("_buffers", "_modules"):
            held = vars(module)[name]
            held.clear()
            held.update(value)
        else:
            vars(module)[name] = value
    for name, content in contents.items():
        module._buffers[name].copy_(content)
