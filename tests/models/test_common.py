"""What Hugging Face's own models pass, of every SPADE model."""

import copy

import pytest
import torch
from transformers import Cache

from spade_ext.models import (
    SpadeConfig,
    SpadeEncoderDecoderConfig,
    SpadeForCausalLM,
    SpadeForConditionalGeneration,
    SpadeForMaskedLM,
    SpadeForSeq2SeqClassification,
    SpadeForSequenceClassification,
)
from spade_ext.models.modeling_spade import SpadeLayer

EOS = 2
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
    "encoder_decoder": (SpadeForConditionalGeneration, {}),
    "spade_decoder": (SpadeForConditionalGeneration, {"decoder": "local", "prenorm": True, "final_norm": True}),
    "encoder_classifier": (SpadeForSeq2SeqClassification, {}),
    "decoder_classifier": (SpadeForSeq2SeqClassification, {"pooling": "last", "decoder": "local"}),
}
CLASSIFIERS = SpadeForSequenceClassification, SpadeForSeq2SeqClassification
ENCODER_DECODERS = SpadeForConditionalGeneration, SpadeForSeq2SeqClassification
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
    config = SpadeEncoderDecoderConfig if cls in ENCODER_DECODERS else SpadeConfig
    return cls(config(**{**sizes, **options}))


def batch(B=3, L=12):
    ids = torch.randint(3, 20, (B, L))
    ids[:, [0, -1]] = EOS
    return ids


def labels_of(model, ids):
    return ids[:, 1] % 3 if isinstance(model, CLASSIFIERS) else ids


def inputs_of(model, ids, mask=None):
    """The target of an encoder-decoder is its source."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if isinstance(model, SpadeForConditionalGeneration):
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return inputs


def hidden_states_of(output):
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return [hidden for name in names for hidden in output.get(name, ())]


@all_models
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(name, side):
    """In float32; and nothing is NaN at padding either."""
    model, ids, lengths = build(name).eval(), batch(), (12, 7, 1)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    output = model(**inputs_of(model, ids, mask.long()), output_hidden_states=True)
    for index, length in enumerate(lengths):
        alone = model(**inputs_of(model, ids[index : index + 1, mask[index]]), output_hidden_states=True)
        batched = output.logits[index : index + 1]
        batched = batched if batched.dim() == 2 else batched[:, mask[index]]
        torch.testing.assert_close(batched, alone.logits, rtol=1e-5, atol=1e-5)
        for hidden, expected in zip(hidden_states_of(output), hidden_states_of(alone), strict=True):
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
    assert rebuilt.eval()(**inputs_of(rebuilt, batch())).logits.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@all_models
def test_activation_checkpointing_gives_equal_gradients(name, use_reentrant):
    """With dropout, whose numbers the second forward draws again; each layer runs once more in the backward."""
    model, ids = build(name).train(), batch()
    labels = labels_of(model, ids)
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for each, times in ((model, 1), (checkpointed, 2)):
        calls = []
        layers = [module for module in each.modules() if isinstance(module, SpadeLayer)]
        for index, layer in enumerate(layers):
            layer.mixer.register_forward_pre_hook(lambda module, inputs, index=index, calls=calls: calls.append(index))
        torch.manual_seed(1)
        each(ids, labels=labels).loss.backward()
        assert sorted(calls) == sorted([*range(len(layers))] * times)
    for (parameter, expected), actual in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert expected.grad is not None, parameter
        torch.testing.assert_close(actual.grad, expected.grad)


@all_models
def test_tuples_are_dicts_and_embeddings_are_ids(name):
    model, ids = build(name).eval(), batch()
    inputs = inputs_of(model, ids)
    output = model(**inputs, output_hidden_states=True)
    as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)
    tensors = [[value for value in values if not isinstance(value, Cache)] for values in (as_tuple, output.to_tuple())]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    labels = labels_of(model, ids)
    assert torch.equal(model(**inputs, labels=labels, return_dict=False)[0], model(**inputs, labels=labels).loss)
    if name == "decoder_classifier":  # which looks for an id
        return
    embedded = {name.replace("input_ids", "inputs_embeds"): value for name, value in inputs.items()}
    for each in embedded:
        if each.endswith("inputs_embeds"):
            embedded[each] = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(**embedded).logits, output.logits)


@pytest.mark.parametrize("name", ["encoder_decoder", "spade_decoder"])
def test_encoder_decoders_compile_as_one_graph_for_all_lengths(name):
    torch.compiler.reset()  # the models share a limit of compilations
    model = build(name).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for L in (12, 17):
        ids = batch(2, L)
        torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


@all_models
def test_masks_are_of_tokens(name):
    model, ids = build(name).eval(), batch()
    integers = torch.ones(3, 12, dtype=torch.int32)
    logits = [model(**inputs_of(model, ids, mask)).logits for mask in (integers, integers.bool())]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match=r"^attention_mask has shape \[3, 1, 12, 12\], expected \[3, 12\], \(B, L\)$"):
        model(**inputs_of(model, ids, torch.ones(3, 1, 12, 12)))
