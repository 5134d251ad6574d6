import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.testing import assert_close

from spade_ext.ops import linear_step, linear_step_ref

from .checks import (
    TOLERANCES,
    check_against_reference,
    check_compiles_once,
    check_opcheck,
    check_same_bits,
    relative_error,
)
from .sample_inputs import Sample, constant, linear_step_samples

SAMPLES = linear_step_samples()
BY_NAME = {sample.name: sample for sample in SAMPLES}
STEP = torch.ops.spade_ext.linear_step.default
ALL_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample, dtype):
    check_against_reference(linear_step, linear_step_ref, scaled(sample), dtype)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    B=st.integers(0, 20),
    N=st.integers(0, 70),
    K=st.integers(0, 300),
    with_bias=st.booleans(),
    dtype=st.sampled_from(ALL_DTYPES),
)
def test_matches_reference_on_random_shapes(B, N, K, with_bias, dtype):
    sample = Sample("", (constant(B, K), constant(N, K), constant(N) if with_bias else None))
    check_against_reference(linear_step, linear_step_ref, scaled(sample), dtype)


def scaled(sample):
    """With sums of about 1, whatever K is."""
    x, *rest = sample.args
    return Sample(sample.name, (x / max(1, x.size(-1)) ** 0.5, *rest))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 7, 17, 31, 33, 100])
def test_reads_nothing_beyond_its_arguments(K, dtype):
    """Rows that lie in memory full of NaN."""
    x, weight, bias = (torch.full(size, torch.nan, dtype=dtype) for size in ((5, 128), (9, 128), (30,)))
    parts = x[:, 5 : 5 + K], weight[:, 3 : 3 + K], bias[7:16]
    for part in parts:
        part.copy_(torch.randn(part.shape))
    assert_close(linear_step(*parts), linear_step(*(part.clone() for part in parts)), rtol=0, atol=0)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample):
    check_opcheck(STEP, sample.args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_once(backend):
    sizes = [(2, 7, 30), (3, 40, 129), (5, 9, 64)]
    samples = [Sample("", (constant(B, K), constant(N, K), constant(N))) for B, N, K in sizes]
    check_compiles_once(linear_step, samples, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["row", "many_rows", "several_threads"])
def test_same_bits_for_any_number_of_threads(name, dtype, set_threads):
    check_same_bits(linear_step, BY_NAME[name].to(dtype), set_threads)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["many_rows", "several_threads"])
def test_a_row_does_not_depend_on_the_others(name, dtype):
    x, weight, bias = BY_NAME[name].to(dtype).args
    assert torch.equal(linear_step(x, weight, bias), torch.stack([linear_step(row, weight, bias) for row in x]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["row", "many_rows", "sliced"])
def test_half_types_are_float32_rounded_once(name, dtype):
    sample = BY_NAME[name].to(dtype)
    expected = linear_step(*sample.to(torch.float32).args).to(dtype)
    assert torch.equal(linear_step(*sample.args), expected)


def test_float32_precision():
    x, weight = constant(1, 4096).float(), constant(64, 4096).float()
    assert relative_error(linear_step(x, weight), linear(x.double(), weight.double())) < 1e-6


def test_result_is_contiguous():
    assert linear_step(*BY_NAME["rows_not_contiguous"].args).is_contiguous()


@pytest.mark.parametrize(("index", "name"), list(enumerate(("x", "weight", "bias"))))
def test_refuses_gradients(index, name):
    arguments = [t.clone() for t in BY_NAME["rows"].args]
    arguments[index].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^linear_step: {name} requires a gradient, expected none:"):
        linear_step(*arguments)
    with torch.no_grad():
        assert not linear_step(*arguments).requires_grad


def test_autocast_steps_in_its_type():
    arguments = BY_NAME["rows"].to(torch.float32).args
    expected = linear_step(*(t.bfloat16() for t in arguments))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_step(*arguments), expected)


def test_inference_mode():
    arguments = BY_NAME["rows"].args
    expected = linear_step(*arguments)
    with torch.inference_mode():
        assert_close(linear_step(*arguments), expected, **TOLERANCES[torch.float64])


def arguments(**changes):
    return {"x": constant(2, 3), "weight": constant(4, 3), "bias": constant(4)} | changes


ERRORS = [
    (ValueError, {"x": constant()}, r"x has shape \[\], expected \(..., K\)"),
    (ValueError, {"weight": constant(3)}, r"weight has shape \[3\], expected \(N, K\)"),
    (ValueError, {"weight": constant(4, 5)}, r"weight has shape \[4, 5\], expected 3 in dimension 1 of \(N, K\)"),
    (ValueError, {"bias": constant(1, 4)}, r"bias has shape \[1, 4\], expected \(N,\)"),
    (ValueError, {"bias": constant(3)}, r"bias has shape \[3\], expected 4 in dimension 0 of \(N,\)"),
    (TypeError, {"x": torch.ones(2, 3).long()}, r"x is Long, expected float64, float32, float16 or bfloat16"),
    (TypeError, {"weight": constant(4, 3).float()}, r"weight is Float, expected Double, the dtype of x"),
    (TypeError, {"bias": constant(4).half()}, r"bias is Half, expected Double, the dtype of x"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("error", "change", "message"), ERRORS)
def test_errors(error, change, message, device):
    values = {name: t.to(device) for name, t in arguments(**change).items()}
    with pytest.raises(error, match=f"^linear_step: {message}"):
        linear_step(**values)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_another_device_is_refused(name):
    with pytest.raises(ValueError, match=f"^linear_step: {name} is on meta, expected cpu, the device of x"):
        linear_step(**arguments() | {name: arguments()[name].to("meta")})
