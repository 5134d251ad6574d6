from unittest.mock import patch

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy, layer_norm, pad, scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from spade_ext.models import (
    SpadeConfig,
    SpadeEncoderDecoderConfig,
    SpadeEncoderDecoderModel,
    SpadeEncoderModel,
    SpadeForConditionalGeneration,
    SpadeForSeq2SeqClassification,
    SpadeModel,
)
from spade_ext.models.encoder_decoder import shift_right

V, START, PAD, EOS = 20, 0, 1, 2
DECODERS = {
    "full": {},
    "local": {"decoder": "local", "decoder_window": 2},
    "deep": {"num_decoder_layers": 3},
    "local_and_shallow": {"decoder": "local", "num_decoder_layers": 1, "ssm_layers": (0, 1)},
    "local_prenorm": {"decoder": "local", "prenorm": True, "final_norm": True, "position_shared": True},
    "untied": {"tie_word_embeddings": False},
}
all_decoders = pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS.keys())


def config(**options):
    sizes = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "window": (3, 3),
        "ssm_d_state": 8,
        "ssm_n_ssm": 2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "classifier_dropout": 0.0,
        "max_position_embeddings": 32,
        "initializer_range": 0.5,
    }
    return SpadeEncoderDecoderConfig(**{**sizes, **options})


def seq2seq(**options):
    return SpadeForConditionalGeneration(config(**options)).eval().double()


def batch(B=3, L=14):
    return torch.randint(3, V, (B, L))


def sided(lengths, L, side):
    """A mask (B, L) of rows padded on a side."""
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    return mask.flip(1) if side == "left" else mask


@all_decoders
def test_save_and_load_twice(options, tmp_path):
    model, ids = seq2seq(**options), batch()
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / folder, dtype=torch.float64).eval()
        assert isinstance(loaded, SpadeForConditionalGeneration)
        assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        logits = [each(ids, decoder_input_ids=ids).logits for each in (loaded, model)]
        torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)
        model = loaded
    assert isinstance(AutoModel.from_pretrained(tmp_path / "first"), SpadeEncoderDecoderModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "first"), SpadeEncoderDecoderConfig)


@all_decoders
def test_embeddings_are_shared(options, tmp_path):
    """By encoder and decoder always, by the head where they are tied; also once resized and loaded."""
    seq2seq(**options).save_pretrained(tmp_path)
    loaded, resized = SpadeForConditionalGeneration.from_pretrained(tmp_path), seq2seq(**options)
    resized.resize_token_embeddings(V + 5)
    resized.get_encoder().save_pretrained(tmp_path / "encoder")
    SpadeModel.from_pretrained(tmp_path / "encoder")
    for model, size in ((loaded, V), (resized, V + 5)):
        weight = model.get_input_embeddings().weight
        assert weight.shape == (size, 16) and model.config.vocab_size == size
        assert model.get_encoder().embed_tokens.weight is weight is model.get_decoder().embed_tokens.weight
        assert (model.lm_head.weight is weight) == options.get("tie_word_embeddings", True)
        assert model(batch(), labels=batch() + size - V).loss.isfinite()


@all_decoders
def test_weights_missing_from_a_checkpoint_are_those_of_a_new_model(options):
    initialize = PreTrainedModel._initialize_weights

    def seeded(self, module, is_custom_code=False):
        torch.manual_seed(0)
        initialize(self, module, is_custom_code)

    with patch.object(PreTrainedModel, "_initialize_weights", seeded):
        new = SpadeForConditionalGeneration(config(**options))
        loaded = SpadeForConditionalGeneration.from_pretrained(None, config=config(**options), state_dict={})
    for name, value in new.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def randomised(model):
    """With no norm or bias that is 1 or 0."""
    for name, parameter in model.named_parameters():
        if ".ssm." not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def norm(module, x):
    return layer_norm(x, (16,), module.weight, module.bias, eps=1e-6)


def attend(q, k, v, mask):
    """Dense, with a mask (..., L, Lk) that is added or True where a key is seen."""
    heads = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(-2)


