"""A causal language model taken apart: the trunk up to the last norm, and what makes logits of it.

What follows the trunk (a head, a scale, a soft cap) is code of each model's own. It need not be
known: it is run as it is, with a module in the trunk's place that returns given hidden states.
"""

from __future__ import annotations

import inspect
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from streamserve.errors import UnsupportedModelError


class GivenStates(nn.Module):
    """Returns hidden states that it was given, as the trunk would."""

    def __init__(self, model: PreTrainedModel, output_class: type[ModelOutput]) -> None:
        super().__init__()
        self._model = [model]  # in a list, or it would become a part of this module
        self._output_class = output_class
        self._states: Tensor | None = None

    @classmethod
    def install(cls, model: PreTrainedModel, path: str, output_class: type[ModelOutput]) -> Self:
        """Takes the place of the trunk, which is at ``path``."""
        given = cls(model, output_class)
        model.set_submodule(path, given)
        return given

    def forward(self, *_: object, **__: object) -> ModelOutput:
        return self._output_class(last_hidden_state=self._states)

    def logits(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
        """[1, L, H] -> [1, L, V]. ``input_ids`` [1, L] are any: some models look at their shape."""
        self._states = hidden_states
        try:
            logits: Tensor = self._model[0](input_ids=input_ids, use_cache=False).logits
        finally:
            self._states = None
        return logits


def run_trunk(trunk: Any, input_ids: Tensor, positions: Tensor) -> Any:
    """Both [1, T] -> the trunk's output."""
    return trunk(input_ids=input_ids, position_ids=positions, use_cache=False)


def find_trunk(model: PreTrainedModel, input_ids: Tensor, **options: Tensor) -> tuple[str, Any]:
    """Runs the model and returns the path of the part whose output it makes logits of, and this.

    Raises UnsupportedModelError where that is not one part, or it does not take positions.
    """
    depth = 0
    outputs: list[tuple[str, Any]] = []
    hooks = []

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave_as(path: str) -> Any:
        def leave(_module: nn.Module, _args: object, output: object) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                outputs.append((path, output))

        return leave

    for path, part in model.named_modules():
        if path and isinstance(part, PreTrainedModel):
            hooks.append(part.register_forward_pre_hook(enter))
            hooks.append(part.register_forward_hook(leave_as(path)))
    try:
        model(input_ids=input_ids, use_cache=False, **options)
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) != 1 or not hasattr(outputs[0][1], "last_hidden_state"):
        raise UnsupportedModelError("it is not one trunk with a head on it")
    path, output = outputs[0]
    parameters = inspect.signature(model.get_submodule(path).forward).parameters
    if "position_ids" not in parameters:
        raise UnsupportedModelError("its forward does not take the tokens' positions")
    return path, output
