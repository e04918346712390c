"""All layers as one kernel (fuse="model"), on a GPU: as near to float32 as layers by themselves, whatever the sizes."""

import copy

import pytest
import torch

from helpers import GPU, random_ids
from loud import times_worse, token_errors
from oracle import streaming_logits
from sinkattn import SinkCache, Stream, patch
from sinkattn.fuse.stack import Ahead, Stack
from tiny import tiny

pytestmark = pytest.mark.gpu
S, W = 4, 10
C = S + W
SHAPES = {
    "llama": dict(hidden_size=192, intermediate_size=320, num_attention_heads=3, num_key_value_heads=1, head_dim=64),
    "qwen2": dict(hidden_size=448, intermediate_size=576, num_attention_heads=7, num_key_value_heads=1),
    "qwen3": dict(hidden_size=320, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=128),
    "mistral-sliding": dict(hidden_size=256, intermediate_size=128, num_attention_heads=2, head_dim=128),
    "phi3": dict(hidden_size=640, intermediate_size=448, num_attention_heads=10, num_key_value_heads=2, vocab_size=97),
}  # an odd vocabulary: its head runs by itself


def loud(name: str, dtype: torch.dtype = torch.bfloat16):
    """A model whose attention is sharp and whose norms and biases are not those of a new one."""
    model = tiny(name, **{"vocab_size": 98, **SHAPES[name]}).to(GPU)
    with torch.no_grad():
        for path, x in model.named_parameters():
            if x.dim() == 1:
                x.uniform_(0.5, 1.5) if "norm" in path else x.normal_(0, 0.3)
            elif "q_proj" in path or "k_proj" in path or "qkv" in path:
                x.mul_(6)
    return model.to(dtype)


class Ran(list):
    """Steps that ran as one kernel: one for each capture. heads: how many with the head."""

    heads = 0


@pytest.fixture
def served(monkeypatch):
    ran, call, logits_of = Ran(), Stack.__call__, Ahead.logits_of

    def counted(self, layer, step, hidden):
        output = call(self, layer, step, hidden)
        if layer is self.layers[0] and output is not None:
            ran.append(step)
        return output

    def with_head(self, module, x):
        logits = logits_of(self, module, x)
        ran.heads += logits is not None
        return logits

    monkeypatch.setattr(Stack, "__call__", counted)
    monkeypatch.setattr(Ahead, "logits_of", with_head)
    return ran


def spread_error(found, expected) -> float:
    return ((found.double() - expected.double()).square().mean().sqrt() / expected.double().std()).item()


def errors_of(name: str, dtype: torch.dtype, sizes: tuple[int, int, int], rows: int) -> dict[str, torch.Tensor]:
    """Of a random model and text, by each way to fuse it: how far each token's logits are from float32."""
    sink_size, window_size, slack = sizes
    model, ids, errors = loud(name, dtype), random_ids(rows, 2 * (sink_size + window_size) + 31, GPU), {}
    exact = copy.deepcopy(model).float()
    expected = torch.cat([streaming_logits(exact, row[None], sink_size, window_size) for row in ids])
    for fuse in ("none", "layers", "model"):
        with patch(model, sink_size, window_size, fuse=fuse, slack=slack), torch.no_grad():
            cache = SinkCache(model)
            found = [model(piece, past_key_values=cache).logits for piece in ids.split(1, dim=1)]
            errors[fuse] = token_errors(torch.cat(found, dim=1), expected)
    return errors


LOGITS = [
    *((name, torch.bfloat16, (4, 10, 16), rows) for name in SHAPES for rows in (1, 2)),
    *((name, torch.bfloat16, sizes, 2) for name in ("llama", "qwen3") for sizes in ((0, 33, 0), (37, 5, 3))),
    *((name, torch.bfloat16, (4, 300, 16), 1) for name in ("llama", "qwen3")),
    ("qwen3", torch.float16, (4, 10, 16), 1),
]


@pytest.mark.parametrize("name, dtype, sizes, rows", LOGITS)
def test_logits(name, dtype, sizes, rows, served):
    """Token by token, through the wrap: no farther from float32 than the unfused model, and than layers.

    All three round on their own: one text is off by 0.11, so that `test_errors_in_the_mean` takes more of them.
    """
    errors = errors_of(name, dtype, sizes, rows)
    assert len(served) == 1 and served.heads == (name != "phi3")
    times = {other: times_worse(errors["model"], errors[other])[0] for other in ("none", "layers")}
    assert max(times.values()) < 1.4, times


