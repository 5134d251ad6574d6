"""bfloat16 and float16 models, whose state space parameters stay float32, and autocast."""

import pytest
import torch

from spade_ext.nn import EMA, S4

from .test_common import MODELS, all_models, batch, build, hidden_states_of, inputs_of, labels_of

HALF = (torch.bfloat16, torch.float16)


def is_of_ssm(model, name):
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (S4, EMA))


def check_dtypes(model, dtype):
    """float32 in state space layers, dtype everywhere else."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floating = {name: t.dtype for name, t in tensors.items() if t.is_floating_point()}
    assert {dtype for name, dtype in floating.items() if is_of_ssm(model, name)} == {torch.float32}
    assert {dtype for name, dtype in floating.items() if not is_of_ssm(model, name)} == {dtype}


def check_equal(model, expected):
    actual, expected = model.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def relative_error(actual, expected):
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.fixture
def saved(request, tmp_path):
    model = build(request.param).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


every_saved_model = pytest.mark.parametrize("saved", MODELS, indirect=True)


@every_saved_model
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_loaded_in_half_precision(saved, dtype, tmp_path):
    """As the float32 model is when it is cast; state space parameters are those of the file."""
    model, path = saved
    half = type(model).from_pretrained(path, dtype=dtype)
    check_dtypes(half, dtype)
    inputs = inputs_of(model, batch())
    output, expected = half(**inputs, output_hidden_states=True), model(**inputs).logits
    assert {h.dtype for h in (output.logits, *hidden_states_of(output))} == {dtype}
    assert relative_error(output.logits, expected) < 0.03
    check_equal(model.to(dtype), half)

    half.save_pretrained(tmp_path / "half")
    check_equal(type(model).from_pretrained(tmp_path / "half", dtype="auto"), half)
    wide = type(model).from_pretrained(tmp_path / "half", dtype=torch.float32)
    check_equal(wide.to(dtype), half)


@all_models
def test_casts_keep_the_state_space_model_in_float32(name):
    check_dtypes(build(name).half(), torch.float16)
    check_dtypes(build(name).to(torch.bfloat16), torch.bfloat16)
    check_dtypes(build(name).bfloat16().float(), torch.float32)
    check_dtypes(build(name).to("cpu", torch.bfloat16), torch.bfloat16)


@all_models
def test_training_in_bfloat16(name):
    model, ids = build(name).bfloat16().train(), batch()
    model(ids, labels=labels_of(model, ids)).loss.backward()
    for parameter, value in model.named_parameters():
        assert value.grad.dtype == value.dtype and value.grad.isfinite().all(), parameter
    assert model.eval()(**inputs_of(model, ids)).logits.dtype == torch.bfloat16


@all_models
def test_autocast(name):
    """Training and evaluation; parameters and residual connections are float32, products bfloat16."""
    model, ids = build(name).eval(), batch()
    labels = labels_of(model, ids)
    expected = model(ids, labels=labels)
    expected.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=labels)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and relative_error(output.logits, expected.logits) < 0.03
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=0.01, atol=0)
    actual = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert relative_error(actual, torch.cat([gradient.flatten() for gradient in gradients])) < 0.1
