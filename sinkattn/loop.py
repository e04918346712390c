"""The loop of `generate`: tokens chosen as transformers' own loop chooses them, and the GPU waits for none of it.

That loop waits for a token, looks whether all texts have ended, and launches the next step then. Here a captured step
is launched behind the choice at once: which rows it feeds, none if all texts have ended, is known on the device. The
host looks while the GPU is at work, as in a `Stream`, which cannot serve itself: it feeds the last token as well, and
its processors see no more of the text than the cache holds.
"""

import sys

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from .cache import SinkCache
from .choice import likeliest
from .introspect import CACHE, input_device
from .runner import Runner
from .unfed import Unfed

CALLED = ("_sample", "_prefill", "_update_model_kwargs_for_generation", "_optimize_model_for_decode")
OF_ALL_STEPS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")  # to be returned


class Stops(StoppingCriteriaList):
    """What may end a text, asked once a token: the cache hears which rows have ended, and what was not fed yet."""

    def __init__(self, criteria: StoppingCriteriaList, cache: SinkCache, width: int):
        super().__init__(criteria)
        self.cache, self.done, self.width = cache, None, width
        self.pads = any(hasattr(x, "eos_token_id") for x in criteria)  # as `generate` tells

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self.cache.ended = self.done  # before this choice
        self.cache.unfed = Unfed(input_ids[:, -1:], self.cache.ended, input_ids.shape[1] - self.width)
        done = super().__call__(input_ids, scores, **kwargs)
        if self.pads and len(input_ids) > 1:
            self.done = done if self.done is None else self.done | done
        return done


def is_usual(model) -> bool:
    """Whether what transformers' loop calls of a model, besides its forward and inputs, is transformers' own."""
    return all(getattr(getattr(model, x, None), "__func__", 0) is getattr(GenerationMixin, x, None) for x in CALLED)


def serves(model, cache, ids: Tensor, stops: StoppingCriteriaList, config: GenerationConfig) -> bool:
    """Whether `text_of` gives all that is asked for, if the model is usual and its steps are given nothing but ids."""
    if not isinstance(cache, SinkCache) or not isinstance(stops, Stops):
        return False
    if config.return_dict_in_generate and any(getattr(config, name, False) for name in OF_ALL_STEPS):
        return False
    if config.compile_config is not None or config.is_assistant:
        return False
    return ids.device.type in ("cpu", "cuda") and ids.device == input_device(model)


def text_of(
    model, runner: Runner, cache: SinkCache, ids: Tensor, processors: LogitsProcessorList, stops: Stops,
    config: GenerationConfig, streamer: BaseStreamer | None, kwargs: dict,
):  # fmt: skip
    """What `GenerationMixin._sample` gives: the same ids by the same draws, processors and criteria asked as there.

    A streamer is given tokens while the model may be reading them: if it raises, they are in the cache.

    ids: (batch, columns) int64. kwargs: of the first forward.
    Returns ids with the answer behind them, (batch, more columns), or transformers' output that has them.
    Raises RuntimeError if tokens are drawn and the logits of any row have no distribution.
    """
    logits = model._prefill(ids, config, kwargs).logits[:, -1].to(ids.device, copy=True)  # those of all may be large
    told, goes_on, pad = _Told(ids, streamer is not None), torch.ones_like(ids[:, 0], dtype=torch.bool), None
    most = sys.maxsize if stops.max_length is None else stops.max_length
    if stops.pads and len(ids) > 1:
        pad = config._pad_token_tensor.to(ids.device)
    with model._optimize_model_for_decode():
        while True:
            chosen, can_choose = _choice(logits, ids, processors, config.do_sample)
            chosen = chosen if pad is None else chosen.where(goes_on, pad)
            ids = torch.cat((ids, chosen[:, None]), dim=1)
            goes_on = goes_on & ~stops(ids, None)
            any_goes_on = goes_on.any() if can_choose is None else goes_on.any() & can_choose
            told.hear(any_goes_on, chosen)
            logits = None
            with cache.ahead(told.goes_on):
                if ids.shape[1] < most:
                    fed = any_goes_on if cache.ended is None else any_goes_on & ~cache.ended
                    logits = runner.replayed(cache, chosen[:, None], fed.expand(len(ids))[:, None])
            if not told.goes_on() and can_choose is not None and not can_choose:
                cache.unfed = None
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")  # as multinomial
            if streamer is not None:
                streamer.put(told.ids.clone())
            if not told.goes_on():
                break
            logits = (runner.logits(cache, chosen[:, None], None) if logits is None else logits)[:, -1]
    if streamer is not None:
        streamer.end()
    return GenerateDecoderOnlyOutput(sequences=ids, **{CACHE: cache}) if config.return_dict_in_generate else ids


def _choice(
    logits: Tensor, ids: Tensor, processors: LogitsProcessorList, do_sample: bool
) -> tuple[Tensor, Tensor | None]:
    """The next ids, (batch,), and if they are drawn, whether every row has a distribution, () bool."""
    if not processors and not do_sample:
        return likeliest(logits), None  # the largest is the largest in any dtype
    scores = processors(ids, logits.to(torch.float32, copy=True))
    if not do_sample:
        return likeliest(scores), None
    probabilities = scores.softmax(-1)
    noise = torch.empty_like(probabilities).exponential_()  # `torch.multinomial`, which waits to see that it can
    return likeliest(probabilities / noise), ~probabilities[:, 0].isnan().any()


class _Told:
    """What the host hears of a choice, as soon as it is made.

    ids: (batch, columns), of the text. hears_ids: whether it hears the chosen ids too.
    """

    def __init__(self, ids: Tensor, hears_ids: bool):
        self._device, on_gpu = ids.device, ids.device.type == "cuda"
        self._goes_on, self._made = torch.zeros((), dtype=torch.bool, pin_memory=on_gpu), None
        self.ids = torch.zeros(len(ids), dtype=ids.dtype, pin_memory=on_gpu) if hears_ids else None

    def hear(self, goes_on: Tensor, chosen: Tensor) -> None:
        """goes_on: whether any text goes on, () bool. chosen: (batch,)."""
        self._goes_on.copy_(goes_on, non_blocking=True)
        if self.ids is not None:
            self.ids.copy_(chosen, non_blocking=True)
        if self._device.type == "cuda":
            self._made = torch.cuda.current_stream(self._device).record_event()

    def goes_on(self) -> bool:
        """Whether any text goes on; waits until that is known."""
        if self._made is not None:
            self._made.synchronize()
        return bool(self._goes_on)
