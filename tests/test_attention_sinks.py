"""Property 5: what attention_sinks 0.4.0 answered, recorded by record_attention_sinks.py, is what sinkattn answers.

attention_sinks keeps `attention_sink_window_size` old tokens and adds the current one: ``window_size`` is one more here.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sinkattn
import torch
import transformers
from oracle import relative_error, streaming_logits
from safetensors import safe_open
from safetensors.torch import save_file

DATA = Path(__file__).parent / "data" / "attention_sinks"
TOLERANCE = 1e-5  # float32, of the spread of the logits

FAMILIES = ["llama", "llama-dynamic", "mistral", "gpt_neox", "gptj", "falcon", "falcon-alibi", "mpt"]
WITH_PROMPT = ["llama", "mistral", "gpt_neox"]
REFUSED = {"gptj", "falcon", "falcon-alibi", "mpt"}  # they do not use transformers' attention interface; delete when served
SERVED = [
    pytest.param(name, marks=pytest.mark.xfail(strict=True, raises=sinkattn.UnsupportedModelError))
    if name in REFUSED
    else name
    for name in FAMILIES
]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """By name: a folder for `from_pretrained`, the sizes S and N, the ids, and what was recorded."""
    made = {}

    def of(name: str) -> SimpleNamespace:
        if name not in made:
            with safe_open(DATA / f"{name}.safetensors", "pt") as file:
                about = json.loads(file.metadata()["recorded"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118: it is no dict
            folder = tmp_path_factory.mktemp(name)
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
            now = key if key in state else key.replace("embed_out", "lm_head")  # GPT-NeoX, renamed in 5.2x
            assert torch.equal(state[now], weight), key
    return model.eval()


@torch.no_grad()
def fed(model, ids, first: int = 1):
    """Logits over one `SinkCache`: `first` tokens at once, the others one by one."""
    cache = sinkattn.SinkCache(model)
    pieces = (ids[:, :first], *ids[:, first:].split(1, dim=1))
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_recording_is_what_it_should_be(recording, name):
    """Without sinkattn: the dense logits of today's transformers at first, the oracle's over the whole text."""
    recorded = recording(name)
    model, ids, window_size = loaded(recorded), recorded.input_ids, recorded.window_size + 1
    capacity = recorded.sink_size + window_size
    unchanged = 12 if name == "llama-dynamic" else capacity  # its frequencies change from then on
    with torch.no_grad():
        dense = model(ids[:, :capacity], use_cache=False).logits
        if name == "llama-dynamic":
            dense = model(ids[:, :unchanged], use_cache=False).logits
    print(name, "dense", relative_error(recorded.logits[:, :unchanged], dense))
    expected = streaming_logits(model, ids, recorded.sink_size, window_size)
    print(name, "oracle", relative_error(recorded.logits, expected))


@pytest.mark.parametrize("name", SERVED)
def test_token_by_token(recording, name):
    recorded = recording(name)
    model = loaded(recorded)
    with sinkattn.patch(model, recorded.sink_size, recorded.window_size + 1):
        print(name, "patch", relative_error(fed(model, recorded.input_ids), recorded.logits))
    with sinkattn.patch(model, recorded.sink_size, recorded.window_size):
        print(name, "off by one", relative_error(fed(model, recorded.input_ids), recorded.logits))


@pytest.mark.parametrize("name", SERVED)
def test_drop_in_loader(recording, name):
    recorded = recording(name)
    model = sinkattn.AutoModelForCausalLM.from_pretrained(
        recorded.folder, attention_sink_size=recorded.sink_size, attention_sink_window_size=recorded.window_size
    )
    print(name, "loader", model.dtype, relative_error(fed(model, recorded.input_ids), recorded.logits))
    if name in WITH_PROMPT:
        found = fed(model, recorded.input_ids, recorded.prompt)
        print(name, "prompt", relative_error(found, recorded.prompt_logits))
