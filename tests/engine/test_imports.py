"""The engine stays light: what it must never load."""

from tests.interpreter import run_python

HEAVY = ("torch", "transformers", "numpy", "numba", "huggingface_hub")
SERVE = """
import asyncio, sys, warnings
warnings.simplefilter("error")
from streamserve.config import CacheConfig, SchedulerConfig
from streamserve.core.clock import monotonic
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.garbage import freeze_gc
from streamserve.engine.null_runner import NullRunner
from streamserve.engine.preprocess import Preprocessor

async def main():
    tokenizer = ByteTokenizer()
    template = ChatTemplate.builtin("plain", special_tokens=tokenizer.special_tokens)
    scheduler = Scheduler(
        SchedulerConfig(max_model_len=256), KVCacheManager(CacheConfig(num_blocks=32)), monotonic
    )
    engine = AsyncEngine(
        scheduler=scheduler,
        runner=NullRunner(list(b"hello ")),
        tokenizer=tokenizer,
        eos_token_ids=frozenset(),
        max_model_len=256,
    )
    await engine.start()
    freeze_gc()
    prompt = await Preprocessor(tokenizer, template).chat([{"role": "user", "content": "Hi"}])
    stream = engine.submit(prompt.token_ids, SamplingParams(max_tokens=12), request_id="r")
    print("".join([output.text async for output in stream]))
    await engine.stop()

asyncio.run(main())
print([name for name in %r if name in sys.modules])
"""


def test_serving_without_a_model_loads_nothing_heavy():
    assert run_python("-c", SERVE % (HEAVY,)).stdout == "hello hello \n[]\n"
