"""What a model's steps must read and multiply at least, and how long that takes here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from streamserve.cli.compose import Service
from streamserve.models import ModelConfig, state_bytes
from streamserve.models.config import NativeConfig
from streamserve.models.parameters import decoder_modules
from streamserve.runner.passing_thread import on_passing_thread
from streamserve_kernels import Quantization
from streamserve_kernels.ceilings import Ceilings, measure_ceilings
from streamserve_kernels.stored import StoredFormat


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Per step of so many tokens: bytes of weights. Per token: bytes of KV, FLOPs of products. Per
    pair of a query and a key that it sees: FLOPs of attention. Per sequence: bytes of its state.
    """

    weight_bytes: Callable[[int], int]
    kv_bytes_per_token: float
    flops_per_token: float
    flops_per_pair: float
    state_bytes: int = 0

    def decode_s(self, num_tokens: int, num_keys: float, ceilings: Ceilings) -> float:
        """Seconds of reading once the weights that so many tokens use, and `num_keys` of KV, and
        of reading and writing a state for each token.
        """
        num_bytes = self.weight_bytes(num_tokens) + num_keys * self.kv_bytes_per_token
        num_bytes += 2 * num_tokens * self.state_bytes
        return num_bytes / ceilings.bandwidth

    def prompt_s(self, num_tokens: int, ceilings: Ceilings) -> float:
        """Seconds of a prompt's products and attention, all of it at the rate of a large product:
        of bfloat16 or, where that is faster, of float32. Fewer bits may do better.

        No less than reading the weights once.
        """
        pairs = num_tokens * (num_tokens + 1) / 2
        flops = num_tokens * self.flops_per_token + pairs * self.flops_per_pair
        rate, _ = ceilings.best_product
        return max(flops / rate, self.weight_bytes(num_tokens) / ceilings.bandwidth)


def model_costs(service: Service, quantization: Quantization | None) -> ModelCosts:
    """Of the model that a service runs; of a mixture as if all experts were equally likely."""
    config, memory = service.config, service.memory
    attention = config.spec.attentions()
    return ModelCosts(
        weight_bytes=partial(step_weight_bytes, config, service.dtype, quantization),
        kv_bytes_per_token=memory.kv_bytes_per_block / memory.block_size,
        flops_per_token=2.0 * _weights_per_token(config),
        flops_per_pair=float(
            sum(2 * a.num_heads * (a.query_key_head_size + a.value_head_size) for a in attention)
        ),
        state_bytes=state_bytes(config.spec, service.dtype),
    )


def step_weight_bytes(
    config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None, num_tokens: int
) -> int:
    """Bytes of weights that a step of so many tokens reads: all they use but the embedding's."""
    total, spec = config.weight_bytes(dtype, quantization, num_tokens), config.spec
    stored = _stored_table(config)
    if stored is not None or quantization is not None:
        if spec.tied_head:
            return total  # counted once, and the head reads it
        if stored is not None:
            return total - stored.nbytes(spec.vocab_size, spec.hidden_size)
    return total - spec.vocab_size * spec.hidden_size * dtype.itemsize


def _stored_table(config: ModelConfig) -> StoredFormat | None:
    """How the checkpoint holds the embedding; None: plainly."""
    if config.stored_quantization is None or not isinstance(config, NativeConfig):
        return None
    modules = decoder_modules(config.spec)
    embedding = next(module for module in modules if module.name == "embedding")
    return config.stored_quantization.format(embedding)


def _weights_per_token(config: ModelConfig) -> int:
    """Weights that multiply each token of a prompt; the head's only meet the last one."""
    spec = config.spec
    table = spec.vocab_size * spec.hidden_size
    # In one byte a weight; tied or not, table and head are both counted.
    plain = replace(config, stored_quantization=None)
    return plain.weight_bytes(torch.int8, num_tokens=1) - 2 * table


def measured_ceilings(service: Service) -> Ceilings:
    """Of the service's device, which must have nothing else to do."""
    # On a CPU the pool of the calling thread would stay beside the device thread's.
    ceilings = on_passing_thread(lambda: measure_ceilings(service.device))
    if service.device.type == "cuda":
        torch.cuda.empty_cache()
    return ceilings
