"""Every causal-LM type that the installed transformers has: built tiny, patched, compared with the oracle.

    python tests/sweep.py                 # all types, two at a time, some minutes; writes docs/models.md
    python tests/sweep.py llama mpt       # these, printed only

A type takes no code here: its config is made small by the names of its fields. Where that is not enough, there is one
row for it in `SETTINGS`. The results of every version of transformers that was swept lie in bench/results/models;
docs/models.md shows them side by side.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import sinkattn  # noqa: E402
from loud import ALLOWED, times_worse, token_errors  # noqa: E402
from oracle import mixing_modules, relative_error, streaming_logits  # noqa: E402
from tiny import spread  # noqa: E402

S, W = 2, 7
C = S + W
TOLERANCE = 1e-4  # float32, of the spread of the logits
INT8 = 0.3  # of the spread: experts may be chosen otherwise
STATEFUL_TOLERANCE = 1e-3  # layers with a state compute it by scan and by recurrence, which differ by that much
FULL, SLIDING, LINEAR, HYBRID = "full_attention", "sliding_attention", "linear_attention", "hybrid"

SMALL = dict(  # by field name, for every config that has it; a sliding window below W
    vocab_size=97, bos_token_id=1, eos_token_id=None, pad_token_id=0, attn_implementation="eager", sliding_window=5,
    hidden_size=64, d_model=64, n_embd=64, intermediate_size=96, n_inner=96, ffn_dim=96, dim_model=64, dim_ff=96,
    num_hidden_layers=4, n_layer=4, n_layers=4, decoder_layers=4, encoder_layers=2,
    num_attention_heads=4, n_head=4, n_heads=4, decoder_attention_heads=4, encoder_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rotary_dim=8, encoder_ffn_dim=96, decoder_ffn_dim=96, dim_head=16,
    max_position_embeddings=64, n_positions=64, max_seq_len=64, position_bias_num_buckets=64, dff=96,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_local_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, num_shared_experts=1, first_k_dense_replace=1,
    n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
    mamba_d_state=8, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=2, mamba_d_conv=4, mamba_expand=2,
    mamba_dt_rank=4, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=8, use_mamba_kernels=False,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)  # fmt: skip
MLA = dict(num_key_value_heads=4)
SETTINGS = {  # what a type needs besides
    "axk1": MLA, "deepseek_v2": MLA, "deepseek_v3": MLA, "glm4_moe_lite": MLA, "minicpm3": MLA, "sarvam_mla": MLA,
    "youtu": MLA,
    "bailing_hybrid": dict(MLA, layer_types=[LINEAR, FULL] * 2), "mllama_text_model": dict(cross_attention_layers=[1]),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2, hidden_size=64),
    ),
    "kimi_linear": dict(MLA, layer_types=[LINEAR, FULL] * 2, linear_head_dim=16, linear_num_heads=4),
    "blt": dict(encoder_hash_byte_group_vocab=50),
    "gemma4_assistant": dict(text_config=dict(hidden_size_per_layer_input=0, num_kv_shared_layers=4)),
    "gemma4_unified_assistant": dict(text_config=dict(num_kv_shared_layers=4)),
    "xlm": dict(emb_dim=64, n_words=97),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(rope_parameters={FULL: {"rope_type": "default", "rope_theta": 1e4}}),
    "dots3_note_text": dict(num_key_value_heads=4),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gemma3n_text": dict(
        num_kv_shared_layers=2, layer_types=[SLIDING, FULL] * 2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97, laurel_rank=8,
    ),
    "gemma4_text": dict(
        num_kv_shared_layers=2, layer_types=[SLIDING, FULL] * 2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97, global_head_dim=16,
    ),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", FULL] * 2),
    "lfm2_moe": dict(layer_types=["conv", FULL] * 2, num_dense_layers=1),
    "longcat_flash": dict(
        MLA, head_dim=8, num_layers=2, zero_expert_num=2, ffn_hidden_size=64, expert_ffn_hidden_size=32, moe_topk=2,
        n_routed_experts=4,
    ),
    "mamba2": dict(num_heads=8, head_dim=16),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=4,
        layer_types=[LINEAR, FULL] * 2,
    ),
    "reformer": dict(is_decoder=True, axial_pos_embds=False),
    "zamba": dict(layers_block_type=[LINEAR, HYBRID] * 2, n_mamba_heads=2),
    "zamba2": dict(layers_block_type=[LINEAR, HYBRID] * 2, use_mem_rope=True, mamba_ngroups=2),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=16),
}  # fmt: skip
TEXTS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
VARIANTS = {  # the same type in another form
    "falcon (ALiBi)": ("falcon", dict(alibi=True)),
    "falcon (new decoder)": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
}
SAMPLE = [  # what CI checks
    *("llama", "mistral", "qwen2", "qwen3_moe", "gemma2", "gemma3_text", "gemma3n_text", "gpt_oss", "gpt_neox", "mpt"),
    *("gpt_neox_japanese", "gptj", "codegen", "falcon", "falcon (ALiBi)", "bloom", "stablelm", "phi", "cohere2"),
    *("deepseek_v3", "jamba", "falcon_h1", "qwen3_next", "llama4_text", "zaya", "gpt2"),
]
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "models"


NOTES = """## Notes

