"""Endless, exact generation for Hugging Face decoders: attention sinks and a window at constant memory."""

from .auto import AutoModel, AutoModelForCausalLM
from .cache import SinkCache
from .patch import Handle, patch
from .rope import UnsupportedModelError
from .stream import Stream

__version__ = "0.1.0"
__all__ = ["AutoModel", "AutoModelForCausalLM", "Handle", "SinkCache", "Stream", "UnsupportedModelError", "patch"]
