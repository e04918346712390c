"""Where a model lives, and what wraps it: offloaded, in several processes, quantised, with adapters, compiled."""

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from transformers.integrations.peft import MIN_PEFT_VERSION

import sinkattn
from helpers import DEVICES, GPU, fed, random_ids
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, Stream, patch
from tiny import tiny

S, W = 4, 10
C = S + W


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(where, tmp_path):
    """accelerate's hooks bring weights in when a module runs: patched, generating, streaming, and removed."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny("qwen3"), random_ids(1, 3 * C)
    expected = streaming_logits(tiny("qwen3"), ids, S, W)
    with torch.no_grad():
        dense = model(ids).logits
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert next(model.parameters()).is_meta
    with patch(model, S, W), torch.no_grad():
        assert relative_error(fed(model, ids, 1), expected) < 1e-4
        assert relative_error(fed(model, ids, 9), expected) < 1e-4
        greedy = model.generate(ids, do_sample=False, max_new_tokens=5)
        stream = Stream(model)
        stream.append(ids)
        assert torch.stack(list(stream.generate(5)), dim=1).tolist() == greedy[:, -5:].tolist()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_several_devices(tmp_path):
    """device_map: every layer's cache lies where its keys are."""
    tiny("qwen3").save_pretrained(tmp_path)
    ids = random_ids(1, 3 * C)
    expected = streaming_logits(tiny("qwen3"), ids, S, W)
    devices = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    devices |= {"model.layers.2": "cpu", "model.norm": 1, "lm_head": 1}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=devices)
    with patch(model, S, W):
        found = fed(model, ids.to(0), 9)
    assert relative_error(found.cpu(), expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_on_several_devices(order):
    """One after the other, whatever device is current: generate, Stream and proposals, captured and not; a model that
    moves to another GPU; the ops alone."""
    texts, ids = {}, random_ids(2, 20)
    asked = dict(max_new_tokens=3 * C, do_sample=False, repetition_penalty=1.3, eos_token_id=0, suppress_tokens=[0])
    for cuda_graph in (True, False):
        for device in order:
            model = tiny("llama").to(f"cuda:{device}")
            with patch(model, S, W, cuda_graph=cuda_graph) as handle:
                found = [model.generate(ids.to(model.device), **asked).cpu()]
                stream = Stream(model)
                stream.append(ids)
                for proposals in ({}, dict(prompt_lookup_num_tokens=3)):
                    steps = [x.view(2, -1) for x in stream.generate(3 * C, repetition_penalty=1.3, **proposals)]
                    found += [row[row >= 0].cpu() for row in torch.cat(steps, dim=1)]
                assert cuda_graph == (handle.why_eager is None)
                model.to(f"cuda:{1 - device}")
                found.append(model.generate(ids.to(model.device), **asked).cpu())
            for text, known in zip(found, texts.setdefault("all", found), strict=True):
                assert torch.equal(text, known)
            assert torch.cuda.current_device() == 0
    assert torch.equal(found[0], found[-1])


def test_hooks_taken_off_behind_patch():
    """remove() leaves the model as it is without the hooks, and does not bring a dead hook back."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny("llama"), random_ids(1, 3 * C)
    with torch.no_grad():
        expected = model(ids).logits
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        handle = patch(model, S, W)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        handle.remove()
        assert torch.equal(model(ids).logits, expected) and "forward" not in vars(model)
        with patch(model, S, W):
            assert relative_error(model(ids).logits, streaming_logits(tiny("llama"), ids, S, W)) < 1e-4
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.slow
def test_tensor_parallel(tmp_path):
    """``tp_plan="auto"`` in two processes: each holds half of the heads, and both give the logits of one."""
    model = tiny("llama", vocab_size=98)  # some versions split the head, and do so evenly
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 3 * C)
    with patch(model, S, W, cache_dtype="int8"), torch.no_grad():
        of_int8 = model(ids).logits
    torch.save((ids, streaming_logits(model, ids, S, W), of_int8), tmp_path / "expected.pt")
    worker = f"""
import os, torch, transformers, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from sinkattn import SinkCache, patch
from oracle import relative_error
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, tp_plan="auto").eval()
ids, expected, of_int8 = torch.load({str(tmp_path / "expected.pt")!r})
handle = patch(model, {S}, {W})
if "forward" in vars(model.model.layers[0].mlp.down_proj):  # some versions split by hooks: then nothing is fused
    assert len(handle.runner.fused.layers) == len(model.model.layers)
    assert [linear.group is not None for linear in handle.runner.fused.layers[0].products] == [False, True] * 2
