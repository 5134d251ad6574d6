import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spade_ext.ops import (
    diagonal_kernel,
    diagonal_scan,
    diagonal_scan_ref,
    diagonal_step,
    diagonal_step_ref,
    long_conv,
)

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
from .sample_inputs import (
    diagonal_scan_sample,
    diagonal_scan_samples,
    diagonal_step_sample,
    diagonal_step_samples,
    leaf,
    randn,
    segments,
)

SAMPLES = diagonal_scan_samples()
BY_NAME = {sample.name: sample for sample in SAMPLES}
STEP_SAMPLES = diagonal_step_samples()
SCAN = torch.ops.spade_ext.diagonal_scan.default
BACKWARD = torch.ops.spade_ext.diagonal_scan_backward.default
STEP = torch.ops.spade_ext.diagonal_step.default
DISCS = ["zoh", "bilinear", None]
KINDS = [(disc, real) for disc in DISCS for real in (False, True)]


def check_float32(sample):
    """To the precision that README.md of the family promises."""
    error, state_error, *gradient_errors = relative_errors(diagonal_scan, diagonal_scan_ref, sample, torch.float32)
    assert max(error, state_error) < 1e-5
    assert all(error < 1e-4 for error in gradient_errors)


def and_state(step):
    """A step that writes a copy of the state and returns it too."""

    def call(u, w, b, c, log_dt, state, **options):
        state = state.clone()
        return step(u, w, b, c, log_dt, state, **options), state

    return call


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_scan_matches_reference(sample):
    check_against_reference(diagonal_scan, diagonal_scan_ref, sample, torch.float64)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_scan_matches_reference_in_float32(sample):
    check_float32(sample)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sample", STEP_SAMPLES, ids=str)
def test_step_matches_reference(sample, dtype):
    check_against_reference(and_state(diagonal_step), and_state(diagonal_step_ref), sample, dtype)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    L=st.integers(0, 300),
    B=st.integers(0, 3),
    C=st.integers(0, 3),
    N=st.integers(0, 17),
    S=st.integers(1, 3),
    channels_a_copy=st.integers(0, 6),
    disc=st.sampled_from(DISCS),
    real=st.booleans(),
    with_state=st.booleans(),
    with_skip=st.booleans(),
    transposed=st.booleans(),
    bidirectional=st.booleans(),
    documents=st.integers(1, 9),
)
def test_scan_matches_reference_on_random_shapes(
    L, B, C, N, S, channels_a_copy, with_skip, transposed, documents, **options
):
    H = channels_a_copy * S
    options["segment_ids"] = None if documents == 1 else torch.randint(documents, (B, L)).sort(1).values
    u = leaf(randn(B, L, H).mT) if transposed else randn(B, H, L)
    sample = diagonal_scan_sample("", L, B, C, H, N, S, u=u, skip=randn(C, H) if with_skip else None, **options)
    check_against_reference(diagonal_scan, diagonal_scan_ref, sample, torch.float64)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    B=st.integers(0, 5),
    C=st.integers(0, 3),
    N=st.integers(0, 18),
    S=st.integers(1, 3),
    channels_a_copy=st.integers(0, 4),
    disc=st.sampled_from(DISCS),
    real=st.booleans(),
)
def test_step_matches_reference_on_random_shapes(B, C, N, S, channels_a_copy, **options):
    H = channels_a_copy * S
    sample = diagonal_step_sample("", B, C, H, N, S, **options)
    check_against_reference(and_state(diagonal_step), and_state(diagonal_step_ref), sample, torch.float64)


