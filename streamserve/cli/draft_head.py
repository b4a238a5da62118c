"""The head that drafts for a model, from its hidden states: which, and what it takes."""

from __future__ import annotations

from dataclasses import replace

from streamserve.cli.model_setup import HeadSetup, ModelSetup, Progress
from streamserve.errors import ConfigError
from streamserve.models import find_mtp, load_mtp_head
from streamserve_kernels import Quantization

_FLAG = "--speculative-config"


def with_draft_head(setup: ModelSetup) -> ModelSetup:
    """The setup with the head that the flags ask for, if they do.

    Raises ConfigError where heads are not served, ModelLoadError or UnsupportedModelError where
    this model has none.
    """
    speculative = setup.scheduler.speculative
    if speculative is None or speculative.method in ("ngram", "draft_model"):
        return setup
    if setup.device.type != "cpu" or setup.args.tensor_parallel_size > 1:
        raise ConfigError(
            f"{_FLAG}: method {speculative.method!r} is for a CPU, in one process, got "
            f"{setup.device} and --tensor-parallel-size {setup.args.tensor_parallel_size}"
        )
    head = _mtp(setup)
    quantised = f", {speculative.quantization} weights" if speculative.quantization else ""
    setup.say(f"  draft head    {speculative.method}{quantised}")
    return replace(setup, head=head)


def _mtp(setup: ModelSetup) -> HeadSetup:
    mtp = find_mtp(setup.path, setup.config, setup.args.load_format)
    quantization = _quantization(setup)
    return HeadSetup(
        mtp.spec,
        mtp.weight_bytes(setup.dtype, quantization, setup.quantization),
        lambda target: load_mtp_head(
            mtp,
            target,
            quantization=quantization,
            progress=Progress(setup.say),
            seed=setup.args.seed or 0,
        ),
    )


def _quantization(setup: ModelSetup) -> Quantization | None:
    """Of the head: what was asked for it, else what is made of the model's own weights."""
    speculative = setup.scheduler.speculative
    assert speculative is not None
    return speculative.quantization or setup.quantization
