"""Rows and columns that llama.cpp's converter puts in another order than transformers has them.

Both orders are undone when a tensor is read, packed or plain:

* neighbours that turn together, in q and k: a head's rows (pair, which of two) are (which, pair)
  with transformers

        file  a0 b0 a1 b1 a2 b2 …     ours  a0 a1 a2 … b0 b1 b2 …

* value heads of a delta net, of which each key head g has several: in all that has rows for each,
  and in the columns of what multiplies their outputs

        file  g0.0 g1.0 g2.0 … g0.1 g1.1 g2.1 …     ours  g0.0 g0.1 … g1.0 g1.1 …
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamserve.models.gguf.architecture import Architecture
from streamserve.models.gguf.kinds import GgufWeight
from streamserve.models.gguf.reading import Reading
from streamserve.models.quantised.modules import select_rows
from streamserve_kernels.stored import FactoredNumbers, Float8Weight, Numbers, TableWeight


@dataclass(frozen=True, slots=True)
class Order:
    """Where in the file each row of ours is, [N] int64; or, by runs of ``run``, each column."""

    places: Tensor
    run: int = 0

    def plain(self, tensor: Tensor) -> Tensor:
        """The tensor as transformers has it."""
        if not self.run:
            return tensor[self.places]
        runs = tensor.view(tensor.shape[0], -1, self.run)
        return runs[:, self.places].view(tensor.shape)

    def packed(self, weight: GgufWeight) -> GgufWeight:
        """The same of packed rows. Groups must lie in a run each."""
        if not self.run:
            selected = select_rows(weight, self.places)
            assert not isinstance(selected, Float8Weight)
            return selected
        groups = self.run // weight.group
        codes = self.plain(weight.codes)
        if isinstance(weight, TableWeight):
            assert weight.scales is not None
            return replace(weight, codes=codes, scales=self._numbers(weight.scales, groups))
        assert not isinstance(weight.zeros, Tensor)
        minimums = weight.minimums
        return replace(
            weight,
            codes=codes,
            scales=self._numbers(weight.scales, groups),
            minimums=None if minimums is None else self._numbers(minimums, groups),
        )

    def _numbers(self, numbers: Numbers, groups: int) -> Numbers:
        """A run has ``groups`` numbers; a unit that groups of several runs share is doubled."""
        if not isinstance(numbers, FactoredNumbers):
            return replace(self, run=groups).plain(numbers)
        per = math.gcd(numbers.per, groups)
        units = numbers.units.repeat_interleave(numbers.per // per, dim=1)
        return FactoredNumbers(
            replace(self, run=groups).plain(numbers.codes),
            replace(self, run=groups // per).plain(units),
            per,
        )


def orders(reading: Reading, architecture: Architecture) -> Mapping[str, Order]:
    """By the name of a tensor behind its layer's number: ``attn_q``."""
    found: dict[str, Order] = {}
    if architecture.permuted:
        found |= _neighbours_together(reading, architecture.num_kv_heads(reading))
    if architecture.tiled:
        found |= _value_heads(reading)
    return found


def _neighbours_together(reading: Reading, num_kv_heads: int | None) -> dict[str, Order]:
    num_heads, size = reading.integer("attention.head_count"), reading.head_size
    num_kv_heads = num_kv_heads or num_heads

    def order(heads: int, start: int) -> Tensor:
        rows = torch.arange(start, start + heads * size)
        return rows.view(heads, size // 2, 2).transpose(1, 2).reshape(-1)

    q, k = order(num_heads, 0), order(num_kv_heads, num_heads * size)
    v = torch.arange(num_kv_heads * size) + (num_heads + num_kv_heads) * size
    return {
        "attn_q": Order(q),
        "attn_k": Order(order(num_kv_heads, 0)),
        "attn_qkv": Order(torch.cat((q, k, v))),
    }


def _value_heads(reading: Reading) -> dict[str, Order]:
    num_key_heads = reading.count("ssm.group_count")
    num_heads = reading.count("ssm.time_step_rank")
    if num_heads == num_key_heads or num_heads % num_key_heads:  # the latter is refused later on
        return {}
    size = reading.integer("ssm.inner_size") // num_heads
    heads = torch.arange(num_heads).view(-1, num_key_heads).t().reshape(-1)
    values = (heads[:, None] * size + torch.arange(size)).flatten()
    keys = 2 * num_key_heads * reading.integer("ssm.state_size")
    channels = Order(torch.cat((torch.arange(keys), keys + values)))
    return {
        "attn_qkv": channels,
        "ssm_conv1d": channels,
        "attn_gate": Order(values),
        **dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"), Order(heads)),
        "ssm_out": Order(heads, run=size),
    }
