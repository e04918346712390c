"""What every attention of a model does, found by watching a few tokens go through it.

One-token rows at a few positions run through the model. A lone token attends to itself alone, so every layer sees the
same hidden states whatever the position is, and what differs between the rows of a key is the rotation. It must agree
with one of the model's own frequency tables, in one of the layouts of `Rope`, or be nothing.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .introspect import (
    cache_name,
    counts_in_three,
    frequency_buffers,
    input_device,
    picks_by_length,
    rewind,
    takes_positions,
)
from .outputs import logits_of
from .recorder import ProbeRecord, Recorder
from .reference import rotate
from .rope import ProbedLayer, Rope, UnsupportedModelError

FAR = 100_000  # a position at which even the slowest pair has turned visibly


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
            return logits_of(model(input_ids=ids, use_cache=True, **more))
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
            first = {key: seen.query[0] for key, seen in rows.items()}
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
                run(torch.ones(len(positions), 1, dtype=torch.int64, device=device), positions)
                full = recorder.seen
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
        if not recorder.watches and (full[key].query[0] - first[key]).abs().max() > 1e-3 * first[key].abs().max():
            raise UnsupportedModelError(
                f"{seen.where}: its queries depend on how much the cache holds, {held} tokens or less: a smaller S + W "
                "may do (Llama-4 scales queries from position 8191 on)"
            )
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


def _axes(seen: ProbeRecord, start: int, interleaved: bool, frequencies: Tensor) -> Tensor:
    """Which position turns each pair: keys (4, heads, 1, dim) at the origin and at `FAR` along each axis."""
    keys, size = seen.key.double().transpose(1, 2).flatten(1, 2), 2 * len(frequencies)  # (4, heads, dim)
    angles = FAR * frequencies.to(keys.device)
    turned = rotate(keys[0], angles.cos(), angles.sin(), start, interleaved)
    miss = (keys[1:] - turned)[..., start : start + size].square().sum(1)  # (3, r)
    pairs = miss.unflatten(-1, (-1, 2)).sum(-1) if interleaved else miss.unflatten(-1, (2, -1)).sum(-2)
    return pairs.argmin(0).cpu()


def _length(x: Tensor) -> Tensor:
    return x.double().flatten(1).norm(dim=1)


def _scales_query(seen: ProbeRecord) -> bool:
    """Whether the query's length depends on the position (Llama-4, Ministral-3), while the key's does not."""
    query, key = (_length(x) for x in (seen.query, seen.key))
    noise = 1e-5 + 4 * torch.finfo(seen.key.dtype).eps
    return bool((query / query[0] - 1).abs().max() > noise >= (key / key[0] - 1).abs().max())


def _linear_bias(seen: ProbeRecord, config, capacity: int) -> tuple[float, Tensor | None]:
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
    if max(residual(x, x[:1].expand_as(x)) for x in (query, key)) < noise:
        return None
    position = torch.tensor(positions, dtype=torch.float64, device=key.device)
    errors = {}
    for index, frequency in enumerate(used):
        rotated = 2 * len(frequency)
        if rotated > key.shape[-1]:
            continue
        angles = (position[:, None] * frequency.to(key.device))[:, None]  # (P, 1, r / 2)
        for start in sorted({0, key.shape[-1] - rotated}):  # MLA turns the last dims
            for interleaved, sign in itertools.product((False, True), (1, -1)):
                errors[index, start, interleaved, sign] = max(
                    _by_dim(x, rotate(x[:1].expand_as(x), angles.cos(), sign * angles.sin(), start, interleaved))
                    for x in (query, key)
                )
    best = min(errors, key=errors.get, default=None)
    if best is not None and errors[best] < tolerance:
        return best
    raise UnsupportedModelError(
        f"{where}: query and key change with the position, but not by a plain rotation with the model's frequencies "
        f"(best residual {min(errors.values(), default=math.inf):.1e}, allowed {tolerance:.1e}): something acts after "
        "the rotation, or scales by position"
    )


def _by_dim(found: Tensor, expected: Tensor) -> float:
    """The largest error of a dim, relative to what the dim holds: loud ones say nothing of the others.

    found, expected: (positions, heads, dim).
    """
    size = lambda x: x.square().mean((0, 1)).sqrt()  # noqa: E731
    held = size(expected)
    return (size(found - expected) / held.clamp_min(1e-2 * held.square().mean().sqrt()).clamp_min(1e-30)).max().item()


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
            rows = [getattr(module, name)]
            if picks_by_length(module, layer_type):
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
        exponents = torch.arange(0, rotated, 2) / rotated
        frequencies = (1.0 / base**exponents).double()  # of float32, as models compute them
        made.append(_Table(frequencies[None], torch.zeros(capacity + 1, dtype=torch.int64), lambda f=frequencies: f))
    return made
