"""Shared prefixes in a launch of their own, which a plan may ask for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from streamserve_kernels import Kernels
from tests.kernels.conftest import paged_case
from tests.kernels.test_prefix_groups import options_of, share

pytest.importorskip("triton")

from streamserve_kernels.triton import attention
from tests.kernels.test_triton_attention import (
    GROUPS,
    PREFIXED,
    PREFIXED_MIXED,
    case_on,
    change_plans,
    compare,
    moved,
    padded_groups,
)


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    change_plans(monkeypatch, device, shared_apart=True)


@pytest.mark.parametrize(
    ("requests", "kind"),
    [(PREFIXED, "plain"), (PREFIXED, "all"), (PREFIXED_MIXED, "all")],
    ids=["decode-plain", "decode-all", "mixed-all"],
)
def test_groups(naive: Kernels, device, requests, kind) -> None:
    case = case_on(naive, device, seed=21, heads=(4, 2), requests=requests, padding_rows=3)
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
