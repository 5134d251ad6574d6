import math

import pytest
import torch

from spade_ext import nn

DISCRETIZATIONS = ["zoh", "bilinear", "dss"]
FREQUENCIES = {
    "lin": lambda n, d_state: math.pi * n,
    "inv": lambda n, d_state: d_state / math.pi * (d_state / (1 + 2 * n) - 1),
    "quad": lambda n, d_state: (1 + 2 * n) ** 2 / math.pi,
    "real": lambda n, d_state: 0 * n,
}


def s4(**options):
    return nn.S4(6, 8, **{"kernel": "s4d", "n_ssm": 2, **options})


def published_parameters(tensors, prefix, layout):
    """Our name of each parameter of a published layer; tensors are those of a golden file."""
    if layout == "spaces":
        names = {"log_w_real": "A_real", "w_imag": "A_imag", "B": "B", "C": "C", "log_dt": "inv_dt"}
        found = {ours: tensors[f"{prefix}kernel.{theirs}"] for ours, theirs in names.items()}
        found |= {"w_imag": -found["w_imag"], "B": found["B"][0], "log_dt": found["log_dt"][:, 0]}
    else:
        names = {"log_w_real": "inv_A_real", "w_imag": "A_imag", "B": "B", "C": "C", "log_dt": "log_dt"}
        found = {ours: tensors[f"{prefix}kernel.kernel.{theirs}"] for ours, theirs in names.items()}
    return found | {"D": tensors[f"{prefix}D"]}


