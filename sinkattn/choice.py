"""How a Stream chooses its tokens: by those of transformers' processors that need no more text than it keeps."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .backends import DTYPES, has_kernels

OPTIONS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "suppress_tokens", "remove_invalid_values", "renormalize_logits", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
PLAIN = {  # other ways to generate, and what they are where nobody asks for them
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": 0.0, "dola_layers": None,
    "stop_strings": None, "max_time": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
}  # fmt: skip
CAPTURED = (  # what looks at nothing but the scores and the ids that are held, and never waits for the GPU
    RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
)  # fmt: skip
STATELESS = (
    *CAPTURED, EpsilonLogitsWarper, EtaLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper,
    SuppressTokensLogitsProcessor, TopHLogitsWarper, TypicalLogitsWarper,
)  # fmt: skip


def likeliest(scores: Tensor) -> Tensor:
    """``scores.argmax(-1)``, the first of the largest, of (..., vocabulary).

    On a GPU one kernel. Without it two rounds, if there are less than 2^17: torch leaves each row to one block then.
    """
    vocabulary = scores.shape[-1]
    parts = math.gcd(vocabulary, 256)
    if has_kernels(scores.device) and scores.dtype in DTYPES and scores.stride(-1) == 1:
        return torch.ops.sinkattn.likeliest(scores.reshape(-1, vocabulary)).view(scores.shape[:-1])
    if not scores.is_cuda or parts < 16 or vocabulary >= 1 << 17:
        return scores.argmax(-1)
    most, where = scores.unflatten(-1, (parts, -1)).max(-1)
    part = most.argmax(-1, keepdim=True)
    return torch.add(where.gather(-1, part), part, alpha=vocabulary // parts)[..., 0]


@dataclass(frozen=True)
class Choice:
    """How the next ids are chosen. told: all that `generate` would be told, as text. processors: transformers' own."""

    told: str
    do_sample: bool
    ends: tuple[int, ...]
    pad: int
    processors: LogitsProcessorList = field(compare=False)

    @classmethod
    def of(cls, model: Any, config: GenerationConfig | None, options: dict, device: torch.device) -> "Choice":
        """By a model's configs and what was asked for; device: of its logits."""
        if unknown := [name for name in options if name not in OPTIONS]:
            raise TypeError(f"Stream.generate takes no {unknown[0]!r}; it takes {', '.join(OPTIONS)}")
        given = {name: value for name, value in options.items() if value is not None}
        config, _ = model._prepare_generation_config(config, **given)
        for name, plain in PLAIN.items():
            if getattr(config, name, None) not in (None, plain):
                raise ValueError(
                    f"{name}={getattr(config, name)!r}: a Stream samples or takes the likeliest token, and hears of "
                    "proposals by arguments of its own"
                )
        ends = () if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
        told = config.to_json_string(use_diff=False)
        config._eos_token_tensor = torch.tensor(ends, device=device) if ends else None
        processors = model._get_logits_processor(config, input_ids_seq_length=1, device=device, model_kwargs={})
        for processor in processors:
            if not isinstance(processor, STATELESS):
                raise ValueError(
                    f"the generation config asks for a {type(processor).__name__}, which needs more of the text than a "
                    "Stream keeps: use generate(), or leave it out"
                )
        pad = config.pad_token_id if config.pad_token_id is not None else (*ends, 0)[0]
        return cls(told, bool(config.do_sample), tuple(ends), int(pad), processors)

    def scores(self, logits: Tensor, held: Callable[[], Tensor]) -> Tensor:
        """What the processors make of logits, (rows, vocabulary), in float32; as they are if nothing is asked.

        held: gives the ids that stand in the cache, (rows, n), in any order, -1 for none.
        """
        if not self.processors:
            return logits.float() if self.do_sample else logits  # the largest is the largest in any dtype
        ids = held()
        ids = torch.where(ids < 0, ids.amax(1, keepdim=True).clamp(min=0), ids)  # instead of none, any again
        return self.processors(cast(Any, ids), cast(Any, logits.float()))

    def ends_text(self, ids: Tensor) -> Tensor:
        """Whether each of the ids, of any shape, ends a text."""
        if not self.ends:
            return torch.zeros_like(ids, dtype=torch.bool)
        return functools.reduce(torch.logical_or, [ids == end for end in self.ends])

    @property
    def may_be_captured(self) -> bool:
        return all(isinstance(processor, CAPTURED) for processor in self.processors)
