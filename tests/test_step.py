"""Fused modules, captured steps and Stream's rows: the same numbers as without them, and nothing left behind."""

import copy
import gc

import pytest
import torch
import transformers

from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, Stream, patch
from tiny import FAMILIES, tiny

S, W = 4, 10
C = S + W
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FUSED = {  # of the layers of a family: attention modules, whole layers; all 3 or 4 layers where not named
    "gemma2": (4, 0),  # norms after attention and MLP
    "gemma3": (4, 0),
    "gpt_neox": (3, 0),  # layer norm, attention and MLP side by side
    "stablelm": (3, 0),
    "cohere2": (4, 0),
    "glm4": (3, 0),
    "olmo2": (3, 0),
    "deepseek_v3": (0, 0),  # MLA
    "gpt_oss": (4, 0),  # experts
    "smollm3": (4, 4),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_ids(rows, tokens, device="cpu"):
    return torch.randint(1, 97, (rows, tokens)).to(device)


def storages(model) -> dict[int, int]:
    held = [x.untyped_storage() for x in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_fused_and_that_it_comes_back(name):
    """By kind and number; the weights are held once meanwhile, and afterwards are what they were, bit for bit."""
    model = tiny(name)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    places, size = len(storages(model)), sum(storages(model).values())
    handle = patch(model, S, W)
    kinds = [type(x).__name__ for x in handle.runner.fused.replaced]
    assert (kinds.count("Attention"), kinds.count("Layer")) == FUSED.get(name, (3, 3))
    assert sum(storages(model).values()) == size
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    handle.remove()
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert len(storages(model)) == places and sum(storages(model).values()) == size
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [3, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_that_lie_apart(dtype, rows, device):
    """One column of a batch's embeddings at a time, whose rows are not next to each other."""
    model, ids = tiny("llama").to(device, dtype), random_ids(rows, 6, device)
    with patch(model, S, W), torch.no_grad():
        embeds, logits = model.get_input_embeddings()(ids), []
        for name, given in (("input_ids", ids), ("inputs_embeds", embeds)):
            cache = SinkCache(model)
            steps = [model(**{name: given[:, t : t + 1]}, past_key_values=cache).logits for t in range(6)]
            logits.append(torch.cat(steps, dim=1))
    assert relative_error(logits[1], logits[0]) < 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "olmo2", "gpt_neox", "gemma3"])
def test_fused_or_not_is_rounding(name):
    model, ids = tiny(name).double(), random_ids(2, 3 * C)
    logits = {}
    for fuse in ("layers", "attention", "none"):
        with patch(model, S, W, fuse=fuse, backend="reference") as handle, torch.no_grad():
            assert (handle.runner.fused is None) == (fuse == "none")
            cache = SinkCache(model)
            pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([30, *[1] * 12], dim=1)]
            logits[fuse] = torch.cat(pieces, dim=1)
    assert (
        relative_error(logits["layers"], logits["none"]) < 1e-5
    )  # some norms of transformers are float32 in any dtype
    assert relative_error(logits["attention"], logits["none"]) < 1e-5


def test_what_has_another_form_is_left_alone():
    """Granite multiplies what it adds; with a multiplier of 1 it is a layer like others."""
    common = dict(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_multiplier=0.3,
    )  # fmt: skip
    for multiplier, layers in ((0.5, 0), (1.0, 2)):
        config = transformers.GraniteConfig(**common, residual_multiplier=multiplier)
        model = transformers.GraniteForCausalLM(config).eval()
        ids, expected = random_ids(1, 30), None
        expected = streaming_logits(model, ids, S, W)
        with patch(model, S, W) as handle, torch.no_grad():
            kinds = [type(x).__name__ for x in handle.runner.fused.replaced]
            assert (kinds.count("Attention"), kinds.count("Layer")) == (2, layers)
            assert relative_error(model(ids).logits, expected) < 2e-5


