"""Products by pieces are the plain products, in every dtype and layout."""

from __future__ import annotations

import pytest
import torch

from lip_plugin.linalg import symmetric
from lip_plugin.linalg.symmetric import product, symmetric_product

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("n", [1, 383, 384, 577, 900])
@pytest.mark.parametrize("batch", [(), (1,), (2,), (2, 1)], ids=str)
def test_a_symmetric_product_is_the_product_to_rounding_and_written_everywhere(dtype, n, batch):
    if batch and n > 577:
        return
    k = 40
    a = torch.randn(
        *batch, n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(n)
    ).to(dtype)
    for x in (a, a.mT.contiguous().mT):
        out = symmetric_product(x, x.mT)
        exact = x.double() @ x.mT.double()
        # There are k + 1 roundings of sums of at most norm(x_i) norm(x_j). bf16 accumulates in
        # float32 and rounds once.
        size = x.double().norm(dim=-1, keepdim=True)
        sums = min(UNIT[dtype], 2.0**-24) * k
        assert (
            (out.double() - exact).abs() <= (UNIT[dtype] + sums) * (size * size.mT) + 1e-30
        ).all()
        assert out.shape == exact.shape
        assert out.dtype == dtype


def test_what_is_not_symmetric_shows_where_the_transpose_is_taken():
    # the test above can fail: the upper part is never multiplied
    a, b = torch.randn(500, 20), torch.randn(20, 500)
    assert not torch.allclose(symmetric_product(a, b), a @ b, atol=1.0)


@pytest.mark.parametrize(
    "shape", [(3, 400, 30, 50), (1, 400, 30, 50), (3, 20, 30, 400), (0, 400, 30, 50)]
)
def test_products_one_by_one_are_the_batched_product(shape):
    count, n, m, k = shape
    a, b = torch.randn(count, n, m), torch.randn(count, m, k)
    torch.testing.assert_close(
        product(a, b), a @ b, rtol=0.0, atol=1e-4
    )  # float32 sums of 30 in another order


def test_an_empty_batch_gives_itself():
    assert symmetric.symmetric_product(torch.zeros(0, 400, 5), torch.zeros(0, 5, 400)).shape == (
        0,
        400,
        400,
    )
