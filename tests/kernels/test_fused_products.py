"""A product enters a sum unrounded on a GPU, and so it does under the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder


@triton.jit
def _kernel(a, b, c, out, FORM: tl.constexpr):
    at = tl.arange(0, 16)
    x, y, z = tl.load(a + at), tl.load(b + at), tl.load(c + at)
    product = x * y
    if FORM == "product - z":
        left = product - z
    elif FORM == "z - product":
        left = z - product
    elif FORM == "product + z":
        left = product + -z
    elif FORM == "z + product":
        left = -z + product
    elif FORM == "negated":
        left = z + -product
    elif FORM == "broadcast":
        left = tl.sum(product[:, None] - tl.join(z, z), 1) * 0.5
    elif FORM == "splat":
        left = tl.load(a) * tl.load(b) - z
    else:
        left = tl.where(z != 0.0, product, 0.0) - z
    tl.store(out + at, left)


def run(form: str, device: torch.device, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of products after their rounded selves, and the rounding errors."""
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(16, generator=random) for _ in range(2))
    out = torch.empty(16, device=device)
    _kernel[(1,)](*(x.to(device) for x in (a, b, a * b)), out, FORM=form, **options)
    errors = a.double() * b.double() - (a * b).double()
    assert errors.ne(0).sum() > 8
    return out.cpu(), errors.float()


@pytest.mark.parametrize(
    "form", ["product - z", "z - product", "product + z", "z + product", "broadcast"]
)
def test_a_product_that_is_added_is_not_rounded(device, form) -> None:
    found, errors = run(form, device)
    assert found.equal(-errors if form == "z - product" else errors)


def test_it_is_where_a_launch_says_so(device) -> None:
    found, _ = run("product - z", device, enable_fp_fusion=False)
    assert not found.any()
    assert run("product - z", device)[0].any()


def test_nor_is_that_of_two_numbers(device) -> None:
    found, errors = run("splat", device)
    assert found[0] == errors[0] != 0.0


def test_nor_is_one_that_is_negated(device) -> None:
    if not hasattr(InterpreterBuilder, "create_fneg"):
        pytest.skip("this Triton negates by a subtraction from zero")
    found, errors = run("negated", device)
    assert found.equal(-errors)


def test_one_that_is_selected_is(device) -> None:
    assert not run("selected", device)[0].any()
