"""What is changed in a model after patch(): it counts, or an error says so; never the old model's text."""

import copy
import dataclasses
import gc
import pickle

import peft
import pytest
import torch
from torch.nn.modules import module as modules
from transformers import CONFIG_MAPPING

import sweep
from helpers import fed, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, Stream, patch
from sinkattn.changes import Lookout
from tiny import tiny

S, W = 4, 8
EXACT = 1e-4
TARGETS = {"gpt_neox": ["query_key_value"], "phi3": ["qkv_proj", "o_proj"], "deepseek_v3": ["o_proj"]}


def lora(name: str) -> peft.LoraConfig:
    modules = TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules, r=4, init_lora_weights=False)


@pytest.mark.parametrize("fuse", ["layers", "attention", "none"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox", "deepseek_v3"])
def test_adapters_that_come_and_go(name, fuse):
    """An adapter put on a patched model, in the middle of a text too, and taken off again."""
    ids = random_ids(1, 40)
    base = streaming_logits(tiny(name), ids, S, W)
    twin = tiny(name)
    torch.manual_seed(5)
    peft.get_peft_model(twin, lora(name)).eval()
    adapted = streaming_logits(twin, ids, S, W)
    assert relative_error(adapted, base) > 0.05
    model = tiny(name)
    handle = patch(model, S, W, fuse=fuse)
    with torch.no_grad():
        assert relative_error(model(ids).logits, base) < EXACT
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(model, lora(name)).eval()
        assert relative_error(fed(model, ids, 1), adapted) < EXACT  # before any prompt
        assert relative_error(wrapped(input_ids=ids).logits, adapted) < EXACT
        wrapped.unload()
        assert relative_error(fed(model, ids, 1), base) < EXACT
        assert relative_error(model(ids).logits, base) < EXACT
    handle.remove()
    assert torch.equal(model(ids).logits, tiny(name)(ids).logits)


def _doubled(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def _linear(*shape):
    torch.manual_seed(9)
    return torch.nn.Linear(*shape, bias=False)


def _weight(*shape):
    return torch.nn.Parameter(_linear(*shape).weight)


CHANGES = {
    "q_proj": lambda layer: setattr(layer.self_attn, "q_proj", _linear(64, 64)),
    "o_proj": lambda layer: setattr(layer.self_attn, "o_proj", _linear(64, 64)),
    "gate_proj": lambda layer: setattr(layer.mlp, "gate_proj", _linear(64, 96)),
    "mlp": lambda layer: setattr(layer, "mlp", torch.nn.Tanh()),
    "a norm": lambda layer: setattr(layer, "input_layernorm", torch.nn.Tanh()),
    "act_fn": lambda layer: setattr(layer.mlp, "act_fn", torch.nn.ReLU()),
    "mlp.forward": lambda layer: _doubled(layer.mlp),
    "q_proj.forward": lambda layer: _doubled(layer.self_attn.q_proj),
    "a layer's forward": lambda layer: _doubled(layer),
    "eps": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 3.0),
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 0.5),
    "k_proj.weight": lambda layer: setattr(layer.self_attn.k_proj, "weight", _weight(64, 32)),
    "v_proj.weight.data": lambda layer: setattr(layer.self_attn.v_proj.weight, "data", _linear(64, 32).weight.data),
    "up_proj.weight.data": lambda layer: setattr(layer.mlp.up_proj.weight, "data", _linear(64, 96).weight.data),
    "k_proj.weight in place": lambda layer: layer.self_attn.k_proj.weight.data.mul_(1.5),
    "a norm's weight": lambda layer: setattr(layer.input_layernorm, "weight", torch.nn.Parameter(torch.rand(64))),
    "a bias": lambda layer: setattr(layer.self_attn.q_proj, "bias", torch.nn.Parameter(torch.ones(64))),
    "down_proj.weight": lambda layer: setattr(layer.mlp.down_proj, "weight", _weight(96, 64)),
}  # fmt: skip


@pytest.mark.parametrize("fuse", ["layers", "none"])
@pytest.mark.parametrize("what", CHANGES)
def test_whatever_is_exchanged(what, fuse):
    """Against the oracle on a model that got the same change and was never patched."""
    ids, model, twin = random_ids(1, 40), tiny("llama"), tiny("llama")
    patch(model, S, W, fuse=fuse)
    with torch.no_grad():
        before = model(ids).logits
        for changed in (model, twin):
            torch.manual_seed(3)
            CHANGES[what](changed.model.layers[1])
        expected = streaming_logits(twin, ids, S, W)
        assert relative_error(before, expected) > 1e-2, "the change makes no difference"
        assert relative_error(model(ids).logits, expected) < EXACT
        assert relative_error(fed(model, ids, 1), expected) < EXACT


def _hooked(rotary):
    rotary.register_forward_hook(lambda module, args, tables: tuple(2 * x for x in tables))


ROTARIES = {
    "its scaling": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.5),
    "a hook": lambda model: _hooked(model.model.rotary_emb),
    "its forward": lambda model: _scaled_forward(model.model.rotary_emb),
    "another one": lambda model: _exchanged_rotary(model.model),
}


