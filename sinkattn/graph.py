"""A function of fixed tensors on a GPU, recorded once as a CUDA graph, and what keeps a model from being recorded.

A decode step of a large model is hundreds of kernels of a few microseconds; Python launches them more slowly than they
run. A graph launches all of them at once. It repeats the kernels and nothing else: no Python of the model runs again,
so hooks and whatever else may act in the middle of a step keep a model out (`why_eager`).
"""

import contextlib
import gc
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

_OWN_HOOKS = "transformers.utils.output_capturing"  # they note outputs if a step asks for them; such steps run eagerly

_streams = threading.local()  # by device, those that captures run on


def _capture_stream(device: torch.device) -> "torch.cuda.Stream":
    """One of the device's own: torch's default for captures is on the GPU that was current at the first of all."""
    made = vars(_streams)
    if str(device) not in made:
        made[str(device)] = torch.cuda.Stream(device)
    return made[str(device)]


@contextlib.contextmanager
def _nothing_dies():
    """Python's collector rests: a dead graph that it finds cannot go in a capture, which then fails."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Captured:
    """``run(**inputs)``, captured: a call copies its inputs to where the graph reads them and replays it.

    device: the GPU. inputs: tensors on it; the graph reads copies of them. run: its kernels may read and write other
    tensors too, which must stay where they are. It must have run before, so that what it needs is compiled and there.

    Attributes: inputs (by name), output (whatever `run` returned; each call writes its tensors anew).

    Raises RuntimeError if `run` does what a graph cannot hold, as waiting for the GPU.
    """

    def __init__(self, run: Callable, device: torch.device, **inputs: Tensor):
        with torch.inference_mode(False):
            self.inputs = {name: x.clone() for name, x in inputs.items()}
        self._graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
        how = dict(stream=stream, capture_error_mode="thread_local")
        # A capture that fails leaves its stream set: the one around it takes it back. Some versions of torch make
        # another stream for a graph, on the current GPU: within its device, so that no other GPU is touched.
        with (
            torch.cuda.device(device),
            torch.cuda.stream(stream),
            _nothing_dies(),
            torch.cuda.graph(self._graph, **how),
        ):
            self.output = run(**self.inputs)

    def __call__(self, **inputs: Tensor):
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        self._graph.replay()
        return self.output

    def __deepcopy__(self, memo) -> None:
        return None  # a copy of the tensors needs a graph of its own


class Repeated:
    """A function of tensors in fixed places, captured at its second call.

    Every call is given the function, the same one, and whether it may be captured, asked until it is: nothing here
    holds whom they belong to, who holds this.
    """

    def __init__(self, device: torch.device):
        self._device, self._has_run, self._captured = device, False, None

    def __call__(self, run: Callable, may_be: Callable[[], bool]):
        if self._captured is None and self._has_run and may_be():
            self._captured = Captured(run, self._device)
        self._has_run = True
        return run() if self._captured is None else self._captured()


def why_eager(model: nn.Module) -> str | None:
    """Why a step of a model cannot be a CUDA graph, as far as can be told beforehand, or None."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or not devices[0].startswith("cuda"):
        return f"its weights are on {' and '.join(devices)}, a CUDA graph needs them on one GPU"
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return "there are global forward hooks, which a CUDA graph would skip"
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if hasattr(module, "_hf_hook"):
            return f"accelerate moves what {name or 'the model'} takes and gives"
        if any(getattr(hook, "__module__", None) != _OWN_HOOKS for hook in hooks):
            return f"{name or 'the model'} has forward hooks, which a CUDA graph would skip"
        if hasattr(module, "merged_adapters"):
            return f"{name} has adapters that may be switched at any time (merge_and_unload() them)"
    return None


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a shortage of memory, which may pass."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
