"""Models of transformers behind runners that are built as a server builds them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

import streamserve_kernels
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.models import LanguageModel, load_config, load_model
from tests.models.foreign import FOREIGN
from tests.models.random_model import random_model
from tests.runner.loop import BLOCK_SIZE, NUM_BLOCKS, Loop
from tests.runner.tiny_llama import CPU, memory_for, runner_of

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, MAX_LEN, MAX_TOKENS = 97, 128, 32
GREEDY = SamplingParams(temperature=0.0, max_tokens=32)

Pair = tuple[transformers.PreTrainedModel, LanguageModel]


def pair_of(name: str, directory: Path, backend: str = "cpu") -> Pair:
    theirs = random_model(FOREIGN[name]())
    theirs.save_pretrained(directory)
    config = load_config(directory, model_impl="transformers")
    kernels = streamserve_kernels.load(CPU, backend)
    ours = load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels, config=config)
    return theirs, ours


def requests(name: str, params: SamplingParams = GREEDY) -> list[Request]:
    """Ragged prompts, some with a long beginning in common."""
    rng = random.Random(3)
    shared = [rng.randrange(3, VOCAB) for _ in range(30)]
    own = [[rng.randrange(3, VOCAB) for _ in range(count)] for count in (1, 9, 40, 17, 5)]
    token_ids = [shared[:cut] + tail for cut, tail in zip((0, 30, 0, 30, 27), own, strict=True)]
    return [
        Request(f"{name}{i}", ids, params, arrival_time=0.0, seed=i)
        for i, ids in enumerate(token_ids)
    ]


def assert_greedy(model: transformers.PreTrainedModel, answered: list[Request]) -> None:
    """Each token is the likeliest one after those before it."""
    for request in answered:
        with torch.inference_mode():
            logits = model(torch.tensor([request.token_ids])).logits[0]
        start = request.num_prompt_tokens - 1
        assert request.output_token_ids == logits[start:-1].argmax(-1).tolist()


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "as-on-a-device"])
@pytest.mark.parametrize("name", ["exaone4", "granite-moe"])
def test_a_runner_that_is_built_as_a_server_builds_it(tmp_path, name, on_device):
    """Planned, warmed up with few layers, padded: and right afterwards."""
    theirs, ours = pair_of(name, tmp_path, "naive" if on_device else "cpu")
    memory = memory_for(ours, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    runner = runner_of(ours, memory, MAX_TOKENS, 64, on_device=on_device)
    try:
        answered = requests("r")
        Loop(runner, max_num_batched_tokens=MAX_TOKENS).run(answered)
    finally:
        runner.close()
    assert_greedy(theirs, answered)
