"""The tiny models of tiny.py made loud, as trained weights are: what half precision has to live with.

`loud` runs a short text through the model once, and every part, as its input arrives, gets weights that suit what it is
handed: so the network stays sane whatever its form is, and nothing here knows of families. What it then has:

- Hidden dims in the tens of thousands: one pair from the embedding, one from the first layer's output. They come in
  pairs of opposite sign that nothing is added to, so that LayerNorm's mean stays where it is; norms bring them down.
- Norm weights from 0.01 to 200; what follows a norm is scaled down by as much.
- Key biases of 100, where there are biases, in the last dim of every head: there rotations are slow or none.
- One head whose logits saturate.
- Weights of uneven spread: every row and every column has its own.
"""

import copy

import torch
from torch import nn

from tiny import drawn

SMALLEST, LARGEST = 0.01, 200.0  # norm weights
EMBEDDED, WRITTEN = [5, 6], [11, 12]  # pairs of hidden dims in the tens of thousands
MASSIVE = 20_000.0
STREAM, LOGITS = 8.0, 3.0  # root mean squares of the other hidden dims, and of logits
SATURATED = 20.0  # factor of one head's queries
KEY_BIAS = 100.0
WRITERS = ("o_proj", "dense", "down_proj", "dense_4h_to_h")  # their output is added to the hidden states
QUERIES = ("q_proj", "q_b_proj", "qkv_proj", "query_key_value")  # their first rows are the first head's query
KEYS = ("k_proj", "query_key_value")

ALLOWED = 1.1  # error of a patched model, times the unpatched model's own
FLOOR = 1e-6  # error of a token that is as good as none: rounding of float32


def _uneven(n: int) -> torch.Tensor:
    return torch.exp(0.7 * torch.randn(n))


