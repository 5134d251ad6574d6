"""One list of calls an op, with shapes and strides that break kernels. Every check of an op runs over its list."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Arguments of one call; those that get a gradient have requires_grad."""

    name: str
    args: tuple
    kwargs: dict = field(default_factory=dict)

    def __str__(self):
        return self.name

    def to(self, dtype: torch.dtype) -> "Sample":
        """The same values, strides and requires_grad in new leaf tensors of `dtype`."""
        return self.map(lambda t: copy_strided(t, dtype))

    def map(self, function) -> "Sample":
        """Applies `function` to each floating-point tensor."""

        def apply(value):
            return function(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Sample(self.name, tuple(map(apply, self.args)), {k: apply(v) for k, v in self.kwargs.items()})

    def leaves(self) -> list[Tensor]:
        values = (*self.args, *self.kwargs.values())
        return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def copy_strided(t: Tensor, dtype: torch.dtype) -> Tensor:
    memory = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage()).to(dtype, copy=True)
    return memory.as_strided(t.size(), t.stride(), t.storage_offset()).requires_grad_(t.requires_grad)


def randn(*size: int, grad: bool = True) -> Tensor:
    return torch.randn(size, dtype=torch.float64).requires_grad_(grad)


def constant(*size: int) -> Tensor:
    return randn(*size, grad=False)


def leaf(view: Tensor) -> Tensor:
    return view.detach().requires_grad_()


def long_conv_sample(
    name: str, B=2, C=2, H=3, L=8, Lk=None, Lr=None, *, skip=True, u=None, k=None, channels=True, segment_ids=None
) -> Sample:
    """Lk is L unless given; Lr None is a causal convolution; without `channels` the kernels have no C."""
    lead = (C, H) if channels else (H,)
    return Sample(
        name,
        (
            randn(B, H, L) if u is None else u,
            randn(*lead, L if Lk is None else Lk) if k is None else k,
            randn(*lead) if skip else None,
            None if Lr is None else randn(*lead, Lr),
            segment_ids,
        ),
    )


def long_conv_samples() -> list[Sample]:
    torch.manual_seed(0)
    return [
        long_conv_sample("plain", skip=False),
        long_conv_sample("skip"),
        long_conv_sample("two_sided", Lr=8),
        long_conv_sample("two_sided_without_skip", skip=False, Lr=8),
        long_conv_sample("without_channels", channels=False, Lr=8),
        long_conv_sample("length_1", L=1, Lr=1),
        long_conv_sample("length_2", L=2, Lr=2),
        long_conv_sample("length_3", L=3, Lr=3, H=7),
        long_conv_sample("length_63", L=63, Lr=63, H=9),
        long_conv_sample("length_64", L=64, Lr=64, H=8),
        long_conv_sample("length_65", L=65, Lr=65, H=17, C=1),
        long_conv_sample("length_129", L=129, Lr=129, B=9),
        long_conv_sample("one_channel_large_batch", B=33, C=1, H=1, L=20),
        long_conv_sample("small_batch_blocks", B=9, C=1, H=18, L=20, Lr=20),
        long_conv_sample("short_kernels", L=65, Lk=5, Lr=3),
        long_conv_sample("long_kernels", L=33, Lk=100, Lr=40),
        long_conv_sample("unequal_kernels", L=33, Lk=2, Lr=33),
        long_conv_sample("empty_kernels", L=9, Lk=0, Lr=0),
        long_conv_sample("empty_batch", B=0, Lr=8),
        long_conv_sample("no_channels", H=0, Lr=8),
        long_conv_sample("no_outputs", C=0, Lr=8),
        long_conv_sample("length_0", L=0, Lr=2, Lk=2),
        long_conv_sample("segments", L=9, Lr=9, segment_ids=segments((4, 3, 2), (1, 8))),
        long_conv_sample("segments_causal", L=70, H=9, segment_ids=segments((64, 1, 5), (70,))),
        long_conv_sample("segments_short_kernels", L=70, Lk=5, Lr=3, segment_ids=segments((33, 33, 4), (2, 68))),
        long_conv_sample("segments_long_kernels", L=9, Lk=20, Lr=11, segment_ids=segments((9,), (4, 5))),
        long_conv_sample("segments_of_a_token", L=5, Lr=5, segment_ids=torch.arange(5).repeat(2, 1)),
        long_conv_sample(
            "segments_whose_ids_come_again", L=9, segment_ids=torch.tensor([[5, 5, -1, -1, -1, 5, 5, 5, 0], [7] * 9])
        ),
        long_conv_sample(
            "segments_transposed",
            H=41,
            L=70,
            Lr=70,
            channels=False,
            u=leaf(randn(2, 70, 41).mT),
            segment_ids=segments((30, 31, 9), (70,)).to(torch.uint8),
        ),
        long_conv_sample("segments_empty_batch", B=0, segment_ids=torch.ones(0, 8).long()),
        long_conv_sample("segments_length_0", L=0, Lr=0, segment_ids=torch.ones(2, 0).long()),
        long_conv_sample("transposed", L=33, H=9, Lr=33, u=leaf(randn(2, 33, 9).mT)),
        long_conv_sample("transposed_many_channels", B=3, H=41, L=66, u=leaf(randn(3, 66, 41).mT)),
        long_conv_sample("transposed_without_channels", L=33, channels=False, u=leaf(randn(2, 33, 3).mT)),
        long_conv_sample("sliced", L=20, u=leaf(randn(4, 7, 50)[::2, 1::2, 5:45:2])),
        long_conv_sample("transposed_slice", L=20, u=leaf(randn(2, 20, 7)[..., :3].mT)),
        long_conv_sample("expanded", L=20, u=leaf(randn(1, 3, 1).expand(2, 3, 20))),
        long_conv_sample("expanded_kernel", L=20, Lk=20, k=leaf(randn(2, 1, 20).expand(2, 3, 20))),
        long_conv_sample("gradient_of_u", k=constant(2, 3, 8), skip=False),
        long_conv_sample("gradient_of_kernels", u=constant(2, 3, 8), Lr=8),
        Sample("gradient_of_skip", (*(constant(*s) for s in ((2, 3, 8), (2, 3, 8))), randn(2, 3))),
        Sample("no_gradient", tuple(constant(*s) for s in ((2, 3, 8), (2, 3, 8), (2, 3), (2, 3, 8)))),
    ]


