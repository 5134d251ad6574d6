"""What a new S4 starts from, beside the published layers' own initial values (built in float32)."""

from unittest.mock import patch

import pytest
import torch

from spade_ext import nn
from spade_ext.convert import from_reference
from spade_ext.nn.hippo import dplr

from ..reference import below


def initial_values(name, load_golden, **options):
    """Those of a layer of a golden file's sizes, ours and the published ones, under our names."""
    tensors, config = load_golden(name)
    layer = nn.S4(
        config["d_model"],
        config["d_state"],
        n_ssm=config["n_ssm"],
        l_max=config["l_max"],
        bidirectional=config["bidirectional"],
        **options,
    )
    ours = {name: value.detach().double() for name, value in layer.state_dict().items()}
    published = from_reference(layer, below(tensors, "initial."))
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in published.items()}
    for log_dt in (ours["log_dt"], published["log_dt"]):
        assert (log_dt.exp() > 1e-3).all() and (log_dt.exp() < 1e-1).all()
    return ours, published


def pairs(state, name):
    return torch.view_as_complex(state[name].contiguous())


@pytest.mark.parametrize(
    ("name", "init", "rank"),
    [
        ("s4_legs_r1_s1_L64_bi0_c1", "legs", 1),
        ("s4_legs_r1_s1_L100_bi1_c1", "legs", 1),
        ("s4_legt_r2_s4_L64_bi0_c1", "legt", 2),
        ("s4_legt_r2_s4_L100_bi1_c1", "legt", 2),
        ("s4_fout_r1_s2_L64_bi0_c1", "fout", 1),
        ("s4_fout_r1_s2_L100_bi1_c1", "fout", 1),
    ],
)
def test_s4_starts_as_the_published_one(name, init, rank, load_golden):
    """Eigenvectors have a phase of their own: |B|, |P| and B conj(P) do not."""
    ours, published = initial_values(name, load_golden, init=init, rank=rank)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours["log_w_real"], published["log_w_real"], **close)
    torch.testing.assert_close(ours["w_imag"], published["w_imag"], **close)
    B, published_B = pairs(ours, "B"), pairs(published, "B")
    P, published_P = pairs(ours, "P"), pairs(published, "P")
    torch.testing.assert_close(B.abs(), published_B.abs(), **close)
    torch.testing.assert_close(P.abs(), published_P.abs(), **close)
    torch.testing.assert_close(B * P.conj(), published_B * published_P.conj(), **close)


def test_s4d_starts_as_the_published_one(load_golden):
    """It has the other one of each conjugate pair, and 1e-4 for the frequency 0."""
    name = "spaces_diag_diag-lin_r1_L80_bi1"
    ours, published = initial_values(name, load_golden, kernel="s4d", init="lin")
    torch.testing.assert_close(ours["log_w_real"], published["log_w_real"], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["w_imag"], -published["w_imag"], rtol=1e-6, atol=1.01e-4)
    assert torch.equal(ours["B"], published["B"])


def test_hippo_is_legs_copies_before_fout_ones():
    layer = nn.S4(8, 8, init="hippo", n_ssm=4)
    for copies, init in ((slice(0, 2), "legs"), (slice(2, 4), "fout")):
        w, P, B = (t.to(torch.complex64) for t in dplr(init, 8, 1))
        torch.testing.assert_close(layer.w_imag[copies], w.imag.expand(2, -1))
        torch.testing.assert_close(torch.view_as_complex(layer.B[copies].detach()), B.expand(2, -1))
        torch.testing.assert_close(torch.view_as_complex(layer.P[:, copies].detach()), P[:, None].expand(-1, 2, -1))
        decay = 0.5 if init == "legs" else 1e-3
        torch.testing.assert_close(layer.log_w_real[copies].exp(), torch.full((2, 4), decay))


@pytest.mark.parametrize(("kernel", "floor"), [("s4", 1e-3), ("s4d", 1e-4)])
def test_decay_has_a_floor(kernel, floor):
    """fout has none of its own, and neither has this diagonal matrix."""
    undamped = torch.complex(torch.zeros(4, dtype=torch.float64), torch.arange(4, dtype=torch.float64))
    with patch("spade_ext.nn.s4.diagonal_state_matrix", lambda init, d_state: undamped):
        layer = nn.S4(6, 8, kernel=kernel, init="fout" if kernel == "s4" else "lin")
    torch.testing.assert_close(layer.log_w_real.exp(), torch.full((6, 4), floor), rtol=1e-5, atol=0)
