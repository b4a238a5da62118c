"""What a request is answered where nothing disturbs it: the specification, token by token."""

from __future__ import annotations

from dataclasses import dataclass

from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.engine.beam_search import BeamSearch
from tests.simulation.device import likely
from tests.unit.simulated import VOCAB_SIZE, naive_context

EOS = VOCAB_SIZE - 1


@dataclass(frozen=True)
class Answer:
    """How a stream ends. ``text`` is what its reader sees."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason


def text_of(token_ids: list[int]) -> str:
    """Tokens are bytes."""
    return bytes(token_ids).decode()


def solo_answer(prompt: list[int], params: SamplingParams, max_model_len: int) -> Answer:
    """The answer of a request that runs alone in endless memory."""
    output: list[int] = []
    ending_ids = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    assert params.max_tokens is not None
    num_left = min(params.max_tokens, max_model_len - len(prompt))
    while True:
        token = naive_context(prompt + output) % VOCAB_SIZE
        output.append(token)
        if token in ending_ids and len(output) > params.min_tokens:
            return Answer(output, text_of(output[:-1]), FinishReason.STOP)
        text = text_of(output)
        for stop in params.stop:
            if text.endswith(stop) and len(output) > params.min_tokens:
                return Answer(output, text.removesuffix(stop), FinishReason.STOP)
        if len(output) == num_left:
            return Answer(output, text, FinishReason.LENGTH)


def beam_answers(
    prompt: list[int], params: SamplingParams, beams: BeamSearchParams, n: int
) -> list[list[int]]:
    """The tokens of a beam search's best answers."""
    assert params.max_tokens is not None
    ending_ids = frozenset() if params.ignore_eos else frozenset({EOS})
    search = BeamSearch(beams, ending_ids=ending_ids, max_tokens=params.max_tokens)
    count = BeamSearch.num_candidates(beams, ending_ids)
    continues = True
    while continues:
        rows = []
        for hypothesis in search.running:
            top = likely(naive_context(prompt + hypothesis.token_ids), count)
            rows.append(TokenLogprobs(*top[0], top))
        continues = bool(search.advance(rows))
    return [hypothesis.token_ids for hypothesis in search.best(n)]
