import math

import pytest
import torch
from torch._dynamo.utils import counters

from spade_ext import nn
from spade_ext.convert import from_reference, load_reference
from spade_ext.ops import long_conv

from ..reference import below

OPTIONS = {
    "causal": {},
    "two_sided": {"bidirectional": True},
    "truncated": {"truncation": 5},
    "two_sided_truncated": {"bidirectional": True, "truncation": 5},
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
TOLERANCES = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True, params=[0, 32], ids=["convolution", "scan"])
def way_to_run(request, monkeypatch):
    """Every test holds for both."""
    monkeypatch.setattr(nn.state_space, "SCAN_LIMIT", request.param)


def ema(**options):
    return nn.EMA(6, 3, **options).double()


def tokens(*size):
    return torch.randn(*size, 6, dtype=torch.float64)


def published_layer(name, load_golden):
    tensors, config = load_golden(f"mega_ema_{name}")
    options = {key: config[key] for key in ("bidirectional", "truncation")}
    layer = nn.EMA(config["embed_dim"], config["ndim"], **options).double()
    load_reference(layer, below(tensors, "state."))
    return layer, tensors


@pytest.mark.parametrize("name", ["D8_n2_bi0_trNone", "D8_n2_bi1_tr16", "D8_n4_bi1_trNone"])
def test_layer_is_the_published_one(name, load_golden):
    layer, tensors = published_layer(name, load_golden)
    mask = ~tensors["padding_mask"] if "padding_mask" in tensors else None  # True there is padding
    x = tensors["x"].transpose(0, 1).requires_grad_()
    y = layer(x, mask)
    y.backward(tensors["g"].transpose(0, 1))
    torch.testing.assert_close(y.transpose(0, 1), tensors["y"], **TOLERANCES)
    torch.testing.assert_close(x.grad.transpose(0, 1), tensors["grad_x"], **TOLERANCES)
    for ours, expected in from_reference(layer, below(tensors, "grad.")).items():
        torch.testing.assert_close(getattr(layer, ours).grad, expected, **TOLERANCES)


@pytest.mark.parametrize("by_steps", [False, True])
def test_published_state(by_steps, load_golden):
    """The file holds the average alone, without omega x and silu."""
    layer, tensors = published_layer("D8_n2_bi0_trNone", load_golden)
    x, state = tensors["x"].transpose(0, 1), tensors["step_state"]
    if by_steps:
        state = state.clone()
        y = torch.stack([layer.step(token, state) for token in tensors["x"]], dim=1)
    else:
        y, state = layer(x, state=state)
    expected = torch.nn.functional.silu(tensors["step_y"].transpose(0, 1) + layer.omega * x)
    torch.testing.assert_close(y, expected, **TOLERANCES)
    torch.testing.assert_close(state, tensors["step_next_state"], **TOLERANCES)


def test_layer_is_the_recurrence_of_its_parameters():
    layer, x = ema(), tokens(2, 20)
    p, alpha = layer.delta.sigmoid(), layer.alpha.sigmoid()
    h, outputs = torch.zeros(2, 6, 3, dtype=torch.float64), []
    for t in range(20):
        h = (1 - p * alpha) * h + p * layer.beta * x[:, t, :, None]
        average = (layer.gamma * h).sum(-1) / math.sqrt(3)
        outputs.append(torch.nn.functional.silu(average + layer.omega * x[:, t]))
    torch.testing.assert_close(layer(x), torch.stack(outputs, 1), **TOLERANCES)


@pytest.mark.parametrize("truncation", [None, 1, 5, 20, 100])
def test_two_sided_is_two_one_sided(truncation):
    """Both directions see the token itself."""
    both = ema(bidirectional=True, truncation=truncation)
    forward, reverse = ema(truncation=truncation), ema(truncation=truncation)
    halves = {name: value.chunk(2) for name, value in both.state_dict().items() if name != "omega"}
    for layer, half in ((forward, 0), (reverse, 1)):
        layer.load_state_dict({name: value[half] for name, value in halves.items()} | {"omega": both.omega})
    x = tokens(2, 20)
    k, k_reverse = (layer.convolution_kernel(20) for layer in (forward, reverse))
    average = long_conv(x.mT, k) + long_conv(x.mT.flip(-1), k_reverse).flip(-1)
    torch.testing.assert_close(both(x), torch.nn.functional.silu(average.mT + both.omega * x), **TOLERANCES)


