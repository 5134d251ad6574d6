import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spade_ext.ops import long_conv, long_conv_ref

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
from .sample_inputs import Sample, constant, leaf, long_conv_sample, long_conv_samples, randn, segments

SAMPLES = long_conv_samples()
BY_NAME = {sample.name: sample for sample in SAMPLES}
OP = torch.ops.spade_ext.long_conv.default
BACKWARD = torch.ops.spade_ext.long_conv_backward.default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample, dtype):
    check_against_reference(long_conv, long_conv_ref, sample, dtype)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    B=st.integers(0, 10),
    C=st.integers(0, 3),
    H=st.integers(0, 18),
    L=st.integers(0, 70),
    Lk=st.integers(0, 90),
    Lr=st.none() | st.integers(0, 90),
    skip=st.booleans(),
    channels=st.booleans(),
    transposed=st.booleans(),
    documents=st.integers(1, 9),
)
def test_matches_reference_on_random_shapes(B, C, H, L, transposed, documents, **options):
    u = leaf(randn(B, L, H).mT) if transposed else randn(B, H, L)
    ids = None if documents == 1 else torch.randint(documents, (B, L)).sort(1).values
    sample = long_conv_sample("", B, C, H, L, u=u, segment_ids=ids, **options)
    check_against_reference(long_conv, long_conv_ref, sample, torch.float64)


def test_long_sequence_matches_numpy():
    u, k, skip, k_reverse, _ = long_conv_sample("", B=1, C=1, H=1, L=4096, Lr=4096).map(torch.Tensor.detach).args
    signal, kernel, reverse = (t.flatten().numpy() for t in (u, k, k_reverse))
    causal = np.convolve(signal, kernel)[:4096]
    ahead = np.convolve(signal[::-1], np.concatenate(([0], reverse)))[:4096][::-1]
    expected = torch.from_numpy(causal + ahead) + skip.item() * u.flatten()
    assert_close(long_conv(u, k, skip, k_reverse).flatten(), expected, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample):
    check_opcheck(OP, sample.args)


@pytest.mark.parametrize(
    ("name", "output_mask"),
    [
        ("two_sided", [True, True, True, True]),
        ("two_sided", [False, True, False, True]),
        ("transposed", [True, False, False, False]),
        ("plain", [True, True, False, False]),
        ("segments", [True, True, True, True]),
    ],
)
def test_opcheck_backward(name, output_mask):
    args = BY_NAME[name].map(torch.Tensor.detach).args
    check_opcheck(BACKWARD, (torch.randn_like(long_conv(*args)), *args, output_mask))


@pytest.mark.parametrize(
    "name", ["two_sided", "without_channels", "short_kernels", "transposed_without_channels", "segments"]
)
def test_gradcheck(name):
    check_gradients(long_conv, BY_NAME[name])


def test_second_derivative_is_refused():
    check_refuses_second_derivative(long_conv, BY_NAME["two_sided"], "long_conv")


@pytest.mark.parametrize(
    ("backend", "transposed", "packed"),
    [("aot_eager", False, False), ("aot_eager", True, True), ("inductor", False, True)],
)
def test_one_graph_serves_all_lengths(backend, transposed, packed):
    def sample(L):
        u = leaf(randn(2, L, 3).mT) if transposed else randn(2, 3, L)
        ids = torch.arange(L).repeat(2, 1) // (L // 2) if packed else None
        return long_conv_sample("", L=L, Lr=L, u=u, segment_ids=ids)

    check_compiles_once(long_conv, [sample(L) for L in (5, 17, 64, 129)], backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [{"B": 9, "C": 3, "H": 1, "L": 5000}, {"B": 1, "C": 1, "H": 1, "L": 40000}, {"B": 10, "H": 37, "L": 129}]
)
def test_same_bits_for_any_number_of_threads(shape, dtype, set_threads):
    check_same_bits(long_conv, long_conv_sample("", **shape, Lr=shape["L"]).to(dtype), set_threads)


@pytest.mark.parametrize("C", [1, 2])
def test_packed_documents_are_those_alone(C):
    lengths = (129, 1, 64, 63, 100, 129)
    u, *kernels, _ = long_conv_sample("", B=1, C=C, H=37, L=sum(lengths), Lr=129).to(torch.float32).args
    packed = long_conv(u, *kernels, segments(lengths))
    for document, y in zip(u.split(lengths, -1), packed.split(lengths, -1), strict=True):
        torch.testing.assert_close(y, long_conv(document, *kernels), rtol=0, atol=2e-5)


@pytest.mark.parametrize("L", [1, 2, 3, 5, 63, 64, 129, 1024, 1100, 1500, 4096, 16384])  # 2^a, 3 2^a and 5 2^a
def test_float32_precision(L):
    sample = long_conv_sample("", L=L, Lr=L)
    assert max(relative_errors(long_conv, long_conv, sample, torch.float32)) < 2e-6