with torch.no_grad():
    for size in (1, 9, ids.shape[1]):
        cache = SinkCache(model)
        found = torch.cat([model(x, past_key_values=cache).logits for x in ids.split(size, dim=1)], dim=1)
        assert relative_error(found, expected) < 1e-4, size
    if handle.runner.fused.layers:  # the weights stay where they were joined
        joined = handle.runner.fused.layers[0].products[0]
        here, begin = model.model.layers[0].self_attn.q_proj.weight.to_local().data_ptr(), joined.weight.data_ptr()
        assert begin <= here < begin + joined.weight.nbytes and len(joined._moved) == 3
    assert cache.layers[0].keys.shape[1] == 1  # of two key heads
    assert model.generate(ids, max_new_tokens=3).shape == (1, ids.shape[1] + 3)
    cache.save(f"text{{torch.distributed.get_rank()}}")
    torch.distributed.barrier()
    SinkCache.load(model, f"text{{torch.distributed.get_rank()}}")
    try:
        SinkCache.load(model, f"text{{1 - torch.distributed.get_rank()}}")
        raise AssertionError("it took the other one's share")
    except ValueError as error:
        assert "tp_plan is share" in str(error)
    handle.remove()
    assert relative_error(model(ids).logits[:, :{C}], expected[:, :{C}]) < 1e-4
    with patch(model, {S}, {W}, cache_dtype="int8"):  # sums in another order may take a number to the next step
        found = model(ids).logits
        assert relative_error(found, of_int8) < 0.2 * relative_error(expected, of_int8)
print("exact", flush=True)
torch.distributed.barrier()
os._exit(0)  # whatever threads gloo has left
"""
    (tmp_path / "worker.py").write_text(worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(Path(__file__).parent.parent))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("exact") == 2, done.stderr[-3000:]


def test_adapters():
    """LoRA by PEFT around the model: the adapters act, and the patch may be asked of either."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    ids, config = (
        random_ids(1, 3 * C),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    plain = streaming_logits(tiny("llama"), ids, S, W)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(tiny("llama"), config).eval()
    expected = streaming_logits(wrapped, ids, S, W)
    assert relative_error(expected, plain) > 0.1
    with patch(wrapped, S, W), torch.no_grad():
        assert relative_error(wrapped(ids).logits, expected) < 1e-4
        assert relative_error(fed(wrapped, ids, 1), expected) < 1e-4
        greedy = wrapped.generate(input_ids=ids, do_sample=False, max_new_tokens=5)
        assert torch.equal(greedy[:, :-5], ids)
        with wrapped.disable_adapter():
            assert relative_error(wrapped(ids).logits, plain) < 1e-4
    likeliest = streaming_logits(wrapped, greedy, S, W)[:, -6:-1].argmax(-1)
    assert torch.equal(likeliest, greedy[:, -5:])
    with torch.no_grad():
        dense = wrapped(ids).logits
        assert relative_error(wrapped.merge_and_unload()(ids).logits, dense) < 1e-4  # the patch has left nothing behind


