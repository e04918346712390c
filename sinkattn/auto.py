"""Drop-in loaders: change the import of an attention_sinks script and keep the script."""

import transformers

from .patch import patch


class _Sinks:
    """Adds ``attention_sink_size`` and ``attention_sink_window_size`` to a transformers auto class."""

    @classmethod
    def from_pretrained(cls, *args, attention_sink_size: int = 4, attention_sink_window_size: int = 1020, **kwargs):
        """Load a model as transformers does and patch it to give the logits of attention_sinks 0.4.0.

        attention_sink_size: tokens kept from the start of the text. attention_sink_window_size: *old* tokens kept, the
        current one not counted, so it is ``window_size=attention_sink_window_size + 1`` of `patch`. As there, a prompt
        is attended densely (``prefill="dense"``). Other arguments are those of transformers. Raises what `patch`
        raises.
        """
        model = super().from_pretrained(*args, **kwargs)
        patch(model, attention_sink_size, attention_sink_window_size + 1, prefill="dense")
        return model


class AutoModelForCausalLM(_Sinks, transformers.AutoModelForCausalLM):
    """`transformers.AutoModelForCausalLM`, whose `from_pretrained` returns a patched model."""


class AutoModel(_Sinks, transformers.AutoModel):
    """`transformers.AutoModel`, whose `from_pretrained` returns a patched model."""