@pytest.mark.parametrize(("disc", "real"), KINDS)
def test_scan_from_zeros_is_the_convolution(disc, real):
    def scan(*args, **options):
        return diagonal_scan(*args, **options)[0]

    def convolution(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids):
        b = b.repeat(c.size(1) // b.size(0), *(1,) * (b.dim() - 1))
        product = b * c if real else torch.view_as_real(torch.view_as_complex(b) * torch.view_as_complex(c))
        return long_conv(u, diagonal_kernel(w, product, log_dt, u.size(-1), disc=disc), segment_ids=segment_ids)

    for segment_ids in (None, segments((150, 50), (3, 197))):
        sample = diagonal_scan_sample("", 200, disc=disc, real=real, with_state=False, segment_ids=segment_ids)
        check_against_reference(scan, convolution, sample, torch.float64)


@pytest.mark.parametrize(("disc", "real"), KINDS)
def test_scan_is_steps(disc, real):
    u, *parameters, state, _ = diagonal_scan_sample("", 70, disc=disc, real=real, grad=False).args
    y, final_state = diagonal_scan(u, *parameters, state, disc=disc)
    outputs = [diagonal_step(u_t, *parameters, state, disc=disc) for u_t in u.unbind(-1)]
    assert_close(torch.stack(outputs, -1), y, **TOLERANCES[torch.float64])
    assert_close(state, final_state, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("cuts", [(0,), (1,), (64,), (150,), (63, 65), (10, 10, 100, 149)], ids=str)
@pytest.mark.parametrize(("disc", "real"), KINDS)
def test_pieces_are_the_whole(disc, real, cuts):
    """Outputs, final state and all gradients."""

    def in_pieces(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids):
        outputs = []
        for piece in u.tensor_split(cuts, -1):
            y, state = diagonal_scan(piece, w, b, c, log_dt, state, skip, disc=disc)
            outputs.append(y)
        return torch.cat(outputs, -1), state

    sample = diagonal_scan_sample("", 150, disc=disc, real=real, skip=randn(2, 4))
    check_against_reference(in_pieces, diagonal_scan, sample, torch.float64)


def test_length_0_returns_a_copy_of_the_state():
    *arguments, state, _ = diagonal_scan_sample("", 0, grad=False).args
    y, final_state = diagonal_scan(*arguments, state)
    assert y.shape == (2, 2, 4, 0)
    assert torch.equal(final_state, state)
    assert final_state.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output(output):
    sample = BY_NAME["zoh"]
    check_against_reference(
        lambda *args, **options: diagonal_scan(*args, **options)[output],
        lambda *args, **options: diagonal_scan_ref(*args, **options)[output],
        sample,
        torch.float64,
    )


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck_scan(sample):
    check_opcheck(SCAN, (*sample.args, *sample.kwargs.values()))


@pytest.mark.parametrize("sample", STEP_SAMPLES, ids=str)
def test_opcheck_step(sample):
    check_opcheck(STEP, (*sample.args, sample.kwargs["disc"]))


@pytest.mark.parametrize(
    ("name", "output_mask"),
    [
        ("zoh", [True] * 6 + [False]),
        ("bilinear", [False, True, False, True, False, True, False]),
        ("none", [True, False, True, False, False, True, False]),
        ("real_zoh", [True] * 6 + [False]),
        ("without_state", [True] * 5 + [False] * 2),
        ("transposed", [True] + [False] * 6),
        ("skip", [False] * 6 + [True]),
        ("bidirectional_real", [True] * 4 + [False] + [True] * 2),
        ("segments", [True] * 6 + [False]),
    ],
)
def test_opcheck_backward(name, output_mask):
    sample = BY_NAME[name].map(torch.Tensor.detach)
    cotangents = map(torch.randn_like, diagonal_scan(*sample.args, **sample.kwargs))
    check_opcheck(BACKWARD, (*cotangents, *sample.args, *sample.kwargs.values(), output_mask))


@pytest.mark.parametrize(
    "name",
    [
        *("zoh", "bilinear", "none", "real_zoh", "real_bilinear", "real_none", "without_state", "transposed", "skip"),
        *("length_16", "bidirectional", "bidirectional_without_state", "segments"),
    ],
)
def test_gradcheck(name):
    check_gradients(diagonal_scan, BY_NAME[name])


def test_second_derivative_is_refused():
    check_refuses_second_derivative(diagonal_scan, BY_NAME["zoh"], "diagonal_scan")


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {"disc": "bilinear", "with_state": False}),
        ("aot_eager", {"disc": None, "real": True, "packed": True}),
        ("inductor", {}),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_one_graph_serves_all_lengths(backend, options, transposed):
    packed = options.get("packed", False)
    options = {name: value for name, value in options.items() if name != "packed"}

    def sample(L):
        u = leaf(randn(2, L, 4).mT) if transposed else randn(2, 4, L)
        ids = torch.arange(L).repeat(2, 1) // (L // 2) if packed else None
        return diagonal_scan_sample("", L, u=u, segment_ids=ids, **options)

    check_compiles_once(diagonal_scan, [sample(L) for L in (7, 17, 64, 129)], backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_write_the_state(backend):
    def two_steps(u, w, b, c, log_dt, first, second):
        y = diagonal_step(u, w, b, c, log_dt, first)
        return y + diagonal_step(u + 1, w, b, c, log_dt, second), first * 2

    compiled = torch.compile(two_steps, fullgraph=True, dynamic=True, backend=backend)
    for B in (3, 6):
        *arguments, state = diagonal_step_sample("", B=B).args
        states, expected_states = ([state.clone(), -state] for _ in range(2))
        for actual, expected in zip(
            compiled(*arguments, *states), two_steps(*arguments, *expected_states), strict=True
        ):
            assert_close(actual, expected)
        for actual, expected in zip(states, expected_states, strict=True):
            assert_close(actual, expected)
            assert not torch.equal(actual.abs(), state.abs())


def test_step_on_a_view_writes_this_part():
    *arguments, state = diagonal_step_sample("").args
    layers = torch.stack((state, state, state), 2)
    diagonal_step(*arguments, layers[:, :, 1])
    diagonal_step(*arguments, after := state.clone())
    assert torch.equal(layers, torch.stack((state, after, state), 2))


def test_step_raises_the_version_of_the_state():
    *arguments, state = diagonal_step_sample("").args
    version = state._version
    diagonal_step(*arguments, state)
    assert state._version == version + 1


def test_state_that_autograd_has_saved_is_not_overwritten_unseen():
    *arguments, state = diagonal_step_sample("").args
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (weight * state).sum()
    diagonal_step(*arguments, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("index", "name"), list(enumerate(("u", "w", "b", "c", "log_dt", "state"))))
def test_step_refuses_gradients(index, name):
    arguments = list(diagonal_step_sample("").args)
    arguments[index].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^diagonal_step: {name} requires a gradient, expected none:"):
        diagonal_step(*arguments)
    before = arguments[-1].detach().clone()
    with torch.no_grad():
        assert not diagonal_step(*arguments).requires_grad
    assert not torch.equal(arguments[-1], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"B": 3, "C": 1, "H": 1, "S": 1},
        {"C": 3, "H": 2, "S": 1},
        {"H": 36, "S": 4},
        {"B": 5, "H": 18, "S": 2, "bidirectional": True},
        {"H": 18, "S": 2, "segment_ids": segments((130, 300, 70), (1, 499))},
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(shape, dtype, set_threads):
    check_same_bits(diagonal_scan, diagonal_scan_sample("", 500, **shape).to(dtype), set_threads)


def test_steps_have_the_same_bits_for_any_number_of_threads(set_threads):
    sample = diagonal_step_sample("", B=7, H=36, S=4)
    check_same_bits(and_state(diagonal_step), sample, set_threads)


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("L", [1, 64, 1000, 4096, 16384])
def test_float32_precision(L, disc):
    check_float32(diagonal_scan_sample("", L, B=1, C=1, H=2, N=32, disc=disc))


@pytest.mark.parametrize("real", [False, True])
def test_float32_precision_of_a_long_memory(real):
    """Constant inputs and memories of up to 1e6 tokens: with a rounded abar, or states that are too, errors add up."""
    decay, weight = -torch.logspace(-6, 0, 7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    w, weight = ((x if real else torch.stack((x, y), -1))[None] for x, y in ((decay, 0 * decay), (weight, weight / 2)))
    u = torch.ones(1, 1, 16384, dtype=torch.float64)
    values = {"u": u, "w": w, "b": weight, "c": weight[None], "log_dt": None, "state": 100 * weight[None]}
    check_float32(
        diagonal_scan_sample(
            "", disc=None, **{name: value if value is None else leaf(value) for name, value in values.items()}
        )
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("log_dt", [-12.0, 0.0, 12.0])
@pytest.mark.parametrize(("disc", "real"), KINDS)
def test_extreme_parameters_stay_finite(disc, real, log_dt, dtype):
    size = torch.tensor([0.0, 1e-8, 1e-4, 1.0, 1e4], dtype=torch.float64)
    decay, frequency = torch.meshgrid(-size, torch.cat((-size, size)), indexing="ij")
    w = (-size if real else torch.stack((decay, frequency), -1).view(-1, 2))[None]
    full = {"u": (1, 1, 300), "b": w.shape, "c": (1, *w.shape), "state": (1, *w.shape), "log_dt": (1,)}
    values = {name: torch.full(shape, 1e4, dtype=torch.float64).requires_grad_() for name, shape in full.items()}
    values |= {"w": leaf(w), "log_dt": None if disc is None else leaf(torch.full_like(values["log_dt"], log_dt))}
    order = ("u", "w", "b", "c", "log_dt", "state")
    sample = diagonal_scan_sample("", disc=disc, **{name: values[name] for name in order})
    for value in run(diagonal_scan, sample.to(dtype)):
        assert value.isfinite().all()


def test_autocast_runs_in_float32():
    sample = BY_NAME["zoh"].to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state, *gradients = run(diagonal_scan, sample)
    expected, expected_state, *expected_gradients = run(diagonal_scan, sample.to(torch.float32))
    assert y.dtype == state.dtype == torch.float32
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(actual, gradient.bfloat16())


def test_autocast_steps_in_float32():
    *arguments, state = diagonal_step_sample("").to(torch.float32).args
    u, *parameters = (t.bfloat16() for t in arguments)
    expected_state = state.clone()
    expected = diagonal_step(u.float(), *(t.float() for t in parameters), expected_state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(diagonal_step(u, *parameters, state), expected)
        assert torch.equal(state, expected_state)
        with pytest.raises(TypeError, match="^diagonal_step: state is BFloat16, expected Float, the dtype of w"):
            diagonal_step(u, *parameters, state.bfloat16())


def test_inference_mode(set_threads):
    set_threads(2)
    sample = BY_NAME["zoh"]
    with torch.inference_mode():
        results = diagonal_scan(*sample.args, **sample.kwargs)
    for actual, expected in zip(results, diagonal_scan(*sample.args, **sample.kwargs), strict=True):
        assert actual.is_inference()
        assert torch.equal(actual, expected)


def test_steps_in_inference_mode():
    *arguments, state = diagonal_step_sample("").args
    expected = diagonal_step(*arguments, expected_state := state.clone())
    with torch.inference_mode():
        for inner in (state.clone(), state):
            assert torch.equal(diagonal_step(*arguments, inner), expected)
            assert torch.equal(inner, expected_state)


def test_results_have_the_layout_of_u():
    u, *parameters, state, _ = diagonal_scan_sample("", 20).args
    transposed = leaf(u.mT.contiguous().mT)
    y, final_state = diagonal_scan(transposed, *parameters, leaf(state.transpose(0, 1).contiguous().transpose(0, 1)))
    assert y.stride() == (160, 4, 1, 8)
    assert final_state.is_contiguous()
    (gradient,) = torch.autograd.grad(y.sum(), transposed)
    assert gradient.stride() == transposed.stride()
    assert diagonal_scan(u, *parameters)[0].is_contiguous()
    assert diagonal_scan(u[..., ::2], *parameters)[0].is_contiguous()


def test_memory_does_not_hold_all_states():
    sample = diagonal_scan_sample("", 200_000, B=1, C=1, H=1, N=64, S=1).to(torch.float32)
    assert peak_memory(lambda: run(diagonal_scan, sample)) < 20 * 2**20  # L N float32 pairs are 98 MiB


def arguments(**changes):
    values = {"u": randn(2, 4, 8), "w": randn(2, 5, 2), "b": randn(2, 5, 2), "c": randn(3, 4, 5, 2)}
    return values | {"log_dt": randn(4), "state": randn(2, 4, 5, 2)} | changes


def scan_arguments(**changes):
    return arguments(skip=randn(3, 4)) | changes


REALS = {"w": randn(2, 5), "b": randn(2, 5), "c": randn(3, 4, 5), "state": randn(2, 4, 5)}
ERRORS = [
    (ValueError, {"w": randn(5)}, r"w has shape \[5\], expected \(S, N, 2\) or \(S, N\)"),
    (ValueError, {"w": randn(3, 5, 2)}, r"w has 3 copies S, expected a divisor of the number of channels H = 4 of c"),
    (ValueError, {"b": randn(5, 2)}, r"b has shape \[5, 2\], expected \(S, N, 2\)"),
    (ValueError, {"b": randn(1, 5, 2)}, r"b has shape \[1, 5, 2\], expected 2 in dimension 0 of \(S, N, 2\)"),
    (ValueError, {"b": randn(2, 6, 2)}, r"b has shape \[2, 6, 2\], expected 5 in dimension 1 of \(S, N, 2\)"),
    (ValueError, REALS | {"b": randn(2, 5, 2)}, r"b has shape \[2, 5, 2\], expected \(S, N\)"),
    (ValueError, {"c": randn(4, 5, 2)}, r"c has shape \[4, 5, 2\], expected \(C, H, N, 2\)"),
    (ValueError, {"log_dt": None}, r"log_dt is None and disc is zoh, expected both or neither"),
    (ValueError, {"disc": None}, r"log_dt is given and disc is None, expected both or neither"),
    (ValueError, {"disc": "euler"}, r"disc is 'euler', expected 'zoh', 'bilinear' or None"),
    (ValueError, {"disc": "dss"}, r"disc is 'dss', expected 'zoh', 'bilinear' or None \('dss' depends on the whole"),
    (ValueError, {"state": randn(2, 4, 5)}, r"state has shape \[2, 4, 5\], expected \(B, H, N, 2\)"),
    (ValueError, {"state": randn(3, 4, 5, 2)}, r"state has shape \[3, 4, 5, 2\], expected 2 in dimension 0 of"),
    (ValueError, {"state": randn(2, 1, 5, 2)}, r"state has shape \[2, 1, 5, 2\], expected 4 in dimension 1 of"),
    (ValueError, {"state": randn(2, 4, 6, 2)}, r"state has shape \[2, 4, 6, 2\], expected 5 in dimension 2 of"),
    (ValueError, {"state": randn(2, 4, 5, 1)}, r"state has shape \[2, 4, 5, 1\], expected 2 in dimension 3 of"),
    (ValueError, REALS | {"state": randn(2, 4, 5, 2)}, r"state has shape \[2, 4, 5, 2\], expected \(B, H, N\)"),
    (TypeError, {"w": randn(2, 5, 2).half()}, r"w is Half, expected float32 or float64"),
    (TypeError, {"b": randn(2, 5, 2).float()}, r"b is Float, expected Double, the dtype of w"),
    (TypeError, {"c": randn(3, 4, 5, 2).float()}, r"c is Float, expected Double, the dtype of w"),
    (TypeError, {"log_dt": randn(4).float()}, r"log_dt is Float, expected Double, the dtype of w"),
    (TypeError, {"state": randn(2, 4, 5, 2).float()}, r"state is Float, expected Double, the dtype of w"),
]
SCAN_ERRORS = [
    (ValueError, {"u": randn(2, 4)}, r"u has shape \[2, 4\], expected \(B, H, L\)"),
    (ValueError, {"u": randn(2, 5, 8)}, r"u has shape \[2, 5, 8\], expected 4 in dimension 1 of \(B, H, L\)"),
    (TypeError, {"u": randn(2, 4, 8).float()}, r"u is Float, expected Double, the dtype of w"),
    (ValueError, {"skip": randn(4)}, r"skip has shape \[4\], expected \(C, H\)"),
    (ValueError, {"skip": randn(2, 4)}, r"skip has shape \[2, 4\], expected 3 in dimension 0 of \(C, H\)"),
    (ValueError, {"skip": randn(3, 5)}, r"skip has shape \[3, 5\], expected 4 in dimension 1 of \(C, H\)"),
    (TypeError, {"skip": randn(3, 4).float()}, r"skip is Float, expected Double, the dtype of w"),
    (TypeError, {"segment_ids": torch.ones(2, 8)}, r"segment_ids is Float, expected integers"),
    (
        ValueError,
        {"segment_ids": torch.ones(2, 9).long()},
        r"segment_ids has shape \[2, 9\], expected 8 in dimension 1",
    ),
    (ValueError, {"bidirectional": True}, r"c has 4 channels, expected 8, two for each of u, as bidirectional is True"),
]
STEP_ERRORS = [
    (ValueError, {"u": randn(2, 4, 8)}, r"u has shape \[2, 4, 8\], expected \(B, H\)"),
    (ValueError, {"u": randn(2, 5)}, r"u has shape \[2, 5\], expected 4 in dimension 1 of \(B, H\)"),
    (TypeError, {"u": randn(2, 4).float()}, r"u is Float, expected Double, the dtype of w"),
]


def on(device, values):
    return {name: v.detach().to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("error", "change", "message"), ERRORS + SCAN_ERRORS)
def test_scan_errors(error, change, message, device):
    with pytest.raises(error, match=f"^diagonal_scan: {message}"):
        diagonal_scan(**on(device, scan_arguments(**change)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("error", "change", "message"), ERRORS + STEP_ERRORS)
def test_step_errors(error, change, message, device):
    with pytest.raises(error, match=f"^diagonal_step: {message}"):
        diagonal_step(**on(device, arguments(**{"u": randn(2, 4)} | change)))


@pytest.mark.parametrize("name", ["u", "b", "c", "log_dt", "state", "skip"])
def test_another_device_is_refused(name):
    with pytest.raises(ValueError, match=f"^diagonal_scan: {name} is on meta, expected cpu, the device of w"):
        diagonal_scan(**scan_arguments(**{name: scan_arguments()[name].to("meta")}))
