import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

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
    peak_allocation,
    relative_errors,
    run,
)
from .sample_inputs import (
    Sample,
    dropout,
    leaf,
    local_attention_sample,
    local_attention_samples,
    padding,
    randn,
    segments,
)

SAMPLES = local_attention_samples()
BY_NAME = {sample.name: sample for sample in SAMPLES}
OP = torch.ops.spade_ext.local_attention.default
FORWARD = torch.ops.spade_ext.local_attention_forward.default
BACKWARD = torch.ops.spade_ext.local_attention_backward.default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample, dtype):
    check_against_reference(local_attention, local_attention_ref, sample, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("L", "D"),
    [(L, 20) for L in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129)] + [(129, D) for D in (1, 7, 8, 16, 64, 128)],
)
@pytest.mark.parametrize("window", [(33, 33), (16, 16), (7, 0), (200, 200)], ids=str)
def test_edges_of_tiles_match_reference(L, D, window, dtype):
    torch.manual_seed(L + D)
    sample = local_attention_sample("", B=1, Lq=L, H=2, Hkv=1, D=D, Dv=D + 1, window=window, bias=True)
    check_against_reference(local_attention, local_attention_ref, sample, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (100, 7)},
        {"window": (0, 90), "attention_mask": padding((0, 530), (400, 1200), length=1200)},
        {"window": (300, 0), "Lq": 700},
        {"window": (20, 20), "Lq": 1900},
        {"chunk_size": 90, "segment_ids": segments((500, 700), (5, 1195)), **dropout()},
        {"activation": "laplace", "causal": True},
    ],
    ids=str,
)
def test_rows_of_several_tasks(options, set_threads):
    torch.manual_seed(0)
    options = {"Lq": 1200} | options
    sample = local_attention_sample("", H=2, Hkv=1, D=3, Lk=1200, bias=True, **options)
    check_against_reference(local_attention, local_attention_ref, sample, torch.float64)
    check_same_bits(local_attention, sample.to(torch.float32), set_threads)


@st.composite
def masks(draw, B, Lk):
    """None, or of each row a stretch or any of its tokens."""
    kind = draw(st.sampled_from([None, "stretch", "any"]))
    if kind is None:
        return None
    if kind == "any":
        return torch.tensor(draw(st.lists(st.booleans(), min_size=B * Lk, max_size=B * Lk))).view(B, Lk).bool()
    ends = [sorted(draw(st.tuples(st.integers(0, Lk), st.integers(0, Lk)))) for _ in range(B)]
    return padding(*ends, length=Lk) if B else torch.ones(0, Lk).bool()


@st.composite
def segment_ids(draw, B, Lk):
    """None, or of each row ids that change in some places; ids may come again."""
    if draw(st.booleans()):
        return None
    changes = st.lists(st.integers(0, max(Lk - 1, 0)), max_size=4)
    ids = torch.zeros(B, Lk, dtype=torch.long)
    for row in ids:
        for change in draw(changes):
            row[change:] = draw(st.integers(0, 2))
    return ids


@st.composite
def strided(draw, B, L, H, D):
    """(B, L, H, D) as projections, slices and transposes leave it."""
    layouts = {
        "contiguous": lambda: randn(B, L, H, D),
        "heads_before_tokens": lambda: randn(B, H, L, D).transpose(1, 2),
        "fused": lambda: randn(B, L, H, 3 * D)[..., D : 2 * D],
        "every_other_token": lambda: randn(B, 2 * L, H, D)[:, ::2],
        "strided_rows": lambda: randn(B, L, D, H).transpose(2, 3),
        "expanded": lambda: randn(1, 1, H, D).expand(B, L, H, D),
    }
    return leaf(layouts[draw(st.sampled_from(sorted(layouts)))]())


