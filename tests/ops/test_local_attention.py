import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spade_ext.nn import RelativePositionBias
from spade_ext.ops import local_attention, local_attention_ref

from .checks import (
    TOLERANCES,
    check_against_reference,
    check_compiles_once,
    check_gradients,
    check_opcheck,
    check_refuses_second_derivative,
    check_same_bits,
    peak_memory,
    relative_errors,
    run,
)
from .sample_inputs import leaf, local_attention_sample, local_attention_samples, padding, randn

SAMPLES = local_attention_samples()
BY_NAME = {sample.name: sample for sample in SAMPLES}
OP = torch.ops.spade_ext.local_attention.default
FORWARD = torch.ops.spade_ext.local_attention_forward.default
BACKWARD = torch.ops.spade_ext.local_attention_backward.default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample, dtype):
    check_against_reference(local_attention, local_attention_ref, sample, dtype)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    B=st.integers(0, 3),
    Lq=st.integers(0, 70),
    Lk=st.integers(0, 70),
    Hkv=st.integers(1, 3),
    group=st.integers(0, 3),
    D=st.integers(1, 18),
    Dv=st.integers(0, 18),
    window=st.none() | st.tuples(st.integers(0, 80), st.integers(0, 80)),
    causal=st.booleans(),
    bias=st.booleans(),
    padded=st.booleans(),
)
def test_matches_reference_on_random_shapes(B, Lq, Lk, Hkv, group, D, window, causal, padded, **options):
    if causal and window is not None:
        window = (window[0], 0)
    mask = torch.rand(B, Lk) < 0.5 if padded else None
    sample = local_attention_sample(
        "", B, Lq, group * Hkv, D, Lk=Lk, Hkv=Hkv, window=window, causal=causal, attention_mask=mask, **options
    )
    check_against_reference(local_attention, local_attention_ref, sample, torch.float64)


