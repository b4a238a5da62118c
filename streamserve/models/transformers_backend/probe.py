"""What a model of transformers is, found by running its forward once without weights.

A model on the meta device has shapes and no numbers: building a large one takes a second and no
memory, and its forward shows each layer's attention, every linear layer with the sizes it has, and
whatever cannot run on a paged cache. All functions raise UnsupportedModelError with a reason that
reads on from "transformers' model cannot run here: ".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from streamserve.errors import UnsupportedModelError
from streamserve.models.transformers_backend import attention, modules, rotary
from streamserve.models.transformers_backend.mixing import TokenMixing
from streamserve.models.transformers_backend.refusals import refuse_by_class
from streamserve.models.transformers_backend.shape import LinearShape, TransformersSpec
from streamserve.models.transformers_backend.trunk import GivenStates, find_trunk

# A prime that is hardly ever the size of anything else, and few rows of it for the head.
_NUM_TOKENS, _NUM_ROWS = 61, 3
_ROUTERS = ("gate", "router", "shared_expert_gate")
_META = torch.device("meta")


def probe(
    config: PreTrainedConfig, *, trust_remote_code: bool, max_model_len: int
) -> TransformersSpec:
    """Raises UnsupportedModelError with the first reason why the model cannot be served."""
    attention.register()
    modules.register()
    with _refusing("it cannot be built"), _META:
        build: Any = AutoModelForCausalLM.from_config
        model: PreTrainedModel = build(
            config,
            attn_implementation=attention.PROBE,
            experts_implementation=modules.PROBE_EXPERTS,
            trust_remote_code=trust_remote_code,
        ).eval()
    refuse_by_class(type(model))
    rotary.freeze(model, max_model_len)
    findings = _Findings(model)
    with _refusing("its forward does not run without weights"):
        findings.run(model)
    return findings.spec()


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a model's own code raises here, it would raise in a step."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        if attention.CausalMask.__name__ in str(error):
            raise UnsupportedModelError("it computes with the attention mask itself") from error
        reason = str(error).strip().splitlines() or [""]
        raise UnsupportedModelError(f"{what} ({type(error).__name__}: {reason[0]})") from error


class _ObservedLinear(nn.Linear):
    """Knows whether it was multiplied with, and whether somebody took its weight for himself."""

    was_called = False
    was_read = False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        self.was_read = True
        return self._parameters["weight"]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        self.was_called = True
        return nn.functional.linear(x, self._parameters["weight"], self._parameters["bias"])  # type: ignore[arg-type]


class _Findings:
    """Of one model on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._numel = sum(parameter.numel() for parameter in model.parameters())
        self._buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
        untyped: Any = model
        embedding, head = untyped.get_input_embeddings(), untyped.get_output_embeddings()
        names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._head = names.get(id(head))
        self._tied = head is not None and head.weight is getattr(embedding, "weight", None)
        self._embedding = names.get(id(embedding)) if type(embedding) is nn.Embedding else None
        self._linears: dict[str, _ObservedLinear] = {}
        self._experts: dict[str, modules.ProbeExperts] = {}
        self._attention = attention.Probe()
        self._attending: dict[int, str] = {}
        self._lists: dict[str, int] = {
            name: len(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
        }
        for name, module in model.named_modules():
            attention.bind(module, self._attention)
            self._attending[id(module)] = name
            if type(module) is nn.Linear:
                module.__class__ = _ObservedLinear
                self._linears[name] = module  # type: ignore[assignment]
            elif modules.is_experts(module):
                self._experts[name] = modules.ProbeExperts(module)
                modules.bind_experts(module, self._experts[name])

    def run(self, model: PreTrainedModel) -> None:
        ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.int64, device=_META)
        with torch.inference_mode(), TokenMixing(_NUM_TOKENS):
            # With a mask of two dimensions nobody looks for packed sequences, which needs numbers.
            self._trunk, output = find_trunk(
                model, ids, position_ids=ids, attention_mask=torch.ones_like(ids)
            )
            if not self._attention.found:
                raise UnsupportedModelError("no layer attends through transformers' interface")
            states = output.last_hidden_state
        with torch.inference_mode():
            given = GivenStates.install(model, self._trunk, type(output))
            logits = given.logits(states[:, :_NUM_ROWS], ids[:, :_NUM_ROWS])
        if states.shape[:2] != ids.shape or logits.shape[:2] != (1, _NUM_ROWS):
            raise UnsupportedModelError(
                f"{_NUM_TOKENS} tokens have states {list(states.shape)}, "
                f"{_NUM_ROWS} of them logits {list(logits.shape)}"
            )
        self._hidden_size, self._vocab_size = states.shape[2], logits.shape[2]
        self._output_class = type(output)

    def spec(self) -> TransformersSpec:
        linears = [
            LinearShape(
                path=name,
                outputs=linear.out_features,
                inputs=linear.in_features,
                bias=linear.bias is not None,
                is_router=name.rpartition(".")[2] in _ROUTERS,
            )
            for name, linear in self._linears.items()
            if linear.was_called and not linear.was_read
        ]
        linears += [shape for name, found in self._experts.items() for shape in found.shapes(name)]
        packed = {linear.path for linear in linears}
        head = self._head if self._head in packed else None
        own = [linear for linear in linears if linear.path != head or not self._tied]
        paths = [self._attending[id(found.module)] for found in self._attention.found]
        return TransformersSpec(
            vocab_size=self._vocab_size,
            hidden_size=self._hidden_size,
            tied_head=self._tied,
            trunk=self._trunk,
            output_class=self._output_class,
            head=head,
            embedding=self._embedding if self._tied and head is not None else None,
            layers=self._layers(paths),
            attention_paths=tuple(paths),
            attention_specs=tuple(found.spec for found in self._attention.found),
            linears=tuple(linears),
            buffer_bytes=self._buffer_bytes,
            other_numel=self._numel - sum(linear.numel for linear in own),
        )

    def _layers(self, paths: list[str]) -> str | None:
        """The list in which each layer that attends is one item."""
        for name, length in self._lists.items():
            prefix = f"{name}."
            if length == len(paths) and all(path.startswith(prefix) for path in paths):
                return name
        return None
