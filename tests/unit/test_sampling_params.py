"""Every field's limits; a message names the field, the limit and the value."""

import pytest

from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.errors import InvalidParameterError

NAN, INFINITY = float("nan"), float("inf")

REFUSED = [
    # field, value, what the message says
    ("max_tokens", -3, "max_tokens must be at least 0, got -3"),
    ("min_tokens", -1, "min_tokens must be between 0 and max_tokens (16), got -1"),
    ("min_tokens", 17, "min_tokens must be between 0 and max_tokens (16), got 17"),
    ("temperature", -0.1, "temperature must be between 0.0 and 2.0, got -0.1"),
    ("temperature", 2.1, "temperature must be between 0.0 and 2.0, got 2.1"),
    ("temperature", NAN, "temperature must be between 0.0 and 2.0, got nan"),
    ("temperature", INFINITY, "temperature must be between 0.0 and 2.0, got inf"),
    ("top_p", 0.0, "top_p must be above 0 and at most 1, got 0.0"),
    ("top_p", 1.01, "top_p must be above 0 and at most 1, got 1.01"),
    ("top_p", NAN, "top_p must be above 0 and at most 1, got nan"),
    ("top_k", -2, "top_k must be at least 1, or 0 or -1 for no limit, got -2"),
    ("min_p", -0.5, "min_p must be between 0.0 and 1.0, got -0.5"),
    ("min_p", 1.5, "min_p must be between 0.0 and 1.0, got 1.5"),
    ("presence_penalty", 2.5, "presence_penalty must be between -2.0 and 2.0, got 2.5"),
    ("presence_penalty", NAN, "presence_penalty must be between -2.0 and 2.0, got nan"),
    ("frequency_penalty", -2.5, "frequency_penalty must be between -2.0 and 2.0, got -2.5"),
    ("repetition_penalty", 0.0, "repetition_penalty must be between 0.01 and 100.0, got 0.0"),
    ("repetition_penalty", INFINITY, "repetition_penalty must be between 0.01 and 100.0, got inf"),
    ("logit_bias", {3: 101.0}, "logit_bias must be between -100.0 and 100.0, got 101.0"),
    ("logit_bias", {3: NAN}, "logit_bias must be between -100.0 and 100.0, got nan"),
    ("logit_bias", {-1: 1.0}, "logit_bias must be keyed by token ids of at least 0, got -1"),
    ("seed", 2**63, f"seed must be a 64-bit integer, got {2**63}"),
    ("seed", -(2**63) - 1, f"seed must be a 64-bit integer, got {-(2**63) - 1}"),
    ("stop", ("",), "stop must be made of non-empty strings, got ''"),
    ("stop", ("a",) * 17, "stop must be at most 16 strings, got 17"),
    ("stop_token_ids", (5, -1), "stop_token_ids must be token ids of at least 0, got -1"),
    ("logprobs", -1, "logprobs must be between 0 and 20, got -1"),
    ("logprobs", 21, "logprobs must be between 0 and 20, got 21"),
]

ACCEPTED = [
    ("max_tokens", None),
    ("max_tokens", 1),
    ("min_tokens", 16),
    ("temperature", 0.0),
    ("temperature", 2.0),
    ("top_p", 1.0),
    ("top_p", 1e-9),
    ("top_k", 1),
    ("min_p", 1.0),
    ("presence_penalty", -2.0),
    ("frequency_penalty", 2.0),
    ("repetition_penalty", 0.5),
    ("logit_bias", {0: -100.0, 9: 100.0}),
    ("seed", 2**63 - 1),
    ("seed", -(2**63)),
    ("stop", ("a",) * 16),
    ("stop_token_ids", (0,)),
    ("logprobs", 0),
    ("logprobs", 20),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_a_value_past_its_limit_is_refused(field, value, message):
    with pytest.raises(InvalidParameterError) as info:
        SamplingParams(**{field: value})
    assert info.value.message == message
    assert info.value.param == field
    assert info.value.status == 400


@pytest.mark.parametrize(("field", "value"), ACCEPTED)
def test_a_value_at_its_limit_is_accepted(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_min_tokens_has_no_upper_limit_without_max_tokens():
    assert SamplingParams(max_tokens=None, min_tokens=10_000).min_tokens == 10_000


def test_both_spellings_of_no_seed():
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)


def test_both_spellings_of_no_top_k():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


@pytest.mark.parametrize(
    ("params", "is_greedy", "has_penalties"),
    [
        ({}, False, False),
        ({"temperature": 0.0}, True, False),
        ({"presence_penalty": 0.1}, False, True),
        ({"frequency_penalty": -0.1}, False, True),
        ({"repetition_penalty": 1.1}, False, True),
    ],
)
def test_what_the_sampler_must_do(params, is_greedy, has_penalties):
    built = SamplingParams(**params)
    assert (built.is_greedy, built.has_penalties) == (is_greedy, has_penalties)


def test_equal_grammars_are_one_key_whichever_field_they_came_in():
    schema = {"kind": GrammarKind.JSON_SCHEMA, "text": '{"type": "object"}'}
    one = StructuredOutput(**schema, param="response_format")
    other = StructuredOutput(**schema, param="guided_json")
    assert one == other
    assert len({one, other}) == 1
    assert one != StructuredOutput(**schema, whitespace_pattern="")
    assert SamplingParams(structured_output=one) == SamplingParams(structured_output=other)