@st.composite
def random_samples(draw):
    B, Hkv, Lq, Lk = (draw(st.integers(*ends)) for ends in ((0, 3), (1, 3), (0, 40), (0, 40)))
    kind = draw(st.sampled_from(["window", "chunk", "full_row"]))
    causal = draw(st.booleans())
    activation = "softmax" if kind == "window" else draw(st.sampled_from(["softmax", "relu2", "laplace"]))
    reach = {}
    if kind == "window":
        reach["window"] = (draw(st.integers(0, 50)), 0 if causal else draw(st.integers(0, 50)))
    elif kind == "chunk":
        reach["chunk_size"] = draw(st.integers(1, 50))
    p = draw(st.sampled_from([0.0, 0.0, 0.2, 0.9]))
    H, D, Dv = Hkv * draw(st.integers(0, 3)), draw(st.integers(1, 18)), draw(st.integers(0, 18))
    return local_attention_sample(
        "",
        B,
        Lq,
        H,
        D,
        Lk=Lk,
        Hkv=Hkv,
        Dv=Dv,
        q=draw(strided(B, Lq, H, D)),
        k=draw(strided(B, Lk, Hkv, D)),
        v=draw(strided(B, Lk, Hkv, Dv)),
        bias=draw(st.booleans()) and (bool(reach) or Lq + Lk > 0),
        causal=causal,
        attention_mask=draw(masks(B, Lk)),
        segment_ids=draw(segment_ids(B, Lk)),
        scale=draw(st.sampled_from([None, 0.3])) if activation == "softmax" else None,
        activation=activation,
        dropout_p=p,
        dropout_seed=torch.tensor(draw(st.integers(-(2**63), 2**63 - 1))) if p or draw(st.booleans()) else None,
        **reach,
    )


@settings(max_examples=500, derandomize=True, deadline=None)
@given(sample=random_samples(), dtype=st.sampled_from(sorted(TOLERANCES, key=str)))
def test_matches_reference_in_random_combinations(sample, dtype):
    """Forward and gradients; errors are relative to the largest number of a call."""
    sample = sample.to(dtype)
    actual, expected = run(local_attention, sample), run(local_attention_ref, sample.to(torch.float64), dtype)
    scale = max([1, *(t.abs().max().item() for t in expected if t.numel())])
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.to(dtype), rtol=TOLERANCES[dtype]["rtol"], atol=TOLERANCES[dtype]["atol"] * scale)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(sample=random_samples(), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_types_are_float32_rounded_once(sample, dtype):
    """Gradients too, but for those of softmax, into which the rounded output enters."""
    sample = sample.to(dtype)
    actual = run(local_attention, sample)
    expected = [t.to(dtype) for t in run(local_attention, sample.to(torch.float32), dtype)]
    compared = 1 if sample.kwargs["activation"] == "softmax" else None
    assert all(map(torch.equal, actual[:compared], expected[:compared]))


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


def inner_args(name):
    """The tensors and the options of the inner ops."""
    sample = BY_NAME[name].map(torch.Tensor.detach)
    kwargs = sample.kwargs
    chunk_size, activation = kwargs.get("chunk_size"), kwargs.get("activation", "softmax")
    left, right = kwargs.get("window") or (chunk_size - 1, chunk_size - 1)
    tensors = [kwargs.get(tensor) for tensor in ("attention_mask", "segment_ids", "dropout_seed")]
    scale = 0.5 if activation == "softmax" else None
    return (*sample.args, *tensors), (left, right, chunk_size, scale, activation, kwargs.get("dropout_p", 0.0))


@pytest.mark.parametrize(
    "name",
    [
        "window",
        "window_bias",
        "padding",
        "grouped_queries",
        "wide_values",
        "chunk_padding",
        "segments_window",
        "laplace_length_129",
        "dropout_window_bias",
    ],
)
def test_opcheck_forward(name):
    tensors, options = inner_args(name)
    check_opcheck(FORWARD, (*tensors, *options))


@pytest.mark.parametrize(
    ("name", "output_mask"),
    [
        ("window_bias", [True, True, True, True]),
        ("window_bias", [False, False, False, True]),
        ("window", [True, False, True, False]),
        ("padding", [False, True, False, False]),
        ("wide_values", [True, True, True, True]),
        ("segments_chunk", [True, True, True, True]),
        ("relu2_chunk_padding", [True, True, True, True]),
        ("dropout_window_bias", [True, True, True, True]),
        ("dropout_grouped", [False, True, True, False]),
    ],
)
def test_opcheck_backward(name, output_mask):
    tensors, options = inner_args(name)
    out, lse = FORWARD(*tensors, *options)
    check_opcheck(BACKWARD, (torch.randn_like(out), *tensors, out, lse, *options, output_mask))


@pytest.mark.parametrize(
    "name",
    [
        "full_row_bias",
        "full_row_causal_bias",
        "window_bias",
        "more_queries",
        "grouped_queries",
        "hidden_queries",
        "chunk_causal_bias",
        "chunk_padding",
        "segments_chunk",
        "segments_more_queries",
        "relu2_causal_bias",
        "laplace_chunk_causal",
        "laplace_hidden_rows",
        "dropout_window_bias",
        "dropout_relu2",
    ],
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
        ("aot_eager", {"activation": "laplace", "packed": True}),
        ("inductor", {"chunk_size": 5, "causal": True, "bias": True, "packed": True, **dropout()}),
    ],
    ids=str,
)
def test_one_graph_serves_all_lengths(backend, options):
    packed = options.pop("packed", False)
    samples = [
        local_attention_sample(
            "",
            Lq=L,
            **options,
            attention_mask=padding((0, L), (2, L), length=L) if packed else None,
            segment_ids=segments((3, L - 3), (1, L - 1)) if packed else None,
        )
        for L in (5, 17, 64, 129)
    ]
    check_compiles_once(local_attention, samples, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"B": 1, "H": 1, "window": (9, 0)},
        {"H": 6, "Hkv": 2, "window": (3, 20)},
        {"B": 1, "H": 1, "Lk": 333},
        {"H": 4, "Hkv": 2, "chunk_size": 90, "segment_ids": segments((170, 130), (5, 295)), **dropout()},
        {"chunk_size": 90, "activation": "laplace", "attention_mask": padding((40, 300), (0, 290), length=300)},
        {"H": 1, "activation": "relu2", "causal": True, **dropout()},
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(options, dtype, set_threads):
    sample = local_attention_sample("", Lq=300, bias=True, **options).to(dtype)
    check_same_bits(local_attention, sample, set_threads)


