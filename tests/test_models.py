"""Many models: a sample of the sweep, models whose code lies beside their weights, and where a model may live."""

import pytest
import torch
import transformers

import sweep
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, patch
from tiny import tiny

S, W = 4, 10
C = S + W


@pytest.mark.parametrize("name", sweep.SAMPLE)
def test_types(name):
    """A sample of `tests/sweep.py`, which checks all types."""
    result = sweep.check(name)
    if name == "gpt2":
        assert result.status == "refused" and "learned" in result.reason
    else:
        assert result.status == "exact", result
