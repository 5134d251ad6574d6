"""Whole published models: to ours by the command and back, and what they compute."""

import argparse
import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import layer_norm, linear
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from spade_ext.cli import main
from spade_ext.convert import to_reference
from spade_ext.models import SpadeConfig, SpadeForCausalLM, SpadeForMaskedLM, SpadeModel
from spade_ext.models.published_config import published_config

from ..reference import below

MADE_ANEW = "_float_tensor"  # a buffer that holds nothing

randn = partial(torch.randn, dtype=torch.float64)


def affine(name, rows, columns=None):
    """A Linear's weight and bias, or a norm's."""
    return {f"{name}.weight": randn(rows, columns) if columns else 1 + randn(rows), f"{name}.bias": randn(rows)}


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def adaptive_embedding(width=16, sizes=(7, 5, 9), factor=2):
    """fairseq's AdaptiveInput and the AdaptiveSoftmax that is tied to it."""
    bands = [
        (randn(size, width // factor**band), randn(width, width // factor**band)) for band, size in enumerate(sizes)
    ]
    tensors = {
        "embed_tokens._float_tensor": torch.zeros(1),
        "adaptive_softmax.version": torch.tensor([1]),
        "adaptive_softmax.head._float_tensor": torch.zeros(1),
        "adaptive_softmax.head.word_proj.weight": bands[0][0],
        "adaptive_softmax.head.class_proj.weight": randn(len(sizes) - 1, width),
    }
    for band, (embedding, projection) in enumerate(bands):
        tensors[f"embed_tokens.embeddings.{band}.0.weight"] = embedding
        tensors[f"embed_tokens.embeddings.{band}.1.weight"] = projection
    for tail, (embedding, projection) in enumerate(bands[1:]):
        tensors[f"adaptive_softmax.tail.{tail}.0.weight"] = projection
        tensors[f"adaptive_softmax.tail.{tail}.2.weight"] = embedding
    return tensors


def plain_embedding(width, *, tied):
    embedding = randn(11, width)
    return {"embed_tokens.weight": embedding, "output_projection.weight": embedding if tied else randn(11, width)}


def decoder(parts):
    return prefixed("decoder.", {"version": torch.tensor([3.0]), **parts})


def spade_lm(load_golden, name="spade_decoder_concat_prenorm1", embedding=None, state="state.", **extra):
    """The layers of a golden file in a `spade_lm`."""
    layers = prefixed("layers.", below(load_golden(name)[0], state))
    return decoder({**(embedding or adaptive_embedding()), **layers, **extra})


def mega_layer(load_golden, name):
    """The gated attention of a golden file with a feed-forward."""
    return {
        **prefixed("mega_layer.", below(load_golden(name)[0], "state.")),
        **affine("nffn.fc1", 30, 12),
        **affine("nffn.fc2", 12, 30),
        **affine("nffn.norm.norm", 12),
    }


def mega_lm(load_golden, embedding=None, **extra):
    layers = [mega_layer(load_golden, RELU2) for _ in range(2)]
    numbered = {
        name: t for index, layer in enumerate(layers) for name, t in prefixed(f"layers.{index}.", layer).items()
    }
    return decoder({**(embedding or plain_embedding(12, tied=False)), **numbered, **extra})


def mega_encoder(load_golden, name, embedding, **extra):
    layer = prefixed("layers.0.", mega_layer(load_golden, name))
    return prefixed("encoder.encoder.", {**embedding, **layer, **extra})


CONCAT, ADD, STACK = (f"spade_decoder_{name}" for name in ("concat_prenorm1", "add_prenorm0", "stack_prenorm1"))
RELU2 = "mega_attention_relu2_chunk-1_bi0_rotary_pre1"
LAPLACE = "mega_attention_laplace_chunk8_bi1_simple_pre0"
SOFTMAX = "mega_attention_softmax_chunk-1_bi1_simple_pre1"
WINDOW = {"window": [7, 0]}
FULL = {"chunk_size": None, "mega_truncation": None}
SINUSOIDAL = {"embed_positions._float_tensor": torch.zeros(1)}

# Published tensors, and what they do not tell.
CHECKPOINTS = {
    "spade concat": (spade_lm, WINDOW),
    "spade add": (lambda load: spade_lm(load, ADD), {**WINDOW, "prenorm": False, "ssm_weight": 0.3}),
    "spade stack": (lambda load: spade_lm(load, STACK, plain_embedding(16, tied=True)), WINDOW),
    "spade norms": (
        lambda load: spade_lm(load, CONCAT, **affine("layernorm_embedding", 16), **affine("layer_norm", 16)),
        WINDOW,
    ),
    "mega lm": (mega_lm, {**FULL, "mega_activation": "relu2"}),
    "mega adaptive lm": (
        lambda load: mega_lm(load, adaptive_embedding(12), **affine("final_norm.norm", 12)),
        {**FULL, "mega_activation": "relu2"},
    ),
    "mega postnorm lm": (
        lambda load: mega_lm(load, **affine("embed_norm.norm", 12)),
        {**FULL, "mega_activation": "relu2"},
    ),
    "mega text": (
        lambda load: mega_encoder(load, LAPLACE, {"embed_tokens.embed.weight": randn(9, 12)}),
        {"chunk_size": 8, "mega_truncation": None, "mega_activation": "laplace"},
    ),
    "mega pixels": (
        lambda load: mega_encoder(load, SOFTMAX, affine("embed_tokens", 12), **affine("final_norm.norm", 12)),
        {**FULL, "mega_activation": "softmax"},
    ),
}


@pytest.fixture
def checkpoint(request, load_golden):
    make, options = CHECKPOINTS[request.param]
    return make(load_golden), options


def overrides(options):
    return [f"{name}={json.dumps(value)}" for name, value in options.items()]


def convert(tensors, folder, options):
    """The folder that the command makes of tensors in a file beside it."""
    source = folder.with_suffix(".pt")
    torch.save(tensors, source)
    assert main(["convert", str(source), str(folder), *overrides(options)]) == 0
    return folder


def assert_same(found, expected):
    """In names, shapes, types and bits."""
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].shape == expected[name].shape, name
        if MADE_ANEW not in name:
            assert found[name].dtype == expected[name].dtype, name
            assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, indirect=True)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back(checkpoint, suffix, tmp_path, capsys):
    tensors, options = checkpoint
    source, folder, back = tmp_path / f"published{suffix}", tmp_path / "ours", tmp_path / f"back{suffix}"
    if suffix == ".pt":
        torch.save(tensors, source)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, source)
    assert main(["convert", str(source), str(folder), *overrides(options)]) == 0
    assert main(["convert", str(folder), str(back)]) == 0
    assert_same(torch.load(back) if suffix == ".pt" else load_file(back), tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [back.name, "ours", source.name]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].endswith("ours") and lines[1].endswith(back.name)


