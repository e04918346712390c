"""Endless, exact generation for Hugging Face decoders: attention sinks and a window at constant memory."""

from .cache import SinkCache
from .patch import Handle, patch
from .rope import UnsupportedModelError

__all__ = ["Handle", "SinkCache", "UnsupportedModelError", "patch"]
