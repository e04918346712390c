"""CUDA kernels without a GPU: their source, compiled for the host (tests/emulated), against float64.

csrc/cuda/sm80/stack.cu (all layers as one kernel), linear.cu, step.cu and decode.cu, and of prefill, csrc/cuda/sm90,
what comes before its products. Blocks are threads, warps run in random order, what is not written yet is not a number,
and what lies behind is not to be touched.
"""

import copy
import ctypes
import itertools
import mmap
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import same_bits
from helpers import random_ids
from oracle import streaming_logits
from sinkattn import SinkCache, captured, patch, reference
from sinkattn.fuse import stack as fused
from sinkattn.rope import Rope
from tiny import tiny

LIBC = ctypes.CDLL(None)
ROOT = Path(__file__).parent.parent
EMULATED = ROOT / "tests" / "emulated"
INSTRUCTIONS = {  # files of csrc, and what stands in for them
    "cuda/instructions.h": "instructions.h",
    "cuda/sm80/instructions.h": "ampere.h",
    "cuda/sm90/hopper.h": "hopper.h",
}
SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(uint4|char) shared\[\];")
OURS = r"\1* const shared = static_cast<\1*>(emulated::dynamic_shared());"
ACTIVATIONS = {1: F.silu, 2: lambda x: F.gelu(x, approximate="tanh"), 3: F.gelu}  # as Activation of csrc counts them
DIMS = [(64, 64), (128, 128), (192, 128)]  # head_dim and v_head_dim of decode
KINDS = [None, torch.int8, torch.float8_e4m3fn]  # of its caches, as Stored of csrc/cuda counts them
ERRORS = {torch.float16: 0.005, torch.bfloat16: 0.04}  # root mean square over the spread: some ten roundings

pytestmark = [pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"), pytest.mark.xdist_group("emulated")]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a file of tests/emulated, over the source with the instructions of a GPU exchanged for emulated ones."""
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(ROOT / "csrc", folder, dirs_exist_ok=True)
    for path, name in INSTRUCTIONS.items():
        (folder / path).write_text(f'#include "{EMULATED / name}"\n')
    for name in ("sm80/stack.cu", "sm80/linear.cu", "sm80/decode_kernel.h", "sm90/prefill_kernel.h"):
        source = folder / "cuda" / name
        text, count = SHARED.subn(OURS, source.read_text())
        assert count == 1
        source.write_text(text)
    source = folder / "cuda/sm90/prefill_tile.h"  # an L2 of two heads
    assert source.read_text().count("24 << 20") == 1
    source.write_text(source.read_text().replace("24 << 20", "16 << 10"))

    def built(name):
        flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-pthread"]
        places = [f"-I{folder}", f"-I{EMULATED}", f"-I{EMULATED / 'include'}"]
        library = folder / f"{name}.so"
        subprocess.run(["g++", *flags, *places, EMULATED / f"{name}.cpp", "-o", library], check=True)
        return ctypes.CDLL(library)

    return built


@pytest.fixture(scope="module")
def stack(build):
    library = build("stack")
    library.state_bytes.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def linear(build):
    return build("linear")


@pytest.fixture(scope="module")
def step(build):
    return build("step")


@pytest.fixture(scope="module")
def decode(build):
    return build("decode")


@pytest.fixture(scope="module")
def prefill(build):
    library = build("prefill")
    library.run_prefill.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def gather(build):
    return build("gather")


@dataclass
class Case:
    """A stack of layers, and what it runs on. reach: S, W and slack. counts: whether rows wait at times."""

    lengths: list[int]
    heads: tuple[int, int]
    dim: int = 64
    hidden: int = 128
    inner: int = 192
    layers: int = 2
    reach: tuple[int, int, int] = (4, 10, 16)
    dtype: torch.dtype = torch.float16
    has_head_norms: bool = False
    has_bias: bool = False
    shift: float = 0.0
    activation: int = 1
    rotary: tuple[int, int, bool] = (0, 32, False)  # first dim, dims / 2, interleaved
    counts: bool = False
    blocks: int = 5
    loud: float = 1.0  # how large x is, and weights of norms
    vocabulary: int = 0  # of a head behind the layers


def _fenced(x: Tensor | None) -> Tensor | None:
    """The same at the end of its pages: whoever goes past it, or far before it, ends the process."""
    if x is None:
        return None
    page, size = mmap.PAGESIZE, x.nbytes
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + 2 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (begin, begin + page + pages):
        assert LIBC.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
    at = (page + pages - size) // 16 * 16  # as aligned as the kernel asks for
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=at).view(x.shape).copy_(x)


