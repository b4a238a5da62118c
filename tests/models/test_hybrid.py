"""Models whose layers keep a state of constant size, judged by transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

import streamserve_kernels
from streamserve.models import load_model
from tests.models.native import HYBRID
from tests.models.parity import (
    STATES_TOLERANCE,
    assert_equals_judge,
    assert_unasked_rows_change_nothing,
)
from tests.models.random_model import random_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=HYBRID)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    judge = random_model(HYBRID[request.param]())
    judge.save_pretrained(directory)
    kernels = streamserve_kernels.load(CPU, "naive")
    return judge, load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)


@pytest.mark.parametrize(("chunk", "prefix_hit"), [(None, False), (5, True)])
def test_logits_and_greedy_tokens_are_the_judges(pair, chunk, prefix_hit):
    assert_equals_judge(*pair, chunk=chunk, prefix_hit=prefix_hit, tolerance=STATES_TOLERANCE)


def test_rows_that_nobody_asked_for_change_nothing(pair):
    assert_unasked_rows_change_nothing(pair[1])
