"""Peers of bench/cpu.py that live in interpreters of their own: PYTHON bench/cpu_peer.py attention_sinks | llama.cpp

A line of JSON on standard input is a case or "round"; the answer to a case is a line of JSON on standard output when
all is ready, and to "round" the seconds that a round of that case took.
"""

import ctypes
import json
import sys
import time
import types
import warnings
from pathlib import Path


def attention_sinks():
    """0.4.0, which needs transformers 4.34.0 (tests/record_attention_sinks.py says how to install both).

    Timed are its own attention of a Llama layer, with projections that do nothing, and its own eviction.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    import attention_sinks
    import torch
    import transformers
    from attention_sinks.attention_sink_kv_cache import AttentionSinkKVCache
    from attention_sinks.models.llama.pos_shift import llama_pos_shift_attention_forward
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    @torch.no_grad()
    def rounds(case: dict):
        torch.set_num_threads(case["threads"])
        heads, kv_heads, head_dim = case["heads"], case["kv_heads"], case["head_dim"]
        dtype, tokens, capacity = getattr(torch, case["dtype"]), case["tokens"], case["capacity"]
        q, k, v = (torch.randn(1, tokens, n * head_dim).to(dtype) for n in (heads, kv_heads, kv_heads))
        module = types.SimpleNamespace(
            config=types.SimpleNamespace(pretraining_tp=1), num_heads=heads, num_key_value_heads=kv_heads,
            num_key_value_groups=heads // kv_heads, head_dim=head_dim, hidden_size=heads * head_dim,
            q_proj=lambda _: q, k_proj=lambda _: k, v_proj=lambda _: v, o_proj=lambda x: x,
            rotary_emb=LlamaRotaryEmbedding(head_dim, max_position_embeddings=max(capacity, tokens) + 1),
        )  # fmt: skip
        evict = AttentionSinkKVCache(4, capacity - 5)  # and the current token are C
        position_ids, mask = torch.tensor([[capacity - 1]]), None
        if tokens > 1:
            position_ids = torch.arange(tokens)[None]
            mask = torch.full((1, 1, tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)
        shape = (1, kv_heads, capacity - 1, head_dim)
        full = lambda: tuple(torch.randn(shape).to(dtype) for _ in range(2))  # noqa: E731
        pasts = [full() if tokens == 1 else None for _ in range(case["layers"])]

        @torch.no_grad()
        def round_of_layers() -> None:
            for i, past in enumerate(pasts):
                past = llama_pos_shift_attention_forward(module, q, mask, position_ids, past, use_cache=True)[2]
                past = evict([past])[0]
                if tokens == 1:
                    pasts[i] = past

        return round_of_layers

    versions = {"attention_sinks": attention_sinks.__version__, "transformers": transformers.__version__}
    return versions | {"torch": torch.__version__}, rounds


def llama_cpp():
    """The attention of llama-cpp-python's ggml, ggml_flash_attn_ext: no rotation, nothing stored."""
    import llama_cpp
    import numpy as np

    pointer, i64, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

    class Memory(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", pointer), ("no_alloc", ctypes.c_bool)]

    folder = Path(llama_cpp.__file__).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so")) for name in ("base", "cpu"))

    def bind(library, name: str, result, *arguments):
        function = getattr(library, f"ggml_{name}")
        function.restype, function.argtypes = result, arguments
        return function

    init, free = bind(base, "init", pointer, Memory), bind(base, "free", None, pointer)
    new_tensor = bind(base, "new_tensor_4d", pointer, pointer, ctypes.c_int, i64, i64, i64, i64)
    data, size = bind(base, "get_data", pointer, pointer), bind(base, "nbytes", ctypes.c_size_t, pointer)
    attention = bind(base, "flash_attn_ext", pointer, *[pointer] * 5, f32, f32, f32)
    new_graph, expand = (
        bind(base, "new_graph", pointer, pointer),
        bind(base, "build_forward_expand", None, *[pointer] * 2),
    )
    compute = bind(cpu, "graph_compute_with_ctx", ctypes.c_int, pointer, pointer, ctypes.c_int)
    cpu.ggml_cpu_init()
    context = None  # of the last case
    numbers = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml_type

    def narrow(x, dtype: str):
        """float32 as the bytes of a dtype."""
        return {
            "float32": lambda: x,
            "float16": lambda: x.astype(np.float16),
            "bfloat16": lambda: (x.view(np.uint32) >> 16).astype(np.uint16),
        }[dtype]().view(np.uint8)

    def rounds(case: dict):
        nonlocal context
        heads, kv_heads, head_dim, dtype = case["heads"], case["kv_heads"], case["head_dim"], case["dtype"]
        tokens, keys = case["tokens"], case["capacity"] if case["tokens"] == 1 else case["tokens"]
        random = np.random.default_rng(0)
        if context:
            free(context)
        context = init(Memory(2**30 + 16 * tokens * heads * head_dim + 2 * tokens * keys, None, False))

        def tensor(dtype: str, x, *shape: int):
            made = new_tensor(context, numbers[dtype], *shape)
            filled = np.resize(narrow(x, dtype), size(made))
            ctypes.memmove(data(made), filled.ctypes.data, filled.nbytes)
            return made

        normal = lambda n: random.standard_normal(n, dtype=np.float32)  # noqa: E731
        q = tensor("float32", normal(tokens * heads * head_dim), head_dim, tokens, heads, 1)
        mask = None
        if tokens > 1:
            above = np.where(np.triu(np.ones((tokens, keys), bool), 1), np.float32(-np.inf), np.float32(0))
            mask = tensor("float16", above.reshape(-1), keys, tokens, 1, 1)
        some, graph = normal(kv_heads * keys * head_dim), new_graph(context)
        for _ in range(case["layers"]):
            k, v = (tensor(dtype, some, head_dim, keys, kv_heads, 1) for _ in range(2))
            expand(graph, attention(context, q, k, v, mask, head_dim**-0.5, 0.0, 0.0))

        def round_of_layers() -> None:
            if compute(context, graph, case["threads"]):
                raise RuntimeError("ggml could not compute it")

        return round_of_layers

    return {"llama_cpp_python": llama_cpp.__version__}, rounds


if __name__ == "__main__":
    versions, rounds = {"attention_sinks": attention_sinks, "llama.cpp": llama_cpp}[sys.argv[1]]()
    print(json.dumps(versions), flush=True)
    one_round = None
    for line in sys.stdin:
        seconds = 0.0
        if (case := json.loads(line)) == "round":
            begin = time.perf_counter()
            one_round()
            seconds = time.perf_counter() - begin
        else:
            one_round = None  # the last case's memory
            one_round = rounds(case)
        print(json.dumps(seconds), flush=True)
