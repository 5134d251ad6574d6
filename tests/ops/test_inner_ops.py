"""The inner ops can be called by anyone, so they refuse what the public ones would never give them."""

import pytest
import torch

import spade_ext  # noqa: F401, registers the ops

OPS = torch.ops.spade_ext


def long_conv_backward(device, grad_shape=(2, 3, 5), output_mask=(True, True, False, False)):
    u, k = torch.ones(2, 3, 5, device=device), torch.ones(3, 5, device=device)
    return OPS.long_conv_backward(torch.ones(grad_shape, device=device), u, k, None, None, None, output_mask)


def diagonal_kernel_backward(device, grad_shape=(1, 3, 5), output_mask=(True, True, False)):
    w, c = torch.ones(1, 2, device=device), torch.ones(1, 3, 2, device=device)
    return OPS.diagonal_kernel_backward(torch.ones(grad_shape, device=device), w, c, None, None, 1.0, output_mask)


def diagonal_scan_backward(
    device, grad_shape=(2, 1, 3, 5), output_mask=(*[True] * 4, *[False] * 3), state_shape=(2, 3, 2)
):
    u, w, c = (torch.ones(shape, device=device) for shape in ((2, 3, 5), (1, 2), (1, 3, 2)))
    grad_y, grad_state = torch.ones(grad_shape, device=device), torch.ones(state_shape, device=device)
    return OPS.diagonal_scan_backward(grad_y, grad_state, u, w, w, c, None, None, None, None, False, None, output_mask)


def local_attention_backward(
    device,
    grad_shape=(2, 5, 2, 4),
    output_mask=(True, True, True, False),
    left=1,
    chunk_size=None,
    activation="softmax",
    dropout_p=0.0,
    segment_ids=None,
    lse_shape=(2, 2, 5),
):
    q = torch.ones(2, 5, 2, 4, device=device)
    grad, lse = torch.ones(grad_shape, device=device), torch.ones(lse_shape, device=device)
    if segment_ids is not None:
        segment_ids = segment_ids.to(device)
    return OPS.local_attention_backward(
        *(grad, q, q, q, None, None, segment_ids, None, q, lse),
        *(left, 1, chunk_size, 0.5, activation, dropout_p, output_mask),
    )


def s4_kernel_backward(device, grad_shape=(3, 1, 4, 5), output_mask=(True,) * 5, nodes=8):
    w, p, b = (torch.ones(*shape, 2, 2, 2, device=device) for shape in ((), (1,), (3,)))
    c, log_dt = torch.ones(1, 4, 2, 2, device=device), torch.ones(4, device=device)
    return OPS.s4_kernel_backward(torch.ones(grad_shape, device=device), w, p, b, c, log_dt, nodes, 1.0, output_mask)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("backward", "change", "message"),
    [
        (long_conv_backward, {"grad_shape": (2, 3, 4)}, r"grad_y has shape \[2, 3, 4\], expected 5 in dimension -1"),
        (long_conv_backward, {"output_mask": [True] * 4}, "output_mask wants the gradient of skip, which is None"),
        (diagonal_kernel_backward, {"grad_shape": (3, 5)}, r"grad_k has shape \[3, 5\], expected \(C, H, length\)"),
        (diagonal_kernel_backward, {"output_mask": [True] * 3}, "output_mask wants the gradient of log_dt"),
        (diagonal_scan_backward, {"grad_shape": (2, 3, 5)}, r"grad_y has shape \[2, 3, 5\], expected \(B, C, H, L\)"),
        (diagonal_scan_backward, {"grad_shape": (2, 2, 3, 5)}, r"grad_y has shape .*, expected 1 in dimension 1"),
        (diagonal_scan_backward, {"state_shape": (2, 3, 1)}, r"grad_state has shape .*, expected 2 in dimension 2"),
        (diagonal_scan_backward, {"output_mask": [True] * 7}, "output_mask wants the gradient of log_dt"),
        (
            diagonal_scan_backward,
            {"output_mask": [False] * 5 + [True, False]},
            "output_mask wants the gradient of state, which is None",
        ),
        (
            diagonal_scan_backward,
            {"output_mask": [False] * 6 + [True]},
            "output_mask wants the gradient of skip, which is None",
        ),
        (local_attention_backward, {"grad_shape": (2, 4, 2, 4)}, r"grad_out has shape .*, expected 5 in dimension 1"),
        (local_attention_backward, {"output_mask": [True] * 4}, "output_mask wants the gradient of bias"),
        (local_attention_backward, {"left": -5}, "left and right are -5 and 1, expected -1 to"),
        (local_attention_backward, {"chunk_size": 0}, "chunk_size is 0, expected 1 to"),
        (local_attention_backward, {"activation": "tanh"}, "activation is tanh, expected softmax, relu2 or laplace"),
        (local_attention_backward, {"dropout_p": 1.0}, "dropout_p is 1, expected at least 0 and less than 1"),
        (local_attention_backward, {"dropout_p": 0.5}, "dropout_seed is None with dropout_p 0.5, expected"),
        (local_attention_backward, {"segment_ids": torch.ones(2, 4).int()}, "segment_ids has shape .*, expected 5 in"),
        (local_attention_backward, {"lse_shape": (2, 5, 2)}, "lse has shape .*, expected 2 in dimension 1"),
        (s4_kernel_backward, {"grad_shape": (1, 4, 5)}, r"grad_k has shape .*, expected \(M, C, H, length\)"),
        (s4_kernel_backward, {"grad_shape": (2, 1, 4, 5)}, r"grad_k has shape .*, expected 3 in dimension 0 of"),
        (s4_kernel_backward, {"grad_shape": (3, 2, 4, 5)}, r"grad_k has shape .*, expected 1 in dimension 1 of"),
        (s4_kernel_backward, {"grad_shape": (3, 1, 1, 5)}, r"grad_k has shape .*, expected 4 in dimension 2 of"),
        (s4_kernel_backward, {"nodes": 0}, "nodes is 0, expected 1 or more"),
    ],
)
def test_errors(backward, change, message, device):
    assert len(backward(device)) == len(change.get("output_mask", backward.__defaults__[1]))
    with pytest.raises(ValueError, match=message):
        backward(device, **change)