@pytest.mark.parametrize(("bidirectional", "n_dim", "scans"), [(False, 32, True), (False, 33, False), (True, 16, True)])
def test_limit_of_scans(bidirectional, n_dim, scans, monkeypatch):
    monkeypatch.setattr(nn.state_space, "SCAN_LIMIT", 32)
    assert nn.EMA(6, n_dim, bidirectional=bidirectional).scans is scans
    assert not nn.EMA(6, 17, bidirectional=True).scans and not nn.EMA(6, truncation=4).scans


@pytest.mark.parametrize("bidirectional", [False, True])
def test_truncation_is_the_reach(bidirectional):
    layer, x = ema(bidirectional=bidirectional, truncation=5), tokens(1, 20)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, 10].sum(), x)
    seen = (gradient[0].abs() > 1e-12).any(-1).nonzero().flatten().tolist()
    assert seen == list(range(6, 15 if bidirectional else 11))
    layer.truncation = None
    whole = layer(x)
    layer.truncation = 20
    torch.testing.assert_close(layer(x), whole, **TOLERANCES)


def test_forward_is_steps_is_any_split_into_segments():
    layer, x = ema(), tokens(3, 70)
    whole = layer(x)
    state = layer.initial_state(3)
    outputs = [layer.step(x[:, t], state) for t in range(70)]
    torch.testing.assert_close(torch.stack(outputs, 1), whole, **TOLERANCES)
    for cuts in ((70,), (1, 69), (17, 0, 53), (64, 6), (20, 20, 20, 10)):
        segment_state, segments = layer.initial_state(3), []
        for segment in x.split(cuts, dim=1):
            y, segment_state = layer(segment, state=segment_state)
            segments.append(y)
        torch.testing.assert_close(torch.cat(segments, 1), whole, **TOLERANCES)
        torch.testing.assert_close(segment_state, state, **TOLERANCES)


def test_gradients_pass_through_a_state():
    layer, x = ema(), tokens(2, 30)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    first, state = layer(x[:, :11], state=layer.initial_state(2))
    second, _ = layer(x[:, 11:], state=state)
    actual = torch.autograd.grad(first.square().sum() + second.square().sum(), parameters)
    for gradient, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, other, **TOLERANCES)


def test_given_state_is_not_changed():
    layer = ema()
    state = torch.randn(2, 6, 3, dtype=torch.float64)
    before = state.clone()
    for x in (tokens(2, 9), tokens(2, 0)):
        _, after = layer(x, state=state)
        assert torch.equal(state, before)
    assert torch.equal(after, state) and after is not state


@all_options
def test_padding_is_invisible(options):
    layer, x = ema(**options), tokens(2, 9)
    alone = layer(x)
    garbage = torch.full((2, 4, 6), torch.nan, dtype=torch.float64)
    right, left = torch.cat([x, garbage], 1), torch.cat([garbage, x], 1)
    mask = torch.tensor([[1] * 9 + [0] * 4] * 2)
    torch.testing.assert_close(layer(right, mask)[:, :9], alone, **TOLERANCES)
    torch.testing.assert_close(layer(left, mask.flip(1))[:, 4:], alone, **TOLERANCES)


@all_options
def test_packed_documents_are_those_alone(options):
    layer, x = ema(**options), tokens(2, 20)
    ids = torch.tensor([[3] * 7 + [1] * 1 + [3] * 12, [0] * 20])
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = mask[1, 15:] = 0
    x[1, :4] = x[1, 15:] = torch.nan
    y = layer(x, mask, ids)
    for row, begin, end in ((0, 0, 7), (0, 7, 8), (0, 8, 20), (1, 4, 15)):
        alone = layer(x[row : row + 1, begin:end])[0]
        torch.testing.assert_close(y[row, begin:end], alone, **TOLERANCES)