def s4d_parameters(C: int, H: int, N: int, S: int, *, real=False) -> tuple[Tensor, Tensor, Tensor]:
    """w, c and log_dt as S4D draws them."""
    pair = () if real else (2,)
    decay = -0.5 - torch.rand(S, N, dtype=torch.float64)
    frequency = math.pi * torch.arange(N).expand(S, N)
    w = decay if real else torch.stack((decay, frequency), -1)
    log_dt = torch.linspace(math.log(1e-3), math.log(1e-1), H, dtype=torch.float64)
    return leaf(w), randn(C, H, N, *pair), leaf(log_dt)


def diagonal_kernel_sample(
    name: str, length=8, C=2, H=4, N=5, S=2, *, disc="zoh", rate=1.0, real=False, w=None, c=None, log_dt=None
) -> Sample:
    defaults = s4d_parameters(C, H, N, S, real=real)
    w, c, log_dt = (
        default if given is None else given for given, default in zip((w, c, log_dt), defaults, strict=True)
    )
    return Sample(name, (w, c, None if disc is None else log_dt, length), {"disc": disc, "rate": rate})


def diagonal_kernel_samples() -> list[Sample]:
    torch.manual_seed(0)
    return [
        diagonal_kernel_sample("zoh"),
        diagonal_kernel_sample("bilinear", disc="bilinear"),
        diagonal_kernel_sample("dss", disc="dss"),
        diagonal_kernel_sample("none", disc=None),
        diagonal_kernel_sample("real_zoh", real=True),
        diagonal_kernel_sample("real_bilinear", real=True, disc="bilinear"),
        diagonal_kernel_sample("real_dss", real=True, disc="dss"),
        diagonal_kernel_sample("real_none", real=True, disc=None),
        diagonal_kernel_sample("rate", rate=2.5),
        diagonal_kernel_sample("rate_bilinear", rate=0.3, disc="bilinear"),
        diagonal_kernel_sample("rate_dss", rate=2.0, disc="dss"),
        diagonal_kernel_sample("length_0", 0),
        diagonal_kernel_sample("length_1", 1),
        diagonal_kernel_sample("length_1_dss", 1, disc="dss"),
        diagonal_kernel_sample("length_63", 63, H=1, S=1),
        diagonal_kernel_sample("length_64", 64, N=1),
        diagonal_kernel_sample("length_65", 65, C=1, N=33),
        diagonal_kernel_sample("length_129", 129, H=9, S=3),
        *(diagonal_kernel_sample(f"length_{length}", length, N=3) for length in (95, 96, 97, 127, 191, 192, 193)),
        *(diagonal_kernel_sample(f"states_{N}", 100, C=1, N=N) for N in (1, 3, 8, 9, 33)),
        *(diagonal_kernel_sample(f"real_states_{N}", 100, N=N, real=True) for N in (1, 9, 33)),
        diagonal_kernel_sample("length_1000", 1000, N=8),
        diagonal_kernel_sample("a_copy_a_channel", H=6, S=6),
        diagonal_kernel_sample("no_states", N=0),
        diagonal_kernel_sample("no_channels", H=0, S=1),
        diagonal_kernel_sample("no_outputs", C=0),
        diagonal_kernel_sample("transposed", c=leaf(randn(5, 4, 2, 2).transpose(0, 2)), w=leaf(-randn(2, 5, 2).abs())),
        diagonal_kernel_sample("sliced", c=leaf(randn(2, 8, 5, 4)[:, ::2, :, 1:3]), log_dt=leaf(randn(8)[::2] - 3)),
        diagonal_kernel_sample(
            "expanded", c=leaf(randn(2, 1, 5, 2).expand(2, 4, 5, 2)), log_dt=leaf(randn(1).expand(4))
        ),
        diagonal_kernel_sample("gradient_of_w", c=constant(2, 4, 5, 2), log_dt=constant(4)),
        diagonal_kernel_sample("gradient_of_c", w=-constant(2, 5, 2).abs(), log_dt=constant(4)),
        diagonal_kernel_sample("gradient_of_log_dt", w=-constant(2, 5, 2).abs(), c=constant(2, 4, 5, 2)),
        diagonal_kernel_sample(
            "no_gradient",
            w=-constant(2, 5, 2).abs(),
            c=constant(2, 4, 5, 2),
            log_dt=constant(4),
        ),
    ]


