"""Shared prefixes in a launch of their own, which a plan may ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from streamserve_kernels import Kernels
from tests.kernels.conftest import paged_case
from tests.kernels.test_prefix_groups import options_of, share

pytest.importorskip("triton")

from streamserve_kernels.triton import attention, attention_plan
from tests.kernels.test_triton_attention import (
    GROUPS,
    PREFIXED,
    PREFIXED_MIXED,
    compare,
    dtype_on,
    moved,
    padded_groups,
)


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """And small tiles for many programs, so that small cases are cut in many places."""
    plan = attention_plan.plan
    changes: dict[str, object] = {"shared_apart": True}
    if device.type == "cpu":
        tiles = attention_plan.Tiles(16, 16)
        changes |= {"split": tiles, "chunk": tiles, "shared": attention_plan.Tiles(32, 16)}
        changes |= {"programs_per_processor": 3}
        monkeypatch.setattr(attention_plan, "FEW_ROWS", 0)
    monkeypatch.setattr(
        attention, "plan", lambda *args: dataclasses.replace(plan(*args), **changes)
    )


@pytest.mark.parametrize(
    ("requests", "kind"),
    [(PREFIXED, "plain"), (PREFIXED, "all"), (PREFIXED_MIXED, "all")],
    ids=["decode-plain", "decode-all", "mixed-all"],
)
def test_groups(naive: Kernels, device, requests, kind) -> None:
    case = paged_case(
        naive,
        seed=21,
        dtype=dtype_on(device),
        heads=(4, 2),
        head_size=64 if device.type == "cuda" else 16,
        block_size=16,
        requests=requests,
        padding_rows=3,
    )
    compare(
        naive,
        case,
        device,
        max_query_len=64 if requests is PREFIXED_MIXED else 1,
        prefix_groups=padded_groups(share(case, GROUPS), 3),
        **options_of(kind, 4),
    )


@pytest.mark.gpu
def test_launches_that_overlap_wait_for_each_other(naive: Kernels, device) -> None:
    """Three of an attention overlap, and its queries are what the attention before has left."""
    shape = {"heads": (32, 8), "head_size": 128, "block_size": 64, "dtype": torch.bfloat16}
    case = paged_case(naive, seed=19, requests=[(2048 + 64 * r, 1) for r in range(1, 25)], **shape)
    groups = moved(share(case, [(tuple(range(24)), 2048)]), device)
    query, *rest = moved(case.args, device)

    def chain(between: Callable[[], object]) -> torch.Tensor:
        out = query
        for _ in range(20):
            out = attention.paged_attention(
                out, *rest, scale=1.0, prefix_groups=groups, max_query_len=1
            )
            between()
        return out

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(lambda: None)
    for _ in range(3):
        graph.replay()
        assert out.equal(expected)
        out.zero_()