def _scaled_forward(rotary):
    forward = rotary.forward
    rotary.forward = lambda x, position_ids, **kwargs: tuple(2 * y for y in forward(x, position_ids, **kwargs))


def _exchanged_rotary(body):
    body.rotary_emb = copy.deepcopy(body.rotary_emb)
    body.rotary_emb.__dict__.pop("forward", None)  # what sinkattn has put there
    body.rotary_emb.attention_scaling = 1.5


@pytest.mark.parametrize("fuse", ["layers", "attention", "none"])
@pytest.mark.parametrize("what", ROTARIES)
def test_rotary_tables_that_are_scaled(what, fuse):
    """What a rotary module gives is what attention is computed with, also behind a step that has kept it."""
    ids, model, twin = random_ids(1, 40), tiny("llama"), tiny("llama")
    patch(model, S, W, fuse=fuse)
    with torch.no_grad():
        before = fed(model, ids, 1)
        for changed in (model, twin):
            ROTARIES[what](changed)
        expected = streaming_logits(twin, ids, S, W)
        assert relative_error(before, expected) > 1e-2, "the change makes no difference"
        copied = copy.deepcopy(model)
        for one in (model, copied):
            assert relative_error(one(ids).logits, expected) < EXACT
            assert relative_error(fed(one, ids, 1), expected) < EXACT


