"""Property 5: what attention_sinks 0.4.0 answered, recorded by record_attention_sinks.py, is what sinkattn answers.

attention_sinks keeps `attention_sink_window_size` old tokens and adds the current one, which ``window_size`` counts.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sinkattn
from oracle import relative_error, streaming_logits
from tiny import tiny

DATA = Path(__file__).parent / "data" / "attention_sinks"
TOLERANCE = 1e-5  # float32, of the spread of the logits; 6e-6 was measured

FAMILIES = ["llama", "llama-dynamic", "mistral", "gpt_neox", "gptj", "falcon", "falcon-alibi", "mpt"]
WITH_PROMPT = ["llama", "mistral", "gpt_neox"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """By name: a folder for `from_pretrained`, the sizes S and N, the ids, and what was recorded."""
    made = {}

    def of(name: str) -> SimpleNamespace:
        if name not in made:
            file, folder = DATA / f"{name}.safetensors", tmp_path_factory.mktemp(name)
            with safe_open(file, "pt") as opened:
                about = json.loads(opened.metadata()["recorded"])
            tensors = load_file(file)
            found = {key.removeprefix("recorded."): tensors.pop(key) for key in list(tensors) if key[:9] == "recorded."}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(about["config"]))
            made[name] = SimpleNamespace(folder=folder, weights=tensors, **{**about, **found})
        return made[name]

    return of


def loaded(recorded):
    """The recorded model in the installed transformers: every weight in its place, and nothing made up."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        recorded.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    for key, weight in recorded.weights.items():
        if not key.endswith("inv_freq"):  # once saved by GPT-NeoX; it follows from the config
            now = key if key in state else key.replace("embed_out", "lm_head")  # GPT-NeoX, renamed since
            assert torch.equal(state[now], weight), key
    return model.eval()


@torch.no_grad()
def fed(model, ids, first: int = 1):
    """Logits over one `SinkCache`: `first` tokens at once, the others one by one."""
    cache = sinkattn.SinkCache(model)
    pieces = (ids[:, :first], *ids[:, first:].split(1, dim=1))
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_is_streaming(recording, name):
    """Without sinkattn: today's transformers gives the recorded logits at first, the oracle gives all of them."""
    recorded = recording(name)
    model, ids, window_size = loaded(recorded), recorded.input_ids, recorded.window_size + 1
    first = recorded.config["max_position_embeddings"] if "dynamic" in name else recorded.sink_size + window_size
    with torch.no_grad():
        dense = model(ids[:, :first], use_cache=False).logits
    assert relative_error(recorded.logits[:, :first], dense) < TOLERANCE
    expected = streaming_logits(model, ids, recorded.sink_size, window_size)
    assert relative_error(recorded.logits, expected) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_token_by_token(recording, name):
    """The window counts the current token: one more than theirs gives theirs, and the same number does not."""
    recorded = recording(name)
    model, ids, sink_size, window_size = loaded(recorded), recorded.input_ids, recorded.sink_size, recorded.window_size
    with sinkattn.patch(model, sink_size, window_size + 1):
        assert relative_error(fed(model, ids), recorded.logits) < TOLERANCE
    with sinkattn.patch(model, sink_size, window_size):
        assert relative_error(fed(model, ids), recorded.logits) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_drop_in_loader(recording, name):
    """Only the import changes: their keywords, their logits, also with a prompt at once, which is attended densely."""
    recorded = recording(name)
    model = sinkattn.AutoModelForCausalLM.from_pretrained(
        recorded.folder, attention_sink_size=recorded.sink_size, attention_sink_window_size=recorded.window_size
    )
    assert relative_error(fed(model, recorded.input_ids), recorded.logits) < TOLERANCE
    if name in WITH_PROMPT:
        found = fed(model, recorded.input_ids, recorded.prompt)
        assert relative_error(found, recorded.prompt_logits) < TOLERANCE
        assert relative_error(found, recorded.logits) > 0.1


LOADERS = {  # what 0.4.0 exported, and the output that is compared
    "AutoModel": "last_hidden_state",
    "AutoModelForCausalLM": "logits",
    "AutoModelForQuestionAnswering": "start_logits",
    "AutoModelForSequenceClassification": "logits",
    "AutoModelForTokenClassification": "logits",
}


@torch.no_grad()
@pytest.mark.parametrize("name", LOADERS)
def test_every_loader(name, tmp_path):
    """A prompt at once is transformers' own result, a token behind it is not; what is `patch`'s gets there."""
    own = getattr(transformers, name).from_config(tiny("llama").config).eval()
    own.save_pretrained(tmp_path)
    model = getattr(sinkattn, name).from_pretrained(
        tmp_path,
        attention_sink_size=2,
        attention_sink_window_size=5,
        backend="reference",
        fuse="none",
        cuda_graph=False,
    )
    handle, ids, cache = model._sinkattn, torch.randint(1, 97, (2, 20)), sinkattn.SinkCache(model)
    assert type(model) is type(own) and handle.runner.fused is None and handle.why_eager == "cuda_graph=False"
    assert (handle.plan.sink_size, handle.plan.window_size, handle.plan.backend) == (2, 6, "reference")
    of = lambda model, ids, **cache: model(ids, **cache)[LOADERS[name]][:, -1]  # noqa: E731
    assert relative_error(of(model, ids[:, :-1], past_key_values=cache), of(own, ids[:, :-1])) < TOLERANCE
    assert relative_error(of(model, ids[:, -1:], past_key_values=cache), of(own, ids)) > 1e-3


def test_the_loaders_are_theirs():
    ours = {name for name in sinkattn.__all__ if name.startswith("Auto")}
    assert ours == {*LOADERS, "AutoTokenizer"} and sinkattn.AutoTokenizer is transformers.AutoTokenizer