- **The distance** of a key is that of StreamingLLM for every relative encoding: `t - j` in the window,
  `min(t, S + W - 1) - j` for a sink. ALiBi slopes are measured from the model's own biases, with what scales them
  (Falcon-RW: 1 / sqrt(head_dim)). A model in half precision rounds its biases; slopes measured there are within that
  rounding, and are then applied in float32.
- **Queries scaled by position** (Ministral-3) are scaled as at position `min(t, S + W - 1)`. Llama-4 scales by the
  columns of its cache instead, padding too, from column 8191 on: served while S + W stays below, refused beyond.
- **Chunked attention** (Llama-4) counts positions in the cache, so no border is met; a chunk shorter than S + W is
  refused.
- **Hybrids**: only attention layers are replaced. Rows of nothing but padding start from an empty state, so padding on
  the left may be cut anywhere. Types whose layers cannot go on with several tokens at once are fed token by token after
  the first input.
- **Images** (Qwen2-VL, Qwen2.5-VL, Qwen3-VL): their tokens have three positions each. A sink is seen from the place of
  token `min(t, S + W - 1)`, everything in the window from its own. Images may come in any turn: with the full history,
  all of them again or the new ones alone; with the new ids alone, theirs. Models that let the tokens of an image see
  those after them (Gemma-3) take text alone.
- **MLA**: latents are expanded before they are cached, in types that cache the latent as in those that do not.
- **Models of `trust_remote_code`** need `position_ids` if they rotate, and a cache that is asked by
  `update(k, v, layer_idx)` and no more. Their attention may be any of torch's: a product with the keys, a softmax, a
  product with the values, or `scaled_dot_product_attention`. Kernels outside torch (flash-attn called by itself) are
  refused.
- **`transformers serve`** loads models itself, by the name of their architecture, and takes no model object: no public
  way leads a patched one there. Its generation loop is `model.generate` with a streamer, which works: a pipeline, or a
  few lines around `Stream`, stand in.