@pytest.mark.parametrize("name", ["llama", "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_rotaries_that_do_not_change_stay_fused(name):
    model, ids = tiny(name), random_ids(1, 40)
    with patch(model, S, W) as handle, torch.no_grad():
        forms = [*handle.runner.fused.attentions, *handle.runner.fused.layers]
        assert forms
        for _ in range(2):
            fed(model, ids, 1)
            fed(model, ids, 40)
        assert all(form.is_valid for form in forms)


@pytest.mark.skipif("gemma4_unified" not in CONFIG_MAPPING, reason="not in this transformers")
def test_configs_whose_layers_differ():
    """They refuse to be compared: heads are of another size in some of their layers."""
    model, ids = sweep.build("gemma4_unified"), random_ids(1, 20)
    with patch(model, S, W) as handle, torch.no_grad():
        model(ids)
        model(ids)
        assert handle.runner.lookout.version == 1
        model.config.get_text_config().final_logit_softcapping = 3.0
        model(ids)
        assert handle.runner.lookout.version == 2


def test_states_that_go_on_one_token_at_a_time():
    """A second piece is tried token by token before `patch` has found out whether steps can be captured."""
    with patch(sweep.build("jamba"), S, W) as handle:
        assert not handle.plan.continues and handle.why_eager != "patch() is not done"


def test_patch_looks_once(monkeypatch):
    """When it is done: what it runs meanwhile is the model that it was given."""
    looked, look = [], Lookout.look
    monkeypatch.setattr(Lookout, "look", lambda self, fused: (looked.append(1), look(self, fused)))
    model = tiny("llama").to(torch.bfloat16)
    for _ in range(2):
        with patch(model, S, W):
            assert len(looked) == 1
            looked.clear()


def test_steps_of_one_token_do_not_look(monkeypatch):
    """Whatever a model makes of its modules in a step; but a module that is put behind one that was put is noticed."""
    model, ids, looked = tiny("llama"), random_ids(1, 40), []
    with patch(model, S, W) as handle, torch.no_grad():
        cache, stream = SinkCache(model), Stream(model)
        model(ids, past_key_values=cache)
        stream.append(ids)
        look = handle.runner.look
        monkeypatch.setattr(handle.runner, "look", lambda: (looked.append(1), look()))
        for piece in ids.split(1, dim=1):
            model(piece, past_key_values=cache)
        list(stream.generate(10, eos_token_id=[]))
        assert not looked
        model.generate(ids, max_new_tokens=10, eos_token_id=None)
        assert len(looked) == 1
        model.model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.Tanh())
        model(ids[:, :1], past_key_values=cache)
        assert len(looked) == 2
        model.model.layers[1].mlp.act_fn[0] = torch.nn.ReLU()
        model(ids[:, :1], past_key_values=cache)
        assert len(looked) == 3


@pytest.mark.parametrize("fuse", ["layers", "none"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("order", ["changed, copied", "changed, run, copied", "copied, changed"])
def test_copies_of_what_was_changed(order, how, fuse):
    """A copy computes what its original computes, and follows changes of its own."""
    ids, model, twin = random_ids(1, 40), tiny("llama"), tiny("llama")
    patch(model, S, W, fuse=fuse)
    twin.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with torch.no_grad():
        other = how(model) if order == "copied, changed" else model
        other.model.layers[1].mlp.act_fn = torch.nn.ReLU()
        if order == "changed, run, copied":
            model(ids)
        copied = other if order == "copied, changed" else how(model)
        expected = streaming_logits(twin, ids, S, W)
        for _ in range(2):
            assert relative_error(copied(ids).logits, expected) < EXACT
        assert relative_error(how(copied)(ids).logits, expected) < EXACT


def test_a_draft_over_the_same_weights_that_is_removed():
    """Its parameters get memory of their own: what is written into them then is seen by the model at once."""
    ids, model, twin = random_ids(1, 40), tiny("llama"), tiny("llama")
    draft = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    patch(model, S, 56)
    handle = patch(draft, S, 56)
    cache = SinkCache(model)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        held = twin(ids[:, :-1], use_cache=True).past_key_values
        handle.remove()
        for changed in (model, twin):
            changed.model.layers[1].self_attn.k_proj.weight.mul_(3)
            changed.model.layers[1].self_attn.v_proj.weight.mul_(3)
        found = model(ids[:, -1:], past_key_values=cache).logits
        assert relative_error(found, twin(ids[:, -1:], past_key_values=held).logits) < EXACT


def test_weights_that_lie_otherwise():
    """In the same memory: cut, as by structured pruning, and transposed."""
    ids, model, twin = random_ids(1, 40), tiny("llama"), tiny("llama")
    patch(model, S, W)
    with torch.no_grad():
        model(ids)
        for changed in (model, twin):
            mlp, attention = changed.model.layers[1].mlp, changed.model.layers[0].self_attn
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.data = linear.weight.data[:48]
            mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :48]
            attention.o_proj.weight.data = attention.o_proj.weight.data.t()
        assert relative_error(model(ids).logits, streaming_logits(twin, ids, S, W)) < EXACT


def test_shallow_copies_change_the_model():
    """They hold the same parts, so that what is put into one is put into the model: noticed by the next token."""
    ids, model, plain = random_ids(1, 40), tiny("llama"), tiny("llama")
    patch(model, S, 56)
    cache = SinkCache(model)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        held = plain(ids[:, :-1], use_cache=True).past_key_values
        for changed in (model, plain):
            mlp = copy.copy(changed.model.layers[1].mlp)
            mlp.gate_proj = torch.nn.Sequential(mlp.gate_proj, torch.nn.Tanh())
        found = model(ids[:, -1:], past_key_values=cache).logits
        assert relative_error(found, plain(ids[:, -1:], past_key_values=held).logits) < EXACT


def test_modules_made_elsewhere():
    """A patch hears of all modules that are made: also of those that are not hashable yet."""

    @dataclasses.dataclass
    class Probe(torch.nn.Module):
        dim: int

        def __post_init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(self.dim, 1)

    with patch(tiny("llama"), S, W):
        assert Probe(3).linear.in_features == 3


def test_a_model_that_is_dropped_leaves_no_hooks():
    before = len(modules._global_module_registration_hooks)
    for _ in range(3):
        patch(tiny("llama"), S, W)
    copy.deepcopy(patched := tiny("llama"))
    patch(patched, S, W)
    copy.deepcopy(patched)
    del patched
    gc.collect()
    assert len(modules._global_module_registration_hooks) <= before + 1


def test_dropout_that_is_on():
    """In a part of a layer: the layer runs its own forward, or attention says so."""
    model, ids = tiny("phi3", resid_pdrop=0.5), random_ids(1, 40)
    with patch(model, S, W), torch.no_grad():
        quiet = model(ids).logits
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train()
        assert not torch.allclose(model(ids).logits, quiet) and not torch.allclose(model(ids).logits, model(ids).logits)
    model = tiny("llama", attention_dropout=0.5)
    with patch(model, S, W), torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.train()
        with pytest.raises(RuntimeError, match="dropout"):
            model(ids)


@pytest.mark.parametrize("before", [True, False])
def test_adapters_of_embeddings(before):
    model, ids = tiny("llama"), random_ids(1, 40)
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    torch.manual_seed(4)
    if before:
        adapted = peft.get_peft_model(model, config)
        patch(model, S, W)
    else:
        patch(model, S, W)
        adapted = peft.get_peft_model(model, config)
    torch.manual_seed(4)
    twin = peft.get_peft_model(tiny("llama"), config)
    twin.load_state_dict(adapted.state_dict())
    with torch.no_grad():
        assert relative_error(adapted(ids).logits, streaming_logits(twin.base_model.model, ids, S, W)) < EXACT


def test_learned_sink_logits_that_are_exchanged():
    ids, model, twin = random_ids(1, 40), tiny("gpt_oss"), tiny("gpt_oss")
    patch(model, S, W)
    with torch.no_grad():
        before = model(ids).logits
        for changed in (model, twin):
            changed.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.full((4,), 2.0))
        expected = streaming_logits(twin, ids, S, W)
        assert relative_error(before, expected) > 1e-2, "the change makes no difference"
        assert relative_error(model(ids).logits, expected) < EXACT


@pytest.mark.parametrize("fuse", ["layers", "none"])
def test_what_cannot_be_followed_is_an_error(fuse):
    """Another attention, other frequencies, another implementation, a layer less."""
    ids = random_ids(1, 40)
    for change, error in {
        lambda m: setattr(m.model.layers[1], "self_attn", copy.deepcopy(m.model.layers[0].self_attn)): "exchanged",
        lambda m: m.model.rotary_emb.inv_freq.mul_(2): "inv_freq",
        lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 2): "inv_freq",
        lambda m: m.set_attn_implementation("sdpa"): "before patch",
        lambda m: m.model.layers.__delitem__(2): "taken out",
    }.items():
        model = tiny("llama")
        patch(model, S, W, fuse=fuse)
        with torch.no_grad():
            model(ids)
            with pytest.raises((RuntimeError, ValueError), match=error):
                change(model)
                model(ids)


