"""Drop-in loaders: change the import of an attention_sinks script and keep the script."""

import transformers

from .models import sizes
from .patch import patch


class _Sinks:
    """Adds ``attention_sink_size`` and ``attention_sink_window_size`` to a transformers auto class."""

    @classmethod
    def from_pretrained(
        cls, *args, attention_sink_size: int = 4, attention_sink_window_size: int | None = None, **kwargs
    ):
        """Load a model as transformers does and patch it to give the logits of attention_sinks 0.4.0.

        attention_sink_size: tokens kept from the start of the text. attention_sink_window_size: *old* tokens kept, the
        current one not counted, so it is ``window_size=attention_sink_window_size + 1`` of `patch`. None is 1020 as
        there, or what the trained length leaves if that is less. As there, a prompt is attended densely
        (``prefill="dense"``). Other arguments are those of transformers. Raises what `patch` raises, and ValueError if
        the sinks leave no window.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        window = None if attention_sink_window_size is None else attention_sink_window_size + 1
        window_size = sizes(model.config, attention_sink_size, window, capacity=attention_sink_size + 1021)[1]
        patch(model, attention_sink_size, window_size, prefill="dense")
        return loaded


class AutoModelForCausalLM(_Sinks, transformers.AutoModelForCausalLM):
    """`transformers.AutoModelForCausalLM`, whose `from_pretrained` returns a patched model."""


class AutoModel(_Sinks, transformers.AutoModel):
    """`transformers.AutoModel`, whose `from_pretrained` returns a patched model."""
