"""Steps of one token a row, or a few, as CUDA graphs: which of a model's may be, their capture and their replay."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .cache import SinkCache
from .graph import Captured, is_shortage, why_eager
from .introspect import CACHE_NAMES
from .rings import Plan

# What a step may be given and still be the one that was captured
PLAIN = {"input_ids", "attention_mask", *CACHE_NAMES, "use_cache", "return_dict", "position_ids", "cache_position",
         "logits_to_keep", "mm_token_type_ids"}  # fmt: skip
logger = logging.getLogger(__name__)


class CapturedSteps:
    """Captures small steps of one model, and replays them. The graphs are with the rows that they write, see `Rows`.

    Attributes: why_eager, why a step of one token does not replay a CUDA graph; None if it does.
    """

    def __init__(self, model, cuda_graph: bool):
        self.model, self.why_eager = model, "patch() is not done" if cuda_graph else "cuda_graph=False"
        self._refused = not cuda_graph  # for good, while `why_eager` may change with hooks and devices
        self._takes_one = False  # whether steps of more tokens cannot be captured
        self._mark = object()  # what is captured reads the weights of this model, and of no copy of it

    def __getstate__(self) -> dict:
        return {**vars(self), "_mark": object()}

    def ask(self, plan: Plan, tells: bool) -> None:
        """Find out whether steps can be captured, as the model is now. tells: whether the log hears what is new."""
        if self._refused:
            return
        known, self.why_eager = self.why_eager, why_eager(self.model)
        if any(layer.rope is not None and layer.rope.varies for layer in plan.layers.values()):
            self.why_eager = "its rotary frequencies change with the length of a row: S + W exceeds its trained length"
        if tells and self.why_eager not in (None, known):
            logger.info("steps of %s run eagerly: %s", type(self.model).__name__, self.why_eager)

    def serve(self, kwargs: dict, cache: SinkCache, tokens: int) -> bool:
        """Whether a step of one token or a few is one that a CUDA graph holds, as far as the host can tell."""
        if self.why_eager is not None or not cache.seen or tokens not in cache.rows.warm:
            return False
        if not is_plain(kwargs):
            return False
        if tokens > 1 and (self._takes_one or not isinstance(kwargs.get("logits_to_keep") or 0, int)):
            return False
        return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()

    @torch.no_grad()
    def replay(
        self, cache: SinkCache, ids: Tensor, mask: Tensor | None, version: int, run: Callable, prepare: Callable
    ):
        """A few tokens a row as a graph, which is captured if there is none: for whoever knows that it may be.

        ids, mask: (batch, tokens). version: of the model. run: the step, of ids and mask. prepare: is given the rows
        before their step of one token is captured.
        Returns what `run` returns, which the next step overwrites, or None if the step could not be captured and has
        not run.
        """
        device = ids.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        rows, wanted, tokens = cache.rows, (self._mark, version, cache.has_places, autocast), ids.shape[1]
        if rows.captured_for != wanted:
            rows.captured.clear()
            rows.captured_for = wanted
        if tokens not in rows.captured:
            if tokens == 1:
                prepare(rows)
            try:
                rows.captured[tokens] = Captured(run, ids.device, ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
            except RuntimeError as error:
                self._cannot_capture(error, tokens)
                return None
            finally:
                cache.cancel()
            rows.masked.discard(tokens)
        captured = rows.captured[tokens]
        if mask is None and tokens in rows.masked:
            captured.inputs["mask"].fill_(True)
            rows.masked.remove(tokens)
        elif mask is not None:
            rows.masked.add(tokens)
        cache.tear()
        output = captured(ids=ids) if mask is None else captured(ids=ids, mask=mask)
        cache.count(tokens, are_known=True)
        return output

    def _cannot_capture(self, error: RuntimeError, tokens: int) -> None:
        """Steps of one token, or those of several, run eagerly from now on; of one not for good if memory lacked."""
        why, name = f"capturing its step failed: {error}", type(self.model).__name__
        if tokens > 1:
            self._takes_one = True
            logger.info("steps of several tokens of %s run eagerly: %s", name, why)
            return
        self.why_eager, self._refused = why, not is_shortage(error)
        logger.info("steps of %s run eagerly: %s", name, why)


def is_plain(kwargs: dict, *more: str) -> bool:
    """Whether nothing is asked of a step but the next logits; more: other names that may be given."""
    given = (name for name, value in kwargs.items() if value is not None and value is not False)
    return all(name in PLAIN or name in more for name in given)