"""


def small_config(model_type: str, **settings):
    """A config with every known field small; sub-configs are small configs themselves."""
    config_class = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in known}
    settings = {**SETTINGS.get(model_type, {}), **settings}
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        sub_type = getattr(sub, "model_type", "")
        if "text" in name or name == "decoder":
            text_type = sub_type if sub_type in CONFIG_MAPPING else TEXTS.get(model_type, "llama")
            values[name] = small_config(text_type, **settings.pop(name, {}))
        elif sub_type in CONFIG_MAPPING and name in known:
            values[name] = small_config(sub_type, **settings.pop(name, {}))
    return config_class(**{**values, **settings})


def build(name: str, **settings):
    """A random float32 model."""
    model_type, variant = VARIANTS.get(name, (name, {}))
    torch.manual_seed(0)
    config = small_config(model_type, **variant, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    if sum(p.numel() for p in model.parameters()) > 100_000_000:
        raise RuntimeError("its config does not get small: it needs a row in SETTINGS")
    spread(model)
    return model


def positions(model) -> str:
    """How the type tells distances, by the source of its modules: rotary, ALiBi or other."""
    files = {inspect.getfile(type(module)) for module in model.modules() if "transformers" in type(module).__module__}
    source = "".join(Path(file).read_text() for file in sorted(files))
    rotates = "def apply_rotary|def apply_multimodal_rotary|inv_freq"
    return "rotary" if re.search(rotates, source) else "ALiBi" if "alibi" in source.lower() else "other"


@dataclasses.dataclass
class Result:
    name: str
    positions: str = "?"
    route: str = ""
    status: str = ""  # exact, refused, wrong, not built
    reason: str = ""
    modes: dict = dataclasses.field(default_factory=dict)  # mode -> error, or why the type itself does not have it
    bfloat16: dict = dataclasses.field(default_factory=dict)  # error and own (root mean squares), times, noise; or why
    int8: dict = dataclasses.field(default_factory=dict)  # error (root mean square) of caches in int8; or why


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    keys = {name: (set(vars(m)), id(vars(m).get("config"))) for name, m in model.named_modules()}
    return state, keys, str(model.config)


def unchanged(model, before) -> bool:
    state, keys, config = snapshot(model)
    same = all(torch.equal(state[k], before[0][k]) for k in before[0])  # NaN would not be small
    return same and keys == before[1] and config == before[2]


@torch.no_grad()
def fed(model, cache, ids, size, mask=None):
    pieces, length = [], ids.shape[1]
    for begin in range(0, length, size):
        end = min(begin + size, length)
        more = {} if mask is None else dict(attention_mask=mask[:, :end])
        pieces.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(pieces, dim=1)


def itself(model, ids, mask, whole) -> dict:
    """Where an unpatched model disagrees with itself on a short text: mode -> why."""
    found = {}

    def note(mode, call):
        try:
            error = call()
        except Exception as raised:  # reported in the table, not hidden
            found[mode] = f"unpatched raises {type(raised).__name__}: {raised}".splitlines()[0][:120]
            return
        if not error < TOLERANCE:
            found[mode] = f"unpatched differs from itself by {error:.0e}"

    def padded():
        together = model(ids, attention_mask=mask, use_cache=False).logits
        return max(
            relative_error(
                together[row : row + 1, m.bool()], model(ids[row : row + 1, m.bool()], use_cache=False).logits
            )
            for row, m in enumerate(mask)
        )

    short, config = ids[:1, :C], model.config
    note("tokens", lambda: relative_error(fed(model, DynamicCache(config=config), short, 1), whole))
    note("chunks", lambda: relative_error(fed(model, DynamicCache(config=config), short, 4), whole))
    note("padding", padded)
    note("beam", lambda: beam_error(model, ids[:1, :4], lambda text: model(text, use_cache=False).logits, 4))
    return found


def beam_error(model, ids, logits_of, new: int) -> float:
    """Difference between the score that beam search reports and that of the same text under the model."""
    ids = torch.cat((ids, ids + 1))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    logprobs = logits_of(out.sequences[1:]).log_softmax(-1)
    score = logprobs[0, -new - 1 : -1].gather(1, out.sequences[1, -new:, None]).sum()
    return (out.sequences_scores[1] - score).abs().item() / score.abs().item()


def check(name: str) -> Result:
    """Build, patch and compare one type; every outcome is a `Result`."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    result = Result(name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = build(name)
    except Exception as error:
        result.status, result.reason = "not built", " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return result
    result.positions = positions(model)
    before = snapshot(model)
    try:
        sinkattn.patch(model, S, W).remove()
    except sinkattn.UnsupportedModelError as refusal:
        same = unchanged(model, before)
        result.status, result.reason = (
            ("refused", str(refusal)) if same else ("wrong", f"refused, but changed: {refusal}")
        )
        return result
    except Exception as error:
        result.status, result.reason = "wrong", f"patch raised {error!r}\n{traceback.format_exc()}"
        return result
    try:
        compare(model, result, before)
        if result.status == "exact":
            compare_bfloat16(model, result)
            compare_int8(model, result)
    except Exception as error:
        result.status, result.reason = "wrong", f"{error!r}\n{traceback.format_exc()[-1500:]}"
    return result


