"""Low-rank adapters of single rows: every backend against the formula, row by row."""

import pytest
import torch

from streamserve_kernels import Kernels
from streamserve_kernels.adapters import AdapterRows

NUM_SLOTS, MAX_RANK = 3, 17
CPU = torch.device("cpu")


def rows_of(slots: list[int]) -> AdapterRows:
    groups = {
        slot: torch.tensor([i for i, s in enumerate(slots) if s == slot])
        for slot in sorted(set(slots))
        if slot >= 0
    }
    return AdapterRows(torch.tensor(slots, dtype=torch.int32), tuple(groups.items()))


def matrices(rank: int, shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
    return a, torch.randn(shape[0], rank, generator=generator)


@pytest.mark.parametrize("shape", [(16, 32), (70, 45), (577, 300)])
@pytest.mark.parametrize("slots", [[1], [-1, 0, 2, 2, -1, 1, 0], [0] * 9 + [2] * 4 + [-1, 1]])
@pytest.mark.parametrize("backend", ["naive", "native"])
def test_each_row_gets_its_own_adapter(request, backend, slots, shape):
    kernels: Kernels = request.getfixturevalue(backend)
    dtype = torch.bfloat16 if backend == "native" else torch.float32
    out_features, in_features = shape
    table = kernels.AdapterTable(NUM_SLOTS, *shape, dtype, CPU, MAX_RANK)
    sets = {slot: matrices(rank, shape, slot) for slot, rank in ((0, 17), (2, 4))}  # none for 1
    for slot, (a, b) in sets.items():
        table.set(slot, a, b)
    generator = torch.Generator().manual_seed(7)
    # Rows of a fused product: further apart than they are long.
    x = torch.randn(len(slots), in_features + 6, generator=generator).to(dtype)[:, :in_features]
    y = torch.randn(len(slots), out_features, generator=generator).to(dtype)
    expected = y.double()
    for i, slot in enumerate(slots):
        if slot in sets:
            a, b = (part.to(dtype).double() for part in sets[slot])
            expected[i] += b @ (a @ x[i].double())
    found = kernels.add_adapters(y.clone(), x, table, rows_of(slots))
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    untouched = [i for i, slot in enumerate(slots) if slot not in sets]
    assert torch.equal(found[untouched], y[untouched])
    for slot in sets:
        table.clear(slot)
    assert torch.equal(kernels.add_adapters(y.clone(), x, table, rows_of(slots)), y)
    assert not table.nbytes


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(native):
    shape = (577, 300)
    table = native.AdapterTable(NUM_SLOTS, *shape, torch.bfloat16, CPU, MAX_RANK)
    for slot in range(NUM_SLOTS):
        table.set(slot, *matrices(8, shape, slot))
    slots = [0, 0, 1, -1, 2, 2, 2, 2, 2, 0, 1]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(slots), shape[1], generator=generator).bfloat16()
    y = torch.randn(len(slots), shape[0], generator=generator).bfloat16()
    together = native.add_adapters(y.clone(), x, table, rows_of(slots))
    for i, slot in enumerate(slots):
        alone = y[i : i + 1].clone()
        native.add_adapters(alone, x[i : i + 1], table, rows_of([slot]))
        assert torch.equal(together[i : i + 1], alone)


def test_matrices_that_do_not_fit_are_refused(naive, native):
    for kernels in (naive, native):
        table = kernels.AdapterTable(NUM_SLOTS, 16, 32, torch.bfloat16, CPU, 4)
        with pytest.raises(ValueError, match="beside a weight of"):
            table.set(0, torch.zeros(4, 16), torch.zeros(16, 4))
        with pytest.raises(ValueError, match="beside a weight of"):
            table.set(0, torch.zeros(4, 32), torch.zeros(16, 3))
        with pytest.raises(ValueError, match="rank 5 where 4"):
            table.set(0, torch.zeros(5, 32), torch.zeros(16, 5))