def diagonal_scan_sample(
    name: str,
    L=8,
    B=2,
    C=2,
    H=4,
    N=5,
    S=2,
    *,
    disc="zoh",
    real=False,
    with_state=True,
    bidirectional=False,
    segment_ids=None,
    grad=True,
    **given,
) -> Sample:
    """`given` replaces u, w, b, c, log_dt or state, or gives a skip; a state of zeros is None."""
    systems = 2 * H if bidirectional else H
    w, c, log_dt = s4d_parameters(C, systems, N, S, real=real)
    pair = () if real else (2,)
    values = {"u": randn(B, H, L), "w": w, "b": randn(S, N, *pair), "c": c, "log_dt": None if disc is None else log_dt}
    values |= {"state": randn(B, systems, N, *pair) if with_state else None, "skip": None} | given
    options = {"disc": disc, "bidirectional": bidirectional, "segment_ids": segment_ids}
    sample = Sample(name, tuple(values.values()), options)
    return sample if grad else sample.map(Tensor.detach)


def diagonal_step_sample(name: str, B=2, C=2, H=4, N=5, S=2, *, u=None, **options) -> Sample:
    """Without gradients."""
    u = constant(B, H) if u is None else u
    sample = diagonal_scan_sample(name, 1, B, C, H, N, S, u=u, grad=False, **options)
    return Sample(name, sample.args[:-1], {"disc": sample.kwargs["disc"]})


def diagonal_scan_samples() -> list[Sample]:
    torch.manual_seed(0)
    constants = {"u": constant(2, 4, 33), "w": -constant(2, 5, 2).abs(), "b": constant(2, 5, 2)}
    constants |= {"c": constant(2, 4, 5, 2), "log_dt": constant(4) - 3, "state": constant(2, 4, 5, 2)}
    constants |= {"skip": constant(2, 4)}

    def gradient_of(name: str) -> Sample:
        return diagonal_scan_sample(f"gradient_of_{name}", 33, **constants | {name: leaf(constants[name])})

    return [
        diagonal_scan_sample("zoh"),
        diagonal_scan_sample("bilinear", disc="bilinear"),
        diagonal_scan_sample("none", disc=None),
        diagonal_scan_sample("real_zoh", real=True),
        diagonal_scan_sample("real_bilinear", real=True, disc="bilinear"),
        diagonal_scan_sample("real_none", real=True, disc=None),
        diagonal_scan_sample("without_state", with_state=False),
        diagonal_scan_sample("none_without_state", with_state=False, disc=None),
        diagonal_scan_sample("length_0", 0),
        diagonal_scan_sample("length_0_without_state", 0, with_state=False),
        diagonal_scan_sample("length_1", 1),
        diagonal_scan_sample("length_16", 16, H=8),
        diagonal_scan_sample("length_63", 63, H=1, S=1),
        diagonal_scan_sample("length_64", 64, N=1, H=17, S=1),
        diagonal_scan_sample("length_65", 65, C=1, N=33, H=7, S=1),
        diagonal_scan_sample("length_129", 129, H=9, S=3),
        diagonal_scan_sample("length_129_real", 129, H=9, S=3, real=True),
        diagonal_scan_sample("length_1100", 1100, C=1, H=18, N=3, skip=randn(1, 18)),
        diagonal_scan_sample("skip", 40, skip=randn(2, 4)),
        diagonal_scan_sample("bidirectional", 40, S=4, bidirectional=True),
        diagonal_scan_sample(
            "bidirectional_real", 150, H=9, S=9, disc=None, real=True, bidirectional=True, skip=randn(2, 9)
        ),
        diagonal_scan_sample("bidirectional_without_state", 5, with_state=False, bidirectional=True),
        diagonal_scan_sample("bidirectional_length_0", 0, bidirectional=True, skip=randn(2, 4)),
        diagonal_scan_sample("segments", 9, segment_ids=segments((4, 3, 2), (1, 8))),
        diagonal_scan_sample("segments_of_blocks", 70, disc=None, segment_ids=segments((16, 32, 17, 5), (70,))),
        diagonal_scan_sample(
            "segments_two_sided", 300, H=18, N=3, bidirectional=True, segment_ids=segments((130, 150, 20), (1, 299))
        ),
        diagonal_scan_sample(
            "segments_whose_ids_come_again",
            9,
            real=True,
            skip=randn(2, 4),
            with_state=False,
            segment_ids=torch.tensor([[5, 5, -1, -1, -1, 5, 5, 5, 0], [7] * 9], dtype=torch.int32),
        ),
        diagonal_scan_sample(
            "segments_transposed", 40, u=leaf(randn(2, 40, 4).mT), segment_ids=segments((16, 24), (39, 1))
        ),
        diagonal_scan_sample("segments_empty_batch", B=0, segment_ids=torch.ones(0, 8).long()),
        diagonal_scan_sample("segments_length_0", 0, bidirectional=True, segment_ids=torch.ones(2, 0).long()),
        diagonal_scan_sample("length_1000", 1000, B=1, N=8),
        diagonal_scan_sample("a_copy_a_channel", H=6, S=6),
        diagonal_scan_sample("no_states", N=0),
        diagonal_scan_sample("no_channels", H=0, S=1),
        diagonal_scan_sample("no_outputs", C=0),
        diagonal_scan_sample("empty_batch", B=0),
        diagonal_scan_sample("transposed", 33, u=leaf(randn(2, 33, 4).mT), c=leaf(randn(5, 4, 2, 2).transpose(0, 2))),
        diagonal_scan_sample("transposed_two_sided", 150, H=17, S=2, u=leaf(randn(2, 150, 17).mT), bidirectional=True),
        diagonal_scan_sample(
            "sliced", 20, u=leaf(randn(4, 8, 50)[::2, ::2, 5:45:2]), state=leaf(randn(2, 8, 5, 4)[:, ::2, :, 1:3])
        ),
        diagonal_scan_sample(
            "expanded", u=leaf(randn(1, 4, 1).expand(2, 4, 8)), state=leaf(randn(4, 5, 2).expand(2, 4, 5, 2))
        ),
        *map(gradient_of, constants),
        diagonal_scan_sample("no_gradient", **constants),
    ]


