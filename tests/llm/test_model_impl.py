"""One model, computed by our decoder and by transformers' model: the same texts and vectors."""

from __future__ import annotations

import pytest

from streamserve import LLM, SamplingParams
from streamserve.errors import ConfigError
from tests.e2e.servers import SMALL

PROMPTS = ["What is the capital of France?", "What is 7 plus 5?", "Tell me a story."]


def answers(llm: LLM) -> tuple[list[str], list[list[float]]]:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    texts = [output.outputs[0].text for output in llm.chat(chats, greedy)]
    return texts, [output.outputs.embedding for output in llm.embed(PROMPTS)]


def test_transformers_model_says_the_same(llm):
    texts, vectors = answers(llm)
    with LLM(**SMALL, max_model_len=256, model_impl="transformers") as other:
        others, other_vectors = answers(other)
    assert "Paris" in texts[0]
    assert others == texts
    for ours, theirs in zip(vectors, other_vectors, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4)


def test_an_implementation_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="model_impl: must be one of auto, native, transformers"):
        LLM(model_impl="terratorch")
