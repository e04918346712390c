"""What the log is told under the name "sinkattn": a line a model, why a module is not fused, and nothing a token."""

import logging

import pytest
import torch
import transformers

from sinkattn import Stream, captured, ops, patch
from tiny import tiny


@pytest.fixture
def told(caplog):
    """told(module): (level, message) of what it has told so far."""
    caplog.set_level(logging.DEBUG, "sinkattn")
    return lambda module: [
        (r.levelname, r.getMessage()) for r in caplog.records if r.name.startswith(f"sinkattn{module}")
    ]


def test_a_line_a_model(told):
    patch(tiny("smollm3"), 4, 6)  # every other layer does not rotate
    ((level, line),) = told(".patch")
    assert level == "INFO"
    for part in (
        "SmolLM3ForCausalLM", "4 sinks + window 6", "torch.float32 on cpu", "4 attentions", "route 'interface'",
        "rotation: 2 x 16 dims from 0 (halves), 2 x none", "4 x Attention, 4 x Layer", "backend='auto'",
        "run eagerly: its weights are on cpu",
    ):  # fmt: skip
        assert part in line


def test_a_model_that_is_watched(told):
    config = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    patch(transformers.BloomForCausalLM(config).eval(), 4, 6)
    refused, (level, line) = told(".patch")
    assert refused[0] == "DEBUG" and "BloomForCausalLM by route 'interface': BloomAttention, layer 0" in refused[1]
    assert level == "INFO" and "2 attentions by route 'watch'; rotation: 2 x ALiBi; fused: nothing" in line


def test_why_modules_are_not_fused(told):
    model = tiny("gpt_neox")
    layers = dict(model.gpt_neox.layers.named_children())
    layers["1"].attention.forward = layers["1"].attention.forward
    patch(model, 4, 6)
    assert told(".fuse") == [
        ("DEBUG", "gpt_neox.layers.1.attention (GPTNeoXAttention) is not fused: its forward was replaced"),
        *(
            (
                "DEBUG",
                f"gpt_neox.layers.{i} (GPTNeoXLayer) is not fused: input_layernorm and post_attention_layernorm are "
                "not both RMSNorms",
            )
            for i in (0, 2)
        ),
    ]


def test_nothing_a_token(told, caplog):
    model = tiny("llama")
    patch(model, 4, 6)
    stream = Stream(model)
    for count in (3, 30):
        stream.append(torch.ones(1, 2, dtype=torch.int64))
        caplog.clear()
        assert len(list(stream.generate(count))) == count
    assert told("") == []


def test_why_steps_run_eagerly_is_told_once(told, monkeypatch):
    model = tiny("llama")
    patch(model, 4, 6)
    for reason in ("a hook", "a hook", "an adapter"):
        monkeypatch.setattr(captured, "why_eager", lambda _, reason=reason: reason)
        model(torch.ones(1, 5, dtype=torch.int64))
    assert told(".captured") == [
        ("INFO", f"steps of LlamaForCausalLM run eagerly: {reason}") for reason in ("a hook", "an adapter")
    ]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_serves_a_call_is_told_once(backend, told):
    ops._compiled.clear()
    q, cache = torch.randn(1, 2, 1, 24), torch.zeros(1, 1, 8, 24)
    for _ in range(2):
        ops.decode(
            q, q[:, :1], q[:, :1], cache, cache.clone(), torch.zeros(1, dtype=torch.int64), sink_size=1, window_size=7,
            scale=1.0, backend=backend,
        )  # fmt: skip
    by = "torch.ops.sinkattn.decode.default" if backend == "auto" else "reference.decode"
    line = f"decode, backend {backend!r}, torch.float32 on cpu, (heads, dim) (2, 24) and (1, 24): {by}"
    assert told(".ops") == [("INFO", line)]


def test_loggers_are_left_to_the_program():
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("sinkattn")]
    assert len(loggers) > 4 and not any(x.handlers or x.level or x.disabled or not x.propagate for x in loggers)
