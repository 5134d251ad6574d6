import math

import pytest
import torch

from spade_ext import nn
from spade_ext.convert import from_reference, load_reference
from spade_ext.nn.dplr import untruncate

from ..ops.checks import peak_memory
from ..reference import below

DISCRETIZATIONS = ["zoh", "bilinear", "dss"]
FREQUENCIES = {
    "lin": lambda n, d_state: math.pi * n,
    "inv": lambda n, d_state: d_state / math.pi * (d_state / (1 + 2 * n) - 1),
    "quad": lambda n, d_state: (1 + 2 * n) ** 2 / math.pi,
    "real": lambda n, d_state: 0 * n,
}


KERNELS = {
    "legs": {"kernel": "s4", "init": "legs", "l_max": 8},
    "legt": {"kernel": "s4", "init": "legt", "rank": 2, "l_max": 7},
    "fout": {"kernel": "s4", "init": "fout", "l_max": 64},
    "hippo_rank_3": {"kernel": "s4", "init": "hippo", "rank": 3, "l_max": 20},
    "s4d": {"kernel": "s4d"},
    "s4d_bilinear": {"kernel": "s4d", "disc": "bilinear", "init": "lin"},
}
all_kernels = pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS.keys())
STATELESS = {"s4d_dss": {"kernel": "s4d", "disc": "dss"}}
all_kernels_and_dss = pytest.mark.parametrize(
    "options", [*KERNELS.values(), *STATELESS.values()], ids=[*KERNELS, *STATELESS]
)


@pytest.fixture(autouse=True)
def convolution(monkeypatch):
    """These small states would all be scanned."""
    monkeypatch.setattr(nn.state_space, "SCAN_LIMIT", 0)


def s4(**options):
    return nn.S4(6, 8, **{"kernel": "s4d", "n_ssm": 2, **options})