@torch.no_grad()
def compare(model, result: Result, before) -> None:
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (3, 3 * C + 2))
    mask = torch.ones_like(ids)
    mask[1, : C + 2], mask[2, :2] = 0, 0
    ids[mask == 0] = 0
    whole = model(ids[:1, :C], use_cache=False).logits
    short_mask = mask.clone()[:, -C:].contiguous()
    short_mask[:] = 1
    short_mask[1, :4], short_mask[2, :2] = 0, 0
    own = itself(model, ids[:, :C].where(short_mask > 0, 0), short_mask, whole)
    expected = streaming_logits(model, ids[:1], S, W)
    twin = copy.deepcopy(model)
    tolerance = TOLERANCE if all(attends for _, attends in mixing_modules(model)) else STATEFUL_TOLERANCE

    def note(mode, call):
        try:
            error = call()
        except Exception as raised:
            error = f"raises {type(raised).__name__}: {raised} {traceback.format_exc()[-700:]}"
        bad = isinstance(error, str) or not error < tolerance
        excuse = own.get(mode) or (mode == "padding, cut" and (own.get("padding") or own.get("tokens")))
        result.modes[mode] = excuse if bad and excuse else error

    def padded(size):
        cache = sinkattn.SinkCache(model)
        together = fed(model, cache, ids, size, mask)
        alone = [model(ids[row : row + 1, m.bool()]).logits for row, m in enumerate(mask)]
        return max(relative_error(together[r : r + 1, m.bool()], alone[r]) for r, m in enumerate(mask))

    with sinkattn.patch(model, S, W) as handle:
        result.route = handle.plan.route
        note("dense", lambda: relative_error(model(ids[:1, :C]).logits, whole))
        note("prefill", lambda: relative_error(model(ids[:1]).logits, expected))
        note("tokens", lambda: relative_error(fed(model, sinkattn.SinkCache(model), ids[:1], 1), expected))
        note("chunks", lambda: relative_error(fed(model, sinkattn.SinkCache(model), ids[:1], 5), expected))
        note("padding", lambda: padded(ids.shape[1]))
        note("padding, cut", lambda: max(padded(1), padded(6)))
        note("beam", lambda: beam_error(model, ids[:1, :C], lambda text: streaming_logits(twin, text, S, W), 8))
    note(
        "remove",
        lambda: (
            0.0 if unchanged(model, before) and torch.equal(model(ids[:1, :C], use_cache=False).logits, whole) else 1.0
        ),
    )
    bad = [mode for mode, error in result.modes.items() if not isinstance(error, str) and not error < tolerance]
    bad += [mode for mode, error in result.modes.items() if isinstance(error, str) and error.startswith("raises")]
    result.status = "wrong" if bad else "exact"
    result.reason = "; ".join(
        f"{mode}: {error}" for mode, error in result.modes.items() if isinstance(error, str) or mode in bad
    )