@pytest.mark.parametrize("device", DEVICES)
def test_hooks_are_called_wherever_they_are(device):
    model, ids = tiny("qwen3").to(device), random_ids(1, 20, device)
    with patch(model, S, W), torch.no_grad():
        expected, names = model(ids).logits, [name for name, _ in model.named_modules() if name]
        for name in names:
            heard = []
            hook = model.get_submodule(name).register_forward_hook(lambda *_, heard=heard: heard.append(1))
            logits = model(ids).logits
            hook.remove()
            is_list = isinstance(model.get_submodule(name), torch.nn.ModuleList)
            assert len(heard) >= (not is_list), name
            assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_change_while_patched(device):
    """Whatever is done to the model's own parameters and modules counts from the next call on."""
    model, ids = tiny("llama").to(device), random_ids(1, 20, device)
    with patch(model, S, W), torch.no_grad():
        steps = [ids[:, i : i + 1] for i in range(20)]

        def logits():
            cache = SinkCache(model)
            pieces = [model(piece, past_key_values=cache).logits for piece in (ids, *steps[:6])]
            return torch.cat(pieces, dim=1)

        first = logits()
        attention = model.model.layers[1].self_attn
        attention.k_proj.weight.mul_(1.5)  # in place
        changed = logits()
        attention.q_proj.weight.data = attention.q_proj.weight.data * -1  # in another place
        moved = logits()
        seen, parts = [], (attention.v_proj, model.model.layers[1].mlp, model.model.layers[1].input_layernorm)
        hooks = [part.register_forward_hook(lambda *_: seen.append(1)) for part in parts]
        hooked = logits()
        for hook in hooks:
            hook.remove()
        again = logits()
    other = tiny("llama").to(device)
    text = torch.cat((ids, *steps[:6]), dim=1)
    for found, factors in (
        (first, (1, 1)),
        (changed, (1, 1.5)),
        (moved, (-1, 1.5)),
        (hooked, (-1, 1.5)),
        (again, (-1, 1.5)),
    ):
        reference = copy.deepcopy(other)
        reference.model.layers[1].self_attn.q_proj.weight.data *= factors[0]
        reference.model.layers[1].self_attn.k_proj.weight.data *= factors[1]
        assert relative_error(found, streaming_logits(reference, text, S, W)) < 2e-5
    assert len(seen) == 3 * 7


def test_copies_of_a_patched_model():
    model, ids = tiny("llama"), random_ids(1, 40)
    with patch(model, S, W), torch.no_grad():
        copied = copy.deepcopy(model)
        expected = model(ids).logits
        copied.model.layers[0].self_attn.q_proj.weight.zero_()
        assert torch.equal(model(ids).logits, expected)
        assert relative_error(copied(ids).logits, expected) > 1e-3


def test_saved_while_patched(tmp_path):
    model, ids = tiny("llama"), random_ids(1, 10)
    with torch.no_grad():
        expected = model(ids).logits
    with patch(model, S, W):
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


class _Step:
    """Stands for a captured step."""


def test_rows_go_to_the_next_cache():
    """What a cache leaves, with a captured step, serves the next of as many rows, and is given back by remove()."""
    model, ids = tiny("llama"), random_ids(2, 20)
    with patch(model, S, W) as handle, torch.no_grad():
        spare, expected = handle.plan.spare, model(ids).logits

        def leave(rows):
            cache = SinkCache(model)
            logits = model(ids[:rows], past_key_values=cache).logits
            cache.rows.captured = _Step()
            return cache, logits

        cache, _ = leave(2)
        rows = cache.rows
        del cache
        assert spare.rows is rows
        cache, logits = leave(2)
        assert cache.rows is rows and spare.rows is None and torch.equal(logits, expected)
        other, _ = leave(2)
        assert other.rows is not rows
        del other
        fewer, _ = leave(1)
        assert len(fewer.lengths) == 1
        del fewer, cache
        model.to(torch.bfloat16)  # rows of float32 do not suit any more
        assert model(ids).logits.dtype == torch.bfloat16
        cache, _ = leave(2)
    del cache
    assert spare.rows is None