def _rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of every channel, (channels,)."""
    return x.flatten(0, -2).double().square().mean(0).sqrt().float()


class _Loud:
    """One pass over a model: hooks that give every part its weights as its input arrives."""

    def __init__(self, model):
        config = model.config
        self.hidden_size, self.heads = config.hidden_size, config.num_attention_heads
        self.dim = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
        self.dim = self.dim or self.hidden_size // self.heads
        names = [name for name, _ in model.named_modules()]
        self.first_output = [n for n in names if ".layers.0." in n and n.rpartition(".")[2] in WRITERS]
        self.first_output = [n for n in self.first_output if type(model.get_submodule(n)) is nn.Linear][-1]
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                self._embedding(module)
            elif type(module) is nn.Linear:
                self._before(module, self._linear, name)
            elif "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter):
                self._before(module, self._norm, name)
            elif any(x.dim() == 3 for x in module.parameters(recurse=False)):
                self.hooks.append(module.register_forward_hook(self._experts))

    def _before(self, module, change, name):
        self.hooks.append(module.register_forward_pre_hook(lambda module, args: change(name, module, args[0])))

    def _embedding(self, module):
        weight, size = module.weight, module.embedding_dim
        weight.copy_(STREAM * torch.randn_like(weight) * _uneven(size))
        weight[:, WRITTEN] = 0
        weight[:, EMBEDDED[0]] = MASSIVE * (1 + 0.1 * torch.randn(len(weight)))
        weight[:, EMBEDDED[1]] = -weight[:, EMBEDDED[0]]
        ones = torch.ones(1, dtype=torch.int64, device=weight.device)
        weight.mul_(weight[1].norm() / module.forward(ones)[0].norm())  # Gemma scales what it looks up

    def _linear(self, name, module, given):
        part, weight = name.rpartition(".")[2], module.weight
        spread = _rms(given)
        spread = spread.clamp_min(0.3 * float(spread.median()))
        weight.copy_(torch.randn_like(weight) * _uneven(len(weight))[:, None] * _uneven(weight.shape[1]) / spread)
        wanted = LOGITS if ".layers." not in name else STREAM if part in WRITERS else 1.2
        weight.mul_(wanted / _rms(nn.functional.linear(given, weight)).square().mean().sqrt())
        if module.bias is not None:
            module.bias.copy_(0.3 * wanted * torch.randn_like(module.bias))
        if part in WRITERS:
            for x in (weight, module.bias) if module.bias is not None else (weight,):
                x[EMBEDDED + WRITTEN] = 0
        if name == self.first_output:  # what gives the same number for every token, as nearly as there is
            rows = given.flatten(0, -2).double()
            square = rows.T @ rows
            square += 1e-2 * square.diagonal().mean() * torch.eye(len(square))
            constant = torch.linalg.solve(square, rows.sum(0))
            weight[WRITTEN[0]] = (0.3 * MASSIVE * constant).float()
            weight[WRITTEN[1]] = -weight[WRITTEN[0]]
        if part in QUERIES:
            queries = self._heads(part, weight, 0)
            if module.bias is not None:  # key biases must not outweigh the rest
                queries[:, -1] /= 10
                self._heads(part, module.bias, 0)[:, -1] /= 10
            if ".layers.1." in name:
                queries[0] *= SATURATED
                queries[1:, -1] /= 50  # where a norm takes the factor away again, its last weight saturates the head
        if part in KEYS and module.bias is not None:
            biases = self._heads(part, module.bias, 1)
            biases[:, -1] = KEY_BIAS * torch.randn(len(biases)).sign()

    def _heads(self, part: str, x: torch.Tensor, which: int) -> torch.Tensor:
        """The rows of x that make queries (0) or keys (1), by head: (heads, dim, ...)."""
        if part == "query_key_value":
            return x.view(self.heads, 3, self.dim, *x.shape[1:])[:, which]
        return x[: self.heads * self.dim].view(-1, self.dim, *x.shape[1:])

    def _norm(self, name, module, x):
        part, weight = name.rpartition(".")[2], module.weight
        size, spread = len(weight), _rms(nn.functional.rms_norm(x, x.shape[-1:])).clamp_min(1e-6)
        weight.zero_()
        shift = float(module.forward(torch.ones_like(x)).max() > 0.5)  # weights of 0 say what is added to them
        if part in ("q_norm", "k_norm"):  # alike for both dims of a pair, and one the other's inverse
            half = torch.exp(torch.linspace(-3, 3, self.dim // 2))
            wanted = torch.cat((half, half)).repeat(size // self.dim)
            wanted = wanted if part == "q_norm" else 1 / wanted
            if ".layers.1." in name and size == self.dim:  # one norm for all heads
                wanted[-1] = LARGEST if part == "q_norm" else 1.0
            elif ".layers.1." in name and part == "q_norm":
                wanted[: self.dim] *= SATURATED
        elif float(x.abs().max()) > 0.1 * MASSIVE or size != self.hidden_size:  # reads the hidden states
            wanted = _uneven(size) / spread
            if size == self.hidden_size:
                wanted[EMBEDDED + WRITTEN] = SMALLEST * (1 + 4 * torch.rand(4))
        else:  # adds to them
            wanted = STREAM * _uneven(size) ** 2 / spread
        weight.copy_(wanted.clamp(SMALLEST, LARGEST) - shift)
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(0.1 * torch.randn(size))

    def _experts(self, module, args, output):
        factor = STREAM / output.square().mean().sqrt()
        for name, x in module.named_parameters(recurse=False):
            if name.startswith("down_proj"):
                x.mul_(factor)
        return output * factor


@torch.no_grad()
def loud(name: str, dtype=torch.float32, device="cpu", seed: int = 0, **more):
    """A loud model of a family of `tiny.FAMILIES`: in every dtype the same weights, rounded. `more`: for its config.

    Its buffers stay in float32, as `from_pretrained(dtype=...)` leaves them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = drawn(name, tie_word_embeddings=False, **more)
        made = _Loud(model)
        model(torch.randint(1, 97, (32, 14)), use_cache=False)
    for hook in made.hooks:
        hook.remove()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    return model.to(device)


class Exactly(torch.overrides.TorchFunctionMode):
    """Models compute norms, softmax and angles in float32 whatever their dtype is: within, in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        change = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return function(*map(change, args), **{k: change(x) for k, x in (kwargs or {}).items()})


def exact(model):
    """A copy in float64, to be run within `Exactly()`."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"  # torch's grouped products take no float64
    return model


def token_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Root mean square error of every token's logits, relative to their spread. (texts, tokens, vocabulary) both."""
    return (found.to(expected) - expected).square().mean(-1).sqrt() / expected.std(-1)


def times_worse(found: torch.Tensor, own: torch.Tensor) -> tuple[float, float]:
    """How many times the errors `own` the errors `found` are, and the standard error of the logarithm of that.

    Both (texts, tokens), of `token_errors`. The result is the geometric mean over tokens, where none counts for more
    than a factor of e: now and then an error is a hundred times the usual, where a softmax or an expert stood at the
    edge, and it is chance whether that is in found or in own. Tokens of a text share errors through the cache, so it
    is texts that are independent.
    """
    by_text = ((found + FLOOR) / (own + FLOOR)).log().clamp(-1, 1).mean(1)
    return by_text.mean().exp().item(), (by_text.std() / len(by_text) ** 0.5).item()
