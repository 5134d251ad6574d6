import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spade_ext.nn.hippo import dplr
from spade_ext.ops import long_conv, s4_kernel, s4_kernel_ref, s4_state, s4_state_ref, s4_step, s4_step_ref

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
    relative_error,
    relative_errors,
    run,
)
from .sample_inputs import (
    Sample,
    constant,
    copy_strided,
    leaf,
    randn,
    s4_kernel_sample,
    s4_kernel_samples,
    s4_parameters,
    s4_state_sample,
    s4_state_samples,
    s4_step_sample,
    s4_step_samples,
)

SAMPLES = s4_kernel_samples()
BY_NAME = {sample.name: sample for sample in SAMPLES}
STATE_SAMPLES, STEP_SAMPLES = s4_state_samples(), s4_step_samples()
OPS = torch.ops.spade_ext
EXACT = TOLERANCES[torch.float64]


def stepped(step):
    """A step that works on a copy of the state and returns y and the new state in one row."""

    def call(*args):
        state = copy_strided(args[-1], args[-1].dtype)
        return torch.cat((step(*args[:-1], state).flatten(), state.flatten()))

    return call


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_kernel_matches_reference(sample, dtype):
    check_against_reference(s4_kernel, s4_kernel_ref, sample, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sample", STATE_SAMPLES, ids=str)
def test_state_matches_reference(sample, dtype):
    check_against_reference(s4_state, s4_state_ref, sample, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sample", STEP_SAMPLES, ids=str)
def test_step_matches_reference(sample, dtype):
    check_against_reference(stepped(s4_step), stepped(s4_step_ref), sample, dtype)


SIZES = {
    "C": st.integers(0, 3),
    "N": st.integers(0, 9),
    "S": st.integers(1, 3),
    "R": st.integers(0, 3),
    "channels_a_copy": st.integers(0, 3),
}


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    length=st.integers(0, 140),
    nodes=st.integers(1, 140),
    M=st.integers(0, 3),
    rate=st.sampled_from([1.0, 0.5, 1.5, 2.0, 3.0]),
    **SIZES,
)
def test_kernel_matches_reference_on_random_shapes(length, nodes, M, C, N, S, R, channels_a_copy, rate):
    sample = s4_kernel_sample("", length, nodes, M, C, channels_a_copy * S, N, S, R, rate=rate)
    check_against_reference(s4_kernel, s4_kernel_ref, sample, torch.float64)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(L=st.integers(0, 140), B=st.integers(0, 3), with_state=st.booleans(), **SIZES)
def test_recurrence_matches_reference_on_random_shapes(L, B, C, N, S, R, channels_a_copy, with_state):
    H = channels_a_copy * S
    sample = s4_state_sample("", L, B, H, N, S, R, with_state=with_state)
    check_against_reference(s4_state, s4_state_ref, sample, torch.float64)
    check_against_reference(stepped(s4_step), stepped(s4_step_ref), s4_step_sample("", B, C, H, N, S, R), torch.float64)


def all_states(z):
    """Pairs (..., N, 2) as complex numbers (..., 2N): those stored, then their conjugates."""
    z = torch.view_as_complex(z.contiguous())
    return torch.cat((z, z.conj()), -1)


def stored(z):
    """Complex numbers (..., 2N) of conjugate pairs as pairs (..., N, 2)."""
    return torch.view_as_real(z.chunk(2, -1)[0].resolve_conj())


def dense_system(w, p, log_dt):
    """dt/2 A, Abar and (I - dt/2 A)^-1, complex (H, 2N, 2N)."""
    w, p = all_states(w), all_states(p)
    a = w.diag_embed() - torch.einsum("rsi,rsj->sij", p, p.conj())
    half = a.repeat(len(log_dt) // len(w), 1, 1) * log_dt.exp()[:, None, None] / 2
    one = torch.eye(w.size(-1), dtype=w.dtype)
    return half, torch.linalg.solve(one - half, one + half), torch.linalg.inv(one - half)


def truncated(c, w, p, log_dt, nodes):
    """C (I - Abar^nodes) as pairs."""
    c, power = all_states(c), torch.linalg.matrix_power(dense_system(w, p, log_dt)[1], nodes)
    return stored(c - torch.einsum("chi,hij->chj", c, power))


@pytest.mark.parametrize("R", [0, 1, 2, 3])
@pytest.mark.parametrize("nodes", [20, 13])
def test_kernel_is_the_dense_recurrence(R, nodes):
    w, p, b, c, log_dt, length = s4_kernel_sample("", 20, R=R, grad=False).args
    k = s4_kernel(w, p, b, c, log_dt, length, nodes=nodes)
    _, step, inverse = dense_system(w, p, log_dt)
    untruncated = torch.linalg.solve(
        torch.eye(step.size(-1)) - torch.linalg.matrix_power(step, nodes), all_states(c)[..., None, :], left=False
    ).squeeze(-2)
    x = torch.einsum("hij,mhj->mhi", inverse, all_states(b).repeat(1, 2, 1)) * log_dt.exp()[:, None]
    outputs = []
    for _ in range(length):
        outputs.append(torch.einsum("chi,mhi->mch", untruncated, x))
        x = torch.einsum("hij,mhj->mhi", step, x)
    outputs = torch.stack(outputs, -1)
    assert_close(k, outputs.real, **EXACT)
    assert_close(outputs.imag, torch.zeros_like(k), **EXACT)


def run_steps(u, w, p, b, c, log_dt, state):
    """Outputs (B, C, H, L) of u (B, H, L) from `state`, which they change."""
    return torch.stack([s4_step(u_t, w, p, b, c, log_dt, state) for u_t in u.unbind(-1)], -1)


@pytest.mark.parametrize("R", [0, 1, 2, 3])
def test_rows_of_initial_states_add_what_the_steps_remember(R):
    B, H, N, L, nodes = 2, 4, 5, 40, 64
    w, p, b, c, log_dt = (t.detach() for t in s4_parameters(1, 3, H, N, H, R).values())  # a copy a channel
    u, state = constant(B, H, L), constant(B, H, N, 2)
    x = all_states(state)
    rows = stored((x + torch.einsum("hij,bhj->bhi", dense_system(w, p, log_dt)[0], x)) / log_dt.exp()[:, None])
    k = s4_kernel(w, p, torch.cat((b, rows)), truncated(c, w, p, log_dt, nodes), log_dt, L, nodes=nodes)
    y = long_conv(u, k[0]) + k[1:]
    assert_close(y, run_steps(u, w, p, b[0], c, log_dt, state.clone()), **EXACT)


@pytest.mark.parametrize("R", [0, 1, 2, 3])
def test_state_is_that_after_the_steps(R):
    u, w, p, b, log_dt, state = s4_state_sample("", 70, R=R).args
    after = s4_state(u, w, p, b, log_dt, state)
    run_steps(u, w, p, b, constant(1, 4, 5, 2), log_dt, state)
    assert_close(after, state, **EXACT)


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 150])
def test_state_of_a_sequence_in_pieces_is_that_of_the_whole(cut):
    u, *system, state = s4_state_sample("", 150, R=2).args
    begin = s4_state(u[..., :cut], *system, state)
    assert_close(s4_state(u[..., cut:], *system, begin), s4_state(u, *system, state), **EXACT)