@pytest.mark.parametrize("L", [1, 2, 63, 64, 129, 1000, 1024, 4096])
def test_float32_precision(L):
    sample = local_attention_sample("", B=1, Lq=L, Lk=L + 1, D=16, window=(32, 32))
    assert max(relative_errors(local_attention, local_attention, sample, torch.float32)) < 5e-6


@pytest.mark.parametrize("L", [1, 64, 129, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 64},
        {"activation": "relu2", "chunk_size": 64},
        {"activation": "laplace"},
        {"activation": "laplace", "causal": True, **dropout()},
    ],
    ids=str,
)
def test_float32_precision_of_options(options, L):
    sample = local_attention_sample("", B=1, Lq=L, Lk=L + 1, D=16, bias=True, **options)
    assert max(relative_errors(local_attention, local_attention, sample, torch.float32)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("L", [2, 64, 129, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": (16, 16)},
        {"window": (64, 0)},
        {"chunk_size": 50},
        {"activation": "laplace", "chunk_size": 64},
        {"activation": "relu2"},
        {"window": (16, 16), **dropout()},
    ],
    ids=str,
)
def test_half_precision_is_as_good_as_naive_attention(options, L, dtype):
    sample = local_attention_sample("", Lq=L, D=32, bias=True, **options)
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


HOLE = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1], [1] * 9]).bool()
HOLE_5 = torch.tensor([[0, 1, 1, 1, 1], [1] * 5]).bool()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("hidden", "options"),
    [
        ([[0, 1, 2], [5, 6, 7, 8]], {"window": (1, 0), "attention_mask": padding((3, 9), (0, 4), length=9)}),
        ([[*range(9)], []], {"attention_mask": padding((4, 4), (0, 9), length=9)}),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], {"Lk": 5, "causal": True}),
        ([[0, 1, 2], [0, 1, 2]], {"Lk": 5, "window": (2, 1)}),
        ([[0, 1, 2], [*range(9)]], {"chunk_size": 5, "attention_mask": padding((3, 9), (0, 0), length=9)}),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], {"Lk": 5, "chunk_size": 7}),
        ([[4, 5], []], {"segment_ids": segments((4, 2, 3), (9,)), "attention_mask": HOLE}),
        ([[0, 1, 2, 3, 4], [0, 1, 2, 3]], {"Lk": 5, "segment_ids": segments((1, 4), (5,)), "attention_mask": HOLE_5}),
        ([[4, 5], []], {"segment_ids": segments((4, 2, 3), (9,)), "attention_mask": HOLE, "activation": "laplace"}),
        (
            [[0, 1, 2], [*range(9)]],
            {"activation": "laplace", "attention_mask": padding((3, 9), (0, 0), length=9), "causal": True},
        ),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], {"Lk": 5, "activation": "laplace", "chunk_size": 7}),
    ],
    ids=[
        "padding",
        "whole_row",
        "queries_before_all_keys",
        "window_before_all_keys",
        "chunk_of_padding",
        "chunk_before_all_keys",
        "segment_of_padding",
        "query_before_all_segments",
        "laplace_segment_of_padding",
        "laplace_causal",
        "laplace_before_all_keys",
    ],
)
def test_query_without_keys_gives_zero(hidden, options, dtype):
    sample = local_attention_sample("", bias=True, **options).to(dtype)
    y, grad_q, *other_gradients = run(local_attention, sample)
    for row, queries in enumerate(hidden):
        assert (y[row, queries] == 0).all()
        assert (grad_q[row, queries] == 0).all()
        assert (y[row, [i for i in range(9) if i not in queries]] != 0).all()
    assert all(value.isfinite().all() for value in (y, grad_q, *other_gradients))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"attention_mask": padding((0, 9), (2, 7), length=9)}, dropout()])