@torch.no_grad()
def compare_bfloat16(model, result: Result) -> None:
    """The same weights in bfloat16: served, and as near to float32 as unpatched.

    Where the unpatched type itself does not run or is not finite in bfloat16, that is noted.
    """
    found = result.bfloat16
    try:
        state = {name: x.clone() for name, x in model.state_dict().items()}
        half = type(model).from_pretrained(
            None, config=copy.deepcopy(model.config), state_dict=state, dtype=torch.bfloat16,
            attn_implementation="eager",
        )  # fmt: skip
        half.eval()
        ids = torch.randint(3, 90, (6, 3 * C + 2), generator=torch.Generator().manual_seed(2))
        expected = streaming_logits(copy.deepcopy(half).float(), ids, S, W)
        own = streaming_logits(half, ids, S, W)
    except Exception as error:
        found["reason"] = f"unpatched raises {type(error).__name__}: {error}".splitlines()[0][:120]
        return
    if not own.isfinite().all():
        found["reason"] = "unpatched is not finite"
        return
    try:
        with sinkattn.patch(half, S, W):
            logits = {"at once": half(ids).logits}
            if not isinstance(result.modes["tokens"], str):
                logits["token by token"] = fed(half, sinkattn.SinkCache(half), ids, 1)
    except sinkattn.UnsupportedModelError as refusal:
        result.status, found["reason"] = "wrong", f"refused: {refusal}"
        result.reason = f"bfloat16: {found['reason']}"
        return
    errors = {mode: token_errors(x, expected) for mode, x in logits.items()}
    own = token_errors(own, expected)
    measures = {mode: times_worse(x, own) for mode, x in errors.items()}
    worst = max(measures, key=lambda mode: measures[mode][0])
    times, noise = measures[worst]
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    found.update(error=rms(errors[worst]), own=rms(own), times=times, noise=noise)
    if not math.log(times) <= math.log(ALLOWED) + 3 * noise:
        result.status = "wrong"
        result.reason = f"bfloat16, {worst}: {times:.2f} times the unpatched error, noise {noise:.2f}"


@torch.no_grad()
def compare_int8(model, result: Result) -> None:
    """Caches in int8: served, with logits as near to those of 32 bits as steps of a 127th leave them."""
    ids = torch.randint(3, 90, (2, 3 * C + 2), generator=torch.Generator().manual_seed(3))
    expected = streaming_logits(model, ids, S, W)
    try:
        with sinkattn.patch(model, S, W, cache_dtype="int8"):
            logits = {"at once": model(ids).logits}
            if not isinstance(result.modes["tokens"], str):
                logits["token by token"] = fed(model, sinkattn.SinkCache(model), ids, 1)
    except sinkattn.UnsupportedModelError as refusal:
        result.int8["reason"] = f"refused: {refusal}"
        return
    errors = {mode: token_errors(x, expected).square().mean().sqrt().item() for mode, x in logits.items()}
    worst = max(errors, key=lambda mode: errors[mode] if math.isfinite(errors[mode]) else math.inf)
    result.int8["error"] = errors[worst]
    if not errors[worst] < INT8:
        result.status, result.reason = "wrong", f"int8, {worst}: off by {errors[worst]:.2f} of the spread"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def document() -> str:
    """docs/models.md, from what all sweeps in `RESULTS` found."""
    sweeps = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    sweeps.sort(key=lambda sweep: [int(x) for x in sweep["transformers"].split(".")], reverse=True)
    found = {}
    for sweep in sweeps:
        for result in sweep["results"]:
            found.setdefault(result["name"], {})[sweep["transformers"]] = result
    versions = [sweep["transformers"] for sweep in sweeps]
    newest = lambda name: next(iter(found[name].values()))  # noqa: E731

    def mark(name: str, version: str) -> str:
        result = found[name].get(version)
        return (
            ""
            if result is None
            else result["status"] + ("*" if result["status"] == "exact" and result["reason"] else "")
        )

    def half(name: str) -> str:
        measured = next((r["bfloat16"] for r in found[name].values() if r.get("bfloat16")), {})
        if "error" in measured:
            return f"{measured['error']:.2g} ({measured['own']:.2g})"
        return measured.get("reason", "").partition(":")[0]

    def eight(name: str) -> str:
        measured = next((r["int8"] for r in found[name].values() if r.get("int8")), {})
        return f"{measured['error']:.2g}" if "error" in measured else measured.get("reason", "").partition(":")[0]

    names = sorted(found, key=str.lower)
    served = [name for name in names if any(result["status"] == "exact" for result in found[name].values())]
    others = [name for name in names if name not in served]
    counts = []
    for version in versions:
        types = [found[name][version] for name in names if version in found[name] and name not in VARIANTS]
        for kind in ("rotary", "ALiBi", "other", "?"):
            some = [result["status"] for result in types if result["positions"] == kind]
            counts.append(
                [
                    version,
                    kind,
                    *(str(some.count(s)) for s in ("exact", "refused", "not built", "wrong")),
                    str(len(some)),
                ]
            )
    notes = [
        f"- {name}, {version}: {found[name][version]['reason']}"
        for name in served
        for version in versions
        if mark(name, version).endswith("*")
    ]
    served_rows = [
        [n, newest(n)["positions"], newest(n)["route"], *(mark(n, v) for v in versions), half(n), eight(n)]
        for n in served
    ]
    other_rows = [
        [n, newest(n)["positions"], *(mark(n, v) for v in versions), newest(n)["reason"][:400]] for n in others
    ]
    tolerances = f"{TOLERANCE:g} of their spread ({STATEFUL_TOLERANCE:g} where layers keep a state of their own)"
    header, named = (
        ["type", "positions", "route", *versions, "bfloat16", "int8"],
        ["type", "positions", *versions, "reason"],
    )
    return f"""# Models

Made by `python tests/sweep.py` (torch {sweeps[0]["torch"]}): every causal-LM type of transformers, built tiny from its
config with random weights, patched with {S} sinks and a window of {W}, and compared with re-computation by its own
unpatched code. "Exact" says that the logits agree to
{tolerances} while the text is short, in one piece, token
by token, in chunks, in left-padded batches however they are cut and in beam search, and that `remove()` leaves the
model as it was. "Refused" is an `UnsupportedModelError` that leaves the model as it was.

{table(["transformers", "positions", "exact", "refused", "not built", "wrong", "types"], counts)}

## Served

Route: how the attention is reached, a row of `sinkattn.patch.ROUTES`: through transformers' attention interface, or by
watching what becomes of the keys and values that the cache hands out. A star: the unpatched type does not have a mode.
bfloat16: error of the logits against float32, root mean square over the spread, and in brackets that of re-computation
by the unpatched type in bfloat16. Both swing where a softmax or an expert stands at the edge; the geometric mean over
tokens is in no type above {ALLOWED} times the unpatched error, give or take three standard errors.
int8: error of the logits of a float32 model with [caches in int8](cache_dtype.md), at once or token by token, whichever
is larger; refused where keys are turned again as a text grows.

{table(header, served_rows)}

Where unpatched types disagree with themselves, on a text of {C} tokens:

{chr(10).join(notes)}

## Not served

{table(named, other_rows)}

{NOTES}"""


