"""The head that drafts for a model, from its hidden states: which, and what it takes."""

from __future__ import annotations

from dataclasses import replace

from streamserve.cli.model_setup import HeadSetup, ModelSetup, Progress
from streamserve.cli.model_source import named_directory
from streamserve.errors import ConfigError
from streamserve.models import (
    NativeConfig,
    find_mtp,
    load_eagle3_config,
    load_eagle3_head,
    load_mtp_head,
)
from streamserve_kernels import Quantization

_FLAG = "--speculative-config"
_COPY: Quantization = "int4"
"""Of the model's last product, if nothing else is asked for: most of what a guess reads."""


def with_draft_head(setup: ModelSetup) -> ModelSetup:
    """The setup with the head that the flags ask for, if they do.

    Raises ConfigError where heads are not served, ModelLoadError or UnsupportedModelError where
    this model has none.
    """
    speculative = setup.scheduler.speculative
    if speculative is None or speculative.method in ("ngram", "draft_model"):
        return setup
    if setup.args.tensor_parallel_size > 1:
        raise ConfigError(
            f"{_FLAG}: method {speculative.method!r} is for one device, got "
            f"--tensor-parallel-size {setup.args.tensor_parallel_size}"
        )
    head = _mtp(setup) if speculative.method == "mtp" else _eagle3(setup)
    quantised = f", {speculative.quantization} weights" if speculative.quantization else ""
    setup.say(f"  draft head    {speculative.method}{quantised}")
    return replace(setup, head=head)


def _mtp(setup: ModelSetup) -> HeadSetup:
    mtp = find_mtp(setup.path, setup.config, setup.args.load_format)
    speculative, quantization = setup.scheduler.speculative, _quantization(setup)
    assert speculative is not None
    copy = speculative.quantization or _COPY
    return HeadSetup(
        mtp.spec,
        mtp.weight_bytes(setup.dtype, quantization, setup.quantization, copy=copy),
        lambda target: load_mtp_head(
            mtp,
            target,
            quantization=quantization,
            copy=copy,
            progress=Progress(setup.say),
            seed=setup.args.seed or 0,
        ),
        taps=mtp.taps,
    )


def _eagle3(setup: ModelSetup) -> HeadSetup:
    args, speculative = setup.args, setup.scheduler.speculative
    assert speculative is not None
    assert speculative.model is not None, "parsed so"
    if not isinstance(setup.config, NativeConfig):
        raise ConfigError(
            f"{_FLAG}: method 'eagle3' is for the families with a decoder of ours, not for "
            f"{setup.config.architecture}"
        )
    path = named_directory(args, speculative.model, setup.say)
    config = load_eagle3_config(path, "dummy" if args.load_format == "dummy" else "auto")
    config.check_target(setup.config.spec)
    quantization = None if config.stored_quantization is not None else _quantization(setup)
    return HeadSetup(
        config.spec,
        config.weight_bytes(setup.dtype, quantization),
        lambda target: load_eagle3_head(
            config,
            target,
            quantization=quantization,
            progress=Progress(setup.say),
            seed=args.seed or 0,
        ),
        taps=config.taps(len(setup.config.spec.layers)),
    )


def _quantization(setup: ModelSetup) -> Quantization | None:
    """Of the head: what was asked for it, else what is made of the model's own weights."""
    speculative = setup.scheduler.speculative
    assert speculative is not None
    return speculative.quantization or setup.quantization
