"""Which rotation a layer applies, found by watching it, and its angles at any position.

A patched model is fed position 0 for every token, so its own rotation is the identity (times any attention scaling) and
queries and keys arrive unturned. The ops then turn them by angles computed here in float64 from integer positions:
exact at position 4,000,000 as at 5, whatever tables or float32 products the model itself would use.

To know the angles, `probe` runs one-token rows at a few positions through the model. A lone token attends to itself
alone, so every layer sees the same hidden states whatever the position is, and what differs between the rows of a key
is the rotation. It must agree with one of the model's own frequency tables, in one of the layouts below, or be nothing.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .reference import rotate


class UnsupportedModelError(ValueError):
    """The model cannot be patched exactly; the message names the layer and the reason. The model is unchanged."""


@dataclass(eq=False)
class Rope:
    """The rotation of one or more layers: pairs of dims, from `start` on, turned by ``position * frequency``.

    frequencies: (sets, r / 2) float64, radians per token. One set, unless the model picks frequencies by sequence
        length (dynamic NTK, longrope).
    set_of_length: (C + 1,) int64, which set serves a row of n tokens, n <= C; longer rows use the last.
    """

    start: int
    interleaved: bool
    frequencies: Tensor
    set_of_length: Tensor
    _on: dict = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo) -> "Rope":
        return self  # immutable, and known by identity

    @property
    def varies(self) -> bool:
        return len(self.frequencies) > 1

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = self.frequencies.to(device), self.set_of_length.to(device)
        return self._on[device]

    def sets(self, lengths: Tensor) -> Tensor:
        """Which frequency set serves rows of `lengths` tokens: any int64 shape in, the same out."""
        set_of_length = self._tables(lengths.device)[1]
        return set_of_length[lengths.clamp(0, len(set_of_length) - 1)]

    def table(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """``[cos | sin](position * frequency)`` in float32.

        positions: (..., P) int64; lengths: broadcastable to positions, tokens the row holds. Returns
            (..., P, 2, r / 2).
        """
        frequencies = self._tables(positions.device)[0]
        frequencies = frequencies[self.sets(lengths)] if self.varies else frequencies[0]
        angles = positions[..., None].double() * frequencies
        return torch.stack((angles.cos(), angles.sin()), dim=-2).float()


@dataclass
class ProbedLayer:
    """What one attention layer does: its rotation (None: no positions) and its own sliding window (None: none)."""

    rope: Rope | None
    own_window: int | None


class Recorder(DynamicCache):
    """Stands in for cache and attention during the probe: hands keys through, notes q, k, v, and returns v."""

    def __init__(self, window_size: int):
        super().__init__()
        self.window_size, self.seen, self.updated = window_size, {}, set()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.updated.add(layer_idx)
        return key_states, value_states

    def attend(self, module, query, key, value, mask, *_):
        layer_idx = getattr(module, "layer_idx", None)
        if layer_idx is None or layer_idx in self.seen:
            raise UnsupportedModelError(f"{type(module).__name__} (layer {layer_idx}) attends more than once a token")
        self.seen[layer_idx] = (module, query.detach(), key.detach(), value.detach(), mask)
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2).contiguous()

    def mask(self, mask_function, device) -> Tensor:
        """What the layer's mask lets through: its window as a one-element tensor, 0 for all, -1 for another pattern.

        Only windows below `window_size` matter, so visibility is asked for that many distances, from two far queries.
        """
        zero = torch.zeros((), dtype=torch.int64, device=device)
        distance = torch.arange(-1, self.window_size, device=device)
        windows = set()
        for query in (1 << 20, (1 << 20) + 7):
            visible = mask_function(zero, zero, zero + query, query - distance)
            visible = torch.as_tensor(visible, device=device).expand(distance.shape).tolist()
            window = sum(visible)
            windows.add(window if not visible[0] and visible[1 : window + 1] == [True] * window else -1)
        window = windows.pop() if len(windows) == 1 else -1
        return torch.tensor([[[[0 if window == self.window_size else window]]]], device=device)


def probe(model: PreTrainedModel, recorder: Recorder, capacity: int) -> list[ProbedLayer]:
    """Find what every layer of `model` rotates, by feeding the same token at several positions.

    model: its attention must already reach `recorder`. capacity: C, tokens. Returns one `ProbedLayer` per cache layer.
    Raises UnsupportedModelError with layer and reason.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    last = max(min(capacity, getattr(config, "max_position_embeddings", None) or capacity) - 1, 1)
    positions = sorted(p for p in {0, 1, 2, 3, 5, 7, last // 2, last} if p <= last)
    ids = torch.ones(len(positions), 1, dtype=torch.int64, device=model.device)
    position_ids = torch.tensor(positions, device=model.device)[:, None]
    tables = _frequency_tables(model, capacity)
    states = [(module, _state(module)) for module in model.modules() if _frequency_buffers(module)]
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would look like a position
    try:
        with torch.no_grad():
            model(input_ids=ids, position_ids=position_ids, past_key_values=recorder, use_cache=True)
            used = [getattr(module, buffer).double().clone() for module, buffer, *_ in tables]
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model that cannot even run the probe cannot be patched: say why, never swallow
        raise UnsupportedModelError(
            f"{name}: its forward failed on one-token rows with position_ids and a cache: {error!r}"
        ) from error
    finally:
        for module, state in states:
            _restore(module, state)
        for module in training:
            module.training = True

    if missing := sorted(set(range(config.num_hidden_layers)) - (recorder.seen.keys() & recorder.updated)):
        raise UnsupportedModelError(
            f"{name}, layer {missing[0]}: its attention does not go through transformers' attention interface with "
            "keys of its own (it bypasses the interface, shares another layer's keys, or is no attention)"
        )
    ropes: dict[tuple | None, Rope] = {}  # layers with one rotation share its tables
    layers = []
    for layer_idx in range(config.num_hidden_layers):
        module, query, key, value, mask = recorder.seen[layer_idx]
        where = f"{type(module).__name__}, layer {layer_idx}"
        if getattr(module, "is_causal", True) is False or mask is None or mask.item() < 0:
            raise UnsupportedModelError(
                f"{where}: its mask is neither causal nor a causal sliding window (encoders look both ways, chunked "
                "attention has borders)"
            )
        found = _match(where, positions, query, key, value, used)
        if found is not None and found not in ropes:
            index, start, interleaved = found
            ropes[found] = Rope(start, interleaved, *tables[index][2:])
        layers.append(ProbedLayer(ropes.get(found), mask.item() or None))
    if all(layer.rope is None for layer in layers):
        raise UnsupportedModelError(f"{name}: no rotation found in any layer, and nothing else that tells distances")
    return layers


def _match(where, positions, query, key, value, used) -> tuple[int, int, bool] | None:
    """The rotation that explains how q and k of one layer change with the position, or None if they do not change.

    used: the frequency tables as the model had them in the probe. Returns (which of them, first dim, interleaved).
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
            for interleaved in (False, True):
                error = max(
                    residual(x, rotate(x[:1].expand_as(x), angles.cos(), angles.sin(), start, interleaved))
                    for x in (query, key)
                )
                best = min(best, error)
                if error < tolerance:
                    return index, start, interleaved
    raise UnsupportedModelError(
        f"{where}: query and key change with the position, but not by a plain rotation with the model's frequencies "
        f"(best residual {best:.1e}, allowed {tolerance:.1e}): something acts after the rotation, or scales by position"
    )


def _frequency_buffers(module: nn.Module) -> list[str]:
    """Names of the frequency tables that a rotary module uses (``inv_freq``, ``sliding_attention_inv_freq``)."""
    names = (name for name, buffer in module.named_buffers(recurse=False) if buffer.dim() == 1)
    return [name for name in names if name.endswith("inv_freq") and "original" not in name and "long" not in name]


def _frequency_tables(model: nn.Module, capacity: int) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Every frequency buffer of the model: (module, buffer, frequencies, set_of_length), the last two as in `Rope`.

    Models that pick frequencies by sequence length are asked for every length up to the capacity, through a copy.
    """
    tables = []
    for module in model.modules():
        for name in _frequency_buffers(module):
            layer_type = name.removesuffix("inv_freq").removesuffix("_")
            rope_type = getattr(module, "rope_type", "default")
            rope_type = rope_type[layer_type] if isinstance(rope_type, dict) else rope_type
            rows = [getattr(module, name)]
            if "dynamic" in rope_type or rope_type == "longrope":
                rotary, more = copy.deepcopy(module), {"layer_type": layer_type} if layer_type else {}
                rows, like = [], getattr(module, name)
                setattr(rotary, name, getattr(rotary, name.replace("inv_freq", "original_inv_freq")).clone())
                rotary.max_seq_len_cached = rotary.original_max_seq_len  # what it saw before does not matter
                for length in range(1, capacity + 1):
                    rotary(like, torch.tensor([[length - 1]], device=like.device), **more)
                    rows.append(getattr(rotary, name).clone())
            frequencies, sets = torch.stack(rows).double().cpu().unique_consecutive(dim=0, return_inverse=True)
            tables.append((module, name, frequencies, sets[torch.arange(-1, capacity).clamp(0, len(rows) - 1)]))
    return tables


def _state(module: nn.Module) -> tuple:
    buffers = {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None}
    return {k: v for k, v in vars(module).items() if k != "_buffers"}, dict(module._buffers), buffers


def _restore(module: nn.Module, state: tuple) -> None:
    attributes, names, buffers = state
    for name in vars(module).keys() - attributes.keys() - {"_buffers"}:
        delattr(module, name)
    vars(module).update(attributes)
    module._buffers.clear()
    module._buffers.update(names)
    for buffer, content in buffers.values():
        buffer.copy_(content)
