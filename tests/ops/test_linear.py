"""`ops.linear` against its formula in float64: the compiled ops, and the reference where none is.

Weights lie in something larger that holds NaN, and outputs in memory that held NaN, so a wrong read shows, and a row
that is not written.
"""

import ctypes
import gc
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import with_cpu_library, with_cuda_library
from helpers import GPU
from sinkattn import ops
from sinkattn.reference import ACTIVATION_NUMBERS

DEVICES = ["cpu", pytest.param(GPU, marks=[pytest.mark.gpu, with_cuda_library])]
DTYPES = [torch.bfloat16, torch.float16]
# dtype: error of one number, relative to itself and to the mean of all, and of a tensor; 2^-8 and 2^-11 by one rounding
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.float16: (1e-2, 1.2e-3),
    torch.bfloat16: (6e-2, 9e-3),
}
WAYS = {
    "plain": {},
    "bias": {"bias": True},
    "residual": {"residual": True},
    "norm": {"norm": True},
    "norm of Gemma, bias": {"norm": True, "norm_shift": 1.0, "bias": True},
    "silu": {"activation": "silu"},
    "gelu_tanh, norm": {"activation": "gelu_tanh", "norm": True},
    "gelu, bias, residual": {"activation": "gelu", "bias": True, "residual": True},
    "all": {"activation": "silu", "norm": True, "bias": True, "residual": True},
}


def make(
    rows, in_features, outputs, dtype, device, norm=False, bias=False, residual=False, activation="", norm_shift=0.0
):
    """(x, weight, bias) and the keywords of `ops.linear`; outputs of about 1, weight rows 24 numbers apart."""
    out_features = outputs * (2 if activation else 1)

    def new(*shape, scale=1.0):
        return (scale * torch.randn(shape)).to(dtype).to(device)

    large = torch.full((out_features, in_features + 24), torch.nan, dtype=dtype, device=device)
    weight = large[:, 8 : 8 + in_features]
    weight.copy_(new(out_features, in_features, scale=in_features**-0.5))
    keywords = dict(activation=activation, norm_shift=norm_shift, norm_eps=1e-5)
    keywords["norm_weight"] = new(in_features) if norm else None
    keywords["residual"] = new(rows, outputs) if residual else None
    return (new(rows, in_features, scale=3.0 if norm else 1.0), weight, new(out_features) if bias else None), keywords


def exact(x, weight, bias, norm_weight, norm_eps, norm_shift, residual, activation):
    """The formula of the docstring, another way, in float64 and without any rounding."""
    x, weight = x.double().cpu(), weight.double().cpu()
    if norm_weight is not None:
        x = (
            x
            / (x.pow(2).sum(-1, keepdim=True) / x.shape[1] + norm_eps).sqrt()
            * (norm_weight.double().cpu() + norm_shift)
        )
    y = torch.einsum("ri,oi->ro", x, weight)
    if bias is not None:
        y += bias.double().cpu()
    if activation:
        half = y.shape[1] // 2
        gate, up = y[:, :half], y[:, half:]
        if activation == "silu":
            gate = gate / (1 + torch.exp(-gate))
        elif activation == "gelu":
            gate = gate * torch.special.ndtr(gate)
        else:
            gate = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        y = gate * up
    return y if residual is None else y + residual.double().cpu()


def assert_close(out, expected, dtype):
    single, whole = TOLERANCES[dtype]
    assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
    error = out.double().cpu() - expected
    assert not error.isnan().any()
    if expected.numel():  # outputs are about 1, though a lone one may be close to 0
        typical = expected.square().mean().sqrt().clamp_min(1)
        assert (error.abs() <= single * (expected.abs() + typical)).all()
        if expected.numel() >= 64:  # too few numbers have no mean to speak of: gate * up and residual may cancel
            assert error.square().mean().sqrt() <= whole * typical


def poison(*shape, dtype):
    """What `ops.linear` will get as its output holds NaN."""
    torch.full(shape, torch.nan, dtype=dtype, device=GPU)


