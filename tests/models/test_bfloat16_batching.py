"""In bfloat16 kernels change with the batch, so ids may too: the logits' error is what is bounded.

Weights that are quantised on the fly change nothing about that.

Each request of the model in the box runs alone and decodes greedily. Then its own tokens are fed
again in a crowd, in chunks, and behind a shared prefix, and the logits are compared. Where the id
differs, the two best logits of the solo run must have been closer than the bound, and that at no
more than 2% of the positions.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch

import streamserve_kernels
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.tokenizer import FastTokenizer
from streamserve.models import load_model
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
BOX = Path(str(files("streamserve") / "assets" / "box"))
NUM_DECODED = 24
NUM_PARAMETERS = 4_229_888
# Of logits that reach 28; bfloat16 rounds those by 0.06.
BOUND = 0.25
# A difference of one rounding may move an activation to the next of its 255 codes.
QUANTISED_BOUND = 0.5
SYSTEM = "You are a helpful assistant named Nadia. You answer briefly and kindly."
QUESTIONS = [
    "hi",
    "What is the capital of France?",
    "Count to twenty.",
    "Tell me a story about a fox.",
    "What is 7 + 8?",
    "你好",
    "How do you spell elephant? And what does it eat, where does it live, and is it big?",
    "Who are you?",
]


@pytest.fixture(scope="module", params=[None, *streamserve_kernels.QUANTIZATIONS])
def decoder(request):
    decoder = load_model(
        BOX,
        dtype=torch.bfloat16,
        device=CPU,
        kernels=streamserve_kernels.load(CPU),
        quantization=request.param,
    )
    decoder.warm_up()
    return decoder


@pytest.fixture(scope="module")
def prompts():
    tokenizer = FastTokenizer.from_directory(BOX)
    template = ChatTemplate.from_directory(BOX, special_tokens=tokenizer.special_tokens)
    return [
        tokenizer.encode(
            template.render(
                [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            ),
            add_special_tokens=False,
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def solo_runs(decoder, prompts):
    """Per request its prompt and answer, and the logits of every answered position."""
    runs = []
    for prompt in prompts:
        harness = PagedHarness(decoder, block_size=16)
        sequence = Sequence(prompt)
        first = harness.prefill([sequence], None)[0][-1]
        logits = harness.decode([sequence], first[None], NUM_DECODED)[0]
        runs.append((sequence.tokens, logits))
    return runs


@pytest.fixture(scope="module")
def bound(decoder):
    return BOUND if decoder.nbytes > 2 * NUM_PARAMETERS else QUANTISED_BOUND


def _check(solo_runs, crowd_logits, bound):
    num_different = num_positions = 0
    for (_, expected), logits in zip(solo_runs, crowd_logits, strict=True):
        assert (logits - expected).abs().max() < bound
        best, second = expected.topk(2, dim=-1).values.unbind(-1)
        different = logits.argmax(-1) != expected.argmax(-1)
        assert (best - second)[different].lt(bound).all()
        num_different += int(different.sum())
        num_positions += len(expected)
    assert num_positions == len(QUESTIONS) * NUM_DECODED
    assert num_different <= 0.02 * num_positions


def _answers(logits, solo_runs):
    """The rows that an answer was drawn from; the last token drawn is never computed."""
    return [rows[-NUM_DECODED:] for rows, _ in zip(logits, solo_runs, strict=True)]


@pytest.mark.parametrize("chunk", [None, 1, 7, 64], ids=lambda chunk: f"chunk-{chunk}")
def test_a_crowd_in_chunks_stays_within_the_bound(decoder, solo_runs, chunk, bound):
    harness = PagedHarness(decoder, block_size=16)
    crowd = [Sequence(tokens[:-1]) for tokens, _ in solo_runs]
    _check(solo_runs, _answers(harness.prefill(crowd, chunk), solo_runs), bound)


def test_a_shared_prefix_stays_within_the_bound(decoder, solo_runs, bound):
    harness = PagedHarness(decoder, block_size=16, cascade=True)
    crowd = [Sequence(tokens[:-1]) for tokens, _ in solo_runs]
    first = harness.prefill(crowd[:1], None)
    for sequence in crowd[1:]:
        harness.share_prefix(sequence, crowd[0])
        assert sequence.num_computed > 0
    _check(solo_runs, _answers(first + harness.prefill(crowd[1:], None), solo_runs), bound)
    assert harness.num_members == len(crowd) - 1
