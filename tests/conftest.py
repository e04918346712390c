"""Triton's interpreter and no `gpu` tests where there is no GPU; one thread; fresh data for every test."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton kernels run in the interpreter; triton reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way
sys.path.insert(0, str(Path(__file__).parent))


def pytest_report_header():
    return None if torch.cuda.is_available() else "no GPU: tests marked gpu are left out"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at groups
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.xdist_group("real"))  # one worker reads the real model
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def seed():
    """Fresh data every time; a failing test prints the seed, and ``SINKATTN_SEED`` repeats it."""
    value = int(os.environ.get("SINKATTN_SEED") or torch.seed() % 2**32)
    torch.manual_seed(value)
    random.seed(value)
    print(f"SINKATTN_SEED={value}")


@pytest.fixture(autouse=True)
def memory():
    """Workers share a GPU: what one of them keeps for later, others lack."""
    yield
    if torch.cuda.is_initialized():
        kept = [
            torch.cuda.memory_reserved(i) - torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count())
        ]
        if max(kept) > 2 << 30:
            torch.cuda.empty_cache()


@pytest.fixture
def model(request):
    """A tiny Llama, patched with the S and W of the test's module."""
    from sinkattn import patch
    from tiny import tiny

    model = tiny("llama")
    with patch(model, request.module.S, request.module.W):
        yield model


@pytest.fixture
def captures(monkeypatch):
    """How many captured steps ran."""
    from sinkattn.captured import CapturedSteps

    ran, replay = [], CapturedSteps.replay

    def counted(self, *args):
        output = replay(self, *args)
        ran.append(output is not None)
        return output

    monkeypatch.setattr(CapturedSteps, "replay", counted)
    return ran


@pytest.fixture
def repeated(monkeypatch, captures):
    """Steps on a CPU take the way of captured ones. Gives `captures`."""
    from helpers import Repeated

    monkeypatch.setattr("sinkattn.captured.Captured", Repeated)
    monkeypatch.setattr("sinkattn.captured.why_eager", lambda model: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return captures
