"""streamserve: a low-latency streaming chat server for open-weight language models.

from streamserve import LLM, SamplingParams

llm = LLM("./Qwen2.5-0.5B-Instruct")
for output in llm.generate(["Hello, my name is"], SamplingParams(max_tokens=20)):
    print(output.outputs[0].text)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The package itself stays light: a name is looked up when it is asked for, and torch is imported
# when a model is loaded. Types are in ``__init__.pyi``.
_HOMES = {
    "AsyncEngine": "streamserve.engine.async_engine",
    "AsyncLLM": "streamserve.llm.async_llm",
    "CompletionOutput": "streamserve.llm.outputs",
    "EmbeddingRequestOutput": "streamserve.llm.outputs",
    "LLM": "streamserve.llm.llm",
    "LoRARequest": "streamserve.llm.lora_request",
    "PoolingParams": "streamserve.llm.pooling_params",
    "PoolingRequestOutput": "streamserve.llm.outputs",
    "RequestOutput": "streamserve.llm.outputs",
    "SamplingParams": "streamserve.llm.sampling_params",
    "StructuredOutputsParams": "streamserve.llm.structured_outputs",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  strings all


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