def diagonal_step_samples() -> list[Sample]:
    """Without gradients."""
    torch.manual_seed(0)
    sample = diagonal_step_sample
    return [
        sample("zoh"),
        sample("bilinear", disc="bilinear"),
        sample("none", disc=None),
        sample("real_zoh", real=True),
        sample("real_none", real=True, disc=None),
        sample("many_states", N=33, H=9, S=3),
        sample("no_states", N=0),
        sample("no_channels", H=0, S=1),
        sample("no_outputs", C=0),
        sample("empty_batch", B=0),
        sample("transposed", u=constant(4, 2).mT, state=constant(5, 4, 2, 2).transpose(0, 2)),
        sample("sliced", u=constant(4, 8)[::2, ::2], state=constant(2, 8, 5, 4)[:, ::2, :, 1:3]),
    ]


def s4_parameters(M: int, C: int, H: int, N: int, S: int, R: int) -> dict[str, Tensor]:
    """Of stable systems, by name in the order of `s4_kernel`."""
    w, c, log_dt = s4d_parameters(C, H, N, S)
    return {"w": w, "p": randn(R, S, N, 2), "b": randn(M, S, N, 2), "c": c, "log_dt": log_dt}


def s4_kernel_sample(
    name: str, length=8, nodes=8, M=2, C=2, H=4, N=5, S=2, R=1, *, rate=1.0, grad=True, **given
) -> Sample:
    """`given` replaces w, p, b, c or log_dt."""
    values = s4_parameters(M, C, H, N, S, R) | given
    sample = Sample(name, (*values.values(), length), {"nodes": nodes, "rate": rate})
    return sample if grad else sample.map(Tensor.detach)


def s4_kernel_samples() -> list[Sample]:
    torch.manual_seed(0)
    constants = {"w": -constant(2, 5, 2).abs(), "p": constant(1, 2, 5, 2), "b": constant(2, 2, 5, 2)}
    constants |= {"c": constant(2, 4, 5, 2), "log_dt": constant(4) - 3}

    def gradient_of(name: str) -> Sample:
        return s4_kernel_sample(f"gradient_of_{name}", 12, **constants | {name: leaf(constants[name])})

    return [
        *(s4_kernel_sample(f"rank_{R}", R=R) for R in range(4)),
        *(s4_kernel_sample(f"nodes_{nodes}", nodes, nodes) for nodes in (1, 2, 7, 63, 64, 65, 128)),
        *(s4_kernel_sample(f"nodes_{nodes}", nodes, nodes, M=1, C=1) for nodes in (93, 94, 95, 96, 190, 193)),
        *(s4_kernel_sample(f"states_{N}", 100, 96, M=1, C=1, N=N) for N in (1, 3, 8, 9, 33)),
        *(s4_kernel_sample(f"length_{length}", length, nodes=7) for length in (0, 1, 6, 8, 15, 100)),
        s4_kernel_sample("far_beyond_one_node", 200, nodes=1, R=2),
        s4_kernel_sample("beyond_several_blocks", 300, nodes=75, R=2),
        s4_kernel_sample("rate_half", 20, nodes=10, rate=0.5),
        s4_kernel_sample("rate_2", 5, nodes=10, rate=2.0),
        s4_kernel_sample("rate_1.5", 5, nodes=10, rate=1.5),
        s4_kernel_sample("nodes_round_up_to_even", 4, nodes=7, rate=2.0),
        s4_kernel_sample("nodes_round_down_to_even", 2, nodes=5, rate=2.0),
        s4_kernel_sample("rate_beyond_nodes", 40, nodes=7, rate=2.0, R=2),
        s4_kernel_sample("rate_leaves_no_node", 0, nodes=1, rate=5.0),
        s4_kernel_sample("one_copy", S=1),
        s4_kernel_sample("a_copy_a_channel", S=4, R=3),
        s4_kernel_sample("one_of_each", M=1, C=1, H=1, N=1, S=1),
        s4_kernel_sample("many", 65, nodes=65, M=3, C=4, H=6, N=33, S=3, R=2),
        s4_kernel_sample("no_inputs", M=0),
        s4_kernel_sample("no_outputs", C=0),
        s4_kernel_sample("no_channels", H=0),
        s4_kernel_sample("no_states", N=0),
        s4_kernel_sample("no_states_extended", 20, N=0),
        s4_kernel_sample(
            "transposed",
            12,
            w=leaf(-randn(5, 2, 2).transpose(0, 1).abs()),
            p=leaf(randn(1, 2, 2, 5).mT),
            b=leaf(randn(5, 2, 2, 2).transpose(0, 2)),
            c=leaf(randn(5, 4, 2, 2).transpose(0, 2)),
        ),
        s4_kernel_sample(
            "strided",
            12,
            w=leaf(-randn(4, 5, 4).abs()[::2, :, 1:3]),
            p=leaf(randn(2, 2, 10, 2)[1:, :, ::2]),
            b=leaf(randn(3, 2, 5, 4)[1:, :, :, ::2]),
            c=leaf(randn(2, 8, 5, 2)[:, 1::2]),
            log_dt=leaf(randn(8)[::2] - 3),
        ),
        s4_kernel_sample(
            "expanded",
            12,
            w=leaf(-randn(5, 2).abs().expand(2, 5, 2)),
            p=leaf(randn(2, 1, 5, 2).expand(2, 2, 5, 2)),
            b=leaf(randn(2, 2, 1, 2).expand(2, 2, 5, 2)),
            c=leaf(randn(2, 1, 5, 2).expand(2, 4, 5, 2)),
            log_dt=leaf(randn(1).expand(4) - 3),
        ),
        *map(gradient_of, constants),
        s4_kernel_sample("no_gradient", **constants),
    ]