def test_padded_and_packed_rows_hand_on_their_own_state():
    layer, x = ema(), tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 9:] = mask[1] = 0
    x[mask == 0] = torch.nan
    ids = torch.tensor([[0] * 12, [0] * 12, [5] * 3 + [6] * 9])
    state = torch.randn(3, 6, 3, dtype=torch.float64)
    y, after = layer(x, mask, ids, state)
    padded, padded_state = layer(x[:1, :9], state=state[:1])
    first, _ = layer(x[2:, :3], state=state[2:])
    second, second_state = layer(x[2:, 3:], state=layer.initial_state(1))
    torch.testing.assert_close(y[:1, :9], padded, **TOLERANCES)
    torch.testing.assert_close(y[2:], torch.cat([first, second], 1), **TOLERANCES)
    torch.testing.assert_close(after, torch.cat([padded_state, state[1:2], second_state]), **TOLERANCES)


@all_options
@pytest.mark.parametrize("size", [(0, 5), (2, 0), (2, 1)], ids=str)
def test_small_inputs(options, size):
    layer = ema(**options)
    x = tokens(*size)
    y = layer(x)
    assert y.shape == x.shape and y.isfinite().all()
    torch.testing.assert_close(layer(x, segment_ids=torch.zeros(size, dtype=torch.long)), y)


@pytest.mark.parametrize(("bidirectional", "by_scan"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_parameters_have_finite_outputs_and_gradients(dtype, bidirectional, by_scan):
    """Where p sigmoid(alpha) rounds to 1, a state forgets all at once."""
    extremes = torch.tensor([0, 18, -18, 1e4, -1e4], dtype=dtype)
    layer = nn.EMA(25, 2, bidirectional=bidirectional).to(dtype)
    pairs = torch.cartesian_prod(extremes, extremes).repeat(2 if bidirectional else 1, 1)
    with torch.no_grad():
        layer.delta.copy_(pairs[:, :1])
        layer.alpha.copy_(pairs[:, 1:])
    x = torch.randn(2, 40, 25, dtype=dtype, requires_grad=True)
    if by_scan:
        state = torch.randn(2, 25, 2, dtype=dtype, requires_grad=True)
        outputs, inputs = layer(x, state=state), [x, state]
    else:
        outputs, inputs = (layer(x),), [x]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), [*inputs, *layer.parameters()])
    for t in (*outputs, *gradients):
        assert t.isfinite().all()
    if not bidirectional:
        p, alpha = pairs.double().sigmoid().split(1, dim=-1)
        h, average = torch.zeros(2, 25, 2, dtype=torch.float64) if not by_scan else state.double(), []
        for t in range(40):
            h = (1 - p * alpha) * h + p * layer.beta * x[:, t, :, None]
            average.append((layer.gamma * h).sum(-1) / math.sqrt(2))
        expected = torch.nn.functional.silu(torch.stack(average, 1) + layer.omega * x).to(dtype)
        torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-4)


def test_initial_values_have_their_distributions():
    layer = nn.EMA(20_000, 5, bidirectional=True)
    sign = torch.tensor([1.0, -1, 1, -1, 1])
    moments = {"delta": (0, 0.2), "alpha": (0, 0.2), "beta": (sign, 0.02), "gamma": (0, 1), "omega": (0, 1)}
    for name, (mean, deviation) in moments.items():
        value = getattr(layer, name)
        assert (value.mean(0) - mean).abs().max() < 0.05 * deviation, name
        assert (value.std(0) / deviation - 1).abs().max() < 0.05, name


def test_reused_kernels_are_those_of_the_parameters():
    layer, x = ema(), tokens(2, 9)
    expected = layer(x)
    with torch.no_grad(), nn.reuse_kernels(torch.nn.Sequential(layer)):
        assert torch.equal(layer(x), expected)
        layer.gamma *= 2
        assert torch.equal(layer(x), expected)
    assert layer(x).ne(expected).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_stay_float32_in_a_half_precision_module(dtype):
    layer = torch.nn.Sequential(nn.EMA(6)).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    x, state = torch.randn(2, 5, 6, dtype=dtype), layer[0].initial_state(2)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))
    assert layer[0].step(x[:, 0], state).dtype == dtype and state.dtype == torch.float32
    assert {p.dtype for p in layer.double().parameters()} == {torch.float64}
    assert {p.dtype for p in layer.float().parameters()} == {torch.float32}


