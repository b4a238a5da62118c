"""Tiny random models of every family, built by transformers and saved as it saves them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

import streamserve_kernels
from streamserve_kernels import Kernels
from tests.models.random_model import random_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small take 50 times as long on two threads as on one, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The specification of every kernel: what the models are proven against."""
    return streamserve_kernels.load(CPU, "naive")


@pytest.fixture(scope="session")
def build() -> Callable[[transformers.PretrainedConfig], transformers.PreTrainedModel]:
    return random_model


@pytest.fixture
def checkpoint(
    tmp_path: Path, build: Callable[..., transformers.PreTrainedModel]
) -> Callable[..., tuple[Path, transformers.PreTrainedModel]]:
    """A config -> (its saved checkpoint's directory, the model)."""

    def checkpoint(config, **save_options):
        model = build(config)
        directory = tmp_path / "checkpoint"
        model.save_pretrained(directory, **save_options)
        return directory, model

    return checkpoint


@pytest.fixture
def tiny_llama() -> Callable[..., transformers.LlamaConfig]:
    def config(**changes):
        values = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        return transformers.LlamaConfig(**{**values, **changes})

    return config