def main(names: list[str]) -> None:
    everything = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]
    results, console = {}, Console()
    context = multiprocessing.get_context("spawn")
    with Progress(console=console) as progress, ProcessPoolExecutor(2, mp_context=context) as pool:
        task = progress.add_task("types", total=len(names or everything))
        futures = {pool.submit(check, name): name for name in (names or everything)}
        for future in as_completed(futures):
            result = results[futures[future]] = future.result()
            progress.advance(task)
            color = {"exact": "green", "refused": "yellow", "wrong": "red"}.get(result.status, "magenta")
            line = f"{result.name:28} {result.positions:7} [{color}]{result.status}[/] {result.route}"
            if "times" in result.bfloat16:
                line += "  bfloat16 {error:.1e}, own {own:.1e}, {times:.2f} times +- {noise:.2f}".format(
                    **result.bfloat16
                )
            elif result.bfloat16:
                line += f"  bfloat16: {result.bfloat16['reason'][:60]}"
            progress.console.print(line, highlight=False)
            if result.reason:
                progress.console.print("    " + result.reason, markup=False, highlight=False)
    if not names:
        RESULTS.mkdir(parents=True, exist_ok=True)
        versions = dict(transformers=transformers.__version__, torch=torch.__version__)
        found = [dataclasses.asdict(results[name]) for name in everything]
        (RESULTS / f"{transformers.__version__}.json").write_text(json.dumps({**versions, "results": found}, indent=1))
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "models.md").write_text(document())
    if any(result.status == "wrong" for result in results.values()):
        sys.exit("some types are wrong")


if __name__ == "__main__":
    main(sys.argv[1:])
