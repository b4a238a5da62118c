from streamserve.engine.async_engine import AsyncEngine as AsyncEngine
from streamserve.llm.async_llm import AsyncLLM as AsyncLLM
from streamserve.llm.llm import LLM as LLM
from streamserve.llm.lora_request import LoRARequest as LoRARequest
from streamserve.llm.outputs import CompletionOutput as CompletionOutput
from streamserve.llm.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
from streamserve.llm.outputs import PoolingRequestOutput as PoolingRequestOutput
from streamserve.llm.outputs import RequestOutput as RequestOutput
from streamserve.llm.pooling_params import PoolingParams as PoolingParams
from streamserve.llm.sampling_params import SamplingParams as SamplingParams
from streamserve.llm.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__: str