def s4_state_sample(name: str, L=8, B=2, H=4, N=5, S=2, R=1, *, with_state=True, **given) -> Sample:
    """`given` replaces u, w, p, b, log_dt or state."""
    system = s4_parameters(1, 0, H, N, S, R)
    values = {"u": randn(B, H, L), "w": system["w"], "p": system["p"], "b": system["b"][0]}
    values |= {"log_dt": system["log_dt"], "state": randn(B, H, N, 2) if with_state else None} | given
    return Sample(name, tuple(values.values())).map(Tensor.detach)


def s4_state_samples() -> list[Sample]:
    """Without gradients."""
    torch.manual_seed(0)
    return [
        *(s4_state_sample(f"rank_{R}", R=R) for R in range(4)),
        *(s4_state_sample(f"length_{L}", L) for L in (0, 1, 63, 64, 65, 300)),
        s4_state_sample("without_state", with_state=False),
        s4_state_sample("length_0_without_state", 0, with_state=False),
        s4_state_sample("one_copy", S=1),
        s4_state_sample("a_copy_a_channel", S=4),
        s4_state_sample("many", B=7, H=6, N=33, S=3, R=2),
        s4_state_sample("empty_batch", B=0),
        s4_state_sample("no_channels", H=0),
        s4_state_sample("no_states", N=0),
        s4_state_sample("transposed", u=randn(2, 8, 4).mT, state=randn(5, 4, 2, 2).transpose(0, 2)),
        s4_state_sample("sliced", u=randn(4, 8, 30)[::2, ::2, 3:27:3], state=randn(2, 8, 5, 4)[:, ::2, :, 1:3]),
        s4_state_sample("expanded", u=randn(1, 4, 1).expand(2, 4, 8), state=randn(4, 5, 2).expand(2, 4, 5, 2)),
    ]


def s4_step_sample(name: str, B=2, C=2, H=4, N=5, S=2, R=1, **given) -> Sample:
    """`given` replaces u, w, p, b, c, log_dt or state."""
    system = s4_parameters(1, C, H, N, S, R)
    values = {"u": randn(B, H), "w": system["w"], "p": system["p"], "b": system["b"][0], "c": system["c"]}
    values |= {"log_dt": system["log_dt"], "state": randn(B, H, N, 2)} | given
    return Sample(name, tuple(values.values())).map(Tensor.detach)


def s4_step_samples() -> list[Sample]:
    """Without gradients."""
    torch.manual_seed(0)
    return [
        *(s4_step_sample(f"rank_{R}", R=R) for R in range(4)),
        s4_step_sample("one_copy", S=1),
        s4_step_sample("a_copy_a_channel", S=4),
        s4_step_sample("many", B=7, C=3, H=6, N=33, S=3, R=2),
        s4_step_sample("empty_batch", B=0),
        s4_step_sample("no_outputs", C=0),
        s4_step_sample("no_channels", H=0),
        s4_step_sample("no_states", N=0),
        s4_step_sample("transposed", u=randn(4, 2).mT, state=randn(5, 4, 2, 2).transpose(0, 2)),
        s4_step_sample("sliced", u=randn(4, 8)[::2, ::2], state=randn(2, 8, 5, 4)[:, ::2, :, 1:3]),
        s4_step_sample("expanded", u=randn(1, 4).expand(2, 4), c=randn(2, 1, 5, 2).expand(2, 4, 5, 2)),
    ]


def local_attention_sample(
    name: str, B=2, Lq=9, H=2, D=4, *, Lk=None, Hkv=None, Dv=None, bias=False, q=None, k=None, v=None, **kwargs
) -> Sample:
    """Lk, Hkv and Dv are Lq, H and D unless given."""
    Lk, Hkv, Dv = (default if given is None else given for given, default in ((Lk, Lq), (Hkv, H), (Dv, D)))
    entries = Lq + Lk - 1
    if kwargs.get("window") is not None:
        entries = sum(kwargs["window"]) + 1
    elif kwargs.get("chunk_size") is not None:
        entries = 2 * kwargs["chunk_size"] - 1
    return Sample(
        name,
        (
            randn(B, Lq, H, D) if q is None else q,
            randn(B, Lk, Hkv, D) if k is None else k,
            randn(B, Lk, Hkv, Dv) if v is None else v,
            randn(H, entries) if bias else None,
        ),
        kwargs,
    )


