"""The model that drafts for another: what it must have in common with it, and its setup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamserve.cli.model_setup import ModelSetup
from streamserve.cli.model_source import named_directory
from streamserve.cli.quantization import agreed_quantization
from streamserve.engine.text_source import TextSource
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import ConfigError, StreamServeError, UnsupportedModelError
from streamserve.models import load_config, load_eagle3_config, resolve_dtype, state_bytes

_FLAG = "--speculative-config"
_MAX_DIFFERENT = 64  # tokens of a vocabulary, which then are hardly ever guessed right


def with_draft_model(setup: ModelSetup) -> ModelSetup:
    """The setup with that of the draft model that the flags name, if they do.

    Raises ConfigError for one that cannot draft for this model.
    """
    speculative = setup.scheduler.speculative
    if speculative is None or speculative.method != "draft_model":
        return setup
    args, say, name = setup.args, setup.say, speculative.model
    assert name is not None, "parsed so"
    if setup.device.type != "cpu" or args.tensor_parallel_size > 1:
        raise ConfigError(
            f"{_FLAG}: a draft model must be on a CPU, in one process, got {setup.device} and "
            f"--tensor-parallel-size {args.tensor_parallel_size}"
        )
    path = named_directory(args, name, say)
    try:
        config = load_config(path, trust_remote_code=args.trust_remote_code)
    except UnsupportedModelError:
        if _is_head(path):
            raise ConfigError(
                f"{_FLAG}: {name} is an EAGLE-3 head: method must be 'eagle3', got 'draft_model'"
            ) from None
        raise
    if state_bytes(config.spec, setup.dtype):
        raise ConfigError(f"{_FLAG}: {name} must be a model whose layers keep no state")
    max_model_len = setup.scheduler.max_model_len
    if config.max_position_embeddings < max_model_len:
        raise ConfigError(
            f"{_FLAG}: {name} has {config.max_position_embeddings} positions, fewer than "
            f"--max-model-len {max_model_len}"
        )
    stored = None if config.stored_quantization is None else config.stored_quantization.name
    dtype = resolve_dtype(args.dtype, config, setup.device)
    say(f"  draft model   {name}: {config.architecture}, {str(dtype).removeprefix('torch.')}")
    # Behind a step it is fed the step's tokens, and what each request has sampled.
    num_tokens = setup.scheduler.max_num_batched_tokens + setup.scheduler.max_num_sampled
    draft = replace(
        setup,
        path=path,
        config=config,
        dtype=dtype,
        scheduler=replace(setup.scheduler, max_num_batched_tokens=num_tokens, speculative=None),
        quantization=agreed_quantization(speculative.quantization or args.quantization, stored),
        adapters=None,
        say=lambda line: say(f"  draft model:  {line.strip()}"),
    )
    return replace(setup, draft=draft)


def _is_head(path: Path) -> bool:
    try:
        load_eagle3_config(path, "dummy")
    except StreamServeError:
        return False
    return True


def check_vocabulary(tokenizer: Tokenizer, of_draft: TextSource) -> None:
    """Raises ConfigError unless an id means the same to both, but for a few special tokens."""
    other, _ = of_draft()
    common = min(tokenizer.vocab_size, other.vocab_size)
    different = sum(tokenizer.token_bytes(i) != other.token_bytes(i) for i in range(common))
    if different > _MAX_DIFFERENT:
        raise ConfigError(
            f"{_FLAG}: the draft model has another vocabulary: {different} of {common} tokens "
            f"differ, and {_MAX_DIFFERENT} may"
        )
