"""What Hugging Face's own models pass, of every SPADE model."""

import copy

import pytest
import torch

from spade_ext.models import SpadeConfig, SpadeForCausalLM, SpadeForMaskedLM, SpadeForSequenceClassification

CHUNKED_MEGA = {"mixer": "mega", "window": None, "chunk_size": 4, "position": "rotary", "mega_z_dim": 8}
MODELS = {
    "causal_lm": (SpadeForCausalLM, {"window": (3, 0), "attention_dropout": 0.1, "position_shared": True}),
    # Padding's row of every band is 0, and norms blow the rounding errors of zeros up: no padding's id, or positions.
    "adaptive_lm": (
        SpadeForCausalLM,
        {"window": (3, 0), "position": "rope", "adaptive_cutoffs": (4, 9), "adaptive_factor": 2, "pad_token_id": None},
    ),
    "padded_adaptive_lm": (
        SpadeForCausalLM,
        {
            "window": (3, 0),
            "position": "sinusoidal",
            "adaptive_cutoffs": (4, 9),
            "adaptive_factor": 2,
            "scale_embedding": True,
            "pad_token_id": 1,
        },
    ),
    "mega_lm": (SpadeForCausalLM, {**CHUNKED_MEGA, "causal": True, "ssm_combine": "add"}),
    "masked_lm": (SpadeForMaskedLM, {"position": "learned", "embed_norm": True, "norm": "rmsnorm"}),
    "mega_classifier": (
        SpadeForSequenceClassification,
        {**CHUNKED_MEGA, "mega_activation": "laplace", "norm": "scalenorm", "prenorm": False},
    ),
    "full_classifier": (SpadeForSequenceClassification, {"mixer": "full", "window": None, "ssm_kind": "ema"}),
    "frozen_ssm": (SpadeForSequenceClassification, {"mixer": "chunk", "window": None, "chunk_size": 4, "ssm_lr": 0}),
    "ssm_alone": (SpadeForSequenceClassification, {"mixer": "ssm", "ssm_kind": "s4d"}),
}
all_models = pytest.mark.parametrize("name", MODELS)


def build(name):
    cls, options = MODELS[name]
    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "window": (3, 3),
        "ssm_d_state": 8,
        "ssm_n_ssm": 2,
        "num_labels": 3,
    }
    return cls(SpadeConfig(**{**sizes, **options}))


def batch(B=3, L=12):
    return torch.randint(1, 20, (B, L))


def labels_of(model, ids):
    return ids[:, 0] % 3 if isinstance(model, SpadeForSequenceClassification) else ids


@all_models
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(name, side):
    """In float32; and nothing is NaN at padding either."""
    model, ids, lengths = build(name).eval(), batch(), (12, 7, 1)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    output = model(ids, mask.long(), output_hidden_states=True)
    for index, length in enumerate(lengths):
        alone = model(ids[index : index + 1, mask[index]], output_hidden_states=True)
        batched = output.logits[index : index + 1]
        batched = batched if batched.dim() == 2 else batched[:, mask[index]]
        torch.testing.assert_close(batched, alone.logits, rtol=1e-5, atol=1e-5)
        for hidden, expected in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert hidden.isfinite().all() and expected.shape == (1, length, 16)
            torch.testing.assert_close(hidden[index : index + 1, mask[index]], expected, rtol=1e-5, atol=1e-5)


@all_models
def test_all_tensors_are_parameters_or_buffers_and_made_from_nothing(name):
    model = build(name)
    with torch.device("meta"):
        rebuilt = build(name)
    rebuilt.to_empty(device="cpu")
    rebuilt.init_weights()
    buffers = dict(rebuilt.named_buffers())
    for buffer, value in model.named_buffers():
        assert torch.equal(buffers[buffer], value), buffer
    assert rebuilt.eval()(batch()).logits.isfinite().all()


@all_models
def test_activation_checkpointing_gives_equal_gradients(name):
    """With dropout, whose numbers the second forward draws again; each layer runs once more in the backward."""
    model, ids = build(name).train(), batch()
    labels = labels_of(model, ids)
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable()
    for each, times in ((model, 1), (checkpointed, 2)):
        calls = []
        for index, layer in enumerate(each.model.layers):
            layer.mixer.register_forward_pre_hook(lambda module, inputs, index=index, calls=calls: calls.append(index))
        torch.manual_seed(1)
        each(ids, labels=labels).loss.backward()
        assert sorted(calls) == [0] * times + [1] * times
    for (parameter, expected), actual in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert expected.grad is not None, parameter
        torch.testing.assert_close(actual.grad, expected.grad)


@all_models
def test_tuples_are_dicts_and_embeddings_are_ids(name):
    model, ids = build(name).eval(), batch()
    output = model(ids, output_hidden_states=True)
    as_tuple = model(ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits) and len(as_tuple) == len(output)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple[-1], output.hidden_states, strict=True))
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, output.logits)
    labels = labels_of(model, ids)
    assert torch.equal(model(ids, labels=labels, return_dict=False)[0], model(ids, labels=labels).loss)


@all_models
def test_half_precision_keeps_the_state_space_model_in_float32(name):
    model, ids = build(name).bfloat16(), batch()
    assert {p.dtype for n, p in model.named_parameters() if ".ssm." in n or ".ema." in n} <= {torch.float32}
    model(ids, labels=labels_of(model, ids)).loss.backward()
    assert model.eval()(ids).logits.dtype == torch.bfloat16


def test_loss_compiles_as_one_graph_for_all_lengths():
    model = build("mega_lm").eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for L in (12, 17):
        ids = batch(2, L)
        torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


@all_models
def test_masks_are_of_tokens(name):
    model, ids = build(name).eval(), batch()
    integers = torch.ones(3, 12, dtype=torch.int32)
    assert torch.equal(model(ids, integers).logits, model(ids, integers.bool()).logits)
    with pytest.raises(ValueError, match=r"^attention_mask has shape \[3, 1, 12, 12\], expected \[3, 12\], \(B, L\)$"):
        model(ids, torch.ones(3, 1, 12, 12))