def test_query_whose_scores_are_all_minus_infinity_gives_zero(options, dtype):
    sample = local_attention_sample("", window=(3, 2), bias=True, **options)
    with torch.no_grad():
        sample.args[3][0] = -torch.inf  # head 0: every query; head 1: the last, which has nothing ahead
        sample.args[3][1, :4] = -torch.inf
    check_against_reference(local_attention, local_attention_ref, sample, dtype)
    y, grad_q, *_, grad_bias = run(local_attention, sample.to(dtype))
    for value in (y, grad_q):
        assert (value[:, :, 0] == 0).all() and (value[:, -1] == 0).all()
    assert (grad_bias[0] == 0).all()


def test_query_of_nan_gives_nan():
    sample = local_attention_sample("", window=(3, 2))
    with torch.no_grad():
        sample.args[0][0, 4] = torch.nan
    hidden = local_attention(*sample.args, **sample.kwargs).isnan()
    assert hidden[0, 4].all() and hidden.sum() == hidden[0, 4].sum()


def test_no_width_needs_a_scale():
    check_against_reference(
        local_attention,
        local_attention_ref,
        local_attention_sample("", D=0, Dv=3, window=(3, 2), bias=True, scale=1.0),
        torch.float64,
    )


def test_key_that_is_not_seen_gets_no_gradient():
    sample = BY_NAME["padding"]
    _, _, grad_k, grad_v, _ = run(local_attention, sample)
    hidden = ~sample.kwargs["attention_mask"]
    for gradient in (grad_k, grad_v):
        assert (gradient[hidden] == 0).all()
        assert (gradient[~hidden] != 0).any(-1).all()


LAYOUT_OPTIONS = [
    {"window": (3, 2)},
    {"window": (4, 0), "causal": True},
    *(
        {**reach, "activation": activation}
        for reach in ({}, {"causal": True}, {"chunk_size": 4}, {"chunk_size": 4, "causal": True})
        for activation in ("softmax", "relu2", "laplace")
    ),
]
DOCUMENTS = (5, 1, 9, 3)