def endless(stream, steps):
    return torch.stack([ids for ids, _ in zip(stream.generate(eos_token_id=[]), range(steps), strict=False)], dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_rows_are_refilled_while_others_go_on(name, device):
    """Row 1 gets a new text in the middle of the loop: both rows then write what they would write alone."""
    if name == "falcon_h1":
        torch.manual_seed(0)
        config = transformers.FalconH1Config(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
            mamba_chunk_size=16, eos_token_id=None, pad_token_id=0, bos_token_id=1,
        )  # fmt: skip
        model = transformers.FalconH1ForCausalLM(config).eval().to(device)
    else:
        model = tiny(name).to(device)
    first, second = random_ids(2, 20, device), random_ids(1, 7, device)
    with patch(model, S, W):

        def alone(text, steps):
            return model.generate(text, do_sample=False, max_new_tokens=steps)[0, text.shape[1] :]

        stream, found = Stream(model), []
        stream.append(first)
        for step, ids in enumerate(stream.generate(30, eos_token_id=[])):
            found.append(ids)
            if step == 8:
                stream.reset([1])
            if step == 11:
                stream.append(second, rows=[1])
        found = torch.stack(found, dim=1)
        assert torch.equal(found[0], alone(first[:1], 30))
        assert torch.equal(found[1, :9], alone(first[1:], 9))
        assert found[1, 9:12].tolist() == [0, 0, 0]  # the pad token, while it waits
        assert torch.equal(found[1, 12:], alone(second, 18))
        assert stream.lengths.tolist() == [50, 25]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_have_ended_stay_as_they_are(device):
    model, ids = tiny("llama").to(device), random_ids(3, 20, device)
    with patch(model, S, W):
        free = Stream(model)
        free.append(ids)
        free = endless(free, 40)
        end = free[0, 4].item()
        stops = [row.index(end) + 1 if end in row else None for row in free.tolist()]
        stream = Stream(model)
        stream.append(ids)
        steps = torch.stack(list(stream.generate(40, eos_token_id=end)), dim=1)
        taken = [40 if stop is None else stop for stop in stops]
        assert steps.shape[1] == max(taken)
        assert stream.lengths.tolist() == [20 + n for n in taken]
        more = random_ids(3, 5, device)
        stream.append(more)
        after = endless(stream, 10)
        for row, n in enumerate(taken):
            assert torch.equal(steps[row, :n], free[row, :n])
            text = torch.cat((ids[row], free[row, :n], more[row]))[None]
            expected = model.generate(text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=10)
            assert torch.equal(after[row], expected[0, -10:])


def test_rows_that_are_not_there():
    model = tiny("llama")
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(random_ids(2, 5))
        lengths = stream.lengths.tolist()
        for rows, ids in (
            ([2], random_ids(1, 3)),
            ([0, 0], random_ids(2, 3)),
            ([], random_ids(1, 3)),
            ([1], random_ids(2, 3)),
        ):
            with pytest.raises(ValueError, match="rows"):
                stream.append(ids, rows=rows)
        with pytest.raises(ValueError, match="rows"):
            stream.reset([-1])
        assert stream.lengths.tolist() == lengths
        stream.reset()
        with pytest.raises(ValueError, match="append"):
            stream.generate()
        stream.append(random_ids(2, 5))
        tokens = stream.generate()
    with pytest.raises(ValueError, match="not patched any more"):
        next(tokens)
    with patch(model, S, W), pytest.raises(ValueError, match="earlier patch"):
        stream.append(random_ids(2, 5))


def test_a_streamer_hears_every_step():
    class Heard(transformers.generation.BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids.append(value.tolist())

        def end(self):
            self.ids.append(None)

    model, heard = tiny("llama"), Heard()
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(random_ids(2, 5))
        steps = list(stream.generate(6, eos_token_id=[], streamer=heard))
    assert heard.ids == [*(ids.tolist() for ids in steps), None]


def test_why_a_step_runs_eagerly():
    with patch(tiny("llama"), S, W) as handle:
        assert handle.why_eager is not None and "cuda_graph" in repr(patch(tiny("llama"), S, W, cuda_graph=False))
    with pytest.raises(ValueError, match="fuse='all'"):
        patch(tiny("llama"), S, W, fuse="all")


# On a GPU: captured steps.


@pytest.fixture
def captures(monkeypatch):
    """How many captured steps ran."""
    from sinkattn.runner import Runner

    ran, replay = [], Runner.replay

    def counted(self, *args):
        output = replay(self, *args)
        ran.append(output is not None)
        return output

    monkeypatch.setattr(Runner, "replay", counted)
    return ran


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox", "gpt_oss", "deepseek_v3"])
def test_captured_steps_write_the_same(name, captures):
    """Greedy, sampling, beams, padding, other batches, several caches in turn: token for token as without graphs."""
    model = tiny(name).cuda()

    def texts(how):
        torch.manual_seed(5)
        one, three = random_ids(1, 20, "cuda"), random_ids(3, 20, "cuda")
        mask = torch.ones_like(three)
        mask[1, :7] = 0
        common = dict(max_new_tokens=5 * C, do_sample=False)
        with patch(model, S, W, **how) as handle:
            found = [model.generate(one, **common), model.generate(three, attention_mask=mask, **common)]
            found.append(model.generate(one, **common))
            found.append(model.generate(three, attention_mask=mask, num_beams=3, max_new_tokens=12, do_sample=False))
            torch.manual_seed(6)
            found.append(model.generate(three, attention_mask=mask, max_new_tokens=30, do_sample=True, top_k=9))
            caches = [SinkCache(model) for _ in range(2)]
            for _ in range(3):
                for i, cache in enumerate(caches):
                    ids = random_ids(1, 3 + i, "cuda")
                    found.append(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False))
            stream = Stream(model)
            stream.append(one)
            found.append(endless(stream, 5 * C))
            return found, handle.why_eager

    captured, reason = texts({})
    if name not in ("gpt_oss", "deepseek_v3"):  # experts in float32 may wait for the host
        assert reason is None and all(captures) and len(captures) > 200
    before = len(captures)
    eager, reason = texts(dict(cuda_graph=False))
    assert len(captures) == before and reason == "cuda_graph=False"
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(captured[0][0, 20:], captured[-1][0])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_captured_logits_in_half_precision(dtype, rows, captures):
    """Layers of five kernels, replayed: about as far from the float32 oracle as the unfused, eager model."""
    model = tiny("qwen3", hidden_size=128, intermediate_size=256, head_dim=64).cuda()
    ids = random_ids(rows, 5 * C, "cuda")
    expected = torch.cat([streaming_logits(model, row[None], S, W) for row in ids])
    model.to(dtype)
    errors = {}
    for fuse, graph in (("layers", True), ("none", False)):
        with patch(model, S, W, fuse=fuse, cuda_graph=graph), torch.no_grad():
            cache = SinkCache(model)
            kept = [model(piece, past_key_values=cache).logits for piece in ids.split(1, dim=1)]
            error = (torch.cat(kept, dim=1).double() - expected.double()).square().mean().sqrt()
            errors[fuse] = (error / expected.double().std()).item()
    assert sum(captures) == 5 * C - 1 and errors["layers"] < 1.5 * errors["none"] + 1e-3


@needs_gpu
def test_what_was_returned_stays(captures):
    model, ids = tiny("llama").cuda(), random_ids(1, 30, "cuda")
    with patch(model, S, W), torch.no_grad():
        cache, kept = SinkCache(model), []
        for piece in ids.split(1, dim=1):
            kept.append(model(piece, past_key_values=cache).logits)
        assert relative_error(torch.cat(kept, dim=1), model(ids).logits) < 2e-5
    assert sum(captures) == 29  # all but the first


@needs_gpu
def test_what_cannot_be_captured_runs_eagerly():
    model, ids = tiny("llama").cuda(), random_ids(1, 20, "cuda")
    expected = tiny("llama").cuda()
    with patch(model, S, W) as handle:
        first = model.generate(ids, do_sample=False, max_new_tokens=30)
        assert handle.why_eager is None
        heard = []
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: heard.append(1))
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=30), first)
        assert "hooks" in handle.why_eager and "mlp" in handle.why_eager and len(heard) == 30
        hook.remove()
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=30), first)
        assert handle.why_eager is None and len(heard) == 30
        out = model(ids, output_hidden_states=True)
        step = model(ids[:, :1], past_key_values=out.past_key_values, output_hidden_states=True)
        assert len(step.hidden_states) == 4
    mlp = model.model.layers[1].mlp
    mlp.act_fn = _Waits(mlp.act_fn)
    expected.model.layers[1].mlp.act_fn = mlp.act_fn
    with patch(model, S, W) as handle:
        found = model.generate(ids, do_sample=False, max_new_tokens=30)
        assert "capturing its step failed" in handle.why_eager
    assert torch.equal(found, first)


