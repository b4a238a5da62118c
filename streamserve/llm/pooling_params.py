"""``PoolingParams`` as vLLM's users write them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamserve.config import EmbeddingConfig
from streamserve.core.pooling import Pooling
from streamserve.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What a prompt's vector is like, by vLLM's names; it is scaled to length 1 unless told not to.

    ``dimensions``: its first so many numbers, where the model was trained for that.
    ``use_activation`` is what newer versions call ``normalize``.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None

    def request(self, config: EmbeddingConfig) -> SamplingParams:
        """What the engine is asked for. Raises ``InvalidParameterError``."""
        normalize = self.use_activation if self.normalize is None else self.normalize
        pooling = Pooling(dimensions=self.dimensions, normalize=normalize is not False)
        params = SamplingParams(max_tokens=1, temperature=0.0)
        return replace(params, pooling=pooling.settled(config))