def test_the_commands_of_the_docs(load_golden, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    commands = re.findall("^spade-ext (convert .*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    tensors = spade_lm(load_golden)
    torch.save({"model": tensors}, "checkpoint_best.pt")
    assert [main(shlex.split(command)) for command in commands] == [0, 0]
    assert_same(torch.load("model.pt"), tensors)


@pytest.mark.parametrize("checkpoint", ["spade concat", "spade add", "spade stack"], indirect=True)
def test_spade_layers_compute_what_was_published(checkpoint, request, load_golden, tmp_path):
    tensors, options = checkpoint
    name = {"spade concat": CONCAT, "spade add": ADD, "spade stack": STACK}[request.node.callspec.params["checkpoint"]]
    golden, _ = load_golden(name)
    model = AutoModelForCausalLM.from_pretrained(convert(tensors, tmp_path / "ours", options)).eval()
    assert isinstance(model, SpadeForCausalLM) and model.dtype == torch.float64
    x = golden["x"].transpose(0, 1) / 4  # of width 16, which the embedding is scaled by the root of
    y = model.model(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(y.transpose(0, 1), golden["y"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpoint", ["mega lm", "mega text", "mega pixels"], indirect=True)
def test_mega_layers_compute_what_was_published(checkpoint, request, load_golden, tmp_path):
    tensors, options = checkpoint
    name = {"mega lm": RELU2, "mega text": LAPLACE, "mega pixels": SOFTMAX}[request.node.callspec.params["checkpoint"]]
    golden, _ = load_golden(name)
    layer = AutoModel.from_pretrained(convert(tensors, tmp_path / "ours", options)).eval().layers[0]
    x = golden["x"].transpose(0, 1)
    normed = layer.mixer_norm(x) if layer.prenorm else x
    y = x + layer.mixer(normed, residual=x, attention_mask=None, segment_ids=None)
    y = y if layer.prenorm else layer.mixer_norm(y)
    torch.testing.assert_close(y.transpose(0, 1), golden["y"], rtol=1e-9, atol=1e-9)


def test_the_rest_of_mega_has_its_place(load_golden, tmp_path):
    """Embedding, feed-forwards, their norms, the head; and a final norm without weights."""
    tensors = mega_lm(load_golden)
    folder = convert(tensors, tmp_path / "ours", {**FULL, "mega_activation": "relu2"})
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer in model.model.layers:
        layer.mixer.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    ids = torch.arange(11)[None]
    x = 12**0.5 * tensors["decoder.embed_tokens.weight"][ids]
    for index in range(2):
        part = below(tensors, f"decoder.layers.{index}.nffn.")
        normed = layer_norm(x, (12,), part["norm.norm.weight"], part["norm.norm.bias"])
        inner = nn.functional.silu(linear(normed, part["fc1.weight"], part["fc1.bias"]))
        x = x + linear(inner, part["fc2.weight"], part["fc2.bias"])
    expected = linear(layer_norm(x, (12,)), tensors["decoder.output_projection.weight"])
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_adaptive_bands_have_their_places(load_golden, tmp_path):
    tensors = spade_lm(load_golden)
    model = AutoModelForCausalLM.from_pretrained(convert(tensors, tmp_path / "ours", WINDOW)).eval()
    assert (model.config.vocab_size, list(model.config.adaptive_cutoffs), model.config.adaptive_factor) == (
        21,
        [7, 12],
        2,
    )
    x = randn(1, 3, 16)
    softmax = below(tensors, "decoder.adaptive_softmax.")
    head = linear(x, torch.cat([softmax["head.word_proj.weight"], softmax["head.class_proj.weight"]])).log_softmax(-1)
    parts = [head[..., :7]]
    for tail in range(2):
        words = linear(x @ softmax[f"tail.{tail}.0.weight"], softmax[f"tail.{tail}.2.weight"])
        parts.append(words.log_softmax(-1) + head[..., 7 + tail, None])
    torch.testing.assert_close(model.logits(x), torch.cat(parts, -1))
    for token, (band, row) in {0: (0, 0), 6: (0, 6), 7: (1, 0), 12: (2, 0), 20: (2, 8)}.items():
        embedding, projection = (tensors[f"decoder.embed_tokens.embeddings.{band}.{i}.weight"] for i in (0, 1))
        torch.testing.assert_close(model.model.embed_tokens(torch.tensor([[token]]))[0, 0], projection @ embedding[row])


def test_pixels_are_embedded_as_published(load_golden, tmp_path):
    tensors = mega_encoder(load_golden, SOFTMAX, affine("embed_tokens", 12), **affine("final_norm.norm", 12))
    model = AutoModel.from_pretrained(convert(tensors, tmp_path / "ours", {**FULL, "mega_activation": "softmax"}))
    weight, bias = (tensors[f"encoder.encoder.embed_tokens.{name}"] for name in ("weight", "bias"))
    x = randn(2, 5)
    torch.testing.assert_close(model.embed_values(x[..., None]), x[..., None] * weight + bias)


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
LIKE_FAIRSEQ = {
    **SMALL,
    "num_attention_heads": 4,
    "window": (7, 0),
    "hidden_act": "relu",
    "scale_embedding": True,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "wikitext103": SpadeConfig.preset("wikitext103", **SMALL, ssm_n_ssm=16, ssm_l_max=64, adaptive_cutoffs=(20, 30)),
    "sinusoidal": SpadeConfig(**LIKE_FAIRSEQ, position="sinusoidal", ssm_d_state=6, ssm_n_ssm=32),
    "untied": SpadeConfig(
        **LIKE_FAIRSEQ,
        position=None,
        tie_word_embeddings=False,
        ssm_kind="s4d",
        ssm_init="lin",
        ssm_layers=(0, 1),
        ssm_n_ssm=4,
    ),
    "no state space model": SpadeConfig(**LIKE_FAIRSEQ, position_shared=True, embed_norm=True, ssm_layers=()),
}
TRAINING = ("dropout", "attention_dropout", "activation_dropout", "adaptive_dropout", "ssm_lr")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_is_told_by_the_tensors(name):
    """But for the window, the heads of a model without a table, and what concerns training alone."""
    config = CONFIGS[name]
    options = {key: getattr(config, key) for key in ("window", "num_attention_heads", *TRAINING)}
    model = SpadeForCausalLM(published_config(to_reference(SpadeForCausalLM(config)), **options))
    assert repr(model) == repr(SpadeForCausalLM(config))
    for key in ("causal", "scale_embedding", "tie_word_embeddings", "position", "position_shared", "pad_token_id"):
        assert getattr(model.config, key) == getattr(config, key)


def test_a_decoder_that_was_not_run_yet(load_golden, tmp_path):
    """Its C is not truncated, which is done at a length that is to be given."""
    tensors = spade_lm(load_golden, state="initial.")
    torch.save(tensors, tmp_path / "new.pt")
    assert main(["convert", str(tmp_path / "new.pt"), str(tmp_path / "ours"), "window=[7,0]"]) == 2
    folder = convert(tensors, tmp_path / "ours", {**WINDOW, "ssm_l_max": 48})
    ssm = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mixer.ssm
    expected = load_golden(CONCAT)[0]["state.0.s4_module.s4.kernel.kernel.C"]
    assert ssm.nodes == 48
    torch.testing.assert_close(ssm.C, expected, rtol=1e-5, atol=1e-5)  # published in float32


def test_a_checkpoint_of_fairseq(load_golden, tmp_path):
    tensors = spade_lm(load_golden)
    checkpoint = {"args": argparse.Namespace(arch="spade_lm"), "model": tensors, "extra_state": {"epoch": 3}}
    convert(checkpoint, tmp_path / "ours", WINDOW)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.pt")]) == 0
    assert_same(torch.load(tmp_path / "back.pt"), tensors)


def test_half_precision_is_kept_and_state_space_models_are_float32(load_golden, tmp_path):
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in spade_lm(load_golden).items()}
    model = AutoModelForCausalLM.from_pretrained(convert(tensors, tmp_path / "ours", WINDOW))
    assert model.dtype == torch.float16
    ssm = model.model.layers[0].mixer.ssm
    assert ssm.C.dtype == torch.float32
    assert torch.equal(ssm.C, tensors["decoder.layers.0.s4_module.s4.kernel.kernel.C"].float())


def test_the_classifier_of_the_long_range_arena_is_left_out(load_golden, tmp_path, capsys):
    """And its absence is said when a classifier of ours is made of the folder."""
    head = {**affine("classifier.0.0", 24, 12), "sentence_projection_layer.weight": randn(2, 24)}
    encoder = mega_encoder(load_golden, SOFTMAX, affine("embed_tokens", 12), **affine("final_norm.norm", 12))
    folder = convert({**encoder, **head}, tmp_path / "ours", {**FULL, "mega_activation": "softmax"})
    said = capsys.readouterr().out
    assert all(name in said for name in head)
    assert type(AutoModel.from_pretrained(folder)) is SpadeModel
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert {name.partition(".")[0] for name in report["missing_keys"]} == {"classifier"}
    assert_same(to_reference(model.model), encoder)


def refusal(capsys, *arguments):
    """What the command says when it refuses."""
    assert main(["convert", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def without(name):
    return lambda tensors: {key: t for key, t in tensors.items() if key != name}


EMBEDDING = "decoder.embed_tokens.embeddings.1"
FC1 = "decoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without(FC1), WINDOW, f"tensors lacks {FC1}, expected among decoder.adaptive_softmax.head"),
        (without("decoder.layers.0.fc1.weight"), WINDOW, "tensors lacks decoder.layers.0.fc1.weight"),
        (
            lambda tensors: {"a": randn(1), **tensors},
            WINDOW,
            "tensors has a, expected only the names of a published Spa",
        ),
        (lambda tensors: {**tensors, FC1: randn(9, 16)}, WINDOW, f"{FC1} has shape [9, 16], expected [32, 16]"),
        (
            lambda tensors: {**tensors, f"{EMBEDDING}.0.weight": randn(5, 8)},
            WINDOW,
            "decoder.adaptive_softmax.tail.0.2.weight is not tied to the embedding",
        ),
        (lambda tensors: tensors, {}, "window is not told by the tensors, expected it among the options"),
        (lambda tensors: tensors, {"window": [1, 2]}, "window is [1, 2], expected a right of 0"),
        (lambda tensors: tensors, {"windw": [1, 0]}, "windw is not a known key, the nearest is window"),
        (lambda tensors: tensors, {"window": 7}, "window is 7, expected"),
        (lambda tensors: tensors, {**WINDOW, "hidden_size": 32}, "expected [7, 32]"),
        (lambda tensors: below(tensors, "decoder.layers."), WINDOW, "the tensors are of no model of SPADE or MEGA"),
        (
            lambda tensors: {"model": tensors, "optimizer": pytest.approx(1)},
            WINDOW,
            "is not a file of plain data: of a",
        ),
        (lambda tensors: list(tensors), WINDOW, "holds no state dict"),
    ],
)
def test_errors_are_one_sentence(change, options, message, load_golden, tmp_path, capsys):
    torch.save(change(spade_lm(load_golden)), tmp_path / "a.pt")
    assert message in refusal(capsys, tmp_path / "a.pt", tmp_path / "ours", *overrides(options))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_batch_norms_are_refused(load_golden, tmp_path, capsys):
    tensors = mega_encoder(load_golden, SOFTMAX, affine("embed_tokens", 12), **affine("final_norm.norm", 12))
    tensors["encoder.encoder.layers.0.mega_layer.norm.norm.running_mean"] = randn(12)
    torch.save(tensors, tmp_path / "a.pt")
    options = overrides({**FULL, "mega_activation": "softmax"})
    message = refusal(capsys, tmp_path / "a.pt", tmp_path / "ours", *options)
    assert "encoder.encoder.layers.0.mega_layer.norm.norm is a batch norm, expected a layernorm" in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_none(suffix, tmp_path, capsys):
    path = tmp_path / f"a{suffix}"
    assert f"{path} is not a file, expected" in refusal(capsys, path, tmp_path / "ours")
    path.write_bytes(b"")
    assert f"{path} is not a whole file of torch.save or safetensors" in refusal(capsys, path, tmp_path / "ours")
    path.write_bytes(b"no tensors" * 20)
    assert f"{path} is not a " in refusal(capsys, path, tmp_path / "ours")
    (torch.save if suffix == ".pt" else save_file)({"a": randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    assert f"{path} is not a whole file of torch.save or safetensors" in refusal(capsys, path, tmp_path / "ours")


def test_nothing_is_overwritten(load_golden, tmp_path, capsys):
    folder = convert(spade_lm(load_golden), tmp_path / "ours", WINDOW)
    (tmp_path / "taken.pt").write_text("mine")
    assert f"{folder} is there already" in refusal(capsys, tmp_path / "ours.pt", folder, "window=[7,0]")
    assert "taken.pt is there already" in refusal(capsys, folder, tmp_path / "taken.pt")
    assert (tmp_path / "taken.pt").read_text() == "mine"


def test_what_cannot_be_written_leaves_nothing(load_golden, tmp_path, capsys, monkeypatch):
    def fail(model, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device", str(folder))

    torch.save(spade_lm(load_golden), tmp_path / "a.pt")
    with monkeypatch.context() as patch:
        patch.setattr(SpadeForCausalLM, "save_pretrained", fail)
        assert "No space left on device" in refusal(capsys, tmp_path / "a.pt", tmp_path / "ours", "window=[7,0]")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "alibi"}, "position is 'alibi', expected 't5' or 'sinusoidal' or None as published"),
        ({"position_shared": False}, "position_shared is False, expected True as published"),
        ({"mixer": "full"}, "mixer is 'full', expected 'window' or 'mega' as published"),
        ({"norm": "rmsnorm"}, "norm is 'rmsnorm', expected 'layernorm' as published"),
        ({"mixer": "mega", "position": "simple"}, "ssm_layers is not empty, expected () for the mixer 'mega'"),
        (
            {"mixer": "mega", "position": "simple", "window": (3, 0), "ssm_layers": ()},
            "window is (3, 0), expected None",
        ),
    ],
)
def test_decoders_that_were_not_published(options, message):
    shared = options.get("mixer") != "mega"
    config = SpadeConfig(**{**SMALL, "num_attention_heads": 4, "causal": True, "position_shared": shared, **options})
    with pytest.raises(ValueError, match=f"^to_reference: {re.escape(message)}"):
        to_reference(SpadeForCausalLM(config))


def test_a_final_norm_that_was_not_trained_yet():
    """A decoder's may have no weights; an encoder's are what tells that there is one."""
    options = {**SMALL, "num_attention_heads": 4, "mixer": "mega", "position": "rotary", "ssm_layers": ()}
    decoder = to_reference(SpadeForCausalLM(SpadeConfig(**options, causal=True)))
    encoder = to_reference(SpadeModel(SpadeConfig(**options)))
    assert not any("final_norm" in name for name in decoder)
    assert {"encoder.encoder.final_norm.norm.weight", "encoder.encoder.final_norm.norm.bias"} < set(encoder)


def test_encoders_that_were_not_published():
    config = SpadeConfig(**SMALL, mixer="mega", position="simple", ssm_layers=(), num_attention_heads=4)
    with pytest.raises(ValueError, match="^to_reference: causal is True, expected False"):
        to_reference(SpadeModel(SpadeConfig(**config.to_dict() | {"causal": True})))
    with pytest.raises(ValueError, match="^to_reference: input_size is 3, expected 1"):
        to_reference(SpadeModel(SpadeConfig(**config.to_dict() | {"input_size": 3})))


def test_folders_that_have_no_published_counterpart(tmp_path, capsys):
    SpadeForMaskedLM(SpadeConfig(**SMALL, num_attention_heads=4)).save_pretrained(tmp_path / "masked")
    config = SpadeConfig(**SMALL, num_attention_heads=4, causal=True, position="alibi")
    SpadeForCausalLM(config).save_pretrained(tmp_path / "alibi")
    SpadeModel(config).save_pretrained(tmp_path / "backbone")
    back = tmp_path / "back.pt"
    assert "it is a SpadeModel of mixer 'window', expected" in refusal(capsys, tmp_path / "backbone", back)
    message = refusal(capsys, tmp_path / "masked", back)
    assert "it is a SpadeForMaskedLM, expected a SpadeForCausalLM or a SpadeModel" in message
    assert "alibi: to_reference: position is 'alibi', expected" in refusal(capsys, tmp_path / "alibi", back)
    assert "holds no model" in refusal(capsys, tmp_path, back)
    assert not back.exists()


def test_folders_that_are_not_whole(load_golden, tmp_path, capsys):
    folder, back = convert(spade_lm(load_golden), tmp_path / "ours", WINDOW), tmp_path / "back.pt"
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mixer.attention.qkv.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.mixer.attention.qkv.weight is missing" in refusal(capsys, folder, back)
    (folder / "model.safetensors").write_bytes(b"")
    assert "ours holds no model" in refusal(capsys, folder, back)
    assert not back.exists()


def test_arguments_of_a_folder(load_golden, tmp_path, capsys):
    folder = convert(spade_lm(load_golden), tmp_path / "ours", WINDOW)
    assert "a.txt ends with '.txt', expected .pt or .safetensors" in refusal(capsys, folder, tmp_path / "a.txt")
    assert "window is given, expected no fields" in refusal(capsys, folder, tmp_path / "a.pt", "window=[1,0]")