@pytest.mark.parametrize("log_dt", [-12.0, 0.0, 12.0])
@pytest.mark.parametrize("R", [1, 2, 3])
def test_steps_never_amplify_a_state(R, log_dt):
    """A + A^* is not positive: not even where rows of p are huge and all but dependent."""
    p = 1e4 * (constant(1, 1, 5, 2) + 1e-9 * constant(R, 1, 5, 2))
    log_dt = torch.full((4,), log_dt, dtype=torch.float64)
    sample = s4_state_sample("", 2000, S=1, u=torch.zeros(2, 4, 2000, dtype=torch.float64), p=p, log_dt=log_dt)
    before, after = (state.flatten(2).norm(dim=-1) for state in (sample.args[-1], s4_state(*sample.args)))
    assert (after <= before * (1 + 1e-12)).all()


def test_state_leaves_the_initial_state_as_it_is():
    *args, state = s4_state_sample("").args
    before = state.clone()
    after = s4_state(*args, state)
    assert torch.equal(state, before)
    assert after.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()


@pytest.mark.parametrize(("nodes", "length"), [(7, 5), (7, 7), (64, 64), (7, 20), (30, 130)])
def test_kernel_does_not_depend_on_nodes(nodes, length):
    """Gradients included, be they of C or of what its truncation, and so its extension, depends on."""
    system = s4_parameters(2, 2, 4, 5, 2, 2)

    def kernel(w, p, b, c, log_dt, nodes):
        return s4_kernel(w, p, b, truncated(c, w, p, log_dt, nodes), log_dt, length, nodes=nodes)

    short, long = (run(kernel, Sample("", (*system.values(), n))) for n in (nodes, 2 * max(nodes, length)))
    for actual, expected in zip(short, long, strict=True):
        assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck_kernel(sample):
    check_opcheck(OPS.s4_kernel.default, sample.args, sample.kwargs)