@pytest.mark.parametrize(
    "name",
    [
        "s4d_diag-inv_bilinear_L100_bi1_c1",
        "s4d_diag-inv_bilinear_L64_bi0_c1",
        "s4d_diag-legs_zoh_L100_bi1_c1",
        "s4d_diag-legs_zoh_L64_bi0_c1",
        "s4d_diag-lin_dss_L100_bi1_c1",
        "s4d_diag-lin_dss_L64_bi0_c1",
        "s4d_diag-lin_zoh_L100_bi1_c1",
        "s4d_diag-lin_zoh_L64_bi0_c1",
        "spaces_diag_diag-lin_r1_L80_bi1",
    ],
)
def test_layer_is_the_published_one(name, load_golden):
    tensors, config = load_golden(name)
    layout = "spaces" if name.startswith("spaces") else "efficient"
    layer = nn.S4(
        config["d_model"],
        config["d_state"],
        kernel="s4d",
        n_ssm=config["n_ssm"],
        bidirectional=config["bidirectional"],
        disc=config.get("disc", "zoh"),
    ).double()
    layer.load_state_dict(published_parameters(tensors, "state.", layout))

    x = tensors["u"].transpose(1, 2).requires_grad_()
    y = layer(x)
    y.backward(tensors["g"].transpose(1, 2))
    torch.testing.assert_close(y.transpose(1, 2), tensors["y"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad.transpose(1, 2), tensors["grad_u"], rtol=1e-9, atol=1e-9)
    for ours, expected in published_parameters(tensors, "grad.", layout).items():
        torch.testing.assert_close(getattr(layer, ours).grad, expected, rtol=1e-9, atol=1e-9)
    if "kernel" in tensors:
        torch.testing.assert_close(
            layer.convolution_kernel(config["L"]), tensors["kernel"].flatten(0, -3), rtol=1e-9, atol=1e-9
        )


def test_legs_starts_from_the_published_eigenvalues(load_golden):
    tensors, config = load_golden("s4d_diag-legs_zoh_L64_bi0_c1")
    layer = nn.S4(config["d_model"], config["d_state"], kernel="s4d", init="legs", n_ssm=config["n_ssm"])
    expected = tensors["state.kernel.kernel.A_imag"].float()
    torch.testing.assert_close(layer.w_imag, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.log_w_real.exp(), torch.full_like(expected, 0.5))


@pytest.mark.parametrize("init", FREQUENCIES)
def test_diagonal_initialisations(init):
    layer = s4(init=init)
    n = torch.arange(4.0)
    torch.testing.assert_close(layer.w_imag, FREQUENCIES[init](n, 8).expand(2, -1))
    real = 1 + n if init == "real" else torch.full_like(n, 0.5)
    torch.testing.assert_close(layer.log_w_real.exp(), real.expand(2, -1))


def test_random_initial_values_have_their_distributions():
    layer = nn.S4(4096, 8, kernel="s4d", dt_min=1e-2, dt_max=1.0)
    assert layer.C.mean().abs() < 0.02 and abs(layer.C.var() - 0.5) < 0.02
    assert layer.D.mean().abs() < 0.05 and abs(layer.D.var() - 1) < 0.1
    low, high = math.log(1e-2), math.log(1.0)
    assert low <= layer.log_dt.min() < low + 0.1 and high - 0.1 < layer.log_dt.max() <= high
    assert abs(layer.log_dt.mean() - (low + high) / 2) < 0.1


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("disc", DISCRETIZATIONS)
def test_layer_is_the_recurrence_of_its_parameters(bidirectional, disc):
    """x_t = abar x_{t-1} + u_t, y_t = 2 Re(cbar x_t) + D u_t; reversed, without the token itself."""
    layer = s4(bidirectional=bidirectional, disc=disc, channels=2).double()
    L = 20
    x = torch.randn(3, L, 6, dtype=torch.float64)
    k = layer.convolution_kernel(L)  # (C or 2 C, H, L)
    y = torch.zeros(3, L, 2, 6, dtype=torch.float64)
    for t in range(L):
        y[:, t] = torch.einsum("chl,blh->bch", k[:2, :, : t + 1].flip(-1), x[:, : t + 1]) + layer.D * x[:, t, None]
        if bidirectional:
            y[:, t] += torch.einsum("chl,blh->bch", k[2:, :, : L - t - 1], x[:, t + 1 :])
    torch.testing.assert_close(layer(x), y.flatten(-2))


def test_kernel_is_the_impulse_response_of_a_scan():
    layer = s4(disc="zoh").double()
    w = torch.complex(-layer.log_w_real.exp(), layer.w_imag).repeat(3, 1)  # (H, N)
    dt = layer.log_dt.exp()[:, None]
    abar, bbar = torch.exp(w * dt), (torch.exp(w * dt) - 1) / w
    state, response = bbar, []
    for _ in range(10):
        response.append(2 * (torch.view_as_complex(layer.C[0]) * state).sum(-1).real)
        state = abar * state
    torch.testing.assert_close(layer.convolution_kernel(10)[0], torch.stack(response, dim=-1))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_invisible(bidirectional):
    layer = s4(bidirectional=bidirectional).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    alone = layer(x)
    garbage = torch.full((2, 4, 6), torch.nan, dtype=torch.float64)
    right, left = torch.cat([x, garbage], 1), torch.cat([garbage, x], 1)
    mask = torch.tensor([[1] * 9 + [0] * 4] * 2)
    torch.testing.assert_close(layer(right, mask)[:, :9], alone)
    torch.testing.assert_close(layer(left, mask.flip(1))[:, 4:], alone)


def test_rate_is_a_factor_of_the_step():
    layer = s4().double()
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    faster = layer(x, rate=2.0)
    with torch.no_grad():
        layer.log_dt += math.log(2.0)
    torch.testing.assert_close(faster, layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_stay_float32_in_a_half_precision_module(dtype):
    layer = torch.nn.Sequential(s4()).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(torch.randn(1, 5, 6, dtype=dtype)).dtype == dtype
    assert {p.dtype for p in layer.double().parameters()} == {torch.float64}
    assert {p.dtype for p in layer.float().parameters()} == {torch.float32}


def test_default_dtype_decides_between_float32_and_float64():
    torch.set_default_dtype(torch.float64)
    try:
        assert s4().C.dtype == torch.float64
        torch.set_default_dtype(torch.bfloat16)
        assert s4().C.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_lr_of_the_state_matrix():
    assert s4().parameter_options()["B"] == {"weight_decay": 0.0}
    assert s4(lr=1e-3).parameter_options()["w_imag"] == {"weight_decay": 0.0, "lr": 1e-3}
    frozen = s4(lr=0)
    assert set(dict(frozen.named_buffers())) == {"log_w_real", "w_imag", "B"}
    assert set(frozen.parameter_options()) == {"log_dt"}
    assert set(frozen.state_dict()) == set(s4().state_dict())
    frozen(torch.randn(1, 5, 6)).sum().backward()


def test_gradients_reach_every_parameter():
    layer = s4(bidirectional=True, channels=2)
    layer(torch.randn(2, 11, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "s5"}, r"kernel is 's5', expected 's4d'"),
        ({"d_state": 7}, r"d_state is 7, expected an even number of at least 2"),
        ({"n_ssm": 4}, r"n_ssm is 4, expected a divisor of d_model = 6"),
        ({"channels": 0}, r"channels is 0, expected at least 1"),
        ({"disc": "euler"}, r"disc is 'euler', expected 'zoh', 'bilinear' or 'dss'"),
        ({"dt_min": 0.2}, r"dt_min and dt_max are 0.2 and 0.1, expected 0 < dt_min <= dt_max"),
        ({"init": "fout"}, r"init is 'fout', expected one of legs, lin, inv, quad, real"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        nn.S4(**{"d_model": 6, "d_state": 8, "kernel": "s4d", **options})


@pytest.mark.parametrize("layer", [s4(), nn.LocalAttention(6, 2, window=(1, 1))], ids=["S4", "LocalAttention"])
def test_attention_mask_is_of_any_type_but_of_one_shape(layer):
    x, mask = torch.randn(2, 2, 6), torch.tensor([[1, 1], [1, 0]])
    for dtype in (torch.bool, torch.float32):
        assert torch.equal(layer(x, mask.to(dtype)), layer(x, mask))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2\], expected \[2, 2\], \(B, L\)"):
        layer(x, mask[0])


def test_error_of_a_wrong_input():
    with pytest.raises(ValueError, match=r"x has shape \[2, 5, 7\], expected \(B, L, 6\)"):
        s4()(torch.zeros(2, 5, 7))
