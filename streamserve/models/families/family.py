"""What a family is: the architecture it covers, how a config becomes a spec, and its names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Family:
    """``max_positions`` is the context that the config states, before any rotary stretching.

    ``names`` is a function where the names of a checkpoint depend on what it is.
    """

    architecture: str
    model_type: str
    spec: Callable[[HfConfig], DecoderSpec]
    max_positions: Callable[[HfConfig], int]
    names: WeightNames | Callable[[DecoderSpec], WeightNames]

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        return self.names if isinstance(self.names, WeightNames) else self.names(spec)