@pytest.mark.parametrize("name", SHAPES)
def test_errors_in_the_mean(name, served):
    """Of texts of different models, over as many tokens."""
    errors = [errors_of(name, torch.bfloat16, (4, 10, 16), 1) for _ in range(8)]
    for other in ("none", "layers"):
        times = times_worse(*(torch.cat([x[kind] for x in errors]) for kind in ("model", other)))
        print(f"{name}: {times[0]:.3f} times as far off as {other}, give or take {times[1]:.3f}")
        assert times[0] < 1.15
    assert len(served) == 8


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padded_rows_and_rows_that_wait(name, served):
    """A prompt padded on the left; in some steps a row takes no token: nothing of it changes, and it goes on later."""
    model, ids = loud(name), random_ids(2, 30, GPU)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :11] = False
    waits = [torch.tensor([[i % 3 == 0], [i % 3 > 0 and i % 2 == 0]]) for i in range(3 * C)]
    steps = [(random_ids(2, 1, GPU), ~x.to(GPU)) for x in waits]
    logits, models = {}, {"none": copy.deepcopy(model).float(), "layers": model, "model": model}
    for fuse, model in models.items():
        with patch(model, S, W, fuse=fuse), torch.no_grad():
            cache, kept = SinkCache(model), []
            model(ids, attention_mask=mask, past_key_values=cache)
            for token, goes_on in steps:
                rings = [x.clone() for ring in cache.rows.rings.values() for x in (ring.keys, ring.values)]
                found = model(token, attention_mask=goes_on, past_key_values=cache).logits
                kept.append(found[goes_on])
                now = [x for ring in cache.rows.rings.values() for x in (ring.keys, ring.values)]
                for row in (~goes_on[:, 0]).nonzero():
                    assert all(torch.equal(a[row], b[row]) for a, b in zip(rings, now, strict=True))
            logits[fuse] = torch.cat(kept)[None]
            taken = torch.cat([goes_on for _, goes_on in steps], dim=1).sum(1)
            assert torch.equal(cache.lengths, taken + torch.tensor([30, 19], device=GPU))
    of_model, of_layers = (token_errors(logits[fuse], logits["none"]) for fuse in ("model", "layers"))
    print(f"{name}: {of_model.median():.4f} off, at most {of_model.max():.3f}; {of_layers.median():.4f} by layers")
    assert times_worse(of_model, of_layers)[0] < 1.4 and of_layers.median() < 0.2 and len(served) == 1


def test_what_dead_slots_hold(served):
    """NaN in slots that no token has filled is not seen."""
    model, ids = loud("llama"), random_ids(1, 9, GPU)
    with patch(model, S, 40, fuse="model"), torch.no_grad():
        texts = []
        for filled in (False, True):
            cache = SinkCache(model)
            model(ids, past_key_values=cache)
            if filled:
                for ring in cache.rows.rings.values():
                    ring.keys[:, :, 9:], ring.values[:, :, 9:] = torch.nan, torch.nan
            texts.append([model(ids[:, i : i + 1], past_key_values=cache).logits.clone() for i in range(6)])
    assert all(torch.equal(a, b) for a, b in zip(*texts, strict=True)) and texts[1][-1].isfinite().all() and served


def test_taken_back(served):
    """A text of which the end is taken back goes on as if that had not been."""
    model, ids = loud("qwen2"), random_ids(2, 20, GPU)
    with patch(model, S, W, fuse="model"):
        stream = Stream(model)
        stream.append(ids)
        list(stream.generate(7, do_sample=False, eos_token_id=[]))  # first steps: five kernels a layer
        for _ in range(4):
            first = torch.stack(list(stream.generate(7, do_sample=False, eos_token_id=[])))
            stream.rewind(7)
            again = torch.stack(list(stream.generate(7, do_sample=False, eos_token_id=[])))
            assert torch.equal(first, again)
    assert served


def test_two_texts_by_turns(served):
    """Each has its own state on the device, and a copy of the model its own weights."""
    model = loud("llama")
    ids = [random_ids(1, 20, GPU) for _ in range(2)]

    def text_of(model, ids, n):
        stream = Stream(model)
        stream.append(ids)
        return stream.generate(n, do_sample=False, eos_token_id=[])

    with patch(model, S, W, fuse="model"):
        alone = [torch.stack(list(text_of(model, x, 40))) for x in ids]
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.layers[1].mlp.down_proj.weight.mul_(-1)
        assert not torch.equal(torch.stack(list(text_of(other, ids[0], 40))), alone[0])
        turns = zip(*(text_of(model, x, 40) for x in ids), strict=True)
        together = [torch.stack(x) for x in zip(*turns, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)) and len(served) >= 2


