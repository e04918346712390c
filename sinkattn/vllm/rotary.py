"""vLLM's rotary embeddings, replaced by ones that turn nothing: queries and keys reach attention as they come.

vLLM looks angles up in a table of as many rows as the model was trained for, in the model's dtype. Attention turns them
instead (`backend`), by angles that `sinkattn.rope` computes in float64 from integer positions. That is exact at any
length, and a query is turned to two places from the same unturned numbers.

Which rotation an attention applies is known by what comes before it: the embedding notes what it was given, and
attention asks for it (`taken`). What does not fit raises `UnsupportedModelError`: attention without a rotation that is
known here, and queries or keys that change on the way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers import rotary_embedding as vllm_ropes

from ..rope import Rope, UnsupportedModelError
from .settings import current_sizes

REPLACED = (  # not those of dynamic NTK: their frequencies depend on the length, and vLLM takes those of the longest
    vllm_ropes.RotaryEmbedding,
    vllm_ropes.Llama3RotaryEmbedding,
    vllm_ropes.YaRNScalingRotaryEmbedding,
    vllm_ropes.LinearScalingRotaryEmbedding,
    vllm_ropes.NTKScalingRotaryEmbedding,
)


@dataclass(eq=False)
class Rotation:
    """A rotation as `sinkattn.rope` knows it, and the factor by which the model scales what it turns (YaRN)."""

    rope: Rope
    factor: float

    def table(self, positions: Tensor) -> Tensor:
        """``factor * [cos | sin]`` of (..., P) int64 positions, (..., P, 2, r / 2) float32."""
        return self.rope.table(positions) * self.factor


def rotation_of(module, frequencies: Tensor) -> Rotation:
    """The rotation of one of vLLM's modules: frequencies in radians per token as it computed them, (r / 2,) float32.

    Raises UnsupportedModelError if the module's own table is not ``factor * [cos | sin](position * frequency)``.
    """
    table = module._compute_cos_sin_cache()[:1000].double().cpu()
    frequencies = frequencies.double().cpu()
    scalings = getattr(module, "scaling_factors", [1.0])  # of positions; several are for LoRA
    angles = torch.arange(len(table))[:, None] * frequencies / scalings[0]
    factor = float(table[0, 0])
    expected = factor * torch.cat((angles.cos(), angles.sin()), dim=-1)
    if len(scalings) > 1 or table.shape != expected.shape or (table - expected).abs().max() > 1e-3 * factor:
        raise UnsupportedModelError(f"sinkattn does not know the rotation of vLLM's {type(module).__name__}")
    one_set = torch.zeros(1, dtype=torch.int64)
    return Rotation(Rope(0, not module.is_neox_style, (frequencies / scalings[0])[None], one_set), factor)


class _Way:
    """From an embedding to the attention behind it, within one forward of one model."""

    given: tuple[Rotation, list[Tensor], list[Tensor]] | None = None  # query and key, and copies of them
    unchecked = 0  # attentions that have not compared yet: there are copies until all have
    has_embedding = False


def check_embedding() -> None:
    """Raise UnsupportedModelError if no rotary embedding that is known here was built: then none comes before any."""
    if not _Way.has_embedding:
        raise UnsupportedModelError("the model has no rotary embedding that sinkattn knows of")


def expect_attention() -> None:
    """Say that there is one more attention, which will call `taken`."""
    _Way.unchecked += 1


def taken(layer: str, query: Tensor, key: Tensor, known: Rotation | None) -> Rotation:
    """The rotation that an attention applies to what it is given.

    known: what this returned for the layer before. Query and key have to be the tensors that the embedding was given,
    and the first time they are compared with copies of those, number by number.
    """
    given, _Way.given = _Way.given, None
    if given is None:
        raise UnsupportedModelError(f"{layer}: no rotation that sinkattn knows of comes before this attention")
    rotation, before, copies = given
    for i, (name, x) in enumerate((("query", query), ("key", key))):
        is_same = x.data_ptr() == before[i].data_ptr() and x.numel() == before[i].numel()
        if not is_same or (known is None and not torch.equal(x.reshape(-1), copies[i].reshape(-1))):
            raise UnsupportedModelError(f"{layer}: something changes the {name} between rotation and attention")
    if known is None:
        _Way.unchecked -= 1
    elif rotation is not known:
        raise UnsupportedModelError(f"{layer}: its rotation is not the one that it was before")
    return rotation


def unturned(base: type) -> type:
    """The class that replaces one of vLLM's: where sinkattn is not asked for, its objects are of vLLM's class."""

    class Unturned(base):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            if current_sizes() is None:
                self.__class__ = base
            else:
                self.rotation = rotation_of(self, self.frequencies)
                _Way.has_embedding = True

        def _compute_inv_freq(self, *args) -> Tensor:
            self.frequencies = super()._compute_inv_freq(*args)
            return self.frequencies

        def forward(self, positions: Tensor, query: Tensor, key: Tensor | None = None, *args):
            if key is None or args:
                raise UnsupportedModelError("sinkattn does not serve layers that turn queries alone, or by offsets")
            if _Way.given is not None:
                raise UnsupportedModelError("a rotation is not followed by an attention of sinkattn")
            copies = [query.clone(), key.clone()] if _Way.unchecked > 0 else []
            _Way.given = (self.rotation, [query, key], copies)
            return query, key

    Unturned.__qualname__ = Unturned.__name__ = f"Unturned{base.__name__}"
    return Unturned


def register() -> None:
    """Have vLLM build the replacing classes."""
    for base in REPLACED:
        if base.__name__ in op_registry_oot:
            raise RuntimeError(f"another plugin replaces vLLM's {base.__name__}")
        name = base.name
        CustomOp.register_oot(unturned(base), name=base.__name__).name = name  # the name by which users switch it