def check(rows, in_features, outputs, dtype, device, **way):
    tensors, keywords = make(rows, in_features, outputs, dtype, device, **way)
    if device != "cpu":
        poison(rows, outputs, dtype=dtype)
    out = ops.linear(*tensors, **keywords)
    assert_close(out, exact(*tensors, **keywords), dtype)


@pytest.mark.parametrize("device", DEVICES)
class TestValues:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("rows", [*range(18), 24, 33, 63, 64])
    def test_rows(self, device, rows, way):
        for dtype in DTYPES:
            check(rows, 264, 75, dtype, device, **WAYS[way])

    @pytest.mark.parametrize("outputs", [1, 7, 16, 31, 32, 33, 2049, 4500])
    @pytest.mark.parametrize("way", ["plain", "all"])
    def test_outputs(self, device, outputs, way):
        for rows in (1, 5, 30):
            check(rows, 128, outputs, torch.bfloat16, device, **WAYS[way])

    @pytest.mark.parametrize("in_features", [8, 24, 32, 248, 256, 1000, 4096, 14336])
    @pytest.mark.parametrize("way", ["plain", "norm", "all"])
    def test_inputs(self, device, in_features, way):
        for rows in (1, 8, 16, 64):
            check(rows, in_features, 48, torch.bfloat16, device, **WAYS[way])

    def test_many_rounds(self, device):
        """Blocks that go through the weight several times as deep as their ring."""
        for rows in (1, 8, 11, 64):
            check(rows, 1032, 20000, torch.bfloat16, device, residual=True)
            check(rows, 520, 10001, torch.float16, device, norm=True, activation="silu")

    @pytest.mark.parametrize("outputs", [1000, 4096, 6144, 12288, 16000, 24000, 28672, 50000])
    def test_many_rows(self, device, outputs):
        """Weights of every size: how blocks share them depends on it."""
        check(64, 520, outputs, torch.bfloat16, device, norm=True, residual=True)
        check(41, 200, outputs // 2, torch.float16, device, norm=True, norm_shift=1.0, bias=True, activation="silu")

    @pytest.mark.parametrize("size", [1e-4, 1e3])
    def test_rows_of_any_size(self, device, size):
        """float16 before its norm: what begins far smaller or larger than it goes on, or is small or large."""
        for rows in (8, 20):
            (x, weight, bias), keywords = make(rows, 512, 300, torch.float16, device, norm=True)
            keywords["norm_eps"] = 1e-12
            for x_ in (
                x * size / 50,
                torch.cat((x[:, :64] * 0, x[:, 64:]), 1),
                torch.cat((x[:, :64] * size, x[:, 64:]), 1),
            ):
                assert_close(ops.linear(x_, weight, bias, **keywords), exact(x_, weight, bias, **keywords), x.dtype)

    def test_gates_far_out(self, device):
        """Gates where an exponential overflows."""
        x = torch.tensor([[-1000.0, 1000.0, 0, 0, 0, 0, 0, 0]], dtype=torch.bfloat16, device=device)
        weight = torch.eye(8, dtype=torch.bfloat16, device=device)[[0, 1, 2, 1, 1, 1]]
        for activation in ("silu", "gelu", "gelu_tanh"):
            out = ops.linear(x, weight, activation=activation)
            assert out.tolist() == [[0, 999424.0, 0]], activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_wide_dtypes(way, dtype):
    for rows in (0, 1, 16, 64):
        check(rows, 37, 21, dtype, "cpu", **WAYS[way])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_norm_of_transformers(model, device):
    """Bit for bit, through a weight that changes nothing: nothing is rounded elsewhere."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in DTYPES:
        norm = (LlamaRMSNorm if model == "llama" else GemmaRMSNorm)(64, eps=1e-5)
        norm.weight.data = torch.randn(64)
        norm = norm.to(device, dtype)
        x, weight = 5 * torch.randn(8, 64, device=device).to(dtype), torch.eye(64, device=device).to(dtype)
        with torch.no_grad():
            shift = 0.0 if model == "llama" else 1.0
            out = ops.linear(x, weight, norm_weight=norm.weight, norm_eps=1e-5, norm_shift=shift)
            # the mean's last bit may round a few numbers the other way
            wrong = (out != norm(x)).float().mean().item()
            assert wrong < 0.02 and torch.allclose(
                out.float(), norm(x).float(), rtol=2 * torch.finfo(dtype).eps, atol=0
            )


@pytest.mark.gpu
@with_cuda_library
def test_same_bits():
    for rows in (1, 8, 16, 64):
        tensors, keywords = make(rows, 1096, 3000, torch.bfloat16, GPU, **WAYS["all"])
        first = ops.linear(*tensors, **keywords).view(torch.int16)
        for _ in range(20):
            assert torch.equal(ops.linear(*tensors, **keywords).view(torch.int16), first)


@with_cpu_library
def test_threads_and_strides_do_not_matter():
    """On the CPU: the same bits from any number of threads, and from tensors that lie apart."""
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows in (1, 3, 8, 33):
            (x, weight, bias), keywords = make(rows, 300, 1000, dtype, "cpu", **WAYS["all"])
            try:
                torch.set_num_threads(1)
                alone = ops.linear(x, weight, bias, **keywords)
            finally:
                torch.set_num_threads(threads)
            apart = [torch.stack((tensor, tensor.flip(0)), dim=-1)[..., 0] for tensor in (x, bias)]
            keywords |= {
                name: keywords[name].repeat_interleave(2, -1)[..., ::2] for name in ("norm_weight", "residual")
            }
            assert not any(tensor.is_contiguous() for tensor in (*apart, keywords["residual"]))
            assert torch.equal(ops.linear(apart[0], weight, apart[1], **keywords), alone)
            columns = weight.T.contiguous().T  # no compiled op takes these
            assert_close(ops.linear(x, columns, bias, **keywords), exact(x, columns, bias, **keywords), dtype)
            with pytest.raises(RuntimeError, match="contiguous rows"):
                torch.ops.sinkattn.linear(x, columns, None, None, 0.0, 0.0, None, 0)


def test_when_a_model_calls_it_on_the_cpu(monkeypatch):
    x, weight = torch.randn(8, 16), torch.randn(20, 16)
    monkeypatch.setattr(ops, "CPU_ISA", "avx2")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert ops.takes_linear(x.to(dtype), weight.to(dtype))
    assert not ops.takes_linear(x.double(), weight.double())
    assert not ops.takes_linear(torch.randn(9, 16), weight)
    assert not ops.takes_linear(x, torch.randn(16, 20).T)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.takes_linear(x, weight)
    for isa in ("portable", ""):
        monkeypatch.setattr(ops, "CPU_ISA", isa)
        assert not ops.takes_linear(x, weight)


@with_cpu_library
@pytest.mark.parametrize(
    "arguments", [{"weight": 15}, {"bias": 15}, {"norm_weight": 15}, {"residual": 15}, {"rows": 65}]
)
def test_what_the_compiled_cpu_op_refuses(arguments):
    """Called without `ops.linear`, which words it."""
    sizes = {"weight": 16, "bias": 20, "norm_weight": 16, "residual": 20, "rows": 2} | arguments
    x, weight, bias = torch.randn(sizes["rows"], 16), torch.randn(20, sizes["weight"]), torch.randn(sizes["bias"])
    norm_weight, residual = torch.randn(sizes["norm_weight"]), torch.randn(sizes["rows"], sizes["residual"])
    for others in ((bias, norm_weight, residual), (bias.half(), norm_weight.half(), residual.half())):
        with pytest.raises(RuntimeError, match="sinkattn: "):
            torch.ops.sinkattn.linear(x, weight, others[0], others[1], 1e-5, 0.0, others[2], 0)
    with pytest.raises(RuntimeError, match="unknown activation"):
        torch.ops.sinkattn.linear(torch.randn(2, 16), torch.randn(20, 16), None, None, 0.0, 0.0, None, 4)


@pytest.mark.gpu
@with_cuda_library
def test_neighbours_do_not_matter():
    """A row gives the same bits alone and among others."""
    tensors, keywords = make(8, 1096, 3000, torch.bfloat16, GPU, **WAYS["all"])
    whole = ops.linear(*tensors, **keywords)
    for row in range(8):
        keywords["residual"], of_all = keywords["residual"][row : row + 1], keywords["residual"]
        alone = ops.linear(tensors[0][row : row + 1], *tensors[1:], **keywords)
        keywords["residual"] = of_all
        assert torch.equal(alone[0].view(torch.int16), whole[row].view(torch.int16))
    (x, *others), keywords = make(64, 1096, 3000, torch.bfloat16, GPU, **WAYS["all"])
    whole, residual = ops.linear(x, *others, **keywords), keywords["residual"]
    for rows in (9, 32, 45):
        some = ops.linear(x[:rows], *others, **keywords | {"residual": residual[:rows]})
        assert torch.equal(some.view(torch.int16), whole[:rows].view(torch.int16))


@pytest.mark.gpu
@with_cuda_library
@pytest.mark.parametrize("rows", [2, 40])
def test_chain_in_a_graph(rows):
    """Layers that wait for each other while the next one's weights are on their way, captured, replayed, and eager."""
    layers = [make(rows, 512, 512, torch.bfloat16, GPU, norm=True, residual=True) for _ in range(12)]
    gates = [make(rows, 512, 512, torch.bfloat16, GPU, activation="silu", norm=True) for _ in range(12)]

    def step(x):
        for ((_, weight, _), keywords), ((_, gate, _), gate_keywords) in zip(layers, gates, strict=True):
            y = ops.linear(x, gate, **gate_keywords)
            x = ops.linear(y, weight, **keywords | {"residual": x})
        return x

    def expected(x):
        x = x.cpu()
        for ((_, weight, _), keywords), ((_, gate, _), gate_keywords) in zip(layers, gates, strict=True):
            y = exact(x, gate, None, **gate_keywords).to(torch.bfloat16)
            x = exact(y, weight, None, **keywords | {"residual": x}).to(torch.bfloat16)
        return x.double()

    x = torch.randn(rows, 512, device=GPU).bfloat16()
    eager = step(x)
    torch.cuda.synchronize(GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(GPU), torch.cuda.graph(graph, stream=torch.cuda.Stream(GPU)):
        out = step(x)
    for _ in range(5):
        x.copy_(torch.randn(rows, 512))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(step(x), out)
        error = out.double().cpu() - expected(x)
        assert error.norm() <= 3e-2 * expected(x).norm()
    assert not eager.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for way in ("plain", "all"):
        (x, weight, bias), k = make(3, 64, 20, torch.bfloat16, device, **WAYS[way])
        arguments = (x, weight, bias, k["norm_weight"], 1e-5, 0.0, k["residual"], ACTIVATION_NUMBERS[k["activation"]])
        torch.library.opcheck(torch.ops.sinkattn.linear.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(device):
    tensors, keywords = make(3, 64, 20, torch.bfloat16, device, **WAYS["all"])
    compiled = torch.compile(lambda *x: ops.linear(*x, **keywords), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), ops.linear(*tensors, **keywords))


def test_fake_tensors():
    with FakeTensorMode():
        x, weight = torch.empty(3, 64), torch.empty(40, 64)
        assert ops.linear(x, weight).shape == (3, 40) and ops.linear(x, weight, activation="silu").shape == (3, 20)


def bad(**changes):
    arguments = {"x": torch.randn(2, 16), "weight": torch.randn(8, 16)} | changes
    return lambda: ops.linear(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias", None), **arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(x=torch.randn(65, 16)), ValueError, "up to 64 rows, x has 65"),
        (bad(x=torch.randn(1, 2, 16)), ValueError, "do not fit"),
        (bad(x=torch.randn(2, 8)), ValueError, "do not fit"),
        (
            bad(activation="relu"),
            ValueError,
            "unknown activation 'relu'; choose one of '', 'silu', 'gelu_tanh', 'gelu'",
        ),
        (bad(weight=torch.randn(7, 16), activation="silu"), ValueError, "even number"),
        (bad(bias=torch.randn(4)), ValueError, "bias has shape"),
        (bad(norm_weight=torch.randn(8)), ValueError, "norm_weight has shape"),
        (
            bad(residual=torch.randn(2, 8), activation="silu"),
            ValueError,
            r"residual has shape \(2, 8\); it needs \(2, 4\)",
        ),
        (bad(weight=torch.randn(8, 16).half()), TypeError, "weight is torch.float16, x is torch.float32"),
        (bad(norm_weight=torch.randn(16).double()), TypeError, "norm_weight is torch.float64"),
        (
            bad(x=torch.ones(2, 16, dtype=torch.int64), weight=torch.ones(8, 16, dtype=torch.int64)),
            TypeError,
            "floating",
        ),
        (bad(weight=torch.randn(8, 16, device="meta")), ValueError, "one device"),
        (bad(weight=torch.randn(8, 16, requires_grad=True)), RuntimeError, "no_grad"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@with_cuda_library
def test_errors_on_a_gpu():
    def new(*shape):
        return torch.randn(shape, device=GPU).bfloat16()

    x, weight = new(2, 16), new(8, 16)
    for call, error, message in (
        (lambda: ops.linear(x.float(), weight.float()), TypeError, "takes float16 and bfloat16"),
        (lambda: ops.linear(new(2, 12), new(8, 12)), ValueError, "multiples of 8"),
        (lambda: ops.linear(new(2, 0), new(8, 0)), ValueError, "multiples of 8"),
        (lambda: ops.linear(new(2, 32)[:, :16], weight), ValueError, "x has strides"),
        (lambda: ops.linear(x, new(16, 8).T), ValueError, "weight has strides"),
        (lambda: ops.linear(x, new(8, 20)[:, :16]), ValueError, "weight begins or has rows off"),
        (lambda: ops.linear(x, new(8, 24)[:, 4:20]), ValueError, "weight begins or has rows off"),
        (lambda: ops.linear(new(40)[4:36].view(2, 16), weight), ValueError, "x begins"),
        (lambda: ops.linear(x, weight, norm_weight=new(20)[4:]), ValueError, "norm_weight begins"),
        (lambda: ops.linear(x, weight.cpu()), ValueError, "one device"),
    ):
        with pytest.raises(error, match=message):
            call()
    nothing = (None, None, 0.0, 0.0, None, 0)
    for arguments in (
        (new(65, 16), weight),
        (x, weight.cpu()),
        (x.float(), weight),
        (x, new(8, 20)[:, :16]),
        (x, new(8, 24)[:, 4:20]),
    ):
        with pytest.raises(RuntimeError, match="sinkattn"):
            torch.ops.sinkattn.linear(*arguments, *nothing)
    with pytest.raises(RuntimeError, match="unknown activation"):
        torch.ops.sinkattn.linear(x, weight, *nothing[:-1], 4)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
@with_cpu_library
def test_memory_is_given_back():
    """What the C library has given out, after 2,000 calls as after none. Python knows nothing of it."""

    class Given(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

    of_process = ctypes.CDLL(None)
    if not hasattr(of_process, "mallinfo2"):
        pytest.skip("a C library that does not tell")
    of_process.mallinfo2.restype = Given
    x, weight, norm = torch.randn(2, 64), torch.randn(96, 64), torch.rand(64)

    def given_out() -> int:
        for _ in range(2000):
            ops.linear(x, weight, norm_weight=norm, residual=x[:, :48], activation="gelu_tanh")
        gc.collect()
        given = of_process.mallinfo2()
        return given.h + given.e

    given_out()
    least = min(-(before := given_out()) + given_out() for _ in range(3))
    assert least < 8 * 2000, f"{least / 2000:.0f} bytes a call, of {before:,}"