def _number(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _all(numbers, kind=ctypes.c_int64):
    return (kind * len(numbers))(*numbers)


class Emulated:
    """The layers of a case with random weights, by the kernel, and their definition in float64."""

    def __init__(self, library, case: Case):
        self.library, self.case = library, case
        sinks, window, slack = case.reach
        heads, kv_heads = case.heads
        self.rows, self.slots = len(case.lengths), sinks + window + slack
        outs = (heads + 2 * kv_heads) * case.dim, case.hidden, 2 * case.inner, case.hidden
        ins = case.hidden, heads * case.dim, case.hidden, case.inner
        self.lengths, self.layers, self.caches = torch.tensor(case.lengths), [], []

        def new(*shape, by=1.0):
            return (torch.randn(shape) * by).to(case.dtype)

        for _ in range(case.layers):
            by = 1 / case.loud, 1.0, 1 / case.loud, 1.0  # what norms made loud is not any more
            weights = [new(out, into, by=of * into**-0.5) for out, into, of in zip(outs, ins, by, strict=True)]
            biases = [new(out, by=0.3) if case.has_bias else None for out in outs]
            norms = [((torch.rand(case.hidden) + 0.5) * case.loud).to(case.dtype) for _ in range(2)]
            of_heads = [(torch.rand(case.dim) + 0.5).to(case.dtype) if case.has_head_norms else None for _ in range(2)]
            self.layers.append((weights, biases, norms, of_heads))
            cache = [new(self.rows, kv_heads, self.slots, case.dim) for _ in range(2)]
            for row, length in enumerate(case.lengths):
                gone = range(max(length - window - slack, sinks), length - window + 1)  # from the window
                for x in cache:
                    x[row, :, length:] = torch.nan  # nothing where the ring is not full yet
                    for n in gone:
                        x[row, :, sinks + (n - sinks) % (window + slack)] = torch.nan
            self.caches.append([_fenced(x) for x in cache])
        self.layers = [tuple([_fenced(x) for x in kind] for kind in layer) for layer in self.layers]
        self.head = None, None
        if case.vocabulary:
            norm = ((torch.rand(case.hidden) + 0.5) * case.loud).to(case.dtype)
            self.head = _fenced(norm), _fenced(new(case.vocabulary, case.hidden, by=case.hidden**-0.5 / case.loud))
        tensors = [
            [*map(_number, (*weights, *biases, *norms, *of_heads, *cache)), sinks, window + slack, window]
            for (weights, biases, norms, of_heads), cache in zip(self.layers, self.caches, strict=True)
        ]
        self.table = torch.tensor(tensors)
        self.sizes = _all(
            [self.rows, case.hidden, case.inner, heads, kv_heads, case.dim, case.layers, self.slots, case.blocks]
        )
        self.memory = torch.zeros(library.state_bytes(self.sizes) // 8 + 2, dtype=torch.int64)
        self.state = -(-self.memory.data_ptr() // 16) * 16
        self.numbers = case.dim**-0.5, 1e-5, case.shift, 1e-6, 0.0

    def step(self, x: Tensor, rotation: Tensor, counts: Tensor | None) -> Tensor:
        """What the last layer gives, and logits behind it."""
        case, out = self.case, torch.full_like(x, torch.nan)
        logits = _fenced(x.new_full((self.rows, case.vocabulary), torch.nan)) if case.vocabulary else None
        start, half, interleaved = case.rotary
        more = [start, half, interleaved, case.dtype == torch.bfloat16, case.activation, random.randrange(1 << 30)]
        more.append(case.vocabulary)
        given = [self.table, x, out, None, self.lengths, counts, rotation, *self.head, logits]
        pointers = [ctypes.c_void_p(_number(tensor)) for tensor in given]
        pointers[3] = ctypes.c_void_p(self.state)
        assert self.library.run_stack(self.sizes, _all(more), _all(self.numbers, ctypes.c_double), *pointers) == 0
        return out if logits is None else torch.cat((out, logits), dim=1)

    def definition(self, x: Tensor, rotation: Tensor, counts: Tensor | None) -> Tensor:
        """The same, in float64 but for what the kernel keeps in 16 bits; the caches are written."""
        case, (heads, kv_heads) = self.case, self.case.heads
        scale, eps, shift, head_eps, _ = self.numbers
        start, _, interleaved = case.rotary
        sizes = dict(sink_size=case.reach[0], window_size=case.reach[1], scale=scale)

        def kept(y):
            return y.to(case.dtype).double()

        def norm(y, weight, eps, shift=0.0):
            return kept(F.rms_norm(y, y.shape[-1:], None, eps) * (weight.double() + shift))

        x = x.double()
        for (weights, biases, norms, of_heads), cache in zip(self.layers, self.caches, strict=True):
            parts = zip(weights, biases, strict=True)
            products = [partial(F.linear, weight=w.double(), bias=b if b is None else b.double()) for w, b in parts]
            qkv = kept(products[0](norm(x, norms[0], eps, shift))).view(self.rows, -1, 1, case.dim)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
            if case.has_head_norms:
                q, k = norm(q, of_heads[0], head_eps), norm(k, of_heads[1], head_eps)
            wide = [y.double().nan_to_num(0.0) for y in cache]  # 0 times what is not seen would not be a number
            turned = rotation if case.rotary[1] else None
            more = dict(rotary_start=start, interleaved=interleaved)
            found = reference.attention(q, k, v, *wide, self.lengths, counts, turned, *[None] * 4, **sizes, **more)
            for y, new in zip(cache, wide, strict=True):
                y.copy_(torch.where(y.isnan() & (new == 0), y, new))
            x = kept(x + products[1](kept(found.flatten(1))))
            gate, up = products[2](norm(x, norms[1], eps, shift)).chunk(2, dim=-1)
            x = kept(x + products[3](kept(ACTIVATIONS[case.activation](gate) * up)))
        if not case.vocabulary:
            return x
        return torch.cat((x, F.linear(norm(x, self.head[0], eps, shift), self.head[1].double())), dim=1)

    def compare(self, steps: int) -> None:
        case = self.case
        sizes = [case.hidden, case.vocabulary]
        for _ in range(steps):
            x = (torch.randn(self.rows, case.hidden) * case.loud).to(case.dtype)
            angles = 6 * torch.rand(self.rows, 1, 2, 1, max(case.rotary[1], 1))
            rotation = torch.cat((angles.cos(), angles.sin()), dim=3)
            counts = torch.randint(0, 2, (self.rows,)) if case.counts else None
            before = [[y.clone() for y in cache] for cache in self.caches]
            found = self.step(x, rotation, counts)
            written = [[y.clone() for y in cache] for cache in self.caches]
            for cache, old in zip(self.caches, before, strict=True):
                for y, was in zip(cache, old, strict=True):
                    y.copy_(was)
            expected, goes_on = self.definition(x, rotation, counts), slice(None)
            if counts is not None:
                goes_on = counts > 0
            for cache, new in zip(self.caches, written, strict=True):
                for y, is_ in zip(cache, new, strict=True):
                    difference = (y.double() - is_.double()).abs().nan_to_num(0)
                    assert torch.equal(y.isnan(), is_.isnan()) and difference.max() < 32 * torch.finfo(case.dtype).eps
                    y.copy_(is_)
            error = (found.double() - expected)[goes_on]
            for part, of in zip(*(y.split_with_sizes(sizes, 1) for y in (error, expected[goes_on])), strict=True):
                if part.numel():
                    assert (part.square().mean().sqrt() / of.std()).item() < ERRORS[case.dtype]
            self.lengths += 1 if counts is None else counts


CASES = [
    Case([0], (3, 1), layers=3),  # from the first token on
    Case([3, 60], (3, 1), counts=True, has_bias=True),
    Case([200], (4, 2), dim=128, has_head_norms=True, rotary=(0, 64, False), dtype=torch.bfloat16),
    Case([31, 100], (7, 1), reach=(0, 33, 0), has_bias=True),
    Case([60], (2, 2), dim=128, reach=(37, 5, 3), rotary=(0, 64, False), activation=2, shift=1.0),
    Case([1000], (5, 1), reach=(2, 290, 10), rotary=(8, 16, True), activation=3, blocks=9),
    Case([15], (4, 1), rotary=(0, 0, False)),
    Case([15, 99], (8, 2), hidden=640, inner=704, blocks=3),
    Case([50], (2, 2), hidden=64, blocks=1),
    Case([34], (8, 2), dim=128, reach=(17, 1, 16), rotary=(0, 64, False)),  # the new slot is the next split's first
    Case([600, 1000], (3, 1), reach=(2, 290, 10), blocks=2),  # a block has more slots than fit at a time
    Case([295], (4, 1), dim=128, reach=(7, 290, 10), rotary=(0, 64, False), blocks=1, dtype=torch.bfloat16),
    Case([9], (2, 1), loud=500.0),  # x times a norm's weight is more than float16 holds
    Case([9], (2, 1), loud=500.0, vocabulary=330),
    Case([3, 60], (3, 1), counts=True, vocabulary=1002, blocks=3, dtype=torch.bfloat16),
    Case([5], (2, 2), hidden=576, vocabulary=6, blocks=7),  # a block has no part of the head
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.heads[0]}of{case.heads[1]}x{case.dim}")
def test_stack(case, stack):
    Emulated(stack, case).compare(3)


def test_stack_through_the_wrap(stack):
    """C + R + 3 steps from the empty cache on, and the launches go on from each other's state."""
    case = Case([0, 11], (2, 1), hidden=64, inner=64, reach=(3, 6, 2), blocks=4)
    emulated = Emulated(stack, case)
    emulated.compare(20)
    epoch = torch.frombuffer((ctypes.c_int32 * 1).from_address(emulated.state), dtype=torch.int32)
    assert epoch.item() == 20 * (case.layers + 1)


def test_stacks_of_random_sizes(stack):
    for _ in range(8):
        kv_heads, group = random.choice([1, 2, 3]), random.randint(1, 8)
        sinks, window, slack = (
            random.choice([0, 1, 4, 17, 40]),
            random.choice([1, 2, 7, 33, 100]),
            random.choice([0, 1, 16]),
        )
        rows, edge = random.choice([1, 2]), sinks + window + slack
        edges = [0, 1, max(sinks - 1, 0), sinks, sinks + 1, edge - 1, edge, edge + 1, 3 * edge + 7]
        dim = random.choice([64, 64, 128])
        Emulated(
            stack,
            Case(
                random.choices(edges, k=rows), (kv_heads * group, kv_heads), dim, 64 * random.randint(1, 4),
                64 * random.randint(1, 5), random.randint(1, 3), (sinks, window, slack), torch.float16,
                random.random() < 0.5, random.random() < 0.5, random.choice([0.0, 1.0]), random.randint(1, 3),
                (0, dim // 2, False), random.random() < 0.4, random.randint(1, 8),
                vocabulary=random.choice([0, 2 * random.randint(1, 200)]),
            ),
        ).compare(2)  # fmt: skip


def test_stacks_that_are_not_served(stack):
    def served(rows=1, hidden=128, inner=128, heads=2, kv_heads=1, dim=64, layers=2):
        return stack.state_bytes(_all([rows, hidden, inner, heads, kv_heads, dim, layers, 32, 8]))

    assert served() and served(rows=2)
    assert not served(rows=3) and not served(dim=96) and not served(hidden=96) and not served(inner=72)
    assert not served(inner=64 * 1024)  # more than fits into shared memory
    assert served(hidden=4096) and not served(hidden=4096 + 64)


@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_linear(rows, linear):
    """Random sizes, with and without norm, bias, residual and gate; a weight whose rows lie apart."""
    for _ in range(5):
        dtype = random.choice([torch.float16, torch.bfloat16])
        into, out = 8 * random.choice([1, 3, 16, 80, 131]), 2 * random.choice([1, 8, 33, 70, 150])
        activation, shift = random.choice([0, 0, 1, 2, 3]), random.choice([0.0, 1.0])
        results = out // 2 if activation else out

        def new(*shape, by=1.0, dtype=dtype):
            return (torch.randn(shape) * by).to(dtype)

        x, weight = new(rows, into), new(out, into + 8, by=into**-0.5)[:, :into]
        bias, norm, residual = (x if random.random() < 0.5 else None for x in (new(out), new(into), new(rows, results)))
        found = torch.full((rows, results), torch.nan, dtype=dtype)
        blocks = random.choice([1, 3, 9])
        sizes = [rows, into, out, into + 8, activation, dtype == torch.bfloat16, blocks, random.randrange(1 << 30)]
        pointers = [ctypes.c_void_p(_number(t)) for t in (x, weight, bias, norm, residual, found)]
        assert linear.run_linear(_all(sizes), _all((1e-5, shift), ctypes.c_double), *pointers) == 0
        y = x.double()
        if norm is not None:
            y = (F.rms_norm(y, (into,), None, 1e-5) * (norm.double() + shift)).to(dtype).double()
        y = F.linear(y, weight.double(), None if bias is None else bias.double())
        if activation:
            gate, up = y.chunk(2, dim=1)
            y = ACTIVATIONS[activation](gate) * up
        y = y if residual is None else y + residual.double()
        assert (found.double() - y).abs().max() < 16 * torch.finfo(dtype).eps * y.abs().max()


def test_angles(step):
    """Of tokens anywhere, with and without padding; those that sinks see stay at the end of the cache."""
    rows, capacity = 3, 20
    for tokens, half in (1, 32), (1, 5), (7, 24), (16, 1):
        lengths = torch.tensor(random.choices([0, 1, capacity - 1, capacity, 4_000_000], k=rows))
        counts = torch.randint(0, tokens + 1, (rows,)) if random.random() < 0.5 else None
        frequencies = 10000.0 ** -torch.arange(half).double()
        found = torch.full((rows, tokens, 2, 2, half), torch.nan)
        pointers = [ctypes.c_void_p(_number(x)) for x in (lengths, counts, frequencies, found)]
        assert step.run_angles(_all([rows, tokens, half, capacity, random.randrange(1 << 30)]), *pointers) == 0
        rope = Rope(0, False, frequencies[None], torch.zeros(capacity + 1, dtype=torch.int64))
        torch.testing.assert_close(found, rope.table_of_step(lengths, counts, tokens, capacity), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("has_counts", [False, True])
def test_note(has_counts, step):
    """Round the ring and on, beside torch's kernels: rows that take nothing keep their id for later."""
    sinks, ring, rows = 3, 5, 200  # two blocks
    base = 6364136223846793005
    lengths, digests = torch.randint(0, 30, (rows,)), torch.randint(-(2**62), 2**62, (rows,))
    known = torch.randint(0, 99, (rows, sinks + ring + 1))
    for _ in range(2 * ring):
        ids = torch.randint(0, 50000, (rows,))
        counts = torch.randint(0, 2, (rows,)) if has_counts else None
        slots = reference.slot_of(lengths, sinks, ring)
        expected = known.scatter(1, slots[:, None], ids[:, None])
        taken = torch.ones_like(ids) if counts is None else counts
        after = torch.where(taken > 0, digests * base + ids, digests), lengths + taken
        pointers = [ctypes.c_void_p(_number(x)) for x in (ids, counts, lengths, digests, known)]
        sizes = [rows, known.shape[1], base, sinks, ring, random.randrange(1 << 30)]
        assert step.run_note(_all(sizes), *pointers) == 0
        assert torch.equal(known, expected) and torch.equal(digests, after[0]) and torch.equal(lengths, after[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 7, 64, 97, 4096, 50257])
def test_likeliest(vocabulary, dtype, step):
    """The first of the largest, wherever a row begins: few values, zeros of both signs, infinite ones, NaN."""
    rows, apart = 6, vocabulary + 3
    memory = torch.full((rows * apart + 8,), torch.inf, dtype=dtype)  # beside the rows
    begin = random.randrange(8)
    scores = memory[begin : begin + rows * apart].view(rows, apart)[:, :vocabulary]
    scores.copy_(torch.randint(-3, 4, scores.shape))
    scores[1] = -torch.inf
    scores[2, vocabulary // 3 :: 7] = torch.nan
    scores[3] = torch.randn(vocabulary)
    scores[4] = -torch.rand(vocabulary) - 1
    scores[4, vocabulary // 2 :] = -0.0
    scores[4, vocabulary // 2 + 1 :: 2] = 0.0
    ids = torch.full((rows,), -1)
    sizes = [
        rows,
        apart,
        vocabulary,
        [torch.float32, torch.float16, torch.bfloat16].index(dtype),
        random.randrange(1 << 30),
    ]
    assert step.run_likeliest(_all(sizes), ctypes.c_void_p(_number(scores)), ctypes.c_void_p(_number(ids))) == 0
    wide = scores.float()
    first = (wide == wide.amax(-1, keepdim=True)) | wide.isnan()
    assert ids.tolist() == first.int().numpy().argmax(-1).tolist()


every_kind = pytest.mark.parametrize("stored", KINDS, ids=["16 bits", "int8", "float8"])


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("heads", [(3, 1), (8, 2), (7, 1), (20, 2)])
@every_kind
def test_decode(stored, heads, tokens, decode):
    """One token a row or a few, at random lengths, in one block or several that meet in memory."""
    for _ in range(3):
        num_heads, kv_heads = heads if tokens == 1 or heads[0] // heads[1] < 9 else (heads[0] // 2, heads[1])
        sinks, window = random.choice([0, 1, 4, 37]), random.choice([1, 7, 33, 120])
        ring, rows = window + tokens - 1 + random.choice([0, 3, 16]), random.choice([1, 2])
        edge = sinks + ring
        lengths = random.choices([0, 1, sinks, edge - 1, edge, edge + 1, 3 * edge + 7], k=rows)
        counts = torch.randint(0, tokens + 1, (rows,)) if random.random() < 0.5 else None
        lengths = torch.tensor(lengths)
        check_decode(decode, num_heads, kv_heads, tokens, sinks, window, ring, lengths, counts, stored=stored)


@pytest.mark.parametrize("tokens", [1, 3])
@every_kind
def test_decode_all_round_the_ring(stored, tokens, decode):
    """Wherever the newest token lies in a ring with spare slots: tiles that are all seen are told from those that are
    not quite."""
    sinks, window, ring = 1, 33, 33 + tokens - 1 + 3
    lengths = torch.arange(2 * ring, 3 * ring) + sinks
    for _ in range(2):
        check_decode(decode, 2, 1, tokens, sinks, window, ring, lengths, None, is_plain=True, stored=stored)


@pytest.mark.parametrize("dims", [(80, 80), (96, 96), (192, 192), (256, 256)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
@every_kind
def test_decode_of_other_dims(stored, tokens, dims, decode):
    lengths = torch.tensor([2, 200])
    check_decode(decode, 4, 2, tokens, 4, 60, 64, lengths, None, stored=stored, dims=dims)


@pytest.mark.parametrize("stored", KINDS[1:], ids=["int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_all_numbers_of_8_bits(dtype, stored, decode):
    """Each of the 256, in a key and in a value: one key alone is seen, so that a score says what it was by its weight
    beside a learned logit, and the output what the value was."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(stored)
    numbers = numbers[numbers.float().isfinite()]
    rows, slots, dim = len(numbers), 2, 64
    q, k, v = torch.zeros(rows, 2, 1, dim), torch.zeros(rows, 1, 1, dim), torch.zeros(rows, 1, 1, dim)
    q[..., 5], k[..., 0] = 1 / 64, 1.0
    caches = [torch.zeros(rows, 1, slots, dim, dtype=torch.int8).view(stored) for _ in range(2)]
    caches[0][:, 0, 0, 5], caches[1][:, 0, 0, 33] = numbers, numbers
    scales, lengths = [torch.ones(rows, 1, slots) for _ in range(2)], torch.ones(rows, dtype=torch.int64)
    q, k, v, out = (x.to(dtype) for x in (q, k, v, torch.zeros(rows, 1, 2, dim)))
    sizes = [rows, 2, 1, 1, dim, dim, 0, slots, slots, 0, 0, 0, dtype == torch.bfloat16, 1, 0, 1, KINDS.index(stored)]
    tensors = q, k, v, *caches, out, lengths, None, None, None, None, *scales, None, None
    pointers = [ctypes.c_void_p(_number(x)) for x in tensors]
    assert decode.run_decode(_all(sizes), _all((1.0, 0.0), ctypes.c_double), *pointers) == 0
    weight = torch.sigmoid(numbers.double() / 64)  # beside that of the new key, whose score and value are zero
    expected = (weight * numbers.double())[:, None].expand(rows, 2)
    torch.testing.assert_close(out[:, 0, :, 33].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("stored", KINDS[1:], ids=["int8", "float8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["key", "value"])
def test_decode_of_what_is_not_finite(what, bad, stored, decode):
    """Makes NaN of its head's outputs, and of no other's; a row of zeros has a scale of 0."""
    q, k, v = (torch.randn(1, heads, 1, 64).half() for heads in (4, 2, 2))
    (k if what == "key" else v)[0, 1, 0, 7] = bad
    v[0, 0] = 0
    caches = [torch.ones(1, 2, 20, 64, dtype=torch.int8).view(stored) for _ in range(2)]
    scales, out = [torch.ones(1, 2, 20) for _ in range(2)], torch.zeros(1, 1, 4, 64).half()
    sizes = [1, 4, 2, 1, 64, 64, 4, 16, 16, 0, 0, 0, False, 1, 0, 1, KINDS.index(stored)]
    tensors = q, k, v, *caches, out, torch.tensor([50]), None, None, None, None, *scales, None, None
    pointers = [ctypes.c_void_p(_number(x)) for x in tensors]
    assert decode.run_decode(_all(sizes), _all((0.125, 0.0), ctypes.c_double), *pointers) == 0
    assert out[0, 0, :2].isfinite().all() and out[0, 0, 2:].isnan().all()
    slot = int(reference.slot_of(torch.tensor(50), 4, 16))
    for new, cache, scale in zip((k, v), caches, scales, strict=True):
        number, expected = reference.quantised(new[0, :, 0], stored)
        assert same_bits(cache[0, :, slot], number) and same_bits(scale[0, :, slot].isnan(), expected.isnan())
    assert scales[1][0, 0, slot] == 0


def check_decode(
    decode, num_heads, kv_heads, tokens, sinks, window, ring, lengths, counts, is_plain=False, stored=None, dims=None
) -> None:
    """Against the definition in float64. Dims, dtype, rotation and what else a call has are random. is_plain: neither a
    softcap nor slopes, for which every tile is masked. stored: what caches in 8 bits hold; keys then turn exactly, so
    that the same bits are stored. Slots that nobody sees hold NaN."""
    dtype, (dim, v_dim) = random.choice([torch.float16, torch.bfloat16]), dims or random.choice(DIMS)
    rows, half, start, slots = len(lengths), random.choice([0, 8, dim // 2]), 0, sinks + ring

    def new(*shape, dtype=dtype):
        return torch.randn(shape).to(dtype)

    q, k, v = (
        new(rows, num_heads, tokens, dim),
        new(rows, kv_heads, tokens, dim),
        new(rows, kv_heads, tokens, v_dim),
    )
    angles = 6 * torch.rand(rows, tokens, 2, 1, max(half, 1))
    rotation = torch.cat((angles.cos(), angles.sin()), dim=3)
    held = reference.held_positions(lengths, sinks, ring)
    dead = (held < 0) | ((held >= sinks) & (held <= (lengths - window)[:, None]))
    dead = dead[:, None].expand(rows, kv_heads, slots)
    caches, scales = [new(rows, kv_heads, slots, size) for size in (dim, v_dim)], [None, None]
    if stored is None:
        for cache in caches:
            cache[dead] = torch.nan
        exact = [cache.double().nan_to_num(0.0) for cache in caches]
    else:
        caches, scales = map(list, zip(*(reference.quantised(cache, stored) for cache in caches), strict=True))
        scales[1] *= 10.0 ** torch.randint(-6, 4, scales[1].shape)  # far apart, beyond float16
        for cache, scale in zip(caches, scales, strict=True):
            cache.view(torch.int8)[dead], scale[dead] = 127, torch.nan
        k, rotation = ((32 * k.float()).round().clamp(-127, 127) / 32).to(dtype), (4 * rotation).round() / 4
        v *= (10.0 ** torch.randint(-3, 2, v.shape[:3]))[..., None].to(dtype)
        exact = [cache.clone() for cache in caches]
    learned = torch.randn(num_heads) if random.random() < 0.3 else None
    slopes = torch.rand(num_heads) if random.random() < 0.3 and not is_plain else None
    scale, softcap, interleaved = dim**-0.5, 0.0 if is_plain else random.choice([0.0, 0.0, 5.0]), random.random() < 0.3
    sizes = dict(sink_size=sinks, window_size=window, scale=scale, softcap=softcap, interleaved=interleaved)
    turned = rotation if half else None
    exact_scales = [x if x is None else x.clone() for x in scales]
    given = (x.double() for x in (q, k, v))
    expected = reference.attention(*given, *exact, lengths, counts, turned, learned, slopes, *exact_scales, **sizes)

    splits, out = random.choice([1, 3]), torch.full((rows, tokens, num_heads, v_dim), torch.nan, dtype=dtype)
    partials = torch.full((1 << 20,), torch.nan)
    arrivals = torch.zeros(rows * tokens * kv_heads, dtype=torch.int32)
    numbers = [
        rows, num_heads, kv_heads, tokens, dim, v_dim, sinks, ring, window, start, half, interleaved,
        dtype == torch.bfloat16, splits, random.random() < 0.5, random.randrange(1 << 30), KINDS.index(stored),
    ]  # fmt: skip
    tensors = q, k, v, *caches, out, lengths, counts, rotation, learned, slopes, *scales, partials, arrivals
    pointers = [ctypes.c_void_p(_number(x)) for x in tensors]
    assert decode.run_decode(_all(numbers), _all((scale, softcap), ctypes.c_double), *pointers) == 0
    assert not arrivals.any()
    largest = expected.abs().amax(-1)  # of each query's output, which by scales may be far from that of another
    error = (out.double() - expected).abs().amax(-1)
    assert (error <= 16 * torch.finfo(dtype).eps * largest + (2.0**-24 if dtype == torch.float16 else 0)).all()
    for i in range(2):
        if stored is None:
            assert (caches[i].double().nan_to_num(0.0) - exact[i]).abs().max() < 8 * torch.finfo(dtype).eps
        else:
            assert same_bits(caches[i], exact[i]) and same_bits(scales[i], exact_scales[i])


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("heads", [(3, 1), (8, 2), (20, 2)])
def test_pages(heads, page_size, decode):
    """One token of each text, over pages that lie anywhere: random lengths, texts that wait, padding. Slots that nobody
    sees hold NaN, and the table has a number far beyond all pages where nobody looks."""
    for _ in range(4):
        sinks, window = random.choice([0, 1, 4, 37]), random.choice([1, 7, 33, 120])
        edge = sinks + window
        lengths = [0, 1, sinks, edge - 1, edge, edge + 1, 3 * edge + 7, page_size - 1, page_size, 1000, 10**6]
        texts = random.choices(lengths, k=random.choice([1, 3]))
        check_pages(decode, *heads, sinks, window, page_size, texts, [int(random.random() < 0.8) for _ in texts])


def test_pages_at_all_lengths(decode):
    """Wherever the newest token, the oldest of the window and the last sink lie in their tiles."""
    for sinks, window in (4, 20), (17, 33), (0, 16):
        texts = list(range(3 * (sinks + window)))
        check_pages(decode, 2, 1, sinks, window, 16, texts, [1] * len(texts), (64, 64))


def check_pages(decode, num_heads, kv_heads, sinks, window, page_size, texts, counts, dims=None) -> None:
    """Against the definition in float64; the pages are compared too."""
    dtype, (dim, v_dim) = random.choice([torch.float16, torch.bfloat16]), dims or random.choice(DIMS)
    half, tokens = random.choice([0, 8, dim // 2]), sum(counts) + random.choice([0, 0, 2])
    q, k, v = (
        torch.randn(tokens, n, size).to(dtype) for n, size in ((num_heads, dim), (kv_heads, dim), (kv_heads, v_dim))
    )
    for x in (q, k, v):
        x[sum(counts) :] = torch.nan
    angles = 6 * torch.rand(tokens, 2, 1, max(half, 1))
    rotation = torch.cat((angles.cos(), angles.sin()), dim=2)
    table = torch.full((len(texts), max(texts) // page_size + 1), 2**31 - 1, dtype=torch.int32)
    held = [{*range(min(sinks, t)), *range(max(t - window + 1, 0), t), t} for t in texts]
    held = [positions if count else () for positions, count in zip(held, counts, strict=True)]
    blocks = sum(len({j // page_size for j in positions}) for positions in held) + 2
    pages = torch.full((blocks, kv_heads, page_size, dim + v_dim), torch.nan, dtype=dtype)
    free = torch.randperm(blocks).tolist()
    for row, positions, t in zip(table, held, texts, strict=True):
        for b in {j // page_size for j in positions}:
            row[b] = free.pop()
        for j in positions:
            if j < t:
                pages[row[j // page_size], :, j % page_size] = torch.randn(kv_heads, dim + v_dim).to(dtype)
    starts, lengths = torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(texts, dtype=torch.int32)
    scale, softcap, interleaved = dim**-0.5, random.choice([0.0, 0.0, 5.0]), random.random() < 0.3
    exact = pages.double()
    expected = reference.attend_pages(
        *(x.double() for x in (q, k, v)), *exact.split((dim, v_dim), dim=-1), starts, lengths, table,
        rotation if half else None, sinks, window, scale, softcap, 0, interleaved,
    )  # fmt: skip
    splits, out = random.choice([1, 3]), torch.full((tokens, num_heads, v_dim), torch.nan, dtype=dtype)
    partials, arrivals = (
        torch.full((1 << 20,), torch.nan),
        torch.zeros((len(texts) + tokens) * kv_heads, dtype=torch.int32),
    )
    numbers = [
        len(texts), num_heads, kv_heads, tokens, dim, v_dim, sinks, window, page_size, table.shape[1], 0, half,
        interleaved, dtype == torch.bfloat16, splits, random.random() < 0.5, random.randrange(1 << 30),
    ]  # fmt: skip
    tensors = q, k, v, pages, out, starts, lengths, table, rotation, partials, arrivals
    pointers = [ctypes.c_void_p(_number(x)) for x in tensors]
    if tokens:
        assert decode.run_pages(_all(numbers), _all((scale, softcap), ctypes.c_double), *pointers) == 0
    assert not arrivals.any() and not out[sum(counts) :].any()
    error = (out.double() - expected).abs().amax(-1)
    assert (error <= 16 * torch.finfo(dtype).eps * expected.abs().amax(-1)).all()
    assert torch.equal(pages.isnan(), exact.isnan())
    assert (pages.double() - exact).nan_to_num(0.0).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dim", [8, 40, 64, 72, 80, 96, 112, 128, 160, 192, 200, 256])
def test_prefill(dim, prefill):
    """A chunk of tokens, at random lengths: tiles of every kind, of which some are begun before others are put away."""
    most = 128 if dim <= 128 else 48
    for _ in range(4):
        kv_heads, group = random.choice([1, 2]), random.choice([1, 2, 3, 4, 8])
        sinks, window = random.choice([0, 1, 4, 37, most]), random.choice([1, 2, 60, 300])
        ring, tokens = window + random.choice([0, 0, 5, 170]), random.choice([1, 32, 70, 129, 300])
        edge, rows = sinks + ring, random.choice([1, 2])
        lengths = torch.tensor(random.choices([0, 1, sinks, edge - 1, edge + 1, 3 * edge + 7, 4_000_000], k=rows))
        counts = torch.randint(0, tokens + 1, (rows,)) if random.random() < 0.5 else None
        sizes = sinks, ring, window
        check_prefill(prefill, (kv_heads * group, kv_heads), tokens, dim, sizes, lengths, counts, [True] * tokens)


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_prefill_of_new_texts(dim, prefill):
    """To queries that see all of a text, sinks are keys like others, but not if a query of the tile turns by others."""
    keys = 128 if dim <= 128 else 48
    for sinks in (0, 1, 37, keys - 1, keys):
        window, tokens = random.choice([1, 2, 60, 150]), random.choice([31, 70, 129, 260])
        lengths, other = torch.tensor(random.choices([0, 1, sinks], [3, 1, 1], k=2)), random.randrange(tokens)
        for differs in ([False] * tokens, [i == other for i in range(tokens)]):
            counts = random.choice([None, torch.randint(0, tokens + 1, (2,))])
            check_prefill(prefill, (4, 1), tokens, dim, (sinks, window + 5, window), lengths, counts, differs)


def check_prefill(prefill, heads, tokens, dim, sizes, lengths, counts, differs) -> None:
    """Against the definition in float64. differs: whether a token has an angle of its own for sinks. Dtype, rotation
    and what else a call has are random."""
    dtype, rows, (num_heads, kv_heads), (sinks, ring, window) = (
        random.choice([torch.float16, torch.bfloat16]), len(lengths), heads, sizes
    )  # fmt: skip
    half = random.choice([0, min(8, dim // 2), dim // 8 * 4])
    start = random.choice([0, (dim - 2 * half) // 4 * 4])
    q, k, v = (torch.randn(rows, n, tokens, dim).to(dtype) for n in (num_heads, kv_heads, kv_heads))
    caches = [torch.randn(rows, kv_heads, sinks + ring, dim).to(dtype) for _ in range(2)]
    empty = (reference.held_positions(lengths, sinks, ring) < 0)[:, None, :, None]
    angles = 6 * torch.rand(rows, tokens, 2, 1, max(half, 1))
    angles[:, :, 1] = angles[:, :, 1].where(torch.tensor(differs)[:, None, None], angles[:, :, 0])
    rotation = torch.cat((angles.cos(), angles.sin()), dim=3)
    padding = torch.arange(tokens) < tokens - (torch.full_like(lengths, tokens) if counts is None else counts)[:, None]
    for x in caches:
        x.masked_fill_(empty, torch.nan)
    for x in (q, k, v):
        x.masked_fill_(padding[:, None, :, None], torch.nan)
    rotation.masked_fill_(padding[:, :, None, None, None], torch.nan)
    learned = torch.randn(num_heads) if random.random() < 0.3 else None
    slopes = 2 * torch.rand(num_heads) / window if random.random() < 0.5 else None
    scale, softcap, dense = dim**-0.5, random.choice([0.0, 0.0, 5.0]), random.choice([0, 0, 100, 10**15])
    interleaved = random.random() < 0.3
    exact, low = [cache.double() for cache in caches], [cache.clone() for cache in caches]
    more = learned, slopes, None, None, sinks, window, scale, softcap, start, interleaved, dense
    turned = rotation if half else None
    expected = reference.attention(*(x.double() for x in (q, k, v)), *exact, lengths, counts, turned, *more)
    reference.attention(q, k, v, *low, lengths, counts, turned, *more)

    numbers = [
        rows, num_heads, kv_heads, tokens, dim, sinks, ring, window, start, half, interleaved, dtype == torch.bfloat16,
        dense, random.choice([1, 3]), random.randrange(1 << 30),
    ]  # fmt: skip
    out = torch.full((rows, tokens, num_heads, dim), torch.nan, dtype=dtype)
    tensors = q, k, v, *caches, out, lengths, counts, rotation, learned, slopes

    def run(scratch):
        pointers = [ctypes.c_void_p(_number(x)) for x in (*tensors, scratch)]
        return prefill.run_prefill(_all(numbers), _all((scale, softcap), ctypes.c_double), *pointers)

    assert run(torch.full((run(None),), torch.nan, dtype=dtype)) == 0
    error = (out.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < 16 * torch.finfo(dtype).eps
    for cache, rounded in zip(caches, low, strict=True):
        difference = (cache.double().nan_to_num(7.0) - rounded.double().nan_to_num(7.0)).abs()
        assert difference.max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dim", [64, 128])
@every_kind
def test_gather(stored, dim, gather):
    """What prefill's products find in scratch: window and sinks in the order of the text, the chunk as it is stored;
    and what the chunk leaves in the cache."""
    for _ in range(6):
        rows, kv_heads, tokens = 2, random.choice([1, 3, 9]), random.choice([1, 17, 40])
        sinks, window, half = random.choice([0, 4, 20]), random.choice([1, 7, 140]), random.choice([0, 8, dim // 2])
        ring, edge = window + random.choice([0, 5]), sinks + window
        lengths = torch.tensor(random.choices([0, 1, sinks, edge - 1, edge, edge + 1, 3 * edge + 7], k=rows))
        counts = torch.randint(0, tokens + 1, (rows,)) if random.random() < 0.5 else None
        check_gather(gather, rows, kv_heads, tokens, dim, sinks, window, ring, half, lengths, counts, stored)


def check_gather(gather, rows, kv_heads, tokens, dim, sinks, window, ring, half, lengths, counts, stored) -> None:
    dtype, slots, interleaved = random.choice([torch.float16, torch.bfloat16]), sinks + ring, random.random() < 0.5
    start = random.choice([0, 4]) if 2 * half < dim else 0

    def new(tokens):  # keys, by angles like these, turn exactly
        return ((32 * torch.randn(rows, kv_heads, tokens, dim)).round().clamp(-127, 127) / 32).to(dtype)

    k, v, caches, scales = new(tokens), new(tokens), [new(slots), new(slots)], [None, None]
    rotation = (4 * torch.randn(rows, tokens, 2, 2, max(half, 1))).round() / 4
    held = reference.held_positions(lengths, sinks, ring)
    is_seen = (held >= 0) & ((held < sinks) | (held > (lengths - window)[:, None]))
    dead = ~is_seen[:, None].expand(rows, kv_heads, slots)
    if stored is None:
        for cache in caches:
            cache[dead] = torch.nan
    else:
        caches, scales = map(list, zip(*(reference.quantised(x, stored) for x in caches), strict=True))
        for cache, scale in zip(caches, scales, strict=True):
            cache.view(torch.int8)[dead], scale[dead] = 127, torch.nan

    def as_seen(cache, scale):  # of slots, in 16 bits
        return cache.clone() if scale is None else (cache.float() * scale[..., None]).to(dtype)

    before = [as_seen(*both) for both in zip(caches, scales, strict=True)]
    exact = [x if x is None else x.clone() for x in (*caches, *scales)]
    turned = rotation if half else None
    sizes = dict(sink_size=sinks, window_size=window, scale=1.0, rotary_start=start, interleaved=interleaved)
    reference.attention(k, k, v, *exact[:2], lengths, counts, turned, None, None, *exact[2:], **sizes)

    numbers = [
        rows, 2 * kv_heads, kv_heads, tokens, dim, sinks, ring, window, start, half, interleaved,
        dtype == torch.bfloat16, random.randrange(1 << 30), KINDS.index(stored),
    ]  # fmt: skip
    places, out = _all([0] * 7), torch.full((rows, tokens, 2 * kv_heads, dim), torch.nan, dtype=dtype)

    def run(*tensors):
        return gather.run_gather(_all(numbers), places, *(ctypes.c_void_p(_number(x)) for x in tensors))

    assert run(*[None] * 7, rotation, *[None] * 3) == 0  # how much scratch there has to be
    scratch = torch.full((places[6],), torch.nan, dtype=dtype)
    assert run(k, v, *caches, out, lengths, counts, rotation, *scales, scratch) == 0
    for found, expected in zip((*caches, *scales), exact, strict=True):
        assert found is None or same_bits(found, expected)

    parts = [scratch[begin:end].view(rows, kv_heads, -1, dim) for begin, end in itertools.pairwise(places)
             if end > begin]  # fmt: skip
    after = [as_seen(*both) for both in zip(exact[:2], exact[2:], strict=True)]
    ring_rows, sink_rows = max(-(-(window - 1) // 128), 1) * 128, max(-(-sinks // 16), 1) * 16
    padding = torch.zeros(rows, dtype=torch.int64) if counts is None else tokens - counts
    for row in range(rows):
        length, end = lengths[row].item(), (lengths + tokens - padding)[row].item()
        assert (out[row, : padding[row]] == 0).all() and out[row, padding[row] :].isnan().all()
        for which, x in enumerate((k, v)):
            of_ring, of_sinks = parts[which - 4][row], parts[which - 2][row]
            assert of_ring.shape[1] == ring_rows and of_sinks.shape[1] == sink_rows
            seen = min(max(length - sinks, 0), window - 1)
            for age in range(-(-seen // 128) * 128):
                slot = reference.slot_of(torch.tensor(length - 1 - age), sinks, ring)
                expected = before[which][row, :, slot] if age < seen else torch.zeros(kv_heads, dim, dtype=dtype)
                assert torch.equal(of_ring[:, ring_rows - 1 - age], expected)
            for n in range(sink_rows):
                source = before if n < length else after
                is_there = n < min(sinks, end)
                expected = source[which][row, :, n] if is_there else torch.zeros(kv_heads, dim, dtype=dtype)
                assert torch.equal(of_sinks[:, n], expected)
            if which == 0 and (half or stored) or which == 1 and stored:
                new = x[row].float()
                if which == 0 and half:
                    cos, sin = rotation[row, :, 0].unbind(1)
                    new = reference.rotate(new, cos, sin, start, interleaved)
                expected = as_seen(*reference.quantised(new, stored)) if stored else new.to(dtype)
                assert torch.equal(parts[which][row, :, padding[row] :], expected[:, padding[row] :])


class Replayed:
    """Stands for a CUDA graph of a step: what it repeats runs anew."""

    def __init__(self, run, device, **inputs):
        self.run, self.inputs = run, inputs

    def __call__(self, **inputs):
        self.inputs.update(inputs)
        return self.run(**self.inputs)


@pytest.fixture
def one_kernel(stack, monkeypatch):
    """Steps of a model on the CPU go as on a GPU, by the emulated kernel. Gives how many did, and how many of the heads
    were part of it."""
    ran, logits_of = {"steps": 0, "heads": 0}, fused.Ahead.logits_of

    def numbers(x, inner, heads, kv_heads, dim, layers, slots):
        return _all([len(x), x.shape[1], inner, heads, kv_heads, dim, layers, slots, 2])

    def state_of(x, *sizes):
        return torch.zeros(stack.state_bytes(numbers(x, *sizes)) // 4 + 4, dtype=torch.int32)

    def run(x, table, norm, head, lengths, counts, rotation, state, *sizes):
        inner, heads, kv_heads, dim, slots, scale, start, interleaved, eps, shift, head_eps, head_shift, kind = sizes
        out, vocabulary = torch.full_like(x, torch.nan), 0 if head is None else len(head)
        logits, given = x.new_full((len(x), vocabulary), torch.nan), (heads, kv_heads, dim, len(table), slots)
        half = 0 if rotation is None else rotation.shape[-1]
        more = _all([start, half, interleaved, x.dtype == torch.bfloat16, kind, random.randrange(1 << 30), vocabulary])
        tensors = table, x, out, None, lengths, counts, rotation, norm, head, logits
        pointers = [ctypes.c_void_p(_number(t)) for t in tensors]
        pointers[3] = ctypes.c_void_p(-(-state.data_ptr() // 16) * 16)
        pointers[-1] = pointers[-1] if vocabulary else None
        floats = _all((scale, eps, shift, head_eps, head_shift), ctypes.c_double)
        assert stack.run_stack(numbers(x, inner, *given), more, floats, *pointers) == 0
        ran["steps"] += 1
        return out, logits

    def with_head(self, module, x):
        logits = logits_of(self, module, x)
        ran["heads"] += logits is not None
        return logits

    monkeypatch.setattr(fused, "HAS_CUDA_LIBRARY", True)
    monkeypatch.setattr(fused, "DEVICE", "cpu")
    monkeypatch.setattr(fused.Ahead, "logits_of", with_head)
    monkeypatch.setattr(captured, "Captured", Replayed)
    monkeypatch.setattr(captured, "why_eager", lambda model: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    library = torch.library.Library("sinkattn", "IMPL")
    library.impl("stack", run, "CPU")
    library.impl("stack_state", state_of, "CPU")
    yield ran
    library._destroy()


def test_a_model_by_one_kernel(one_kernel):
    """Its logits, through the wrap, and what becomes of the head when something between is changed."""
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    model = tiny("qwen3", vocab_size=98, num_hidden_layers=2, **sizes).to(torch.bfloat16)
    ids, body = random_ids(1, 13), model.model
    with patch(model, 4, 6, slack=0), torch.no_grad():

        def logits():
            cache = SinkCache(model)
            return torch.cat([model(x, past_key_values=cache).logits.clone() for x in ids.split(1, dim=1)], dim=1)

        def error(found, expected):
            return ((found.float() - expected.float()).square().mean().sqrt() / expected.float().std()).item()

        expected = streaming_logits(copy.deepcopy(model).float(), ids, 4, 6)
        first = logits()
        assert error(first, expected) < 0.05 and one_kernel["steps"] == one_kernel["heads"] == 12
        norm, head, forward = body.norm, model.lm_head, type(body).forward
        others = {
            "another norm": (body, "norm", nn.RMSNorm(64, eps=1e-3).to(torch.bfloat16)),
            "no norm": (body, "norm", nn.Identity()),
            "another head": (model, "lm_head", copy.deepcopy(head)),
        }
        others["another head"][2].weight.mul_(-1)
        for owner, place, part in others.values():
            before = getattr(owner, place)
            setattr(owner, place, part)
            heads = one_kernel["heads"]
            found, wanted = logits(), streaming_logits(copy.deepcopy(model).float(), ids, 4, 6)
            assert error(found, wanted) < 0.05 and one_kernel["heads"] == heads
            setattr(owner, place, before)
        assert (body.norm, model.lm_head) == (norm, head)

        def twice(self, *args, **kwargs):  # nobody holds what the norm gave, nor the first product
            output = forward(self, *args, **kwargs)
            output.last_hidden_state = output.last_hidden_state * -1
            output.last_hidden_state = output.last_hidden_state * 2
            return output

        type(body).forward = twice
        try:
            heads = one_kernel["heads"]
            assert error(logits(), -2 * expected) < 0.05 and one_kernel["heads"] == heads
        finally:
            type(body).forward = forward
        assert torch.equal(logits(), first) and one_kernel["heads"] == heads + 12
