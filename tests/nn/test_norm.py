import pytest
import torch

from spade_ext.nn.norm import ScaleNorm, build_norm


def test_norms_are_their_formulas():
    x = torch.randn(3, 8, dtype=torch.float64)
    root = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    layernorm, rmsnorm, scalenorm = (build_norm(name, 8).double() for name in ("layernorm", "rmsnorm", "scalenorm"))
    with torch.no_grad():
        scalenorm.weight.fill_(3)
        rmsnorm.weight[1] = 5
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(layernorm(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(rmsnorm(x), x / root * rmsnorm.weight)
    torch.testing.assert_close(scalenorm(x), 3 * x / root)


def test_scalenorm_has_one_number_that_does_not_decay():
    norm = ScaleNorm()
    assert norm.weight.tolist() == [1.0]
    assert norm.parameter_options() == {"weight": {"weight_decay": 0.0}}


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm"])
def test_half_precision_squares_do_not_overflow(norm):
    x = 500 * torch.randn(3, 8)
    y = build_norm(norm, 8).half()(x.half())
    torch.testing.assert_close(y.float(), build_norm(norm, 8)(x), rtol=5e-3, atol=5e-3)


def test_error():
    with pytest.raises(ValueError, match=r"norm is 'batchnorm', expected 'layernorm', 'rmsnorm' or 'scalenorm'"):
        build_norm("batchnorm", 8)
