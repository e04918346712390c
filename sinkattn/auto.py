"""The loaders of attention_sinks 0.4.0: change the import of a script and keep the script.

They are its auto classes, and the AutoTokenizer that it exports beside them; its classes of single architectures, as
LlamaForCausalLM, have none here: an auto class loads whatever the config names.
"""

from typing import Any

import transformers
from transformers import AutoTokenizer as AutoTokenizer

from .models import sizes
from .patch import patch


class _Sinks:
    """Adds the keywords of attention_sinks, and some of `patch`, to a transformers auto class."""

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        attention_sink_size: int = 4,
        attention_sink_window_size: int | None = None,
        backend: str = "auto",
        fuse: str = "model",
        cuda_graph: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does and patch it to give the logits of attention_sinks 0.4.0.

        attention_sink_size: tokens kept from the start of the text.
        attention_sink_window_size: *old* tokens kept, the current one not counted, so it is
            ``window_size=attention_sink_window_size + 1`` of `patch`. None is 1020 as there, or what the trained length
            leaves if that is less.
        backend, fuse, cuda_graph: those of `patch`.
        Other arguments are those of transformers.

        A prompt is attended densely, as there (``prefill="dense"``). Returns what transformers returns: the model, or
        with ``output_loading_info=True`` the model and a dict. Raises what `patch` raises, and ValueError if the sinks
        leave no window.
        """
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]  # of the auto class beside this one
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        window = None if attention_sink_window_size is None else attention_sink_window_size + 1
        window_size = sizes(model.config, attention_sink_size, window, capacity=attention_sink_size + 1021)[1]
        patch(
            model,
            attention_sink_size,
            window_size,
            prefill="dense",
            backend=backend,
            fuse=fuse,
            cuda_graph=cuda_graph,
        )
        return loaded


class AutoModel(_Sinks, transformers.AutoModel):
    """`transformers.AutoModel`, whose `from_pretrained` returns a patched model."""


class AutoModelForCausalLM(_Sinks, transformers.AutoModelForCausalLM):
    """`transformers.AutoModelForCausalLM`, whose `from_pretrained` returns a patched model."""


class AutoModelForQuestionAnswering(_Sinks, transformers.AutoModelForQuestionAnswering):
    """`transformers.AutoModelForQuestionAnswering`, whose `from_pretrained` returns a patched model."""


class AutoModelForSequenceClassification(_Sinks, transformers.AutoModelForSequenceClassification):
    """`transformers.AutoModelForSequenceClassification`, whose `from_pretrained` returns a patched model."""


class AutoModelForTokenClassification(_Sinks, transformers.AutoModelForTokenClassification):
    """`transformers.AutoModelForTokenClassification`, whose `from_pretrained` returns a patched model."""
