import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spade_ext.ops import diagonal_kernel, diagonal_kernel_ref

from .checks import (
    TOLERANCES,
    check_against_reference,
    check_compiles_once,
    check_golden,
    check_gradients,
    check_opcheck,
    check_refuses_second_derivative,
    check_same_bits,
    golden_parameters,
    peak_memory,
    relative_errors,
    run,
)
from .sample_inputs import diagonal_kernel_sample, diagonal_kernel_samples, leaf, randn

SAMPLES = diagonal_kernel_samples()
BY_NAME = {sample.name: sample for sample in SAMPLES}
OP = torch.ops.spade_ext.diagonal_kernel.default
BACKWARD = torch.ops.spade_ext.diagonal_kernel_backward.default
DISCS = ["zoh", "bilinear", "dss", None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample, dtype):
    check_against_reference(diagonal_kernel, diagonal_kernel_ref, sample, dtype)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    length=st.integers(0, 140),
    C=st.integers(0, 3),
    N=st.integers(0, 18),
    S=st.integers(1, 3),
    channels_a_copy=st.integers(0, 4),
    disc=st.sampled_from(DISCS),
    real=st.booleans(),
    rate=st.sampled_from([1.0, 0.25, 3.0]),
)
def test_matches_reference_on_random_shapes(length, C, N, S, channels_a_copy, **options):
    sample = diagonal_kernel_sample("", length, C, channels_a_copy * S, N, S, **options)
    check_against_reference(diagonal_kernel, diagonal_kernel_ref, sample, torch.float64)


@pytest.mark.parametrize("disc", DISCS)
def test_kernel_is_the_impulse_response_of_the_recurrence(disc):
    """x <- abar x + bbar u, one token at a time, in place of powers."""
    w, c, log_dt, length = diagonal_kernel_sample("", 20, disc="zoh").map(torch.Tensor.detach).args
    k = diagonal_kernel(w, c, None if disc is None else log_dt, length, disc=disc)
    w, c = torch.view_as_complex(w).repeat(2, 1), torch.view_as_complex(c)
    x = w * log_dt.exp()[:, None]
    half = 1 / (1 - x / 2)
    abar, bbar = {
        "zoh": (x.exp(), (x.exp() - 1) / w),
        "bilinear": ((1 + x / 2) * half, log_dt.exp()[:, None] * half),
        "dss": (x.exp(), (x.exp() - 1) / (w * ((length * x).exp() - 1))),
        None: (w.exp(), torch.ones_like(w)),
    }[disc]
    state, outputs = bbar, []
    for _ in range(length):
        outputs.append((1 if disc == "dss" else 2) * (c * state).sum(-1).real)
        state = abar * state
    assert_close(k, torch.stack(outputs, -1), **TOLERANCES[torch.float64])


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample):
    check_opcheck(OP, sample.args, sample.kwargs)


@pytest.mark.parametrize(
    ("name", "output_mask"),
    [
        ("zoh", [True, True, True]),
        ("bilinear", [False, True, False]),
        ("dss", [True, False, True]),
        ("none", [True, True, False]),
        ("real_zoh", [True, True, True]),
    ],
)
def test_opcheck_backward(name, output_mask):
    sample = BY_NAME[name].map(torch.Tensor.detach)
    k = diagonal_kernel(*sample.args, **sample.kwargs)
    check_opcheck(BACKWARD, (torch.randn_like(k), *sample.args[:3], *sample.kwargs.values(), output_mask))


@pytest.mark.parametrize("name", ["zoh", "bilinear", "dss", "none", "real_zoh", "real_none", "rate", "rate_dss"])
def test_gradcheck(name):
    check_gradients(diagonal_kernel, BY_NAME[name])


def test_second_derivative_is_refused():
    check_refuses_second_derivative(diagonal_kernel, BY_NAME["zoh"], "diagonal_kernel")


@pytest.mark.parametrize(("backend", "disc"), [("aot_eager", "dss"), ("aot_eager", None), ("inductor", "zoh")])
def test_one_graph_serves_all_lengths(backend, disc):
    samples = [diagonal_kernel_sample("", length, disc=disc) for length in (5, 17, 64, 129)]
    check_compiles_once(diagonal_kernel, samples, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [{"C": 1, "H": 1, "S": 1}, {"C": 3, "H": 2, "S": 1}, {"C": 2, "H": 36, "S": 4}])