def test_adapters_inside():
    """The same by transformers' own `add_adapter`, which may want a newer PEFT than is installed."""
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    ids, inside = random_ids(1, 3 * C), tiny("llama")
    inside.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = streaming_logits(inside, ids, S, W)
    with patch(inside, S, W):
        assert relative_error(fed(inside, ids, 5), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compiled first", "patched first", "in place"])
def test_compiled(order):
    model, ids = tiny("llama", num_hidden_layers=2), random_ids(1, 2 * C)
    expected = streaming_logits(model, ids, S, W)
    torch._dynamo.reset()
    if order == "in place":
        model.compile(backend="eager")
    compiled = model if order == "in place" else torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = compiled(ids).logits if order == "compiled first" else model(ids).logits
        with patch(compiled if order == "compiled first" else model, S, W):
            assert relative_error(compiled(ids).logits, expected) < 1e-4
            assert relative_error(fed(compiled, ids[:, : C + 4], 1), expected[:, : C + 4]) < 1e-4
        assert relative_error(compiled(ids).logits, dense) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_one_graph(dtype, device):
    """Dynamo finds nothing in a step that it would have to leave to Python, and the rings change as they do without."""
    model, ids = tiny("llama", num_hidden_layers=2).to(device, dtype), random_ids(1, 20).to(device)
    torch._dynamo.reset()
    with patch(model, S, W), torch.no_grad():
        cache = SinkCache(model)
        model(ids, past_key_values=cache)
        plain = copy.deepcopy(cache)
        step = torch.compile(lambda ids: model(ids, past_key_values=cache).logits, fullgraph=True, backend="aot_eager")
        for token in ids[:, :3].split(1, dim=1):
            expected = model(token, past_key_values=plain).logits
            assert relative_error(step(token), expected) < (1e-5 if dtype == torch.float32 else 2e-2)
        assert torch.equal(cache.lengths, plain.lengths)
        assert torch.equal(cache.rows.ids, plain.rows.ids) and torch.equal(cache.rows.digest, plain.rows.digest)


QUANTISED = {  # library, config, error relative to the spread: 8 bits are activations too, rounded row by row
    "load_in_4bit": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_4bit=True), 0.05),
    "load_in_8bit": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_8bit=True), 0.08),
    "int8 weights": ("torchao", lambda: transformers.TorchAoConfig(_int8_weight_only()), 0.05),
}


def _int8_weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


@pytest.mark.parametrize("how", list(QUANTISED))
def test_quantised_weights(how, tmp_path):
    """Of models quantised while they load: patched and unpatched they are the same function, to its own rounding."""
    library, config, tolerance = QUANTISED[how]
    pytest.importorskip(library, reason=f"{library} is not installed")
    tiny("llama", hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    device = GPU if torch.cuda.is_available() else "cpu"
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=config(), dtype=torch.bfloat16, device_map=device).eval()
    ids = random_ids(1, 2 * C).to(device)
    with torch.no_grad():
        expected = streaming_logits(model, ids, S, W)
        with patch(model, S, W):
            for size in (1, 5, ids.shape[1]):
                found = fed(model, ids, size)
                assert (found - expected).float().square().mean().sqrt() / expected.float().std() < tolerance
            assert model.generate(ids, max_new_tokens=3).shape == (1, 2 * C + 3)


@pytest.fixture(scope="module")
def demo():
    folder = Path(sinkattn.__file__).parent / "demo_model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_pipeline_and_text_streamer(demo):
    """transformers' own loops around a patched model: a text far longer than its window, the same every way."""
    model, tokenizer = demo
    device = GPU if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(model).to(device)
    prompt = "def main():\n    for i in range(10):\n"
    options = dict(max_new_tokens=60, do_sample=False)
    with patch(model, 4, 28):
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        plain = model.generate(**inputs, **options)
        text = tokenizer.decode(plain[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)
        assert pipe(prompt, return_full_text=False, **options)[0]["generated_text"] == text
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
        thread = threading.Thread(target=model.generate, kwargs=dict(**inputs, **options, streamer=streamer))
        thread.start()
        assert "".join(streamer) == text
        thread.join()
