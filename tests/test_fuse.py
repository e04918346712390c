"""Fused modules: the same numbers as without them, whatever hooks, weights and copies do, and nothing left behind."""

import copy
import weakref

import pytest
import torch
import transformers

from helpers import DEVICES, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, patch
from sinkattn.fuse.stack import Ahead
from tiny import FAMILIES, tiny

S, W = 4, 10
C = S + W
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
        relative_error(logits["layers"], logits["none"]) < 5e-5
    )  # some norms of transformers are float32 in any dtype
    assert relative_error(logits["attention"], logits["none"]) < 5e-5


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
            assert relative_error(model(ids).logits, expected) < 1e-4


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
            assert relative_error(logits, expected) < 5e-5


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
        assert relative_error(found, streaming_logits(reference, text, S, W)) < 1e-4
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


def test_logits_that_are_there_before_the_head_is_asked():
    """They are handed out for what the norm made of what the last layer gave, once, and for nothing else."""
    norm, head, other = (torch.nn.Identity() for _ in range(3))
    out, y, logits = torch.randn(2, 1, 8), torch.randn(2, 1, 8), torch.randn(2, 5)

    def ahead(x=out, module=norm):
        found = Ahead(norm, head, out, logits)
        found.saw_norm(module, x, y)
        return found

    for x in (y, y[:, -1:], y.view(2, 8)):
        assert torch.equal(ahead().logits_of(head, x), logits.view(*x.shape[:-1], 5))
    assert ahead().logits_of(other, y) is None and ahead().logits_of(head, y.clone()) is None
    assert ahead().logits_of(head, y[:1]) is None and ahead().logits_of(head, out) is None
    assert ahead(module=other).logits_of(head, y) is None and ahead(out.clone()).logits_of(head, y) is None
    once = ahead()
    assert once.logits_of(head, y) is not None and once.logits_of(head, y) is None
    for written in (y, out):
        late = Ahead(norm, head, out, logits)
        if written is out:
            out.add_(1)
        late.saw_norm(norm, out, y)
        if written is y:
            y.add_(1)
        assert late.logits_of(head, y) is None


def test_nothing_else_comes_to_lie_where_the_norm_wrote():
    norm, (out, y) = torch.nn.Identity(), torch.randn(2, 1, 1, 8)
    ahead, kept = Ahead(norm, norm, out, torch.randn(1, 5)), (weakref.ref(out), weakref.ref(y))
    ahead.saw_norm(norm, out, y)
    del out, y
    assert all(x() is not None for x in kept)
