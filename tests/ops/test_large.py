"""Tensors of more than 2^31 elements: an index that fits 32 bits would wrap around."""

import os

import pytest
import torch

from spade_ext import ops

from .checks import TOLERANCES, run
from .sample_inputs import Sample

MANY = 2**31
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def untouched_memory():
    """Memory that nothing is written to takes no room: it must not be filled with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


def spread(t):
    """The same values, the last of dimension 0 more than 2^31 elements behind the first."""
    rows = MANY + t[0].numel()
    memory = torch.empty(rows * (t.size(0) - 1) + t[0].numel(), dtype=t.dtype)
    return torch.as_strided(memory, t.size(), (rows, *t[0].contiguous().stride())).copy_(t.detach())


@pytest.mark.skipif(MEMORY < 15 * 2**30, reason="a tensor of 2^31 float32 elements does not fit")
@pytest.mark.parametrize("op", ["long_conv", "diagonal_scan", "s4_state", "local_attention"])
def test_rows_far_apart(op, untouched_memory):
    tensors = {
        "long_conv": (torch.randn(2, 3, 9), torch.randn(2, 3, 9), torch.randn(2, 3), torch.randn(2, 3, 9)),
        "diagonal_scan": (
            torch.randn(2, 3, 9),
            -torch.rand(1, 4),
            torch.randn(1, 4),
            torch.randn(2, 3, 4),
            None,
            torch.randn(2, 3, 4),
        ),
        "s4_state": (
            torch.randn(2, 3, 9),
            -torch.rand(1, 4, 2),
            torch.randn(1, 1, 4, 2),
            torch.randn(1, 4, 2),
            torch.zeros(3),
        ),
        "local_attention": tuple(torch.randn(2, 9, 2, 4) for _ in range(3)),
    }[op]
    kwargs = {"diagonal_scan": {"disc": None}, "local_attention": {"window": (3, 2)}}.get(op, {})
    differentiable = op != "s4_state"
    near = [None if t is None else t.requires_grad_(differentiable) for t in tensors]
    far = [spread(near[0]).requires_grad_(differentiable), *near[1:]]
    expected = run(getattr(ops, op), Sample("", tuple(near), kwargs))
    for actual, wanted in zip(run(getattr(ops, op), Sample("", tuple(far), kwargs)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCES[torch.float32])


@pytest.mark.skipif(MEMORY < 20 * 2**30, reason="a tensor of 2^31 float32 elements may not fit beside other tests")
def test_long_kernel(untouched_memory):
    """k[l] = 1 for all l: abar is 1."""
    k = ops.diagonal_kernel(torch.zeros(1, 1), torch.tensor([[[1.0], [2.0]]]), None, MANY // 2 + 5, disc=None)
    assert k.numel() > MANY
    assert (k[0, 0, -9:] == 1).all() and (k[0, 1, :9] == 2).all() and (k[0, 1, -9:] == 2).all()


@pytest.mark.skipif(MEMORY < 20 * 2**30, reason="an output of 2^31 bfloat16 elements may not fit beside other tests")
def test_large_attention_output(untouched_memory):
    """Each query sees itself alone, so the output is v, whose rows are one row here."""
    L, Dv = 2**19 + 3, 4096
    q = torch.zeros(1, L, 1, 1, dtype=torch.bfloat16)
    v = torch.randn(1, 1, 1, Dv).bfloat16()
    out = ops.local_attention(q, q, v.expand(1, L, 1, Dv), window=(0, 0))
    assert out.numel() > MANY
    for rows in (out[0, :3], out[0, -3:]):
        assert torch.equal(rows, v[0].expand_as(rows))