def test_layout_does_not_change_the_numbers():
    contiguous = long_conv_sample("", B=5, H=37, L=70, Lr=70).to(torch.float32)
    u, *kernels = contiguous.args
    for strided in (u.mT.contiguous().mT, u.repeat_interleave(2, -1)[..., ::2], torch.cat((u, u), 1)[:, :37]):
        sample = Sample("", (leaf(strided), *kernels))
        assert all(map(torch.equal, run(long_conv, sample), run(long_conv, contiguous)))


def test_autocast_runs_in_float32():
    sample = BY_NAME["two_sided"].to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, *gradients = run(long_conv, sample)
    expected, *expected_gradients = run(long_conv, sample.to(torch.float32))
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(actual, gradient.bfloat16())


def test_inference_mode(set_threads):
    set_threads(2)
    sample = long_conv_sample("", H=37, Lr=8)
    with torch.inference_mode():
        y = long_conv(*sample.args)
    assert y.is_inference()
    assert torch.equal(y, long_conv(*sample.args))


def test_result_has_the_layout_of_u():
    u, k = constant(2, 5, 20), constant(3, 5, 20)
    transposed = u.mT.contiguous().mT
    assert long_conv(u, k).is_contiguous()
    assert long_conv(u[..., ::2], k).is_contiguous()
    assert long_conv(transposed, k).stride() == (300, 5, 1, 15)
    assert long_conv(transposed, k[0]).stride() == transposed.stride()


def test_gradient_of_u_has_the_layout_of_u():
    u = leaf(randn(2, 20, 5).mT)
    (gradient,) = torch.autograd.grad(long_conv(u, randn(3, 5, 20)).sum(), u)
    assert gradient.stride() == u.stride()


def test_memory_is_linear():
    sample = long_conv_sample("", B=1, C=1, H=16, L=50_000, Lr=50_000).to(torch.float32)
    assert peak_memory(lambda: run(long_conv, sample)) < 100 * 2**20  # 32 numbers a token and channel


def arguments(**changes):
    return {"u": randn(2, 3, 8), "k": randn(4, 3, 8), "skip": randn(4, 3), "k_reverse": randn(4, 3, 5)} | changes


ERRORS = [
    (ValueError, {"u": randn(3, 8)}, r"u has shape \[3, 8\], expected \(B, H, L\)"),
    (ValueError, {"k": randn(8)}, r"k has shape \[8\], expected \(C, H, Lk\) or \(H, Lk\)"),
    (ValueError, {"k": randn(4, 2, 8)}, r"k has shape \[4, 2, 8\], expected 3 in dimension -2 of \(C, H, Lk\)"),
    (ValueError, {"skip": randn(3)}, r"skip has shape \[3\], expected \(C, H\)"),
    (ValueError, {"skip": randn(4, 2)}, r"skip has shape \[4, 2\], expected 3 in dimension -1 of \(C, H\)"),
    (ValueError, {"skip": randn(1, 3)}, r"skip has shape \[1, 3\], expected 4 in dimension 0 of \(C, H\)"),
    (ValueError, {"k": randn(3, 8)}, r"k_reverse has shape \[4, 3, 5\], expected \(H, Lk\)"),
    (ValueError, {"k_reverse": randn(1, 3, 5)}, r"k_reverse has shape \[1, 3, 5\], expected 4 in dimension 0 of"),
    (TypeError, {"u": randn(2, 3, 8).half()}, r"u is Half, expected float32 or float64"),
    (TypeError, {"k": randn(4, 3, 8).float()}, r"k is Float, expected Double, the dtype of u"),
    (TypeError, {"segment_ids": torch.ones(2, 8)}, r"segment_ids is Float, expected integers"),
    (ValueError, {"segment_ids": torch.ones(8).long()}, r"segment_ids has shape \[8\], expected \(B, L\)"),
    (
        ValueError,
        {"segment_ids": torch.ones(2, 7).long()},
        r"segment_ids has shape \[2, 7\], expected 8 in",
    ),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("error", "change", "message"), ERRORS)
def test_errors(error, change, message, device):
    with pytest.raises(error, match=f"^long_conv: {message}"):
        long_conv(**{name: t.to(device) for name, t in arguments(**change).items()})


@pytest.mark.parametrize("name", ["k", "skip", "k_reverse", "segment_ids"])
def test_another_device_is_refused(name):
    given = arguments(segment_ids=torch.ones(2, 8).long())
    with pytest.raises(ValueError, match=f"^long_conv: {name} is on meta, expected cpu, the device of u"):
        long_conv(**given | {name: given[name].to("meta")})