@pytest.mark.parametrize("fuse", ["layers", "none"])
@pytest.mark.parametrize("how", [lambda x: x, copy.deepcopy])
def test_windows_of_layers_that_the_config_changes(how, fuse):
    """Masks of transformers are made from the config anew at every step: how far layers see was found by patch()."""
    for name, setting, value in (
        ("mistral-sliding", "sliding_window", 4),
        ("mistral-sliding", "sliding_window", None),
        ("gemma2", "sliding_window", 4),
        ("gemma2", "layer_types", ["full_attention"] * 4),
    ):
        model, ids = tiny(name), random_ids(1, 40)
        patch(model, S, W, fuse=fuse)
        with torch.no_grad():
            expected = model(ids).logits
            model = how(model)
            was = getattr(model.config, setting)
            setattr(model.config, setting, value)
            with pytest.raises(RuntimeError, match=f"{setting} of its config"):
                model(ids)
            setattr(model.config, setting, was)
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("fuse", ["layers", "none"])
def test_attention_taken_away_by_the_config(fuse):
    """Where modules attend by the interface, a config that names another implementation is noticed in the step."""
    model, ids = tiny("llama"), random_ids(1, 40)
    patch(model, S, W, fuse=fuse)
    with torch.no_grad():
        expected = model(ids).logits
        model.config._attn_implementation = "eager"
        if fuse == "none":
            with pytest.raises(RuntimeError, match="did not attend by sinkattn"):
                model(ids)
        else:
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("how", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_settings_of_the_config_outlive_the_patch(how, tmp_path):
    """What was set meanwhile stays set, so that a model whose vocabulary grew can be saved and loaded."""
    model, ids = tiny("llama"), random_ids(1, 20)
    config, was = model.config, model.config.to_dict()
    handle = patch(model, S, W)
    handle.remove()
    assert model.config is config and config.to_dict() == was and config._attn_implementation == "eager"
    patch(model, S, W)
    model = how(model)
    model.resize_token_embeddings(110)
    model.config.pad_token_id = 7
    model.config.rope_parameters["note"] = "x"
    model.config._attn_implementation = "sdpa"
    model._sinkattn.remove()
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    changed = {**was, "vocab_size": 110, "pad_token_id": 7, "rope_parameters": {**was["rope_parameters"], "note": "x"}}
    assert model.config.to_dict() == changed and model.config._attn_implementation == "eager"
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(loaded(ids).logits, logits)


@pytest.mark.parametrize("fuse", ["layers", "attention", "none"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_autocast(name, fuse):
    """Patched outside and inside of autocast: as near to float32 as the unpatched model under autocast."""
    ids, model = random_ids(8, 12), tiny(name)

    def error(found):  # of most tokens: experts may be chosen otherwise
        return ((found.double() - exact).square().mean(-1).sqrt().median() / exact.std()).item()

    with torch.no_grad():
        exact = model(ids).logits.double()
        with torch.autocast("cpu", torch.bfloat16):
            own = error(model(ids).logits)
        for inside in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                handle = patch(model, S, 60, fuse=fuse)
            with torch.autocast("cpu", torch.bfloat16):
                assert error(model(ids).logits) < 1.5 * own
                assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (8, 15)
            assert relative_error(model(ids).logits, exact) < EXACT
            handle.remove()


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_made_in_inference_mode(inside):
    """Patched within it or outside: served, and taken off again."""
    ids = torch.randint(1, 97, (1, 30))
    expected = streaming_logits(tiny("llama"), ids, 4, 10)
    with torch.inference_mode():
        model = tiny("llama")
        if inside:
            with patch(model, 4, 10):
                found = model(ids).logits
    if not inside:
        with patch(model, 4, 10), torch.no_grad():
            found = model(ids).logits
    assert relative_error(found, expected) < 1e-4