def double(**options):
    """In float64 from the start, so that C is truncated in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return s4(**options)
    finally:
        torch.set_default_dtype(torch.float32)


def tokens(*size):
    return torch.randn(*size, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "name",
    [
        "s4_fout_r1_s2_L100_bi1_c1",
        "s4_fout_r1_s2_L64_bi0_c1",
        "s4_legs_r1_s1_L100_bi1_c1",
        "s4_legs_r1_s1_L64_bi0_c1",
        "s4_legt_r2_s4_L100_bi1_c1",
        "s4_legt_r2_s4_L64_bi0_c1",
        "s4d_diag-inv_bilinear_L100_bi1_c1",
        "s4d_diag-inv_bilinear_L64_bi0_c1",
        "s4d_diag-legs_zoh_L100_bi1_c1",
        "s4d_diag-legs_zoh_L64_bi0_c1",
        "s4d_diag-lin_dss_L100_bi1_c1",
        "s4d_diag-lin_dss_L64_bi0_c1",
        "s4d_diag-lin_zoh_L100_bi1_c1",
        "s4d_diag-lin_zoh_L64_bi0_c1",
        "spaces_diag_diag-lin_r1_L80_bi1",
        "spaces_dplr_legs_r1_L64_bi0",
    ],
)
def test_layer_is_the_published_one(name, load_golden):
    tensors, config = load_golden(name)
    kernel = "s4" if config["mode"] in ("nplr", "dplr") else "s4d"
    layer = nn.S4(
        config["d_model"],
        config["d_state"],
        kernel=kernel,
        init="legs" if kernel == "s4d" else config.get("measure", config.get("init")),
        rank=config.get("rank", 1),
        n_ssm=config["n_ssm"],
        bidirectional=config["bidirectional"],
        disc=config.get("disc", "zoh"),
        l_max=config["l_max"],
    ).double()
    load_reference(layer, below(tensors, "state."))

    x = tensors["u"].mT.requires_grad_()
    y = layer(x)
    y.backward(tensors["g"].mT)
    torch.testing.assert_close(y.mT, tensors["y"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad.mT, tensors["grad_u"], rtol=1e-9, atol=1e-9)
    for ours, expected in from_reference(layer, below(tensors, "grad.")).items():
        torch.testing.assert_close(layer.get_parameter(ours).grad, expected, rtol=1e-9, atol=1e-9)
    if "kernel" in tensors:
        k = layer.convolution_kernel(config["L"])
        torch.testing.assert_close(k, tensors["kernel"].flatten(0, -3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["s4_legs_r1_s1_L64_bi0_c1", "s4_fout_r1_s2_L100_bi1_c1", "spaces_dplr_legs_r1_L64_bi0"]
)
def test_loading_truncates_a_published_output_matrix_that_is_not(name, load_golden):
    """Before its first forward a published layer says so by a length of 0."""
    tensors, config = load_golden(name)
    layer = nn.S4(
        config["d_model"],
        config["d_state"],
        init=config.get("measure", config.get("init")),
        n_ssm=config["n_ssm"],
        bidirectional=config["bidirectional"],
        l_max=config["l_max"],
    ).double()
    load_reference(layer, below(tensors, "initial."))
    assert layer.nodes == config["l_max"]
    expected = from_reference(layer, below(tensors, "state."))["C"]
    torch.testing.assert_close(layer.C, expected, rtol=1e-5, atol=1e-5)  # the published code truncates in float32


def test_published_rates_state_and_doubling(load_golden):
    tensors, config = load_golden("s4_state_rate_legs_r1")
    layer = nn.S4(config["d_model"], config["d_state"], n_ssm=config["n_ssm"], l_max=config["l_max"]).double()
    load_reference(layer, below(tensors, "state_dict."))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(layer.convolution_kernel(64), tensors["kernel"], **close)
    torch.testing.assert_close(layer.convolution_kernel(128, rate=0.5), tensors["kernel_rate05"], **close)
    torch.testing.assert_close(layer.convolution_kernel(32, rate=2.0), tensors["kernel_rate2"], **close)
    torch.testing.assert_close(layer.convolution_kernel(128), tensors["kernel_doubled"], **close)

    u, state = tensors["u"].mT, tensors["state"]
    y, next_state = layer(u, state=state)
    torch.testing.assert_close(next_state, tensors["next_state"], **close)
    from_state = (y - layer(u)).mT.unsqueeze(1)
    torch.testing.assert_close(from_state, tensors["kernel_state"], **close)

    load_reference(layer, below(tensors, "doubled."))
    assert layer.nodes == 128
    torch.testing.assert_close(layer.convolution_kernel(128), tensors["kernel_doubled"], **close)


@all_kernels
def test_truncation_does_not_show(options):
    """Layers of the same untruncated parameters have the same kernel, whatever their l_max and the length."""
    torch.manual_seed(1)
    long = double(**options | {"l_max": 100})
    for l_max in (1, 8, 33):
        torch.manual_seed(1)
        layer = double(**options | {"l_max": l_max})
        torch.testing.assert_close(layer.convolution_kernel(60), long.convolution_kernel(60), rtol=1e-8, atol=1e-8)


@all_kernels
@pytest.mark.parametrize("channels", [1, 2])
def test_forward_is_steps_is_any_split_into_segments(options, channels):
    layer, x = double(channels=channels, **options), tokens(3, 30)
    whole = layer(x)
    state, outputs = layer.initial_state(3), []
    with nn.reuse_kernels(layer):
        for t in range(30):
            outputs.append(layer.step(x[:, t], state))
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=1e-9, atol=1e-9)
    for cuts in ((30,), (1, 29), (17, 0, 13), (8, 8, 8, 6)):
        segment_state, segments = layer.initial_state(3), []
        for segment in x.split(cuts, dim=1):
            y, segment_state = layer(segment, state=segment_state)
            segments.append(y)
        torch.testing.assert_close(torch.cat(segments, 1), whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(segment_state, state, rtol=1e-9, atol=1e-9)


@all_kernels
def test_gradient_of_a_state(options):
    layer, x = double(**options), tokens(1, 5)
    state = torch.randn(1, 6, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda state: layer(x, state=state)[0], state)


@all_kernels
def test_given_state_is_not_changed(options):
    layer = double(**options)
    state = torch.randn(2, 6, 4, 2, dtype=torch.float64)
    before = state.clone()
    for x in (tokens(2, 9), tokens(2, 0)):
        _, after = layer(x, state=state)
        assert torch.equal(state, before)
    assert torch.equal(after, state) and after is not state


@all_kernels
def test_two_sided_is_two_one_sided(options):
    """The reverse direction sees later tokens only, the nearest at lag 0 of its kernel."""
    both = double(bidirectional=True, **options)
    forward, reverse = double(**options), double(**options)
    state = {name: value for name, value in both.state_dict().items() if name != "C"}
    forward.load_state_dict(state | {"C": both.C[:1]})
    reverse.load_state_dict(state | {"C": both.C[1:], "D": torch.zeros_like(both.D)})
    x = tokens(2, 20)
    backwards = reverse(x.flip(1)).flip(1)
    expected = forward(x) + torch.cat([backwards[:, 1:], torch.zeros_like(backwards[:, :1])], dim=1)
    torch.testing.assert_close(both(x), expected, rtol=1e-9, atol=1e-9)


@all_kernels_and_dss
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_documents_are_those_alone(options, bidirectional):
    layer = double(bidirectional=bidirectional, **options)
    x = tokens(2, 20)
    ids = torch.tensor([[3] * 7 + [1] * 1 + [3] * 12, [0] * 20])
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = mask[1, 15:] = 0
    x[1, :4] = x[1, 15:] = torch.nan
    y = layer(x, mask, ids)
    for row, begin, end in ((0, 0, 7), (0, 7, 8), (0, 8, 20), (1, 4, 15)):
        alone = layer(x[row : row + 1, begin:end])[0]
        torch.testing.assert_close(y[row, begin:end], alone, rtol=1e-9, atol=1e-9)


@all_kernels
def test_padded_and_packed_rows_hand_on_their_own_state(options):
    """The state is that after a row's last real token; its first document continues from the given one."""
    layer, x = double(**options), tokens(4, 12)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, 9:] = mask[1, :5] = mask[2] = 0
    x[mask == 0] = torch.nan
    ids = torch.tensor([[0] * 12, [0] * 8 + [1] * 4, [0] * 12, [5] * 3 + [6] * 9])
    state = torch.randn(4, 6, 4, 2, dtype=torch.float64)
    y, after = layer(x, mask, ids, state)
    zero = torch.zeros_like(state[:1])
    documents = [(0, 0, 9, state[:1]), (1, 5, 8, state[1:2]), (1, 8, 12, zero), (3, 0, 3, state[3:]), (3, 3, 12, zero)]
    last = {2: state[2:3]}
    for row, begin, end, before in documents:
        alone, last[row] = layer(x[row : row + 1, begin:end], state=before)
        torch.testing.assert_close(y[row, begin:end], alone[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, torch.cat([last[row] for row in range(4)]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_scan_is_the_convolution(disc, packed, monkeypatch):
    layer, x = double(kernel="s4d", disc=disc, channels=2), tokens(2, 40).requires_grad_()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    ids = torch.arange(40).expand(2, -1) // 9 if packed else None
    results = []
    for limit, scans in ((0, False), (8, True)):
        monkeypatch.setattr(nn.state_space, "SCAN_LIMIT", limit)
        assert layer.scans is scans
        y = layer(x, mask, ids, rate=1.5)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_two_sided_layers_and_those_without_a_recurrence_do_not_scan(monkeypatch):
    monkeypatch.setattr(nn.state_space, "SCAN_LIMIT", 8)
    assert s4().scans and not nn.S4(6, 10, kernel="s4d").scans
    assert not s4(bidirectional=True).scans and not s4(disc="dss").scans and not s4(kernel="s4").scans


@all_kernels
def test_reused_kernels_are_those_of_the_parameters(options):
    layer, x = s4(**options), torch.randn(2, 9, 6)
    with torch.no_grad(), nn.reuse_kernels(torch.nn.Sequential(layer)):
        expected = layer(x)
        assert torch.equal(layer(x), expected)
        assert layer(x, rate=2.0).ne(expected).any() and layer(x[:, :5]).shape == (2, 5, 6)
        layer.C *= 2
        with nn.reuse_kernels(layer):
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
        with torch.enable_grad():
            y = layer(x)  # with gradients nothing is reused
            assert y.ne(expected).any() and torch.autograd.grad(y.sum(), layer.C)[0].any()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kernel", ["s4", "s4d"])
def test_steps_reuse_their_output_matrix(kernel):
    layer, x = s4(kernel=kernel), torch.randn(2, 6)
    state = layer.initial_state(2)
    with torch.no_grad(), nn.reuse_kernels(layer):
        layer.step(x, state)
        before = {key: value.clone() for key, value in layer._reused.items()}
        layer.step(x, state)
        assert layer._reused.keys() == before.keys() == ({"C"} if kernel == "s4" else set())


@all_kernels
def test_a_state_of_zeros_is_no_state(options):
    """Padding between real tokens counts as zeros, whichever way the layer runs."""
    layer, x = double(**options), tokens(2, 8)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1, 0, 1]])
    ids = torch.zeros(2, 8, dtype=torch.long)
    expected = layer(x, mask)[mask.bool()]
    zeros = layer.initial_state(2)
    for y in (layer(x, mask, ids), layer(x, mask, state=zeros)[0], layer(x, mask, ids, zeros)[0]):
        torch.testing.assert_close(y[mask.bool()], expected, rtol=1e-9, atol=1e-9)


