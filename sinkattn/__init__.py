"""Endless, exact generation for Hugging Face decoders: attention sinks and a window at constant memory."""

import importlib.util
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import chat as chat
    from . import models as models
    from . import ops as ops
    from . import reference as reference
    from .auto import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
    from .cache import SinkCache
    from .patch import Handle, patch
    from .rope import UnsupportedModelError
    from .stream import Stream

__version__ = "0.1.0"
__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "Handle",
    "SinkCache",
    "Stream",
    "UnsupportedModelError",
    "patch",
]
_PLACES = dict(Handle="patch", SinkCache="cache", Stream="stream", UnsupportedModelError="rope", patch="patch")
_PLACES |= {name: "auto" for name in __all__ if name.startswith("Auto")}

if not TYPE_CHECKING:  # type checkers know the names above, and that there are no others

    def __getattr__(name: str):
        """Import public names and modules when asked for: torch takes seconds, and `sinkattn --help` goes without."""
        if name in _PLACES:
            value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
        elif name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        else:
            value = importlib.import_module(f"{__name__}.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Importing the submodule `patch` puts it into the package by its name, which is the function's."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value.patch if name == "patch" and isinstance(value, types.ModuleType) else value)


sys.modules[__name__].__class__ = _Package
if "torch" in sys.modules:
    importlib.import_module(f"{__name__}.ops")  # `torch.ops.sinkattn` is there at once for whoever has torch
