"""The ops as torch knows them, `torch.ops.sinkattn`: their arguments and, where there are no numbers, their results.

csrc and the kernels only register what they implement.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of a call of `ops.decode` or `ops.prefill`, in the order of the schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    counts: Tensor | None = None
    rotation: Tensor | None = None
    learned_logits: Tensor | None = None
    alibi_slopes: Tensor | None = None
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


class Paged(NamedTuple):
    """The tensors of a call of `ops.attend_pages`, in the order of the schema; the caches are pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    starts: Tensor
    lengths: Tensor
    block_table: Tensor
    rotation: Tensor | None = None


Call = Tensors | Paged

OWN_SIZES = {"prefill": ["dense_window"], "attend_pages": ["max_tokens"]}  # behind those that all ops have


class Sizes(NamedTuple):
    """The sizes of a call, in the order of the schema."""

    sink_size: int
    window_size: int
    scale: float
    softcap: float = 0.0
    rotary_start: int = 0
    interleaved: bool = False
    dense_window: int = 0
    max_tokens: int = 0

    def of(self, op: str) -> tuple:
        """Those that an op takes."""
        return (*self[:6], *(getattr(self, own) for own in OWN_SIZES.get(op, ())))


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? counts, "
    "Tensor? rotation, Tensor? learned_logits, Tensor? alibi_slopes, Tensor(c!)? k_scales, Tensor(d!)? v_scales, "
    "int sink_size, int window_size, float scale, float softcap=0., int rotary_start=0, bool interleaved=False"
    "{more}) -> Tensor"
)
_JOINED = ", Tensor? joined_values=None, Tensor? joined_logits=None"
_ARRIVALS = ", Tensor(e!)? arrivals=None"  # of those whose blocks meet in memory
_OVERLAP = ", bool overlap=False"  # csrc/cuda's own, as what follows it; splits -1: both are chosen
_SHARING = _OVERLAP + ", int splits=-1, bool cluster=False"
_DENSE = ", int dense_window=0"
ATTENTION = {
    "decode": _JOINED, "decode_cuda": _JOINED + _ARRIVALS + _SHARING, "decode_triton": _JOINED + _ARRIVALS,
    "prefill": _DENSE, "prefill_cuda": _DENSE + _ARRIVALS + _OVERLAP, "prefill_triton": _DENSE,
}  # fmt: skip
for _name, _more in ATTENTION.items():
    torch.library.define(f"sinkattn::{_name}", _SCHEMA.format(more=_more))
torch.library.define(
    "sinkattn::attend_shared",
    "(Tensor q, Tensor k_shared, Tensor v_shared, Tensor lengths, Tensor? rotation, Tensor? alibi_slopes, "
    "int window_size, float scale, float softcap, int rotary_start, bool interleaved, int parts) -> (Tensor, Tensor)",
)
_PAGES = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor starts, Tensor lengths, "
    "Tensor block_table, Tensor? rotation, int sink_size, int window_size, float scale, float softcap=0., "
    "int rotary_start=0, bool interleaved=False, int max_tokens=0{more}) -> Tensor"
)
OVER_PAGES = {"attend_pages": "", "attend_pages_cuda": _ARRIVALS + _SHARING, "attend_pages_triton": ""}
for _name, _more in OVER_PAGES.items():
    torch.library.define(f"sinkattn::{_name}", _PAGES.format(more=_more))
torch.library.define(
    "sinkattn::linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float norm_eps, float norm_shift, Tensor? residual, "
    "int activation) -> Tensor",  # a number of reference.ACTIVATION_NUMBERS
)

torch.library.define(
    "sinkattn::stack_state",
    "(Tensor x, int inner, int num_heads, int num_kv_heads, int head_dim, int layers, int slots) -> Tensor",
)
torch.library.define(  # of fuse/stack.py alone: the table holds addresses
    "sinkattn::stack",
    "(Tensor x, Tensor table, Tensor? logits_norm, Tensor? logits_weight, Tensor lengths, Tensor? counts, "
    "Tensor? rotation, Tensor(a!) state, int inner, int num_heads, int num_kv_heads, int head_dim, int slots, "
    "float scale, int rotary_start, bool interleaved, float norm_eps, float norm_shift, float head_eps, "
    "float head_shift, int activation) -> (Tensor, Tensor)",
)
torch.library.define(  # of rope.py, rows.py and choice.py: torch's kernels as one each
    "sinkattn::angles", "(Tensor lengths, Tensor? counts, Tensor frequencies, int tokens, int capacity) -> Tensor"
)
torch.library.define(
    "sinkattn::note",
    "(Tensor ids, Tensor? counts, Tensor(a!) lengths, Tensor(b!) digests, Tensor(c!) known, int base, int sink_size)"
    " -> ()",
)
torch.library.define("sinkattn::likeliest", "(Tensor scores) -> Tensor")


def check_devices(tensors: tuple) -> None:
    """Raise ValueError if not all tensors among the items are where the first is."""
    for x in tensors:
        if isinstance(x, Tensor) and x.device != tensors[0].device:
            raise ValueError(f"tensors on {x.device} and {tensors[0].device}: all must be on one device")


def _fake(q, k, v, *args, **kwargs):
    check_devices((q, k, v, *args, *kwargs.values()))  # one meta tensor among others is enough to get here
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


for _name in ATTENTION:
    torch.library.register_fake(f"sinkattn::{_name}", _fake)


def _fake_pages(q, k, v, *args, **kwargs):
    check_devices((q, k, v, *args, *kwargs.values()))
    return q.new_empty(*q.shape[:2], v.shape[2])


for _name in OVER_PAGES:
    torch.library.register_fake(f"sinkattn::{_name}", _fake_pages)


@torch.library.register_fake("sinkattn::attend_shared")
def _fake_shared(q, k_shared, v_shared, lengths, *args):
    wide, parts = torch.promote_types(q.dtype, torch.float32), args[-1]
    values = q.new_empty(parts, *q.shape[:2], v_shared.shape[3], dtype=wide)
    return values, q.new_empty(parts, *q.shape[:2], dtype=wide)


@torch.library.register_fake("sinkattn::linear")
def _fake_linear(x, weight, bias, norm_weight, norm_eps, norm_shift, residual, activation):
    return x.new_empty(x.shape[0], weight.shape[0] // (2 if activation else 1))


@torch.library.register_fake("sinkattn::angles")
def _fake_angles(lengths, counts, frequencies, tokens, capacity):
    shape = len(lengths), tokens, 2, 2, len(frequencies)
    return lengths.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("sinkattn::note")
def _fake_note(*args):
    return None


@torch.library.register_fake("sinkattn::likeliest")
def _fake_likeliest(scores):
    return scores.new_empty(scores.shape[:1], dtype=torch.int64)
