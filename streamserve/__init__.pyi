from streamserve.engine.async_engine import AsyncEngine as AsyncEngine
from streamserve.llm.async_llm import AsyncLLM as AsyncLLM
from streamserve.llm.llm import LLM as LLM
from streamserve.llm.outputs import CompletionOutput as CompletionOutput
from streamserve.llm.outputs import RequestOutput as RequestOutput
from streamserve.llm.sampling_params import SamplingParams as SamplingParams

__version__: str
