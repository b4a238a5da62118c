"""``VLLM``: a model in this process as LangChain's LLM, with langchain_community's fields.

    from streamserve.langchain import VLLM

    llm = VLLM(model="./my-llama", max_new_tokens=128, top_k=10, temperature=0.8)
    print(llm.invoke("What is the capital of France?"))

Needs ``langchain-core``. Chat models go over HTTP: langchain_openai's
``ChatOpenAI(model="box", base_url="http://127.0.0.1:8000/v1", api_key="none")``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import Field

from streamserve.llm.llm import LLM
from streamserve.llm.sampling_params import SamplingParams


class VLLM(BaseLLM):
    """A model in this process. Making one loads the model.

    ``vllm_kwargs`` are further keywords of `streamserve.LLM`; ``client`` is that object, which may
    be given to share one. A call's own keywords, and those that are bound, override the fields.
    """

    model: str = ""
    tensor_parallel_size: int | None = 1
    trust_remote_code: bool | None = False
    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    use_beam_search: bool = False
    stop: list[str] | None = None
    ignore_eos: bool = False
    max_new_tokens: int = 512
    logprobs: int | None = None
    dtype: str = "auto"
    download_dir: str | None = None
    vllm_kwargs: dict[str, Any] = Field(default_factory=dict)
    client: Any = None
    """The `streamserve.LLM` that answers."""

    def model_post_init(self, context: Any, /) -> None:
        """Load the model, unless a client was given."""
        super().model_post_init(context)
        if self.client is None:
            self.client = LLM(
                self.model or None,
                tensor_parallel_size=self.tensor_parallel_size,
                trust_remote_code=self.trust_remote_code,
                dtype=self.dtype,
                download_dir=self.download_dir,
                **self.vllm_kwargs,
            )

    def __call__(self, prompt: str, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The answer to one prompt, as older programs ask for it."""
        return self.invoke(prompt, stop=stop, **kwargs)

    @property
    def _llm_type(self) -> str:
        return "vllm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, **self._default_params}

    @property
    def _default_params(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "best_of": self.best_of,
            "max_tokens": self.max_new_tokens,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "temperature": self.temperature,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "stop": self.stop,
            "ignore_eos": self.ignore_eos,
            "use_beam_search": self.use_beam_search,
            "logprobs": self.logprobs,
        }

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        answers = self.client.generate(prompts, self._params(stop, kwargs), use_tqdm=False)
        generations = [
            [
                Generation(text=output.text, generation_info=_info(output))
                for output in answer.outputs
            ]
            for answer in answers
        ]
        prompt_tokens = sum(len(answer.prompt_token_ids) for answer in answers)
        output_tokens = sum(len(out.token_ids) for answer in answers for out in answer.outputs)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
        }
        return LLMResult(
            generations=generations,
            llm_output={"token_usage": usage, "model": self.model},
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with closing(self.client.stream(prompt, self._params(stop, kwargs))) as pieces:
            for piece in pieces:
                chunk = GenerationChunk(text=piece)
                if run_manager is not None:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk

    def _params(self, stop: list[str] | None, kwargs: dict[str, Any]) -> SamplingParams:
        params = {**self._default_params, **kwargs}
        if "max_new_tokens" in params:
            params["max_tokens"] = params.pop("max_new_tokens")
        if stop is not None:
            params["stop"] = stop
        return SamplingParams(**params)


def _info(output: Any) -> dict[str, Any]:
    info = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
    return info if output.logprobs is None else {**info, "logprobs": output.logprobs}
