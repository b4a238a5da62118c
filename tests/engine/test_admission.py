"""What can be known of a request before it is queued, to the last id and token."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.engine.admission import AdmissionLimits
from streamserve.errors import ContextLengthError, InvalidParameterError

LIMITS = AdmissionLimits(max_model_len=10, vocab_size=5, num_tokenizer_ids=5)
WIDER = AdmissionLimits(max_model_len=10, vocab_size=5, num_tokenizer_ids=7)


@pytest.mark.parametrize(
    ("limits", "ids", "is_tokenized", "params", "refused"),
    [
        (LIMITS, [4], False, {}, None),
        (LIMITS, [5], False, {}, "prompt"),
        (LIMITS, [-1], False, {}, "prompt"),
        (WIDER, [5], True, {}, "prompt"),  # an id that the tokenizer has, and the model lacks
        (LIMITS, [1] * 9, True, {"max_tokens": 1}, None),
        (LIMITS, [1] * 10, True, {"max_tokens": 1}, "messages"),
        (LIMITS, [1] * 10, True, {"max_tokens": 0}, None),
        (LIMITS, [1] * 11, True, {"max_tokens": 0}, "messages"),
        (LIMITS, [1] * 7, True, {"max_tokens": 3}, None),
        (LIMITS, [1] * 7, True, {"max_tokens": 10}, None),
        (LIMITS, [1] * 7, True, {"max_tokens": 11}, "max_tokens"),
        (LIMITS, [1] * 7, True, {"max_tokens": 4, "min_tokens": 4}, "min_tokens"),
        (LIMITS, [1] * 7, True, {"max_tokens": None, "min_tokens": 3}, None),
        (LIMITS, [1] * 7, True, {"max_tokens": None, "min_tokens": 4}, "min_tokens"),
        (LIMITS, [1], True, {"stop_token_ids": (5,)}, "stop_token_ids"),
        (LIMITS, [1], True, {"logit_bias": {5: 1.0}}, "logit_bias"),
        (LIMITS, [1], True, {"allowed_token_ids": (5,)}, "allowed_token_ids"),
    ],
)
def test_the_last_that_fits(limits, ids, is_tokenized, params, refused):
    asked = SamplingParams(**{"max_tokens": 1, **params})
    errors = (InvalidParameterError, ContextLengthError)
    with pytest.raises(errors) if refused else nullcontext() as caught:
        settled = limits.check(ids, asked, is_tokenized=is_tokenized)
        num_left = 10 - len(ids)
        longest = num_left if asked.max_tokens is None else asked.max_tokens
        assert settled.max_tokens == min(longest, num_left)
    assert refused is None or caught.value.param == refused


@pytest.mark.parametrize(("width", "n", "refused"), [(3, 3, None), (4, 1, "best_of"), (2, 3, "n")])
def test_so_many_beams_as_tokens_that_go_on(width, n, refused):
    beams = BeamSearchParams(beam_width=width)
    with pytest.raises(InvalidParameterError) if refused else nullcontext() as caught:
        LIMITS.check_beams(beams, n, num_ending_ids=2)
    assert refused is None or caught.value.param == refused


def test_beams_cannot_share_a_state():
    limits = replace(LIMITS, keeps_states=True)
    with pytest.raises(InvalidParameterError, match="got true") as caught:
        limits.check_beams(BeamSearchParams(beam_width=2), 2, num_ending_ids=2)
    assert caught.value.param == "use_beam_search"