def test_same_bits_for_any_number_of_threads(shape, dtype, set_threads):
    check_same_bits(diagonal_kernel, diagonal_kernel_sample("", 1000, **shape).to(dtype), set_threads)


@pytest.mark.parametrize("disc", ["zoh", "bilinear", "dss"])
@pytest.mark.parametrize("L", [1, 2, 63, 64, 129, 1000, 1024, 4096])
def test_float32_precision(L, disc):
    if (L, disc) == (1, "dss"):
        pytest.skip("this kernel does not depend on log_dt: the error of that gradient is not relative to anything")
    sample = diagonal_kernel_sample("", L, N=32, disc=disc)
    error, *gradient_errors = relative_errors(diagonal_kernel, diagonal_kernel_ref, sample, torch.float32)
    assert error < 1e-5
    assert max(gradient_errors) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("log_dt", [-12.0, 0.0, 12.0])
@pytest.mark.parametrize("disc", DISCS)
def test_extreme_parameters_stay_finite(disc, log_dt, dtype):
    size = torch.tensor([1e-8, 1e-4, 1.0, 1e4], dtype=torch.float64)
    real, imaginary = torch.meshgrid(-size, torch.cat((-size, size.new_zeros(1), size)), indexing="ij")
    w = torch.stack((real, imaginary), -1).view(1, -1, 2)
    if disc != "dss":  # its kernel has a pole where exp(w dt length) = 1
        w = torch.cat((w, w * torch.tensor([0, 1]), torch.zeros(1, 1, 2)), 1)
    c = torch.full((1, 1, w.size(1), 2), 1e4, dtype=torch.float64).requires_grad_()
    log_dt = torch.full((1,), log_dt, dtype=torch.float64).requires_grad_()
    for value in run(
        diagonal_kernel, diagonal_kernel_sample("", 300, disc=disc, w=leaf(w), c=c, log_dt=log_dt).to(dtype)
    ):
        assert value.isfinite().all()


def test_autocast_runs_in_float32():
    sample = BY_NAME["zoh"].to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        k, *gradients = run(diagonal_kernel, sample)
    expected, *expected_gradients = run(diagonal_kernel, sample.to(torch.float32))
    assert k.dtype == torch.float32
    assert torch.equal(k, expected)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(actual, gradient.bfloat16())


def test_inference_mode(set_threads):
    set_threads(2)
    sample = BY_NAME["zoh"]
    with torch.inference_mode():
        k = diagonal_kernel(*sample.args, **sample.kwargs)
    assert k.is_inference()
    assert torch.equal(k, diagonal_kernel(*sample.args, **sample.kwargs))


def test_memory_does_not_hold_all_powers():
    sample = diagonal_kernel_sample("", 5000, C=1, H=16, N=256, S=1).to(torch.float32)
    assert peak_memory(lambda: run(diagonal_kernel, sample)) < 20 * 2**20  # H N L float32 pairs are 160 MiB


def arguments(**changes):
    return {"w": randn(2, 5, 2), "c": randn(3, 4, 5, 2), "log_dt": randn(4), "length": 8} | changes


