"""What of a step's tokens is shown where a stop string ends among them, or with the answer."""

import pytest

from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.output_processor import OutputProcessor


def processor(**params):
    sampling = SamplingParams(max_tokens=9, **params)
    request = Request("r", list(b"Hi"), sampling, arrival_time=0.0, seed=0)
    return OutputProcessor(ByteTokenizer(), request)


def test_nothing_behind_a_stop_is_shown():
    output = processor(stop=("b",)).process(list(b"abc"), ["1", "2", "3"], None, None)
    assert (output.text, output.finish_reason) == ("a", FinishReason.STOP)
    assert (output.token_ids, output.logprobs) == (list(b"ab"), ["1", "2"])


@pytest.mark.parametrize(
    ("min_tokens", "reason"), [(0, FinishReason.STOP), (1, FinishReason.LENGTH)]
)
def test_a_stop_in_what_is_left_at_the_end_counts_where_a_stop_may(min_tokens, reason):
    half = processor(stop=("\ufffd",), min_tokens=min_tokens)
    output = half.process([0xC3], [], FinishReason.LENGTH, None)
    assert output.finish_reason is reason
