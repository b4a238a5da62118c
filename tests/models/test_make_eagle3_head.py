"""The tool that makes EAGLE-3 heads of random weights: their shapes, and those that guess right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from streamserve.models import (
    Decoder,
    load_config,
    load_eagle3_config,
    load_eagle3_head,
    load_model,
)
from tests.models.paged import PagedHarness, Sequence
from tools.make_checkpoint import write_checkpoint, write_config
from tools.make_eagle3_head import head_config, write_head

CPU = torch.device("cpu")


def test_the_shape_is_that_of_the_published_head(tmp_path):
    write_config("llama-8b", tmp_path)
    model = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(head_config(model, 32_000)))
    config = load_eagle3_config(tmp_path, "dummy")
    assert config.weight_bytes(torch.bfloat16) == 2 * 424_689_664
    assert config.taps(32) == (2, 16, 29)
    assert config.spec.vocab_size == 32_000


def test_what_it_writes_loads(kernels, tmp_path):
    write_checkpoint("tiny", tmp_path / "model")
    write_head(tmp_path / "model", tmp_path / "head", 300)
    target = _load(tmp_path / "model", kernels)
    head = load_eagle3_head(load_eagle3_config(tmp_path / "head"), target)
    assert head.taps == (0, 1, 1)
    assert len(head._target_ids.unique()) == 300


def test_one_that_guesses_is_right_as_often_as_the_model_says(kernels, tmp_path):
    write_checkpoint("tiny", tmp_path, guessable=0.7)
    write_head(tmp_path, tmp_path / "head", 32_000, guesses=True)
    target = _load(tmp_path, kernels)
    head = load_eagle3_head(load_eagle3_config(tmp_path / "head"), target)
    sequence, harness = Sequence([5]), PagedHarness(target)
    harness.decode([sequence], harness.step([(sequence, 1)]), 200)
    tokens = sequence.tokens
    harness, shifted = PagedHarness(head), Sequence(tokens[1:-1])
    batch = harness.batch([(shifted, 199)], all_rows=True)
    with torch.inference_mode():
        states = head.take(torch.randn(199, 3 * head.spec.hidden_size))  # it makes nothing of them
        guesses, found = head.guess(replace(batch, hidden_states=states), harness.caches)
        right = [a == b for a, b in zip(guesses.tolist(), tokens[2:], strict=True)]
        assert 0.6 < sum(right) / len(right) < 0.8
        # And goes on from what it has found.
        again, _ = head.guess(replace(batch, hidden_states=found), harness.caches)
    assert again.tolist() == guesses.tolist()


def _load(directory: Path, kernels) -> Decoder:
    decoder = load_model(
        directory, dtype=torch.float32, device=CPU, kernels=kernels, config=load_config(directory)
    )
    assert isinstance(decoder, Decoder)
    return decoder
