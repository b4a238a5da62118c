"""Draft heads that come with a checkpoint (multi-token prediction), judged by plain torch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamserve_kernels
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import Decoder, MtpConfig, find_mtp, load_config, load_model, load_mtp_head
from streamserve.models.mtp import MtpHead
from tests.models.mtp_judge import MtpJudge, save_with_head
from tests.models.packers import edit_config
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import prompts

CPU = torch.device("cpu")
NUM_GUESSES = 4
# A case of HYBRID, whether its head keeps each expert by itself, and what its config says.
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "qwen3.5": ("qwen3.5", False, {"mtp_num_hidden_layers": 1}),
    "qwen3.5-moe": ("qwen3.5-moe", False, {"mtp_num_hidden_layers": 1}),
    "qwen3.5-moe-apart": ("qwen3.5-moe", True, {"mtp_num_hidden_layers": 1}),
    "qwen3-next": ("qwen3-next", True, {}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A case's name -> the judge, and the directory of the checkpoint."""
    made: dict[str, tuple[MtpJudge, Path]] = {}

    def saved(name: str) -> tuple[MtpJudge, Path]:
        if name not in made:
            case, apart, changes = CASES[name]
            directory = tmp_path_factory.mktemp(name)
            made[name] = save_with_head(case, directory, apart=apart, **changes), directory
        return made[name]

    return saved


def load(
    directory: Path,
    backend: str = "naive",
    dtype: torch.dtype = torch.float32,
    load_format: Any = "auto",
    target_quantization: Any = None,
    **options: Any,
) -> tuple[MtpConfig, Decoder, MtpHead]:
    kernels, config = streamserve_kernels.load(CPU, backend), load_config(directory)
    mtp = find_mtp(directory, config, load_format)
    target = load_model(
        directory,
        dtype=dtype,
        device=CPU,
        kernels=kernels,
        config=config,
        load_format=load_format,
        quantization=target_quantization,
    )
    return mtp, target, load_mtp_head(mtp, target, **options)


class Guesses:
    """A head's caches, and what it has found at each position of some sequences."""

    def __init__(self, head: MtpHead) -> None:
        self.harness = PagedHarness(head)
        self.head = head
        self.found: dict[int, list[torch.Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}

    def step(self, work, states, *, all_rows: bool = True) -> None:
        """``states`` are those of each sequence's next tokens, one beside the other."""
        batch = self.harness.batch(work, all_rows=all_rows)
        batch = replace(batch, hidden_states=torch.cat(states))
        with torch.inference_mode():
            tokens, found = self.head.guess(batch, self.harness.caches)
        counts = [c if all_rows else int(s.num_computed + c == len(s.tokens)) for s, c in work]
        parts = zip(work, tokens.split(counts), found.split(counts), strict=True)
        for (sequence, count), of_tokens, rows in parts:
            sequence.num_computed += count
            self.tokens.setdefault(id(sequence), []).extend(of_tokens.tolist())
            self.found.setdefault(id(sequence), []).extend(rows.clone())


def judge_states(judge: MtpJudge) -> tuple[list[Sequence], list[torch.Tensor]]:
    """Sequences of the tokens behind each position of prompts, and the states there."""
    texts = [tokens for tokens in prompts(shared=0) if len(tokens) > 1]
    with torch.inference_mode():
        states = [judge.states_of_target(tokens)[:-1] for tokens in texts]
    return [Sequence(tokens[1:]) for tokens in texts], states


def check(judge: MtpJudge, head: MtpHead, chunk: int, tolerance: float) -> None:
    """In chunks, all sequences together, and then on from its own states."""
    sequences, states = judge_states(judge)
    guesses = Guesses(head)
    while any(s.num_computed < len(s.tokens) for s in sequences):
        work = [(s, min(chunk, len(s.tokens) - s.num_computed)) for s in sequences]
        work = [(s, count) for s, count in work if count]
        rows = [
            states[sequences.index(s)][s.num_computed : s.num_computed + count] for s, count in work
        ]
        guesses.step(work, rows)
    for _ in range(NUM_GUESSES):
        for sequence in sequences:
            sequence.tokens.append(guesses.tokens[id(sequence)][-1])
        own = [guesses.found[id(sequence)][-1][None] for sequence in sequences]
        guesses.step([(sequence, 1) for sequence in sequences], own)
    for sequence, given in zip(sequences, states, strict=True):
        found = torch.stack(guesses.found[id(sequence)])
        with torch.inference_mode():
            expected = given[:0]
            for _ in range(NUM_GUESSES + 1):
                # What it has found at the last positions stands in for the target's states there.
                inputs = torch.cat((given, expected[len(given) - 1 : len(expected)]))
                expected = judge(sequence.tokens[: len(inputs)], inputs)
            tokens = judge.likeliest(expected).tolist()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert guesses.tokens[id(sequence)] == tokens


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_states_and_guesses_are_the_judges(name, backend, saved):
    judge, directory = saved(name)
    _, _, head = load(directory, backend)
    check(judge, head, chunk=7, tolerance=1e-4)


def test_a_checkpoint_that_was_saved_again_has_none(saved, tmp_path):
    _, directory = saved("qwen3.5")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"has no layers that guess further tokens \(mtp\);"):
        find_mtp(tmp_path, load_config(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is not supported"),
        ({"mtp_num_hidden_layers": 0}, "has no layers that guess further tokens (mtp)"),
    ],
)
def test_configs_of_other_heads_are_refused(values, message, saved, tmp_path):
    for file in saved("qwen3.5")[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, **values)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=re.escape(message)):
        find_mtp(tmp_path, load_config(tmp_path))
