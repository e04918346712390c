"""Texts outside of a cache: in host memory, and in one safetensors file that another process can go on with.

The file's metadata has two entries: "sinkattn", a JSON object (`Texts.about`), and "crc32", the checksum of that and of
all tensors. docs/keeping.md lists what is in them. A file is checked whole before anything is made of it.
"""

import errno
import functools
import json
import math
import os
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import __version__
from .introspect import embedded_ids
from .rings import Bytes, Plan
from .rows import FIRST

VERSION = 1  # of the format
LONGEST = 2**52  # tokens: positions up to here are exact in float64
FACTS: dict[str, Any] = {  # of `Texts.about`, and their types
    "version": int, "kind": str, "made_by": dict, "device": str, "form": dict, "rows": int, "seen": int,
    "has_places": bool, "all_known": bool, "is_searched": bool, "columns": (int, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Texts in host memory: what `Stream.take` gives and `Stream.put` takes. ``len(texts)`` is the number of rows.

    about: dict, what JSON can hold: of which model, by which sizes, and what a cache knows of all its rows. tensors: by
        name, (rows, ...) on the CPU each, pinned if they came from a GPU. nbytes: of all tensors.
    ready: when copies under way are whole.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    ready: list["torch.cuda.Event"] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tensors": {name: Bytes.of(x) for name, x in self.tensors.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: Bytes.back(x) for name, x in state["tensors"].items()}
        vars(self).update({**state, "tensors": tensors})

    def __len__(self) -> int:
        return self.about["rows"]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())

    def __repr__(self) -> str:
        return f"<{len(self)} texts of {self.about['form']['model_type']}, {self.nbytes:,} bytes>"

    def on(self, name: str, device: torch.device) -> Tensor:
        """A tensor on a device, behind what its stream has under way."""
        for event in self.ready:
            if device.type == "cuda":
                torch.cuda.current_stream(device).wait_event(event)
            else:
                event.synchronize()
        return self.tensors[name].to(device, non_blocking=True)

    def with_logits_in(self, dtype: torch.dtype) -> "Texts":
        """The same, its logits as those of a model of that dtype. Caches in 8 bits fit models of any."""
        logits = self.tensors.get("logits")
        if logits is None or logits.dtype == dtype or not logits.is_floating_point():
            return self
        for event in self.ready:
            event.synchronize()
        return replace(self, tensors={**self.tensors, "logits": logits.to(dtype)})

    def check_fits(self, plan: Plan, held: dict[str, Tensor]) -> None:
        """Raise ValueError, which says what differs, for a cache of other sizes or another model.

        held: what that keeps, by name, (any number of rows, ...) each.
        """
        for what in _differences("", self.about["form"], plan.form):
            raise ValueError(f"these texts do not fit this model: {what}")
        if missing := held.keys() - self.tensors.keys():
            raise ValueError(f"these texts do not fit this model: they have no {min(missing)}")
        for name, mine in held.items():
            found = self.tensors[name]
            if (found.shape[1:], found.dtype) != (mine.shape[1:], mine.dtype):
                raise ValueError(
                    f"these texts do not fit this model: {name} of a row is {tuple(found.shape[1:])} in {found.dtype}, "
                    f"the model's {tuple(mine.shape[1:])} in {mine.dtype}"
                )


def _differences(name: str, theirs: Any, mine: Any) -> Iterable[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in {**mine, **theirs}:
            yield from _differences(f"{name} {key}".strip(), theirs.get(key), mine.get(key))
    elif isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine):
        for i, (their, own) in enumerate(zip(theirs, mine, strict=True)):
            yield from _differences(f"{name} {i}", their, own)
    elif isinstance(theirs, float) and isinstance(mine, float):  # frequencies, rounded otherwise by another device
        if not math.isclose(theirs, mine, rel_tol=1e-5):
            yield f"{name} is {theirs}, the model's {mine}"
    elif theirs != mine:
        yield f"{name} is {_said(name, theirs)}, the model's {_said(name, mine)}"


def _said(name: str, what: Any) -> Any:
    return "auto" if name == "cache_dtype" and what is None else what


@functools.cache
def _beside(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def on_host(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list["torch.cuda.Event"]]:
    """Tensors that nobody else writes, in host memory, and when they are there: from a GPU they are copied beside what
    its stream does next.
    """
    made, ready = {}, []
    devices = {x.device for x in tensors.values() if x.device.type == "cuda"}
    for device in devices:
        _beside(device).wait_stream(torch.cuda.current_stream(device))
    for name, x in tensors.items():
        if x.device in devices:
            with torch.cuda.device(x.device), torch.cuda.stream(_beside(x.device)):
                made[name] = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
            x.record_stream(_beside(x.device))
        else:
            made[name] = x.cpu()
    for device in devices:
        ready.append(_beside(device).record_event())
    return made, ready


def _random(device: torch.device) -> tuple[Any, tuple]:
    """Where torch keeps the state of its generator for a device, and the arguments that name it there."""
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    return module, () if device.type in ("cpu", "mps") else (device,)


def random_state(device: torch.device) -> Tensor:
    """That of torch's generator, (bytes,) uint8 on the CPU."""
    module, named = _random(device)
    return module.get_rng_state(*named)


def set_random_state(texts: Texts, device: torch.device) -> None:
    """Give torch's generator the state that it had, if it is that of the same kind of device."""
    if texts.about["device"] == device.type:
        module, named = _random(device)
        try:
            module.set_rng_state(texts.tensors["generator"].clone(), *named)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"these texts have no state that torch's generator can take: {error}") from error


def about_of(plan: Plan, device: torch.device, **facts: Any) -> dict[str, Any]:
    """What the file says besides tensors. facts: the other entries of `FACTS`."""
    made_by = {"sinkattn": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"version": VERSION, "made_by": made_by, "device": device.type, "form": plan.form, **facts}


def _checksum(about: str, tensors: dict[str, Tensor]) -> str:
    found = zlib.crc32(about.encode())
    for name in sorted(tensors):
        x = tensors[name]
        found = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), found)
        found = zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def write(path: str | os.PathLike, texts: Texts) -> None:
    """Save texts in one file. It is written beside and put in place whole: what was there before stays until then.

    Raises OSError if that cannot be done.
    """
    path, about = Path(path), json.dumps(texts.about)
    for event in texts.ready:
        event.synchronize()
    tensors = {name: x.contiguous() for name, x in texts.tensors.items()}
    metadata = {"sinkattn": about, "crc32": _checksum(about, tensors)}
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))  # and not the one beside
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    beside.touch(exist_ok=False)
    try:
        try:
            safetensors.torch.save_file(tensors, beside, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # that it has this name is on the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: str | os.PathLike, kind: str, model: nn.Module) -> Texts:
    """Texts of a file, checked but for whether they fit the model.

    kind: "cache" or "stream". model: that embeds the ids.
    Raises ValueError for a file that is damaged, is no such file, or is of another kind; OSError if there is none.
    """
    with open(path, "rb"):  # OSError says what is wrong with the path
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "sinkattn" not in metadata:
                raise ValueError("sinkattn has not written it")
            about = _about(metadata["sinkattn"], kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if metadata.get("crc32") != _checksum(metadata["sinkattn"], tensors):
            raise ValueError("its checksum is not that of what it holds")
        _check(about, tensors, embedded_ids(cast(Any, model)))
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no texts that can go on, or is damaged: {error}") from error
    return Texts(about, tensors)


def _about(text: str, kind: str) -> dict[str, Any]:
    about = json.loads(text)
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else None
        raise ValueError(f"its format has version {version!r}, this sinkattn reads version {VERSION}")
    for name, types in FACTS.items():
        value = about.get(name)
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise ValueError(f"its header has {name}={value!r}")
    if about["kind"] != kind:
        owner = {"cache": "SinkCache", "stream": "Stream"}.get(about["kind"], "another version")
        raise ValueError(f"it was saved by {owner}.save: load it by {owner}.load")
    return about


def _check(about: dict[str, Any], tensors: dict[str, Tensor], vocabulary: int) -> None:
    """Raise ValueError for what cannot be right, whoever wrote the checksum."""
    form, rows, seen = about["form"], about["rows"], about["seen"]
    sizes = [form.get(name) for name in ("sink_size", "window_size", "slack")]
    if not all(isinstance(x, int) and 0 <= x < LONGEST for x in sizes):
        raise ValueError(f"its header has sink_size, window_size and slack {sizes}")
    if rows < 1 or not 0 < seen <= LONGEST:
        raise ValueError(f"its header has {rows} rows of {seen} columns")
    first = max(sizes[0], FIRST)
    slots = first + max(first, sizes[1]) + 1 + sizes[2] + 1
    known: dict[str, tuple] = {  # shape behind the rows, dtype, least, most
        "lengths": ((), torch.int64, 0, seen),
        "peak": ((), torch.int64, 0, LONGEST),
        "ids": ((slots,), torch.int64, -1, vocabulary - 1),
        "tops": ((slots,), torch.int64, -1, LONGEST),
        "anchor": ((3,), torch.int64, 0, LONGEST),
        "digest": ((), torch.int64, -(2**63), 2**63 - 1),
    }
    if about["kind"] == "stream":
        known |= {name: ((), torch.bool, 0, 1) for name in ("ended", "waiting")}
        generator = tensors.get("generator", torch.empty(0))
        if generator.dtype != torch.uint8 or generator.dim() != 1:
            raise ValueError("it has no state of a random generator")
        if "late.ids" in tensors:
            known |= {"late.ids": ((), torch.int64, 0, vocabulary - 1), "late.fed": ((), torch.bool, 0, 1)}
    if about["columns"] is not None:
        known |= {"unfed.ids": ((1,), torch.int64, 0, vocabulary - 1), "unfed.ended": ((), torch.bool, 0, 1)}
        if about["columns"] < 1:
            raise ValueError(f"its header has columns={about['columns']}")
    for name, (shape, dtype, least, most) in known.items():
        if name not in tensors:
            raise ValueError(f"it has no {name}")
        x = tensors[name]
        if (tuple(x.shape), x.dtype) != ((rows, *shape), dtype):
            raise ValueError(f"{name} is {tuple(x.shape)} in {x.dtype}, not {(rows, *shape)} in {dtype}")
        low, high = (int(y) for y in (x.view(torch.uint8) if dtype == torch.bool else x).aminmax())
        if low < least or high > most:
            why = f": the model embeds {vocabulary} ids" if least <= low and most == vocabulary - 1 else ""
            raise ValueError(f"{name} reaches from {low} to {high}, not from {least} to {most}{why}")
    for name, x in tensors.items():
        if name != "generator" and (x.dim() == 0 or len(x) != rows):
            raise ValueError(f"{name} is {tuple(x.shape)}, of {rows} rows")
