"""The comparison that the tests in the interpreter share."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dit_accel.kernels import block_attention


def close_to_reference(q, k, v, plan, dtype=torch.float32, slack=2e-6, **options):
    """Triton in `dtype` may be at most twice as far from fp64 as dense attention in `dtype` with the same mask is.

    Inputs are rounded to `dtype` first. Returns the output of the reference and of the kernel.
    """
    q, k, v = (x.to(dtype) for x in (q, k, v))
    wide = [x.double() for x in (q, k, v)]
    expected, lse = block_attention(*wide, plan, backend="reference", return_lse=True, **options)
    got, got_lse = block_attention(q, k, v, plan, backend="triton", return_lse=True, **options)
    assert got.dtype == dtype
    assert got_lse.dtype == torch.float32
    mask = plan.to_token_mask()
    clean = [x.nan_to_num() for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(*clean, attn_mask=mask)
    exact = F.scaled_dot_product_attention(*(x.double() for x in clean), attn_mask=mask)
    budget = 2 * (dense - exact).abs().max().item() + slack
    assert (got - expected).abs().max().item() <= budget
    finite = ~lse.isneginf()
    assert torch.equal(finite, ~got_lse.isneginf())
    torch.testing.assert_close(
        got_lse.double()[finite], lse[finite], atol=1e-4 if dtype == torch.float32 else 2e-3, rtol=1e-5
    )
    return expected, got