def test_what_is_not_served(served):
    """More rows, float32, and layers whose own outputs are asked for: five kernels a layer, and the same logits."""
    for model, rows in ((loud("llama"), 3), (loud("llama", torch.float32), 1)):
        with patch(model, S, W) as handle:
            stream = Stream(model)
            stream.append(random_ids(rows, 20, GPU))
            assert len(list(stream.generate(5, do_sample=False, eos_token_id=[]))) == 5
            assert handle.why_eager is None and not served
    model, ids = loud("llama"), random_ids(1, 20, GPU)
    model.config.output_hidden_states = True
    hidden = {}
    for fuse in ("layers", "model"):
        with patch(model, S, W, fuse=fuse), torch.no_grad():
            cache = SinkCache(model)
            hidden[fuse] = [model(x, past_key_values=cache).hidden_states for x in ids.split(1, dim=1)][-1]
    assert all(torch.equal(a, b) for a, b in zip(hidden["layers"], hidden["model"], strict=True))


def test_changes(served):
    """An exchanged layer runs by itself from the next step on, and all of them as one again once it is back."""
    model, ids = loud("llama"), random_ids(1, 30, GPU)
    with patch(model, S, W, fuse="model"), torch.no_grad():

        def logits():
            cache = SinkCache(model)
            return torch.cat([model(x, past_key_values=cache).logits.clone() for x in ids.split(1, dim=1)])

        expected = logits()
        assert torch.equal(logits(), expected) and served
        mlp = model.model.layers[1].mlp
        model.model.layers[1].mlp = copy.deepcopy(mlp)
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
        assert spread_error(logits(), expected) > 0.1
        model.model.layers[1].mlp = mlp
        assert torch.equal(logits(), expected) and served.heads == len(served)
        for owner, name in (model, "lm_head"), (model.model, "norm"):
            part, heads = getattr(owner, name), served.heads
            setattr(owner, name, copy.deepcopy(part))
            getattr(owner, name).weight.mul_(-1)
            assert spread_error(logits(), -expected) < 0.05 and served.heads == heads
            setattr(owner, name, part)
            assert torch.equal(logits(), expected) and served.heads == heads + 1


def test_what_lies_between_norm_and_head(served):
    """Whoever writes what the norm gives, or hands on something else, gets the head's answer to that."""
    model, ids = loud("llama"), random_ids(1, 30, GPU)
    body = model.model
    between = {
        "nothing": lambda x: x,
        "written": lambda x: x.mul_(-2),
        "another": lambda x: -2 * x,
        "others": lambda x: (model.lm_head(x.clone()), x)[1],
    }
    found = {}
    with patch(model, S, W, fuse="model"), torch.no_grad():
        forward = type(body).forward
        for name, change in between.items():

            def changed(self, *args, change=change, **kwargs):
                output = forward(self, *args, **kwargs)
                output.last_hidden_state = change(output.last_hidden_state)
                return output

            type(body).forward = changed
            try:
                cache, heads = SinkCache(model), served.heads
                steps = [model(x, past_key_values=cache).logits.clone() for x in ids.split(1, dim=1)]
                found[name] = torch.cat(steps), served.heads - heads
            finally:
                type(body).forward = forward
    expected, heads = found["nothing"]
    assert heads == 1 and found["others"][1] == 1 and torch.equal(found["others"][0], expected)
    for name in ("written", "another"):
        logits, heads = found[name]
        assert heads == 0 and spread_error(logits, -2 * expected) < 0.05


def test_refusals():
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device=GPU)
    state = torch.ops.sinkattn.stack_state(x, 64, 1, 1, 64, 2, 32)
    assert len(state) and not state.any()
    assert not len(torch.ops.sinkattn.stack_state(x, 64, 1, 1, 96, 2, 32))  # a head dim that is not served
    table = torch.zeros(2, 17, dtype=torch.int64, device=GPU)
    lengths = torch.zeros(1, dtype=torch.int64, device=GPU)
    more = 64, 1, 1, 64, 32, 1.0, 0, False, 1e-6, 0.0, 0.0, 0.0, 1
    norm, head, none = x[0], x.new_zeros(6, 64), (None, None)
    for wrong in (
        (x.float(), table, *none, lengths, None, None, state),
        (x, table[:, :16], *none, lengths, None, None, state),
        (x, table, *none, lengths[:0], None, None, state),
        (x, table, *none, lengths, None, None, state[:-4]),
        (x, table, *none, lengths.cpu(), None, None, state),
        (x, table, *none, lengths, None, torch.zeros(1, 1, 2, 32, device=GPU), state),
        (x, table, norm, head[:5], lengths, None, None, state),
        (x, table, norm, head[:, :32], lengths, None, None, state),
        (x, table, norm[:32], head, lengths, None, None, state),
        (x, table, norm.float(), head, lengths, None, None, state),
        (x, table, norm, head.cpu(), lengths, None, None, state),
        (x, table, None, head, lengths, None, None, state),
    ):
        with pytest.raises(RuntimeError, match="sinkattn"):
            torch.ops.sinkattn.stack(*wrong, *more)
    assert not state.any()