def lay_out(layout):
    """A function that places documents (1, l, H, D) in rows, the way back, and the arguments that say where they are.

    Padded keys and values are NaN.
    """
    L = sum(DOCUMENTS)
    if layout == "packed":
        return lambda ts, _: torch.cat(ts, 1), lambda y: y.split(DOCUMENTS, 1), {"segment_ids": segments(DOCUMENTS)}
    if layout == "packed_and_padded":  # two padded positions before each document, which share its id
        mask = torch.cat([torch.tensor([False] * 2 + [True] * length) for length in DOCUMENTS])[None]
        padded = [length + 2 for length in DOCUMENTS]
        return (
            lambda ts, fill: torch.cat([F.pad(t, (0, 0, 0, 0, 2, 0), value=fill) for t in ts], 1),
            lambda y: [t[:, 2:] for t in y.split(padded, 1)],
            {"segment_ids": segments(padded), "attention_mask": mask},
        )
    begins = [L - length if layout == "left_padded" else 0 for length in DOCUMENTS]
    places = [(begin, begin + length) for begin, length in zip(begins, DOCUMENTS, strict=True)]
    return (
        lambda ts, fill: torch.cat(
            [F.pad(t, (0, 0, 0, 0, b, L - e), value=fill) for t, (b, e) in zip(ts, places, strict=True)]
        ),
        lambda y: [y[row : row + 1, b:e] for row, (b, e) in enumerate(places)],
        {"attention_mask": padding(*places, length=L)},
    )


@pytest.mark.parametrize("layout", ["packed", "packed_and_padded", "left_padded", "right_padded"])
@pytest.mark.parametrize("options", LAYOUT_OPTIONS, ids=str)
def test_a_document_gives_what_it_gives_alone(options, layout):
    samples = [local_attention_sample("", B=1, Lq=length, H=4, Hkv=2, D=3, Dv=5, **options) for length in DOCUMENTS]
    place, take, where = lay_out(layout)
    q, k, v = ([sample.args[n] for sample in samples] for n in range(3))
    rows = place(q, 0.0), place(k, torch.nan), place(v, torch.nan)
    L = rows[0].size(1)
    entries = sum(options["window"]) + 1 if "window" in options else 2 * options.get("chunk_size", L) - 1
    bias = randn(4, entries)

    def own_bias(length):  # of a full row: the entries around the middle one
        middle = entries // 2
        return bias if options.keys() & {"window", "chunk_size"} else bias[:, middle + 1 - length : middle + length]

    together = take(local_attention(*rows, bias, **options, **where))
    alone = [
        local_attention(*sample.args[:3], own_bias(length), **options)
        for sample, length in zip(samples, DOCUMENTS, strict=True)
    ]
    cotangents = [torch.randn_like(y) for y in alone]
    leaves = [*q, *k, *v, bias]
    for actual, expected in zip(
        [*together, *torch.autograd.grad(together, leaves, cotangents)],
        [*alone, *torch.autograd.grad(alone, leaves, cotangents)],
        strict=True,
    ):
        assert_close(actual, expected, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("options", LAYOUT_OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(6, 1, 7, 3), (127, 1, 1, 4), (3, 126, 130, 2)], ids=str)
@pytest.mark.parametrize("poisoned", range(4))
def test_nan_stays_in_its_document(options, lengths, poisoned):
    ids = segments(lengths)
    inside = ids[0] == poisoned

    def run_with(value):
        sample = local_attention_sample("", B=1, Lq=sum(lengths), H=2, **options, segment_ids=ids)
        sample = sample.map(lambda t: leaf(t.detach().masked_fill(inside[:, None, None], value)))
        return run(local_attention, sample)

    torch.manual_seed(0)
    expected = run_with(0.0)
    torch.manual_seed(0)
    for actual, clean in zip(run_with(torch.nan), expected, strict=True):
        assert torch.equal(actual[:, ~inside], clean[:, ~inside])
        assert actual[:, inside].isnan().any()


@pytest.mark.parametrize("options", LAYOUT_OPTIONS, ids=str)
def test_nan_in_padding_is_not_read(options):
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    sample = local_attention_sample("", Lq=11, bias=True, **options, attention_mask=mask)
    expected = run(local_attention, sample)
    q, k, v, bias = sample.args
    k, v = (leaf(t.detach().masked_fill(~mask[..., None, None], torch.nan)) for t in (k, v))
    for actual, clean in zip(run(local_attention, Sample("", (q, k, v, bias), sample.kwargs)), expected, strict=True):
        assert torch.equal(actual, clean)