@all_kernels
def test_a_state_under_autocast_is_that_without(options):
    layer, x = s4(**options), torch.randn(2, 9, 6)
    state = torch.randn(2, *layer.state_size)
    with torch.autocast("cpu", torch.bfloat16):
        y, after = layer(x, state=state)
    expected, expected_after = layer(x, state=state)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, expected_after)


def test_memory_of_packed_rows_is_linear():
    """A document of half the row and half a row of single tokens: padded to the longest they were L / 2 rows."""
    layer, L = nn.S4(16, 16, n_ssm=1, l_max=64), 4096
    ids = torch.cat([torch.zeros(L // 2), torch.arange(1, L // 2 + 1)])[None].long()
    x = torch.randn(1, L, 16)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x, segment_ids=ids)) < 100 * x.nbytes


def test_a_call_with_the_state_dict_of_another_truncation():
    """Each goes by the truncation that its C has."""
    layer, other = double(kernel="s4", l_max=64), double(kernel="s4", l_max=16)
    x = tokens(1, 30)
    torch.testing.assert_close(torch.func.functional_call(layer, other.state_dict(), x), other(x))
    torch.testing.assert_close(layer(x), torch.func.functional_call(other, layer.state_dict(), x))


@pytest.mark.parametrize("assign", [False, True])
def test_truncation_travels_with_the_output_matrix(assign, tmp_path):
    saved, loaded = double(kernel="s4", l_max=12), double(kernel="s4", l_max=100)
    torch.save(saved.state_dict(), tmp_path / "state")
    loaded.load_state_dict(torch.load(tmp_path / "state"), assign=assign)
    x = tokens(1, 30)
    assert loaded.nodes == 12 and torch.equal(loaded(x), saved(x))
    loaded.reset_parameters()
    assert loaded.l_max == loaded.nodes == 100


@all_kernels
@pytest.mark.parametrize("bidirectional", [False, True])
def test_compiles_as_one_graph_for_all_lengths(options, bidirectional):
    layer = s4(bidirectional=bidirectional, **options)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in (5, 17, 33):
        x = torch.randn(2, L, 6)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kernel", ["s4", "s4d"])
def test_compiled_step(kernel):
    layer = s4(kernel=kernel)
    torch._dynamo.reset()
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    state, expected_state = layer.initial_state(2), layer.initial_state(2)
    for _ in range(3):
        x = torch.randn(2, 6)
        torch.testing.assert_close(compiled(x, state), layer.step(x, expected_state))
        torch.testing.assert_close(state, expected_state)


def test_a_state_is_a_tensor(tmp_path):
    layer = s4(kernel="s4")
    state = layer.initial_state(3)
    assert state.shape == (3, *layer.state_size) and state.dtype == torch.float32 and not state.any()
    layer.step(torch.randn(3, 6), state)
    torch.save(state, tmp_path / "state")
    assert torch.equal(torch.load(tmp_path / "state"), state)
    x = torch.randn(3, 6)
    chosen, clone = state.index_select(0, torch.tensor([2])), state.detach().clone()
    assert torch.equal(layer.step(x[2:], chosen), layer.step(x, clone)[2:])


@pytest.mark.parametrize("init", FREQUENCIES)
def test_diagonal_initialisations(init):
    layer = s4(init=init)
    n = torch.arange(4.0)
    torch.testing.assert_close(layer.w_imag, FREQUENCIES[init](n, 8).expand(2, -1))
    real = 1 + n if init == "real" else torch.full_like(n, 0.5)
    torch.testing.assert_close(layer.log_w_real.exp(), real.expand(2, -1))


@pytest.mark.parametrize("kernel", ["s4", "s4d"])
def test_random_initial_values_have_their_distributions(kernel):
    layer = nn.S4(4096, 8, kernel=kernel, dt_min=1e-2, dt_max=1.0)
    C = layer.C if kernel == "s4d" else untruncate(layer.C, layer.w, layer.P, layer.log_dt, layer.nodes)
    assert C.mean().abs() < 0.02 and abs(C.var() - 0.5) < 0.02
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


@all_kernels_and_dss
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_invisible(options, bidirectional):
    layer = double(bidirectional=bidirectional, **options)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    alone = layer(x)
    garbage = torch.full((2, 4, 6), torch.nan, dtype=torch.float64)
    right, left = torch.cat([x, garbage], 1), torch.cat([garbage, x], 1)
    mask = torch.tensor([[1] * 9 + [0] * 4] * 2)
    torch.testing.assert_close(layer(right, mask)[:, :9], alone)
    torch.testing.assert_close(layer(left, mask.flip(1))[:, 4:], alone)


@pytest.mark.parametrize("options", [KERNELS["s4d"], KERNELS["legs"] | {"l_max": 100_000}], ids=["s4d", "s4"])
def test_rate_is_a_factor_of_the_step(options):
    layer = double(**options)
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    faster = layer(x, rate=2.0)
    torch.testing.assert_close(layer(x, state=layer.initial_state(1), rate=2.0)[0], faster)
    with torch.no_grad():
        layer.log_dt += math.log(2.0)
    torch.testing.assert_close(faster, layer(x))


@all_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_stay_float32_in_a_half_precision_module(options, dtype):
    layer = torch.nn.Sequential(s4(**options)).to(dtype)
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


@pytest.mark.parametrize(("kernel", "matrices"), [("s4", {"P"}), ("s4d", set())])
def test_lr_of_the_state_matrix(kernel, matrices):
    matrices = matrices | {"log_w_real", "w_imag", "B"}
    options = s4(kernel=kernel, lr=1e-3).parameter_options()
    assert {name for name, option in options.items() if option == {"weight_decay": 0.0, "lr": 1e-3}} == matrices
    frozen = s4(kernel=kernel, lr=0)
    assert set(dict(frozen.named_buffers())) - {"l_max"} == matrices
    assert set(frozen.state_dict()) == set(s4(kernel=kernel).state_dict())
    frozen(torch.randn(1, 5, 6)).sum().backward()


def test_options_of_the_optimizer():
    assert s4().parameter_options()["B"] == {"weight_decay": 0.0}
    assert s4(lr=1e-3).parameter_options()["w_imag"] == {"weight_decay": 0.0, "lr": 1e-3}
    frozen = s4(lr=0)
    assert set(frozen.parameter_options()) == {"log_dt"}


@all_kernels
def test_gradients_reach_every_parameter(options):
    layer = s4(bidirectional=True, channels=2, **options)
    layer(torch.randn(2, 11, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "s5"}, r"kernel is 's5', expected 's4' or 's4d'"),
        ({"d_model": 0}, r"d_model is 0, expected at least 1"),
        ({"lr": -1.0}, r"lr is -1.0, expected None, 0 or a positive number"),
        ({"d_state": 7}, r"d_state is 7, expected an even number of at least 2"),
        ({"n_ssm": 4}, r"n_ssm is 4, expected a divisor of d_model = 6"),
        ({"channels": 0}, r"channels is 0, expected at least 1"),
        ({"disc": "euler"}, r"disc is 'euler', expected 'zoh', 'bilinear' or 'dss'"),
        ({"dt_min": 0.2}, r"dt_min and dt_max are 0.2 and 0.1, expected 0 < dt_min <= dt_max"),
        ({"init": "fout"}, r"init is 'fout', expected one of legs, lin, inv, quad, real for kernel 's4d'"),
        ({"kernel": "s4", "init": "lin"}, r"init is 'lin', expected one of legs, legt, fout, hippo for kernel 's4'"),
        ({"kernel": "s4", "init": "legt"}, r"rank is 1, expected at least 2 for legt"),
        ({"kernel": "s4", "init": "hippo", "n_ssm": 3}, r"n_ssm is 3, expected an even number for init 'hippo'"),
        ({"kernel": "s4", "l_max": 0}, r"l_max is 0, expected at least 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        nn.S4(**{"d_model": 6, "d_state": 8, "kernel": "s4d", **options})


@pytest.mark.parametrize("layer", [s4(), nn.LocalAttention(6, 2, window=(1, 1))], ids=["S4", "LocalAttention"])
def test_attention_mask_is_bool_or_integers_of_one_shape(layer):
    x, mask = torch.randn(2, 2, 6), torch.tensor([[1, 1], [1, 0]])
    for dtype in (torch.bool, torch.uint8):
        assert torch.equal(layer(x, mask.to(dtype)), layer(x, mask))
    with pytest.raises(TypeError, match="attention_mask is torch.float32, expected bool or integers, 1 at"):
        layer(x, mask.float())
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2\], expected \[2, 2\], \(B, L\)"):
        layer(x, mask[0])


def test_error_of_a_wrong_input():
    with pytest.raises(ValueError, match=r"x has shape \[2, 5, 7\], expected \(B, L, 6\)"):
        s4()(torch.zeros(2, 5, 7))
    with pytest.raises(TypeError, match=r"x is torch.int64, expected a floating-point tensor"):
        s4()(torch.zeros(2, 5, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x has shape \[2, 5\], expected \(B, 6\)"):
        s4().step(torch.zeros(2, 5), s4().initial_state(2))
    for rate in (0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"rate is {rate}, expected a positive number"):
            s4()(torch.zeros(2, 5, 6), rate=rate)


def test_error_of_wrong_ids():
    with pytest.raises(ValueError, match=r"segment_ids has shape \[5\], expected \[2, 5\], \(B, L\)"):
        s4()(torch.zeros(2, 5, 6), segment_ids=torch.zeros(5, dtype=torch.long))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"segment_ids is {dtype}, expected integers"):
            s4()(torch.zeros(2, 5, 6), segment_ids=torch.zeros(2, 5, dtype=dtype))


@pytest.mark.parametrize(
    ("options", "state", "error", "message"),
    [
        (
            {"bidirectional": True},
            torch.zeros(2, 6, 4, 2),
            ValueError,
            "bidirectional is True, expected False for a state",
        ),
        (
            {"disc": "dss"},
            torch.zeros(2, 6, 4, 2),
            ValueError,
            "disc is 'dss', expected 'zoh' or 'bilinear' for a state",
        ),
        ({}, torch.zeros(3, 6, 4, 2), ValueError, r"state has shape \[3, 6, 4, 2\], expected \[2, 6, 4, 2\]"),
        (
            {},
            torch.zeros(2, 6, 4, 2).half(),
            TypeError,
            r"state is torch.float16, expected torch.float32, the",
        ),
    ],
)
def test_errors_of_a_state(options, state, error, message):
    layer = s4(**options)
    with pytest.raises(error, match=message):
        layer(torch.zeros(2, 5, 6), state=state)
    with pytest.raises(error, match=message):
        layer.step(torch.zeros(2, 6), state)


def test_two_sided_layer_has_no_initial_state():
    with pytest.raises(ValueError, match="bidirectional is True, expected False for a state"):
        s4(bidirectional=True).initial_state(1)
    with pytest.raises(ValueError, match="disc is 'dss', expected 'zoh' or 'bilinear' for a state"):
        s4(disc="dss").initial_state(1)


@pytest.mark.parametrize("kernel", ["s4", "s4d"])
def test_padded_steps_leave_the_state(kernel):
    layer = nn.S4(6, 8, kernel=kernel, l_max=16).double()
    x, mask = torch.randn(2, 30, 6, dtype=torch.float64), torch.rand(2, 30) < 0.6
    state = layer.initial_state(2)
    y = torch.stack([layer.step(x[:, t], state, mask[:, t]) for t in range(30)], dim=1)
    for row, real in enumerate(mask):
        expected, after = layer(x[row : row + 1, real], state=layer.initial_state(1))
        torch.testing.assert_close(y[row, real], expected[0])
        torch.testing.assert_close(state[row], after[0])


@pytest.mark.parametrize("kernel", ["s4", "s4d"])
def test_a_prompt_with_padding_before_it_is_one_convolution(kernel, monkeypatch):
    """From a state of zeros; of another one, which padding must not let decay, rows are grouped by length."""
    layer = nn.S4(6, 8, kernel=kernel, l_max=16).double()
    x, mask = torch.randn(3, 9, 6, dtype=torch.float64), torch.arange(9) >= torch.tensor([[0], [4], [9]])
    calls, advance = [], layer.advance
    monkeypatch.setattr(layer, "advance", lambda u, state, **options: calls.append(u) or advance(u, state, **options))
    before = torch.randn(3, *layer.state_size, dtype=torch.float64)
    for state, expected_calls in ((layer.initial_state(3), 1), (before, 2)):
        calls.clear()
        y, after = layer(x, mask, state=state)
        assert len(calls) == expected_calls
        for row, real in enumerate(mask[:2]):
            expected, expected_state = layer(x[row : row + 1, real], state=state[row : row + 1])
            torch.testing.assert_close(y[row, real], expected[0])
            torch.testing.assert_close(after[row], expected_state[0])
        torch.testing.assert_close(after[2], state[2])