def fed_forward(layer, x):
    feed_forward = layer.feed_forward
    return norm(layer.feed_forward_norm, x + feed_forward.fc2(feed_forward.fc1(x).relu()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_is_the_published_one(side):
    """Spelled out: no absolute positions, a window and a bias table in every layer, S4 beside it in layer 0."""
    encoder, ids = randomised(seq2seq()).get_encoder(), batch()
    mask = sided((14, 9, 5), 14, side)
    distance = torch.arange(14) - torch.arange(14)[:, None]  # from query to key
    seen = (distance.abs() <= 3) & (mask[:, None] | torch.eye(14, dtype=torch.bool))
    x = norm(encoder.embed_norm, encoder.embed_tokens(ids))
    for index, layer in enumerate(encoder.layers):
        attention = layer.mixer.attention
        bias = attention.position_bias()[:, (distance + 3).clamp(0, 6)].masked_fill(~seen[:, None], -torch.inf)
        mixed = attention.o(attend(*attention.qkv(x).chunk(3, -1), bias))
        if index == 0:
            both = norm(layer.mixer.ssm_norm, layer.mixer.ssm(x, mask)), norm(layer.mixer.attention_norm, mixed)
            mixed = layer.mixer.aggregate(torch.cat(both, -1))
        x = fed_forward(layer, norm(layer.mixer_norm, x + mixed))
    output = encoder(ids, mask).last_hidden_state
    torch.testing.assert_close(output[mask], x[mask], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_full_decoder_is_the_published_one(side):
    """Spelled out: learned positions of real tokens, causal and cross-attention, each with its norm after it."""
    model, ids, target = randomised(seq2seq()), batch(), batch(3, 9)
    mask, target_mask = sided((14, 9, 5), 14, side), sided((9, 4, 7), 9, side)
    encoded = model.get_encoder()(ids, mask).last_hidden_state
    decoder = model.get_decoder()
    positions = (target_mask.cumsum(1) - 1).clamp(min=0)
    x = norm(decoder.embed_norm, decoder.embed_tokens(target) + decoder.embed_positions.table(positions))
    causal = target_mask[:, None] & torch.ones(9, 9, dtype=torch.bool).tril() | torch.eye(9, dtype=torch.bool)
    for layer in decoder.layers:
        attention, cross = layer.mixer.attention, layer.cross_attention
        x = norm(layer.mixer_norm, x + attention.o(attend(*attention.qkv(x).chunk(3, -1), causal[:, None])))
        k, v = cross.kv(encoded).chunk(2, -1)
        x = norm(layer.cross_norm, x + cross.o(attend(cross.q(x), k, v, mask[:, None, None])))
        x = fed_forward(layer, x)
    logits = x @ decoder.embed_tokens.weight.T
    output = model(ids, mask, target, target_mask)
    torch.testing.assert_close(output.logits[target_mask], logits[target_mask], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["local", "local_prenorm"])
def test_local_decoder_is_a_spade(name):
    """The causal backbone, where cross-attention adds nothing."""
    model, target = seq2seq(**DECODERS[name]), batch(2, 11)
    decoder = model.get_decoder()
    for layer in decoder.layers:
        torch.nn.init.zeros_(layer.cross_attention.o.weight)
        layer.cross_norm = torch.nn.Identity()
    part = model.config.decoder_config
    assert part.causal and part.window == (DECODERS[name].get("decoder_window", 3), 0) and part.ssm_layers == [0]
    alone = SpadeModel(SpadeConfig(**part.to_dict() | {"add_cross_attention": False})).eval().double()
    state = {key: value for key, value in decoder.state_dict().items() if ".cross_" not in key}
    alone.load_state_dict(state)
    x = model.model(batch(2), decoder_input_ids=target).last_hidden_state
    torch.testing.assert_close(x, alone(target).last_hidden_state)


@all_decoders
def test_decoders_see_no_later_token_but_all_of_the_source(options):
    model, ids, target = seq2seq(**options), batch(1, 40), batch(1, 10)
    changed, later = ids.clone(), target.clone()
    changed[0, 0], later[0, 6] = 3 + (ids[0, 0] - 2) % (V - 3), 3 + (target[0, 6] - 2) % (V - 3)
    logits = model(ids, decoder_input_ids=target).logits
    difference = (model(ids, decoder_input_ids=later).logits - logits).abs().sum(-1)[0]
    assert (difference[:6] < 1e-12).all() and (difference[6:] > 1e-9).all()
    assert (model(changed, decoder_input_ids=target).logits - logits).abs().sum(-1).gt(1e-9).all()


@pytest.mark.parametrize("name", ["full", "local"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_sources_and_targets_is_invisible(name, side):
    model, ids, target = seq2seq(**DECODERS[name]), batch(), batch(3, 9)
    mask, target_mask = sided((14, 6, 1), 14, side), sided((3, 9, 1), 9, side)
    logits = model(ids, mask.int(), target, target_mask.int()).logits
    for row in range(3):
        alone = model(ids[row : row + 1, mask[row]], decoder_input_ids=target[row : row + 1, target_mask[row]]).logits
        torch.testing.assert_close(logits[row, target_mask[row]], alone[0])


@all_decoders
def test_loss_is_the_cross_entropy_of_the_logits(options):
    model, ids, labels = seq2seq(**options), batch(), batch(3, 9)
    labels[0, 6:] = labels[1, 4] = -100
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted[:, 0].tolist() == [START] * 3 and shifted[0, 7:].tolist() == [PAD] * 2
    assert torch.equal(shifted[2, 1:], labels[2, :-1])
    output = model(ids, decoder_input_ids=shifted)
    expected = cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    evaluated = model(ids, labels=labels)
    torch.testing.assert_close(evaluated.loss, expected)
    torch.testing.assert_close(evaluated.logits, output.logits)
    trained = model.train()(ids, labels=labels, num_items_in_batch=100)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, expected * (labels != -100).sum() / 100)
    model.zero_grad()
    trained.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@all_decoders
def test_loss_is_zero_where_no_label_counts(options):
    model = seq2seq(**options)
    loss = model(batch(), labels=torch.full((3, 9), -100)).loss
    loss.backward()
    assert loss.item() == 0 and not any(parameter.grad.any() for parameter in model.parameters())


@all_decoders
def test_labels_may_be_padded_on_either_side(options):
    model, ids, labels = seq2seq(**options), batch(2), batch(2, 6)
    alone = model(ids, labels=labels).loss
    for side in ((4, 0), (0, 4)):
        torch.testing.assert_close(model(ids, labels=pad(labels, side, value=-100)).loss, alone)


def test_shift_right_starts_where_a_row_does():
    ids = torch.tensor([[5, 6, 7], [9, 5, 6], [9, 9, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0]]).bool()
    assert shift_right(ids, mask, START, PAD).tolist() == [[0, 5, 6], [1, 0, 5], [1, 1, 1]]
    assert shift_right(ids, None, START, PAD).tolist() == [[0, 5, 6], [0, 9, 5], [0, 9, 9]]


@all_decoders
def test_attentions(options):
    """Of all three kinds, with eager attention, whose outputs are those of the op."""
    model, ids, target = seq2seq(**options), batch(2, 7), batch(2, 5)
    mask = sided((7, 4), 7, "left")
    expected = model(ids, mask, target)
    assert expected.encoder_attentions is expected.decoder_attentions is expected.cross_attentions is None
    with pytest.raises(ValueError, match="^output_attentions is True, expected attn_implementation 'eager'"):
        model(ids, mask, target, output_attentions=True)
    model.set_attn_implementation("eager")
    output = model(ids, mask, target, output_attentions=True, use_cache=False)
    torch.testing.assert_close(output.logits, expected.logits)
    layers = options.get("num_decoder_layers", 2)
    assert [a.shape for a in output.encoder_attentions] == [(2, 2, 7, 7)] * 2
    assert [a.shape for a in output.decoder_attentions] == [(2, 2, 5, 5)] * layers
    assert [a.shape for a in output.cross_attentions] == [(2, 2, 5, 7)] * layers
    for weights in output.cross_attentions:
        assert not weights[1, :, :, :3].any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))


def test_encoder_outputs_spare_the_encoder():
    model, ids, target = seq2seq(), batch(), batch(3, 5)
    mask = sided((14, 6, 1), 14, "right")
    expected = model(ids, mask, target)
    encoded = model.get_encoder()(ids, mask)
    for each in (encoded, encoded.to_tuple()):
        output = model(attention_mask=mask, decoder_input_ids=target, encoder_outputs=each)
        assert torch.equal(output.logits, expected.logits)


def classifier(**options):
    return SpadeForSeq2SeqClassification(config(num_labels=3, **options)).eval().double()


def test_first_token_pooling_is_the_published_one():
    """Of the encoder alone: Linear, tanh, Linear over each row's first real token."""
    model, ids = classifier(), batch()
    mask = sided((14, 6, 1), 14, "left")
    encoded = model.model.encoder(ids, mask).last_hidden_state
    first = torch.stack([encoded[0, 0], encoded[1, 8], encoded[2, 13]])
    head = model.classifier
    expected = first @ head.dense.weight.T + head.dense.bias
    expected = expected.tanh() @ head.out_proj.weight.T + head.out_proj.bias
    output = model(ids, mask, labels=torch.tensor([2, 0, 1]))
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, cross_entropy(expected, torch.tensor([2, 0, 1])))
    assert torch.equal(output.encoder_last_hidden_state, encoded)


@pytest.mark.parametrize("decoder", ["full", "local"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_last_eos_pooling(decoder, side):
    """The decoder's output at the last eos of its unshifted input, however many a row has."""
    model, ids = classifier(pooling="last", decoder=decoder), batch()
    mask = sided((14, 6, 4), 14, side)
    ends = [[2, 9], [-1], [0, 2]]
    for row, places in enumerate(ends):
        ids[row, mask[row].nonzero().squeeze(1)[places]] = EOS
    ids = ids.masked_fill(~mask, EOS)  # padding's ids mean nothing
    logits = model(ids, mask.long()).logits
    for row, places in enumerate(ends):
        source = ids[row : row + 1, mask[row]]
        target = torch.cat([torch.tensor([[START]]), source[:, :-1]], 1)
        x = model.model(source, decoder_input_ids=target).last_hidden_state
        torch.testing.assert_close(logits[row], model.classifier(x[0, places[-1]]))
        torch.testing.assert_close(logits[row], model(source).logits[0])


@pytest.mark.parametrize("pooling", ["first", "last"])
def test_classifiers_load_what_generators_save(pooling, tmp_path, caplog):
    """Without a decoder where pooling has no use for one, and with nothing unexpected."""
    generator = seq2seq()
    generator.save_pretrained(tmp_path / "generator")
    path = tmp_path / "generator"
    model = AutoModelForSequenceClassification.from_pretrained(path, pooling=pooling, num_labels=3, dtype=torch.float64)
    assert isinstance(model, SpadeForSeq2SeqClassification) and "UNEXPECTED" not in caplog.text
    loaded = model.state_dict()
    assert any("decoder" in name for name in loaded) == (pooling == "last")
    for name, value in generator.state_dict().items():
        assert name not in loaded or torch.equal(loaded[name], value)
    ids = batch()
    ids[:, -1] = EOS
    model.train()(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval().save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)
    encoder = SpadeEncoderModel.from_pretrained(path, dtype=torch.float64)
    expected = generator.get_encoder()(ids).last_hidden_state
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected, rtol=1e-12, atol=1e-12)


def test_classifier_dropout_is_before_both_linears():
    head = classifier(classifier_dropout=1.0).classifier.train()
    torch.nn.init.ones_(head.out_proj.bias)
    assert torch.equal(head(torch.randn(2, 16).double()), torch.ones(2, 3).double())
    head.out_proj = torch.nn.Identity()
    head.dropout = torch.nn.Dropout(0.5)
    scales = []
    head.dropout.register_forward_hook(lambda module, inputs, output: scales.append(inputs[0].shape))
    head(torch.randn(2, 16).double())
    assert scales == [(2, 16), (2, 16)]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_presets_have_the_published_sizes():
    """About 199 M parameters of 12 and 12 layers of width 768, without embeddings."""
    with torch.device("meta"):
        base = SpadeForConditionalGeneration(SpadeEncoderDecoderConfig.preset("encoder-decoder-base"))
        small = SpadeForConditionalGeneration(SpadeEncoderDecoderConfig.preset("encoder-decoder-small", vocab_size=50))
    assert parameters(base) - 768 * (32128 + 512) == pytest.approx(199e6, rel=0.01)
    assert small.lm_head.weight.shape == (50, 512) and len(small.get_decoder().layers) == 6
    assert base.model.encoder.layers[0].mixer.ssm.n_ssm == 768 and base.model.encoder.layers[0].mixer.ssm.lr == 0
    with pytest.raises(ValueError, match="^name is 'base', expected one of encoder-decoder-small, encoder-decoder-b"):
        SpadeEncoderDecoderConfig.preset("base")


def test_text_configurations():
    """What transformers asks for: of the decoder, such as its number of layers; and of the whole."""
    whole = config(num_decoder_layers=5)
    assert whole.get_text_config(decoder=True).num_hidden_layers == 5
    assert whole.get_text_config() is whole and whole.get_text_config(encoder=True) is whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (3, 0)}, r"window is \(3, 0\), expected a right of 1 or more for an encoder"),
        ({"mixer": "full", "window": None, "causal": True}, "causal is True, expected False for an encoder"),
        ({"add_cross_attention": True}, "add_cross_attention is True, expected False for an encoder"),
        ({"input_size": 1}, "input_size is 1, expected None for an encoder-decoder"),
        ({"adaptive_cutoffs": (8,)}, r"adaptive_cutoffs is \(8,\), expected None for an encoder-decoder"),
        ({"pad_token_id": None}, "pad_token_id is None, expected an id for an encoder-decoder"),
        ({"decoder_start_token_id": V}, "decoder_start_token_id is 20, expected an id from 0 to 19"),
        ({"pooling": "last", "eos_token_id": None}, "eos_token_id is None, expected an id for pooling 'last'"),
        ({"decoder_window": 3}, "decoder_window is 3, expected None for a decoder without a window"),
        (
            {"decoder": "local", "mixer": "full", "window": None, "decoder_window": 3},
            "decoder_window is 3, expected None for a decoder without a window",
        ),
        ({"decoder": "local", "decoder_window": -1}, r"window is \(-1, 0\), expected \(left, right\), both 0 or more"),
        ({"num_decoder_layers": 0}, "num_hidden_layers is 0, expected at least 1"),
        ({"hidden_size": 18, "num_attention_heads": 4}, "num_attention_heads is 4, expected a divisor of hidden_size"),
        ({"decoder": "windowed"}, r"'decoder' expected one of \('full', 'local'\), got windowed"),
        ({"pooling": "mean"}, r"'pooling' expected one of \('first', 'last'\), got mean"),
    ],
)
def test_configurations_that_cannot_be(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**options)