@pytest.mark.parametrize("sample", STATE_SAMPLES, ids=str)
def test_opcheck_state(sample):
    check_opcheck(OPS.s4_state.default, sample.args)


@pytest.mark.parametrize("sample", STEP_SAMPLES, ids=str)
def test_opcheck_step(sample):
    check_opcheck(OPS.s4_step.default, sample.args)


@pytest.mark.parametrize(
    ("name", "output_mask"),
    [
        ("rank_0", [True] * 5),
        ("rank_2", [True, False, True, False, True]),
        ("length_100", [False, True, False, True, False]),
        ("transposed", [False] * 4 + [True]),
        ("no_states", [True] * 5),
    ],
)
def test_opcheck_backward(name, output_mask):
    sample = BY_NAME[name].map(torch.Tensor.detach)
    k = s4_kernel(*sample.args, **sample.kwargs)
    args = (torch.randn_like(k), *sample.args[:5], *sample.kwargs.values(), output_mask)
    check_opcheck(OPS.s4_kernel_backward.default, args)


@pytest.mark.parametrize(
    "name", ["rank_0", "rank_1", "rank_2", "rank_3", "length_15", "rate_half", "rate_beyond_nodes", "one_copy"]
)
def test_gradcheck(name):
    check_gradients(s4_kernel, BY_NAME[name])


def test_second_derivative_is_refused():
    check_refuses_second_derivative(s4_kernel, BY_NAME["rank_1"], "s4_kernel")