@pytest.mark.parametrize("level", ["default", "avx2"])
def test_matches_on_older_cpus(level):
    """The comparisons above and below in a process of their own: torch reads the level once."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "matches_reference or golden"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": level}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_causal_window_and_last_queries_agree():
    q, k, v, bias = BY_NAME["window_causal_bias"].args
    expected = local_attention(q, k, v, bias, window=(3, 0))
    assert torch.equal(local_attention(q, k, v, bias, window=(3, 0), causal=True), expected)
    assert torch.equal(local_attention(q[:, 5:], k, v, bias, window=(3, 0)), expected[:, 5:])


def test_attention_mask_of_integers():
    sample = BY_NAME["padding"]
    mask = sample.kwargs["attention_mask"]
    kwargs = sample.kwargs | {"attention_mask": mask.long()}
    assert torch.equal(local_attention(*sample.args, **kwargs), local_attention(*sample.args, **sample.kwargs))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample):
    check_opcheck(OP, sample.args, sample.kwargs)


def forward_args(name):
    """q, k, v, bias, attention_mask, and left, right, scale."""
    sample = BY_NAME[name].map(torch.Tensor.detach)
    return (*sample.args, sample.kwargs.get("attention_mask")), (*sample.kwargs["window"], 0.5)


@pytest.mark.parametrize("name", ["window", "window_bias", "padding", "grouped_queries", "wide_values"])
def test_opcheck_forward(name):
    tensors, band = forward_args(name)
    check_opcheck(FORWARD, (*tensors, *band))


@pytest.mark.parametrize(
    ("name", "output_mask"),
    [
        ("window_bias", [True, True, True, True]),
        ("window_bias", [False, False, False, True]),
        ("window", [True, False, True, False]),
        ("padding", [False, True, False, False]),
        ("wide_values", [True, True, True, True]),
    ],
)
def test_opcheck_backward(name, output_mask):
    tensors, band = forward_args(name)
    out, lse = FORWARD(*tensors, *band)
    check_opcheck(BACKWARD, (torch.randn_like(out), *tensors, out, lse, *band, output_mask))


@pytest.mark.parametrize(
    "name",
    ["full_row_bias", "full_row_causal_bias", "window_bias", "more_queries", "grouped_queries", "hidden_queries"],
)
def test_gradcheck(name):
    check_gradients(local_attention, BY_NAME[name])


def test_second_derivative_is_refused():
    check_refuses_second_derivative(local_attention, BY_NAME["window_bias"], "local_attention")


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {"causal": True, "bias": True}),
        ("aot_eager", {}),
        ("inductor", {"window": (7, 0), "causal": True, "bias": True}),
    ],
)
def test_one_graph_serves_all_lengths(backend, options):
    samples = [local_attention_sample("", Lq=L, **options) for L in (5, 17, 64, 129)]
    check_compiles_once(local_attention, samples, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"B": 1, "H": 1, "window": (9, 0)}, {"H": 6, "Hkv": 2, "window": (3, 20)}, {"B": 1, "H": 1, "Lk": 333}],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(options, dtype, set_threads):
    sample = local_attention_sample("", Lq=300, bias=True, **options).to(dtype)
    check_same_bits(local_attention, sample, set_threads)


@pytest.mark.parametrize("L", [1, 2, 63, 64, 129, 1000, 1024, 4096])
def test_float32_precision(L):
    sample = local_attention_sample("", B=1, Lq=L, Lk=L + 1, D=16, window=(32, 32))
    assert max(relative_errors(local_attention, local_attention, sample, torch.float32)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("L", [2, 64, 129, 1000])
@pytest.mark.parametrize("window", [None, (16, 16), (64, 0)], ids=str)
def test_half_precision_is_as_good_as_naive_attention(window, L, dtype):
    sample = local_attention_sample("", Lq=L, D=32, window=window, bias=True)
    errors = relative_errors(local_attention, local_attention_ref, sample, dtype)
    naive_errors = relative_errors(local_attention_ref, local_attention_ref, sample, dtype)
    for error, naive_error in zip(errors, naive_errors, strict=True):
        assert error < 1.5 * naive_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_type(dtype):
    sample = BY_NAME["window_bias"].to(torch.float32)
    with torch.autocast("cpu", dtype):
        y, *gradients = run(local_attention, sample)
    expected, *expected_gradients = run(local_attention, sample.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(actual, gradient.float())


def test_inference_mode(set_threads):
    set_threads(2)
    sample = BY_NAME["padding"]
    with torch.inference_mode():
        y = local_attention(*sample.args, **sample.kwargs)
    assert y.is_inference()
    assert torch.equal(y, local_attention(*sample.args, **sample.kwargs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("hidden", "options"),
    [
        ([[0, 1, 2], [5, 6, 7, 8]], {"window": (1, 0), "attention_mask": padding((3, 9), (0, 4), length=9)}),
        ([[*range(9)], []], {"attention_mask": padding((4, 4), (0, 9), length=9)}),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], {"Lk": 5, "causal": True}),
        ([[0, 1, 2], [0, 1, 2]], {"Lk": 5, "window": (2, 1)}),
    ],
    ids=["padding", "whole_row", "queries_before_all_keys", "window_before_all_keys"],
)
def test_query_without_keys_gives_zero(hidden, options, dtype):
    sample = local_attention_sample("", bias=True, **options).to(dtype)
    y, grad_q, *other_gradients = run(local_attention, sample)
    for row, queries in enumerate(hidden):
        assert (y[row, queries] == 0).all()
        assert (grad_q[row, queries] == 0).all()
        assert (y[row, [i for i in range(9) if i not in queries]] != 0).all()
    assert all(value.isfinite().all() for value in (y, grad_q, *other_gradients))


def test_key_that_is_not_seen_gets_no_gradient():
    sample = BY_NAME["padding"]
    _, _, grad_k, grad_v, _ = run(local_attention, sample)
    hidden = ~sample.kwargs["attention_mask"]
    for gradient in (grad_k, grad_v):
        assert (gradient[hidden] == 0).all()
        assert (gradient[~hidden] != 0).any(-1).all()


def test_memory_is_linear():
    sample = local_attention_sample("", B=1, Lq=200_000, H=1, D=2, window=(60, 0), bias=True).to(torch.float32)
    assert peak_memory(lambda: run(local_attention, sample)) < 40 * 2**20  # (L, left + right + 1) is 46 MiB


def arguments(**changes):
    values = {"q": randn(2, 9, 4, 3), "k": randn(2, 7, 2, 3), "v": randn(2, 7, 2, 5)}
    return values | {"window": (3, 2), "bias": randn(4, 6), "attention_mask": torch.ones(2, 7).bool()} | changes


ERRORS = [
    (ValueError, {"q": randn(9, 4, 3)}, r"q has shape \[9, 4, 3\], expected \(B, Lq, H, D\)"),
    (ValueError, {"k": randn(7, 2, 3)}, r"k has shape \[7, 2, 3\], expected \(B, Lk, Hkv, D\)"),
    (ValueError, {"v": randn(7, 2, 5)}, r"v has shape \[7, 2, 5\], expected \(B, Lk, Hkv, Dv\)"),
    (ValueError, {"k": randn(1, 7, 2, 3)}, r"k has shape \[1, 7, 2, 3\], expected 2 in dimension 0 of"),
    (ValueError, {"k": randn(2, 7, 2, 4)}, r"k has shape \[2, 7, 2, 4\], expected 3 in dimension 3 of"),
    (ValueError, {"v": randn(2, 8, 2, 5)}, r"v has shape \[2, 8, 2, 5\], expected 7 in dimension 1 of"),
    (ValueError, {"v": randn(2, 7, 4, 5)}, r"v has shape \[2, 7, 4, 5\], expected 2 in dimension 2 of"),
    (ValueError, {"q": randn(2, 9, 3, 3)}, r"k has 2 heads, expected a divisor of the 3 heads of q"),
    (ValueError, {"bias": randn(6)}, r"bias has shape \[6\], expected \(H, left \+ right \+ 1\)"),
    (ValueError, {"bias": randn(4, 5)}, r"bias has shape \[4, 5\], expected 6 in dimension 1 of \(H, left \+ right"),
    (ValueError, {"bias": randn(2, 6)}, r"bias has shape \[2, 6\], expected 4 in dimension 0 of"),
    (ValueError, {"window": None}, r"bias has shape \[4, 6\], expected 15 in dimension 1 of \(H, Lq \+ Lk - 1\)"),
    (ValueError, {"attention_mask": torch.ones(7).bool()}, r"attention_mask has shape \[7\], expected \(B, Lk\)"),
    (ValueError, {"attention_mask": torch.ones(2, 9).bool()}, r"attention_mask has shape \[2, 9\], expected 7 in"),
    (ValueError, {"window": (-1, 2)}, r"window is \[-1, 2\], expected \(left, right\), both 0 or more"),
    (ValueError, {"window": (2**63 - 1, 0)}, r"window is \[9223372036854775807, 0\], expected at most 1099511627776"),
    (ValueError, {"window": (1, 2, 3)}, r"window is \[1, 2, 3\], expected \(left, right\), both 0 or more"),
    (ValueError, {"causal": True}, r"causal is true with window \[3, 2\], expected a window whose right is 0"),
    (TypeError, {"window": (1.5, 1)}, r"window is \(1.5, 1\), expected \(left, right\), two ints, or None"),
    (TypeError, {"window": 3}, r"window is 3, expected \(left, right\), two ints, or None"),
    (TypeError, {"q": torch.ones(2, 9, 4, 3).long()}, r"q is Long, expected float64, float32, float16 or bfloat16"),
    (TypeError, {"k": randn(2, 7, 2, 3).float()}, r"k is Float, expected Double, the dtype of q"),
    (TypeError, {"v": randn(2, 7, 2, 5).bfloat16()}, r"v is BFloat16, expected Double, the dtype of q"),
    (TypeError, {"bias": randn(4, 6).float()}, r"bias is Float, expected Double, the dtype of q"),
    (TypeError, {"attention_mask": torch.ones(2, 7)}, r"attention_mask is Float, expected bool, true at real keys"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("error", "change", "message"), ERRORS)
def test_errors(error, change, message, device):
    values = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments(**change).items()}
    with pytest.raises(error, match=f"^local_attention: {message}"):
        local_attention(**values)


@pytest.mark.parametrize("name", ["k", "v", "bias", "attention_mask"])
def test_another_device_is_refused(name):
    with pytest.raises(ValueError, match=f"^local_attention: {name} is on meta, expected cpu, the device of q"):
        local_attention(**arguments(**{name: arguments()[name].to("meta")}))


@pytest.mark.parametrize(
    "name",
    ["L33_R7_h2_d16_causal0_bias0_pad1", "L50_R7_h2_d16_causal1_bias1_pad0", "L64_R15_h4_d32_causal0_bias1_pad1"],
)
def test_golden(name, load_golden):
    """A layer whose tensors are (L, B, D); its padded queries are not compared."""
    tensors, config = load_golden(f"local_attention_{name}")
    parameters = {k.removeprefix("state."): leaf(t) for k, t in tensors.items() if k.startswith("state.")}
    x = leaf(tensors["x"])
    window = (config["local_radius"], 0 if config["causal"] else config["local_radius"])
    q, k, v = ((x.transpose(0, 1) @ parameters[f"{n}.weight"].T).unflatten(-1, (config["heads"], -1)) for n in "qkv")
    bias = None
    if "relative_attention_bias.weight" in parameters:
        position = RelativePositionBias(config["heads"])
        bias = torch.func.functional_call(position, {"weight": parameters["relative_attention_bias.weight"]}, window)
    out = local_attention(q, k, v, bias, window=window, attention_mask=tensors["keep"])
    y = (out.flatten(-2) @ parameters["o.weight"].T).transpose(0, 1)

    valid = tensors["keep"].T
    assert_close(y[valid], tensors["y"][valid], **TOLERANCES[torch.float64])
    gradients = torch.autograd.grad(y[valid], [x, *parameters.values()], tensors["g"][valid])
    for key, gradient in zip(["grad_x", *(f"grad.{name}" for name in parameters)], gradients, strict=True):
        assert_close(gradient, tensors[key], **TOLERANCES[torch.float64], msg=lambda text, key=key: f"{key}: {text}")