def test_default_dtype_decides_between_float32_and_float64():
    torch.set_default_dtype(torch.float64)
    try:
        assert nn.EMA(6).gamma.dtype == torch.float64
        torch.set_default_dtype(torch.bfloat16)
        assert nn.EMA(6).gamma.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@all_options
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_in_float32(options, dtype):
    layer, x = nn.EMA(6, **options), torch.randn(2, 9, 6)
    half = x.to(dtype)
    with torch.autocast("cpu", dtype):
        y, y_half = layer(x), layer(half)
    assert torch.equal(y, layer(x))
    assert torch.equal(y_half, layer(half.float()).to(dtype))


@all_options
def test_compiles_as_one_graph_for_all_lengths(options):
    layer = nn.EMA(6, 3, **options)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in (4, 17, 33):
        x = torch.randn(2, L, 6, requires_grad=True)
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        for actual, gradient in zip(
            *(torch.autograd.grad(z.sum(), [x, layer.beta]) for z in (y, expected)), strict=True
        ):
            torch.testing.assert_close(actual, gradient)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_segments_and_steps(dynamic):
    layer = nn.EMA(6, 3)
    torch._dynamo.reset()
    forward = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    step = torch.compile(layer.step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    state, expected_state = layer.initial_state(2), layer.initial_state(2)
    for _ in range(2):
        x = torch.randn(2, 7, 6)
        y, state = forward(x, state=state)
        expected, expected_state = layer(x, state=expected_state)
        torch.testing.assert_close(y, expected)
        state, expected_state = state.detach(), expected_state.detach()
        torch.testing.assert_close(step(x[:, 0], state), layer.step(x[:, 0], expected_state))
        torch.testing.assert_close(state, expected_state)


@all_options
def test_gradients_reach_every_parameter(options):
    layer = ema(**options)
    layer(tokens(2, 11)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.ne(0).all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, r"d_model is 0, expected at least 1"),
        ({"n_dim": 0}, r"n_dim is 0, expected at least 1"),
        ({"truncation": 0}, r"truncation is 0, expected at least 1 or None"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        nn.EMA(**{"d_model": 6, **options})


def test_errors_of_an_input():
    with pytest.raises(ValueError, match=r"^x has shape \[2, 5, 7\], expected \(B, L, 6\)$"):
        ema()(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"^attention_mask has shape \[2\], expected \[2, 5\], \(B, L\)$"):
        ema()(tokens(2, 5), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "state", "error", "message"),
    [
        ({"bidirectional": True}, (2, 6, 3), ValueError, "bidirectional is True, expected False for a state: "),
        ({"truncation": 5}, (2, 6, 3), ValueError, "truncation is 5, expected None for a state"),
        ({}, (3, 6, 3), ValueError, r"state has shape \[3, 6, 3\], expected \[2, 6, 3\]"),
        ({}, (2, 6, 4), ValueError, r"state has shape \[2, 6, 4\], expected \[2, 6, 3\]"),
    ],
)
def test_errors_of_a_state(options, state, error, message):
    layer, state = ema(**options), torch.zeros(state, dtype=torch.float64)
    for call in (lambda: layer(tokens(2, 5), state=state), lambda: layer.step(tokens(2), state)):
        with pytest.raises(error, match=f"^{message}"):
            call()


def test_error_of_a_state_of_another_dtype():
    with pytest.raises(TypeError, match=r"^state is torch.float32, expected torch.float64, the dtype of the param"):
        ema()(tokens(2, 5), state=torch.zeros(2, 6, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": True}, "bidirectional is True, expected False for a state"),
        ({"truncation": 5}, "truncation is 5, expected None for a state"),
    ],
)
def test_no_initial_state(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ema(**options).initial_state(1)
