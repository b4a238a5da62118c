"""The models that a request may name: the one there is, and its adapters."""

from __future__ import annotations

from collections.abc import Sequence

from streamserve.api.errors import HttpError
from streamserve.engine.adapters import Adapter, Adapters


class ServedModels:
    """The model's names, the first of which is what it calls itself, and adapters by name."""

    def __init__(self, names: Sequence[str], adapters: Adapters | None = None) -> None:
        self.names = tuple(names)
        self.adapters = adapters

    def adapter_of(self, model: str | None) -> Adapter | None:
        """The adapter that a request asks for; ``None``: the model itself, as without a name.

        Raises 404 for a name that is nobody's.
        """
        if model is None or model in self.names:
            return None
        adapter = None if self.adapters is None else self.adapters.find(model)
        if adapter is None:
            served = [*self.names, *(a.name for a in self.adapters or ())]
            raise HttpError(
                404,
                f"The model {model[:256]!r} does not exist; this server has {', '.join(served)}",
                param="model",
                code="model_not_found",
            )
        return adapter