def linear_step_samples() -> list[Sample]:
    """Without gradients."""
    torch.manual_seed(0)
    sizes = {
        "one": (1, 1, 1),
        "row": (1, 40, 130),
        "rows": (3, 7, 129),
        "many_rows": (11, 5, 63),
        "several_threads": (5, 600, 140),
        "empty_batch": (0, 3, 4),
        "no_columns": (2, 0, 4),
        "no_channels": (2, 3, 0),
    }
    samples = [Sample(name, (constant(B, K), constant(N, K), constant(N))) for name, (B, N, K) in sizes.items()]
    return [
        *samples,
        Sample("without_bias", (constant(2, 33), constant(9, 33))),
        Sample("vector", (constant(33), constant(9, 33), constant(9))),
        Sample("batch_of_rows", (constant(2, 1, 3, 33), constant(9, 33), constant(9))),
        Sample("sliced", (constant(4, 80)[::2, 3:70], constant(18, 90)[::2, 5:72], constant(18)[::2])),
        Sample("rows_not_contiguous", (constant(33, 2).mT, constant(33, 9).mT, constant(9))),
        Sample("strided_channels", (constant(2, 66)[:, ::2], constant(9, 66)[:, ::2], None)),
        Sample("expanded", (constant(1, 33).expand(2, 33), constant(1, 33).expand(9, 33), constant(1).expand(9))),
    ]


def local_attention_step_sample(
    name: str, position: list[int] | Tensor, size=5, H=2, D=4, *, Hkv=None, Dv=None, with_bias=True, scale=None, **given
) -> Sample:
    """Without gradients. A row for each position; Hkv and Dv are H and D unless given; `given` replaces tensors."""
    B, Hkv, Dv = len(position), H if Hkv is None else Hkv, D if Dv is None else Dv
    values = {"q": constant(B, H, D), "k": constant(B, Hkv, D), "v": constant(B, Hkv, Dv)}
    values |= {"bias": constant(H, size) if with_bias else None}
    values |= {"k_cache": constant(B, size, Hkv, D), "v_cache": constant(B, size, Hkv, Dv)}
    values |= {"position": torch.as_tensor(position, dtype=torch.long)} | given
    return Sample(name, tuple(values.values()), {"scale": scale})


def local_attention_step_samples() -> list[Sample]:
    """Without gradients."""
    torch.manual_seed(0)
    sample = local_attention_step_sample
    return [
        sample("first_token", [0]),
        sample("rows_begin_apart", [-3, -1, 0, 3, 4, 5, 12]),
        sample("without_bias", [2, 9], with_bias=False),
        sample("hidden_by_bias", [2, 9], bias=torch.full((2, 5), -math.inf, dtype=torch.float64)),
        sample("window_of_itself", [0, 7], 1),
        sample("wide", [300, 127, 128, 128 * 7 + 63], 128, D=64),
        sample("wider_than_the_row", [70, 5], 400, H=3, D=17, Dv=33),
        sample("grouped", [10, 3, 70], 65, H=6, Hkv=2, D=20, Dv=9),
        sample("one_key_head", [70], 64, H=5, Hkv=1, D=150, Dv=67),
        sample("one_channel", [20], 9, D=1, Dv=1),
        sample("no_values", [3], Dv=0),
        sample("no_channels", [3], D=0, Dv=2, scale=1.0),
        sample("no_heads", [3], H=0, Hkv=1),
        sample("empty_batch", []),
        sample("scale", [3, 8], scale=0.3),
        sample("large_scores", [8, 30], 20, scale=300.0),
        sample(
            "sliced",
            torch.tensor([3, 0, 8])[::2],
            q=constant(4, 2, 12)[::2, :, 4:8],
            bias=constant(2, 9)[:, 2:7],
            k_cache=constant(2, 10, 2, 8)[:, ::2, :, 2:6],
        ),
        sample("heads_before_tokens", [3, 8], **{f"{n}_cache": constant(2, 2, 5, 4).transpose(1, 2) for n in "kv"}),
        sample(
            "strided_rows",
            [3, 8],
            q=constant(2, 4, 2).mT,
            v=constant(2, 4, 2).mT,
            bias=constant(5, 2).mT,
            v_cache=constant(2, 5, 4, 2).mT,
        ),
        sample("expanded", torch.tensor(8).expand(2), k=constant(4).expand(2, 2, 4)),
    ]


def padding(*real: tuple[int, int], length: int) -> Tensor:
    """A row for each (begin, end): True from begin to end."""
    position = torch.arange(length)
    return torch.stack([(position >= begin) & (position < end) for begin, end in real])