def test_state_has_no_gradient():
    u, *system = s4_state_sample("").args
    with pytest.raises(RuntimeError, match="derivative for spade_ext::s4_state is not implemented"):
        s4_state(leaf(u), *system).sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_all_lengths(backend):
    samples = [s4_kernel_sample("", length, nodes=32) for length in (5, 17, 64, 129)]
    check_compiles_once(s4_kernel, samples, backend)
    check_compiles_once(s4_state, [s4_state_sample("", length) for length in (7, 17, 64, 129)], backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_write_the_state(backend):
    def two_steps(u, w, p, b, c, log_dt, first, second):
        y = s4_step(u, w, p, b, c, log_dt, first)
        return y + s4_step(u + 1, w, p, b, c, log_dt, second), first * 2

    torch._dynamo.reset()
    compiled = torch.compile(two_steps, fullgraph=True, dynamic=True, backend=backend)
    for B in (3, 6):
        *args, state = s4_step_sample("", B).args
        states, expected_states = ([state.clone(), -state] for _ in range(2))
        for actual, expected in zip(compiled(*args, *states), two_steps(*args, *expected_states), strict=True):
            assert_close(actual, expected)
        for actual, expected in zip(states, expected_states, strict=True):
            assert_close(actual, expected)
            assert not torch.equal(actual.abs(), state.abs())


def test_step_on_a_view_writes_this_part():
    *args, state = s4_step_sample("").args
    layers = torch.stack((state, state, state), 2)
    s4_step(*args, layers[:, :, 1])
    s4_step(*args, after := state.clone())
    assert torch.equal(layers, torch.stack((state, after, state), 2))


def test_step_of_a_row_does_not_depend_on_others():
    u, *system, state = s4_step_sample("", B=5, R=2).args
    alone = [state[row : row + 1].clone() for row in range(5)]
    outputs = [s4_step(u[row : row + 1], *system, alone[row]) for row in range(5)]
    assert torch.equal(s4_step(u, *system, state), torch.cat(outputs))
    assert torch.equal(state, torch.cat(alone))


def test_step_raises_the_version_of_the_state():
    *args, state = s4_step_sample("").args
    version = state._version
    s4_step(*args, state)
    assert state._version == version + 1


def test_state_that_autograd_has_saved_is_not_overwritten_unseen():
    *args, state = s4_step_sample("").args
    loss = (leaf(constant(1)) * state).sum()
    s4_step(*args, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("index", "name"), list(enumerate(("u", "w", "p", "b", "c", "log_dt", "state"))))
def test_step_refuses_gradients(index, name):
    args = list(s4_step_sample("").args)
    args[index].requires_grad_()
    before = args[-1].detach().clone()
    with pytest.raises(NotImplementedError, match=f"^s4_step: {name} requires a gradient, expected none:"):
        s4_step(*args)
    assert torch.equal(args[-1], before)
    with torch.no_grad():
        assert not s4_step(*args).requires_grad
    assert not torch.equal(args[-1], before)


def test_inference_mode(set_threads):
    set_threads(2)
    sample = BY_NAME["rank_2"]
    with torch.inference_mode():
        k = s4_kernel(*sample.args, **sample.kwargs)
    assert k.is_inference()
    assert torch.equal(k, s4_kernel(*sample.args, **sample.kwargs))


def test_steps_in_inference_mode():
    *args, state = s4_step_sample("").args
    expected = s4_step(*args, expected_state := state.clone())
    args[1].requires_grad_()
    with torch.inference_mode():
        for inner in (state.clone(), state):
            assert torch.equal(s4_step(*args, inner), expected)
            assert torch.equal(inner, expected_state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [{"C": 1, "H": 1, "S": 1}, {"C": 3, "H": 2, "S": 1, "R": 2}, {"H": 36, "S": 4}])
@pytest.mark.parametrize("nodes", [300, 1009])
def test_same_bits_for_any_number_of_threads(shape, nodes, dtype, set_threads):
    check_same_bits(s4_kernel, s4_kernel_sample("", 1000, nodes, **shape).to(dtype), set_threads)


def test_recurrence_has_the_same_bits_for_any_number_of_threads(set_threads):
    shape = {"B": 7, "H": 36, "S": 4, "R": 2}
    check_same_bits(s4_state, s4_state_sample("", 500, **shape), set_threads)
    check_same_bits(stepped(s4_step), s4_step_sample("", **shape), set_threads)


def hippo_sample(init, length, H=2, N=64):
    """S4 as it is initialised, real parts at most -1e-3."""
    w, p, b = dplr(init, 2 * N, rank=2 if init == "legt" else 1)
    w = torch.complex(w.real.clamp(max=-1e-3), w.imag)
    w, p, b = (leaf(torch.view_as_real(z.resolve_conj())) for z in (w[None], p[:, None], b[None, None]))
    return s4_kernel_sample("", length, max(length, 64), 1, 1, H, N, w=w, p=p, b=b)


@pytest.mark.parametrize("init", ["legs", "legt", "fout"])
@pytest.mark.parametrize("L", [1, 64, 129, 1024, 4096, 16384])
def test_float32_precision(L, init):
    error, *gradient_errors = relative_errors(s4_kernel, s4_kernel_ref, hippo_sample(init, L), torch.float32)
    assert error < 1e-5
    assert max(gradient_errors) < 1e-4


@pytest.mark.parametrize("init", ["legs", "legt", "fout"])
def test_float32_precision_of_the_state(init):
    w, p, b, _, log_dt, length = hippo_sample(init, 4096).map(torch.Tensor.detach).to(torch.float32).args
    args = (constant(1, 2, length).float(), w, p, b[0], log_dt, constant(1, 2, 64, 2).float())
    expected = s4_state_ref(*(t.double() for t in args))
    assert relative_error(s4_state(*args), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("log_dt", [-12.0, 0.0, 12.0])
@pytest.mark.parametrize("R", [0, 1, 2])
@pytest.mark.parametrize("nodes", [50, 300])
def test_extreme_parameters_stay_finite(nodes, R, log_dt, dtype):
    size = torch.tensor([1e-8, 1e-4, 1.0, 1e4], dtype=torch.float64)
    zero = size.new_zeros(1)
    real, imaginary = torch.meshgrid(torch.cat((-size, zero)), torch.cat((-size, zero, size)), indexing="ij")
    w = torch.stack((real, imaginary), -1).view(1, -1, 2)
    w = leaf(w[:, w.abs().sum((0, 2)) > 0])  # w = 0 has a pole at the first node
    N = w.size(1)
    p, b, c = (torch.full((*shape, N, 2), 1e4, dtype=torch.float64) for shape in ((R, 1), (1, 1), (1, 1)))
    log_dt = leaf(torch.full((1,), log_dt, dtype=torch.float64))
    sample = s4_kernel_sample("", 300, nodes, w=w, p=leaf(p), b=leaf(b), c=leaf(c), log_dt=log_dt).to(dtype)
    for value in run(s4_kernel, sample):
        assert value.isfinite().all()
    w, p, b, c, log_dt = (t.detach() for t in sample.args[:5])
    state = s4_state(torch.full((1, 1, 300), 1e4, dtype=dtype), w, p, b[0], log_dt, c)
    assert state.isfinite().all()
    assert s4_step(torch.full((1, 1), 1e4, dtype=dtype), w, p, b[0], c, log_dt, state).isfinite().all()
    assert state.isfinite().all()


def test_autocast_runs_in_float32():
    sample = BY_NAME["rank_1"].to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        k, *gradients = run(s4_kernel, sample)
    expected, *expected_gradients = run(s4_kernel, sample.to(torch.float32))
    assert k.dtype == torch.float32
    assert torch.equal(k, expected)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(actual, gradient.bfloat16())


def test_autocast_runs_the_recurrence_in_float32():
    for sample in (s4_state_sample(""), s4_state_sample("", with_state=False)):
        sample = sample.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            state = s4_state(*sample.args)
        assert torch.equal(state, s4_state(*sample.to(torch.float32).args))


def test_autocast_steps_in_float32():
    *args, state = s4_step_sample("").to(torch.float32).args
    args = [t.bfloat16() for t in args]
    expected = s4_step(*(t.float() for t in args), expected_state := state.clone())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(s4_step(*args, state), expected)
        assert torch.equal(state, expected_state)
        with pytest.raises(TypeError, match="^s4_step: state is BFloat16, expected Float, the dtype of w"):
            s4_step(*args, state.bfloat16())


@pytest.mark.parametrize("nodes", [64, 5000])
def test_memory_does_not_hold_all_resolvents(nodes):
    sample = s4_kernel_sample("", 5000, nodes, M=1, C=1, H=16, N=32, S=1).to(torch.float32)
    assert peak_memory(lambda: run(s4_kernel, sample)) < 10 * 2**20  # H N L complex64 are 20 MiB


def kernel_arguments(**changes):
    return {
        "w": randn(2, 5, 2),
        "p": randn(1, 2, 5, 2),
        "b": randn(3, 2, 5, 2),
        "c": randn(3, 4, 5, 2),
        "log_dt": randn(4),
        "length": 8,
        "nodes": 8,
    } | changes


def state_arguments(**changes):
    system = {name: kernel_arguments()[name] for name in ("w", "p", "log_dt")}
    return system | {"u": randn(2, 4, 8), "b": randn(2, 5, 2), "state": randn(2, 4, 5, 2)} | changes


def step_arguments(**changes):
    return state_arguments(u=randn(2, 4), c=randn(3, 4, 5, 2)) | changes


FORMS = [(s4_kernel, kernel_arguments), (s4_state, state_arguments), (s4_step, step_arguments)]
SYSTEM_ERRORS = [
    (ValueError, {"w": randn(5, 2)}, r"w has shape \[5, 2\], expected \(S, N, 2\)"),
    (ValueError, {"w": randn(2, 5, 3)}, r"w has shape \[2, 5, 3\], expected 2 in dimension 2 of \(S, N, 2\)"),
    (ValueError, {"p": randn(2, 5, 2)}, r"p has shape \[2, 5, 2\], expected \(R, S, N, 2\)"),
    (ValueError, {"p": randn(1, 1, 5, 2)}, r"p has shape \[1, 1, 5, 2\], expected 2 in dimension 1 of \(R, S, N, 2\)"),
    (ValueError, {"p": randn(1, 2, 6, 2)}, r"p has shape \[1, 2, 6, 2\], expected 5 in dimension 2 of \(R, S, N, 2\)"),
    (ValueError, {"p": randn(1, 2, 5, 1)}, r"p has shape \[1, 2, 5, 1\], expected 2 in dimension 3 of \(R, S, N, 2\)"),
    (ValueError, {"log_dt": randn(4, 1)}, r"log_dt has shape \[4, 1\], expected \(H,\)"),
    (ValueError, {"log_dt": randn(5)}, r"log_dt has shape \[5\], expected 4 in dimension 0 of \(H,\)"),
    (
        ValueError,
        {"w": randn(0, 5, 2), "p": randn(1, 0, 5, 2)},
        r"w has shape \[0, 5, 2\], expected at least one copy S",
    ),
    (
        ValueError,
        {"w": randn(3, 5, 2), "p": randn(1, 3, 5, 2)},
        r"w has 3 copies S, expected a divisor of the number of channels H = 4 of [cu]",
    ),
    (TypeError, {"w": randn(2, 5, 2).half()}, r"w is Half, expected float32 or float64"),
    (TypeError, {"w": randn(2, 5, 2).bfloat16()}, r"w is BFloat16, expected float32 or float64"),
    (TypeError, {"p": randn(1, 2, 5, 2).float()}, r"p is Float, expected Double, the dtype of w"),
    (TypeError, {"log_dt": randn(4).half()}, r"log_dt is Half, expected Double, the dtype of w"),
]
C_ERRORS = [
    (ValueError, {"c": randn(4, 5, 2)}, r"c has shape \[4, 5, 2\], expected \(C, H, N, 2\)"),
    (ValueError, {"c": randn(3, 4, 6, 2)}, r"c has shape \[3, 4, 6, 2\], expected 5 in dimension 2 of"),
    (ValueError, {"c": randn(3, 4, 5, 1)}, r"c has shape \[3, 4, 5, 1\], expected 2 in dimension 3 of"),
    (TypeError, {"c": randn(3, 4, 5, 2).half()}, r"c is Half, expected Double, the dtype of w"),
]
KERNEL_ERRORS = [
    (ValueError, {"b": randn(2, 5, 2)}, r"b has shape \[2, 5, 2\], expected \(M, S, N, 2\)"),
    (ValueError, {"b": randn(3, 1, 5, 2)}, r"b has shape \[3, 1, 5, 2\], expected 2 in dimension 1 of \(M, S, N, 2\)"),
    (ValueError, {"b": randn(3, 2, 6, 2)}, r"b has shape \[3, 2, 6, 2\], expected 5 in dimension 2 of \(M, S, N, 2\)"),
    (ValueError, {"b": randn(3, 2, 5, 1)}, r"b has shape \[3, 2, 5, 1\], expected 2 in dimension 3 of \(M, S, N, 2\)"),
    (TypeError, {"b": randn(3, 2, 5, 2).float()}, r"b is Float, expected Double, the dtype of w"),
    (ValueError, {"length": -1}, r"length is -1, expected 0 or more"),
    (ValueError, {"nodes": 0}, r"nodes is 0, expected 1 or more"),
    *(
        (ValueError, {"rate": rate}, rf"rate is {text}, expected a positive number from 1e-6 to 1e6")
        for rate, text in ((0.0, "0"), (-1.0, "-1"), (math.inf, "inf"), (math.nan, "-?nan"), (1e300, r"1e\+300"))
    ),
    *(
        (ValueError, change, rf"rate is {text}, expected nodes / rate of at most 2147483648")
        for change, text in (
            ({"rate": 1e-6, "nodes": 2148}, "1e-06 with nodes 2148"),
            ({"nodes": 2**31 + 1}, "1 with nodes 2147483649"),
            ({"rate": 0.5, "nodes": 2**63 - 1}, "0.5 with nodes 9223372036854775807"),
        )
    ),
]
STATE_ERRORS = [
    (ValueError, {"b": randn(1, 2, 5, 2)}, r"b has shape \[1, 2, 5, 2\], expected \(S, N, 2\)"),
    (ValueError, {"b": randn(1, 5, 2)}, r"b has shape \[1, 5, 2\], expected 2 in dimension 0 of \(S, N, 2\)"),
    (ValueError, {"b": randn(2, 6, 2)}, r"b has shape \[2, 6, 2\], expected 5 in dimension 1 of \(S, N, 2\)"),
    (ValueError, {"b": randn(2, 5, 1)}, r"b has shape \[2, 5, 1\], expected 2 in dimension 2 of \(S, N, 2\)"),
    (TypeError, {"b": randn(2, 5, 2).float()}, r"b is Float, expected Double, the dtype of w"),
    (ValueError, {"state": randn(2, 4, 5)}, r"state has shape \[2, 4, 5\], expected \(B, H, N, 2\)"),
    (ValueError, {"state": randn(3, 4, 5, 2)}, r"state has shape \[3, 4, 5, 2\], expected 2 in dimension 0 of"),
    (ValueError, {"state": randn(2, 1, 5, 2)}, r"state has shape \[2, 1, 5, 2\], expected 4 in dimension 1 of"),
    (ValueError, {"state": randn(2, 4, 6, 2)}, r"state has shape \[2, 4, 6, 2\], expected 5 in dimension 2 of"),
    (ValueError, {"state": randn(2, 4, 5, 1)}, r"state has shape \[2, 4, 5, 1\], expected 2 in dimension 3 of"),
    (TypeError, {"state": randn(2, 4, 5, 2).float()}, r"state is Float, expected Double, the dtype of w"),
]
U_ERRORS = [
    (s4_state, ValueError, {"u": randn(2, 4)}, r"u has shape \[2, 4\], expected \(B, H, L\)"),
    (s4_state, TypeError, {"u": randn(2, 4, 8).half()}, r"u is Half, expected Double, the dtype of w"),
    (s4_step, ValueError, {"u": randn(2, 4, 8)}, r"u has shape \[2, 4, 8\], expected \(B, H\)"),
    (s4_step, TypeError, {"u": randn(2, 4).half()}, r"u is Half, expected Double, the dtype of w"),
    (s4_step, ValueError, {"c": randn(3, 1, 5, 2)}, r"c has shape \[3, 1, 5, 2\], expected 4 in dimension 1 of"),
]
ERRORS = [
    *((op, *error) for op, _ in FORMS for error in SYSTEM_ERRORS),
    *((op, *error) for op in (s4_kernel, s4_step) for error in C_ERRORS),
    *((s4_kernel, *error) for error in KERNEL_ERRORS),
    *((op, *error) for op in (s4_state, s4_step) for error in STATE_ERRORS),
    *U_ERRORS,
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("op", "error", "change", "message"), ERRORS)
def test_errors(op, error, change, message, device):
    values = dict(FORMS)[op](**change)
    values = {k: v.detach().to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(**values)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *((s4_kernel, name) for name in ("p", "b", "c", "log_dt")),
        *((s4_state, name) for name in ("u", "p", "b", "log_dt", "state")),
        *((s4_step, name) for name in ("u", "p", "b", "c", "log_dt", "state")),
    ],
)
def test_another_device_is_refused(op, name):
    arguments = dict(FORMS)[op]
    values = arguments(**{name: arguments()[name].to("meta")})
    with pytest.raises(ValueError, match=f"^{op.__name__}: {name} is on meta, expected cpu, the device of w"):
        op(**{k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def published(tensors):
    """w, p, b, c, log_dt and nodes from a published layer's tensors by their names there."""
    w = torch.stack((-tensors["inv_w_real"].exp(), tensors["w_imag"]), -1)
    return *(w, *(tensors[name] for name in ("P", "B", "C", "log_dt"))), tensors["L"].item()


def without_prefix(prefix, tensors):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("kind", ["fout_r1_s2", "legs_r1_s1", "legt_r2_s4"])
@pytest.mark.parametrize("length", ["L64_bi0", "L100_bi1"])
def test_golden(kind, length, load_golden):
    tensors, config = load_golden(f"s4_{kind}_{length}_c1")
    parameters = golden_parameters(tensors)
    *system, nodes = published(
        without_prefix("kernel.kernel.", parameters | {"kernel.kernel.L": tensors["state.kernel.kernel.L"]})
    )
    (k,) = s4_kernel(*system, config["L"], nodes=nodes)
    check_golden(tensors, parameters, k, parameters["D"])


def test_golden_state_spaces(load_golden):
    tensors, config = load_golden("spaces_dplr_legs_r1_L64_bi0")
    parameters = golden_parameters(tensors)
    a_real, a_imag, P, B, C, inv_dt = (
        parameters[f"kernel.{name}"] for name in ("A_real", "A_imag", "P", "B", "C", "inv_dt")
    )
    w, nodes = torch.stack((-a_real.exp(), -a_imag), -1), tensors["state.kernel.l_kernel"].item()
    (k,) = s4_kernel(w, P, B, C, inv_dt.squeeze(-1), config["L"], nodes=nodes)
    check_golden(tensors, parameters, k, parameters["D"])


def test_golden_state_and_rate(load_golden):
    tensors, _ = load_golden("s4_state_rate_legs_r1")
    *system, nodes = published(without_prefix("state_dict.kernel.kernel.", tensors))
    *doubled, doubled_nodes = published(without_prefix("doubled.kernel.kernel.", tensors))
    w, p, b, c, log_dt = system

    def check(actual, name):
        assert_close(actual, tensors[name], **EXACT)

    check(s4_kernel(*system, 64, nodes=nodes)[0], "kernel")
    check(s4_kernel(*system, 128, nodes=nodes, rate=0.5)[0], "kernel_rate05")
    check(s4_kernel(*system, 32, nodes=nodes, rate=2.0)[0], "kernel_rate2")
    check(s4_kernel(*doubled, 128, nodes=doubled_nodes)[0], "kernel_doubled")
    check(s4_kernel(*system, 128, nodes=nodes)[0], "kernel_doubled")

    state = tensors["state"]
    copies = state.size(1) // w.size(0)
    w, p, b = w.repeat(copies, 1, 1), p.repeat(1, copies, 1, 1), b.repeat(1, copies, 1, 1)
    x = all_states(state)
    rows = stored((x + torch.einsum("hij,bhj->bhi", dense_system(w, p, log_dt)[0], x)) / log_dt.exp()[:, None])
    check(s4_kernel(w, p, rows, c, log_dt, 64, nodes=nodes), "kernel_state")
    check(s4_state(tensors["u"], w, p, b[0], log_dt, state), "next_state")