REALS = {"w": randn(2, 5), "c": randn(3, 4, 5)}
ERRORS = [
    (ValueError, {"w": randn(5)}, r"w has shape \[5\], expected \(S, N, 2\) or \(S, N\)"),
    (ValueError, {"w": randn(2, 5, 3)}, r"w has shape \[2, 5, 3\], expected 2 in dimension 2 of \(S, N, 2\)"),
    (ValueError, {"w": randn(0, 5, 2)}, r"w has shape \[0, 5, 2\], expected at least one copy S"),
    (ValueError, {"w": randn(3, 5, 2)}, r"w has 3 copies S, expected a divisor of the number of channels H = 4 of c"),
    (ValueError, {"c": randn(4, 5, 2)}, r"c has shape \[4, 5, 2\], expected \(C, H, N, 2\)"),
    (ValueError, {"c": randn(3, 4, 6, 2)}, r"c has shape \[3, 4, 6, 2\], expected 5 in dimension 2 of"),
    (ValueError, {"c": randn(3, 4, 5, 1)}, r"c has shape \[3, 4, 5, 1\], expected 2 in dimension 3 of"),
    (ValueError, REALS | {"c": randn(3, 4, 5, 2)}, r"c has shape \[3, 4, 5, 2\], expected \(C, H, N\)"),
    (ValueError, REALS | {"c": randn(3, 4, 6)}, r"c has shape \[3, 4, 6\], expected 5 in dimension 2 of \(C, H, N\)"),
    (ValueError, {"log_dt": randn(4, 1)}, r"log_dt has shape \[4, 1\], expected \(H,\)"),
    (ValueError, {"log_dt": randn(5)}, r"log_dt has shape \[5\], expected 4 in dimension 0 of \(H,\)"),
    (ValueError, {"log_dt": None}, r"log_dt is None and disc is zoh, expected both or neither"),
    (ValueError, {"disc": None}, r"log_dt is given and disc is None, expected both or neither"),
    (ValueError, {"disc": "euler"}, r"disc is 'euler', expected 'zoh', 'bilinear', 'dss' or None"),
    (ValueError, {"length": -1}, r"length is -1, expected 0 or more"),
    (ValueError, {"rate": 0.0}, r"rate is 0, expected a positive number"),
    (ValueError, {"rate": float("inf")}, r"rate is inf, expected a positive number"),
    (ValueError, {"rate": float("nan")}, r"rate is -?nan, expected a positive number"),
    (TypeError, {"w": randn(2, 5, 2).half()}, r"w is Half, expected float32 or float64"),
    (TypeError, {"c": randn(3, 4, 5, 2).float()}, r"c is Float, expected Double, the dtype of w"),
    (TypeError, {"log_dt": randn(4).float()}, r"log_dt is Float, expected Double, the dtype of w"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("error", "change", "message"), ERRORS)
def test_errors(error, change, message, device):
    values = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments(**change).items()}
    with pytest.raises(error, match=f"^diagonal_kernel: {message}"):
        diagonal_kernel(**values)


@pytest.mark.parametrize("name", ["c", "log_dt"])
def test_another_device_is_refused(name):
    with pytest.raises(ValueError, match=f"^diagonal_kernel: {name} is on meta, expected cpu, the device of w"):
        diagonal_kernel(**arguments(**{name: arguments()[name].to("meta")}))


@pytest.mark.parametrize("kind", ["diag-inv_bilinear", "diag-legs_zoh", "diag-lin_dss", "diag-lin_zoh"])
@pytest.mark.parametrize("length", ["L64_bi0", "L100_bi1"])
def test_golden_s4d(kind, length, load_golden):
    tensors, config = load_golden(f"s4d_{kind}_{length}_c1")
    parameters = golden_parameters(tensors)
    a_real, a_imag, B, C, log_dt = (
        parameters[f"kernel.kernel.{name}"] for name in ("inv_A_real", "A_imag", "B", "C", "log_dt")
    )
    w = torch.stack((-a_real.exp(), a_imag), -1)
    copies = C.size(1) // B.size(0)
    c = torch.view_as_real(torch.view_as_complex(B).repeat(copies, 1) * torch.view_as_complex(C))
    k = diagonal_kernel(w, c, log_dt, config["L"], disc=config["disc"])
    check_golden(tensors, parameters, k, parameters["D"])


def test_golden_state_spaces(load_golden):
    tensors, config = load_golden("spaces_diag_diag-lin_r1_L80_bi1")
    parameters = golden_parameters(tensors)
    a_real, a_imag, B, C, inv_dt = (parameters[f"kernel.{name}"] for name in ("A_real", "A_imag", "B", "C", "inv_dt"))
    w = torch.stack((-a_real.exp(), -a_imag), -1)
    copies = C.size(1) // B.size(1)
    c = torch.view_as_real(torch.view_as_complex(B).repeat(1, copies, 1) * torch.view_as_complex(C))
    k = diagonal_kernel(w, c, inv_dt.squeeze(-1), config["L"], disc="zoh")
    check_golden(tensors, parameters, k, parameters["D"])
