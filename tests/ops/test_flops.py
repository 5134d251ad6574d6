import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spade_ext import ops
from spade_ext.ops import flops


@pytest.mark.parametrize("queries", [1, 7, 20])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (2, 5), (30, 30)])
@pytest.mark.parametrize("chunk_size", [None, 4, 7])
def test_attended_pairs(queries, left, right, chunk_size):
    keys = 20
    p, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    seen = (j >= p - left) & (j <= p + right)
    if chunk_size:
        seen &= p // chunk_size == j // chunk_size
    assert flops.attended_pairs(queries, keys, left, right, chunk_size) == seen.sum()


def test_fft_length():
    lengths = sorted({factor << shift for factor in (1, 3, 5) for shift in range(1, 16)})
    for least in range(1, 9000):
        assert flops.fft_length(least) == next(n for n in lengths if n >= least)


def test_every_op_has_a_formula():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("spade_ext::")}
    assert names - {"local_attention"} == set(flops.FORMULAS)  # it calls local_attention_forward


def test_torch_counts_by_the_formulas():
    B, H, L = 2, 3, 20
    u, k = torch.randn(B, H, L, requires_grad=True), torch.randn(H, L)
    with FlopCounterMode(display=False) as counter:
        ops.long_conv(u, k).sum().backward()
    n = 40
    transform = 2.5 * n * math.log2(n)
    forward = H * ((2 * B + 1) * transform + 3 * n * B)
    backward = H * ((3 * B + 2) * transform + 6 * n * B)
    assert counter.get_total_flops() == pytest.approx(forward + backward)


@pytest.mark.parametrize("pair", [(), (2,)], ids=["reals", "pairs"])
def test_a_step_is_a_scan_of_one_token(pair):
    B, C, H, N = 2, 1, 4, 5
    u, w, state = torch.randn(B, H), -torch.rand(H, N, *pair), torch.zeros(B, H, N, *pair)
    c = torch.randn(C, H, N, *pair)
    counts = []
    for call in (ops.diagonal_step, lambda u, *rest, **options: ops.diagonal_scan(u[..., None], *rest, **options)):
        with FlopCounterMode(display=False) as counter:
            call(u, w, w, c, None, state, disc=None)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_states_cost_what_the_readme_says():
    B, H, N, L, R = 2, 4, 5, 7, 1
    u, w, p, log_dt = torch.randn(B, H, L), -torch.rand(H, N, 2), torch.randn(R, H, N, 2), torch.zeros(H)
    with FlopCounterMode(display=False) as counter:
        ops.s4_state(u, w, p, w, log_dt)
    assert counter.get_total_flops() == B * H * N * L * 20
    with FlopCounterMode(display=False) as counter:
        ops.s4_step(u[..., 0], w, p, w, torch.randn(2, H, N, 2), log_dt, torch.zeros(B, H, N, 2))
    assert counter.get_total_flops() == B * H * N * (28 + 8)
