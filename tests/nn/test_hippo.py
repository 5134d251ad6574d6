import math

import pytest
import torch

from spade_ext.nn.hippo import dplr, hippo_matrix

RANKS = {"legs": 1, "legt": 2, "fout": 1}


def dense(w, P, B):
    """A, B of all states: those stored, then their conjugates."""
    w, P, B = (torch.cat([t, t.conj()], -1) for t in (w, P, B))
    return torch.diag(w) - P.T @ P.conj(), B


@pytest.mark.parametrize("d_state", [2, 4, 16, 64])
@pytest.mark.parametrize("init", RANKS)
def test_normal_form_has_the_transfer_function_of_the_matrix(init, d_state):
    """b^* (z - A)^-1 b, which does not depend on the basis."""
    A, B, _ = hippo_matrix(init, d_state)
    normal_A, normal_B = dense(*dplr(init, d_state, 2))
    one = torch.eye(d_state, dtype=torch.complex128)
    for z in (0.3 + 0.2j, 1 - 4j, 25j + 0.1):
        expected = B.to(one.dtype) @ torch.linalg.solve(z * one - A, B.to(one.dtype))
        actual = normal_B.conj() @ torch.linalg.solve(z * one - normal_A, normal_B)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("init", RANKS)
def test_stored_half_has_no_positive_frequency(init):
    w, P, B = dplr(init, 16, RANKS[init])
    assert w.shape == B.shape == (8,) and P.shape == (RANKS[init], 8)
    assert (w.imag <= 0).all()
    torch.testing.assert_close(w.real, torch.full_like(w.real, -0.5 if init == "legs" else 0.0))


def test_known_entries():
    A, B, P = hippo_matrix("legs", 3)
    root = math.sqrt(3), math.sqrt(5)
    expected = [[-1, 0, 0], [-root[0], -2, 0], [-root[1], -root[0] * root[1], -3]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, *root], dtype=torch.float64))
    A, B, _ = hippo_matrix("fout", 4)
    expected = [[-1, 0, -math.sqrt(2), 0], [0, 0, 0, 0], [-math.sqrt(2), 0, -2, -math.pi], [0, 0, math.pi, 0]]
    torch.testing.assert_close(A.abs(), torch.tensor(expected, dtype=torch.float64).abs())
    w, _, B = dplr("fout", 8, 1)
    torch.testing.assert_close(w.imag, -math.pi * torch.tensor([3.0, 2, 1, 0], dtype=torch.float64))
    torch.testing.assert_close(B[-1].abs(), torch.tensor(math.sqrt(0.5), dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "init", "rank"),
    [
        ("s4_legs_r1_s1_L64_bi0_c1", "legs", 1),
        ("s4_legt_r2_s4_L64_bi0_c1", "legt", 2),
        ("s4_fout_r1_s2_L64_bi0_c1", "fout", 1),
        ("spaces_dplr_legs_r1_L64_bi0", "legs", 1),
    ],
)
def test_published_initial_values(name, init, rank, load_golden):
    """Eigenvectors have a phase of their own: |B| and B conj(P) do not. The published code builds them in float32.

    state-spaces/s4 clips the imaginary part of B at 2, which ours does not.
    """
    tensors, config = load_golden(name)
    w, P, B = dplr(init, config["d_state"], rank)
    if name.startswith("spaces"):
        initial = {key: tensors[f"initial.kernel.{key}"] for key in ("A_real", "A_imag", "B", "P")}
        log_decay, imaginary = initial["A_real"], -initial["A_imag"]
    else:
        initial = {key: tensors[f"initial.kernel.kernel.{key}"] for key in ("inv_w_real", "w_imag", "B", "P")}
        log_decay, imaginary = initial["inv_w_real"], initial["w_imag"]
    published_B, published_P = (torch.view_as_complex(initial[key].clone()) for key in "BP")  # aligned
    for copy in range(config["n_ssm"]):
        torch.testing.assert_close(log_decay[copy].exp(), (-w.real).clamp(min=1e-3), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(imaginary[copy], w.imag, rtol=1e-6, atol=1e-5)
        kept = B.abs() < 2 if name.startswith("spaces") else torch.ones(B.shape, dtype=torch.bool)
        assert kept.sum() >= 5
        torch.testing.assert_close(published_P[:, copy].abs(), P.abs(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(published_B[0, copy, kept].abs(), B[kept].abs(), rtol=1e-5, atol=1e-5)
        products = published_B[:, copy] * published_P[:, copy].conj()
        torch.testing.assert_close(products[:, kept], (B * P.conj())[:, kept], rtol=1e-5, atol=1e-5)


def test_rank_adds_rows_of_zeros_and_has_a_smallest():
    assert torch.equal(dplr("legs", 8, 3)[1][1:], torch.zeros(2, 4, dtype=torch.complex128))
    with pytest.raises(ValueError, match="rank is 1, expected at least 2 for init 'legt'"):
        dplr("legt", 8, 1)
    with pytest.raises(ValueError, match="init is 'lagt', expected one of legs, legt, fout"):
        dplr("lagt", 8, 1)