def test_wrong_inputs():
    model, ids = seq2seq(), batch()
    with pytest.raises(ValueError, match="^decoder_input_ids is None, expected it or decoder_inputs_embeds$"):
        model(ids)
    with pytest.raises(ValueError, match=r"^segment_ids has shape \[3, 14\], expected None: a row is one document$"):
        model(ids, decoder_input_ids=ids, segment_ids=ids)
    with pytest.raises(ValueError, match="^encoder_hidden_states is None, expected a tensor: add_cross_att"):
        model.get_decoder()(ids)
    with pytest.raises(ValueError, match="^encoder_hidden_states is given, expected None: add_cross_attention is Fal"):
        model.get_encoder()(ids, encoder_hidden_states=torch.zeros(3, 14, 16))
    last = classifier(pooling="last")
    ids[[0, 2], 3] = EOS
    with pytest.raises(ValueError, match="^input_ids has no eos_token_id = 2 in row 1, expected one or more in"):
        last(ids)
    with pytest.raises(ValueError, match="^input_ids is None, expected ids for pooling 'last', which looks for"):
        last(inputs_embeds=torch.zeros(3, 14, 16))
    with pytest.raises(ValueError, match=r"^position_ids has shape \[1, 14\], expected None: a row is one document$"):
        classifier()(ids, position_ids=torch.arange(14)[None])
