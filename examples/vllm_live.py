"""One request that does not end, fed in pieces as they come (speech, a log, a chat), through vLLM with the plugin.

    python examples/vllm_live.py MODEL < FILE     # where vLLM and sinkattn are installed, see docs/vllm.md

Every line is a piece. Behind each, the token comes out that the model expects next. It is not kept: the next piece is
read behind the last one. Nothing is read twice, and the request holds the blocks of its sinks and window for ever.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable

os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

TOKENS = 10_000_000  # of the request in all; room for their ids is reserved, and used as they come


async def expected(engine: AsyncLLM, pieces: Iterable[list[int]]) -> AsyncIterator[int]:
    """Feed pieces, lists of ids, to one request. Yields the id that is expected behind each."""
    ready = asyncio.Semaphore(1)

    async def inputs() -> AsyncIterator[StreamingInput]:
        for piece in pieces:
            await ready.acquire()  # pieces may come earlier, too: they then wait in vLLM
            yield StreamingInput(prompt={"prompt_token_ids": piece})

    # One token a piece: of more, vLLM 0.32 repeats those of the first piece, with sinkattn and without.
    asked = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    async for output in engine.generate(inputs(), asked, request_id="live"):
        for token in output.outputs[0].token_ids:
            yield token
            ready.release()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sink-size", type=int, default=4)
    parser.add_argument("--window-size", type=int, default=1020)
    given = parser.parse_args()
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=given.model,
            dtype=given.dtype,
            enforce_eager=True,
            max_model_len=TOKENS,
            max_num_seqs=1,
            max_num_batched_tokens=256,
            kv_cache_memory_bytes=1 << 29,
            additional_config={"sinkattn": {"sink_size": given.sink_size, "window_size": given.window_size}},
        )
    )
    words = engine.get_tokenizer()
    pieces = (words.encode(line, add_special_tokens=False) for line in sys.stdin)
    async for token in expected(engine, pieces):
        print(json.dumps({"id": token, "text": words.decode([token])}), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