def kept(p: float, seed: int, B=2, H=2, L=256) -> torch.Tensor:
    """(B, H, L, L): which weights stay. Keys score the same, and the values are unit vectors."""
    q, v = torch.zeros(B, L, H, 1), torch.eye(L)[:, None].expand(B, L, H, L)
    return local_attention(q, q, v, **dropout(p, seed)).transpose(1, 2) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_independently(p):
    keep = kept(p, seed=3).double()
    others = {
        "the next key": keep.roll(1, -1),
        "the next query": keep.roll(1, -2),
        "the next diagonal": keep.roll((1, 1), (-1, -2)),
        "the transposed pair": keep.mT,
        "the other head": keep.flip(1),
        "the other row": keep.flip(0),
        "the next seed": kept(p, seed=4).double(),
        "a seed of other high bits": kept(p, seed=3 + 2**40).double(),
    }
    tolerance = 5 / keep.numel() ** 0.5  # five standard errors of a mean of independent numbers of variance 1
    assert abs((keep.mean() - (1 - p)) / (p * (1 - p)) ** 0.5) < tolerance
    for name, other in others.items():
        correlation = ((keep - (1 - p)) * (other - (1 - p))).mean() / (p * (1 - p))
        # Of a pair and its mirror image in the list, each counts twice.
        assert abs(correlation) < tolerance * 2**0.5, name
    for dim in range(4):  # no row, column, head or batch row is kept more often
        count = keep.numel() // keep.size(dim)
        means = keep.movedim(dim, 0).flatten(1).mean(1)
        assert ((means - (1 - p)).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()


def test_dropout_keeps_the_expectation():
    sample = local_attention_sample("", B=1, Lq=6, chunk_size=4).map(torch.Tensor.detach)
    draws = [local_attention(*sample.args, chunk_size=4, **dropout(0.4, seed)) for seed in range(4000)]
    error = (torch.stack(draws).mean(0) - local_attention(*sample.args, chunk_size=4)).abs()
    assert (error < 5 * torch.stack(draws).std(0) / 4000**0.5 + 1e-12).all()


def test_without_dropout_the_seed_says_nothing():
    args = BY_NAME["window_bias"].args
    expected = local_attention(*args, window=(3, 2))
    assert torch.equal(local_attention(*args, window=(3, 2), **dropout(0.0)), expected)
    assert not torch.equal(local_attention(*args, window=(3, 2), **dropout(0.1)), expected)


def test_checkpoint_draws_the_same_mask():
    sample = BY_NAME["window_bias"]

    def draw(*args):
        return local_attention(*args, window=(3, 2), dropout_p=0.5, dropout_seed=torch.randint(2**62, ()))

    def checkpointed(*args):
        return checkpoint(draw, *args, use_reentrant=False)

    results = []
    for op in (draw, checkpointed):
        torch.manual_seed(5)
        results.append(run(op, Sample("", sample.args)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "options",
    [
        {"window": (60, 0), "bias": True},
        {"chunk_size": 61, "activation": "laplace", "bias": True},
        {"segment_ids": torch.arange(200_000)[None] // 61, **dropout()},
    ],
    ids=["window", "chunk", "segments"],
)
def test_memory_is_linear(options):
    sample = local_attention_sample("", B=1, Lq=200_000, H=1, D=2, **options).to(torch.float32)
    assert peak_allocation(lambda: run(local_attention, sample)) < 40 * 2**20  # (L, left + right + 1) is 46 MiB


def test_memory_beyond_inputs_and_results():
    """At L 65,536 at most a tenth of inputs, outputs and gradients."""
    sample = local_attention_sample("", B=1, Lq=65536, H=1, D=64, window=(127, 127), bias=True).to(torch.float32)
    cotangent, results = torch.randn(1, 65536, 1, 64), []

    def forward_backward():
        out = local_attention(*sample.args, **sample.kwargs)
        results.extend([out, *torch.autograd.grad(out, sample.leaves(), cotangent)])

    beyond = peak_allocation(forward_backward) - sum(t.nbytes for t in results)
    assert 0 < beyond < 0.1 * sum(t.nbytes for t in [*sample.leaves(), cotangent, *results])


def arguments(**changes):
    values = {"q": randn(2, 9, 4, 3), "k": randn(2, 7, 2, 3), "v": randn(2, 7, 2, 5)}
    of_keys = {"attention_mask": torch.ones(2, 7).bool(), "segment_ids": torch.ones(2, 7).int()}
    return values | of_keys | {"window": (3, 2), "bias": randn(4, 6)} | changes


CHUNK = {"window": None, "chunk_size": 3, "bias": None}
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
    (ValueError, {"chunk_size": 4}, r"chunk_size is 4 with window \[3, 2\], expected one of the two"),
    (ValueError, CHUNK | {"chunk_size": 0}, r"chunk_size is 0, expected 1 to 1099511627776; no chunk is a full row"),
    (ValueError, CHUNK | {"chunk_size": 2**62}, r"chunk_size is 4611686018427387904, expected 1 to"),
    (TypeError, CHUNK | {"chunk_size": 2.0}, r"chunk_size is 2.0, expected an int or None"),
    (ValueError, CHUNK | {"bias": randn(4, 4)}, r"bias has shape \[4, 4\], expected 5 in .* \(H, 2 chunk_size - 1\)"),
    (ValueError, {"segment_ids": torch.ones(7).long()}, r"segment_ids has shape \[7\], expected \(B, Lk\)"),
    (
        ValueError,
        {"segment_ids": torch.ones(2, 9).long()},
        r"segment_ids has shape \[2, 9\], expected 7 in dimension 1",
    ),
    (TypeError, {"segment_ids": torch.ones(2, 7)}, r"segment_ids is Float, expected integers"),
    (TypeError, {"segment_ids": torch.ones(2, 7).bool()}, r"segment_ids is Bool, expected integers"),
    (
        ValueError,
        {"q": randn(2, 9, 4, 0), "k": randn(2, 7, 2, 0)},
        r"scale is None with q of shape \[2, 9, 4, 0\], expected a number where D is 0",
    ),
    (ValueError, {"activation": "gelu"}, r"activation is gelu, expected softmax, relu2 or laplace"),
    (ValueError, {"activation": "relu2"}, r"activation is relu2 with window \[3, 2\], expected a chunk or a full row"),
    (
        ValueError,
        CHUNK | {"activation": "laplace", "scale": 0.5},
        r"scale is 0.5 with activation laplace, expected None",
    ),
    (ValueError, {"dropout_p": 0.1}, r"dropout_seed is None with dropout_p 0.1, expected an int64 tensor"),
    (ValueError, dropout(1.0), r"dropout_p is 1, expected at least 0 and less than 1"),
    (ValueError, dropout(-0.1), r"dropout_p is -0.1, expected at least 0 and less than 1"),
    (ValueError, dropout(float("nan")), r"dropout_p is nan, expected at least 0 and less than 1"),
    (ValueError, {"dropout_seed": torch.ones(1).long()}, r"dropout_seed has shape \[1\], expected \(\)"),
    (TypeError, {"dropout_seed": torch.tensor(1.0)}, r"dropout_seed is Float, expected int64"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("error", "change", "message"), ERRORS)
def test_errors(error, change, message, device):
    values = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments(**change).items()}
    with pytest.raises(error, match=f"^local_attention: {message}"):
        local_attention(**values)


def test_seed_may_be_on_the_cpu_or_on_the_device_of_q():
    values = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    for device in ("cpu", "meta"):
        local_attention(**values, dropout_p=0.1, dropout_seed=torch.tensor(1, device=device))
    with pytest.raises(ValueError, match="^local_attention: dropout_seed is on meta, expected cpu or cpu, the device"):
        local_attention(**arguments(), dropout_p=0.1, dropout_seed=torch.tensor(1, device="meta"))


@pytest.mark.parametrize("name", ["k", "v", "bias", "attention_mask", "segment_ids"])
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
