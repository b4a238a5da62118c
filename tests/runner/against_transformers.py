"""One tiny model twice: transformers', and ours behind a runner on the host or as on a device."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

import streamserve_kernels
from streamserve.core.plan import ModelRunner
from streamserve.models import Decoder, load_model
from tests.runner.tiny_llama import CPU, memory_for, runner_of

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 97
MAX_LEN = 128
BLOCK_SIZE = 4
NUM_BLOCKS = 160


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


class Pair:
    """transformers' model, and ours with the same weights, loaded from what it saved."""

    def __init__(self, directory: Path, kind: str) -> None:
        """``kind``: a backend, or one "on a device" (here the CPU too)."""
        self.kind = kind
        backend, _, self._on_device = kind.partition(" ")
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_LEN,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
        generator = torch.Generator().manual_seed(7)
        self.theirs = transformers.LlamaForCausalLM(config).eval().to(torch.float32)
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                mean, std = (1.0, 0.3) if parameter.dim() == 1 else (0.0, 0.15)
                parameter.normal_(mean, std, generator=generator)
        self.theirs.save_pretrained(directory)
        kernels = streamserve_kernels.load("cpu", backend)
        self.ours: Decoder = load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)

    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """What transformers says about the token after each of these [T, V]."""
        with torch.no_grad():
            return self.theirs(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    def runner(self, max_num_batched_tokens: int = 48) -> ModelRunner:
        """A runner of our model."""
        memory = memory_for(
            self.ours, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=MAX_LEN
        )
        return runner_of(
            self.ours, memory, max_num_batched_tokens, NUM_BLOCKS, on_device=self._on_device
        )