def segments(*rows: tuple[int, ...]) -> Tensor:
    """A row of ids for each list of the lengths of its documents."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def dropout(p: float = 0.3, seed: int = 2**61 + 1) -> dict:
    return {"dropout_p": p, "dropout_seed": torch.tensor(seed)}


def local_attention_samples() -> list[Sample]:
    torch.manual_seed(0)
    return [
        local_attention_sample("full_row"),
        local_attention_sample("full_row_bias", bias=True),
        local_attention_sample("full_row_causal", causal=True),
        local_attention_sample("full_row_causal_bias", causal=True, bias=True),
        local_attention_sample("window", window=(3, 2)),
        local_attention_sample("window_bias", window=(3, 2), bias=True),
        local_attention_sample("window_causal_bias", window=(3, 0), causal=True, bias=True),
        local_attention_sample("window_of_itself", window=(0, 0), bias=True),
        local_attention_sample("window_ahead", window=(0, 4), bias=True),
        local_attention_sample("window_wider_than_the_row", window=(40, 30), bias=True),
        local_attention_sample("length_1", Lq=1, bias=True),
        local_attention_sample("length_63", Lq=63, window=(5, 5), bias=True),
        local_attention_sample("length_64", Lq=64, window=(64, 0), bias=True),
        local_attention_sample("length_65", Lq=65, window=(1, 70), bias=True),
        local_attention_sample("length_129", Lq=129, H=3, D=5, window=(16, 16), bias=True),
        local_attention_sample(
            "several_blocks",
            Lq=300,
            Lk=270,
            Hkv=1,
            window=(150, 20),
            bias=True,
            attention_mask=padding((0, 200), (30, 270), length=270),
        ),
        local_attention_sample("wide_rows", Lq=20, D=150, Dv=67, window=(7, 5), bias=True),
        local_attention_sample("decoding", Lq=1, Lk=12, window=(7, 0), bias=True),
        local_attention_sample("more_keys", Lq=5, Lk=12, bias=True),
        local_attention_sample("more_keys_causal", Lq=5, Lk=12, causal=True, bias=True),
        local_attention_sample("more_queries", Lq=12, Lk=5, window=(2, 1), bias=True),
        local_attention_sample("more_queries_causal", Lq=12, Lk=5, causal=True, bias=True),
        local_attention_sample("grouped_queries", H=6, Hkv=2, window=(3, 2), bias=True),
        local_attention_sample("one_key_head", H=4, Hkv=1, Lq=70, window=(9, 3)),
        local_attention_sample("wide_values", Dv=7, window=(3, 2), bias=True),
        local_attention_sample("narrow_values", D=17, Dv=1, window=(3, 2)),
        local_attention_sample("one_channel", D=1, Dv=1, window=(3, 2), bias=True),
        local_attention_sample("scale", window=(3, 2), scale=0.3),
        local_attention_sample("padding", window=(3, 2), bias=True, attention_mask=padding((0, 6), (4, 9), length=9)),
        local_attention_sample("hidden_rows", bias=True, attention_mask=padding((0, 0), (0, 9), length=9)),
        local_attention_sample(
            "hidden_queries", window=(1, 0), bias=True, attention_mask=padding((5, 9), (0, 3), length=9)
        ),
        local_attention_sample("empty_batch", B=0, window=(3, 2), bias=True),
        local_attention_sample("no_queries", Lq=0, Lk=4, window=(3, 2), bias=True),
        local_attention_sample("no_queries_causal", Lq=0, Lk=1, causal=True, bias=True),
        local_attention_sample("no_keys", Lk=0, window=(3, 2), bias=True),
        local_attention_sample("no_keys_causal", Lk=0, causal=True, bias=True),
        local_attention_sample("no_values", Dv=0, window=(3, 2), bias=True),
        local_attention_sample(
            "heads_before_tokens",
            window=(3, 2),
            bias=True,
            **{n: leaf(randn(2, 2, 9, 4).transpose(1, 2)) for n in "qkv"},
        ),
        local_attention_sample("sliced", window=(3, 2), q=leaf(randn(2, 18, 2, 12)[:, ::2, :, 4:8])),
        local_attention_sample("strided_rows", window=(3, 2), v=leaf(randn(2, 9, 4, 2).transpose(2, 3))),
        local_attention_sample("expanded", window=(3, 2), k=leaf(randn(2, 1, 1, 4).expand(2, 9, 2, 4))),
        local_attention_sample("gradient_of_q", k=constant(2, 9, 2, 4), v=constant(2, 9, 2, 4)),
        local_attention_sample("gradient_of_k", q=constant(2, 9, 2, 4), v=constant(2, 9, 2, 4)),
        local_attention_sample("gradient_of_v", q=constant(2, 9, 2, 4), k=constant(2, 9, 2, 4)),
        local_attention_sample(
            "gradient_of_bias", window=(3, 2), bias=True, **{n: constant(2, 9, 2, 4) for n in "qkv"}
        ),
        local_attention_sample("no_gradient", window=(3, 2), **{n: constant(2, 9, 2, 4) for n in "qkv"}),
        *chunk_samples(),
        *segment_samples(),
        *activation_samples(),
        *dropout_samples(),
        local_attention_sample(
            "everything",
            Lq=140,
            Lk=135,
            H=4,
            Hkv=2,
            D=5,
            Dv=6,
            bias=True,
            q=leaf(randn(2, 140, 4, 15)[..., ::3]),
            v=leaf(randn(2, 2, 135, 6).transpose(1, 2)),
            chunk_size=31,
            causal=True,
            attention_mask=padding((0, 100), (30, 135), length=135),
            segment_ids=segments((64, 63, 8), (3, 126, 6)),
            activation="laplace",
            **dropout(),
        ),
        local_attention_sample(
            "everything_in_an_empty_batch",
            B=0,
            bias=True,
            chunk_size=4,
            attention_mask=torch.ones(0, 9).bool(),
            segment_ids=torch.ones(0, 9).long(),
            activation="relu2",
            **dropout(),
        ),
    ]


def chunk_samples() -> list[Sample]:
    return [
        local_attention_sample("chunk", chunk_size=3),
        local_attention_sample("chunk_bias", chunk_size=4, bias=True),
        local_attention_sample("chunk_causal_bias", chunk_size=4, causal=True, bias=True),
        local_attention_sample("chunk_of_one", chunk_size=1, bias=True),
        local_attention_sample("chunk_wider_than_the_row", chunk_size=30, bias=True),
        local_attention_sample("chunk_length_1", Lq=1, chunk_size=2, bias=True),
        local_attention_sample("chunk_length_63", Lq=63, chunk_size=64, bias=True),
        local_attention_sample("chunk_length_64", Lq=64, chunk_size=16, causal=True, bias=True),
        local_attention_sample("chunk_length_65", Lq=65, chunk_size=64, bias=True),
        local_attention_sample("chunk_length_129", Lq=129, H=3, D=5, chunk_size=43, bias=True),
        local_attention_sample(
            "chunk_padding",
            B=4,
            chunk_size=4,
            bias=True,
            attention_mask=padding((0, 6), (3, 9), (2, 7), (0, 0), length=9),
        ),
        local_attention_sample(
            "chunk_holes",
            chunk_size=4,
            causal=True,
            bias=True,
            attention_mask=torch.tensor([[0, 1, 0, 0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 1]]).bool(),
        ),
        local_attention_sample("chunk_more_keys", Lq=5, Lk=12, chunk_size=5, bias=True),
        local_attention_sample("chunk_more_queries", Lq=12, Lk=5, chunk_size=3, bias=True),
        local_attention_sample("chunk_no_keys", Lk=0, chunk_size=3, bias=True, attention_mask=torch.ones(2, 0).bool()),
        local_attention_sample(
            "chunk_several_blocks",
            Lq=300,
            Lk=270,
            Hkv=1,
            chunk_size=150,
            bias=True,
            attention_mask=padding((0, 200), (33, 270), length=270),
        ),
    ]


def segment_samples() -> list[Sample]:
    at_blocks = segments((127, 1, 1, 127, 4), (128, 129, 3))
    return [
        local_attention_sample("segments", segment_ids=segments((4, 3, 2), (1, 1, 7)), bias=True),
        local_attention_sample("segments_causal", segment_ids=segments((4, 3, 2), (9,)), causal=True, bias=True),
        local_attention_sample("segments_window", segment_ids=segments((4, 3, 2), (1, 8)), window=(3, 2), bias=True),
        local_attention_sample(
            "segments_chunk",
            segment_ids=segments((4, 3, 2), (1, 8)),
            chunk_size=3,
            bias=True,
            attention_mask=padding((1, 9), (2, 8), length=9),
        ),
        local_attention_sample(
            "segments_whose_ids_come_again", segment_ids=torch.tensor([[5, 5, -1, -1, -1, 5, 5, 5, 0], [7] * 9])
        ),
        local_attention_sample("segments_of_bytes", segment_ids=segments((4, 5), (9,)).to(torch.uint8)),
        local_attention_sample(
            "segments_of_padding",
            segment_ids=segments((3, 3, 3), (2, 5, 2)),
            bias=True,
            attention_mask=padding((3, 9), (2, 7), length=9),
        ),
        local_attention_sample("segments_more_keys", Lq=5, Lk=12, segment_ids=segments((9, 3), (5, 7)), bias=True),
        local_attention_sample("segments_more_queries", Lq=12, Lk=5, segment_ids=segments((2, 3), (5,)), bias=True),
        local_attention_sample("segments_no_keys", Lk=0, segment_ids=torch.ones(2, 0).long()),
        local_attention_sample("segments_at_blocks", Lq=260, D=3, segment_ids=at_blocks, window=(40, 10), bias=True),
        local_attention_sample("segments_at_blocks_chunk", Lq=260, D=3, Hkv=1, segment_ids=at_blocks, chunk_size=50),
        local_attention_sample("segments_at_blocks_causal", Lq=260, D=3, segment_ids=at_blocks, causal=True, Dv=5),
    ]


def activation_samples() -> list[Sample]:
    return [
        local_attention_sample("relu2", activation="relu2"),
        local_attention_sample("relu2_causal_bias", activation="relu2", causal=True, bias=True),
        local_attention_sample(
            "relu2_chunk_padding",
            activation="relu2",
            chunk_size=4,
            bias=True,
            attention_mask=padding((0, 6), (3, 9), length=9),
        ),
        local_attention_sample("relu2_segments", Lq=70, activation="relu2", segment_ids=segments((64, 6), (3, 67))),
        local_attention_sample("relu2_more_queries", Lq=12, Lk=5, activation="relu2", bias=True),
        local_attention_sample("laplace", activation="laplace"),
        local_attention_sample("laplace_bias", activation="laplace", bias=True),
        local_attention_sample("laplace_chunk_causal", activation="laplace", chunk_size=4, causal=True, bias=True),
        local_attention_sample(
            "laplace_hidden_rows", activation="laplace", bias=True, attention_mask=padding((0, 0), (2, 9), length=9)
        ),
        local_attention_sample("laplace_more_keys", Lq=5, Lk=12, H=4, Hkv=2, Dv=7, activation="laplace", causal=True),
        local_attention_sample("laplace_length_129", Lq=129, activation="laplace", chunk_size=65, bias=True),
    ]


def dropout_samples() -> list[Sample]:
    return [
        local_attention_sample("dropout", **dropout()),
        local_attention_sample("dropout_window_bias", window=(3, 2), bias=True, **dropout(0.5, -1)),
        local_attention_sample("dropout_of_most", causal=True, bias=True, **dropout(0.8)),
        local_attention_sample("dropout_of_none", bias=True, **dropout(0.0)),
        local_attention_sample("dropout_relu2", activation="relu2", bias=True, **dropout()),
        local_attention_sample("dropout_grouped", Lq=65, Lk=70, H=4, Hkv=2, Dv=3, chunk_size=20, **dropout()),
    ]