class _Waits(torch.nn.Module):
    """An activation that looks at its input on the host."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.abs().max().item() >= 0 else x


@needs_gpu
def test_memory_comes_back():
    model, ids = tiny("llama").cuda(), random_ids(2, 20, "cuda")

    def generate():
        handle = patch(model, S, 2000)
        model.generate(ids, do_sample=False, max_new_tokens=10)
        held = torch.cuda.memory_allocated()
        handle.remove()
        return held

    generate()  # workspaces of libraries stay
    gc.collect()
    before = torch.cuda.memory_allocated()
    held = generate()
    gc.collect()
    assert held - before > 2 * 2004 * 2 * 16 * 4 * 2 * 3  # the last cache is kept for the next one
    assert torch.cuda.memory_allocated() <= before + 4096  # torch keeps a few numbers for each graph


@needs_gpu
def test_a_long_stream_grows_nothing():
    model = tiny("llama").cuda()
    with patch(model, S, W):
        stream = Stream(model)
        stream.append(random_ids(2, 5, "cuda"))
        tokens, held = stream.generate(None, do_sample=True, eos_token_id=[], seed=1), []
        for step, ids in enumerate(tokens):
            assert ids.shape == (2,)
            if step in (100, 3000):
                held.append(torch.cuda.memory_allocated())
            if step == 3000:
                break
        assert held[0] == held[1]
