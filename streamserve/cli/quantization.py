"""What `--quantization` says: how to quantise plain weights, or how they are quantised already."""

from __future__ import annotations

from typing import Literal, get_args

from streamserve.errors import ConfigError

OnTheFly = Literal["int8", "int4", "fp8"]
QUANTIZATIONS: tuple[OnTheFly, ...] = get_args(OnTheFly)
STORED_METHODS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fp8",
    "gguf",
    "gptq",
    "mxfp4",
    "squeezellm",
)
# Other names of the same: mostly vLLM's, for the kernels that it takes.
_ALIASES = {
    "auto_awq": "awq",
    "auto_gptq": "gptq",
    "awq_marlin": "awq",
    "bnb": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "gptq_bitblas": "gptq",
    "gptq_marlin": "gptq",
    "gptqmodel": "gptq",
}


def check_quantization(requested: str | None) -> None:
    """Raises ConfigError for a name that nobody knows."""
    if requested is not None and _canonical(requested) not in (*QUANTIZATIONS, *STORED_METHODS):
        raise ConfigError(
            f"--quantization must be one of {', '.join(QUANTIZATIONS)}, or what the checkpoint is "
            f"quantised with already ({', '.join(STORED_METHODS)}), got {requested!r}"
        )


def agreed_quantization(requested: str | None, stored: str | None) -> OnTheFly | None:
    """How weights are to be quantised while they are loaded; None: they stay as they are.

    ``stored`` is what the checkpoint is quantised with, None if it is plain. Raises ConfigError
    that says what the checkpoint is where the flag says something else.
    """
    if requested is None:
        return None
    if stored is not None:
        if _canonical(requested) == stored:
            return None
        raise ConfigError(
            f"--quantization {requested}: the checkpoint is quantised already, with {stored}; "
            "leave the flag out, or serve a plain checkpoint"
        )
    for quantization in QUANTIZATIONS:
        if quantization == requested:
            return quantization
    raise ConfigError(
        f"--quantization {requested}: the checkpoint is not quantised; plain weights can be "
        f"quantised while they are loaded with {', '.join(QUANTIZATIONS)}"
    )


def _canonical(name: str) -> str:
    return _ALIASES.get(name, name)
