"""What a family is: the architecture it covers, how a config becomes a spec, and its names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamserve.models.families.mtp import MtpLayers
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Family:
    """``series`` and ``title`` are what people call the models; several families make a series.

    ``max_positions`` is the context that the config states, before any rotary stretching.

    ``default_positions`` is a shorter one, which is served unless a longer is asked for.
    ``names`` is a function where the names of a checkpoint depend on what it is. ``end_tokens``
    end an answer too, whatever the checkpoint's configs say: its own code says it. ``mtp`` reads
    what a config says of layers that guess further tokens, where the family has such.
    """

    architecture: str
    model_type: str
    series: str
    title: str
    spec: Callable[[HfConfig], DecoderSpec]
    max_positions: Callable[[HfConfig], int]
    names: WeightNames | Callable[[DecoderSpec], WeightNames]
    default_positions: Callable[[HfConfig], int] | None = None
    end_tokens: tuple[str, ...] = ()
    mtp: Callable[[HfConfig], MtpLayers] | None = None

    def weight_names(self, spec: DecoderSpec) -> WeightNames:
        return self.names if isinstance(self.names, WeightNames) else self.names(spec)


def family(
    architecture: str,
    model_type: str,
    series: str,
    title: str,
    spec: Callable[[HfConfig], DecoderSpec],
    context: int,
    names: WeightNames | Callable[[DecoderSpec], WeightNames],
) -> Family:
    """One whose configs state ``max_position_embeddings``, or mean a ``context`` of so many."""
    return Family(
        architecture=architecture,
        model_type=model_type,
        series=series,
        title=title,
        spec=spec,
        max_positions=lambda config: config.integer_or(context, "max_position_embeddings"),
        names=names,
    )
